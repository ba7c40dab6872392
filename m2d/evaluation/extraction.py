"""Features of image sets, extracted once for all parts of an evaluation, on Ray Data where that pays, and kept.

A vector is kept by extractor, image size, view and image, some hundred a file, so that an interrupted extraction
resumes. Knows nothing of labels or scores.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from m2d.cluster.fan_out import JobResult, run_jobs
from m2d.cluster.nodes import cluster_total, node_resources
from m2d.cluster.start import ray_cluster
from m2d.data.feature_jobs import CPU_BATCH, GPU_BATCH, extract_view
from m2d.data.shards import cache_file
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.evaluation.feature_set import ImageSet
from m2d.files.progress import progress
from m2d.files.storage import one_line
from m2d.models.extractors import FeatureExtractor, extractor_identity, load_feature_extractor
from m2d.models.settings import FeatureExtractorConfig

logger = logging.getLogger(__name__)

FOLDER = "evaluation_v1/features"  # the number goes up when the way from pixels to a vector changes
SHARD_IMAGES = 256
RAY_PAYS_FROM = 2048  # images on a CPU; starting Ray and its actors costs about 15 s


@dataclass(frozen=True)
class Extraction:
    """How features are made, the same for all sets."""

    cache_dir: str
    device: str
    batch_size: int | None = None  # None: as the device likes it
    num_actors: int | None = None  # 0: in this process; None: as many as pay
    verbose: bool = False

    def features(
        self, images: ImageSet, config: FeatureExtractorConfig, views: Sequence[int] = (0,)
    ) -> list[np.ndarray]:
        """`cls` of every image in each view (m2d.data.views): float32 [N, D] a view.

        Raises CheckpointError for weights that cannot be loaded or features that are not finite, ConfigError for a
        batch that does not fit the device, DataError where the cache cannot be written.
        """
        key, _ = extractor_identity(config)
        folders = {
            view: Path(self.cache_dir).expanduser().absolute() / FOLDER / f"{key}-{images.image_size}px-view{view}"
            for view in views
        }
        found = {view: _read(folder, images.sha256) for view, folder in folders.items()}
        jobs = []
        for view, there in found.items():
            rows = [row for row, digest in _first_of_each(images.sha256) if digest not in there]
            pieces = (rows[first : first + SHARD_IMAGES] for first in range(0, len(rows), SHARD_IMAGES))
            jobs += [_Job(str(folders[view]), view, tuple(piece)) for piece in pieces]
        if jobs:
            self._run(
                _Work(config, key, _file_of(images.pixels), images.sha256, self.batch_size, tuple(jobs)), images.name
            )
            found = {view: _read(folder, images.sha256) for view, folder in folders.items()}
        return [np.stack([found[view][digest] for digest in images.sha256]) for view in views]

    def _run(self, work: "_Work", name: str) -> None:
        total = sum(len(job.rows) for job in work.jobs)
        with progress(f"features of {name}, {work.config.name}", total) as shown:
            made = self._on_ray(work) if self._pays(total) else self._here(work)
            for result in made:
                shown.advance(result.images)

    def _pays(self, images: int) -> bool:
        if self.num_actors is not None:
            return self.num_actors > 0
        if self.device == "cpu":
            return bool(os.environ.get("RAY_ADDRESS")) or (images >= RAY_PAYS_FROM and (os.cpu_count() or 1) > 1)
        return torch.cuda.device_count() > 1

    def _here(self, work: "_Work") -> Iterator[JobResult]:
        extractor = work.load(self.device, None)
        for number in range(len(work.jobs)):
            yield work.run(number, extractor, self.device)

    def _on_ray(self, work: "_Work") -> Iterator[JobResult]:
        """The jobs on actors that hold the extractor; each reserves a CPU, or a GPU, and so never waits for others."""
        with ray_cluster(verbose=self.verbose):
            gpus, cpus = int(cluster_total("GPU")), int(cluster_total("CPU")) or 1
            use_gpu = gpus > 0 and self.device != "cpu"
            # Of a machine started here its cores, however many logical CPUs it was given.
            limit = gpus if use_gpu else max(1, min(cpus, len(node_resources()) * (os.cpu_count() or 1)))
            actors = min(self.num_actors or limit, limit, len(work.jobs))
            yield from run_jobs(
                work,
                len(work.jobs),
                actors=actors,
                device="cuda" if use_gpu else "cpu",
                threads=max(1, limit // actors),
                bars=self.verbose,
            )


@dataclass(frozen=True)
class _Job:
    folder: str  # of the cache
    view: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Work:
    """All jobs of one image set and one extractor. Cheap to pickle: pixels are read from their file."""

    config: FeatureExtractorConfig
    key: str
    pixels: str
    sha256: tuple[str, ...]
    batch_size: int | None
    jobs: tuple[_Job, ...]

    def load(self, device: str, threads: int | None) -> FeatureExtractor:
        """The extractor on the device. Raises ConfigError where a node's weights are not the driver's."""
        if device == "cpu" and threads is not None:
            torch.set_num_threads(min(threads, os.cpu_count() or 1))
        config = self.config
        extractor = load_feature_extractor(config.name, config.weights, config.input_size, config.crop)
        if extractor.key != self.key:
            raise ConfigError(
                f"feature extractor: a node's weights give {extractor.key}, the driver's {self.key}; every node needs "
                "the same file at the same path"
            )
        return extractor.to(device).to(memory_format=torch.channels_last)

    def run(self, job: int, extractor: FeatureExtractor, device: str) -> JobResult:
        """Make and keep the vectors of one job."""
        folder, view, rows = self.jobs[job].folder, self.jobs[job].view, self.jobs[job].rows
        try:
            pixels = np.load(self.pixels, mmap_mode="r")
        except OSError as error:
            raise DataError(
                f"cache: {self.pixels} cannot be read ({error.strerror}); every node must see --cache_dir"
            ) from None
        size = self.batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
        parts = []
        for first in range(0, len(rows), size):
            batch = pixels[list(rows[first : first + size])]
            try:
                parts.append(extract_view(extractor, batch, view, device).cls.numpy())
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"batch_size {size} does not fit the memory of {device}; try --batch_size {max(1, size // 2)} (the "
                    "result stays the same)"
                ) from None
        cls = np.concatenate(parts).astype(np.float32)
        if not np.isfinite(cls).all():
            raise CheckpointError(
                f"feature extractor {extractor.name} gives features that are not finite; its weights are broken, get "
                "the file again"
            )
        ids = np.stack([np.frombuffer(bytes.fromhex(self.sha256[row]), dtype=np.uint8) for row in rows])
        name = f"cls_{hashlib.sha256(ids.tobytes()).hexdigest()[:16]}.safetensors"
        with cache_file(Path(folder) / name) as partial:
            partial.write_bytes(save({"sha256": ids, "cls": cls}))
        return JobResult(len(rows))


def _first_of_each(sha256: Sequence[str]) -> Iterator[tuple[int, str]]:
    seen: set[str] = set()
    for row, digest in enumerate(sha256):
        if digest not in seen:
            seen.add(digest)
            yield row, digest


def _file_of(pixels: np.ndarray) -> str:
    if not isinstance(pixels, np.memmap):
        raise TypeError("pixels must be mapped from a file (m2d.evaluation.image_sets), for actors read them there")
    return str(pixels.filename)


def _read(folder: Path, sha256: Sequence[str]) -> dict[str, np.ndarray]:
    """sha256 -> float32 [D] of the wanted images that the folder holds."""
    wanted = set(sha256)
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("cls_*.safetensors")):
        try:
            tensors = load_file(path)
            ids, cls = tensors["sha256"], tensors["cls"]
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s cannot be read (%s); its images are extracted again", path, one_line(error))
            if not isinstance(error, OSError):  # the disk's trouble is no damage
                path.unlink(missing_ok=True)
            continue
        for row, digest in enumerate(bytes(digest).hex() for digest in ids):
            if digest in wanted:
                found[digest] = cls[row]
    return found
