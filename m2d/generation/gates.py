"""The gates: what refuses a new image before it is kept. Pixels and features in, one verdict an image out; no Ray.

blank               too little contrast, mostly black or white, or noise
near_copy           nearer to a training image than images of different lesions are to each other: by the extractor's
                    features, or by an 8 x 8 thumbnail in any flip or turn (features of a training image drawn by the
                    VAE are further from its own than many a neighbour's, see docs/results/gates.md)
class_consistency   further from the training images of its class than those are from one another
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m2d.classes import CLASSES, class_index
from m2d.generation.gate_reference import (
    FIXED_MAX_ROUGHNESS,
    FIXED_MAX_SATURATED,
    FIXED_MIN_CONTRAST,
    GateReference,
    ImageFacts,
    mean_distance,
    nearest_thumbnails,
)
from m2d.generation.gate_settings import GateConfig
from m2d.generation.neighbours import nearest, unit_rows


@dataclass(frozen=True)
class Verdict:
    """What the gates found on one image. A number that could not be had is NaN."""

    accepted: bool
    reason: str | None  # blank, saturated, noise, near_copy, outside_class: the first, in this order; None: accepted
    nearest_distance: float  # to the nearest training image of any class, 1 - cosine of standardised features
    class_distance: float  # mean of the same to the nearest training images of its class
    nearest_id: str | None  # the training image nearest by features, or the one that it copies by pixels
    saturated_share: float  # of its pixels, black or white
    contrast: float  # deviation of luma, grey levels
    pixel_distance: float = math.nan  # to the nearest training image, 1 - cosine of thumbnails, any flip or turn
    roughness: float = math.nan  # mean difference of luma between neighbouring pixels, grey levels


def active_gates(config: GateConfig, reference: GateReference | None, *, features: bool = True) -> tuple[str, ...]:
    """The gates that really run, for the console and the manifest; empty: none.

    features: whether those of the new images are given to `check`. A gate that was asked for and lacks what it needs is
    not in the answer: "near_copy:features" and "class_consistency" need features in both, "near_copy:pixels" the
    thumbnails in the reference, and "blank" nothing.
    """
    if not config.enabled:
        return ()
    by_features = features and reference is not None and reference.has_features
    by_pixels = reference is not None and reference.has_thumbnails
    wanted = (
        ("blank", config.blank),
        ("near_copy:features", config.near_copy and by_features),
        ("near_copy:pixels", config.near_copy and by_pixels),
        ("class_consistency", config.class_consistency and by_features),
    )
    return tuple(name for name, active in wanted if active)


def check(
    images: np.ndarray,
    features: np.ndarray | None,
    labels: Sequence[str],
    reference: GateReference | None,
    config: GateConfig,
    *,
    device: str | torch.device = "cpu",
) -> list[Verdict]:
    """One verdict an image, in order; what it says of an image does not depend on the others.

    images: uint8 [N, H, W, 3]. features: their cls float32 [N, D], of the reference's extractor at its image size, or
    None. labels: class codes. What is measured is told also where its gate is off. See `active_gates` for those
    that run: without a reference or features the others refuse nothing. An image with features that are not finite is
    outside its class. Raises ValueError where the shapes do not fit.
    """
    if len(images) != len(labels) or (features is not None and len(features) != len(images)):
        raise ValueError(f"{len(images)} images, {len(labels)} labels, {None if features is None else len(features)}")
    if not len(images):
        return []
    facts = ImageFacts.of(images)
    near, nearest_rows, in_class = _feature_distances(features, labels, reference, device)
    pixel, pixel_rows = _pixel_distances(facts, reference, device)
    active = active_gates(config, reference, features=features is not None)
    limits = _blank_limits(config, reference)
    verdicts = []
    for row, label in enumerate(labels):
        reason, culprit = None, int(nearest_rows[row])
        limit = None if reference is None else reference.class_thresholds[class_index(label)]
        if "blank" in active and facts.contrast[row] < limits.contrast:
            reason = "blank"
        elif "blank" in active and facts.saturated[row] > limits.saturated:
            reason = "saturated"
        elif "blank" in active and facts.roughness[row] > limits.roughness:
            reason = "noise"
        elif reference is not None and "near_copy:pixels" in active and pixel[row] <= reference.pixel_threshold:
            reason, culprit = "near_copy", int(pixel_rows[row])
        elif reference is not None and "near_copy:features" in active and near[row] <= reference.copy_threshold:
            reason = "near_copy"
        elif "class_consistency" in active and limit is not None and not in_class[row] <= limit:  # NaN is outside
            reason = "outside_class"
        verdicts.append(
            Verdict(
                accepted=reason is None,
                reason=reason,
                nearest_distance=float(near[row]),
                class_distance=float(in_class[row]),
                nearest_id=None if reference is None or culprit < 0 else reference.ids[culprit],
                saturated_share=float(facts.saturated[row]),
                contrast=float(facts.contrast[row]),
                pixel_distance=float(pixel[row]),
                roughness=float(facts.roughness[row]),
            )
        )
    return verdicts


@dataclass(frozen=True)
class _BlankLimits:
    contrast: float  # at least
    saturated: float  # at most
    roughness: float  # at most


def _blank_limits(config: GateConfig, reference: GateReference | None) -> _BlankLimits:
    """As set, else of the training images, else fixed."""
    found = _BlankLimits(FIXED_MIN_CONTRAST, FIXED_MAX_SATURATED, FIXED_MAX_ROUGHNESS)
    if reference is not None:
        found = _BlankLimits(reference.min_contrast, reference.max_saturated_share, reference.max_roughness)
    return _BlankLimits(
        found.contrast if config.min_contrast is None else config.min_contrast,
        found.saturated if config.max_saturated_share is None else config.max_saturated_share,
        found.roughness if config.max_roughness is None else config.max_roughness,
    )


def _feature_distances(
    features: np.ndarray | None, labels: Sequence[str], reference: GateReference | None, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the nearest training image, its row, mean distance in the class; NaN, -1, NaN where unknown."""
    count = len(labels)
    near, rows, in_class = np.full(count, np.nan), np.full(count, -1), np.full(count, np.nan)
    if features is None or reference is None or not reference.has_features:
        return near, rows, in_class
    if features.shape[1] != len(reference.mean):
        raise ValueError(f"features of {features.shape[1]} dimensions, the reference's have {len(reference.mean)}")
    usable = np.flatnonzero(np.isfinite(features).all(axis=1))
    standardised = (torch.from_numpy(features[usable].astype(np.float32)) - reference.mean) / reference.scale
    queries, bank = unit_rows(standardised).to(device), reference.features.to(device)
    distances, found = nearest(queries, bank)
    near[usable], rows[usable] = distances[:, 0].cpu().numpy(), found[:, 0].cpu().numpy()
    classes = torch.tensor([class_index(labels[int(row)]) for row in usable], dtype=torch.int64)
    for index in range(len(CLASSES)):
        mine = (classes == index).nonzero()[:, 0]
        if len(mine) and reference.class_thresholds[index] is not None:
            of_class = bank[reference.rows_of(index)]
            means = mean_distance(nearest(queries[mine.to(device)], of_class, reference.neighbours)[0])
            in_class[usable[mine.numpy()]] = means.cpu().numpy()
    return near, rows, in_class


def _pixel_distances(
    facts: ImageFacts, reference: GateReference | None, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray]:
    count = len(facts.contrast)
    if reference is None or not reference.has_thumbnails:
        return np.full(count, np.nan), np.full(count, -1)
    distances, rows = nearest_thumbnails(facts.thumbnails, reference.thumbnails.to(device))
    return distances.cpu().numpy(), rows.cpu().numpy()
