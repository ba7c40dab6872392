"""Trainings of the downstream comparison as Ray tasks side by side. The only file of that comparison that knows Ray."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from m2d.cluster.fan_out import fan_out, numbered, on_tasks
from m2d.cluster.nodes import node_resources
from m2d.cluster.start import ray_cluster
from m2d.errors import ConfigError
from m2d.evaluation.downstream_jobs import Classifier, Job, OnDone, finish_jobs

GPU_SHARE = 0.25  # of a task: small networks on small images leave most of a GPU idle


def run_on_ray(
    classifier: Classifier,
    jobs: Sequence[Job],
    *,
    gpus_per_task: float = GPU_SHARE,
    kept: Path | None = None,
    on_done: OnDone | None = None,
) -> list[np.ndarray]:
    """As m2d.evaluation.downstream_jobs.run_here, with a task for each job that is not kept yet.

    A task reserves one CPU, so that it runs on the smallest cluster; where the classifier gains by a GPU and the
    cluster has some, that share of one besides. The classifier, and with it the images, goes to the object store once.
    Raises the M2DError that a task raised, ConfigError for a share that no node has.
    """
    return finish_jobs(jobs, kept, on_done, partial(_run, classifier, gpus_per_task))


def _run(classifier: Classifier, gpus_per_task: float, jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
    if not jobs:
        return
    with ray_cluster():
        share = _gpu_share(gpus_per_task) if classifier.wants_gpu else 0.0
        predict = partial(_predict, ray.put((classifier, jobs)))
        for row in fan_out(numbered(len(jobs)), on_tasks(predict, cpus=1, gpus=share)):
            yield jobs[row["job"]], np.frombuffer(row["answer"], row["dtype"]).reshape(row["shape"]).copy()


def _predict(work: "ray.ObjectRef[tuple[Classifier, list[Job]]]", block: pa.Table) -> pa.Table:
    classifier, jobs = ray.get(work)
    number = block["job"][0].as_py()
    answer = classifier.predict(jobs[number].rows, jobs[number].seed)
    return pa.table(
        {"job": [number], "answer": [answer.tobytes()], "dtype": [answer.dtype.str], "shape": [list(answer.shape)]}
    )


def _gpu_share(wanted: float) -> float:
    """What a task asks for; 0 where the cluster has no GPU."""
    largest = max((node.get("GPU", 0.0) for node in node_resources()), default=0.0)
    if not largest:
        return 0.0
    if not 0 < wanted <= largest or (wanted > 1 and not math.isclose(wanted, round(wanted))):
        raise ConfigError(
            f"gpus_per_task is {wanted:g}; it must be above 0, a whole number if above 1, and at most {largest:g}, the "
            "GPUs of the largest node"
        )
    return wanted
