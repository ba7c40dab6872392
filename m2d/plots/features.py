"""Numbers of features for the pictures: principal components, and how alike classes are. Draws nothing."""

import math
from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES, NUM_CLASSES

_EVEN = 128  # the grey of a component that does not vary


@dataclass(frozen=True)
class Components:
    """mean [D]; axes [K, D], rows orthonormal or 0 where there is no such component; share [K] of the variance."""

    mean: np.ndarray
    axes: np.ndarray
    share: np.ndarray

    def coordinates(self, features: np.ndarray) -> np.ndarray:
        """[M, D] to [M, K]."""
        return (np.asarray(features, dtype=float) - self.mean) @ self.axes.T


@dataclass(frozen=True)
class Projection:
    """real [N, 2], generated [M, 2]: coordinates; share [2]: of the real features' variance."""

    real: np.ndarray
    generated: np.ndarray
    share: np.ndarray


def principal_components(features: np.ndarray, count: int) -> Components:
    """The `count` directions of most variance of features [M, D], most first.

    The sign of each is such that its largest entry is positive, so that a picture does not turn over from one epoch to
    the next. Where M or D is too small, or the variance 0, axes and shares are 0. ValueError unless all is finite.
    """
    features = require_features(features)
    size, dim = features.shape
    mean = features.mean(axis=0) if size else np.zeros(dim)
    centred = features - mean
    # The smaller of the two symmetric matrices: an image's patches are many or few, and both give the same components.
    gram = dim > size
    product = centred @ centred.T if gram else centred.T @ centred
    values, vectors = np.linalg.eigh(product)
    total = float(np.trace(product))
    # What is left when equal rows are centred.
    rounding = features.size * (1e-14 * float(np.abs(features).max(initial=0.0))) ** 2
    axes, share = np.zeros((count, dim)), np.zeros(count)
    for rank, index in enumerate(np.argsort(values)[::-1][:count]):
        if values[index] > max(1e-12 * total, rounding):
            axis = vectors[:, index] @ centred if gram else vectors[:, index]
            axis = axis / np.linalg.norm(axis)
            axes[rank] = axis * np.sign(axis[np.abs(axis).argmax()])
            share[rank] = values[index] / total
    return Components(mean, axes, share)


def patch_colours(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Three components of all patches together as red, green, blue: uint8 [N, g, g, 3], and their shares [3].

    patches: [N, P, D], P = g^2, row by row. Each component runs from its 1st to its 99th percentile, so that one odd
    patch does not take the contrast from the rest. ValueError where P is no square or a value is not finite.
    """
    if patches.ndim != 3:
        raise ValueError(f"patches are of shape {patches.shape}; expected [N, P, D]")
    count, number, dim = patches.shape
    side = math.isqrt(number)
    if side * side != number or not side:
        raise ValueError(f"{number} patches an image are no square grid")
    flat = patches.reshape(-1, dim)
    components = principal_components(flat, 3)
    coordinates = components.coordinates(flat)
    if not len(coordinates):
        return np.zeros((0, side, side, 3), np.uint8), components.share
    low, high = np.percentile(coordinates, (1, 99), axis=0)
    varies = components.share > 0
    span = np.where(varies & (high > low), high - low, 1.0)
    scaled = np.clip((coordinates - low) / span, 0, 1) * 255
    colours = np.where(varies, scaled.round(), _EVEN).astype(np.uint8)
    return colours.reshape(count, side, side, 3), components.share


def project_cls(real: np.ndarray, generated: np.ndarray) -> Projection:
    """Two principal components of the REAL features [N, D], standardised; generated [M, D] only fall where they fall.

    Both are standardised by the real features' mean and standard deviation. Labels play no part: a projection that
    looks for the classes would show them apart even where the features do not. Without real features all is 0.
    """
    real, generated = require_features(real), require_features(generated)
    if not len(real):
        return Projection(np.zeros((0, 2)), np.zeros((len(generated), 2)), np.zeros(2))
    mean, spread = real.mean(axis=0), real.std(axis=0)
    spread = np.where(spread > 1e-12 * np.abs(mean), spread, np.inf)  # a constant feature says nothing
    components = principal_components((real - mean) / spread, 2)
    return Projection(
        components.coordinates((real - mean) / spread),
        components.coordinates((generated - mean) / spread),
        components.share,
    )


def require_features(features: np.ndarray) -> np.ndarray:
    """As float64 [M, D]; ValueError for another shape or a value that is not finite."""
    features = np.asarray(features, dtype=float)
    if features.ndim != 2:
        raise ValueError(f"features are of shape {features.shape}; expected [M, D]")
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are not finite")
    return features


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
        found = {
            "generated_to_own": _mean_cosines(drawn, [units[label]] if len(units[label]) else []),
            "generated_to_others": _mean_cosines(drawn, others),
            "real_to_own": _leave_one_out(units[label]),
            "real_to_others": _mean_cosines(units[label], others),
        }
        numbers[code] = {name: value for name, value in found.items() if value is not None}
    return numbers


def _unit(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Centred rows of length 1; rows on the centre stay 0, so their cosine with anything is 0."""
    centred = features - centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    rounding = 1e-12 * np.linalg.norm(centre)
    return np.where(lengths > rounding, centred / np.where(lengths > 0, lengths, 1.0), 0.0)


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
