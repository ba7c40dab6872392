"""Class consistency: does a classifier that saw real images alone see in a generated image the class it was made for?

Give it features of an extractor that did not guide the training; of the one that did, agreement proves little.
"""

from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES, NUM_CLASSES
from m2d.evaluation.classifiers.arms import check_sides, unscored
from m2d.evaluation.images import FeatureSet
from m2d.metrics.bootstrap import Estimate, resampled_confusions
from m2d.metrics.linear_probe import LinearProbe
from m2d.metrics.scores import confusion_matrix, scores

Z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


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
    """Fit a linear probe on the real training images, every class weighing the same, and classify both other sets.

    train, test: real images, no lesion in both. c: of the logistic regression. Intervals: of a class's agreement the
    Wilson score interval (JASA 22, 1927, p. 209), for generated images are independent and a share of 1 is no
    certainty; of the real recall and of both means a bootstrap over lesions, or generated images, within each class.
    Raises DataError as arms.check_sides does.
    """
    check_sides(train, test, generated)
    probe = LinearProbe.fit(train.cls, train.labels, c=c)
    asked, called = generated.labels, probe.predict(generated.cls)
    known = np.isin(test.labels, np.unique(train.labels))
    truth, lesions, seen = test.labels[known], test.groups[known], probe.predict(test.cls[known])
    confusion, real = (confusion_matrix(*pair, NUM_CLASSES) for pair in ((asked, called), (truth, seen)))
    shape = {"num_classes": NUM_CLASSES, "resamples": resamples, "seed": seed}
    drawn = resampled_confusions(asked, called, np.arange(len(asked)), **shape)
    drawn_real = resampled_confusions(truth, seen, lesions, **shape)
    made, tested = (np.flatnonzero(one.sum(axis=1)) for one in (confusion, real))
    both = np.intersect1d(made, tested)
    recalls, resampled = scores(real).recall, scores(drawn_real).recall
    return ConsistencyResult(
        extractor=train.extractor,
        c=c,
        resamples=resamples,
        classes=list(CLASSES),
        confusion=confusion.tolist(),
        confusion_of_real=real.tolist(),
        images={CLASSES[k]: int(confusion[k].sum()) for k in made},
        agreement={CLASSES[k]: wilson(int(confusion[k, k]), int(confusion[k].sum())) for k in made},
        recall_of_real={CLASSES[k]: Estimate.of(recalls[row], resampled[:, row]) for row, k in enumerate(tested)},
        mean_agreement=_mean(confusion, drawn, both),
        mean_recall_of_real=_mean(real, drawn_real, both),
        left_out={
            **unscored(train, test),
            **{CLASSES[k]: "no generated image, so no agreement" for k in np.setdiff1d(tested, made)},
        },
    )


def wilson(hits: int, trials: int) -> Estimate:
    """A share with its 95 % score interval. trials: at least 1."""
    share, spread = hits / trials, Z**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * np.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return Estimate(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def _mean(confusion: np.ndarray, drawn: np.ndarray, classes: np.ndarray) -> Estimate | None:
    """The mean share on the diagonal of these rows; confusion [K, K], drawn [R, K, K]. None: no row."""
    if not len(classes):
        return None
    shares = confusion[classes, classes] / confusion.sum(axis=1)[classes]
    return Estimate.of(shares.mean(), (drawn[:, classes, classes] / drawn.sum(axis=2)[:, classes]).mean(axis=1))
