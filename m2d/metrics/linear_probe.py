"""A linear probe: logistic regression on standardised features, and the choice of its penalty."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from m2d.metrics.neighbours import Standardizer, one_where_constant
from m2d.metrics.scores import confusion_matrix, scores

MAX_ITERATIONS = 2000  # of L-BFGS
C_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # few training images want the first, wide features of many images the last
FOLDS = 3
TOLERANCE, TOLERANCE_OF_CHOICE = 1e-4, 1e-3  # of the gradient; the looser one halves the time and orders the c's alike


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe; standardises what it is given as it did the training images."""

    classifier: LogisticRegression
    standardizer: Standardizer
    converged: bool
    iterations: int

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        labels: np.ndarray,
        *,
        c: float,
        tolerance: float = TOLERANCE,
        weights: np.ndarray | None = None,
        standardised_by: np.ndarray | None = None,
    ) -> "LinearProbe":
        """Fit on features [N, D] and labels int64 [N], of at least two classes.

        c: inverse strength of the squared L2 penalty against the summed cross-entropy, in which every class weighs the
        same. PanDerm's authors penalise the norm instead, with C = D K / 100; that number means nothing here.
        weights: [N], of each image, in place of the balanced ones. standardised_by: [M, D], in place of `features`.
        """
        reference = features if standardised_by is None else standardised_by
        standardizer = Standardizer.of(reference, one_where_constant, dtype=features.dtype)
        class_weight = "balanced" if weights is None else None
        classifier = LogisticRegression(C=c, class_weight=class_weight, max_iter=MAX_ITERATIONS, tol=tolerance)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            classifier.fit(standardizer(features), labels, sample_weight=weights)
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        return cls(classifier, standardizer, converged, int(classifier.n_iter_.max()))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The class of each of [N, D], int64 [N]."""
        return np.asarray(self.classifier.predict(self.standardizer(features)))

    def probabilities(self, features: np.ndarray, num_classes: int) -> np.ndarray:
        """Of each of [N, D], float64 [N, num_classes]; 0 for a class that the probe was not fitted on."""
        spread = np.zeros((len(features), num_classes))
        spread[:, self.classifier.classes_] = self.classifier.predict_proba(self.standardizer(features))
        return spread


def lesion_folds(labels: np.ndarray, lesions: np.ndarray, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows held out, ascending, of each fold: stratified by class, no lesion in two. [] for too few.

    labels: int64 [N]. lesions: [N], equal values are one lesion.
    """
    if len(np.unique(lesions)) < folds or np.bincount(labels).max(initial=0) < folds:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds
        found = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, lesions))
    return found if all(len(held) for _, held in found) else []


def choose_c(
    features: np.ndarray, labels: np.ndarray, lesions: np.ndarray, *, num_classes: int, seed: int
) -> tuple[float | None, dict[float, float]]:
    """The best c of C_GRID, and the balanced accuracy that each reaches on held-out lesions of the training images.

    Three folds; what all of them predict is scored together, for a rare class has but a few images in each. None and {}
    where the lesions are so few that a fold leaves less than two classes. Of equals the middle c is the best: easy
    classes leave the whole grid equal.
    """
    folds = lesion_folds(labels, lesions, FOLDS, seed)
    if not folds or any(len(np.unique(labels[fitted])) < 2 for fitted, _ in folds):
        return None, {}
    tried = {}
    for c in C_GRID:
        predicted = np.empty_like(labels)
        for fitted, held_out in folds:
            probe = LinearProbe.fit(features[fitted], labels[fitted], c=c, tolerance=TOLERANCE_OF_CHOICE)
            predicted[held_out] = probe.predict(features[held_out])
        tried[c] = float(scores(confusion_matrix(labels, predicted, num_classes)).balanced_accuracy)
    best = [c for c, score in tried.items() if score == max(tried.values())]
    return best[len(best) // 2], tried


def told_apart(features: np.ndarray, generated: np.ndarray, groups: np.ndarray, *, c: float, seed: int) -> float | None:
    """AUC of a probe that tells generated from real images, on held-out groups: 0.5 cannot, 1 always can.

    features: [N, D]. generated: bool [N]. groups: [N], of a real image its lesion, of a generated one that of the real
    image that it is nearest to, or a copy would be known by its original. None: too few for the folds.
    """
    kinds, made = np.unique(groups.astype(str), return_inverse=True)[1], generated.astype(np.int64)
    if min(len(set(kinds[made == side].tolist())) for side in (0, 1)) < FOLDS:
        return None
    score, folds = np.empty(len(made)), lesion_folds(made, kinds, FOLDS, seed)
    if not folds or any(len(np.unique(made[fitted])) < 2 for fitted, _ in folds):
        return None
    for fitted, held in folds:
        probe = LinearProbe.fit(features[fitted], made[fitted], c=c, tolerance=TOLERANCE_OF_CHOICE)
        score[held] = probe.probabilities(features[held], 2)[:, 1]
    return float(roc_auc_score(made, score))
