#!/usr/bin/env bash
# A job of M2D on Slurm: a Ray cluster of its own on the nodes that Slurm gives, for as long as the job runs.
#
#   cd m2d && source .venv/bin/activate
#   sbatch docs/cluster/slurm.sh python jobs/train.py --preset ham-128 --num_workers 8 \
#       --data_root /shared/ISIC --experiments_dir /shared/experiments --cache_dir /shared/cache
#
# Submit from the root of the repository. It, its .venv and the three paths are on a file system that all nodes see.
# When the time is up, submit the same line again: the run resumes from its last checkpoint (--saving.every_steps).
# --num_workers is nodes x GPUs a node. The job's exit code is the command's.

#SBATCH --job-name=m2d
#SBATCH --nodes=2
# One Ray node for each machine; Ray divides it among its workers.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=m2d-%j.log
# A job whose node failed starts again by itself, resumes, and goes on with the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is up the script itself is told, so that it ends its Ray and removes the token.
#SBATCH --signal=B:TERM@120

set -euo pipefail

if [ $# -eq 0 ]; then
    echo "slurm.sh: no command; give one: sbatch docs/cluster/slurm.sh python jobs/train.py ..." >&2
    exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm.sh: this is not a Slurm job; submit it: sbatch docs/cluster/slurm.sh $1 ..." >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"

# The token of this cluster alone: on nodes that others share, an open Ray port would run anybody's code as you. A file
# that only you can read (mktemp's mode is 600), since an argument would stand in the process list. All nodes see the
# submit directory.
RAY_AUTH_TOKEN_PATH=$(mktemp "$PWD/.m2d-ray-token.XXXXXXXX")
export RAY_AUTH_TOKEN_PATH RAY_AUTH_MODE=token
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"

# Ends what this script started: its own two srun steps, which take their Ray processes along. Never `ray stop`, which
# ends every Ray of yours on these nodes, those of your other jobs too; for the same reason not `ray symmetric-run`.
steps=()
finish() {
    local step
    rm -f "$RAY_AUTH_TOKEN_PATH"
    for step in "${steps[@]}"; do kill "$step" 2>/dev/null || true; done
    # Half a minute for Ray to end itself; what is left then, Slurm ends with the job.
    for _ in {1..60}; do
        kill -0 "${steps[@]}" 2>/dev/null || break
        sleep 0.5
    done
}
trap finish EXIT
trap 'exit 143' TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node")
head_ip=$("${on_head[@]}" hostname --ip-address | awk '{print $1}')

# Free ports of the head's, asked of its kernel: another job of yours, or somebody else's Ray, may hold the usual ones.
# Every other port is 0 below, so that Ray takes free ones itself.
read -r port dashboard_port client_port < <("${on_head[@]}" python -c '
import socket
held = [socket.socket() for _ in range(3)]
for one in held:
    one.bind(("", 0))
print(*(one.getsockname()[1] for one in held))')
export RAY_ADDRESS=$head_ip:$port

# In /tmp of each node, short (a socket's path has at most 107 characters), and not another job's.
session=/tmp/m2d-ray-$SLURM_JOB_ID
ray_options=(
    --block --disable-usage-stats --temp-dir="$session"
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --object-manager-port=0 --node-manager-port=0 --min-worker-port=0 --max-worker-port=0
    --dashboard-agent-listen-port=0 --metrics-export-port=0
)
shared_by_steps=(--overlap --cpus-per-task="$SLURM_CPUS_PER_TASK")

# The name can be guessed: whoever was there first would read along.
srun "${shared_by_steps[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
    bash -c "mkdir -p -m 700 $session && [ -O $session ] && [ ! -L $session ]"

srun "${shared_by_steps[@]}" --nodes=1 --ntasks=1 --nodelist="$head_node" \
    ray start --head --node-ip-address="$head_ip" --port="$port" --ray-client-server-port="$client_port" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" "${ray_options[@]}" &
steps+=($!)

# Waits until so many Ray nodes live; M2D counts GPUs when it starts, so all of them must be there.
await_nodes() {
    timeout 400 python - "$1" <<'PYTHON'
import sys, time
import ray

wanted, alive, reason = int(sys.argv[1]), 0, ""
deadline = time.monotonic() + 300
while alive < wanted:
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        alive = sum(node["Alive"] for node in ray.nodes())
    except Exception as error:  # the head is on its way up; at the end the last reason is told
        reason = f" ({error})"
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {alive} of {wanted} Ray nodes came within 300 s{reason}")
    time.sleep(2)
PYTHON
}

await_nodes 1
if [ "${#nodes[@]}" -gt 1 ]; then
    srun "${shared_by_steps[@]}" --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) \
        --exclude="$head_node" ray start --address="$RAY_ADDRESS" "${ray_options[@]}" &
    steps+=($!)
    await_nodes "${#nodes[@]}"
fi

# In the background, so that a signal reaches the trap at once and not when the command is over.
"$@" &
command_id=$!
trap 'kill -TERM "$command_id" 2>/dev/null || true; wait "$command_id" || true; exit 143' TERM
wait "$command_id"
