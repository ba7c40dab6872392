"""The measure that judges a run's samples: who is compared with whom."""

import numpy as np
import pytest

from m2d.training.sample_quality import rows_of_each_class


def test_every_class_has_the_same_share() -> None:
    labels = np.array([0] * 50 + [3] * 50 + [6] * 50)
    rows = rows_of_each_class(labels, 30)
    assert np.bincount(labels[rows], minlength=7).tolist() == [10, 0, 0, 10, 0, 0, 10]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_a_rare_class_gives_all_it_has() -> None:
    labels = np.array([0] * 50 + [3] * 4)
    rows = rows_of_each_class(labels, 20)
    assert np.bincount(labels[rows]).tolist() == [10, 0, 0, 4]


@pytest.mark.parametrize("labels", [[], [0, 0, 1]])
def test_no_more_images_than_there_are(labels: list[int]) -> None:
    assert len(rows_of_each_class(np.array(labels, dtype=np.int64), 100)) == len(labels)


def test_the_choice_is_the_same_each_time() -> None:
    labels = np.arange(200) % 7
    assert rows_of_each_class(labels, 70).tolist() == rows_of_each_class(labels, 70).tolist()
