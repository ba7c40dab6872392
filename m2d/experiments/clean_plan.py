"""What a clean removes: decided from the records alone, before anything is touched."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m2d.experiment import INFO
from m2d.experiments.files import LOCK, ExperimentFiles, folder_bytes
from m2d.experiments.find import find_records
from m2d.experiments.record import DIRECTORY, FINISHED, Record
from m2d.experiments.settings import CleanConfig
from m2d.files.paths import result_path

HIDDEN = ".removing-"  # before the name of what is being removed; nothing lists it, the next clean ends it
CACHE = "cache"
KEPT_OF_A_CACHE = ("catalog.parquet", "rejected.csv")  # small; evaluation reads the run's own split from it
MAKING_S = 60.0  # a directory without a record and younger than this may be a run that is just beginning


@dataclass(frozen=True)
class Removal:
    """Paths that go together, and what is known of them."""

    label: str  # what a person reads: the experiment's name
    paths: tuple[Path, ...]
    size: int  # bytes
    generated: int = 0  # bytes of generated images among them
    record: Record | None = None  # None: what an earlier clean left


@dataclass(frozen=True)
class CleanPlan:
    """What goes, and what stays although its age would have it go."""

    removals: tuple[Removal, ...]
    kept: tuple[tuple[str, str], ...]  # (name, why)


def plan_experiments(config: CleanConfig) -> CleanPlan:
    """All but the newest `keep` of each name, without what is in use or could be gone on with.

    Every directory of a name counts, whatever its state. Raises ExperimentError where the root is not there.
    """
    records = find_records(config.experiments_dir)
    removals = _left_over(Path(result_path("experiments_dir", config.experiments_dir)).expanduser())
    kept = []
    for record in _beyond_the_newest(records, config):
        reason = _reason_to_keep(record, records, include_unfinished=config.include_unfinished)
        if reason is not None:
            kept.append((record.name, reason))
            continue
        files = ExperimentFiles.of(record.experiment)
        generated = files.size("generated_images")
        removals.append(Removal(record.name, (record.experiment.path,), files.size(), generated, record))
    return CleanPlan(tuple(removals), tuple(kept))


def plan_caches(config: CleanConfig) -> CleanPlan:
    """The caches of finished experiments, whatever their age, but for the catalog of their images."""
    removals = []
    for record in find_records(config.experiments_dir, config.name):
        folder = record.experiment.path / CACHE
        if record.state not in FINISHED or not folder.is_dir() or folder.is_symlink():
            continue
        paths = tuple(sorted(path for path in folder.iterdir() if path.name not in KEPT_OF_A_CACHE))
        files = ExperimentFiles.of(record.experiment)
        size = sum(files.size(f"{CACHE}/{path.name}") if path.is_dir() else path.lstat().st_size for path in paths)
        if paths:
            removals.append(Removal(f"{record.name}/{CACHE}", paths, size, record=record))
    return CleanPlan(tuple(removals), ())


def _beyond_the_newest(records: Sequence[Record], config: CleanConfig) -> list[Record]:
    of_name: dict[str, list[Record]] = {}
    for record in records:
        of_name.setdefault(record.family, []).append(record)
    old = [record for group in of_name.values() for record in group[: max(len(group) - config.keep, 0)]]
    return [record for record in old if config.name in (None, record.family)]


def _reason_to_keep(record: Record, records: Sequence[Record], *, include_unfinished: bool) -> str | None:
    path = record.experiment.path
    if record.state == "running":
        return "it is running"
    if path.is_symlink():
        return "it is a link; remove it by hand"
    if _is_being_made(path):
        return "it was made a moment ago"
    for other in records:
        if other.name != record.name and other.state in ("running", "resumable") and _starts_from(other, path):
            return f"{other.name} is unfinished and starts from it"
    if include_unfinished:
        return None
    if record.state == "resumable":
        return "it can be resumed (--include_unfinished removes it too)"
    if record.state == "broken" and record.checkpoints:
        return f"{record.problem}, yet it holds a checkpoint (--include_unfinished removes it too)"
    return None


def _is_being_made(path: Path) -> bool:
    if (path / INFO).exists() or (path / LOCK).exists():
        return False
    return time.time() - path.stat().st_mtime < MAKING_S


def _starts_from(record: Record, path: Path) -> bool:
    start = record.config.get("init_checkpoint")
    return isinstance(start, str) and "://" not in start and path.resolve() in Path(start).resolve().parents


def _left_over(root: Path) -> list[Removal]:
    name = re.compile(re.escape(HIDDEN) + DIRECTORY.pattern)
    paths = sorted(path for path in root.iterdir() if name.fullmatch(path.name) and path.is_dir())
    return [Removal(path.name, (path,), folder_bytes(str(path))) for path in paths if not path.is_symlink()]
