"""Each quantity of a log has its chart; scales, epochs and colours are what the records call for."""

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots.pictures import figure_of, pixels_of

from m2d.plots.curves import (
    Series,
    envelope,
    names_of,
    running_median,
    series,
    training_curves,
    training_panels,
    validation_curves,
)

pytestmark = pytest.mark.filterwarnings("error")


def log(count: int, **values: float) -> list[dict[str, Any]]:
    """Records every ten steps, forty steps an epoch; a value rises by 1 % a record."""
    names = {name.replace("__", "/"): value for name, value in values.items()}
    return [
        {"step": 10 * n, "time": 1.7e9 + n, "epoch": n / 4} | {name: v * 1.01**n for name, v in names.items()}
        for n in range(1, count + 1)
    ]


def chart(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title("left") == title)


def labels_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_a_chart_stands_for_each_quantity_that_was_recorded_and_for_no_other() -> None:
    records = log(
        3, loss__reconstruction=1, loss__kl=900, loss__diffusion=1, loss__discriminator=1, images_per_s=20,
        learning_rate__denoiser=1e-4, gradient_norm__denoiser=1, skipped_steps=0
    )  # fmt: skip
    assert [panel.title for panel in training_panels(records)] == [
        "VAE: reconstruction, perceptual",
        "VAE: KL divergence",
        "U-Net: diffusion",
        "Discriminator",
        "Learning rate",
        "Gradient norm",
        "Throughput (images/s)",
    ]


def test_modules_of_a_network_share_a_chart_of_their_own() -> None:
    norms = {"gradient_norm/denoiser": 1, "gradient_norm/denoiser.mid_block": 2, "gradient_norm/denoiser.conv_in": 3}
    panels = {panel.title: panel.names for panel in training_panels([{"step": 1, **norms}])}
    assert panels["Gradient norm"] == {"gradient_norm/denoiser": "denoiser"}
    assert list(panels["Gradient norm within denoiser"].values()) == ["mid_block", "conv_in"]


def test_a_quantity_that_nobody_knew_of_is_drawn_too() -> None:
    panels = training_panels(log(3, loss__kl=1, brand_new_quantity=0.3))
    assert panels[-1].title == "brand_new_quantity"
    assert len(figure_of(validation_curves, log(3, val__psnr_db=30, val__fid=12)).axes) >= 2


def test_skipped_steps_are_drawn_once_there_are_any() -> None:
    none, some = log(3, skipped_steps=0), [{"step": 1, "skipped_steps": 0.0}, {"step": 2, "skipped_steps": 1.0}]
    assert training_panels(none) == []
    assert [panel.title for panel in training_panels(some)] == ["Skipped steps so far"]


def test_losses_that_span_decades_are_drawn_on_a_logarithmic_scale_and_negative_ones_are_not() -> None:
    records = log(300, loss__kl=1, loss__alignment=-0.5)  # 1.01^300 = 19.8
    figure = figure_of(training_curves, records)
    assert chart(figure, "VAE: KL divergence").get_yscale() == "log"
    assert chart(figure, "Alignment (-1 is perfect)").get_yscale() == "linear"


def test_what_was_recorded_is_faint_and_its_median_bold_and_a_learning_rate_is_drawn_as_recorded() -> None:
    figure = figure_of(training_curves, log(50, loss__kl=1, learning_rate__denoiser=1))
    faint, bold = chart(figure, "VAE: KL divergence").get_lines()
    (rate,) = chart(figure, "Learning rate").get_lines()
    assert faint.get_alpha() < 0.5 < 1.5 < bold.get_linewidth()
    for line in (faint, rate):
        np.testing.assert_allclose(line.get_ydata(), 1.01 ** np.arange(1, 51))


def test_thirty_thousand_records_are_few_points() -> None:
    records = log(1000, loss__kl=1)
    records = [record | {"step": n, "epoch": n / 500} for n, record in enumerate(30 * records)]
    for line in chart(figure_of(training_curves, records), "VAE: KL divergence").get_lines():
        assert len(np.asarray(line.get_xdata())) <= 600


