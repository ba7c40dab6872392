"""One generation run on a Ray cluster of its own: three nodes with a mock GPU each, one of them taken away in mid-run.

python tests/generation/sharding_run.py CHECKPOINT OUTPUT REPORT

Run by test_sharding.py as a process, since a process can be in one cluster only and the tests share theirs. The
images are made on the CPU, whatever Ray believes; REPORT is a JSON file of which node made what.
"""

import json
import logging
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from m2d.generation import run, workers
from m2d.generation.generator import Generator
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.generation.workers import load_generator

NODES = 3
PATIENCE_S = 150.0  # for what must happen; on a busy machine an actor may need a minute to start
GROUP_S = 0.2  # at least so long does a group take, so that a node is taken away in mid-run


def traced_generator(trace: Path, *arguments: Any) -> Generator:
    """The run's generator, which also says where it works: trace/<node>/<number of its group>.

    No group ends before every node has begun one, so that the slow are waited for.
    """
    generator = load_generator(*arguments)
    made = generator.generate
    node = trace / ray.get_runtime_context().get_node_id()
    node.mkdir(exist_ok=True)  # the lost actor may start again where another one was

    def traced(rows: Any) -> np.ndarray:
        wait_until(lambda: len(list(trace.iterdir())) == NODES)
        time.sleep(GROUP_S)
        images = made(rows)
        (node / rows[0].id).touch()
        return images

    generator.generate = traced  # type: ignore[method-assign]
    return generator


def main(checkpoint: str, output: str, report: str) -> None:
    """Make 180 images, take a node away once each has made two groups, write the report."""
    trace = Path(report).with_suffix(".trace")
    trace.mkdir()
    workers.load_generator = partial(traced_generator, trace)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "num_gpus": 1,
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
            # A node is dead after three refused connections half a second apart, not five of three seconds.
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
        },
    )
    try:
        for _ in range(1, NODES):
            cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        nodes = [node["NodeID"] for node in ray.nodes()]
        victim = next(iter(cluster.worker_nodes))
        removed: dict[str, int] = {}

        def take_away() -> None:
            wait_until(lambda: sum(len(made) >= 2 for made in groups_of(trace).values()) == NODES)
            removed.update({node: len(made) for node, made in groups_of(trace).items()})
            cluster.remove_node(victim, allow_graceful=False)

        taker = threading.Thread(target=take_away, daemon=True)
        taker.start()
        root = run.generate(
            GenerateConfig(
                checkpoint=checkpoint,
                output=output,
                classes="MEL,DF,NV",
                num_samples=60,
                batch_size=4,
                steps=2,
                device="cpu",
                gpus_per_actor=1,
                gates=GateConfig(enabled=False),
            )
        )
        taker.join()
        document = {
            "nodes": nodes,
            "removed": victim.node_id,
            "groups_at_removal": removed,
            "groups": {node: len(made) for node, made in groups_of(trace).items()},
            "output": str(root),
        }
        Path(report).write_text(json.dumps(document), encoding="utf-8")
    finally:
        ray.shutdown()
        cluster.shutdown()


def groups_of(trace: Path) -> dict[str, list[str]]:
    """Node -> the first id of each group that it made."""
    return {node.name: sorted(os.listdir(node)) for node in trace.iterdir()}


def wait_until(condition: Any) -> None:
    """Return when it is true. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} was not true within {PATIENCE_S:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
