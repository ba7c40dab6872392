"""What is known of one experiment as plain values, for `--json`, the terminal and the page; what to do next; words."""

import shlex
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from rich.text import Text

from m2d.experiment import step_of
from m2d.experiments.record import FINISHED, Record, is_finite
from m2d.files.paths import copy_around

# Which of a measure's values is the best. A name that is not here has no direction that is known: kl and the two sides
# of a discriminator's game among them.
BEST_OF: dict[str, Any] = dict.fromkeys(("val/psnr_db", "images_per_s"), max) | dict.fromkeys(
    (
        "val/perceptual", "val/velocity_mse", "loss/diffusion", "loss/reconstruction", "loss/perceptual",
        "loss/alignment", "loss/alignment_vae", "loss/manifold",
    ),
    min,
)  # fmt: skip
CURVE_POINTS = 200  # of a curve in --json; metrics/train.jsonl holds them all
NOTHING = "–"

Records = Sequence[Mapping[str, Any]]


def summary(record: Record) -> dict[str, Any]:
    """A row of the list, for machines. started: ISO 8601. bytes: of all its files, links left out."""
    return {
        "name": record.name,
        "state": record.state,
        "problem": record.problem,
        "started": record.started.isoformat(timespec="seconds"),
        "steps_done": record.steps_done,
        "total_steps": record.total_steps,
        "best": record.best and dict(zip(("checkpoint", "measure", "value"), record.best)),
        "bytes": record.files.size(),
        "path": record.location,
    }


def details(record: Record, all_records: Sequence[Record]) -> dict[str, Any]:
    """What is known, by topic. all_records: of the same root, oldest first. Times in seconds, sizes in bytes."""
    info, train, validation = record.info, record.train, record.validation
    what, command = next_step(record, all_records)
    failed = record.state != "running" and info.get("state") == "failed" and info.get("error")
    measured = {entry["step"]: entry for entry in validation}
    best = {name: best_value(validation, name) for name in measure_names(validation)}
    drawn = [(train, name) for prefix in ("loss/", "learning_rate/") for name in sorted(measure_names(train, prefix))]
    drawn += [(validation, name) for name in sorted(measure_names(validation, "val/"))]
    return {
        **summary(record),
        "next": what,
        "command": command,
        "error": one_line(str(failed)) if failed else None,
        "dataset": info.get("dataset"),
        "stage": record.config.get("stage"),
        "device": info.get("device"),
        "workers": info.get("world_size"),
        "precision": info.get("precision"),
        "degraded": info.get("degraded") or [],
        "versions": info.get("versions") or {},
        "git": info.get("git"),
        "finished": info.get("finished"),
        "wall_seconds": record.wall_seconds,
        "training_seconds": record.training_seconds,
        "checkpoints": [
            {
                "name": name,
                "step": step_of(name),
                "best": record.best is not None and name == record.best[0],
                "bytes": record.files.size(f"checkpoints/{name}"),
                "measures": {k: v for k, v in measured.get(step_of(name), {}).items() if k not in ("step", "time")},
            }
            for name in record.checkpoints
        ],
        "validation": validation,
        "best_measures": {name: {"step": found[0], "value": found[1]} for name, found in best.items() if found},
        "last_scalars": {name: last_value(train, name) for name in sorted(measure_names(train))},
        "curves": {name: points for records, name in drawn if (points := curve(records, name))},
        "config": record.config,
    }


def next_step(record: Record, all_records: Sequence[Record]) -> tuple[str, str | None]:
    """(what to do in one sentence, the command for it or None). all_records: of the same root, oldest first."""
    generate, command = generate_command(record), resume_command(record)
    if record.state == "running":
        speed, left = record.last.get("images_per_s"), ""
        if record.images_a_step and record.total_steps and is_finite(speed) and speed:
            seconds = (record.total_steps - record.steps_done) * record.images_a_step / speed
            left = f"; about {duration_text(seconds)} left"
        return f"it is training{left}", None
    if record.state == "unknown":
        return "its record says running; if it is not, its command continues it", command
    if record.state == "broken":
        use = "it cannot be resumed, its checkpoint still generates"
        return f"{record.problem}; {use if generate else 'nothing can be done with it, and clean removes it'}", generate
    if record.state in FINISHED:
        why = "" if record.state == "done" else "a --fresh run took its place; "
        kind = "best checkpoint" if record.best and record.best[0] in record.checkpoints else "checkpoint"
        return f"{why}its {kind} generates" if generate else f"{why}it holds no checkpoint", generate
    # Neither running nor finished: a command continues the newest such run of its name.
    rivals = [r for r in all_records if r.family == record.family and r.state not in (*FINISHED, "broken")]
    if rivals and rivals[-1].name != record.name:
        use = "this one's checkpoint still generates" if generate else "this one holds no checkpoint"
        newest = f"its command would continue {rivals[-1].name}, the newest unfinished one of this name"
        return f"{newest}; {use}", generate
    if command is None:
        return "its command was not recorded; repeat it to continue", None
    where = " (in the folder it was started in)" if record.info.get("cwd") is None else ""
    if record.state == "failed":
        return f"no checkpoint yet: its command begins at step 0 again{where}", command
    return f"its command continues at step {step_of(record.checkpoints[-1]):,}{where}", command


