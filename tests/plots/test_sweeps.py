"""Pictures of a sweep."""

import numpy as np
import pytest
from plots.pictures import pixels_of

from m2d.plots.sweeps import best_trial, importance_chart, parallel_coordinates

CHOSEN = [{"lr": 1e-4}, {"lr": 1e-3}, {"lr": 1e-2}]


def orange(png: bytes) -> float:
    """Mean row of the thick line's pixels, from the top."""
    image = pixels_of(png).astype(int)
    rows = np.nonzero(np.abs(image - np.array([0xD5, 0x5E, 0x00])).sum(axis=2) < 20)[0]
    assert len(rows) > 500
    return float(rows.mean())


def test_the_best_line_is_that_of_a_whole_trial() -> None:
    """Whole trials chose the lowest and the highest value; the stopped one, with the lowest objective, the middle."""
    low = parallel_coordinates(CHOSEN, [0.3, 0.1, 0.2], [True, False, False], {"lr": True})
    high = parallel_coordinates(CHOSEN, [0.2, 0.1, 0.3], [False, False, True], {"lr": True})
    assert orange(high) < orange(low)


@pytest.mark.parametrize(
    ("objectives", "whole", "best"),
    [([3.0, 1.0, 2.0], [True, False, True], 2), ([3.0, 1.0, 2.0], [False, False, False], 1), ([3.0], [True], 0)],
)
def test_what_was_stopped_is_the_best_only_among_its_like(
    objectives: list[float], whole: list[bool], best: int
) -> None:
    assert best_trial(objectives, whole) == best


def test_broken_lines_tell_who_was_stopped() -> None:
    everyone = pixels_of(parallel_coordinates(CHOSEN, [1.0, 2.0, 3.0], [True] * 3, {"lr": True}))
    some = pixels_of(parallel_coordinates(CHOSEN, [1.0, 2.0, 3.0], [True, False, False], {"lr": True}))
    lines = slice(60, -80)  # between the title and the names
    assert (some[lines] != 255).sum() < (everyone[lines] != 255).sum()


def test_no_trial_is_no_picture() -> None:
    with pytest.raises(ValueError, match="no trial"):
        parallel_coordinates([], [], [], {})


def test_unknown_importance_is_a_picture_too() -> None:
    assert pixels_of(importance_chart({}, trials=2, report=1)).shape[1] > 400
