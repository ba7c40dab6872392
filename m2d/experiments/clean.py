"""`experiments clean`: what would go and why the rest stays, the question, and the removal.

What goes is decided from the records alone, before anything is touched. A path then gets a hidden name under the
experiment's lock and is deleted after, so that half an experiment is never found under its name and a run that starts
meanwhile comes to no harm. What a crash leaves under the hidden name the next clean removes.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from m2d.errors import ExperimentError
from m2d.experiment import INFO, LOCK
from m2d.experiments.record import DIRECTORY, FINISHED, Record, find_records, folder_bytes, read_record
from m2d.experiments.settings import CleanConfig
from m2d.experiments.wording import STATE_STYLES, open_console, print_json, size_text, table
from m2d.files.paths import result_path

HIDDEN = ".removing-"  # before the name of what is being removed; nothing lists it
CACHE = "cache"
KEPT_OF_A_CACHE = ("catalog.parquet", "rejected.csv")  # small; evaluation reads the run's own split from it
MAKING_S = 60.0  # a directory without a record and younger than this may be a run that is just beginning


@dataclass(frozen=True)
class Removal:
    """Paths that go together, and what is known of them."""

    label: str  # what a person reads: the experiment's name
    paths: tuple[Path, ...]
    size: int  # bytes
    record: Record | None = None  # None: what an earlier clean left


def clean_command(config: CleanConfig) -> None:
    """Remove old experiments, or caches, and say what was removed.

    Raises ExperimentError where it cannot ask, the root is remote or not there, or the disk refuses.
    """
    if "://" in config.experiments_dir:
        raise ExperimentError(
            "experiments_dir: clean works on folders of this machine, where it can tell what runs; "
            "remove remote experiments with the tool of your storage"
        )
    removals, kept = planned_caches(config) if config.caches else planned(config)
    console = Console(quiet=True) if config.json else open_console()
    _print_plan(console, removals, kept, config)
    removed: list[Removal] = []
    refused: list[tuple[str, str]] = []
    if removals and not config.dry_run and _agreed(console, removals, config):
        for removal in removals:
            reason = remove(removal)
            if reason is None:
                removed.append(removal)
                console.print(f"removed {removal.label}", markup=False)
            else:
                refused.append((removal.label, reason))
                console.print(Text(f"left alone: {removal.label}: {reason}", "yellow"))
        console.print(f"freed {size_text(_total(removed))}")
    if config.json:
        print_json(
            {
                "dry_run": config.dry_run,
                "to_remove": [{"name": removal.label, "bytes": removal.size} for removal in removals],
                "removed": [removal.label for removal in removed],
                "freed_bytes": _total(removed),
                "left_alone": [{"name": name, "reason": reason} for name, reason in refused],
                "kept": [{"name": name, "reason": reason} for name, reason in kept],
            }
        )


def planned(config: CleanConfig) -> tuple[list[Removal], list[tuple[str, str]]]:
    """(what goes, (name, why) of what stays although it is old enough to go).

    All but the newest `keep` of each name go, without what is in use or could be continued. Every directory of a name
    counts, whatever its state. Raises ExperimentError where the root is not there.
    """
    records = find_records(config.experiments_dir)
    root = Path(result_path("experiments_dir", config.experiments_dir)).expanduser()
    removals = [
        Removal(path.name, (path,), folder_bytes(str(path)))
        for path in sorted(root.glob(f"{HIDDEN}*"))
        if DIRECTORY.fullmatch(path.name.removeprefix(HIDDEN)) and path.is_dir() and not path.is_symlink()
    ]
    of_name: dict[str, list[Record]] = {}
    for record in records:
        of_name.setdefault(record.family, []).append(record)
    old = [record for group in of_name.values() for record in group[: max(len(group) - config.keep, 0)]]
    kept = []
    for record in old:
        if config.name not in (None, record.family):
            continue
        reason = _reason_to_keep(record, records, include_unfinished=config.include_unfinished)
        if reason is None:
            removals.append(Removal(record.name, (record.experiment.path,), record.files.size(), record))
        else:
            kept.append((record.name, reason))
    return removals, kept


def planned_caches(config: CleanConfig) -> tuple[list[Removal], list[tuple[str, str]]]:
    """The caches of finished experiments, whatever their age, but for the catalog of their images."""
    removals = []
    for record in find_records(config.experiments_dir, config.name):
        folder = record.experiment.path / CACHE
        if record.state in FINISHED and folder.is_dir() and not folder.is_symlink():
            paths = tuple(sorted(path for path in folder.iterdir() if path.name not in KEPT_OF_A_CACHE))
            sizes = (p.lstat().st_size if p.is_symlink() or p.is_file() else folder_bytes(str(p)) for p in paths)
            removals += [Removal(f"{record.name}/{CACHE}", paths, sum(sizes), record)] if paths else []
    return removals, []


def remove(removal: Removal) -> str | None:
    """Remove it. Returns why it was left alone where its experiment changed since the plan was made.

    Raises ExperimentError where the disk refuses; what is left of it then has its hidden name.
    """
    try:
        if isinstance(hidden := _hide(removal), str):
            return hidden
        for path in hidden:  # the lock is given up by now: NFS cannot delete a folder with an open file in it
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            while os.path.lexists(path):
                try:
                    shutil.rmtree(path)
                except FileNotFoundError:
                    continue  # another clean removes it too
    except OSError as error:
        raise ExperimentError(
            f"{removal.label} cannot be removed whole ({error.strerror or error}: {error.filename}); "
            "fix its permissions, then clean again"
        ) from None
    return None


def _hide(removal: Removal) -> list[Path] | str:
    """The paths under their hidden names, or why they were left alone."""
    plan = removal.record
    if plan is None:
        return list(removal.paths)
    if not plan.experiment.path.is_dir():
        return "it is gone already"
    try:
        with plan.experiment.running():
            now = read_record(plan.experiment, held=True)
            if (now.state, now.checkpoints) != (plan.state, plan.checkpoints):
                return f"it changed meanwhile: it is {now.state} now"
            return [
                path if path.name.startswith(HIDDEN) else path.rename(path.with_name(HIDDEN + path.name))
                for path in removal.paths
            ]
    except ExperimentError:
        return "a run has just started in it"


def _reason_to_keep(record: Record, records: Sequence[Record], *, include_unfinished: bool) -> str | None:
    path = record.experiment.path
    if record.state == "running":
        return "it is running"
    if path.is_symlink():
        return "it is a link; remove it by hand"
    recorded = (path / INFO).exists() or (path / LOCK).exists()
    if not recorded and time.time() - path.stat().st_mtime < MAKING_S:
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


def _starts_from(record: Record, path: Path) -> bool:
    start = record.config.get("init_checkpoint")
    return isinstance(start, str) and "://" not in start and path.resolve() in Path(start).resolve().parents


def _print_plan(
    console: Console, removals: Sequence[Removal], kept: Sequence[tuple[str, str]], config: CleanConfig
) -> None:
    for name, reason in kept:
        console.print(Text(f"stays: {name}: {reason}", "dim"))
    if not removals:
        console.print("nothing to remove")
        return
    rows = table("would remove" if config.dry_run else "to remove", "frees", "what it is", right=("frees",))
    for removal in removals:
        text = Text("left by an interrupted clean", "dim")
        if removal.record is not None:
            text = Text(removal.record.state, STATE_STYLES[removal.record.state])
            text.append(f", started {removal.record.started:%Y-%m-%d %H:%M}", "not bold default")
            generated = 0 if config.caches else removal.record.files.size("generated_images")
            text.append(f", {size_text(generated)} of generated images" if generated else "", "yellow")
        rows.add_row(Text(removal.label), size_text(removal.size), text)
    rows.add_row("in all", size_text(_total(removals)), "", style="bold")
    console.print(rows)


def _agreed(console: Console, removals: Sequence[Removal], config: CleanConfig) -> bool:
    if config.yes:
        return True
    if not sys.stdin.isatty():
        raise ExperimentError("clean asks first and there is no terminal to answer on; add --yes, or --dry_run to look")
    what = "cache" if config.caches else "directory"
    many = {"cache": "caches", "directory": "directories"}[what]
    question = f"Remove {len(removals)} {what if len(removals) == 1 else many}, {size_text(_total(removals))}? [y/N] "
    console.print(question, end="", markup=False)
    try:
        answer = input().strip().lower()
    except EOFError:
        answer = ""
    if answer in ("y", "yes"):
        return True
    console.print("nothing was removed")
    return False


def _total(removals: Sequence[Removal]) -> int:
    return sum(removal.size for removal in removals)
