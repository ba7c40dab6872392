"""`experiments compare`: what was set otherwise, and what came of it, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from rich.table import Table
from rich.text import Text

from m2d.experiments.comparable import not_comparable
from m2d.experiments.find import records_for
from m2d.experiments.measures import (
    DIRECTIONS,
    Direction,
    best_value,
    last_value,
    measure_names,
    training_seconds,
    wall_seconds,
)
from m2d.experiments.record import TRAIN, VALIDATION, Record
from m2d.experiments.settings import CompareConfig
from m2d.experiments.wording import duration_text, number_text, open_console, print_json, state_text
from m2d.files.storage import without_secrets

# Where a run lies and how it talks; everything else is worth telling.
TELLS_NOTHING = frozenset(
    {"name", "experiments_dir", "cache_dir", "fresh", "verbose", "use_wandb", "wandb_project", "wandb_mode"}
)
NOT_SET = "not there"  # a setting that this version of M2D did not have


@dataclass(frozen=True)
class Row:
    """One measure of every experiment."""

    label: str
    values: tuple[float | None, ...]
    better: int | None  # which one, where that can be said
    text: Callable[[Any], str] = number_text


def compare_command(config: CompareConfig) -> None:
    """Print the comparison. Raises ExperimentError where a name is none or means several."""
    records, _ = records_for(config.experiments, config.experiments_dir)
    settings, (rows, notes) = setting_differences(records), measure_rows(records)
    if config.json:
        print_json(_as_values(records, settings, rows, notes))
        return
    console = open_console()
    letters = _letters(len(records))
    for letter, record in zip(letters, records):
        console.print(Text.assemble((letter, "bold cyan"), "  ", (record.name, "bold"), "  ", state_text(record.state)))
    console.print()
    if settings:
        console.print(_settings_table(settings, letters))
    else:
        console.print("no setting differs" if all(record.config for record in records) else "settings cannot be read")
    console.print()
    console.print(_measures_table(rows, letters))
    if any(row.better is not None for row in rows):
        console.print(Text("* the better one", "dim"))
    for note in notes:
        console.print(Text(note, "yellow"))


def setting_differences(records: Sequence[Record]) -> dict[str, tuple[Any, ...]]:
    """{dotted key: its value in each experiment} for what differs; NOT_SET where an experiment has no such key."""
    flat = [_flat({k: v for k, v in record.config.items() if k not in TELLS_NOTHING}) for record in records]
    keys = sorted({key for settings in flat for key in settings})
    values = {key: tuple(settings.get(key, NOT_SET) for settings in flat) for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found[1:])}


def measure_rows(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """The measures side by side, and why some of them name no better one."""
    train = [record.files.records(TRAIN) for record in records]
    validation = [record.files.records(VALIDATION) for record in records]
    incomparable, notes = not_comparable(records)

    def row(label: str, values: Sequence[float | None], name: str, text: Callable[[Any], str] = number_text) -> Row:
        direction = None if name in incomparable else DIRECTIONS.get(name)
        return Row(label, tuple(values), _better(values, direction), text)

    rows = []
    for name in dict.fromkeys(name for entries in validation for name in measure_names(entries)):
        best = [best_value(entries, name) for entries in validation]
        if any(best):
            rows.append(row(f"{name}, best", [found and found[1] for found in best], name))
        rows.append(row(f"{name}, last", [last_value(entries, name) for entries in validation], name))
    losses = sorted({name for entries in train for name in measure_names(entries, "loss/")})
    rows += [row(f"{name}, last", [last_value(entries, name) for entries in train], name) for name in losses]
    rows.append(row("images/s, last", [last_value(entries, "images_per_s") for entries in train], "images_per_s"))
    rows.append(row("steps", [record.steps_done for record in records], "steps"))
    rows.append(
        row("training time", [training_seconds(r, e) for r, e in zip(records, train)], "training time", _duration)
    )
    walls = [wall_seconds(record, entries[-1] if entries else None) for record, entries in zip(records, train)]
    rows.append(row("wall time", walls, "wall time", _duration))
    shown = {row.label.partition(",")[0] for row in rows}
    told = [(sorted(shown & names), why) for names, why in notes]
    return rows, [f"{why}, so no better one is named for {', '.join(names)}" for names, why in told if names]


def _better(values: Sequence[float | None], direction: Direction | None) -> int | None:
    """Which of the values is the better one; None for one alone, or where no direction is known.

    Values that read alike are a tie: one checkpoint judged twice differs in its last digits.
    """
    known = [value for value in values if value is not None]
    if direction is None or len(known) < 2:
        return None
    best = min(known) if direction == "lower" else max(known)
    alike = [value for value in known if number_text(float(value)) == number_text(float(best))]
    return values.index(best) if len(alike) == 1 else None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _letters(count: int) -> list[str]:
    return [ascii_uppercase[i] if i < 26 else str(i + 1) for i in range(count)]


def _settings_table(settings: dict[str, tuple[Any, ...]], letters: Sequence[str]) -> Table:
    table = _table("setting", letters)
    for key, values in settings.items():
        table.add_row(key, *(Text(without_secrets("null" if value is None else str(value))) for value in values))
    return table


def _measures_table(rows: Sequence[Row], letters: Sequence[str]) -> Table:
    table = _table("measure", letters, justify_right=True)
    for row in rows:
        cells = [
            Text(
                f"{row.text(value)} {'*' if index == row.better else ' '}", "bold green" if index == row.better else ""
            )
            for index, value in enumerate(row.values)
        ]
        table.add_row(row.label, *cells)
    return table


def _table(first: str, letters: Sequence[str], *, justify_right: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for letter in letters:
        table.add_column(Text(f"{letter}  " if justify_right else letter, "bold cyan"), overflow="fold",
                         justify="right" if justify_right else "left")  # fmt: skip
    return table


def _duration(seconds: float | None) -> str:
    return number_text(None) if seconds is None else duration_text(seconds)


def _as_values(
    records: Sequence[Record], settings: dict[str, tuple[Any, ...]], rows: Sequence[Row], notes: Sequence[str]
) -> dict[str, Any]:
    """For machines. Times in seconds; a setting that an experiment does not have is left out of its values."""
    names = [record.name for record in records]
    return {
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
        "notes": list(notes),
    }
