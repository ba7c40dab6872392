"""The unit of work: a group of a plan's rows is made, looked at, written and listed as done, all or nothing.

m2d.generation.local does that in this process, m2d.generation.bulk on Ray; nothing here knows where it runs. Making
needs a device; writing (gates, PNG encoding, disk) needs a CPU and may run beside the next group's making.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from m2d.errors import CheckpointError, ConfigError
from m2d.generation.formats import FORMATS, EncodedImage, encode_png
from m2d.generation.gate_settings import GateConfig
from m2d.generation.journal import JOURNAL_SCHEMA, cannot_write, group_name, write_part
from m2d.generation.plan import PlanRow, retried, rows_of, table_of

if TYPE_CHECKING:  # writing tasks need no torch: seconds and 200 MB each
    from m2d.generation.gate_reference import GateReference
    from m2d.generation.gates import Verdict
    from m2d.generation.generator import Generator
    from m2d.generation.settings import CompileMode
    from m2d.models.settings import Precision


@dataclass(frozen=True)
class PlanGroups:
    """The rows of one round, in groups."""

    plan: pa.Table
    attempts: int  # how many of each row's attempts were rejected before
    size: int  # rows a group

    def __len__(self) -> int:
        rows: int = self.plan.num_rows
        return -(-rows // self.size)

    def table(self, number: int) -> pa.Table:
        """The plan's rows of group `number`."""
        return self.plan.slice(number * self.size, self.size)

    def rows(self, number: int) -> list[PlanRow]:
        """The same as this round wants them."""
        return planned_rows(self.table(number), self.attempts)


def planned_rows(table: pa.Table, attempts: int) -> list[PlanRow]:
    """A plan's rows after so many rejected attempts of each."""
    rows = rows_of(table)
    for _ in range(attempts):
        rows = [retried(row) for row in rows]
    return rows


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """What it takes to load the run's generator, anywhere. Paths are absolute."""

    checkpoint: str
    sha256: str  # of the checkpoint that the driver has
    batch_size: int
    mixed_precision: Precision
    compile: bool
    compile_mode: CompileMode = "default"
    with_extractor: bool  # gates or references ask for features
    extractor_weights: str | None

    def load(self, device: str) -> Generator:
        """Raises an M2DError, in one line, where this machine lacks something that the driver has."""
        from m2d.generation.generator import Generator
        from m2d.generation.references import load_reference_extractor
        from m2d.models.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(self.checkpoint)
        if checkpoint.sha256 != self.sha256:
            raise CheckpointError(
                f"checkpoint: {self.checkpoint} is another one on a node than on the driver; every node needs the same"
            )
        return Generator(
            checkpoint,
            batch_size=self.batch_size,
            device=device,
            mixed_precision=self.mixed_precision,
            extractor=load_reference_extractor(checkpoint, self.extractor_weights) if self.with_extractor else None,
            compile=self.compile,
            compile_mode=self.compile_mode,
        )


@dataclass(frozen=True)
class MadeGroup:
    """Images uint8 [N, H, W, 3] of rows, and their features float32 [N, D] where the gates want them."""

    images: np.ndarray
    features: np.ndarray | None


def make_group(generator: Generator, rows: Sequence[PlanRow], *, with_features: bool) -> MadeGroup:
    """Raises ConfigError for a batch that does not fit the device, and what Generator.generate raises."""
    import torch

    try:
        images = generator.generate(rows)
        return MadeGroup(images, generator.features(images) if with_features else None)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"batch_size {generator.batch_size} does not fit the memory of {generator.device}; "
            f"try --batch_size {max(1, generator.batch_size // 2)} (the images stay the same)"
        ) from None


@dataclass(frozen=True)
class GroupResult:
    """What a finished group tells the driver."""

    kept: dict[str, int] = field(default_factory=dict)  # images by class
    rejected: list[str] = field(default_factory=list)  # ids

    @property
    def tried(self) -> int:
        """Images made."""
        return sum(self.kept.values()) + len(self.rejected)


@dataclass(frozen=True, kw_only=True)
class GroupWriter:
    """Looks at a group's images, writes those that pass, then lists all of them as done. Cheap to pickle."""

    root: Path
    format: str
    settings: str  # the recipe as JSON, for the text chunks
    checkpoint: str  # sha256
    precision: str
    gates: GateConfig  # those at work
    gate_reference: Path | None = None  # file of the training features that images are held against
    weak_classes: frozenset[str] = frozenset()

    def write(self, rows: Sequence[PlanRow], made: MadeGroup) -> GroupResult:
        """Raises ConfigError where the disk refuses; then nothing of the group counts, whatever was written of it."""
        name = group_name(rows)
        verdicts = self._verdicts(rows, made)
        # What cannot be replaced is kept: a walk has its ends, and without noise the next attempt is the same image.
        kept = [verdict is None or verdict.accepted or not _replaceable(row) for row, verdict in zip(rows, verdicts)]
        encoded = [
            EncodedImage(row, encode_png(image, row, checkpoint=self.checkpoint, settings=self.settings))
            for row, image, keep in zip(rows, made.images, kept, strict=True)
            if keep
        ]
        try:
            paths = iter(FORMATS[self.format].write(self.root, name, encoded) if encoded else [])
        except OSError as error:
            raise cannot_write(self.root, error) from None
        pngs = iter(encoded)
        height, width = made.images.shape[1:3]
        now = datetime.now(UTC).replace(microsecond=0)
        entries: list[dict[str, Any]] = []
        for planned, row, verdict, keep in zip(table_of(rows).to_pylist(), rows, verdicts, kept, strict=True):
            looked_at = "off" if verdict is None else "on" if _replaceable(row) else "recorded"
            entries.append(
                {
                    **planned,
                    "accepted": keep,
                    "gates": looked_at,
                    **({} if verdict is None else _columns_of(verdict)),
                    "path": next(paths) if keep else None,
                    "sha256": hashlib.sha256(next(pngs).png).hexdigest() if keep else None,
                    "width": width,
                    "height": height,
                    "feature_weak": row.feature == "prior" and row.label in self.weak_classes,
                    "precision": self.precision,
                    "checkpoint": self.checkpoint,
                    "created": now,
                }
            )
        write_part(self.root, name, pa.Table.from_pylist(entries, JOURNAL_SCHEMA))
        counts = Counter(row.label for row, keep in zip(rows, kept) if keep)
        return GroupResult(dict(counts), [row.id for row, keep in zip(rows, kept) if not keep])

    def _verdicts(self, rows: Sequence[PlanRow], made: MadeGroup) -> Sequence[Verdict | None]:
        if not self.gates.enabled:
            return [None] * len(rows)
        from m2d.generation.gates import check

        reference = _loaded_reference(self.gate_reference) if self.gate_reference is not None else None
        return check(made.images, made.features, [row.label for row in rows], reference, self.gates)


def _replaceable(row: PlanRow) -> bool:
    return row.mode != "interpolate" and not (row.mode == "image2image" and row.strength == 0)


def _columns_of(verdict: Verdict) -> dict[str, Any]:
    """The verdict's numbers; one that could not be had is not finite, and null in the table."""
    values = {
        "reason": verdict.reason,
        "nearest_id": verdict.nearest_id,
        "nearest_distance": verdict.nearest_distance,
        "class_distance": verdict.class_distance,
        "pixel_distance": verdict.pixel_distance,
        "saturated_share": verdict.saturated_share,
        "contrast": verdict.contrast,
    }
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in values.items()
    }


@lru_cache(maxsize=2)
def _loaded_reference(path: Path) -> GateReference:
    from m2d.generation.gate_reference import GateReference

    return GateReference.load(path)
