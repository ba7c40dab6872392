"""Which measures of several runs may not be set against each other, and why: a better number must mean a better run."""

from collections.abc import Sequence
from typing import Any

from m2d.experiments.record import Record

VALIDATION = frozenset({"val/psnr_db", "val/perceptual", "val/velocity_mse"})
PERCEPTUAL = frozenset({"val/perceptual", "loss/perceptual"})
FEATURES = frozenset({"loss/alignment", "loss/alignment_vae", "loss/manifold"})
VELOCITY = frozenset({"val/velocity_mse", "loss/diffusion"})
SPEED = frozenset({"images_per_s", "images/s"})
IMAGES = VALIDATION | PERCEPTUAL | FEATURES | VELOCITY | {"loss/reconstruction"}


def not_comparable(records: Sequence[Record]) -> tuple[frozenset[str], list[tuple[frozenset[str], str]]]:
    """(names of measures, [(names, why)]).

    Velocity errors compare on the same latents alone: runs of one stage that keep the autoencoder of one checkpoint.
    The joint stage moves the latents, so that there no two runs compare.
    """
    reasons: list[tuple[frozenset[str], str]] = []

    def unless_alike(values: Sequence[Any], names: frozenset[str], why: str) -> None:
        if any(value != values[0] for value in values[1:]):
            reasons.append((names, why))

    unless_alike([_dataset(r) for r in records], IMAGES, "the runs saw other images or another split")
    unless_alike([_setting(r, "data", "image_size") for r in records], IMAGES | SPEED, "the image sizes differ")
    unless_alike([r.info.get("device") for r in records], SPEED, "the devices differ")
    unless_alike([r.config.get("stage") for r in records], SPEED, "a step of another stage is other work")
    unless_alike([_setting(r, "saving", "validation_images") for r in records], VALIDATION, "validation images differ")
    unless_alike([r.info.get("perceptual") for r in records], PERCEPTUAL, "the perceptual distances are of two kinds")
    unless_alike([_extractor(r) for r in records], FEATURES, "the feature extractors differ")
    norms = [_setting(r, "alignment", "spatial_norm") or 0.0 for r in records]  # older runs had none
    unless_alike(norms, FEATURES, "the features to align with are normalised otherwise")
    unless_alike([_latents(r) for r in records], VELOCITY, "the runs learn on different latents")
    return frozenset(name for names, _ in reasons for name in names), reasons


def _dataset(record: Record) -> Any:
    return (record.info.get("dataset") or {}).get("sha256")


def _setting(record: Record, group: str, name: str) -> Any:
    return (record.config.get(group) or {}).get(name)


def _extractor(record: Record) -> Any:
    known = record.info.get("feature_extractor")
    return known.get("key") if isinstance(known, dict) else _setting(record, "feature_extractor", "name")


def _latents(record: Record) -> Any:
    stage = record.config.get("stage")
    return record.name if stage == "joint" else (stage, record.config.get("init_checkpoint"))
