"""95 % intervals of a classifier's scores: Wilson's for a share, a bootstrap over test lesions for all else."""

from dataclasses import dataclass
from math import sqrt
from typing import Self

import numpy as np

Z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, drawn: np.ndarray, level: float = 95) -> Self:
        """A score with the percentile interval of its resamples, [1 + R]. level: of the interval, in percent."""
        tail = (100 - level) / 2
        low, high = np.percentile(drawn[1:], [tail, 100 - tail])
        return cls(float(drawn[0]), float(low), float(high))

    @classmethod
    def of_share(cls, share: float, trials: float) -> Self:
        """A share of `trials`, not necessarily a whole number, with its score interval (Wilson, JASA 22, 1927)."""
        spread = Z**2 / trials
        centre = (share + spread / 2) / (1 + spread)
        half = Z * sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
        return cls(share, max(0.0, centre - half), min(1.0, centre + half))

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

    @property
    def percent(self) -> str:
        """Of a share: `1.2 % (0.3 to 2.7)`."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resampled_weights(truth: np.ndarray, lesions: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """How often each of N test images is in the test set, once, and then in each bootstrap sample: int32 [1 + R, N].

    truth: int64 [N], classes. lesions: [N], equal values are one lesion.
    Whole lesions are drawn with replacement, for their photographs succeed or fail together (a cluster bootstrap:
    Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8); within each class, as many as it
    has, so that a rare class never vanishes. The classifier stays as it is: another training set is not in it.
    """
    generator = np.random.default_rng(seed)
    weights = np.ones((1 + resamples, len(truth)), dtype=np.int32)
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        names, lesion = np.unique(lesions[rows], return_inverse=True)
        # How often each lesion was drawn is all that matters; the multinomial draws just that.
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        weights[1:, rows] = drawn[:, lesion]
    return weights


def resampled_confusions(
    truth: np.ndarray, predicted: np.ndarray, lesions: np.ndarray, *, num_classes: int, resamples: int, seed: int
) -> np.ndarray:
    """Confusion matrices int64 [1 + R, K, K] of the test set and the bootstrap samples of `resampled_weights`.

    truth, predicted: int64 [N], classes 0 .. K - 1.
    """
    cells = truth * num_classes + predicted
    drawn = resampled_weights(truth, lesions, resamples=resamples, seed=seed)
    counts = np.stack([np.bincount(cells, row, minlength=num_classes**2) for row in drawn])
    return counts.astype(np.int64).reshape(-1, num_classes, num_classes)


def resampled_seeds(seeds: int, *, resamples: int, seed: int) -> np.ndarray:
    """Which of the training seeds each bootstrap sample averages over, int64 [resamples, max(seeds - 1, 1)].

    Drawn with replacement, one fewer than there are: their mean varies as much as the mean of all seeds truly does,
    whereas that of as many draws would vary too little by (seeds - 1) / seeds (Rao and Wu, "Resampling inference with
    complex survey data", JASA 1988, section 2).
    """
    generator = np.random.default_rng([seed, seeds])
    return generator.integers(seeds, size=(resamples, max(seeds - 1, 1)))
