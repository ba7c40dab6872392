"""`experiments list`: one row for each experiment, newest last."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from m2d.experiments.find import find_records
from m2d.experiments.record import Record
from m2d.experiments.settings import ListConfig
from m2d.experiments.wording import (
    NOTHING,
    number_text,
    open_console,
    print_json,
    size_text,
    state_text,
    steps_text,
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
    rows = [_Row(record) for record in records]
    table = _table(rows)
    needed = console.measure(table, options=console.options.update_width(10_000)).maximum
    console.print(table if needed <= console.width else _cards(rows, console.width))
    _print_notes(console, records)


def summary(record: Record) -> dict[str, Any]:
    """A row of the list, for machines. started: ISO 8601. bytes: of all its files, links left out."""
    best = record.best
    return {
        "name": record.name,
        "state": record.state,
        "problem": record.problem,
        "started": record.started.isoformat(timespec="seconds"),
        "steps_done": record.steps_done,
        "total_steps": record.total_steps,
        "best": None if best is None else {"checkpoint": best[0], "measure": best[1], "value": best[2]},
        "bytes": record.files.size(),
        "path": record.experiment.remote or str(record.experiment.path),
    }


class _Row:
    """What a person reads of one experiment."""

    def __init__(self, record: Record) -> None:
        best = record.best
        self.name = Text(record.name, "bold")
        self.state = state_text(record.state)
        self.started = time_text(record.started)
        self.steps = steps_text(record)
        self.best = NOTHING if best is None else f"{best[1].removeprefix('val/')} {number_text(best[2])}"
        self.size = size_text(record.files.size())


def _table(rows: Sequence[_Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("name", "state", "started", "steps", "best", "size"):
        table.add_column(title, justify="right" if title in ("steps", "size") else "left", no_wrap=True)
    for row in rows:
        table.add_row(row.name, row.state, row.started, row.steps, row.best, row.size)
    return table


def _cards(rows: Sequence[_Row], width: int) -> Group:
    """For a narrow terminal: a few lines each, nothing cut off and no fact on two lines."""
    lines: list[Text] = []
    for row in rows:
        lines.append(Text.assemble(row.name, "  ", row.state, overflow="fold"))
        line = ""
        for fact in (row.started, f"steps {row.steps}", f"best {row.best}", row.size):
            if line and 2 + len(f"{line} · {fact}") > width:
                lines.append(Text(f"  {line}", "dim"))
                line = fact
            else:
                line = f"{line} · {fact}" if line else fact
        lines.append(Text(f"  {line}", "dim"))
    return Group(*lines)


def _print_notes(console: Console, records: Sequence[Record]) -> None:
    for record in records:
        if record.problem:
            console.print(f"{record.name}: {record.problem}", style="yellow", markup=False)
    if any(record.state == "unknown" for record in records):
        console.print(UNKNOWN, style="dim", markup=False)