def resume_command(record: Record) -> str | None:
    """The command of the record as a shell takes it, without --fresh; None where the record has none.

    For a job that ran in a copy it is to be given in the directory that was submitted.
    """
    words = shlex.split(str(record.info.get("command") or ""))
    if not words:
        return None
    while fresh := [place for place, word in enumerate(words) if word.partition("=")[0] == "--fresh"]:
        value = words[fresh[0] + 1 : fresh[0] + 2] if words[fresh[0]] == "--fresh" else []
        del words[fresh[0] : fresh[0] + (2 if value and not value[0].startswith("-") else 1)]
    script = Path(words[0])
    start = ["python", words[0]] if script.suffix == ".py" else [script.name]
    start = ["python", "-m", script.parent.name] if script.name == "__main__.py" else start
    command, folder = shlex.join([*start, *words[1:]]), record.info.get("cwd")
    if folder is None:
        return command
    if copy_around(Path(folder)) is not None:  # Ray has deleted it; the submitted directory is not on record
        return f"ray job submit --working-dir . -- {command}"
    return f"cd {shlex.quote(folder)} && {command}"


def generate_command(record: Record) -> str | None:
    """Makes samples of the best checkpoint, or of the newest; None where there is none."""
    if not record.checkpoints:
        return None
    name = record.checkpoints[-1]
    if record.best is not None and record.best[0] in record.checkpoints:
        name = record.best[0] if record.experiment.remote else "best"  # object stores know no links
    return shlex.join(["python", "-m", "m2d", "generate", "--checkpoint", f"{record.location}/checkpoints/{name}"])


def report_command(record: Record) -> str:
    """Writes the page again."""
    root = record.location.rpartition("/")[0]
    return shlex.join(["python", "-m", "m2d", "experiments", "report", record.name, "--experiments_dir", root])


def measure_names(records: Records, prefix: str = "") -> list[str]:
    """Names of the numbers that the records hold, in the order they come up; without step and time."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    return [name for name in names if name not in ("step", "time")]


def last_value(records: Records, name: str) -> float | None:
    """The last finite value of a measure; None where there is none."""
    return next((value for _, value in reversed(_points(records, name))), None)


def best_value(records: Records, name: str) -> tuple[int, float] | None:
    """(step, value) of the best value; None where none is finite or which way is better is not known."""
    known = _points(records, name)
    return BEST_OF[name](known, key=lambda point: point[1]) if known and name in BEST_OF else None


def curve(records: Records, name: str, points: int = CURVE_POINTS) -> dict[str, list[Any]] | None:
    """{steps, values} of a measure's finite values; None for fewer than two.

    At most so many points, each the median of its stretch of steps; the first and the last step stay.
    """
    known = _points(records, name)
    if len(known) < 2:
        return None
    first, span = known[0][0], max(known[-1][0] - known[0][0], 1)
    stretches: dict[int, list[tuple[int, float]]] = {}
    for index, (step, value) in enumerate(known):
        place = index if len(known) <= points else min((step - first) * points // span, points - 1)
        stretches.setdefault(place, []).append((step, value))
    steps = [stretch[-1][0] for stretch in stretches.values()]
    return {
        "steps": [first, *steps[1:]],
        "values": [median(value for _, value in stretch) for stretch in stretches.values()],
    }


def _points(records: Records, name: str) -> list[tuple[int, Any]]:
    return [(record["step"], record[name]) for record in records if is_finite(record.get(name))]


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
    if hours:
        return f"{days} d {hour} h" if days else f"{hours} h {minute} min"
    return f"{minutes} min {second} s" if minutes else f"{second} s"


def number_text(value: Any) -> str:
    """Four digits of a measure; a whole number whole; – for none."""
    if not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e9 else f"{value:.4g}"


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
