"""Does the synthetic set help a classifier on unseen lesions? The five arms, their differences, and the verdict.

Here: classifier 1, logistic regression on an extractor's features. Classifier 2 is in finetune.py; what both share, in
downstream_comparison.py; how trainings run, in downstream_jobs.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2d.classes import NUM_CLASSES
from m2d.errors import DataError
from m2d.evaluation.arms import TrainingRows, check_sides
from m2d.evaluation.downstream_comparison import compare_arms
from m2d.evaluation.downstream_jobs import Runner, run_here
from m2d.evaluation.downstream_result import DownstreamResult, Settings
from m2d.evaluation.images import FeatureSet
from m2d.evaluation.linear_probe import LinearProbe, best_c, choose_c


def measure_downstream(
    *,
    train: FeatureSet,
    test: FeatureSet,
    generated: FeatureSet,
    seeds: Sequence[int],
    resamples: int,
    c: float | None,
    ratios: Sequence[float] = (),
    seed: int,
    run: Runner | None = None,
) -> DownstreamResult:
    """The comparison for classifier 1: logistic regression on an extractor's features.

    train, test: real images, no lesion in both; generated: the images to judge. seeds: as in compare_arms; this
    classifier has no chance of its own, so they change only what an arm draws. c: inverse strength of the L2 penalty,
    the same for all arms; None: chosen once by lesion-grouped cross-validation on the real training images. seed: of
    those folds and of the resamples. run: how the trainings are run; None: here.
    Raises DataError for image sets that cannot be compared (see arms.check_sides), or lesions too few to choose c.
    """
    check_sides(train, test, generated)
    picked, tried = (c, {}) if c is not None else chosen_c(train, seed=seed)
    classifier = ProbeClassifier(train, test, generated, picked)
    settings: Settings = {"extractor": train.extractor, "c": picked}
    settings |= {f"cross-validated balanced accuracy at c = {one:g}": score for one, score in tried.items()}
    return compare_arms(
        classifier,
        "logistic regression on extractor features",
        settings,
        images=(train.images, test.images, generated.images),
        seeds=seeds,
        resamples=resamples,
        ratios=ratios,
        seed=seed,
        run=run or run_here,
        notes=[
            "Features are standardised by the real training images, and c is the same, in every arm.",
            "This classifier has no chance of its own: a seed changes what arm c repeats, and in the ratio sweep which "
            "synthetic images are taken.",
        ],
    )


@dataclass(frozen=True)
class ProbeClassifier:
    """Logistic regression; every arm is standardised by the real training images."""

    train: FeatureSet
    test: FeatureSet
    generated: FeatureSet
    c: float
    seeded = False
    wants_gpu = False

    @property
    def identity(self) -> str:
        """See downstream_jobs.Classifier."""
        digest = hashlib.sha256(f"probe {self.c!r}\n".encode())
        for part in (self.train, self.test, self.generated):
            digest.update(f"{part.extractor} {part.cls.shape}\n".encode())
            digest.update(np.ascontiguousarray(part.cls).data)
            digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """See downstream_jobs.Classifier. An image that stands twice is one of twice the weight: the same loss."""
        real = np.unique(rows.real)
        weights = np.concatenate(
            [np.bincount(rows.real, rows.weights[: len(rows.real)])[real], rows.weights[len(rows.real) :]]
        )
        probe = LinearProbe.fit(
            np.concatenate([self.train.cls[real], self.generated.cls[rows.generated]]),
            np.concatenate([self.train.labels[real], self.generated.labels[rows.generated]]),
            c=self.c,
            weights=weights,
            standardised_by=self.train.cls,
        )
        return probe.probabilities(self.test.cls, NUM_CLASSES)


def chosen_c(train: FeatureSet, *, seed: int) -> tuple[float, dict[float, float]]:
    """The c that lesion-grouped cross-validation on these images prefers, and the score of each that was tried.

    Raises DataError where the lesions are too few for it.
    """
    tried = choose_c(train.cls, train.labels, train.groups, num_classes=NUM_CLASSES, seed=seed)
    best = best_c(tried)
    if best is None:
        raise DataError(
            f"downstream: {len(train)} training images of {len(set(train.groups.tolist()))} lesions are too few to "
            "choose c by cross-validation; give more images, or a value of c"
        )
    return best, tried
