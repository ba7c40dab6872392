"""Groups made on Ray: a pool of generator actors, then tasks that look at, encode and write; the driver counts.

A group is a block of its own, so the loss of an actor, a task or a node costs the
groups in the making, which Ray gives to another; who writes a group again replaces the same files by the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from m2d.cluster.fan_out import fan_out, on_actors, on_tasks
from m2d.cluster.nodes import cluster_total, device_of_actor, node_resources
from m2d.errors import ConfigError
from m2d.generation.group import (
    GeneratorSettings,
    GroupResult,
    GroupWriter,
    MadeGroup,
    PlanGroups,
    make_group,
    planned_rows,
)
from m2d.generation.plan import PlanRow, rows_of, table_of

if TYPE_CHECKING:  # writing tasks import this file and need no torch: 400 MB and many seconds each
    from m2d.generation.generator import Generator

WRITER_CPUS = 1.0  # logical ones of a writing task; one such task keeps up with a few hundred small images a second


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """How many generators there may be, and what each asks of Ray."""

    most: int
    device: str
    gpus: float  # an actor; 0 computes on the CPU, or uses a GPU that Ray does not know of
    threads: int  # of torch in an actor, on a CPU

    @property
    def text(self) -> str:
        """`4 actors, a GPU each`."""
        actors = f"{self.most} actor{'s' if self.most > 1 else ''}"
        share = f"{self.gpus:g} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else f"{self.threads} CPU threads"
        return f"up to {actors} on Ray, {share} each"


def pick_pool(*, num_actors: int | None, gpus_per_actor: float | None, device: str, groups: int) -> ActorPool:
    """A generator a GPU, or a fraction of one; on CPUs as many as there are, with one kept free for the writers.

    num_actors: at most so many; None: as many as the cluster has room for. groups: there is no use for more.
    Raises ConfigError where not even one has room.
    """
    gpus = gpus_per_actor if gpus_per_actor is not None else (1.0 if device.startswith("cuda") else 0.0)
    cpus, cluster_gpus = int(cluster_total("CPU")) or 1, cluster_total("GPU")
    if gpus:
        room = int(cluster_gpus / gpus + 1e-9)
        if room < 1:
            raise ConfigError(
                f"gpus_per_actor is {gpus:g} and the Ray cluster has {cluster_gpus:g} GPUs; lower it, add a node, "
                "or name --device cpu"
            )
        most = min(room, num_actors or room, max(groups, 1))
        return ActorPool(most=most, device=device_of_actor(device), gpus=gpus, threads=1)
    most = min(num_actors or cpus, max(1, cpus - 1))
    largest = max((int(node.get("CPU", 0)) for node in node_resources()), default=1)
    # Not from the groups that are left: sums of other threads are rounded otherwise, in one pixel of some thousands.
    threads = max(1, min(largest, (cpus - 1) // most))
    return ActorPool(most=min(most, max(groups, 1)), device=device, gpus=0.0, threads=threads)


def make_on_ray(
    settings: GeneratorSettings, pool: ActorPool, groups: PlanGroups, writer: GroupWriter, *, features: bool
) -> Iterator[GroupResult]:
    """The results of all groups, as they are written. features: compute them, for the gates.

    Raises the M2DError that an actor or a task raised. Closing the iterator ends the work.
    """
    make = on_actors(
        partial(_load, settings, pool.device, pool.threads),
        partial(_make, groups.attempts, features),
        most=pool.most,
        least=1,  # after the loss of a node the others go on
        cpus=0 if pool.gpus else pool.threads,
        gpus=pool.gpus,
        block_rows=groups.size,
    )
    blocks = [groups.table(number) for number in range(len(groups))]
    for row in fan_out(blocks, make, on_tasks(writer, _write, cpus=WRITER_CPUS)):
        kept = dict(zip(row["kept_classes"], row["kept_images"], strict=True))
        yield GroupResult(kept, row["rejected"])


def _load(settings: GeneratorSettings, device: str, threads: int) -> Generator:
    if device == "cpu":
        import torch

        # Ray's CPUs are a budget, which may be more than the machine has. OMP_NUM_THREADS: the user's own word, or what
        # Ray makes of the actor's CPUs.
        limit = int(os.environ.get("OMP_NUM_THREADS") or threads)
        torch.set_num_threads(max(1, min(threads, limit, os.cpu_count() or 1)))
    return settings.load(device)


def _make(attempts: int, features: bool, generator: Generator, block: pa.Table) -> pa.Table:
    """The plan's rows of one group in, its images out."""
    rows = planned_rows(block, attempts)
    return _packed(rows, make_group(generator, rows, with_features=features))


def _write(writer: GroupWriter, block: pa.Table) -> pa.Table:
    """Groups' images in, what became of them out."""
    results = [writer.write(*_unpacked(block, number)) for number in range(block.num_rows)]
    return pa.table(
        {
            "kept_classes": pa.array([list(result.kept) for result in results], pa.list_(pa.string())),
            "kept_images": pa.array([list(result.kept.values()) for result in results], pa.list_(pa.int64())),
            "rejected": pa.array([result.rejected for result in results], pa.list_(pa.string())),
        }
    )


def _packed(rows: Sequence[PlanRow], made: MadeGroup) -> pa.Table:
    """A group in one row, so that no block boundary can divide it."""
    table = table_of(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    features = made.features
    return pa.table(
        {
            "rows": pa.array([sink.getvalue().to_pybytes()], pa.large_binary()),
            "shape": pa.array([list(made.images.shape)], pa.list_(pa.int64())),
            "images": pa.array([made.images.tobytes()], pa.large_binary()),
            "features": pa.array([None if features is None else features.tobytes()], pa.large_binary()),
        }
    )


def _unpacked(block: pa.Table, number: int) -> tuple[list[PlanRow], MadeGroup]:
    """Row `number` of packed groups; the pixels are not copied."""
    shape = block["shape"][number].as_py()
    images = np.frombuffer(block["images"][number].as_buffer(), np.uint8).reshape(shape)
    packed = block["features"][number]
    features = np.frombuffer(packed.as_buffer(), np.float32).reshape(shape[0], -1) if packed.is_valid else None
    with pa.ipc.open_stream(block["rows"][number].as_buffer()) as stream:
        return rows_of(stream.read_all()), MadeGroup(images, features)
