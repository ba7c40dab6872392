"""Scores of class probabilities, for the test set as it is and for a thousand resamples of its lesions at once.

A resample is a weight for each test image: how often its lesion was drawn. Knows nothing of classifiers or arms.
"""

from collections.abc import Sequence

import numpy as np

from m2d.classes import CLASSES, class_index
from m2d.evaluation.classification_scores import scores

BINS = 15  # of the calibration error
MELANOMA = class_index("MEL")
LOWER_IS_BETTER = ("expected_calibration_error",)
_CELLS_AT_ONCE = 4_000_000  # weights of some resamples in float64: 32 MB


def weighted_scores(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Name to values float64 [R]: a score of each of R weightings of the same test images.

    probabilities: [N, K], K the classes of m2d.classes. truth: int64 [N]. weights: [R, N], at least 0; every class of
    `truth` has some in every row, as a stratified bootstrap leaves it. Means are over the classes of `truth`:

    balanced_accuracy, macro_f1: of the most probable class. recall_<code>: each class's. macro_auprc: mean average
    precision, one class against the rest; melanoma_auprc: melanoma's, where `truth` has any.
    expected_calibration_error: see `calibration_error`.
    """
    step = max(1, _CELLS_AT_ONCE // len(truth))
    parts = [
        _scores_of(probabilities, truth, weights[first : first + step].astype(np.float64, order="F"))
        for first in range(0, len(weights), step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def score_names(present: Sequence[int]) -> list[str]:
    """The names that weighted_scores gives for test images of these classes, in its order."""
    names = ["balanced_accuracy", "macro_f1", "macro_auprc"]
    names += ["melanoma_auprc"] if MELANOMA in present else []
    return [*names, "expected_calibration_error", *(f"recall_{CLASSES[k]}" for k in sorted(present))]


def average_precision(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve as sum over thresholds of (R_n - R_n-1) P_n, float64 [R].

    score: [N], higher means more likely positive; equal scores pass a threshold together. positive: bool [N].
    weights: float64 [R, N]. Equals scikit-learn's average_precision_score(sample_weight=...) of each row.
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    ordered = weights.T[order]  # [N, R]: rows are moved whole
    called = np.cumsum(ordered, axis=0)[last]
    ordered[~positive[order]] = 0
    hits = np.cumsum(ordered, axis=0)[last]
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    gained = np.diff(hits, axis=0, prepend=0)
    area: np.ndarray = (gained * precision).sum(axis=0) / hits[-1]
    return area


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error float64 [R]: sum over bins of share |accuracy - confidence|.

    15 equal-width bins of the top probability (Guo et al., arXiv 1706.04599, eq. 3). A bin holds its lower edge, the
    last one also its upper. torchmetrics gives a probability of exactly 1 a bin of its own; otherwise this is its
    MulticlassCalibrationError(n_bins=15, norm="l1").
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    in_bin = np.eye(BINS)[np.searchsorted(edges, confidence, side="right")]  # [N, BINS]
    gaps = weights @ (in_bin * (right - confidence)[:, None])
    error: np.ndarray = np.abs(gaps).sum(axis=1) / weights.sum(axis=1)
    return error


def _scores_of(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """weighted_scores of a few weightings, float64 [R, N]."""
    present = np.unique(truth)
    classes = probabilities.shape[1]
    cell = truth * classes + probabilities.argmax(axis=1)  # of the confusion matrix
    confusion = (weights @ np.eye(classes**2)[cell]).reshape(-1, classes, classes)
    called = scores(confusion)
    areas = {int(k): average_precision(probabilities[:, k], truth == k, weights) for k in present}
    values = [called.balanced_accuracy, called.macro_f1, np.mean(list(areas.values()), axis=0)]
    values += [areas[MELANOMA]] if MELANOMA in areas else []
    values += [calibration_error(probabilities, truth, weights), *called.recall.T]
    return dict(zip(score_names(present.tolist()), values, strict=True))
