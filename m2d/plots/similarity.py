"""How alike generated and real features are, class by class, in numbers. Draws nothing."""

import numpy as np

from m2d.classes import CLASSES, NUM_CLASSES
from m2d.plots.components import require_features


def class_similarities(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, generated_labels: np.ndarray
) -> dict[str, dict[str, float]]:
    """For each class the mean cosine between its features and real ones, after centring; in [-1, 1].

    real [N, D], generated [M, D]; labels: class indices. Keys of a class: "generated_to_own" and "generated_to_others"
    (its generated against real features of its class and of the others), "real_to_own" (real against the other real of
    its class: no feature meets itself) and "real_to_others". Each other class counts the same, however many images it
    has. The centre is the mean of the real classes' means: with the plain mean the largest class would be the centre
    and its cosines noise. A number that cannot be had (no images, or one alone) is left out.
    """
    real, generated = require_features(real), require_features(generated)
    members = [real[real_labels == label] for label in range(NUM_CLASSES)]
    present = [features for features in members if len(features)]
    if not present:
        return {code: {} for code in CLASSES}
    centre = np.mean([features.mean(axis=0) for features in present], axis=0)
    units = [_unit(features, centre) for features in members]
    numbers: dict[str, dict[str, float]] = {}
    for label, code in enumerate(CLASSES):
        others = [units[other] for other in range(NUM_CLASSES) if other != label and len(units[other])]
        drawn = _unit(generated[generated_labels == label], centre)
        numbers[code] = {
            **_named("generated_to_own", _mean_cosines(drawn, [units[label]] if len(units[label]) else [])),
            **_named("generated_to_others", _mean_cosines(drawn, others)),
            **_named("real_to_own", _leave_one_out(units[label])),
            **_named("real_to_others", _mean_cosines(units[label], others)),
        }
    return numbers


def _unit(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Centred rows of length 1; rows that lie on the centre stay 0, so their cosine with anything is 0."""
    centred = features - centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    rounding = 1e-12 * np.linalg.norm(centre)
    unit: np.ndarray = np.where(lengths > rounding, centred / np.where(lengths > 0, lengths, 1.0), 0.0)
    return unit


def _mean_cosines(units: np.ndarray, groups: list[np.ndarray]) -> float | None:
    """The mean over groups of the mean cosine of all pairs: the product of the two mean unit vectors."""
    if not len(units) or not groups:
        return None
    return float(np.mean([units.mean(axis=0) @ group.mean(axis=0) for group in groups]))


def _leave_one_out(units: np.ndarray) -> float | None:
    """The mean cosine over pairs of two different rows: all pairs less the rows with themselves."""
    count = len(units)
    if count < 2:
        return None
    total = units.sum(axis=0)
    return float((total @ total - np.square(units).sum()) / (count * (count - 1)))


def _named(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: value}
