"""Scores equal scikit-learn's and torchmetrics'; bootstrap intervals agree with closed forms, and resample lesions."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score, roc_auc_score
from torchmetrics.classification import MulticlassCalibrationError

from m2d.classes import ISIC7
from m2d.metrics.bootstrap import Estimate, resampled_confusions, resampled_seeds, resampled_weights
from m2d.metrics.scores import (
    average_precision,
    calibration_error,
    confusion_matrix,
    scores,
    told_apart,
    weighted_scores,
)

MELANOMA = ISIC7.index("MEL")
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


@pytest.mark.parametrize("classes", [tuple(range(7)), MELANOMA_AND_TWO_MORE])
def test_scores_are_scikit_learns_over_the_classes_with_images(classes: tuple[int, ...]) -> None:
    probabilities, truth = calls(classes=classes)
    measured, called = once(probabilities, truth), probabilities.argmax(axis=1)
    areas = {k: average_precision_score(truth == k, probabilities[:, k]) for k in classes}
    recalls = recall_score(truth, called, labels=classes, average=None)
    expected = {
        "balanced_accuracy": recalls.mean(),
        "macro_f1": f1_score(truth, called, labels=classes, average="macro"),
        "macro_auprc": np.mean(list(areas.values())),
        "melanoma_auprc": areas[MELANOMA],
        **{f"recall_{ISIC7.codes[k]}": recall for k, recall in zip(classes, recalls)},
    }
    del measured["expected_calibration_error"]
    assert measured == pytest.approx(expected, rel=1e-12)


def test_the_area_under_the_roc_curve_is_scikit_learns_with_ties_and_weights() -> None:
    generator = np.random.default_rng(0)
    positive = generator.random(80) < 0.4
    score = np.round(generator.normal(size=80) + positive, 1)
    weights = generator.integers(0, 4, (5, 80)).astype(float)
    expected = [roc_auc_score(positive, score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(told_apart(score, positive, weights, 0.01)[0], expected, rtol=1e-12)


def test_what_is_found_at_few_false_alarms_lies_above_the_kth_highest_negative() -> None:
    """Of 199 negatives two in 200 new ones may be called, so the threshold is the second highest, 197."""
    score = np.concatenate([np.arange(199.0), [300, 198, 197.5, 197, 5]])
    positive = np.arange(len(score)) >= 199
    ones = np.ones((1, len(score)))
    assert told_apart(score, positive, ones, 0.01)[1] == pytest.approx([3 / 5])
    assert np.isnan(told_apart(score[101:], positive[101:], ones[:, 101:], 0.01)[1]).all(), "98 are too few"


def test_calibration_error_is_torchmetrics() -> None:
    probabilities, truth = calls(3000)
    metric = MulticlassCalibrationError(num_classes=7, n_bins=15, norm="l1")
    expected = float(metric(torch.from_numpy(probabilities), torch.from_numpy(truth)))
    assert once(probabilities, truth)["expected_calibration_error"] == pytest.approx(expected, rel=1e-6)


def test_the_last_bin_of_the_calibration_error_holds_certainty_too() -> None:
    """0.95, wrong, and 1.0, right, share a bin: |1/2 - 0.975|. Bins of their own would give (0.95 + 0) / 2."""
    probabilities = np.array([[0.95, 0.05, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    assert calibration_error(probabilities, np.array([1, 0]), np.ones((1, 2)))[0] == pytest.approx(0.475)
    assert calibration_error(np.eye(7), np.arange(7), np.ones((1, 7))).tolist() == [0.0]


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
    monkeypatch.setattr("m2d.metrics.scores._CELLS_AT_ONCE", 700)
    parts = weighted_scores(probabilities, truth, weights)
    assert all(parts[name] == pytest.approx(whole[name], rel=1e-12) for name in whole)


def test_without_melanomas_there_is_no_melanoma_auprc() -> None:
    classes = tuple(k for k in range(7) if k != MELANOMA)
    measured = once(*calls(classes=classes))
    assert "melanoma_auprc" not in measured
    assert [name for name in measured if name.startswith("recall_")] == [f"recall_{ISIC7.codes[k]}" for k in classes]


def test_weights_are_the_draws_of_the_resampled_confusions() -> None:
    probabilities, truth = calls(300)
    called, lesions = probabilities.argmax(axis=1), np.arange(300) // 3
    weights = resampled_weights(truth, lesions, resamples=40, seed=9)
    counted = np.stack([np.bincount(truth * 7 + called, row, minlength=49).reshape(7, 7) for row in weights])
    expected = resampled_confusions(truth, called, lesions, num_classes=7, resamples=40, seed=9)
    assert np.array_equal(counted, expected)


def test_means_over_drawn_seeds_vary_as_means_over_seeds_do() -> None:
    """Of four seeds with scores s, the mean has the variance s^2 / 4, s^2 the unbiased one between seeds."""
    of_seed = np.array([0.1, 0.4, 0.2, 0.9])
    drawn = resampled_seeds(4, resamples=200_000, seed=0)
    assert of_seed[drawn].mean(axis=1).var() == pytest.approx(of_seed.var(ddof=1) / 4, rel=0.02)
    assert resampled_seeds(1, resamples=5, seed=0).tolist() == [[0]] * 5


# --- confusion matrices -----------------------------------------------------------------------------------------------


def some_calls(seed: int, classes: int = 7, images: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Truth and calls, right half of the time."""
    generator = np.random.default_rng(seed)
    truth, guess = generator.integers(classes, size=(2, images))
    return truth, np.where(generator.random(images) < 0.5, truth, guess)


