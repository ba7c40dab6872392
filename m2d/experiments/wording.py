"""Numbers, sizes and times as people read them, and values as JSON holds them."""

import json
import os
from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2d.experiments.record import Record, State

NOTHING = "–"
PIPE_WIDTH = 160  # characters
STATE_STYLES: dict[State, str] = {
    "running": "bold cyan",
    "done": "green",
    "resumable": "yellow",
    "failed": "red",
    "superseded": "dim",
    "broken": "bold red",
    "unknown": "magenta",
}


def size_text(size: float) -> str:
    """Bytes as 512 B, 281 MiB, 2.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def duration_text(seconds: float | None) -> str:
    """Seconds as 48 s, 4 min 48 s, 2 h 10 min, 3 d 4 h; – for none."""
    if seconds is None:
        return NOTHING
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute} min"
    return f"{minutes} min {second} s" if minutes else f"{second} s"


def number_text(value: Any) -> str:
    """Four digits of a measure; a whole number whole; – for none."""
    if value is None:
        return NOTHING
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def steps_text(record: Record) -> str:
    """2,130/2,982."""
    return f"{record.steps_done:,}/{number_text(record.total_steps)}"


def one_line(text: str, longest: int = 300) -> str:
    """A message's first line, without a terminal's colour codes."""
    line = next((line.strip() for line in Text.from_ansi(text).plain.splitlines() if line.strip()), "")
    return line if len(line) <= longest else f"{line[:longest]}…"


def plain(value: Any) -> Any:
    """The value as JSON can hold it: no infinity, no NaN."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, (str, int, type(None))) else str(value)


def print_json(value: Any) -> None:
    """The value on stdout, as JSON."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def table(*titles: str, right: Collection[str] = ()) -> Table:
    """An empty table that folds its columns where the terminal is narrow. right: titles of those with numbers."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        made.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return made


def open_console() -> Console:
    """Where a person reads: stdout. A pipe or a file is taken to be wide, unless COLUMNS says how wide."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console
