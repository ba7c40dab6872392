"""One training run on a Ray cluster of its own: three nodes, two of them at work, and what may happen to them.

python tests/training/nodes_run.py killed DATA_ROOT EXPERIMENTS_DIR REPORT      a node
python tests/training/nodes_run.py preempted DATA_ROOT EXPERIMENTS_DIR REPORT   elastic: a worker, a node, one on notice

Run by test_nodes.py as a process, since a process can be in one cluster only and the tests share theirs. A worker asks
for two CPUs and a node has three, so there is one on a node and a CPU for its data. REPORT is a JSON file.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from processes import descendants
from ray.cluster_utils import Cluster
from tiny_run import TINY, records

from m2d.cli import parse
from m2d.experiment import newest_step
from m2d.training.run import Stopped
from m2d.training.trainer import train

NODES = 3
PATIENCE_S = 300.0
NOTICE_S = 120  # until the announced end; the node goes as soon as the run has saved, so nobody waits for it
EVERY = 20  # steps from checkpoint to checkpoint


def main(what: str, data_root: str, experiments: str, report: str) -> None:
    """Train until it has happened and the run has made steps since; then stop as Ctrl-C would."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 3,
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 5},
        },
    )
    try:
        for _ in range(1, NODES):
            cluster.add_node(num_cpus=3, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        document: dict[str, Any] = {}
        happens = {"killed": kill, "preempted": preempt}[what]
        threading.Thread(target=watch, args=(happens, cluster, Path(experiments), document), daemon=True).start()
        workers = {"killed": "2", "preempted": "1-2"}[what]
        flags = [
            "--num_workers",
            workers,
            "--ray.cpus_per_worker",
            "2",
            "--data.read_cpus",
            "0.5",
            "--epochs",
            "100000",
        ]
        places = ["--data_root", data_root, "--experiments_dir", experiments, "--name", "run"]
        try:
            train(parse("train", [*TINY, *flags, *places, "--saving.every_steps", str(EVERY)]))
        except Stopped as stopped:
            document["stopped"] = str(stopped)
        Path(report).write_text(json.dumps(document), encoding="utf-8")
    finally:
        ray.shutdown()
        cluster.shutdown()


def watch(
    happens: Callable[[Cluster, "Run", dict[str, Any]], None],
    cluster: Cluster,
    experiments: Path,
    document: dict[str, Any],
) -> None:
    """Let it happen once there is a checkpoint; then ask the run to stop."""
    try:
        run = Run(experiments)
        wait_until(lambda: run.step() > 0 and run.checkpoint() >= EVERY)
        document["hosts"] = len(set(train_workers()))
        happens(cluster, run, document)
    except BaseException as error:
        document["error"] = repr(error)
    os.kill(os.getpid(), signal.SIGTERM)


def kill(cluster: Cluster, run: "Run", document: dict[str, Any]) -> None:
    """One of the two nodes that are at work; note the steps."""
    document["node_killed_at"] = run.step()
    lose_a_node(cluster)
    wait_until(lambda: run.step() > document["node_killed_at"])


def preempt(cluster: Cluster, run: "Run", document: dict[str, Any]) -> None:
    """Lose a worker, then a node, for which the third comes in, then one on notice; note checkpoints and steps."""
    killed_at = run.step()
    descendants("RayTrainWorker")[0].kill()
    wait_until(lambda: run.checkpoint() > killed_at)
    killed_at = run.step()
    lose_a_node(cluster)
    wait_until(lambda: run.step() > killed_at and run.workers() == 2)
    (leaving,) = cluster.worker_nodes
    document["before_notice"] = run.checkpoint()
    drain(cluster.address, leaving.node_id)
    wait_until(lambda: run.checkpoint() % EVERY != 0)
    document["saved_on_notice"] = run.checkpoint()
    cluster.remove_node(leaving, allow_graceful=False)
    wait_until(lambda: run.workers() == 1)
    alone_since = run.step()
    wait_until(lambda: run.step() > alone_since + 5)


def lose_a_node(cluster: Cluster) -> None:
    """One that is at work, and that the driver is not on."""
    victim = next(node for node in cluster.worker_nodes if node.node_id in train_workers())
    cluster.remove_node(victim, allow_graceful=False)
    wait_until(lambda: victim.node_id not in train_workers() and len(train_workers()) == 2)


class Run:
    """What the run's files tell while it goes on."""

    def __init__(self, experiments: Path) -> None:
        self.experiments = experiments

    def _last(self) -> dict[str, float]:
        found = [record for run in self.experiments.glob("run_*") for record in records(run)]
        return found[-1] if found else {}

    def step(self) -> int:
        return int(self._last().get("step", 0))

    def workers(self) -> int:
        return int(self._last().get("workers", 0))

    def checkpoint(self) -> int:
        return max((newest_step(run / "checkpoints") for run in self.experiments.glob("run_*")), default=0)


def train_workers() -> list[str]:
    """The node of each training worker that lives."""
    actors = ray._private.state.actors().values()
    return [
        actor["Address"]["NodeID"]
        for actor in actors
        if actor["ActorClassName"].endswith("RayTrainWorker") and actor["State"] == "ALIVE"
    ]


def drain(address: str, node_id: str) -> None:
    """What a spot instance's notice becomes in Ray."""
    ray_command = Path(sys.executable).with_name("ray")
    subprocess.run(
        [str(ray_command), "drain-node", "--address", address, "--node-id", node_id, "--reason",
         "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", str(NOTICE_S)],
        check=True,
        capture_output=True,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s in line {sys._getframe(1).f_lineno}")
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
