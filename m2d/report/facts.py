"""What a report says in words: what was trained on what, how to go on, which settings are not the usual ones."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m2d.classes import CLASSES
from m2d.config import TrainConfig, as_dict
from m2d.experiments.record import Record, State
from m2d.experiments.wording import duration_text, number_text, plain
from m2d.files.storage import without_secrets

STAGES = {
    "joint": "VAE and U-Net trained together",
    "latent": "U-Net trained alone (on the latents of a frozen VAE)",
    "decoder": "Decoder of the VAE trained alone (encoder and U-Net kept)",
}
STATES: dict[State, str] = {
    "running": "Training now",
    "done": "Done",
    "resumable": "Unfinished, can go on",
    "failed": "Ended before its first checkpoint",
    "superseded": "Left for a fresh run",
    "broken": "Its record cannot be read",
    "unknown": "Not known whether it is training",
}
MEASURES = {
    "val/psnr_db": "reconstruction PSNR (dB, more is better)",
    "val/perceptual": "perceptual distance of reconstructions (less is better)",
    "val/velocity_mse": "velocity error of the averaged U-Net (less is better)",
}
UNCOUNTED = frozenset({"name", "fresh", "verbose"})  # settings that say nothing of the result
_BY_DEFAULT = "not known"  # to this version of M2D


@dataclass(frozen=True)
class Measure:
    """A row of the validation table. best: (value, step) where it is known which way is better."""

    name: str
    best: str
    at_step: str
    last: str


def lead(record: Record, known: Mapping[str, Any]) -> str:
    """What was trained on what, in one sentence. known: of m2d.experiments.details."""
    config = record.config
    stage = str(config.get("stage"))
    images = _images(record.info.get("dataset"), _within(config, "data", "image_size"))
    parts = [f"{STAGES.get(stage, 'Training')}{images}"]
    extractor = _within(config, "feature_extractor", "name")
    if extractor:
        parts.append(f"with {_extractor_name(str(extractor))} as feature extractor")
    if config.get("init_checkpoint"):
        parts.append(f"starting from {config['init_checkpoint']}")
    device = ", ".join(str(known[key]) for key in ("device", "precision") if known.get(key))
    if device:
        parts.append(f"on {device}")
    return f"{', '.join(parts)}: {_progress(record, known)}."


def validation_measures(known: Mapping[str, Any]) -> list[Measure]:
    """Best and last of every validation measure, known ones first."""
    records: Sequence[Mapping[str, Any]] = known["validation"]
    names = [name for name in MEASURES if any(name in entry for entry in records)]
    names += [name for name in dict.fromkeys(n for entry in records for n in entry) if name.startswith("val/")]
    rows = []
    for name in dict.fromkeys(names):
        best = known["best_measures"].get(name, {})
        last = next((entry[name] for entry in reversed(records) if name in entry), None)
        rows.append(Measure(MEASURES.get(name, name), *map(number_text, (best.get("value"), best.get("step"), last))))
    return rows


def psnr_text(known: Mapping[str, Any]) -> str | None:
    """The PSNR that validation last measured, and the best one; None where it measured none."""
    measured = [entry for entry in known["validation"] if isinstance(entry.get("val/psnr_db"), (int, float))]
    if not measured:
        return None
    last, best = measured[-1], known["best_measures"].get("val/psnr_db")
    text = f"PSNR over the validation images: {last['val/psnr_db']:.2f} dB at step {last['step']:,}"
    if best is None or best["step"] == last["step"]:
        return f"{text}."
    return f"{text}; the best was {best['value']:.2f} dB at step {best['step']:,}."


def other_settings(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(dotted name, value, default) of every setting that is not the default, in the order of the configuration."""
    defaults = _flat(as_dict(TrainConfig()))
    return [
        (name, _value(value), _value(defaults[name]) if name in defaults else _BY_DEFAULT)
        for name, value in _flat(config).items()
        if name not in UNCOUNTED and (name not in defaults or value != defaults[name])
    ]


def generate_command(record: Record) -> str | None:
    """Makes samples of the best checkpoint, or of the newest; None where there is none."""
    if not record.checkpoints:
        return None
    best = record.best[0] if record.best is not None else None
    name = best if best in record.checkpoints else record.checkpoints[-1]
    root = record.experiment.remote or str(record.experiment.path)
    words = ["python", "-m", "m2d", "generate", "--checkpoint", f"{root}/checkpoints/{name}"]
    return without_secrets(shlex.join(words))


def report_command(record: Record) -> str:
    """Writes the page anew."""
    root = (record.experiment.remote or str(record.experiment.path)).rpartition("/")[0]
    words = ["python", "-m", "m2d", "experiments", "report", record.name, "--experiments_dir", root]
    return without_secrets(shlex.join(words))


def sampling_text(recipe: Mapping[str, Any]) -> str:
    """How a generation run drew its images, of its generation.json."""
    parts = [str(recipe[name]) for name in ("solver",) if recipe.get(name)]
    parts += [f"{number_text(recipe['steps'])} steps"] if recipe.get("steps") else []
    parts += [f"guidance {number_text(recipe['guidance_scale'])}"] if recipe.get("guidance_scale") else []
    parts += [f"seed {recipe['seed']}"] if recipe.get("seed") is not None else []
    return ", ".join(parts)


def code_text(git: Any) -> str | None:
    """The commit, and whether the code was another; None where it was not recorded."""
    commit = git.get("commit") if isinstance(git, dict) else None
    if not commit:
        return None
    return f"{commit}{', with uncommitted changes (code_backup/ holds them)' if git.get('uncommitted_changes') else ''}"


def _images(dataset: Any, size: Any) -> str:
    counts = dataset.get("counts") if isinstance(dataset, dict) else None
    train = counts.get("train") if isinstance(counts, dict) else None
    if not isinstance(train, dict) or not all(isinstance(number, int) for number in train.values()):
        return ""
    each = ", ".join(f"{code} {train[code]:,}" for code in CLASSES if code in train)
    pixels = f" at {size} × {size} px" if isinstance(size, int) else ""
    return f" on {sum(train.values()):,} training images{pixels} ({each})"


def _progress(record: Record, known: Mapping[str, Any]) -> str:
    done, total = record.steps_done, record.total_steps
    steps = f"{done:,} steps" if total is None else f"{done:,} of {total:,} steps"
    if not done:
        return "no step recorded" if total is None else f"no step recorded of {total:,}"
    seconds = known.get("wall_seconds")
    return steps if seconds is None else f"{steps} in {duration_text(seconds)}"


def _extractor_name(name: str) -> str:
    kind, _, size = name.partition("-")
    if kind == "panderm":
        return f"PanDerm-{size.capitalize()}"
    return f"ImageNet {name.replace('efficientnet-lite', 'EfficientNet-Lite')}" if kind == "efficientnet" else name


def _within(config: Mapping[str, Any], group: str, name: str) -> Any:
    inside = config.get(group)
    return inside.get(name) if isinstance(inside, dict) else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values; a mapping without entries is a value."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return values


def _value(value: Any) -> str:
    """As it is written in a settings file, on one line."""
    shown = plain(value)
    return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
