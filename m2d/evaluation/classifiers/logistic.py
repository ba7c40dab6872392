"""Classifier 1 of the comparison, logistic regression on an extractor's features; and class consistency by the same.

Give both features of an extractor that did not guide the training: in those of the one that did, agreement proves
little.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES, NUM_CLASSES
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import (
    DownstreamResult,
    Settings,
    TrainingRows,
    Trials,
    compare_arms,
    scored_classes,
    unscored,
)
from m2d.evaluation.images import FeatureSet, class_counts
from m2d.metrics.bootstrap import Estimate, resampled_confusions
from m2d.metrics.linear_probe import LinearProbe, choose_c
from m2d.metrics.scores import confusion_matrix, scores


def measure_downstream(
    *, train: FeatureSet, test: FeatureSet, generated: FeatureSet, c: float | None, trials: Trials
) -> DownstreamResult:
    """The comparison for classifier 1; see compare.compare_arms.

    train, test: real images, no lesion in both; generated: the images to judge. c: inverse strength of the L2 penalty,
    the same for all arms; None: see `chosen_c`. Raises DataError for lesions too few to choose c by, or classes too
    few.
    """
    picked, tried = (c, {}) if c is not None else chosen_c(train, seed=trials.seed)
    settings: Settings = {"extractor": train.extractor, "c": picked}
    settings |= {f"cross-validated balanced accuracy at c = {one:g}": score for one, score in tried.items()}
    return compare_arms(
        ProbeClassifier(train, test, generated, picked),
        "logistic regression on extractor features",
        settings,
        trials,
        images=(train.images, test.images, generated.images),
        notes=[
            "Features are standardised by the real training images, and c is the same, in every arm.",
            "This classifier has no chance of its own: a seed changes what arm c repeats, and in the ratio sweep which "
            "synthetic images are taken.",
        ],
    )


def chosen_c(train: FeatureSet, *, seed: int) -> tuple[float, dict[float, float]]:
    """The c that lesion-grouped cross-validation on these images prefers, and the score of each that was tried.

    Raises DataError where the lesions are too few for it.
    """
    best, tried = choose_c(train.cls, train.labels, train.groups, num_classes=NUM_CLASSES, seed=seed)
    if best is None:
        raise DataError(
            f"downstream: {len(train)} training images of {len(set(train.groups.tolist()))} lesions are too few to "
            "choose c by cross-validation; give more images, or a value of c"
        )
    return best, tried


@dataclass(frozen=True)
class ProbeClassifier:
    """Logistic regression; every arm is standardised by the real training images. See compare.Classifier."""

    train: FeatureSet
    test: FeatureSet
    generated: FeatureSet
    c: float
    seeded = False
    wants_gpu = False

    @property
    def identity(self) -> str:
        """Hex digest of c, features and labels."""
        digest = hashlib.sha256(f"probe {self.c!r}\n".encode())
        for part in (self.train, self.test, self.generated):
            digest.update(f"{part.extractor} {part.cls.shape}\n".encode())
            digest.update(np.ascontiguousarray(part.cls).data)
            digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Class probabilities of the test images. An image that stands twice is one of twice the weight: same loss."""
        real, count = np.unique(rows.real), len(rows.real)
        weights = np.concatenate([np.bincount(rows.real, rows.weights[:count])[real], rows.weights[count:]])
        probe = LinearProbe.fit(
            np.concatenate([self.train.cls[real], self.generated.cls[rows.generated]]),
            np.concatenate([self.train.labels[real], self.generated.labels[rows.generated]]),
            c=self.c,
            weights=weights,
            standardised_by=self.train.cls,
        )
        return probe.probabilities(self.test.cls, NUM_CLASSES)


# --- class consistency ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConsistencyResult:
    """Rows of the confusions: the class that was asked for (generated) or diagnosed (real); columns: as classified."""

    extractor: str
    c: float  # of the logistic regression
    resamples: int
    classes: list[str]  # of rows and columns
    confusion: list[list[int]]  # [K, K], of the generated images
    confusion_of_real: list[list[int]]  # [K, K], of unseen real images
    images: dict[str, int]  # generated, of each class that has some
    agreement: dict[str, Estimate]  # share of a class's generated images that are classified as it
    recall_of_real: dict[str, Estimate]  # the same of unseen real images: the ceiling
    mean_agreement: Estimate | None  # over the classes that were generated and have test images; None: no such class
    mean_recall_of_real: Estimate | None  # over the same classes
    left_out: dict[str, str]  # class code: why it has no ceiling, or no agreement


def measure_consistency(
    *, train: FeatureSet, test: FeatureSet, generated: FeatureSet, c: float, resamples: int, seed: int
) -> ConsistencyResult:
    """Does a classifier that saw real images alone see in a generated image the class it was made for?

    A linear probe is fitted on the real training images, every class weighing the same, and classifies both other sets.
    Intervals: of a class's agreement Wilson's, for generated images are independent and a share of 1 is no certainty;
    of the real recall and of both means a bootstrap over lesions, or generated images, within each class.
    Raises DataError where fewer than two classes are both in train and test.
    """
    scored_classes(train.images, test.images)
    probe = LinearProbe.fit(train.cls, train.labels, c=c)
    known = np.isin(test.labels, np.unique(train.labels))
    shape = {"num_classes": NUM_CLASSES, "resamples": resamples, "seed": seed}

    def classified(truth: np.ndarray, cls: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The confusion matrix [K, K], and those of the resamples [R, K, K]."""
        called = probe.predict(cls)
        return confusion_matrix(truth, called, NUM_CLASSES), resampled_confusions(truth, called, groups, **shape)

    confusion, drawn = classified(generated.labels, generated.cls, np.arange(len(generated)))
    real, drawn_real = classified(test.labels[known], test.cls[known], test.groups[known])
    made, tested = (np.flatnonzero(one.sum(axis=1)) for one in (confusion, real))
    recalls, resampled = scores(real).recall, scores(drawn_real).recall
    both = np.intersect1d(made, tested)
    agreement = {k: Estimate.of_share(float(confusion[k, k] / confusion[k].sum()), confusion[k].sum()) for k in made}
    return ConsistencyResult(
        extractor=train.extractor,
        c=c,
        resamples=resamples,
        classes=list(CLASSES),
        confusion=confusion.tolist(),
        confusion_of_real=real.tolist(),
        images=class_counts(generated.labels),
        agreement={CLASSES[k]: one for k, one in agreement.items()},
        recall_of_real={CLASSES[k]: Estimate.of(recalls[row], resampled[:, row]) for row, k in enumerate(tested)},
        mean_agreement=_mean(confusion, drawn, both),
        mean_recall_of_real=_mean(real, drawn_real, both),
        left_out={
            **unscored(train.images, test.images),
            **{CLASSES[k]: "no generated image, so no agreement" for k in np.setdiff1d(tested, made)},
        },
    )


def _mean(confusion: np.ndarray, drawn: np.ndarray, classes: np.ndarray) -> Estimate | None:
    """The mean share on the diagonal of these rows; confusion [K, K], drawn [R, K, K]. None: no row."""
    if not len(classes):
        return None
    shares, resampled = (
        np.diagonal(one, axis1=-2, axis2=-1)[..., classes] / one.sum(axis=-1)[..., classes]
        for one in (confusion, drawn)
    )
    return Estimate.of(shares.mean(), resampled.mean(axis=1))
