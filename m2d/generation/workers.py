"""Groups of a plan's rows are made, looked at, written and listed as done, each all or nothing: here or on Ray.

Making needs a device; writing (gates, PNG encoding, disk) needs a CPU and runs beside the next group's making: in
threads of this process, or in Ray's tasks beside a pool of generator actors. The loss of an actor, a task or a node
costs the groups in the making, which Ray gives to another; a group that is written again replaces the same files by the
same bytes. Writing tasks import this file, so torch (400 MB and many seconds each) waits until it is needed.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from m2d.cluster.nodes import cluster_total, device_of_actor, node_resources
from m2d.errors import CheckpointError, ConfigError
from m2d.generation import output
from m2d.generation.plan import PLAN_SCHEMA, PlanRow, retried, rows_of, table_of, without_seldom
from m2d.generation.provenance import Signing
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.models.settings import Precision

if TYPE_CHECKING:
    from m2d.generation.gates import GateReference, Verdict
    from m2d.generation.generator import Generator
    from m2d.models.checkpoint import Checkpoint
    from m2d.models.extractors import FeatureExtractor

WRITER_CPUS = 1.0  # logical ones of a writing task; one such task keeps up with a few hundred small images a second
_WRITERS = 2  # threads; encoding releases the GIL, and more than the device keeps busy would only wait
_AHEAD = 4  # groups made and not yet written, of this process: what memory they may take


def load_generator(
    config: GenerateConfig,
    recipe: output.Recipe,
    precision: Precision,
    with_extractor: bool,
    device: str,
    checkpoint: Checkpoint | None = None,
    extractor: FeatureExtractor | None = None,
    guide: Checkpoint | None = None,
) -> Generator:
    """The run's generator, anywhere. recipe: of the driver's checkpoints. checkpoint, extractor, guide: if loaded.

    with_extractor: gates or references ask for features. Raises an M2DError, in one line, where this machine lacks
    something that the driver has.
    """
    from m2d.generation.generator import Generator
    from m2d.generation.references import load_reference_extractor
    from m2d.models.checkpoint import load_checkpoint

    checkpoint = checkpoint or load_checkpoint(config.checkpoint)
    if config.guide_checkpoint is not None:
        guide = guide or load_checkpoint(config.guide_checkpoint)
    for name, loaded, sha256 in (
        ("checkpoint", checkpoint, recipe.checkpoint),
        ("guide_checkpoint", guide, recipe.guide),
    ):
        if loaded is not None and loaded.sha256 != sha256:
            place = getattr(config, name)
            raise CheckpointError(f"{name}: {place} is another one on a node than on the driver; all need the same")
    if with_extractor and extractor is None:
        extractor = load_reference_extractor(checkpoint, config.extractor_weights)
    return Generator(
        checkpoint,
        batch_size=config.batch_size,
        device=device,
        mixed_precision=precision,
        extractor=extractor,
        compile=config.compile,
        compile_mode=config.compile_mode,
        time_shift=recipe.time_shift,
        guide=guide,
    )


Made = tuple[list[PlanRow], np.ndarray, np.ndarray | None]
"""Rows, their images uint8 [N, H, W, 3], and features float32 [N, D] of these where the gates want them."""


def make_group(generator: Generator, plan: pa.Table, attempts: int, features: bool) -> Made:
    """The images of some rows of a plan, after so many rejected attempts of each. features: compute them, for gates.

    Raises ConfigError for a batch that does not fit the device, and what Generator.generate raises.
    """
    import torch

    rows = rows_of(plan)
    for _ in range(attempts):
        rows = [retried(row) for row in rows]
    try:
        images = generator.generate(rows)
        return rows, images, generator.features(images) if features else None
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"batch_size {generator.batch_size} does not fit the memory of {generator.device}; "
            f"try --batch_size {max(1, generator.batch_size // 2)} (the images stay the same)"
        ) from None


@dataclass(frozen=True)
class GroupResult:
    """What the driver needs to know of a finished group."""

    kept: int  # images
    rejected: list[str]  # ids


@dataclass(frozen=True, kw_only=True)
class GroupWriter:
    """Looks at a group's images, writes those that pass, then lists all of them as done. Cheap to pickle."""

    root: Path
    recipe: output.Recipe
    gates: GateConfig  # those at work
    gate_reference: Path | None = None  # file of the training features that images are held against
    weak_classes: frozenset[str] = frozenset()
    own_images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # see look_at
    signing: Signing | None = None

    def write(self, rows: Sequence[PlanRow], images: np.ndarray, features: np.ndarray | None) -> GroupResult:
        """Of `Made`. Raises ConfigError where the disk refuses; then nothing of the group counts."""
        reference = None
        if self.gate_reference is not None and self.gates.enabled:
            from m2d.generation.gates import load_once

            reference = load_once(self.gate_reference)
        looked = look_at(rows, images, features, self.gates, reference, self.own_images)
        encoded = [
            (one.row, output.encode_png(image, one.row, self.recipe, self.signing))
            for one, image in zip(looked, images, strict=True)
            if one.kept
        ]
        name = output.group_name(rows)
        try:
            paths = (
                output.write_images(self.root, self.recipe.format, name, encoded, self.recipe.classes)
                if encoded
                else []
            )
        except OSError as error:
            raise output.cannot_write(self.root, error) from None
        files = {row.id: (path, png) for (row, png), path in zip(encoded, paths)}
        size = (images.shape[1], images.shape[2])
        table = journal_rows(
            [(one, *files.get(one.row.id, (None, None))) for one in looked], size, self.recipe, self.weak_classes
        )
        output.write_rows(self.root / output.PARTS / f"{name}.parquet", table)
        rejected = [one.row.id for one in looked if not one.kept]
        return GroupResult(len(looked) - len(rejected), rejected)


