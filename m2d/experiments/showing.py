"""`experiments show`: one experiment on a page of the terminal."""

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from m2d.classes import CLASSES
from m2d.experiments.curves import Curve, drawn
from m2d.experiments.details import details
from m2d.experiments.find import records_for
from m2d.experiments.record import Record
from m2d.experiments.settings import ShowConfig
from m2d.experiments.wording import (
    duration_text,
    number_text,
    open_console,
    print_json,
    size_text,
    state_text,
    steps_text,
    time_text,
)
from m2d.files.storage import without_secrets

PLOT_WIDTH, PLOT_HEIGHT, LABELS = 26, 4, 9  # characters: a plot, and the numbers left of it
SCALAR_WIDTH = 38


def show_command(config: ShowConfig) -> None:
    """Print one experiment. Raises ExperimentError where its name is none or means several."""
    (record,), all_records = records_for([config.experiment], config.experiments_dir)
    known = details(record, all_records)
    if config.json:
        print_json(known)
        return
    console = open_console()
    console.print(Text.assemble((record.name, "bold"), "  ", state_text(record.state)))
    _print_next(console, known)
    _section(console, "Run", _facts(record, known))
    if known["degraded"]:
        _section(console, "Degraded", Text("\n".join(str(line) for line in known["degraded"]), "yellow"))
    counts = (known["dataset"] or {}).get("counts")
    if isinstance(counts, dict):
        _section(console, "Images", _counts(counts))
    if known["checkpoints"]:
        _section(console, "Checkpoints", _checkpoints(known["checkpoints"]))
    if known["validation"]:
        _section(console, "Validation", _validation(known))
    if known["last_scalars"]:
        _section(console, f"Last of training, step {record.steps_done:,}", _scalars(console, known["last_scalars"]))
    found = [Curve(name, curve["steps"], curve["values"]) for name, curve in known["curves"].items()]
    if found and console.encoding.lower().startswith("utf"):
        _section(console, "Curves", _plots(console, found))
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
    if versions:
        _section(console, "Versions", Text(versions, "dim"))


def _print_next(console: Console, known: dict[str, Any]) -> None:
    if known["error"]:
        console.print(Text(f"it ended by: {known['error']}", "red"))
    console.print(Text(known["next"]))
    if known["command"]:
        # As it is, on one line: a command with the terminal's line breaks in it is not the same command.
        console.print(Text(without_secrets(known["command"]), "bold"), soft_wrap=True)


def _section(console: Console, title: str, content: Table | Text | Group) -> None:
    console.print()
    console.print(Text(title, "bold cyan"))
    console.print(Padding(content, (0, 0, 0, 2)))


def _facts(record: Record, known: dict[str, Any]) -> Table:
    dataset, git = known["dataset"] or {}, known["git"] or {}
    facts = {
        "started": time_text(record.started),
        "steps": steps_text(record),
        "time": _times(known),
        "stage": known["stage"],
        "device": known["device"],
        "precision": known["precision"],
        "data": _data(dataset),
        "code": _code(git),
        "size": size_text(known["bytes"]),
        "path": without_secrets(known["path"]),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            table.add_row(name, Text(str(fact)))
    return table


def _times(known: dict[str, Any]) -> str:
    wall, training = known["wall_seconds"], known["training_seconds"]
    parts = [f"{duration_text(wall)} in all"] if wall is not None else []
    return ", ".join([*parts, *([f"{duration_text(training)} of it training"] if training is not None else [])])


def _data(dataset: dict[str, Any]) -> str | None:
    if not dataset:
        return None
    images, rejected, duplicates = (number_text(dataset.get(key)) for key in ("images", "rejected", "duplicates"))
    return f"{without_secrets(str(dataset.get('root')))}: {images} images, {rejected} rejected, {duplicates} duplicates"


def _code(git: dict[str, Any]) -> str | None:
    commit = git.get("commit")
    return (
        f"{str(commit)[:10]}{' with uncommitted changes' if git.get('uncommitted_changes') else ''}" if commit else None
    )


def _counts(counts: dict[str, dict[str, int]]) -> Table:
    table = _table("class", *counts)
    for code in CLASSES:
        table.add_row(code, *(number_text(split.get(code)) for split in counts.values()))
    table.add_row("all", *(number_text(sum(split.values())) for split in counts.values()), style="dim")
    return table


def _checkpoints(rows: list[dict[str, Any]]) -> Table:
    table = _table("checkpoint", "step", "size", "")
    for row in rows:
        table.add_row(row["name"], number_text(row["step"]), size_text(row["bytes"]), "best" if row["best"] else "")
    return table


def _validation(known: dict[str, Any]) -> Table:
    """The best of each measure, its step, and the last."""
    table = _table("measure", "best", "at step", "last")
    last = known["validation"][-1]
    for name in [name for name in last if name not in ("step", "time")]:
        best = known["best_measures"].get(name, {})
        table.add_row(name, *(number_text(value) for value in (best.get("value"), best.get("step"), last[name])))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _scalars(console: Console, scalars: dict[str, float | None]) -> Table:
    grid = Table.grid(padding=(0, 2))
    columns = max(1, (console.width - 2) // SCALAR_WIDTH)
    for _ in range(columns):
        grid.add_column(style="dim")
        grid.add_column(justify="right")
    cells = [text for name, value in scalars.items() for text in (name, number_text(value))]
    for start in range(0, len(cells), 2 * columns):
        grid.add_row(*cells[start : start + 2 * columns])
    return grid


def _plots(console: Console, found: list[Curve]) -> Table:
    """As many side by side as the terminal has room for."""
    room = console.width - 2
    width = min(PLOT_WIDTH, max(room - LABELS - 1, 4))
    columns = max(1, (room + 2) // (LABELS + 1 + width + 2))
    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(no_wrap=True)
    plots = [_plot(curve, width) for curve in found]
    for start in range(0, len(plots), columns):
        grid.add_row(*plots[start : start + columns])
    return grid


def _plot(curve: Curve, width: int) -> Text:
    curve = curve.thinned(2 * width)
    lines = drawn(curve, width, PLOT_HEIGHT)
    ends = (max(curve.values), min(curve.values))
    highest, lowest = (number_text(value) if abs(value) >= 1000 else f"{value:.3g}" for value in ends)
    labels = [highest, *[""] * (PLOT_HEIGHT - 2), lowest]
    text = Text(f"{curve.name}{' (log)' if curve.is_log else ''}\n", "bold")
    for label, line in zip(labels, lines):
        text.append(f"{label:>{LABELS}} ", "not bold dim")
        text.append(f"{line}\n", "cyan")
    first, last = f"{curve.steps[0]:,}", f"{curve.steps[-1]:,}"
    return text.append(f"{'':>{LABELS}} {first}{last:>{max(width - len(first), len(last) + 1)}}\n", "not bold dim")
