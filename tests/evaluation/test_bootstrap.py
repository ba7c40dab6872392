"""Bootstrap intervals agree with closed forms, and resample lesions instead of images."""

import numpy as np
import pytest

from m2d.evaluation.bootstrap import interval, resampled_confusions
from m2d.evaluation.classification_scores import scores

Z = 1.959964  # of a 95 % normal interval


def calls(*classes: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
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


def test_interval_of_a_proportion_is_the_binomial_one() -> None:
    """Recall 0.8 of 400 lesions of an image each: 0.8 +- Z sqrt(0.8 0.2 / 400)."""
    low, high = interval(scores(resample(*calls((400, 320), (100, 50)))).recall[:, 0])
    half = Z * np.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.005)


def test_interval_of_balanced_accuracy_adds_the_variances_of_the_classes() -> None:
    """The mean of two independent proportions, each class drawn on its own: stratified."""
    low, high = interval(scores(resample(*calls((400, 320), (100, 50)))).balanced_accuracy)
    half = Z * np.sqrt(0.8 * 0.2 / 400 + 0.5 * 0.5 / 100) / 2
    assert (low, high) == pytest.approx((0.65 - half, 0.65 + half), abs=0.005)


def test_repeated_photographs_of_a_lesion_add_nothing_to_the_certainty() -> None:
    """Four photographs of each of 100 lesions, all right or all wrong: the interval is that of 100, not of 400."""
    truth, called = calls((400, 320), (400, 200))
    lesions = np.arange(800) // 4
    low, high = interval(scores(resample(truth, called, lesions)).recall[:, 0])
    half = Z * np.sqrt(0.8 * 0.2 / 100)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.01)
    by_image = interval(scores(resample(truth, called)).recall[:, 0])
    assert high - low > 1.8 * (by_image[1] - by_image[0])


def test_a_class_of_one_lesion_stands_in_every_resample() -> None:
    drawn = resample(*calls((200, 100), (1, 1)))
    assert (drawn.sum(axis=2)[:, 1] == 1).all()


def test_each_resample_draws_as_many_lesions_as_there_are() -> None:
    drawn = resample(*calls((30, 10), (20, 5)))
    assert (drawn.sum(axis=2) == [30, 20]).all()


def test_the_seed_decides() -> None:
    truth, called = calls((60, 30), (40, 20))
    first, again, other = (resample(truth, called, seed=seed, resamples=50) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
