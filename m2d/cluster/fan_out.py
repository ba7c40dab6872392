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
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

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


class Extraction(Protocol):
    """Numbered jobs that share a network. It is pickled."""

    def load(self, device: str, threads: int) -> Any:
        """The network on the device. threads: of torch in this process, for a CPU."""

    def run(self, job: int, network: Any, device: str) -> JobResult:
        """Do one job, and keep what it makes."""


def run_jobs(
    work: Extraction, count: int, *, actors: int, device: str, threads: int, bars: bool = False
) -> Iterator[JobResult]:
    """The results of jobs 0 .. count - 1 on actors, each of which reserves a GPU, or one CPU and so never waits."""
    gpus = 0.0 if device == "cpu" else 1.0
    stage = on_actors(
        partial(work.load, device, threads), partial(_run_job, work, device), most=actors, cpus=1 - gpus, gpus=gpus
    )
    for row in fan_out(numbered(count), stage, bars=bars):
        yield JobResult(**row)


def _run_job(work: Extraction, device: str, network: Any, block: pa.Table) -> pa.Table:
    return as_block(work.run(block["job"][0].as_py(), network, device))


def as_block(result: JobResult) -> pa.Table:
    """One row, from which JobResult(**row) is the result again."""
    return pa.Table.from_pylist([dataclasses.asdict(result)], schema=_RESULT)


_RESULT = pa.schema([("images", pa.int64()), ("failures", pa.list_(pa.string()))])


def raise_user_error(error: "ray.exceptions.RayError") -> NoReturn:
    """Raise the M2DError that a task raised, out of Ray's wrappings; the error itself where it is another one."""
    cause = _user_error(error)
    if cause is None:
        raise error
    raise cause from error


def _user_error(error: BaseException) -> M2DError | None:
    """The wrappings lose their tracebacks, which hold Ray Data's executor, and so actors with their CPUs.

    While the exception is referenced, as in a notebook, the next run would hang.
    """
    import ray.exceptions

    one: BaseException | None = error
    seen = set[int]()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(one, M2DError) and not isinstance(one, ray.exceptions.RayError):
            for wrapping in _chained(error):
                wrapping.__traceback__ = None
            gc.collect()  # the executor is part of a cycle
            return type(one)(str(one).splitlines()[0])  # Ray appends advice on its own settings
        one = getattr(one, "cause", None) or one.__cause__
    return None


def _chained(error: BaseException) -> list[BaseException]:
    """The error, what it came from, and what was being handled meanwhile."""
    found: dict[int, BaseException] = {}
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in found:
            found[id(one)] = one
            left += [getattr(one, "cause", None), one.__cause__, one.__context__]
    return list(found.values())
