"""Scores equal scikit-learn's and torchmetrics', as they are and resampled."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, recall_score
from torchmetrics.classification import MulticlassCalibrationError

from m2d.classes import CLASSES
from m2d.evaluation.bootstrap import resampled_confusions, resampled_seeds, resampled_weights
from m2d.evaluation.downstream_scores import (
    MELANOMA,
    average_precision,
    calibration_error,
    score_names,
    weighted_scores,
)

MELANOMA_AND_TWO_MORE = (2, 4, 5)


def calls(
    images: int = 400, classes: tuple[int, ...] = tuple(range(7)), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, 7], right more often than not, and the truth; classes of very different sizes."""
    generator = np.random.default_rng(seed)
    share = np.geomspace(1, 20, len(classes))
    truth = generator.choice(classes, size=images, p=share / share.sum())
    logits = generator.normal(size=(images, 7)) + 1.5 * np.eye(7)[truth]
    spread = np.exp(logits)
    return spread / spread.sum(axis=1, keepdims=True), truth


def once(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        name: float(value[0]) for name, value in weighted_scores(probabilities, truth, np.ones((1, len(truth)))).items()
    }


def test_balanced_accuracy_is_scikit_learns() -> None:
    probabilities, truth = calls()
    expected = balanced_accuracy_score(truth, probabilities.argmax(axis=1))
    assert once(probabilities, truth)["balanced_accuracy"] == pytest.approx(expected, rel=1e-12)


def test_macro_f1_is_scikit_learns_over_the_classes_with_images() -> None:
    probabilities, truth = calls(classes=MELANOMA_AND_TWO_MORE)
    expected = f1_score(truth, probabilities.argmax(axis=1), labels=MELANOMA_AND_TWO_MORE, average="macro")
    assert once(probabilities, truth)["macro_f1"] == pytest.approx(expected, rel=1e-12)


def test_recalls_are_scikit_learns() -> None:
    probabilities, truth = calls()
    measured = once(probabilities, truth)
    expected = recall_score(truth, probabilities.argmax(axis=1), labels=range(7), average=None)
    assert [measured[f"recall_{code}"] for code in CLASSES] == pytest.approx(expected.tolist(), rel=1e-12)


def test_macro_auprc_is_the_mean_of_scikit_learns_over_the_classes_with_images() -> None:
    probabilities, truth = calls(classes=MELANOMA_AND_TWO_MORE)
    expected = np.mean([average_precision_score(truth == k, probabilities[:, k]) for k in MELANOMA_AND_TWO_MORE])
    assert once(probabilities, truth)["macro_auprc"] == pytest.approx(expected, rel=1e-12)


def test_melanoma_auprc_is_scikit_learns() -> None:
    probabilities, truth = calls()
    expected = average_precision_score(truth == CLASSES.index("MEL"), probabilities[:, CLASSES.index("MEL")])
    assert once(probabilities, truth)["melanoma_auprc"] == pytest.approx(expected, rel=1e-12)


def test_calibration_error_is_torchmetrics() -> None:
    probabilities, truth = calls(3000)
    metric = MulticlassCalibrationError(num_classes=7, n_bins=15, norm="l1")
    expected = float(metric(torch.from_numpy(probabilities), torch.from_numpy(truth)))
    assert once(probabilities, truth)["expected_calibration_error"] == pytest.approx(expected, rel=1e-6)


def test_a_classifier_that_is_certain_and_right_is_calibrated() -> None:
    truth = np.arange(7)
    assert calibration_error(np.eye(7), truth, np.ones((1, 7))).tolist() == [0.0]


def test_the_last_bin_holds_certainty_too() -> None:
    """0.95, wrong, and 1.0, right, share a bin: |1/2 - 0.975|. Bins of their own would give (0.95 + 0) / 2."""
    probabilities = np.array([[0.95, 0.05, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    assert calibration_error(probabilities, np.array([1, 0]), np.ones((1, 2)))[0] == pytest.approx(0.475)


def test_weighted_average_precision_is_scikit_learns_with_ties_and_images_that_were_not_drawn() -> None:
    generator = np.random.default_rng(0)
    score = generator.integers(12, size=300) / 12  # many ties
    positive = generator.random(300) < 0.2 + 0.4 * score
    weights = generator.poisson(1, size=(20, 300)).astype(float)
    expected = [average_precision_score(positive, score, sample_weight=row) for row in weights]
    assert average_precision(score, positive, weights) == pytest.approx(expected, rel=1e-12)


def test_weights_count_an_image_as_often_as_it_was_drawn() -> None:
    """Every score of a weighting equals that of a test set in which images are repeated so often."""
    probabilities, truth = calls(200)
    weights = resampled_weights(truth, np.arange(200) // 2, resamples=6, seed=0)
    resampled = weighted_scores(probabilities, truth, weights)
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(200), drawn)
        expected = once(probabilities[rows], truth[rows])
        assert {name: values[row] for name, values in resampled.items()} == pytest.approx(expected, rel=1e-9)


def test_many_weightings_are_scored_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, truth = calls(100)
    weights = resampled_weights(truth, np.arange(100), resamples=25, seed=0)
    whole = weighted_scores(probabilities, truth, weights)
    monkeypatch.setattr("m2d.evaluation.downstream_scores._CELLS_AT_ONCE", 700)
    parts = weighted_scores(probabilities, truth, weights)
    assert all(parts[name] == pytest.approx(whole[name], rel=1e-12) for name in whole)


def test_without_melanomas_there_is_no_melanoma_auprc() -> None:
    classes = tuple(k for k in range(7) if k != MELANOMA)
    measured = once(*calls(classes=classes))
    assert list(measured) == score_names(classes)
    assert "melanoma_auprc" not in measured


def test_weights_are_the_draws_of_the_resampled_confusions() -> None:
    probabilities, truth = calls(300)
    called, lesions = probabilities.argmax(axis=1), np.arange(300) // 3
    weights = resampled_weights(truth, lesions, resamples=40, seed=9)
    counted = np.stack([np.bincount(truth * 7 + called, row, minlength=49).reshape(7, 7) for row in weights])
    expected = resampled_confusions(truth, called, lesions, num_classes=7, resamples=40, seed=9)
    assert np.array_equal(counted, expected)


def test_means_over_drawn_seeds_vary_as_means_over_seeds_do() -> None:
    """Of four seeds with scores s, the mean has the variance s^2 / 4, s^2 the unbiased one between seeds."""
    scores = np.array([0.1, 0.4, 0.2, 0.9])
    drawn = resampled_seeds(4, resamples=200_000, seed=0)
    assert scores[drawn].mean(axis=1).var() == pytest.approx(scores.var(ddof=1) / 4, rel=0.02)


def test_a_single_seed_is_always_drawn() -> None:
    assert resampled_seeds(1, resamples=5, seed=0).tolist() == [[0]] * 5