def test_a_case_worked_out_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    called = np.array([0, 0, 0, 1, 1, 0, 2, 2, 1, 1])
    confusion = confusion_matrix(truth, called, 3)
    assert confusion.tolist() == [[3, 1, 0], [1, 1, 0], [0, 2, 2]]
    measured = scores(confusion)
    assert measured.accuracy == pytest.approx(6 / 10)
    assert measured.recall == pytest.approx([3 / 4, 1 / 2, 1 / 2])
    assert measured.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    # Precisions 3/4, 1/4, 1, so F1 of 3/4, 1/3, 2/3.
    assert measured.macro_f1 == pytest.approx((3 / 4 + 1 / 3 + 2 / 3) / 3)


def test_a_class_without_images_is_left_out_of_the_means_but_its_calls_count_as_wrong() -> None:
    truth, called = some_calls(0)
    kept = truth != 4
    truth, called = truth[kept], called[kept]
    assert (called == 4).any()
    present = [0, 1, 2, 3, 5, 6]
    measured = scores(confusion_matrix(truth, called, 7))
    assert measured.recall == pytest.approx(recall_score(truth, called, labels=present, average=None))
    assert measured.balanced_accuracy == pytest.approx(measured.recall.mean())
    assert measured.macro_f1 == pytest.approx(f1_score(truth, called, labels=present, average="macro"))
    assert measured.accuracy == pytest.approx(accuracy_score(truth, called))


def test_many_matrices_at_once_give_what_each_gives_alone() -> None:
    matrices = np.stack([confusion_matrix(*some_calls(seed), 7) for seed in range(4)])
    together = scores(matrices)
    for row, matrix in enumerate(matrices):
        alone = scores(matrix)
        for name, value in vars(alone).items():
            assert getattr(together, name)[row] == pytest.approx(value), name


Z = 1.959964  # of a 95 % normal interval


def two_classes(*classes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Truth and calls of two classes, from (images, right ones) of each."""
    truth = np.concatenate([np.full(images, label) for label, (images, _) in enumerate(classes)])
    called = np.concatenate(
        [np.where(np.arange(images) < right, label, 1 - label) for label, (images, right) in enumerate(classes)]
    )
    return truth, called


def resample(
    truth: np.ndarray, called: np.ndarray, lesions: np.ndarray | None = None, seed: int = 0, resamples: int = 4000
) -> np.ndarray:
    lesions = np.arange(len(truth)) if lesions is None else lesions
    return resampled_confusions(truth, called, lesions, num_classes=2, resamples=resamples, seed=seed)


def test_intervals_are_the_binomial_one_of_a_recall_and_add_the_variances_of_the_classes() -> None:
    """Recall 0.8 of 400 lesions of an image each; and the mean of two proportions, each class drawn on its own."""
    measured = scores(resample(*two_classes((400, 320), (100, 50))))
    of_recall, of_other = 0.8 * 0.2 / 400, 0.5 * 0.5 / 100
    for drawn, value, half in (
        (measured.recall[:, 0], 0.8, Z * np.sqrt(of_recall)),
        (measured.balanced_accuracy, 0.65, Z * np.sqrt(of_recall + of_other) / 2),
    ):
        one = Estimate.of(drawn)
        assert (one.low, one.high) == pytest.approx((value - half, value + half), abs=0.005)


def test_repeated_photographs_of_a_lesion_add_nothing_to_the_certainty() -> None:
    """Four photographs of each of 100 lesions, all right or all wrong: the interval is that of 100, not of 400."""
    truth, called = two_classes((400, 320), (400, 200))
    lesions = np.arange(800) // 4
    one = Estimate.of(scores(resample(truth, called, lesions)).recall[:, 0])
    half = Z * np.sqrt(0.8 * 0.2 / 100)
    assert (one.low, one.high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.01)
    by_image = Estimate.of(scores(resample(truth, called)).recall[:, 0])
    assert one.high - one.low > 1.8 * (by_image.high - by_image.low)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 40), (3, 7), (9, 9), (17, 1698)])
def test_the_interval_of_a_share_is_scipys_wilson_interval(hits: int, trials: int) -> None:
    expected = binomtest(hits, trials).proportion_ci(method="wilson")
    share = Estimate.of_share(hits / trials, trials)
    assert (share.low, share.high) == pytest.approx(tuple(expected), abs=1e-12)


def test_each_resample_draws_as_many_lesions_of_each_class_as_there_are_and_the_seed_decides_which() -> None:
    truth, called = two_classes((60, 30), (1, 1))
    first, again, other = (resample(truth, called, seed=seed, resamples=50) for seed in (3, 3, 4))
    assert (first.sum(axis=2) == [60, 1]).all()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
