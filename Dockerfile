# M2D on one machine, with or without a GPU (for clusters: docs/cluster/Dockerfile). From the root of the repository:
#   docker build -t m2d .
#   docker run --rm --gpus all --shm-size 8g -u $(id -u):$(id -g) -v /data:/data:ro -v $PWD:/workspace m2d \
#       train --preset ham-64 --data_root /data/HAM10000
# Leave out --gpus where there is none. Ray keeps its objects in shared memory, of which Docker gives 64 MB: hence --shm-size.
# Python as in requirements.lock. CUDA's libraries come with torch, so that the host needs the driver alone.
FROM python:3.11-slim-bookworm
# The packages first: they change seldom, and are 7 GB.
COPY requirements.txt requirements-c2pa.txt requirements.lock /src/
RUN pip install --no-cache-dir --no-input -r /src/requirements.txt -r /src/requirements-c2pa.txt -c /src/requirements.lock
COPY pyproject.toml README.md LICENSE /src/
COPY m2d /src/m2d
RUN pip install --no-cache-dir --no-input --no-deps /src
# Whoever runs it (-u) may write here: caches, Ray's session, and what a command without a mounted folder leaves.
ENV HOME=/tmp/home
RUN mkdir -m 1777 /workspace /tmp/home
WORKDIR /workspace
ENTRYPOINT ["m2d"]
CMD ["--help"]
