"""Scores of a classifier from its confusion matrix, for one matrix or for a thousand resampled ones at once.

rows: true class; columns: predicted class. Knows nothing of images, features or files.
"""

from dataclasses import dataclass

import numpy as np


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

    confusion: [R..., K, K] (see confusion_matrix). The classes with images must be the same in every resample, as a
    stratified bootstrap leaves them. A prediction of a class without images counts against the true one, as in
    scikit-learn's f1_score(labels=classes with images, average="macro").
    """
    of_class = confusion.sum(axis=-1)  # [R..., K]
    present = np.flatnonzero(of_class.reshape(-1, of_class.shape[-1]).min(axis=0))
    if not len(present):
        raise ValueError("the confusion matrix has no class with images in every resample")
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
