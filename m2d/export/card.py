"""The model card of an export: README.md and CITATION.cff, filled from the checkpoint, its experiment and evaluation.

What is not recorded is left out or said to be unknown; nothing is made up.
"""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from m2d import __version__
from m2d.errors import ConfigError, first_line
from m2d.experiment import Experiment
from m2d.experiments.details import duration_text
from m2d.experiments.record import Record, flat, read_record
from m2d.export.settings import ExportConfig
from m2d.generation.output import RECORD_NAME
from m2d.models.checkpoint import CARD_FILES, Checkpoint
from m2d.models.published import HUB
from m2d.training.settings import TrainConfig, as_dict

CARD, SAMPLES = "README.md", "samples.png"
# Where files are and how a run is shown says nothing of the model.
_OF_PLACES = ("data_root", "experiments_dir", "cache_dir", "init_checkpoint", "name", "fresh", "verbose", "dry_run")
_OF_DISPLAY = ("use_wandb", "wandb", "ray.", "telemetry.", "saving.")
_MEASURES = {
    "val/psnr_db": "PSNR of reconstructions, dB (higher is better)",
    "val/perceptual": "perceptual distance of reconstructions (lower is better)",
    "val/velocity_mse": "error of the velocity (lower is better)",
}
_LICENSES = {"cc-by-nc-4.0", "cc-by-4.0", "cc0-1.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "mit", "apache-2.0"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("m2d.export", "."), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
TEMPLATES.filters["grouped"] = lambda number: "–" if number is None else f"{number:,}"


@dataclass(frozen=True)
class Evaluated:
    """What of an evaluation.json a card tells."""

    verdicts: list[str]  # sentences, with their intervals
    lines: list[str]
    images: list[dict[str, Any]]  # of each set: name, images and lesions by class


def experiment_record(checkpoint: Path) -> Record | None:
    """The record of the experiment that a checkpoint is in; None where it is in none."""
    folder = checkpoint.absolute().parent
    return read_record(Experiment(folder.parent)) if folder.name == "checkpoints" else None


def write_card(
    folder: Path, config: ExportConfig, checkpoint: Checkpoint, record: Record | None, *, title: str, repository: str
) -> None:
    """README.md and CITATION.cff into an export. checkpoint: what is exported. repository: how users will name it.

    Raises ConfigError where --evaluation cannot be used.
    """
    info, data = checkpoint.info, checkpoint.info.config.get("data") or {}
    run = record.info if record else {}
    licence = config.data_license
    tag = (licence or "").casefold().replace(" ", "-")
    facts: dict[str, Any] = {
        "title": title,
        "repository": repository,
        "on_hub": config.to.startswith(HUB),
        "info": info,
        "config": info.config,
        "data": data,
        "dtype": config.dtype,
        "licence": licence,
        "licence_tag": tag if tag in _LICENSES else "other",
        "classes": _class_rows(checkpoint, record),
        "dataset": run.get("dataset") or {},
        "networks": _networks(checkpoint),
        "settings": _settings(info.config),
        "effort": _effort(record, checkpoint.step),
        "measures": _measures(record, checkpoint.step),
        "evaluated": _newest_evaluation(config.evaluation, record, checkpoint.sha256),
        "degraded": run.get("degraded") or [],
        "has_prior": checkpoint.prior is not None,
        "weak": list(checkpoint.prior.weak) if checkpoint.prior else [],
        "samples": SAMPLES if config.samples else None,
        "seed": config.seed,
        "sha256": checkpoint.sha256,
        "version": __version__,
    }
    for name in CARD_FILES:
        template = TEMPLATES.get_template({"README.md": "card.md.jinja"}.get(name, f"{name}.jinja"))
        (folder / name).write_text(template.render(facts), encoding="utf-8")


def _class_rows(checkpoint: Checkpoint, record: Record | None) -> list[dict[str, Any]]:
    """Of each class code, name, training images and lesions; None where they are not recorded."""
    images: dict[str, int | None] = dict.fromkeys(checkpoint.info.classes.codes)
    lesions: dict[str, int | None] = dict(images)
    if record is not None:
        counted = ((record.info.get("dataset") or {}).get("counts") or {}).get("train") or {}
        images |= {code: int(counted[code]) for code in images if code in counted}
        with suppress(OSError, KeyError, pa.ArrowException):
            catalog = pq.read_table(
                record.experiment.path / "cache" / "catalog.parquet", columns=["label", "lesion_id", "split"]
            ).to_pylist()
            train = {(row["label"], row["lesion_id"]) for row in catalog if row["split"] == "train"}
            of_class = Counter(label for label, _ in train)
            lesions |= {code: of_class[code] for code in lesions}
    names = checkpoint.info.classes.names
    return [{"code": code, "name": names[code], "images": images[code], "lesions": lesions[code]} for code in images]


def _networks(checkpoint: Checkpoint) -> dict[str, Any]:
    def count(network: nn.Module) -> int:
        return sum(weight.numel() for weight in network.parameters())

    channels, height, width = checkpoint.latent_shape
    return {
        "vae": type(checkpoint.autoencoder.vae).__name__,
        "vae_parameters": count(checkpoint.autoencoder),
        "unet_parameters": count(checkpoint.denoiser.unet),
        "latents": f"{channels} x {height} x {width}",
    }


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings that are not the default, but for places and displays."""
    defaults = flat(as_dict(TrainConfig()))
    return [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in flat(config).items()
        if not name.startswith(_OF_DISPLAY) and name not in _OF_PLACES and value != defaults.get(name, value)
    ]


def _effort(record: Record | None, step: int) -> dict[str, str]:
    """Device, time and FLOPs up to a step, as far as they are recorded."""
    if record is None:
        return {}
    found = {
        "device": str(record.info.get("device") or ""),
        "precision": str(record.info.get("precision") or ""),
        "optimiser steps": f"{step:,}",
    }
    seconds = flops = 0.0
    before, images = 0, record.images_a_step
    for entry in record.train:
        speed = entry.get("images_per_s")
        if images and speed and entry["step"] <= step:
            of_entry = (entry["step"] - before) * images / speed
            seconds += of_entry
            flops += of_entry * (entry.get("model_tflops_per_s") or 0) * 1e12 * record.info.get("world_size", 1)
        before = entry["step"]
    found |= {"images seen": f"{step * images:,}"} if images else {}
    found |= {"time of the steps": duration_text(seconds)} if seconds else {}
    found |= {"FLOPs of the networks": f"{flops:.2e}"} if flops else {}
    return {name: text for name, text in found.items() if text}


def _measures(record: Record | None, step: int) -> list[tuple[str, str]]:
    """Of the validation at the checkpoint's step."""
    entries = [entry for entry in (record.validation if record else []) if entry["step"] == step]
    return [
        (_MEASURES[name], f"{value:.4g}")
        for name, value in (entries[-1] if entries else {}).items()
        if name in _MEASURES
    ]


def _newest_evaluation(given: str | None, record: Record | None, sha256: str) -> Evaluated | None:
    """The evaluation that is given, or the newest one of images that this very checkpoint made in its experiment."""
    places = [Path(given).expanduser()] if given else []
    if record is not None and not given:
        found = (record.experiment.path / "generated_images").glob("*/evaluation/evaluation.json")
        places = sorted(
            (file for file in found if _made_by(file.parents[1], sha256)), key=lambda file: file.stat().st_mtime
        )
    if not places:
        return None
    return read_evaluation(places[-1])


def _made_by(generated: Path, sha256: str) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        record = json.loads((generated / RECORD_NAME).read_text(encoding="utf-8"))
        return bool(record.get("recipe", record).get("checkpoint") == sha256)
    return False


def read_evaluation(file: Path) -> Evaluated:
    """Raises ConfigError for a file that is none."""
    try:
        return _evaluated(json.loads(file.expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"evaluation: {file} cannot be read as an evaluation.json ({first_line(error)}); name another one"
        ) from None


def _evaluated(document: dict[str, Any]) -> Evaluated:
    verdicts = [f"{one['classifier']}: {one['verdict']['sentence']}" for one in document.get("worth") or []]
    verdicts = verdicts or [
        f"{one['classifier']}: {one['verdict']['sentence']}" for one in document.get("downstream") or []
    ]
    lines = []
    for fidelity in (document.get("fidelity") or [])[:1]:
        of_all = {row["comparison"]: row for row in fidelity["rows"] if row["label"] == "all"}
        said = {"generated": "generated images", "autoencoder": "reconstructions", "unseen": "unseen real images"}
        told = [
            f"{text} {of_all[name]['kernel_distance']:.3f} (standard error {of_all[name]['kernel_distance_se']:.3f})"
            for name, text in said.items()
            if name in of_all and of_all[name].get("kernel_distance") is not None
        ]
        lines += (
            [f"Kernel distance to the training images, features of {fidelity['extractor']}: {', '.join(told)}."]
            if told
            else []
        )
    consistency = document.get("consistency") or {}
    if made := consistency.get("mean_agreement"):
        real = consistency["mean_recall_of_real"]
        lines.append(
            "A classifier of real images finds the asked class in "
            f"{_share(made)} of the generated images, and the diagnosis in {_share(real)} of unseen real ones (means "
            "over the classes)."
        )
    if memorization := document.get("memorization"):
        lines.append(f"Memorisation: {memorization['verdict']}.")
    if privacy := document.get("privacy"):
        lines.append(f"Privacy of the training lesions: {privacy['verdict']}.")
    return Evaluated(verdicts, lines, document.get("images") or [])


def _share(estimate: dict[str, float]) -> str:
    return "{value:.0%} [{low:.0%}, {high:.0%}]".format(**estimate)
