"""One training of one classifier, what it leaves on the disk, and how jobs are run, in this process or on Ray.

Called by the downstream comparison. Knows no classifier in particular, and no scores.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from m2d.classes import NUM_CLASSES
from m2d.cluster.fan_out import fan_out, numbered, on_tasks
from m2d.cluster.nodes import cluster_total
from m2d.cluster.start import ray_cluster
from m2d.data.store import cache_file
from m2d.evaluation.arms import TrainingRows

GPU_SHARE = 0.25  # of a task: small networks on small images leave most of a GPU idle
OnDone = Callable[[int, int], None]  # jobs done, jobs in all


class Classifier(Protocol):
    """Something that trains on rows of its real and generated images and calls its test images. It is pickled."""

    @property
    def identity(self) -> str:
        """Everything that shapes the answer but the rows and the seed: settings, weights, images."""
        ...

    @property
    def seeded(self) -> bool:
        """Whether the seed changes the answer."""
        ...

    @property
    def wants_gpu(self) -> bool:
        """Whether a GPU would make it faster."""
        ...

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Train, then the class probabilities of the test images, float [N, K]."""
        ...


@dataclass(frozen=True)
class Job:
    """One training. Jobs of one digest give one answer."""

    rows: TrainingRows
    seed: int
    digest: str

    @classmethod
    def of(cls, classifier: Classifier, rows: TrainingRows, seed: int) -> "Job":
        """The job, with its digest: hex, stable between runs and machines."""
        digest = hashlib.sha256(f"downstream 1\n{classifier.identity}\n".encode())
        for values, kind in ((rows.real, "<i8"), (rows.generated, "<i8"), (rows.weights, "<f8")):
            digest.update(f"{len(values)}\n".encode())
            digest.update(np.ascontiguousarray(values, dtype=kind).tobytes())
        digest.update(str(seed if classifier.seeded else 0).encode())
        return cls(rows, seed, digest.hexdigest())


Runner = Callable[[Classifier, Sequence[Job]], list[np.ndarray]]  # probabilities of each job, in order


class KeptAnswers:
    """A folder with an .npy of each finished job, each written whole; or no folder, and nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, job: Job) -> np.ndarray | None:
        """The job's probabilities, if they are there and can be read."""
        if self.folder is None or not self._path(job).is_file():
            return None
        try:
            answer: np.ndarray = np.load(self._path(job), allow_pickle=False)
        except (OSError, ValueError, EOFError):  # of a broken disk; the job is done again
            return None
        return answer if answer.ndim == 2 and answer.shape[1] == NUM_CLASSES else None

    def keep(self, job: Job, answer: np.ndarray) -> None:
        """Raises DataError where the disk refuses."""
        if self.folder is not None:
            with cache_file(self._path(job)) as partial, partial.open("wb") as stream:
                np.save(stream, answer, allow_pickle=False)

    def _path(self, job: Job) -> Path:
        assert self.folder is not None, "find and keep have seen to it"
        return self.folder / f"{job.digest}.npy"


def run_here(
    classifier: Classifier, jobs: Sequence[Job], *, kept: Path | None = None, on_done: OnDone | None = None
) -> list[np.ndarray]:
    """The probabilities of each job, one after the other in this process; of each digest once.

    kept: a folder for what is finished, so that a killed run goes on. on_done: told after each job.
    """
    return _finish_jobs(
        jobs, kept, on_done, lambda left: ((job, classifier.predict(job.rows, job.seed)) for job in left)
    )


def run_on_ray(
    classifier: Classifier,
    jobs: Sequence[Job],
    *,
    kept: Path | None = None,
    on_done: OnDone | None = None,
) -> list[np.ndarray]:
    """As run_here, with a Ray task for each job that is not kept yet.

    A task reserves one CPU, so that it runs on the smallest cluster; where the classifier gains by a GPU and the
    cluster has some, GPU_SHARE of one instead. The classifier, and with it the images, goes to the object store once.
    Raises the M2DError that a task raised.
    """

    def run(left: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
        if not left:
            return
        with ray_cluster():
            share = GPU_SHARE if classifier.wants_gpu and cluster_total("GPU") else 0.0
            tasks = on_tasks((classifier, left), _predict, cpus=1, gpus=share)
            for row in fan_out(numbered(len(left)), tasks):
                answer = np.frombuffer(row["answer"], row["dtype"]).reshape(row["shape"])
                yield left[row["job"]], answer.copy()

    return _finish_jobs(jobs, kept, on_done, run)


def _predict(held: tuple[Classifier, list[Job]], block: pa.Table) -> pa.Table:
    classifier, jobs = held
    number = block["job"][0].as_py()
    answer = classifier.predict(jobs[number].rows, jobs[number].seed)
    return pa.table(
        {"job": [number], "answer": [answer.tobytes()], "dtype": [answer.dtype.str], "shape": [list(answer.shape)]}
    )


def _finish_jobs(
    jobs: Sequence[Job],
    kept: Path | None,
    on_done: OnDone | None,
    run: Callable[[list[Job]], Iterator[tuple[Job, np.ndarray]]],
) -> list[np.ndarray]:
    """What every way of running shares: nothing twice, nothing that is kept, everything kept as soon as it is there.

    run: yields each of the jobs that are left with its answer, in any order.
    """
    answers = KeptAnswers(kept)
    single = {job.digest: job for job in jobs}
    found = {digest: answers.find(job) for digest, job in single.items()}
    done = {digest: answer for digest, answer in found.items() if answer is not None}
    left = [job for digest, job in single.items() if digest not in done]
    if on_done:
        on_done(len(done), len(single))
    for job, answer in run(left):
        answers.keep(job, answer)
        done[job.digest] = answer
        if on_done:
            on_done(len(done), len(single))
    return [done[job.digest] for job in jobs]
