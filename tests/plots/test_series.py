"""A log's curve keeps its spikes when thinned, and its course when smoothed."""

import math

import numpy as np

from m2d.plots.curves import Series, envelope, names_of, running_median, series


def ramp(count: int) -> Series:
    return Series(np.arange(count, dtype=float), np.arange(count, dtype=float))


def test_steps_are_sorted_and_the_last_record_of_a_step_counts() -> None:
    records = [{"step": 20, "a": 2.0}, {"step": 10, "a": 1.0}, {"step": 20, "a": 3.0}, {"step": 30, "b": 9.0}]
    found = series(records, "a")
    assert found.steps.tolist() == [10, 20]
    assert found.values.tolist() == [1.0, 3.0]


def test_values_that_are_not_finite_are_gaps() -> None:
    records = [{"step": step, "a": value} for step, value in enumerate([1.0, math.inf, math.nan, 4.0])]
    assert series(records, "a").finite.tolist() == [1.0, 4.0]


def test_names_are_those_of_numbers_and_not_the_axes() -> None:
    records = [{"step": 1, "time": 2.0, "epoch": 0.1, "b": 1, "note": "text", "none": None}, {"step": 2, "a": 0.5}]
    assert names_of(records) == ["b", "a"]


def test_thinning_keeps_a_single_spike_and_a_single_dip() -> None:
    values = np.zeros(30_000)
    values[12_345], values[12_346] = 7.0, -3.0
    thin = envelope(Series(np.arange(30_000.0), values), most=600)
    assert len(thin.steps) <= 600
    assert (thin.values.max(), thin.values.min()) == (7.0, -3.0)
    assert (np.diff(thin.steps) > 0).all()


def test_a_short_curve_is_not_thinned() -> None:
    assert envelope(ramp(600), most=600).values.tolist() == list(range(600))


def test_the_running_median_ignores_a_spike() -> None:
    values = np.ones(101)
    values[50] = 1000.0
    assert running_median(Series(np.arange(101.0), values)).values.tolist() == [1.0] * 101


def test_the_running_median_of_a_long_ramp_stays_on_it() -> None:
    smooth = running_median(ramp(30_000), most=300)
    assert len(smooth.steps) == 300
    inner = slice(0, -10)  # the last windows look back only
    assert np.abs(smooth.values - smooth.steps)[inner].max() < 1.0


def test_the_running_median_begins_where_the_curve_begins() -> None:
    """A loss falls most in its first records; a median over later ones would hide it."""
    values = 100 * 0.5 ** np.arange(50)
    assert running_median(Series(np.arange(50.0), values)).values[0] == 100


def test_three_records_stay_as_they_are() -> None:
    assert running_median(ramp(3)).values.tolist() == [0, 1, 2]
