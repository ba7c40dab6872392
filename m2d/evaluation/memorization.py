"""Memorisation: are generated images nearer to training images than unseen real ones are?

A function of features and pixels; it reads no files. docs/results/gates.md tells why thumbnails are compared beside
features: at 64 px the VAE moves a copy's features further than the step to another lesion is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
import torch
from torch import Tensor

from m2d.evaluation.images import ALL_ROWS, FeatureSet, ImageSet, Unanswerable, Views, thumbnail_views
from m2d.metrics.bootstrap import Estimate
from m2d.metrics.neighbours import COPY_FLOOR, Standardizer, at_least_median, calibration_distances, nearest_in_views

EITHER = "either"  # of the two spaces
FEWEST = 10  # training images: the nearest of fewer is no rare distance


@dataclass(frozen=True)
class Share(Estimate):
    """A share of near-copies with its 95 % Wilson interval."""

    images: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Shares of near-copies by space: "features", "thumbnails" or "either"."""

    generated: dict[str, Share]
    test: dict[str, Share] | None  # what honest images show by chance; None: no unseen image to compare with
    flagged: bool  # the interval of `generated["either"]` lies wholly above that of `test["either"]`
    # Median of distance / median distance of unseen images of the same class, both in as many views; honest: about 1.
    nearness: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SpaceSummary:
    """Distances 1 - cosine, in [0, 2], to the nearest training image; medians over images, each in its best view."""

    limit: float  # up to this, an image tried as often as real images are is a near-copy; the shares count by it
    strict_limit: float  # up to this, a generated image is one in the best of its views; the lists go by it
    level: float  # share of honest images at or under the limit, and at most that at or under the strict one
    calibration_images: int  # training images whose distance to another lesion is known
    calibration_median: float
    test_median: float
    generated_median: float
    test_same_class: float  # share whose nearest training image has their class
    generated_same_class: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A generated image and its nearest training image, by the space in which it is nearest for the strict limit."""

    generated_row: int
    train_row: int
    generated_path: str
    train_path: str
    generated_class: str
    train_class: str
    view: int  # m2d.data.views of the generated image in which they meet
    found_by: str  # the space
    distances: dict[str, float]  # by space, of this pair in this view
    share_of_limit: float  # distance / strict limit in that space; at most 1: a near-copy

    @property
    def near_copy(self) -> bool:
        """Whether it is at or under the strict limit."""
        return self.share_of_limit <= 1


@dataclass(frozen=True, kw_only=True)
class MemorizationResult:
    """Plain numbers, for evaluation.json."""

    extractor: str
    quantile: float
    flagged: bool  # overall or in a class
    verdict: str
    overall: Comparison  # over the classes that unseen images have too
    classes: dict[str, Comparison]  # code -> of every class with generated images
    spaces: dict[str, SpaceSummary]
    near_copies: list[int]  # rows of generated images at or under a strict limit, for a person to look at
    worst: list[Pair]  # nearest first
    omitted: dict[str, str]  # class -> why it is left out


def measure_memorization(
    *,
    train: FeatureSet,
    test: FeatureSet,
    generated_views: Sequence[np.ndarray],
    generated: ImageSet,
    seed: int,
    quantile: float = 0.01,
    worst: int = 24,
    calibration_images: int = 4096,
) -> MemorizationResult:
    """Hold each generated image against its nearest training image of any class, in eight views and two spaces.

    generated_views: cls float32 [N, D] of the generated images in each view of m2d.data.views, by train's extractor.
    test: unseen lesions. seed: draws the calibration images where there are many. worst: pairs to list.

    A near-copy is at or under the limit in either space: the `quantile` of the distances of training images to the
    nearest one of another lesion. Unseen images, told by the same limit, show how often that is chance.

    Features of real images are known in one view, and the least of eight tries is smaller than one try. So the share
    counts a generated image in each view for an eighth, as if it were shown in a view by chance, as photographs are: an
    honest image then counts as often as an unseen one, and the share errs towards honesty. `near_copies` and `worst`
    take the best view instead, and a strict limit: the quantile / 8, for eight tries succeed at most eight times as
    often as one (union bound). Thumbnails of real images are tried in eight views as well.

    Flagged: the 95 % Wilson interval of the generated images' share lies wholly above that of the unseen images', over
    all classes or in one. Over all classes, unseen images weigh as the generated ones' mix of classes has it, for
    nevi have more doubles than other classes; their number in Wilson's formula is Kish's effective one, of lesions.
    Raises Unanswerable for fewer than 10 training images, one lesion, or no class that both test and generated have.
    """
    codes = generated.classes.codes
    lesions = np.unique(train.groups, return_inverse=True)[1]
    shared = np.intersect1d(generated.labels, test.labels).tolist()
    if len(train) < FEWEST or lesions.max() == 0:
        raise Unanswerable(
            f"memorization: train ({train.source}) has {len(train)} images of {lesions.max() + 1} lesions, too "
            f"few to tell which distance between lesions is small; give at least {FEWEST} images of two lesions"
        )
    if not shared:
        raise Unanswerable(
            f"memorization: generated has {' '.join(generated.counts)}, test has {' '.join(test.counts)}; "
            "give unseen images of a generated class"
        )
    standard = Standardizer.of(train.cls, at_least_median)
    calibrate = torch.from_numpy(lesions.astype(np.int64)), calibration_images, seed, quantile
    in_features = [_in_features(standard, views) for views in ([train.cls], [test.cls], generated_views)]
    in_thumbnails = [thumbnail_views(images) for images in (train, test, generated)]
    spaces = {"features": _Space(in_features, *calibrate), "thumbnails": _Space(in_thumbnails, *calibrate)}
    strictness = np.stack([one.generated.min(axis=1) / one.limits.any_try for one in spaces.values()], axis=1)

    # How far an image counts as a near-copy: [N] in [0, 1], the mean over its tries.
    below = {name: one.tries <= one.limits.one_try for name, one in spaces.items()}
    below[EITHER] = np.any(np.broadcast_arrays(*below.values()), axis=0)
    copies = {name: one.mean(axis=1) for name, one in below.items()}
    by_chance = {name: one.test <= one.limits.one_try for name, one in spaces.items()}
    by_chance[EITHER] = np.any(list(by_chance.values()), axis=0)

    def compare(labels: Sequence[int]) -> Comparison:
        """Of the images of these classes."""
        mine, theirs = (np.flatnonzero(np.isin(images.labels, labels)) for images in (generated, test))
        ones = np.ones(len(mine))
        shares = {name: _share(share[mine], ones, np.arange(len(mine))) for name, share in copies.items()}
        if not len(theirs):
            return Comparison(generated=shares, test=None, flagged=False, nearness={})
        wanted, had = (np.bincount(images.labels, minlength=len(codes)) for images in (generated, test))
        weights = wanted[test.labels[theirs]] / had[test.labels[theirs]]
        chance = {name: _share(copy[theirs], weights, test.groups[theirs]) for name, copy in by_chance.items()}
        nearness = {}
        for name, one in spaces.items():  # both in as many views: what real images lack, generated ones must not use
            honest = {label: max(float(np.median(one.test[test.labels == label])), 1e-12) for label in labels}
            ratios = [one.tries[generated.labels == label, 0] / honest[label] for label in labels]
            nearness[name] = float(np.median(np.concatenate(ratios)))
        flagged = shares[EITHER].low > chance[EITHER].high
        return Comparison(generated=shares, test=chance, flagged=flagged, nearness=nearness)

    def pair(row: int) -> Pair:
        """A generated image and its nearest training image."""
        place = int(strictness[row].argmin())
        name, one = list(spaces.items())[place]
        view = int(one.generated[row].argmin())
        other = int(one.generated_rows[row, view])
        return Pair(
            generated_row=row,
            train_row=other,
            generated_path=generated.paths[row],
            train_path=train.paths[other],
            generated_class=codes[generated.labels[row]],
            train_class=codes[train.labels[other]],
            view=view,
            found_by=name,
            distances={name: space.gap(row, other, view) for name, space in spaces.items()},
            share_of_limit=float(strictness[row, place]),
        )

    classes = {codes[label]: compare([label]) for label in np.unique(generated.labels).tolist()}
    overall = compare(shared)
    flagged = [code for code, one in classes.items() if one.flagged]
    omitted = {code: "no unseen image to compare with" for code, one in classes.items() if one.test is None}
    omitted |= {code: "no generated image" for code in train.counts if code not in classes}
    return MemorizationResult(
        extractor=train.extractor,
        quantile=quantile,
        flagged=overall.flagged or bool(flagged),
        verdict=_verdict(overall, flagged),
        overall=overall,
        classes=classes,
        spaces={name: one.summary(train.labels, test.labels, generated.labels) for name, one in spaces.items()},
        near_copies=np.flatnonzero(strictness.min(axis=1) <= 1).tolist(),
        worst=[pair(int(row)) for row in np.argsort(strictness.min(axis=1), kind="stable")[:worst]],
        omitted=omitted,
    )


@dataclass(frozen=True)
class Limits:
    """A distance at or under a limit is small. See measure_memorization for why there are two."""

    one_try: float  # of an image tried once
    any_try: float  # of an image tried several times, in the best of them
    level: float  # share of honest images at or under `one_try`, and at most that at or under `any_try`

    @classmethod
    def of(cls, calibration: np.ndarray, quantile: float, tries: int) -> "Limits":
        """The k-th smallest of n calibration distances: k = max(1, floor(quantile n)), or that of quantile / tries.

        A new distance of the same kind is at most the k-th smallest of n with probability k / (n + 1).
        """
        ascending, count = np.sort(calibration), len(calibration)
        once, each = (max(1, floor(quantile * count / of + 1e-9)) for of in (1, tries))
        one_try, any_try = (max(float(ascending[place - 1]), COPY_FLOOR) for place in (once, each))
        return cls(one_try, any_try, once / (count + 1))


class _Space:
    """Distances to the nearest training image in one space, float64. N generated images, V views; M unseen ones."""

    def __init__(
        self, views: Sequence[Views], lesions: Tensor, calibration_images: int, seed: int, quantile: float
    ) -> None:
        """views: of train and test, as many of both, and of generated, at least these. lesions: of train, int64."""
        train, test, generated = views
        self._train, self._generated = train, generated
        bank = train[0](ALL_ROWS)
        self.calibration = calibration_distances(
            lambda rows: (view(rows) for view in train), bank, lesions, most=calibration_images, seed=seed
        )
        in_views, rows = (part.numpy() for part in nearest_in_views((view(ALL_ROWS) for view in test), bank))
        self.test = in_views.min(axis=1)  # [M], in the best view
        self.test_rows = rows[np.arange(len(rows)), in_views.argmin(axis=1)]
        self.generated, self.generated_rows = (  # [N, V]
            part.numpy() for part in nearest_in_views((view(ALL_ROWS) for view in generated), bank)
        )
        # [N, tries]; each the least of as many views as a real image has.
        self.tries = self.generated.reshape(len(self.generated), -1, len(test)).min(axis=2)
        self.limits = Limits.of(self.calibration, quantile, self.tries.shape[1])

    def gap(self, row: int, train_row: int, view: int) -> float:
        """Distance of a generated image in that view to a training image as it is."""
        one, other = (
            of(np.array([place])) for of, place in ((self._generated[view], row), (self._train[0], train_row))
        )
        return float((one.double() - other.double()).square().sum()) / 2

    def summary(self, train: np.ndarray, test: np.ndarray, generated: np.ndarray) -> SpaceSummary:
        """train, test, generated: labels."""
        rows = self.generated_rows[np.arange(len(generated)), self.generated.argmin(axis=1)]
        return SpaceSummary(
            limit=self.limits.one_try,
            strict_limit=self.limits.any_try,
            level=self.limits.level,
            calibration_images=len(self.calibration),
            calibration_median=float(np.median(self.calibration)),
            test_median=float(np.median(self.test)),
            generated_median=float(np.median(self.generated.min(axis=1))),
            test_same_class=float(np.mean(train[self.test_rows] == test)),
            generated_same_class=float(np.mean(train[rows] == generated)),
        )


def _in_features(standard: Standardizer, views: Sequence[np.ndarray]) -> Views:
    """Standardised by the training images, as the gates do: docs/results/gates.md measures it."""
    return [lambda rows, cls=cls: standard.unit(cls[rows]) for cls in views]  # type: ignore[misc]


def _share(near_copies: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> Share:
    """near_copies: [N] in [0, 1]. groups: [N]; equal values count as one trial, however many images they have.

    A mean over tries varies less than one try, so Wilson's interval for trials that are 0 or 1 is wide enough.
    """
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=weights)
    effective = float(by_group.sum() ** 2 / np.square(by_group).sum())  # Kish, "Survey Sampling", 1965, section 11.7
    share = Estimate.of_share(float(weights @ near_copies / weights.sum()), effective)
    return Share(**vars(share), images=len(near_copies))


def _verdict(overall: Comparison, flagged: Sequence[str]) -> str:
    """One sentence."""
    mine, chance = (part.percent for part in (overall.generated[EITHER], (overall.test or {})[EITHER]))
    found = "memorisation found" if overall.flagged else "no memorisation shown"
    if flagged and not overall.flagged:
        found += f" overall, found in {' '.join(flagged)}"
    return f"{found}: {mine} of generated images are near-copies of training images, {chance} of unseen lesions' are"
