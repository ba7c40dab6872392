"""Curves in braille: known dots for known values."""

import pytest

from m2d.experiments.curves import Curve, curves, drawn

FULL, EMPTY = "\u28ff", "\u2800"


def curve(*values: float) -> Curve:
    return Curve("x", tuple(range(len(values))), values)


def test_a_rising_line_runs_from_the_lower_left_to_the_upper_right() -> None:
    """A braille cell is U+2800 and the bits of its dots, as Unicode numbers them."""
    # The left cell has dots 7 (0x40) and 6 (0x20), the right one dots 2 (0x02) and 4 (0x08).
    assert drawn(curve(0, 1, 2, 3), width=2, height=1) == [chr(0x2800 + 0x60) + chr(0x2800 + 0x0A)]


def test_a_falling_line_is_its_mirror_image() -> None:
    # Dot 1 (0x01) and dot 5 (0x10), then dot 3 (0x04) and dot 8 (0x80).
    assert drawn(curve(3, 2, 1, 0), width=2, height=1) == [chr(0x2800 + 0x11) + chr(0x2800 + 0x84)]


def test_a_steep_step_is_drawn_without_a_gap() -> None:
    lines = drawn(curve(0, 0, 9, 9), width=2, height=3)
    dots = [[bin(ord(cell) - 0x2800).count("1") for cell in line] for line in lines]
    assert all(sum(line) >= 2 for line in dots)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 2), (24, 3)])
@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 2.0, 1e9), tuple(float(i % 17) for i in range(5000))])
def test_it_fills_its_box_and_no_more(values: tuple[float, ...], width: int, height: int) -> None:
    lines = drawn(curve(*values), width, height)
    assert [len(line) for line in lines] == [width] * height
    assert all(EMPTY <= cell <= FULL for line in lines for cell in line)
    assert any(cell != EMPTY for line in lines for cell in line)


def test_values_that_span_decades_are_drawn_on_a_log_axis() -> None:
    """So powers of ten lie on a straight line."""
    decades = curve(1.0, 10.0, 100.0, 1000.0)
    assert decades.is_log
    assert drawn(decades, 2, 1) == drawn(curve(0, 1, 2, 3), 2, 1)


def test_values_below_zero_are_not() -> None:
    assert not curve(-0.001, 1.0, 1000.0).is_log


def test_a_thinned_curve_keeps_its_ends_and_the_medians_between() -> None:
    values = [1.0, 1.0, 1.0, 5.0, 5.0, 99.0, 7.0, 7.0, 7.0]
    thin = Curve("x", tuple(range(10, 100, 10)), tuple(values)).thinned(3)
    assert (thin.steps[0], thin.steps[-1]) == (10, 90)
    assert thin.values == (1.0, 5.0, 7.0)


def test_curves_are_those_of_the_wanted_measures_with_two_finite_values() -> None:
    records = [
        {"step": 1, "loss/a": 1.0, "loss/b": float("nan"), "learning_rate/x": 0.1, "epoch": 0.1, "loss/text": "?"},
        {"step": 2, "loss/a": 2.0, "loss/b": 3.0, "learning_rate/x": 0.2, "epoch": 0.2, "loss/text": "?"},
    ]
    found = curves(records, "loss/", "learning_rate/")
    assert [(c.name, c.steps, c.values) for c in found] == [
        ("loss/a", (1, 2), (1.0, 2.0)),
        ("learning_rate/x", (1, 2), (0.1, 0.2)),
    ]
