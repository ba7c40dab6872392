"""Bootstrap intervals of a classifier's scores over test lesions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CELLS_AT_ONCE = 20_000_000  # resampled lesion counts in memory: 160 MB


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float | np.ndarray, resampled: np.ndarray) -> "Estimate":
        """A score with the percentile interval of its resamples [R]."""
        low, high = np.percentile(resampled, [2.5, 97.5])
        return cls(float(value), float(low), float(high))

    @property
    def above(self) -> bool:
        """The interval lies above 0."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """The interval lies below 0."""
        return self.high < 0

    @property
    def signed(self) -> str:
        """`+0.012 [-0.003, +0.027]`."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resampled_confusions(
    truth: np.ndarray, predicted: np.ndarray, lesions: np.ndarray, *, num_classes: int, resamples: int, seed: int
) -> np.ndarray:
    """Confusion matrices int64 [resamples, K, K] of bootstrap samples of the test set.

    truth, predicted: int64 [N], classes 0 .. K - 1. lesions: [N], equal values are one lesion.
    Drawn with replacement are whole lesions, for the photographs of one lesion succeed or fail together: drawing images
    would count them as independent and give too narrow an interval (a cluster bootstrap: Davison and Hinkley,
    "Bootstrap Methods and their Application", 1997, section 3.8). They are drawn within each class, as many as it
    has, so that a rare class never vanishes from a resample: the interval is one for test sets with this mix of
    classes. The classifier stays as it is, so what another training set would change is not in the interval.
    """
    confusions = np.zeros((resamples, num_classes, num_classes), dtype=np.int64)
    for part, rows, lesion, drawn in _draws(truth, lesions, resamples, seed):
        calls = np.zeros((drawn.shape[1], num_classes), dtype=np.int64)  # of each lesion's images
        np.add.at(calls, (lesion, predicted[rows]), 1)
        confusions[part, truth[rows[0]]] = drawn @ calls
    return confusions


def resampled_weights(truth: np.ndarray, lesions: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """How often each test image is in each bootstrap sample, int32 [resamples, N], for scores of probabilities.

    The same draws as resampled_confusions: whole lesions with replacement, as many of each class as it has.
    """
    weights = np.zeros((resamples, len(truth)), dtype=np.int32)
    for part, rows, lesion, drawn in _draws(truth, lesions, resamples, seed):
        weights[part, rows] = drawn[:, lesion]
    return weights


def _draws(
    truth: np.ndarray, lesions: np.ndarray, resamples: int, seed: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Some resamples of one class: which, its rows [n], their lesions [n], how often each lesion is drawn [R, L]."""
    generator = np.random.default_rng(seed)
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        _, lesion = np.unique(lesions[rows], return_inverse=True)
        count = int(lesion.max()) + 1
        # How often each lesion was drawn is all that matters; the multinomial draws just that.
        step = max(1, _CELLS_AT_ONCE // count)
        for first in range(0, resamples, step):
            size = min(step, resamples - first)
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
            yield slice(first, first + size), rows, lesion, drawn


def resampled_seeds(seeds: int, *, resamples: int, seed: int) -> np.ndarray:
    """Which of the training seeds each bootstrap sample averages over, int64 [resamples, max(seeds - 1, 1)].

    Drawn with replacement, one fewer than there are: the mean of seeds - 1 draws varies as much as the mean of all
    seeds truly does, whereas seeds draws would vary too little by (seeds - 1) / seeds, a third less for three seeds
    (Rao and Wu, "Resampling inference with complex survey data", JASA 1988, section 2).
    """
    generator = np.random.default_rng([seed, seeds])
    return generator.integers(seeds, size=(resamples, max(seeds - 1, 1)))
