"""Work fanned out over Ray: blocks go through tasks and pools of actors, and their results come back as they end.

A block is the unit: one that an actor, a task or a node was lost with is given to another, so writing a result twice
must leave the same. Decoding and writing tasks import this file, so it imports no torch, and Ray with the first use.
"""

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pyarrow as pa

from m2d.errors import M2DError

if TYPE_CHECKING:
    import ray
    import ray.exceptions

Stage = dict[str, Any]  # what `on_tasks` and `on_actors` make
NO_CHATTER = {
    "_internal.progress": logging.ERROR,  # it warns that there are no bars
    # They show where in Ray an error passed by; what is wrong is raised.
    "_internal.execution.streaming_executor_state": logging.CRITICAL,
    "exceptions": logging.CRITICAL,
}


def fan_out(blocks: Sequence[pa.Table], *stages: Stage, bars: bool = False) -> Iterator[dict[str, Any]]:
    """The rows that the last stage makes, as they end; closing the iterator ends the work.

    bars: Ray's own. Raises the M2DError that a stage raised.
    """
    import ray.data
    import ray.exceptions

    dataset: ray.data.Dataset = ray.data.from_arrow(list(blocks))  # without tasks
    for stage in stages:
        dataset = dataset.map_batches(**stage, batch_format="pyarrow")
    context = dataset.context
    context.execution_no_progress_timeout_s = -1  # a large network on a CPU may take very long over one block
    context.enable_progress_bars = bars
    context.raise_original_map_exception = True
    for name, level in NO_CHATTER.items():
        logging.getLogger(f"ray.data.{name}").setLevel(level)
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from cast(pa.Table, block).to_pylist()
    except ray.exceptions.RayError as error:
        raise_user_error(error)


def on_tasks(held: Any, run: Callable[[Any, pa.Table], pa.Table], *, cpus: float, gpus: float = 0.0) -> Stage:
    """As many tasks as the cluster has room for.

    held: goes to the object store once. gpus: of a task, reserved instead of CPUs; a block is then one row.
    """
    import ray

    reserved = {"num_gpus": gpus, "batch_size": 1} if gpus else {"num_cpus": cpus, "batch_size": None}
    return {"fn": partial(_run_task, ray.put(held), run), **reserved}


def _run_task(held: "ray.ObjectRef[Any]", run: Callable[[Any, pa.Table], pa.Table], block: pa.Table) -> pa.Table:
    import ray

    return run(ray.get(held), block)


def on_actors(
    load: Callable[[], Any],
    run: Callable[[Any, pa.Table], pa.Table],
    *,
    most: int,
    least: int | None = None,
    cpus: float,
    gpus: float = 0.0,
    block_rows: int = 1,
) -> Stage:
    """A pool of actors that hold what `load` gives and run blocks with it. least: so many must start; None: all.

    block_rows: rows of a block, at most.
    """
    import ray.data

    return {
        "fn": BlockActor,
        "fn_constructor_args": (load, run),  # by value: Ray puts them into the object store once
        "compute": ray.data.ActorPoolStrategy(min_size=least or most, max_size=most, initial_size=most),
        "batch_size": block_rows if gpus else None,  # a block each; Ray asks for a number where GPUs are reserved
        "num_cpus": cpus,
        "num_gpus": gpus or None,
    }


class BlockActor:
    """Loads what it holds with its first block: an error there reaches the driver."""

    def __init__(self, load: Callable[[], Any], run: Callable[[Any, pa.Table], pa.Table]) -> None:
        self._load, self._run = load, run
        self._held: Any = None

    def __call__(self, block: pa.Table) -> pa.Table:
        """The stage's work on one block."""
        if self._held is None:
            self._held = self._load()
        return self._run(self._held, block)


def numbered(count: int) -> list[pa.Table]:
    """Blocks of one row, `job`: 0 .. count - 1."""
    return [pa.table({"job": [number]}) for number in range(count)]


@dataclass(frozen=True)
class JobResult:
    """The result of a finished job."""

    images: int  # that it made
    failures: list[str] = field(default_factory=list)  # `path: reason` of each image that it could not make


def run_jobs(work: Any, *, actors: int, device: str, threads: int, bars: bool = False) -> Iterator[JobResult]:
    """The results of all jobs on actors, each of which reserves a GPU, or one CPU and so never waits.

    work: m2d.data.features.ExtractionJobs, or what has its `jobs`, `load` and `run`; it is pickled. threads: of torch
    in an actor on a CPU.
    """
    gpus = 0.0 if device == "cpu" else 1.0
    stage = on_actors(
        partial(work.load, device, threads), partial(_run_job, work, device), most=actors, cpus=1 - gpus, gpus=gpus
    )
    return (JobResult(**row) for row in fan_out(numbered(len(work.jobs)), stage, bars=bars))


def _run_job(work: Any, device: str, network: Any, block: pa.Table) -> pa.Table:
    return as_block(work.run(block["job"][0].as_py(), network, device))


def as_block(result: JobResult) -> pa.Table:
    """One row, from which JobResult(**row) is the result again."""
    schema = pa.schema([("images", pa.int64()), ("failures", pa.list_(pa.string()))])
    return pa.Table.from_pylist([dataclasses.asdict(result)], schema=schema)


def raise_user_error(error: "ray.exceptions.RayError") -> NoReturn:
    """Raise the M2DError that a task raised, out of Ray's wrappings; the error itself where it is another one.

    The wrappings lose their tracebacks, which hold Ray Data's executor, and so actors with their CPUs: while the
    exception is referenced, as in a notebook, the next run would hang.
    """
    import ray.exceptions

    causes: list[BaseException] = [error]
    chained: list[BaseException] = [error]
    for found, links in ((causes, ("cause", "__cause__")), (chained, ("cause", "__cause__", "__context__"))):
        for one in found:  # it grows meanwhile
            others = (getattr(one, link, None) for link in links)
            found += [other for other in others if other is not None and not any(other is known for known in found)]
    users = [one for one in causes if isinstance(one, M2DError) and not isinstance(one, ray.exceptions.RayError)]
    if not users:
        raise error
    for wrapping in chained:
        wrapping.__traceback__ = None
    gc.collect()  # the executor is part of a cycle
    raise type(users[0])(str(users[0]).splitlines()[0]) from error  # Ray appends advice on its own settings
