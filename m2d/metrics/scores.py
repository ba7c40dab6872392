"""Scores of a classifier: from confusion matrices, or from class probabilities under a thousand resamples at once.

A resample is a weight for each test image: how often its lesion was drawn. Confusion matrices: rows true, columns
predicted classes.
"""

from dataclasses import dataclass

import numpy as np

from m2d.classes import ISIC7, ClassSet

BINS = 15  # of the calibration error
MELANOMA = "MEL"  # a score of its own, in every set that has it
LOWER_IS_BETTER = ("expected_calibration_error",)
_CELLS_AT_ONCE = 4_000_000  # weights of some resamples in float64: 32 MB


@dataclass(frozen=True)
class Scores:
    """Each in [0, 1]. R is empty for one confusion matrix, [resamples] for many; C counts the true classes."""

    accuracy: np.ndarray  # [R...]
    balanced_accuracy: np.ndarray  # [R...], the mean recall
    macro_f1: np.ndarray  # [R...]
    recall: np.ndarray  # [R..., C]


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [K, K]; entry (i, j) counts images of class i called j. truth, predicted: int64 [N], classes 0 .. K - 1."""
    counts = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> Scores:
    """Scores over the classes that have images: a class without any has no recall, and is left out of every mean.

    confusion: [R..., K, K] (see confusion_matrix), of the same classes with images in every resample. A prediction of a
    class without images counts against the true one, as in scikit-learn's f1_score(labels=those with, average="macro").
    """
    of_class = confusion.sum(axis=-1)  # [R..., K]
    present = np.flatnonzero(of_class.reshape(-1, of_class.shape[-1]).min(axis=0))
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    called = confusion.sum(axis=-2)
    recall = hits[..., present] / of_class[..., present]
    # 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall; the divisor holds the class's images, so > 0.
    f1 = 2 * hits[..., present] / (of_class + called)[..., present]
    return Scores(
        accuracy=hits.sum(axis=-1) / of_class.sum(axis=-1),
        balanced_accuracy=recall.mean(axis=-1),
        macro_f1=f1.mean(axis=-1),
        recall=recall,
    )


def weighted_scores(
    probabilities: np.ndarray,
    truth: np.ndarray,
    weights: np.ndarray,
    classes: ClassSet = ISIC7,
    decided: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Name to values float64 [R]: a score of each of R weightings of the same test images.

    probabilities: [N, K], K the number of `classes`. decided: [N, K], by which images are called in their place; None:
    by them too. truth: int64 [N]. weights: [R, N], at least 0; every class of `truth` has some in every row, as a
    stratified bootstrap leaves it. Means are over the classes of `truth`:

    balanced_accuracy, macro_f1: of the most probable class. recall_<code>: each class's. macro_auprc: mean average
    precision, one class against the rest; melanoma_auprc: melanoma's, where `classes` and `truth` have it.
    expected_calibration_error: see `calibration_error`.
    """
    if len(some := _parts(weights)) > 1:
        parts = [weighted_scores(probabilities, truth, one, classes, decided) for one in some]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    weights = weights.astype(np.float64, order="F")
    present, size = np.unique(truth), len(classes)
    cell = truth * size + (probabilities if decided is None else decided).argmax(axis=1)  # of the confusion matrix
    called = scores((weights @ np.eye(size**2)[cell]).reshape(-1, size, size))
    areas = {classes.codes[k]: average_precision(probabilities[:, k], truth == k, weights) for k in present}
    return {
        "balanced_accuracy": called.balanced_accuracy,
        "macro_f1": called.macro_f1,
        "macro_auprc": np.mean(list(areas.values()), axis=0),
        **({"melanoma_auprc": areas[MELANOMA]} if MELANOMA in areas else {}),
        "expected_calibration_error": calibration_error(probabilities, truth, weights),
        **{f"recall_{classes.codes[k]}": recall for k, recall in zip(present, called.recall.T)},
    }


def average_precision(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve as sum over thresholds of (R_n - R_n-1) P_n, float64 [R].

    score: [N], higher means more likely positive; equal scores pass a threshold together. positive: bool [N].
    weights: float64 [R, N]. Equals scikit-learn's average_precision_score(sample_weight=...) of each row.
    """
    hits, alarms = _above_thresholds(score, positive, weights)
    called = hits + alarms
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    gained = np.diff(hits, axis=0, prepend=0)
    return np.asarray((gained * precision).sum(axis=0) / hits[-1])


def told_apart(score: np.ndarray, positive: np.ndarray, weights: np.ndarray, level: float) -> tuple[np.ndarray, ...]:
    """Area under the ROC curve, and the share of positives called at a false alarm rate of `level`: float64 [R] each.

    score: [N], higher means more likely positive; equal scores pass a threshold together. positive: bool [N].
    weights: float64 [R, N]. The area equals scikit-learn's roc_auc_score(sample_weight=...) of each row. The threshold
    is the k-th highest negative, k = floor(level (n + 1)), and what lies above it is called: a new negative then is
    with a probability of k / (n + 1) at most. Fewer than 1 / level - 1 negatives have no such threshold: nan.
    """
    if len(some := _parts(weights)) > 1:
        return tuple(map(np.concatenate, zip(*(told_apart(score, positive, one, level) for one in some), strict=True)))
    hits, alarms = (np.pad(one, ((1, 0), (0, 0))) for one in _above_thresholds(score, positive, weights))
    area = (np.diff(alarms, axis=0) * (hits[1:] + hits[:-1]) / 2).sum(axis=0) / (hits[-1] * alarms[-1])
    allowed = np.floor(level * (alarms[-1] + 1) + 1e-9) - 1
    called = np.where(alarms <= allowed, hits, 0).max(axis=0) / hits[-1]
    return np.asarray(area), np.where(allowed < 0, np.nan, called)


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error float64 [R]: sum over bins of share |accuracy - confidence|.

    15 equal-width bins of the top probability (Guo et al., arXiv 1706.04599, eq. 3); the last one holds 1 too, which
    torchmetrics gives a bin of its own; otherwise this is its MulticlassCalibrationError(n_bins=15, norm="l1").
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    in_bin = np.eye(BINS)[np.searchsorted(edges, confidence, side="right")]  # [N, BINS]
    gaps = weights @ (in_bin * (right - confidence)[:, None])
    return np.asarray(np.abs(gaps).sum(axis=1) / weights.sum(axis=1))


def _parts(weights: np.ndarray) -> list[np.ndarray]:
    """Rows of weights [R, N] by as many as fit the memory at once."""
    step = max(1, _CELLS_AT_ONCE // weights.shape[1])
    return [weights[first : first + step] for first in range(0, len(weights), step)]


def _above_thresholds(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Weight of the positives and of the others that pass each threshold, [T, R] each; equal scores pass together."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    ordered = weights.T[order]  # [N, R]: rows are moved whole
    return [np.cumsum(ordered * side[order][:, None], axis=0)[last] for side in (positive, ~positive)]
