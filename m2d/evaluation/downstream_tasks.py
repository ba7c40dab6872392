"""Trainings of the downstream comparison as Ray tasks side by side. The only file of that comparison that knows Ray."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import ray
import ray.exceptions

from m2d.cluster.nodes import node_resources
from m2d.cluster.start import ray_cluster
from m2d.data.stream import user_error
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
    return finish_jobs(jobs, kept, on_done, functools.partial(_run, classifier, gpus_per_task))


def _run(classifier: Classifier, gpus_per_task: float, jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
    if not jobs:
        return
    with ray_cluster():
        share = _gpu_share(gpus_per_task) if classifier.wants_gpu else 0.0
        held = ray.put(classifier)
        task = _predict.options(num_cpus=1, num_gpus=share)
        waiting = {task.remote(held, job): job for job in jobs}
        try:
            while waiting:
                (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(ready), np.array(ray.get(ready))  # a copy, so that the store can let go of it
        except ray.exceptions.RayError as error:
            cause = user_error(error)
            if cause is None:
                raise
            raise cause from error
        finally:
            for reference in waiting:  # after an error or Ctrl-C
                ray.cancel(reference)


@ray.remote
def _predict(classifier: Classifier, job: Job) -> np.ndarray:
    return classifier.predict(job.rows, job.seed)


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
