"""Memorisation: do generated images lie nearer to training images than unseen real ones do?

The report calls it on features and pixels that are already there; it reads no files. docs/results/gates.md tells why
thumbnails stand beside features: at 64 px the VAE moves a copy's features further than the step to another lesion is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from m2d.classes import CLASSES
from m2d.errors import DataError
from m2d.evaluation.images import FeatureSet, ImageSet, shared_classes
from m2d.evaluation.memorization_distances import (
    VIEWS,
    Distances,
    Limits,
    Space,
    feature_space,
    measure_distances,
    thumbnail_space,
)
from m2d.evaluation.memorization_result import Comparison, MemorizationResult, Pair, Share, SpaceSummary

EITHER = "either"  # of the two spaces
FEWEST = 10  # training images: the nearest of fewer is no rare distance
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def measure_memorization(
    *,
    train: FeatureSet,
    test: FeatureSet,
    generated_views: Sequence[np.ndarray],
    generated: ImageSet,
    seed: int,
    quantile: float = 0.01,
    worst: int = 24,
) -> MemorizationResult:
    """Hold each generated image against its nearest training image of any class, in eight views and two spaces.

    generated_views: cls float32 [N, D] of the generated images in each view of m2d.data.views, by train's extractor.
    test: unseen lesions. seed: draws the calibration images where there are many. worst: pairs to list.

    Calibration: n distances of training images to the nearest one of another lesion, their `quantile` is the limit. A
    near-copy is an image at or under it in either space. Unseen images, told by the same limit, show how often that is
    chance.

    Views: thumbnails of real and of generated images are all tried in eight. Features of real images are known in one
    view, and the least of eight tries is smaller than one try. So the share counts each generated image in each view
    for an eighth, as if it were shown in a view by chance, as real photographs are: an honest image then counts as
    often as an unseen one. A copy by features alone may count for an eighth only, so the share errs towards honesty.
    `near_copies` and `worst` take the best view instead, and a strict limit: the quantile / 8 of the calibration
    distances, for eight tries succeed at most eight times as often as one (union bound).

    Flagged: the 95 % Wilson interval of the generated images' share lies wholly above that of the unseen images', over
    all classes or in one. Over all classes, unseen images weigh as the generated ones' mix of classes has it, for
    nevi have more doubles than other classes; their number in Wilson's formula is Kish's effective one, of lesions.
    Raises DataError for no images, one lesion, fewer than 10 training images, features that are not finite, a lesion
    both in train and test, or no class that both test and generated have.
    """
    _require_usable(train, test, generated_views, generated)
    spaces = [feature_space(train, test, generated_views), thumbnail_space(train.images, test.images, generated)]
    distances = {space.name: measure_distances(space, train.groups, seed) for space in spaces}
    tries = {name: found.tries.shape[1] for name, found in distances.items()}
    limits = {name: Limits.of(found.calibration, quantile, tries[name]) for name, found in distances.items()}
    copies = _Copies.of(distances, limits)
    classes = {CLASSES[label]: _compare([label], generated, test, distances, copies) for label in _labels(generated)}
    overall = _compare(shared_classes([generated, test]), generated, test, distances, copies)
    flagged = [code for code, found in classes.items() if found.flagged]
    omitted = {code: "no unseen image to compare with" for code, found in classes.items() if found.test is None}
    omitted |= {code: "no generated image" for code in train.images.counts if code not in classes}
    return MemorizationResult(
        extractor=train.extractor,
        quantile=quantile,
        flagged=overall.flagged or bool(flagged),
        verdict=_verdict(overall, flagged),
        overall=overall,
        classes=classes,
        spaces={
            name: _summary(found, limits[name], train.labels, test.labels, generated.labels)
            for name, found in distances.items()
        },
        near_copies=np.flatnonzero(_strictness(distances, limits).min(axis=1) <= 1).tolist(),
        worst=_worst_pairs(spaces, distances, limits, train.images, generated, worst),
        omitted=omitted,
    )


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials, not necessarily a whole number (Wilson 1927)."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class _Copies:
    """How far an image counts as a near-copy, by space and in either: [N] in [0, 1], the mean over its tries."""

    generated: dict[str, np.ndarray]
    test: dict[str, np.ndarray]

    @classmethod
    def of(cls, distances: Mapping[str, Distances], limits: Mapping[str, Limits]) -> "_Copies":
        tries = {name: found.tries <= limits[name].one_try for name, found in distances.items()}
        test = {name: found.test.distance <= limits[name].one_try for name, found in distances.items()}
        tries[EITHER] = np.any(np.broadcast_arrays(*tries.values()), axis=0)
        test[EITHER] = np.any(list(test.values()), axis=0)
        return cls({name: below.mean(axis=1) for name, below in tries.items()}, test)


def _compare(
    labels: Sequence[int], generated: ImageSet, test: FeatureSet, distances: Mapping[str, Distances], copies: _Copies
) -> Comparison:
    """Of the images of these classes."""
    mine, theirs = (np.flatnonzero(np.isin(images.labels, labels)) for images in (generated, test))
    shares = {
        name: _share(below[mine], np.ones(len(mine)), np.arange(len(mine))) for name, below in copies.generated.items()
    }
    if not len(theirs):
        return Comparison(generated=shares, test=None, flagged=False, nearness={})
    wanted, had = (np.bincount(images.labels, minlength=len(CLASSES)) for images in (generated, test))
    weights = wanted[test.labels[theirs]] / had[test.labels[theirs]]
    chance = {name: _share(below[theirs], weights, test.groups[theirs]) for name, below in copies.test.items()}
    return Comparison(
        generated=shares,
        test=chance,
        flagged=shares[EITHER].low > chance[EITHER].high,
        nearness={name: _nearness(found, generated.labels, test.labels, labels) for name, found in distances.items()},
    )


def _share(near_copies: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> Share:
    """near_copies: [N] in [0, 1]. groups: [N]; equal values count as one trial, however many images they have.

    A mean over tries varies less than one try, so Wilson's interval for trials that are 0 or 1 is wide enough.
    """
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=weights)
    effective = float(by_group.sum() ** 2 / np.square(by_group).sum())  # Kish, "Survey Sampling", 1965, section 11.7
    value = float(weights @ near_copies / weights.sum())
    low, high = wilson_interval(value, effective)
    return Share(value=value, low=low, high=high, images=len(near_copies))


def _nearness(found: Distances, generated: np.ndarray, test: np.ndarray, labels: Sequence[int]) -> float:
    """Both in as many views: what real images lack, generated ones must not use."""
    own = found.tries[:, 0]
    honest = {label: float(np.median(found.test.distance[test == label])) for label in labels}
    ratios = [own[generated == label] / max(honest[label], 1e-12) for label in labels]
    return float(np.median(np.concatenate(ratios)))


def _summary(
    found: Distances, limits: Limits, train: np.ndarray, test: np.ndarray, generated: np.ndarray
) -> SpaceSummary:
    """train, test, generated: labels."""
    return SpaceSummary(
        limit=limits.one_try,
        strict_limit=limits.any_try,
        level=limits.level,
        calibration_images=len(found.calibration),
        calibration_median=float(np.median(found.calibration)),
        test_median=float(np.median(found.test.distance)),
        generated_median=float(np.median(found.generated.distance)),
        test_same_class=float(np.mean(train[found.test.row] == test)),
        generated_same_class=float(np.mean(train[found.generated.row] == generated)),
    )


def _worst_pairs(
    spaces: Sequence[Space],
    distances: Mapping[str, Distances],
    limits: Mapping[str, Limits],
    train: ImageSet,
    generated: ImageSet,
    count: int,
) -> list[Pair]:
    """One pair for each generated image at most."""
    names, ratios, pairs = list(distances), _strictness(distances, limits), []
    for row in np.argsort(ratios.min(axis=1), kind="stable")[:count].tolist():
        best = int(ratios[row].argmin())
        found = distances[names[best]].generated
        other, view = int(found.row[row]), int(found.view[row])
        pairs.append(
            Pair(
                generated_row=row,
                train_row=other,
                generated_path=generated.paths[row],
                train_path=train.paths[other],
                generated_class=CLASSES[generated.labels[row]],
                train_class=CLASSES[train.labels[other]],
                view=view,
                found_by=names[best],
                distances={space.name: space.gap(row, other, view) for space in spaces},
                share_of_limit=float(ratios[row, best]),
            )
        )
    return pairs


def _strictness(distances: Mapping[str, Distances], limits: Mapping[str, Limits]) -> np.ndarray:
    """Distance / strict limit of each generated image in each space, float64 [N, spaces]."""
    return np.stack([found.generated.distance / limits[name].any_try for name, found in distances.items()], axis=1)


def _verdict(overall: Comparison, flagged: Sequence[str]) -> str:
    """One sentence."""
    assert overall.test is not None, "_require_usable has seen to a shared class"
    mine, chance = (
        f"{100 * part.value:.1f} % ({100 * part.low:.1f} to {100 * part.high:.1f})"
        for part in (overall.generated[EITHER], overall.test[EITHER])
    )
    found = "memorisation found" if overall.flagged else "no memorisation shown"
    if flagged:
        found = f"{found} overall, found in {' '.join(flagged)}" if not overall.flagged else found
    return f"{found}: {mine} of generated images are near-copies of training images, {chance} of unseen lesions' are"


def _labels(images: ImageSet) -> list[int]:
    labels: list[int] = np.unique(images.labels).tolist()
    return labels


def _require_usable(
    train: FeatureSet, test: FeatureSet, generated_views: Sequence[np.ndarray], generated: ImageSet
) -> None:
    shape = (len(generated), train.cls.shape[1])
    if len(generated_views) != VIEWS or any(view.shape != shape for view in generated_views):
        raise ValueError(f"generated_views must be {VIEWS} arrays of shape {shape}")
    if train.extractor != test.extractor or test.cls.shape[1] != shape[1]:
        raise ValueError(f"features of {train.extractor} beside those of {test.extractor}")
    for name, images in (("train", train.images), ("test", test.images), ("generated", generated)):
        if not len(images):
            raise DataError(f"memorization: {name} ({images.source}) has no images; give a folder with some")
    for name, cls in (("train", train.cls), ("test", test.cls), *(("generated", view) for view in generated_views)):
        if not np.isfinite(cls).all():
            raise DataError(f"memorization: features of {name} hold NaN or infinite values; compute them anew")
    if len(np.unique(train.groups)) < 2:
        raise DataError(
            f"memorization: all {len(train)} images of train ({train.images.source}) are of one lesion, so no distance "
            "between lesions is known; give at least two lesions"
        )
    if len(train) < FEWEST:
        raise DataError(
            f"memorization: train ({train.images.source}) has {len(train)} images, too few to tell which distance is "
            f"small; give at least {FEWEST}"
        )
    both = set(train.groups.tolist()) & set(test.groups.tolist())
    if both:
        raise DataError(
            f"memorization: {len(both)} lesions are both in train and in test, such as {min(map(str, both))}; "
            "split by lesion"
        )
    if not shared_classes([generated, test]):
        raise DataError(
            f"memorization: generated has {' '.join(generated.counts)}, test has {' '.join(test.images.counts)}; "
            "give unseen images of a generated class"
        )
