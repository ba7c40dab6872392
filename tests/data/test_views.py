import numpy as np
import pytest

from m2d.data.views import apply_view

IMAGE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)  # no two pixels alike
VIEWS = [apply_view(IMAGE, view) for view in range(8)]


def which_view(image: np.ndarray) -> int:
    (view,) = (view for view, expected in enumerate(VIEWS) if np.array_equal(image, expected))
    return view


def test_each_view_is_what_its_number_says() -> None:
    corners = np.array([[1, 2], [3, 4]], dtype=np.uint8)[:, :, None]
    expected = {
        0: [[1, 2], [3, 4]],  # identity
        1: [[2, 1], [4, 3]],  # left-right flip
        2: [[3, 4], [1, 2]],  # up-down flip
        3: [[4, 3], [2, 1]],  # half turn
        4: [[2, 4], [1, 3]],  # quarter turn
        5: [[3, 1], [4, 2]],  # three-quarter turn
        6: [[1, 3], [2, 4]],  # transpose
        7: [[4, 2], [3, 1]],  # anti-transpose
    }
    for view, pixels in expected.items():
        assert apply_view(corners, view)[:, :, 0].tolist() == pixels


def test_the_views_are_the_dihedral_group() -> None:
    """Eight different elements, closed under composition; each row and column of the table holds every element once."""
    table = np.array([[which_view(apply_view(VIEWS[first], second)) for second in range(8)] for first in range(8)])
    for line in (*table, *table.T):
        assert sorted(line) == list(range(8))
    assert not np.array_equal(table, table.T)  # of the groups of eight it is not an abelian one
    assert np.count_nonzero(np.diag(table) == 0) == 6  # identity, half turn and four mirrors; the quaternions have two


def test_the_first_four_views_are_a_group_of_their_own() -> None:
    table = {which_view(apply_view(VIEWS[first], second)) for first in range(4) for second in range(4)}
    assert table == {0, 1, 2, 3}


def test_a_quarter_turn_of_a_wide_image_is_tall() -> None:
    wide = np.zeros((2, 5, 3), dtype=np.uint8)
    assert [apply_view(wide, view).shape[:2] for view in range(8)] == [(2, 5)] * 4 + [(5, 2)] * 4


def test_a_view_copies_no_pixel() -> None:
    assert all(np.shares_memory(view, IMAGE) for view in VIEWS)


def test_a_ninth_view_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 to 7"):
        apply_view(IMAGE, 8)
