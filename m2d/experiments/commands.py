"""`experiments list`, `show`, `compare` and `clean`, for a person and with --json for a machine.

What `clean` removes is decided from the records alone, before anything is touched. A path then gets a hidden name under
the experiment's lock and is deleted after, so that half an experiment is never found under its name and a run that
starts meanwhile comes to no harm. What a crash leaves under the hidden name the next clean removes.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from m2d.errors import ExperimentError
from m2d.experiment import HIDDEN, INFO, LOCK
from m2d.experiments.details import (
    BEST_OF,
    best_value,
    details,
    duration_text,
    last_value,
    measure_names,
    number_text,
    plain,
    report_command,
    size_text,
    summary,
)
from m2d.experiments.record import DIRECTORY, FINISHED, Record, find_records, flat, folder_bytes, read_record, resolve
from m2d.experiments.settings import CleanConfig, CompareConfig, ListConfig, ShowConfig
from m2d.files.atomic import COMPLETE, is_in_use
from m2d.files.paths import result_path

PIPE_WIDTH = 160  # characters
STATE_STYLES = {
    "running": "bold cyan",
    "done": "green",
    "resumable": "yellow",
    "failed": "red",
    "superseded": "dim",
    "broken": "bold red",
    "unknown": "magenta",
}
UNKNOWN = "unknown: its record says running, and only the machine that trains it knows whether it is"


def list_command(config: ListConfig) -> None:
    """Print the experiments of a root, newest last. Raises ExperimentError where it is not there."""
    records = find_records(config.experiments_dir, config.name)
    if config.json:
        _print_json([summary(record) for record in records])
        return
    console = _console()
    if not records:
        of_name = f" of the name {config.name}" if config.name else ""
        root = result_path("experiments_dir", config.experiments_dir)
        console.print(f"no experiment{of_name} in {root}", markup=False)
        return
    rows = []
    for record in records:
        best = f"{record.best[1].removeprefix('val/')} {number_text(record.best[2])}" if record.best else None
        facts = (f"{record.started:%Y-%m-%d %H:%M}", _steps_text(record), best, size_text(record.files.size()))
        rows.append((Text(record.name, "bold"), _state(record), *facts))
    table = _table(["name", "state", "started", "steps", "best", "size"], rows, right=["steps", "size"])
    table.columns[0].no_wrap = max(len(record.name) for record in records) <= console.width // 2
    console.print(table)
    for record in records:
        if record.problem:
            console.print(Text(f"{record.name}: {record.problem}", "yellow"))
    if any(record.state == "unknown" for record in records):
        console.print(Text(UNKNOWN, "dim"))


def show_command(config: ShowConfig) -> None:
    """Print all of one experiment but its curves. Raises ExperimentError where its name is none or means several."""
    all_records = find_records(config.experiments_dir)
    record = resolve(all_records, config.experiment, config.experiments_dir)
    known = details(record, all_records)
    if config.json:
        _print_json(known)
        return
    console = _console()

    def section(title: str, content: RenderableType) -> None:
        console.print(f"\n[bold cyan]{title}[/]")
        console.print(Padding(content, (0, 0, 0, 2)))

    console.print(Text.assemble((record.name, "bold"), "  ", _state(record)))
    if known["error"]:
        console.print(Text(f"it ended by: {known['error']}", "red"))
    console.print(Text(known["next"]))
    if known["command"]:
        # On one line: with the terminal's line breaks in it, it would not be the same command.
        console.print(Text(known["command"], "bold"), soft_wrap=True)
    section("Run", _run_facts(record, known))
    if known["degraded"]:
        section("Degraded", Text("\n".join(known["degraded"]), "yellow"))
    if counts := (known["dataset"] or {}).get("counts"):
        codes = dict.fromkeys(code for split in counts.values() for code in split)
        rows = [(code, *(split.get(code) for split in counts.values())) for code in codes]
        rows.append(("all", *(sum(split.values()) for split in counts.values())))
        section("Images", _table(["class", *counts], rows, right=counts))
    if known["checkpoints"]:
        rows = [
            (c["name"], c["step"], size_text(c["bytes"]), "best" if c["best"] else "") for c in known["checkpoints"]
        ]
        section("Checkpoints", _table(["checkpoint", "step", "size", ""], rows, right=["step", "size"]))
    if known["validation"]:
        last, numbers = known["validation"][-1], ["best", "at step", "last"]
        bests = {name: known["best_measures"].get(name, {}) for name in measure_names([last])}
        rows = [(name, best.get("value"), best.get("step"), last[name]) for name, best in bests.items()]
        section("Validation", _table(["measure", *numbers], rows, right=numbers))
    if known["last_scalars"]:
        scalars = [Text(f"{name} {number_text(value)}") for name, value in known["last_scalars"].items()]
        section(f"Last of training, step {record.steps_done:,}", Columns(scalars, padding=(0, 3)))
    if versions := ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version):
        section("Versions", Text(versions, "dim"))


def _run_facts(record: Record, known: dict[str, Any]) -> Table:
    dataset, git = known["dataset"] or {}, known["git"] or {}
    times = [(known["wall_seconds"], "in all"), (known["training_seconds"], "of it training")]
    images = ", ".join(f"{number_text(dataset.get(key))} {key}" for key in ("images", "rejected", "duplicates"))
    changed = " with uncommitted changes" if git.get("uncommitted_changes") else ""
    facts = {
        "started": f"{record.started:%Y-%m-%d %H:%M}",
        "steps": _steps_text(record),
        "time": ", ".join(f"{duration_text(seconds)} {what}" for seconds, what in times if seconds is not None),
        "stage": known["stage"],
        "device": known["device"],
        "precision": known["precision"],
        "data": f"{dataset.get('root')}: {images}" if dataset else None,
        "code": f"{git['commit'][:10]}{changed}" if git.get("commit") else None,
        "size": size_text(known["bytes"]),
        "path": record.location,
        "curves": "report.html"
        if record.files.modified("report.html")
        else f"{report_command(record)}  (writes report.html)",
    }
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            rows.add_row(name, Text(str(fact)))
    return rows


# Where a run is and what it prints; everything else may matter.
TELLS_NOTHING = frozenset(
    {"name", "experiments_dir", "cache_dir", "fresh", "verbose", "use_wandb", "wandb_project", "wandb_mode"}
)
NOT_SET = "not there"  # a setting that this version of M2D did not have

_VALIDATION = frozenset({"val/psnr_db", "val/perceptual", "val/velocity_mse"})
_PERCEPTUAL = frozenset({"val/perceptual", "loss/perceptual"})
_FEATURES = frozenset({"loss/alignment", "loss/alignment_vae", "loss/manifold"})
_VELOCITY = frozenset({"val/velocity_mse", "loss/diffusion"})
_SPEED = frozenset({"images_per_s", "images/s"})
_IMAGES = _VALIDATION | _PERCEPTUAL | _FEATURES | _VELOCITY | {"loss/reconstruction"}


def _grounds(record: Record) -> tuple[tuple[Any, frozenset[str], str], ...]:
    """(what must be alike, the measures that do not compare otherwise, why): a better number must mean a better run."""
    info, config = flat(record.info), flat(record.config)
    stage = config.get("stage")
    # Velocity errors compare on the same latents alone: runs of one stage that keep the autoencoder of one checkpoint.
    # The joint stage moves the latents, so no two of its runs compare.
    latents = record.name if stage == "joint" else (stage, config.get("init_checkpoint"))
    extractor = info.get("feature_extractor.key", config.get("feature_extractor.name"))
    norm = config.get("alignment.spatial_norm") or 0.0  # older runs had none
    return (
        (info.get("dataset.sha256"), _IMAGES, "the runs saw other images or another split"),
        (config.get("data.image_size"), _IMAGES | _SPEED, "the image sizes differ"),
        (info.get("device"), _SPEED, "the devices differ"),
        (stage, _SPEED, "a step of another stage is other work"),
        (config.get("saving.validation_images"), _VALIDATION, "validation images differ"),
        (info.get("perceptual"), _PERCEPTUAL, "the perceptual distances are of two kinds"),
        (extractor, _FEATURES, "the feature extractors differ"),
        (norm, _FEATURES, "the features to align with are normalised otherwise"),
        (latents, _VELOCITY, "the runs learn on different latents"),
    )


@dataclass(frozen=True)
class Row:
    """One measure of every experiment."""

    label: str
    values: list[float | None]
    better: int | None  # which one, where that can be said
    text: Callable[[Any], str] = number_text


def compare_command(config: CompareConfig) -> None:
    """Print the comparison. Raises ExperimentError where a name is none or means several."""
    found = find_records(config.experiments_dir)
    records = [resolve(found, name, config.experiments_dir) for name in config.experiments]
    settings, (rows, notes) = setting_differences(records), measure_rows(records)
    if config.json:
        # Times in seconds; a setting that an experiment does not have is left out of its values.
        names = [record.name for record in records]
        _print_json(
            {
                "experiments": [{"name": r.name, "state": r.state, "started": r.started.isoformat()} for r in records],
                "settings": {
                    key: {name: value for name, value in zip(names, values) if value != NOT_SET}
                    for key, values in settings.items()
                },
                "measures": {
                    row.label: {
                        "values": dict(zip(names, row.values)),
                        "better": None if row.better is None else names[row.better],
                    }
                    for row in rows
                },
                "notes": notes,
            }
        )
        return
    console = _console()
    letters = [ascii_uppercase[i] if i < 26 else str(i + 1) for i in range(len(records))]
    for letter, record in zip(letters, records):
        console.print(Text.assemble((letter, "bold cyan"), "  ", (record.name, "bold"), "  ", _state(record)))
    differing = [(key, *(Text("null" if v is None else str(v)) for v in values)) for key, values in settings.items()]
    none = "no setting differs" if all(record.config for record in records) else "settings cannot be read"
    console.print("", _table(["setting", *letters], differing) if settings else none, "", sep="\n")
    measured = []
    for row in rows:
        texts = [f"{row.text(value)} {'*' if index == row.better else ' '}" for index, value in enumerate(row.values)]
        measured.append((row.label, *(Text(text, "bold green" if text.endswith("*") else "") for text in texts)))
    titles = [f"{letter}  " for letter in letters]
    console.print(_table(["measure", *titles], measured, right=titles))
    if any(row.better is not None for row in rows):
        console.print(Text("* the better one", "dim"))
    for note in notes:
        console.print(Text(note, "yellow"))


def setting_differences(records: Sequence[Record]) -> dict[str, tuple[Any, ...]]:
    """{dotted key: its value in each experiment} for what differs; NOT_SET where an experiment has no such key."""
    settings = [flat({k: v for k, v in record.config.items() if k not in TELLS_NOTHING}) for record in records]
    keys = sorted({key for of_one in settings for key in of_one})
    values = {key: tuple(of_one.get(key, NOT_SET) for of_one in settings) for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found[1:])}


def measure_rows(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """The measures side by side, and why some of them name no better one."""
    differing = [
        (of_each[0][1], of_each[0][2])
        for of_each in zip(*map(_grounds, records))
        if any(value != of_each[0][0] for value, _, _ in of_each)
    ]
    train, validation = [record.train for record in records], [record.validation for record in records]
    rows = []

    def add(label: str, name: str, values: list[float | None], text: Callable[[Any], str] = number_text) -> None:
        comparable = not any(name in names for names, _ in differing)
        rows.append(Row(label, values, _better(values, BEST_OF.get(name) if comparable else None), text))

    for name in dict.fromkeys(name for entries in validation for name in measure_names(entries)):
        best = [best_value(entries, name) for entries in validation]
        if any(best):
            add(f"{name}, best", name, [found and found[1] for found in best])
        add(f"{name}, last", name, [last_value(entries, name) for entries in validation])
    for name in sorted({name for entries in train for name in measure_names(entries, "loss/")}):
        add(f"{name}, last", name, [last_value(entries, name) for entries in train])
    add("images/s, last", "images_per_s", [last_value(entries, "images_per_s") for entries in train])
    add("steps", "", [record.steps_done for record in records])
    add("training time", "", [record.training_seconds for record in records], duration_text)
    add("wall time", "", [record.wall_seconds for record in records], duration_text)
    shown = {row.label.partition(",")[0] for row in rows}
    notes = [(sorted(shown & names), why) for names, why in differing]
    return rows, [f"{why}, so no better one is named for {', '.join(names)}" for names, why in notes if names]


def _better(values: list[float | None], best_of: Any) -> int | None:
    """Which of the values is the better one; None for one alone, or where no direction is known.

    Values that read alike are a tie: one checkpoint judged twice differs in its last digits.
    """
    known = [value for value in values if value is not None]
    if best_of is None or len(known) < 2:
        return None
    best = best_of(known)
    alike = [value for value in known if number_text(float(value)) == number_text(float(best))]
    return values.index(best) if len(alike) == 1 else None


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
    removals, kept = (planned_caches(config), []) if config.caches else planned(config)
    console = _console(quiet=config.json)
    for name, reason in kept:
        console.print(Text(f"stays: {name}: {reason}", "dim"))
    console.print(_plan(removals, config) if removals else "nothing to remove")
    removed: list[Removal] = []
    refused: list[dict[str, str]] = []
    if removals and not config.dry_run and _agreed(console, removals, config):
        for removal in removals:
            if refusal := remove(removal):
                refused.append({"name": removal.label, "reason": refusal})
                console.print(Text(f"left alone: {removal.label}: {refusal}", "yellow"))
            else:
                removed.append(removal)
                console.print(f"removed {removal.label}", markup=False)
        console.print(f"freed {size_text(_total(removed))}")
    if config.json:
        _print_json(
            {
                "dry_run": config.dry_run,
                "to_remove": [{"name": removal.label, "bytes": removal.size} for removal in removals],
                "removed": [removal.label for removal in removed],
                "freed_bytes": _total(removed),
                "left_alone": refused,
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
    kept = []
    for family in dict.fromkeys(record.family for record in records):
        of_name = [record for record in records if record.family == family]
        for record in of_name[: max(len(of_name) - config.keep, 0)] if config.name in (None, family) else ():
            if reason := _reason_to_keep(record, records, include_unfinished=config.include_unfinished):
                kept.append((record.name, reason))
            else:
                removals.append(Removal(record.name, (record.experiment.path,), record.files.size(), record))
    return removals, kept


def planned_caches(config: CleanConfig) -> list[Removal]:
    """The caches of finished experiments, whatever their age, but for the catalog of their images."""
    removals = []
    for record in find_records(config.experiments_dir, config.name):
        folder = record.experiment.path / CACHE
        if record.state in FINISHED and folder.is_dir() and not folder.is_symlink():
            paths = tuple(sorted(path for path in folder.iterdir() if path.name not in KEPT_OF_A_CACHE))
            sizes = (p.lstat().st_size if p.is_symlink() or p.is_file() else folder_bytes(str(p)) for p in paths)
            removals += [Removal(f"{record.name}/{CACHE}", paths, sum(sizes), record)] if paths else []
    return removals


def remove(removal: Removal) -> str | None:
    """Remove it. Returns why it was left alone where its experiment changed since the plan was made.

    Raises ExperimentError where the disk refuses; what is left of it then has its hidden name.
    """
    plan, hidden = removal.record, removal.paths
    try:
        if plan is not None:
            if not plan.experiment.path.is_dir():
                return "it is gone already"
            try:
                with plan.experiment.running():
                    now = read_record(plan.experiment, held=True)
                    if (now.state, now.checkpoints) != (plan.state, plan.checkpoints):
                        return f"it changed meanwhile: it is {now.state} now"
                    if reason := _being_read(now):
                        return reason
                    hidden = tuple(
                        path if path.name.startswith(HIDDEN) else path.rename(path.with_name(HIDDEN + path.name))
                        for path in removal.paths
                    )
            except ExperimentError:
                return "a run has just started in it"
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


def _reason_to_keep(record: Record, records: Sequence[Record], *, include_unfinished: bool) -> str | None:
    path = record.experiment.path
    if record.state == "running":
        return "it is running"
    if path.is_symlink():
        return "it is a link; remove it by hand"
    if reason := _being_read(record):
        return reason
    recorded = (path / INFO).exists() or (path / LOCK).exists()
    if not recorded and time.time() - path.stat().st_mtime < MAKING_S:
        return "it was made a moment ago"
    for other in records:
        start = str(other.config.get("init_checkpoint") or "")
        unfinished = other.name != record.name and other.state in ("running", "resumable")
        if unfinished and start and "://" not in start and path.resolve() in Path(start).resolve().parents:
            return f"{other.name} is unfinished and starts from it"
    if include_unfinished:
        return None
    if record.state == "resumable":
        return "it can be resumed (--include_unfinished removes it too)"
    if record.state == "broken" and record.checkpoints:
        return f"{record.problem}, yet it holds a checkpoint (--include_unfinished removes it too)"
    return None


def _being_read(record: Record) -> str | None:
    paths = [record.experiment.checkpoints / name / COMPLETE for name in record.checkpoints]
    return "a generation reads its checkpoint" if any(map(is_in_use, paths)) else None


def _plan(removals: Sequence[Removal], config: CleanConfig) -> Table:
    rows: list[tuple[Any, ...]] = []
    for removal in removals:
        text = Text("left by an interrupted clean", "dim")
        if removal.record is not None:
            text = _state(removal.record)
            text.append(f", started {removal.record.started:%Y-%m-%d %H:%M}", "not bold default")
            generated = 0 if config.caches else removal.record.files.size("generated_images")
            text.append(f", {size_text(generated)} of generated images" if generated else "", "yellow")
        rows.append((Text(removal.label), size_text(removal.size), text))
    rows.append((Text("in all", "bold"), Text(size_text(_total(removals)), "bold"), Text()))
    titles = ["would remove" if config.dry_run else "to remove", "frees", "what it is"]
    return _table(titles, rows, right=["frees"])


def _agreed(console: Console, removals: Sequence[Removal], config: CleanConfig) -> bool:
    if config.yes:
        return True
    if not sys.stdin.isatty():
        raise ExperimentError("clean asks first and there is no terminal to answer on; add --yes, or --dry_run to look")
    one, many = ("cache", "caches") if config.caches else ("directory", "directories")
    question = f"Remove {len(removals)} {one if len(removals) == 1 else many}, {size_text(_total(removals))}? [y/N] "
    console.print(question, end="", markup=False)
    with suppress(EOFError):
        if input().strip().lower() in ("y", "yes"):
            return True
    console.print("nothing was removed")
    return False


def _total(removals: Sequence[Removal]) -> int:
    return sum(removal.size for removal in removals)


def _state(record: Record) -> Text:
    return Text(record.state, STATE_STYLES[record.state])


def _steps_text(record: Record) -> str:
    """2,130/2,982."""
    return f"{record.steps_done:,}/{number_text(record.total_steps)}"


def _print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]], right: Collection[str] = ()) -> Table:
    """Columns fold where the terminal is narrow. rows: texts and numbers, None where not known. right: titles."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        made.add_column(title, justify="right" if title in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, (str, Text)) else number_text(cell) for cell in row))
    return made


def _console(*, quiet: bool = False) -> Console:
    """Where a person reads: stdout. A pipe or a file is taken to be wide, unless COLUMNS says how wide."""
    console = Console(highlight=False, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console
