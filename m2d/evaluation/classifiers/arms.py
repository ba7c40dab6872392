"""Which images each arm of the downstream comparison trains on, as row numbers and weights. Knows labels, no pixels.

The arms differ in training data alone. Arm c is the control that settles whether synthetic images help: it repeats
real images until every class has as many as in arm d, so that what d has more is new images, not other class counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES, NUM_CLASSES
from m2d.errors import DataError
from m2d.evaluation.images import FeatureSet, ImageSet

ARMS = {
    "a": "real",
    "b": "real, class weights",
    "c": "real, oversampled to the counts of d",
    "d": "real + synthetic",
    "e": "synthetic alone",
}
_SHOWN = 3  # lesions named in an error


@dataclass(frozen=True)
class TrainingRows:
    """Images to train on, those of `real` before those of `generated`; a row that stands twice counts twice."""

    real: np.ndarray  # int64 [n], ascending rows of the real training images, with repeats in arm c
    generated: np.ndarray  # int64 [m], ascending rows of the generated images, each once at most
    weights: np.ndarray  # float64 [n + m], of the images in the loss; their mean is 1

    def __len__(self) -> int:
        return len(self.weights)

    def labels(self, real: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """Classes of the images, int64 [n + m], from those of all real [N] and all generated ones [M]."""
        return np.concatenate([real[self.real], generated[self.generated]])


def training_rows(
    arm: str, real: np.ndarray, generated: np.ndarray, *, ratio: float | None = None, seed: int
) -> TrainingRows:
    """The training images of an arm.

    arm: a key of ARMS. real, generated: int64 [N], [M], the classes of all images. ratio: synthetic images that a class
    gains for each of its real ones, as far as there are so many; None: all of them. seed: of what is drawn. A smaller
    ratio takes a part of what a larger one takes; the images that arm c repeats are drawn in whole passes over the
    class and a last part without repeats, so that all stand in it equally often, give or take one.
    """
    there = np.bincount(generated, minlength=NUM_CLASSES)
    added = there if ratio is None else np.minimum(_wanted(real, ratio), there)
    every, none = np.arange(len(real)), np.empty(0, dtype=np.int64)
    if arm == "b":
        counts = np.bincount(real, minlength=NUM_CLASSES)
        return TrainingRows(every, none, len(real) / (np.count_nonzero(counts) * counts[real]))
    if arm == "c":
        every = np.sort(np.concatenate([every, _drawn(real, added, [seed, 0])]))
    of_generated = np.sort(_drawn(generated, added, [seed, 1])) if arm in "de" else none
    of_real = none if arm == "e" else every
    return TrainingRows(of_real, of_generated, np.ones(len(of_real) + len(of_generated)))


def limits(real: np.ndarray, generated: np.ndarray, ratio: float) -> str | None:
    """Where a ratio asks for more generated images than there are, in words: `MEL 300 of 550, NV 0 of 4,000`."""
    wanted, there = _wanted(real, ratio), np.bincount(generated, minlength=NUM_CLASSES)
    short = [f"{CLASSES[k]} {there[k]:,} of {wanted[k]:,}" for k in np.flatnonzero(there < wanted)]
    return ", ".join(short) or None


def check_sides(
    train: ImageSet | FeatureSet, test: ImageSet | FeatureSet, generated: ImageSet | FeatureSet
) -> list[int]:
    """The classes to score, ascending: those in both train and test.

    Raises DataError where a lesion is in train and test, nothing was generated or a class unknown to train, or fewer
    than two classes can be scored.
    """
    shared = sorted(set(train.groups.tolist()) & set(test.groups.tolist()), key=str)
    if shared:
        named = ", ".join(map(str, shared[:_SHOWN])) + (", ..." if len(shared) > _SHOWN else "")
        raise DataError(
            f"downstream: lesions of the real test images are also in the training images ({len(shared):,}: {named}), "
            "so the test would reward what was learned by heart; split by lesion, or name other test images"
        )
    if not len(generated):
        raise DataError("downstream: there is no generated image; name a folder that has some")
    trained, tested, made = (set(side.labels.tolist()) for side in (train, test, generated))
    if made - trained:
        raise DataError(
            f"downstream: generated images of {_codes(made - trained)}, of which the real training images have none "
            f"(they have {_codes(trained)}); leave that class out, or add real images of it"
        )
    scored = sorted(trained & tested)
    if len(scored) < 2:
        raise DataError(
            f"downstream: training and test images share too few classes ({_codes(scored) or 'none'}); a classifier "
            "needs two at least, so give images of more classes"
        )
    return scored


def unscored(train: ImageSet | FeatureSet, test: ImageSet | FeatureSet) -> dict[str, str]:
    """Class code to the reason why it is not scored, of the classes that only one side has."""
    trained, tested = set(train.labels.tolist()), set(test.labels.tolist())
    reasons = dict.fromkeys(trained - tested, "no test image, so nothing to score; it is trained on")
    reasons |= dict.fromkeys(tested - trained, "no real training image; its test images are left out")
    return {CLASSES[k]: reasons[k] for k in sorted(reasons)}


def class_counts(labels: np.ndarray) -> dict[str, int]:
    """Images of each class that has some."""
    counted = np.bincount(labels, minlength=NUM_CLASSES)
    return {code: int(n) for code, n in zip(CLASSES, counted, strict=True) if n}


def _wanted(real: np.ndarray, ratio: float) -> np.ndarray:
    return np.asarray(np.rint(ratio * np.bincount(real, minlength=NUM_CLASSES)).astype(np.int64))


def _drawn(labels: np.ndarray, counts: np.ndarray, seed: list[int]) -> np.ndarray:
    """counts[k] rows of each class k, in shuffled passes over its images; none again before all were drawn."""
    parts = [np.empty(0, dtype=np.int64)]
    for label in np.flatnonzero(counts):
        rows, count = np.flatnonzero(labels == label), int(counts[label])
        generator = np.random.default_rng([*seed, int(label)])
        passes = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
        parts.append(np.concatenate(passes)[:count])
    return np.concatenate(parts)


def _codes(labels: Iterable[int]) -> str:
    return " ".join(CLASSES[label] for label in sorted(labels))
