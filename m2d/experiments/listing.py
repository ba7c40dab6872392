"""`experiments list`, a row for each experiment, newest last; `show`, all of one but its curves; and `compare`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from m2d.classes import CLASSES
from m2d.experiments.details import DIRECTIONS, best_value, details, last_value, measure_names, report_command, summary
from m2d.experiments.record import Record, find_records, flat, resolve, within
from m2d.experiments.settings import CompareConfig, ListConfig, ShowConfig
from m2d.experiments.wording import (
    NOTHING,
    STATE_STYLES,
    duration_text,
    number_text,
    open_console,
    print_json,
    size_text,
    steps_text,
    table,
)
from m2d.files.paths import result_path

UNKNOWN = "unknown: its record says running, and only the machine that trains it knows whether it is"


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
        console.print(f"no experiment{of_name} in {root}", markup=False)
        return
    rows = table("name", "state", "started", "steps", "best", "size", right=("steps", "size"))
    rows.columns[0].no_wrap = max(len(record.name) for record in records) <= console.width // 2
    for record in records:
        best = f"{record.best[1].removeprefix('val/')} {number_text(record.best[2])}" if record.best else NOTHING
        facts = (f"{record.started:%Y-%m-%d %H:%M}", steps_text(record), best, size_text(record.files.size()))
        rows.add_row(Text(record.name, "bold"), Text(record.state, STATE_STYLES[record.state]), *facts)
    console.print(rows)
    for record in records:
        if record.problem:
            console.print(f"{record.name}: {record.problem}", style="yellow", markup=False)
    if any(record.state == "unknown" for record in records):
        console.print(UNKNOWN, style="dim", markup=False)


def show_command(config: ShowConfig) -> None:
    """Print one experiment. Raises ExperimentError where its name is none or means several."""
    all_records = find_records(config.experiments_dir)
    record = resolve(all_records, config.experiment, config.experiments_dir)
    known = details(record, all_records)
    if config.json:
        print_json(known)
        return
    console = open_console()
    console.print(Text.assemble((record.name, "bold"), "  ", (record.state, STATE_STYLES[record.state])))
    if known["error"]:
        console.print(Text(f"it ended by: {known['error']}", "red"))
    console.print(Text(known["next"]))
    if known["command"]:
        # On one line: with the terminal's line breaks in it, it would not be the same command.
        console.print(Text(known["command"], "bold"), soft_wrap=True)
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
    facts = {
        "started": f"{record.started:%Y-%m-%d %H:%M}",
        "steps": steps_text(record),
        "time": ", ".join(times),
        "stage": known["stage"],
        "device": known["device"],
        "precision": known["precision"],
        "data": f"{dataset.get('root')!s}: {images}" if dataset else None,
        "code": f"{str(git['commit'])[:10]}{changed}" if git.get("commit") else None,
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
    info, config = record.info, record.config
    stage, known = config.get("stage"), info.get("feature_extractor")
    extractor = known.get("key") if isinstance(known, dict) else within(config, "feature_extractor", "name")
    # Velocity errors compare on the same latents alone: runs of one stage that keep the autoencoder of one checkpoint.
    # The joint stage moves the latents, so no two of its runs compare.
    latents = record.name if stage == "joint" else (stage, config.get("init_checkpoint"))
    norm = within(config, "alignment", "spatial_norm") or 0.0  # older runs had none
    return (
        (within(info, "dataset", "sha256"), _IMAGES, "the runs saw other images or another split"),
        (within(config, "data", "image_size"), _IMAGES | _SPEED, "the image sizes differ"),
        (info.get("device"), _SPEED, "the devices differ"),
        (stage, _SPEED, "a step of another stage is other work"),
        (within(config, "saving", "validation_images"), _VALIDATION, "validation images differ"),
        (info.get("perceptual"), _PERCEPTUAL, "the perceptual distances are of two kinds"),
        (extractor, _FEATURES, "the feature extractors differ"),
        (norm, _FEATURES, "the features to align with are normalised otherwise"),
        (latents, _VELOCITY, "the runs learn on different latents"),
    )


@dataclass(frozen=True)
class Row:
    """One measure of every experiment."""

    label: str
    values: tuple[float | None, ...]
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
        print_json(
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
    console = open_console()
    letters = [ascii_uppercase[i] if i < 26 else str(i + 1) for i in range(len(records))]
    for letter, record in zip(letters, records):
        console.print(
            Text.assemble(
                (letter, "bold cyan"), "  ", (record.name, "bold"), "  ", (record.state, STATE_STYLES[record.state])
            )
        )
    shown = table("setting", *letters)
    for key, values in settings.items():
        shown.add_row(key, *(Text("null" if value is None else str(value)) for value in values))
    none = "no setting differs" if all(record.config for record in records) else "settings cannot be read"
    console.print("", shown if settings else none, "", sep="\n")
    titles = [f"{letter}  " for letter in letters]
    shown = table("measure", *titles, right=titles)
    for row in rows:
        texts = [f"{row.text(value)} {'*' if index == row.better else ' '}" for index, value in enumerate(row.values)]
        shown.add_row(row.label, *(Text(text, "bold green" if text.endswith("*") else "") for text in texts))
    console.print(shown)
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
    of_first, *others = map(_grounds, records)
    differing = [
        (names, why)
        for k, (value, names, why) in enumerate(of_first)
        if any(grounds[k][0] != value for grounds in others)
    ]
    train, validation = [record.train for record in records], [record.validation for record in records]
    rows = []

    def add(label: str, name: str, values: Sequence[float | None], text: Callable[[Any], str] = number_text) -> None:
        comparable = not any(name in names for names, _ in differing)
        rows.append(Row(label, tuple(values), _better(values, DIRECTIONS.get(name) if comparable else None), text))

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


def _better(values: Sequence[float | None], direction: str | None) -> int | None:
    """Which of the values is the better one; None for one alone, or where no direction is known.

    Values that read alike are a tie: one checkpoint judged twice differs in its last digits.
    """
    known = [value for value in values if value is not None]
    if direction is None or len(known) < 2:
        return None
    best = min(known) if direction == "lower" else max(known)
    alike = [value for value in known if number_text(float(value)) == number_text(float(best))]
    return values.index(best) if len(alike) == 1 else None
