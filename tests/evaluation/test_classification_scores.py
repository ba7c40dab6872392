"""Scores from confusion matrices equal scikit-learn's and a case worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from m2d.evaluation.classification_scores import confusion_matrix, scores


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


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_scikit_learns(seed: int) -> None:
    truth, called = some_calls(seed)
    measured = scores(confusion_matrix(truth, called, 7))
    assert measured.accuracy == pytest.approx(accuracy_score(truth, called))
    assert measured.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, called))
    assert measured.macro_f1 == pytest.approx(f1_score(truth, called, average="macro"))
    assert measured.recall == pytest.approx(recall_score(truth, called, average=None))


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
