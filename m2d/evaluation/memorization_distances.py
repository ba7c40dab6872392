"""Distances of images to their nearest training image, in feature space and between thumbnails; which ones are small.

memorization.py calls it. Knows no classes, no shares and no report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
import torch
from torch import Tensor

from m2d.data.views import apply_view
from m2d.evaluation.images import FeatureSet, ImageSet
from m2d.generation.gate_reference import ImageFacts, unit_thumbnails
from m2d.generation.neighbours import nearest, unit_rows

VIEWS = 8  # flips and quarter turns
FEATURES, THUMBNAILS = "features", "thumbnails"
_COPY_FLOOR = 1e-4  # of every limit, so that an exact copy is one also where training images repeat
_CALIBRATION_IMAGES = 4096  # drawn by the seed where there are more
_IMAGES_AT_ONCE = 256

Rows = slice | np.ndarray
_ALL = slice(None)


@dataclass(frozen=True)
class Views:
    """Images as unit vectors: vectors(view, rows) is float32 [len(rows), D]. Views 0 to count - 1 are known."""

    vectors: Callable[[int, Rows], Tensor]
    count: int


@dataclass(frozen=True)
class Space:
    """The three sets of images in one space. train and test are known in as many views, generated in at least these."""

    name: str
    train: Views
    test: Views
    generated: Views

    def gap(self, row: int, train_row: int, view: int) -> float:
        """Distance of a generated image in that view to a training image as it is."""
        one = self.generated.vectors(view, np.array([row])).double()
        other = self.train.vectors(0, np.array([train_row])).double()
        return float((one - other).square().sum()) / 2


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of B images, by view in which the image is tried. Distance: see neighbours."""

    by_view: np.ndarray  # float64 [B, V]
    rows: np.ndarray  # int64 [B, V]

    @property
    def distance(self) -> np.ndarray:
        """float64 [B], in the best view."""
        least: np.ndarray = self.by_view.min(axis=1)
        return least

    @property
    def view(self) -> np.ndarray:
        """int64 [B]; the first of equally good ones."""
        best: np.ndarray = self.by_view.argmin(axis=1)
        return best

    @property
    def row(self) -> np.ndarray:
        """int64 [B], of the training image in the best view."""
        found: np.ndarray = np.take_along_axis(self.rows, self.view[:, None], axis=1)[:, 0]
        return found


@dataclass(frozen=True)
class Distances:
    """What was measured in a space."""

    calibration: np.ndarray  # float64 [n]; of training images to the nearest of another lesion
    test: Nearest
    generated: Nearest

    @property
    def tries(self) -> np.ndarray:
        """float64 [N, T]: distances of the generated images, each the least of as many views as a real image has."""
        count, views = self.test.by_view.shape[1], self.generated.by_view.shape[1]
        least: np.ndarray = self.generated.by_view.reshape(-1, views // count, count).min(axis=2)
        return least


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
        ascending = np.sort(calibration)
        count = len(ascending)
        once, each = (max(1, floor(quantile * count / of + 1e-9)) for of in (1, tries))
        one_try, any_try = (max(float(ascending[place - 1]), _COPY_FLOOR) for place in (once, each))
        return cls(one_try, any_try, once / (count + 1))


def feature_space(train: FeatureSet, test: FeatureSet, generated_views: Sequence[np.ndarray]) -> Space:
    """Real images as they are, generated ones in eight views; standardised by train's mean and deviation.

    The deviation is at least the median one of all features, as the gates have it: docs/results/gates.md measures both.
    """
    mean, deviation = train.cls.mean(axis=0, dtype=np.float64), train.cls.std(axis=0, dtype=np.float64)
    scale = np.maximum(deviation, max(float(np.median(deviation)), 1e-6))

    def standardised(*views: np.ndarray) -> Views:
        return Views(
            lambda view, rows: unit_rows(torch.from_numpy(((views[view][rows] - mean) / scale).astype(np.float32))),
            len(views),
        )

    return Space(FEATURES, standardised(train.cls), standardised(test.cls), standardised(*generated_views))


def thumbnail_space(train: ImageSet, test: ImageSet, generated: ImageSet) -> Space:
    """8 x 8 thumbnails less their mean. All images in eight views, for a turned image has the turned thumbnail."""

    def turned(images: ImageSet) -> Views:
        thumbnails = _thumbnails(images)
        return Views(
            lambda view, rows: unit_thumbnails(np.stack([apply_view(one, view) for one in thumbnails[rows]])), VIEWS
        )

    return Space(THUMBNAILS, turned(train), turned(test), turned(generated))


def measure_distances(space: Space, lesions: np.ndarray, seed: int) -> Distances:
    """lesions: [n] of the training images; two images of one are never held against each other."""
    numbers = torch.from_numpy(np.unique(lesions, return_inverse=True)[1].astype(np.int64))
    drawn = np.arange(len(lesions))
    if len(drawn) > _CALIBRATION_IMAGES:
        drawn = np.sort(np.random.default_rng(seed).choice(drawn, _CALIBRATION_IMAGES, replace=False))
    bank = space.train.vectors(0, _ALL)
    return Distances(
        calibration=_nearest(space.train, bank, drawn, (numbers[drawn], numbers)).distance,
        test=_nearest(space.test, bank, _ALL),
        generated=_nearest(space.generated, bank, _ALL),
    )


def _nearest(images: Views, bank: Tensor, rows: Rows, lesions: tuple[Tensor, Tensor] | None = None) -> Nearest:
    """lesions: of the images and of the bank; pairs of one lesion do not count."""
    mine, theirs = lesions or (None, None)
    found = [
        nearest(images.vectors(view, rows), bank, query_groups=mine, bank_groups=theirs) for view in range(images.count)
    ]
    distances, places = (torch.cat(part, dim=1).numpy() for part in zip(*found, strict=True))
    return Nearest(distances, places)


def _thumbnails(images: ImageSet) -> np.ndarray:
    """float32 [N, 8, 8, 3]; few images at once, for the pixels may lie in a file."""
    parts = range(0, len(images), _IMAGES_AT_ONCE)
    return np.concatenate([ImageFacts.of(images.pixels[one : one + _IMAGES_AT_ONCE]).thumbnails for one in parts])
