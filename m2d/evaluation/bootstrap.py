"""Bootstrap intervals of a classifier's scores over test lesions. Knows nothing of images, features or files."""

import numpy as np

_CELLS_AT_ONCE = 20_000_000  # resampled lesion counts in memory: 160 MB


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
    generator = np.random.default_rng(seed)
    confusions = np.zeros((resamples, num_classes, num_classes), dtype=np.int64)
    for label in np.unique(truth):
        of_class = truth == label
        _, lesion = np.unique(lesions[of_class], return_inverse=True)
        count = int(lesion.max()) + 1
        calls = np.zeros((count, num_classes), dtype=np.int64)  # of each lesion's images
        np.add.at(calls, (lesion, predicted[of_class]), 1)
        # How often each lesion was drawn is all that matters; the multinomial draws just that.
        step = max(1, _CELLS_AT_ONCE // count)
        for first in range(0, resamples, step):
            size = min(step, resamples - first)
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
            confusions[first : first + size, label] = drawn @ calls
    return confusions


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a score over its resamples [R]."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
