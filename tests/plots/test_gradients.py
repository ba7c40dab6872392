"""A histogram for each network, its median where the counts put it."""

import numpy as np
import pytest
from plots.pictures import pixels_of

from m2d.plots.charts import gradient_figure, gradient_histogram, median_of

pytestmark = pytest.mark.filterwarnings("error")


def test_the_median_divides_the_counts_in_halves() -> None:
    assert median_of([0, 10, 0], [-4.0, -3.0, -2.0, -1.0]) == pytest.approx(-2.5)
    assert median_of([1, 1, 2], [0.0, 1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert median_of([3, 1], [0.0, 3.0, 4.0]) == pytest.approx(2.0)


def test_the_median_is_near_that_of_the_values() -> None:
    values = np.random.default_rng(0).normal(-4, 1, 5000)
    counts, edges = np.histogram(values, 60, (-12, 2))
    assert median_of(counts.tolist(), edges.tolist()) == pytest.approx(np.median(values), abs=0.02)


def test_bars_are_shares_of_a_networks_gradients() -> None:
    figure = gradient_figure({"denoiser": ([1, 3], [-6.0, -5.0, -4.0])}, step=1200)
    (axes,) = figure.axes
    assert axes.get_title("left") == "denoiser: 4 gradients"
    assert axes.patches[0].get_data().values.tolist() == [25, 75]
    assert axes.get_xlabel() == "|gradient| at step 1,200"


def test_networks_share_one_axis_of_sizes() -> None:
    counts = {"autoencoder": ([1, 2], [-9.0, -8.0, -7.0]), "denoiser": ([1, 2], [-3.0, -2.0, -1.0])}
    first, second = gradient_figure(counts, step=1).axes
    assert first.get_xlim() == second.get_xlim()


@pytest.mark.parametrize("counts", [{}, {"denoiser": ([0, 0], [-6.0, -5.0, -4.0])}], ids=["no network", "no gradient"])
def test_nothing_to_count_is_a_picture(counts: dict[str, tuple[list[int], list[float]]]) -> None:
    assert (pixels_of(gradient_histogram(counts, step=1)) != 255).any()


def test_edges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="denoiser: 2 counts and 2 edges"):
        gradient_histogram({"denoiser": ([1, 1], [0.0, 1.0])}, step=1)