@dataclass(frozen=True)
class Looked:
    """An image that the gates have looked at, or have not where they are off."""

    row: PlanRow
    verdict: Verdict | None
    fixed: bool  # kept whatever the gates find

    @property
    def kept(self) -> bool:
        """It counts as made."""
        return self.fixed or self.verdict is None or self.verdict.accepted


def look_at(
    rows: Sequence[PlanRow],
    images: np.ndarray,
    features: np.ndarray | None,
    gates: GateConfig,
    reference: GateReference | None,
    own_images: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Looked]:
    """Of `Made`, what the gates say of each image, in order. reference: None where they have none.

    own_images: ids of the training images of each lesion that a row varies, or whose skin it takes; it is no near-copy
    of those.
    """
    verdicts: Sequence[Verdict | None] = [None] * len(rows)
    if gates.enabled:
        from m2d.generation.gates import check

        of = own_images or {}
        own = [(*of.get(row.group or "", ()), *of.get(row.skin_lesion_id or "", ())) for row in rows]
        verdicts = check(images, features, [row.label for row in rows], reference, gates, own)
    # What cannot be replaced is kept: a walk has its ends, and without noise the next attempt is the same image.
    fixed = [row.mode == "interpolate" or (row.mode == "image2image" and row.strength == 0) for row in rows]
    return [Looked(*one) for one in zip(rows, verdicts, fixed, strict=True)]


def journal_rows(
    files: Sequence[tuple[Looked, str | None, bytes | None]],
    size: tuple[int, int],
    recipe: output.Recipe,
    weak_classes: Collection[str],
) -> pa.Table:
    """What JOURNAL_SCHEMA is written as, of images, each with its file's path below the output and its PNG.

    size: height, width.
    """
    shared = {
        "height": size[0],
        "width": size[1],
        "precision": recipe.precision,
        "checkpoint": recipe.checkpoint,
        "created": datetime.now(UTC).replace(microsecond=0),
    }
    entries: list[dict[str, Any]] = []  # the journal has columns for most of it
    for looked, path, png in files:
        row, verdict = looked.row, looked.verdict
        own = {
            "class": row.label,
            "accepted": looked.kept,
            "gates": "off" if verdict is None else "recorded" if looked.fixed else "on",
            "path": path,
            "sha256": None if png is None else hashlib.sha256(png).hexdigest(),
            "feature_weak": row.feature == "prior" and row.label in weak_classes,
        }
        found = {} if verdict is None else vars(verdict)
        known = {name: value for name, value in found.items() if value == value}  # NaN is not
        entries.append({**known, **vars(row), **shared, **own})
    return without_seldom(pa.Table.from_pylist(entries, output.JOURNAL_SCHEMA))