def test_epochs_stand_above_their_steps_where_records_have_them() -> None:
    above = chart(figure_of(training_curves, log(41, loss__kl=1)), "VAE: KL divergence").child_axes[0]
    places = dict(zip([tick.get_text() for tick in above.get_xticklabels()], above.get_xticks(), strict=True))
    assert places == pytest.approx({"epoch 2": 80, "4": 160, "6": 240, "8": 320, "10": 400})
    records = [{"step": step, "loss/kl": 1.0 + step} for step in range(5)]
    assert chart(figure_of(training_curves, records), "VAE: KL divergence").child_axes == []


def test_a_network_has_one_colour_in_every_chart() -> None:
    figure = figure_of(
        training_curves, log(3, learning_rate__denoiser=1, gradient_norm__autoencoder=1, gradient_norm__denoiser=1)
    )
    rate = chart(figure, "Learning rate").get_lines()[0]
    norm = chart(figure, "Gradient norm").get_lines()[1]
    assert rate.get_color() == norm.get_color()


def test_the_best_value_is_ringed_at_its_step() -> None:
    values = [30.0, 33.5, 31.0]
    records = [{"step": 100 * n, "val/psnr_db": value, "val/perceptual": value} for n, value in enumerate(values)]
    figure = figure_of(validation_curves, records)
    assert labels_of(chart(figure, "PSNR (dB, more is better)")) == ["last 31", "best 33.5 at 100"]
    assert labels_of(chart(figure, "Perceptual distance (less is better)")) == ["last 31", "best 30 at 0"]


def test_a_measure_that_moves_by_rounding_only_is_drawn_flat() -> None:
    records = [{"step": n, "val/psnr_db": 36.9 + 1e-7 * n} for n in range(5)]
    low, high = chart(figure_of(validation_curves, records), "PSNR (dB, more is better)").get_ylim()
    assert high - low > 0.1


@pytest.mark.parametrize(
    ("values", "label"), [([1.0, math.nan, 2.0, math.inf], "KL 2"), ([math.nan], "KL: not finite")]
)
def test_values_that_are_not_finite_are_left_out_of_curve_and_legend(values: list[float], label: str) -> None:
    records = [{"step": n, "loss/kl": value} for n, value in enumerate(values)]
    assert labels_of(chart(figure_of(training_curves, records), "VAE: KL divergence")) == [label]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_records_are_a_picture(count: int) -> None:
    drawn = pixels_of(training_curves(log(count, loss__kl=1, images_per_s=0, learning_rate__denoiser=1e-4)))
    assert (drawn != 255).any()
    assert (pixels_of(validation_curves(log(count, val__psnr_db=30))) != 255).any()


def test_one_column_is_as_narrow_as_one_chart() -> None:
    records = log(3, loss__kl=1, loss__diffusion=1, images_per_s=1)
    assert pixels_of(training_curves(records)).shape[1] == 3 * 480
    assert pixels_of(training_curves(records, columns=1)).shape[1] == 480


def ramp(count: int) -> Series:
    return Series(np.arange(count, dtype=float), np.arange(count, dtype=float))


def test_steps_are_sorted_the_last_record_of_a_step_counts_and_what_is_not_finite_is_a_gap() -> None:
    records = [{"step": 20, "a": 2.0}, {"step": 10, "a": 1.0}, {"step": 20, "a": 3.0}, {"step": 30, "b": 9.0}]
    found = series([*records, {"step": 40, "a": math.inf}], "a")
    assert found.steps.tolist() == [10, 20, 40]
    assert found.finite.tolist() == [1.0, 3.0]


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
    assert envelope(ramp(600), most=600).values.tolist() == list(range(600))


def test_the_running_median_ignores_a_spike_and_begins_where_the_curve_begins() -> None:
    """A loss falls most in its first records; a median over later ones would hide it."""
    values = np.ones(101)
    values[50] = 1000.0
    assert running_median(Series(np.arange(101.0), values)).values.tolist() == [1.0] * 101
    assert running_median(Series(np.arange(50.0), 100 * 0.5 ** np.arange(50))).values[0] == 100
    assert running_median(ramp(3)).values.tolist() == [0, 1, 2]


def test_the_running_median_of_a_long_ramp_stays_on_it() -> None:
    smooth = running_median(ramp(30_000), most=300)
    assert len(smooth.steps) == 300
    inner = slice(0, -10)  # the last windows look back only
    assert np.abs(smooth.values - smooth.steps)[inner].max() < 1.0
