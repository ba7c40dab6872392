"""`experiments list`, a row for each experiment, newest last; and `experiments show`, all of one but its curves."""

from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from m2d.classes import CLASSES
from m2d.experiments.details import details, report_command, summary
from m2d.experiments.find import find_records, records_for
from m2d.experiments.record import Record
from m2d.experiments.settings import ListConfig, ShowConfig
from m2d.experiments.wording import (
    NOTHING,
    duration_text,
    number_text,
    open_console,
    print_json,
    size_text,
    state_text,
    steps_text,
    table,
    time_text,
)
from m2d.files.paths import result_path
from m2d.files.storage import without_secrets

UNKNOWN = "unknown: its record says running, and whether it is, only the machine that trains it can tell"


def list_command(config: ListConfig) -> None:
    """Print the experiments of a root. Raises ExperimentError where it is not there."""
    records = find_records(config.experiments_dir, config.name)
    if config.json:
        print_json([summary(record) for record in records])
        return
    console = open_console()
    if not records:
        of_name = f" of the name {config.name}" if config.name else ""
        root = result_path("experiments_dir", config.experiments_dir)
        console.print(f"no experiment{of_name} in {without_secrets(root)}", markup=False)
        return
    rows = table("name", "state", "started", "steps", "best", "size", right=("steps", "size"))
    rows.columns[0].no_wrap = max(len(record.name) for record in records) <= console.width // 2
    for record in records:
        best = f"{record.best[1].removeprefix('val/')} {number_text(record.best[2])}" if record.best else NOTHING
        facts = (time_text(record.started), steps_text(record), best, size_text(record.files.size()))
        rows.add_row(Text(record.name, "bold"), state_text(record.state), *facts)
    console.print(rows)
    for record in records:
        if record.problem:
            console.print(f"{record.name}: {record.problem}", style="yellow", markup=False)
    if any(record.state == "unknown" for record in records):
        console.print(UNKNOWN, style="dim", markup=False)


def show_command(config: ShowConfig) -> None:
    """Print one experiment. Raises ExperimentError where its name is none or means several."""
    (record,), all_records = records_for([config.experiment], config.experiments_dir)
    known = details(record, all_records)
    if config.json:
        print_json(known)
        return
    console = open_console()
    console.print(Text.assemble((record.name, "bold"), "  ", state_text(record.state)))
    if known["error"]:
        console.print(Text(f"it ended by: {known['error']}", "red"))
    console.print(Text(known["next"]))
    if known["command"]:
        # On one line: with the terminal's line breaks in it, it would not be the same command.
        console.print(Text(without_secrets(known["command"]), "bold"), soft_wrap=True)
    _section(console, "Run", _facts(record, known))
    if known["degraded"]:
        _section(console, "Degraded", Text("\n".join(str(line) for line in known["degraded"]), "yellow"))
    counts = (known["dataset"] or {}).get("counts")
    if isinstance(counts, dict):
        rows = table("class", *counts, right=counts)
        for code in CLASSES:
            rows.add_row(code, *(number_text(split.get(code)) for split in counts.values()))
        rows.add_row("all", *(number_text(sum(split.values())) for split in counts.values()), style="dim")
        _section(console, "Images", rows)
    if known["checkpoints"]:
        rows = table("checkpoint", "step", "size", "", right=("step", "size"))
        for row in known["checkpoints"]:
            best = "best" if row["best"] else ""
            rows.add_row(row["name"], number_text(row["step"]), size_text(row["bytes"]), best)
        _section(console, "Checkpoints", rows)
    if known["validation"]:
        rows = table("measure", "best", "at step", "last", right=("best", "at step", "last"))
        for name, last in known["validation"][-1].items():
            best = known["best_measures"].get(name, {})
            if name not in ("step", "time"):
                rows.add_row(name, *(number_text(value) for value in (best.get("value"), best.get("step"), last)))
        _section(console, "Validation", rows)
    if known["last_scalars"]:
        scalars = [Text(f"{name} {number_text(value)}") for name, value in known["last_scalars"].items()]
        _section(console, f"Last of training, step {record.steps_done:,}", Columns(scalars, padding=(0, 3)))
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
    if versions:
        _section(console, "Versions", Text(versions, "dim"))


def _section(console: Console, title: str, content: RenderableType) -> None:
    console.print(f"\n[bold cyan]{title}[/]")
    console.print(Padding(content, (0, 0, 0, 2)))


def _facts(record: Record, known: dict[str, Any]) -> Table:
    dataset, git, wall, training = (
        known["dataset"] or {}, known["git"] or {}, known["wall_seconds"], known["training_seconds"]
    )  # fmt: skip
    times = [f"{duration_text(wall)} in all"] if wall is not None else []
    times += [f"{duration_text(training)} of it training"] if training is not None else []
    images = ", ".join(f"{number_text(dataset.get(key))} {key}" for key in ("images", "rejected", "duplicates"))
    changed = " with uncommitted changes" if git.get("uncommitted_changes") else ""
    page = "report.html"
    facts = {
        "started": time_text(record.started),
        "steps": steps_text(record),
        "time": ", ".join(times),
        "stage": known["stage"],
        "device": known["device"],
        "precision": known["precision"],
        "data": f"{without_secrets(str(dataset.get('root')))}: {images}" if dataset else None,
        "code": f"{str(git['commit'])[:10]}{changed}" if git.get("commit") else None,
        "size": size_text(known["bytes"]),
        "path": without_secrets(record.location),
        "curves": page if record.files.modified(page) else f"{report_command(record)}  (writes {page})",
    }
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            rows.add_row(name, Text(str(fact)))
    return rows