def make_here(
    generator: Generator, groups: Sequence[pa.Table], attempts: int, writer: GroupWriter, *, features: bool
) -> Iterator[GroupResult]:
    """The results of all groups of a plan's rows, as they are written; see make_group.

    On an error, and when the caller stops, what was made is still written before this ends. Raises what make_group and
    GroupWriter.write raise.
    """
    waiting: deque[Future[GroupResult]] = deque()
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="m2d-writer") as pool:
        for group in groups:
            waiting.append(pool.submit(writer.write, *make_group(generator, group, attempts, features)))
            while waiting and (len(waiting) >= _AHEAD or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- on Ray -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ActorPool:
    """How many generators there may be, and what each asks of Ray."""

    most: int
    device: str
    gpus: float  # an actor; 0 computes on the CPU, or uses a GPU that Ray does not know of
    threads: int  # of torch in an actor, on a CPU


def pick_pool(num_actors: int | None, gpus_per_actor: float | None, device: str, groups: int) -> ActorPool:
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
    load: Callable[[str], Generator],
    pool: ActorPool,
    groups: Sequence[pa.Table],
    attempts: int,
    writer: GroupWriter,
    *,
    features: bool,
) -> Iterator[GroupResult]:
    """As make_here. load: on a device, see load_generator.

    Raises the M2DError that an actor or a task raised. Closing the iterator ends the work.
    """
    from m2d.cluster.fan_out import fan_out, on_actors, on_tasks

    make = on_actors(
        partial(_load, load, pool.device, pool.threads),
        partial(_make, attempts, features),
        most=pool.most,
        least=1,  # after the loss of a node the others go on
        cpus=0 if pool.gpus else pool.threads,
        gpus=pool.gpus,
        block_rows=max(map(len, groups), default=1),
    )
    for row in fan_out(groups, make, on_tasks(writer, _write, cpus=WRITER_CPUS)):
        yield GroupResult(**row)


def _load(load: Callable[[str], Generator], device: str, threads: int) -> Generator:
    if device == "cpu":
        import torch
        from joblib import cpu_count

        # Ray's CPUs are a budget, which may be more than the machine has. OMP_NUM_THREADS: as the user set it, or Ray
        # from the actor's CPUs.
        limit = int(os.environ.get("OMP_NUM_THREADS") or threads)
        torch.set_num_threads(max(1, min(threads, limit, cpu_count())))
    return load(device)


_PACKED = pa.schema(
    [
        ("rows", pa.list_(pa.struct(list(PLAN_SCHEMA)))),
        ("shape", pa.list_(pa.int64())),
        ("images", pa.large_binary()),
        ("features", pa.large_binary()),
    ]
)
_RESULT = pa.schema([("kept", pa.int64()), ("rejected", pa.list_(pa.string()))])


def _make(attempts: int, features: bool, generator: Generator, block: pa.Table) -> pa.Table:
    """The plan's rows of one group in, its images out, in one row, so that no block boundary can divide it."""
    rows, images, found = make_group(generator, block, attempts, features)
    packed = {
        "rows": table_of(rows).to_pylist(),
        "shape": list(images.shape),
        "images": images.tobytes(),
        "features": None if found is None else found.tobytes(),
    }
    return pa.Table.from_pylist([packed], _PACKED)


def _write(writer: GroupWriter, block: pa.Table) -> pa.Table:
    """Groups' images in, what became of them out."""
    results = []
    for number in range(block.num_rows):
        shape = block["shape"][number].as_py()
        images = np.frombuffer(block["images"][number].as_buffer(), np.uint8).reshape(shape)  # not copied
        packed = block["features"][number]
        features = np.frombuffer(packed.as_buffer(), np.float32).reshape(shape[0], -1) if packed.is_valid else None
        rows = rows_of(pa.Table.from_pylist(block["rows"][number].as_py(), PLAN_SCHEMA))
        results.append(vars(writer.write(rows, images, features)))
    return pa.Table.from_pylist(results, _RESULT)
