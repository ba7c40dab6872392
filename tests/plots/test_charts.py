"""Maps stand beside their images, pixel for pixel; charts of classes put every image where the numbers say."""

import io

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from plots.pictures import enlarged, noise, pixels_of, place_of, shows

from m2d.classes import CLASSES, class_index
from m2d.plots.charts import (
    class_similarity,
    cls_projection,
    gradient_figure,
    gradient_histogram,
    median_of,
    projection_figure,
    similarity_figure,
)
from m2d.plots.features import Projection, patch_colours
from m2d.plots.tiles import alignment_map, heat, patch_pca

pytestmark = pytest.mark.filterwarnings("error")
MEL, NV, DF = (class_index(code) for code in ("MEL", "NV", "DF"))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def uniform(count: int, seed: int = 0) -> np.ndarray:
    """Points of which none lies far away."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2))


@pytest.mark.parametrize(("side", "grid", "factors"), [(64, 7, (2, 18)), (64, 16, (2, 8)), (256, 14, (1, 18))])
def test_each_grid_of_patches_stands_beside_its_image(side: int, grid: int, factors: tuple[int, int]) -> None:
    images, patches = noise(2, side), normal(2, grid * grid, 6)
    page = np.asarray(patch_pca(images, patches, [MEL, DF]))
    colours, _ = patch_colours(patches)
    for image, colour in zip(images, colours, strict=True):
        x, y = place_of(page, enlarged(image, factors[0]))
        assert place_of(page, enlarged(colour, factors[1])) == (x + side * factors[0] + 8, y)


def test_patches_that_are_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="no square"):
        patch_pca(noise(1, 8), normal(1, 6, 3), [0])


def test_each_alignment_map_stands_beside_its_image() -> None:
    images, cosine = noise(2, 64), np.random.default_rng(0).uniform(0, 1, (2, 8, 8))
    page = np.asarray(alignment_map(images, cosine, [MEL, NV]))
    for image, one in zip(images, cosine, strict=True):
        x, y = place_of(page, enlarged(image, 2))
        assert place_of(page, enlarged(heat(one), 16)) == (x + 136, y)


def test_the_colours_of_a_cosine_do_not_depend_on_the_others() -> None:
    """Else two steps would not compare."""
    assert heat(np.array([0.5, 0.0])).tolist()[0] == heat(np.array([0.5, 0.9])).tolist()[0]
    np.testing.assert_allclose(heat(np.array([1.0]))[0], 255 * np.array(colormaps["viridis"](1.0)[:3]), atol=1)


def test_cosines_below_zero_are_drawn_as_zero_and_missing_ones_grey() -> None:
    below, zero, missing = heat(np.array([-0.7, 0.0, np.nan])).tolist()
    assert below == zero
    assert missing == [224, 224, 224]


def test_no_images_one_image_and_equal_values_are_pages() -> None:
    assert alignment_map(noise(0, 8), np.zeros((0, 4, 4)), []).size[0] > 500
    assert patch_pca(noise(0, 8), np.zeros((0, 4, 3)), []).size[0] > 500
    assert shows(np.asarray(patch_pca(noise(1, 8), np.ones((1, 4, 3)), [MEL])), "#808080")
    assert alignment_map(noise(1, 8), np.full((1, 4, 4), np.nan), [MEL]).size[0] > 500


def test_maps_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images beside 1 maps"):
        alignment_map(noise(2, 8), np.zeros((1, 4, 4)), [0, 0])
    with pytest.raises(ValueError, match="one for each"):
        alignment_map(noise(2, 8), np.zeros((2, 4, 4)), [0])
    with pytest.raises(ValueError, match="expected \\[N, h, w\\]"):
        alignment_map(noise(2, 8), np.zeros((2, 16)), [0, 0])


def test_every_point_of_a_class_is_in_its_chart_and_in_that_of_all() -> None:
    points = Projection(uniform(20), uniform(6, seed=1), np.array([0.5, 0.2]))
    real_labels, generated_labels = np.repeat([MEL, NV], 10), np.repeat([MEL, NV], 3)
    charts = {axes.get_title("left"): axes for axes in projection_figure(points, real_labels, generated_labels).axes}
    mel = charts["MEL melanoma\n10 real, 3 generated"]
    others, real, *_, generated = [one.get_offsets().data for one in mel.collections if len(one.get_offsets())]
    np.testing.assert_allclose(others, points.real[10:])
    np.testing.assert_allclose(real, points.real[:10])
    np.testing.assert_allclose(generated, points.generated[:3])
    everybody = charts["all classes\n20 real, 6 generated"].collections
    assert sum(len(one.get_offsets()) for one in everybody) == 26
    assert "DF dermatofibroma\n0 real, 0 generated" in charts


def test_a_point_far_away_is_drawn_at_the_edge() -> None:
    real = np.concatenate([normal(99, 2), [[1e6, 0.0]]])
    figure = projection_figure(Projection(real, np.zeros((0, 2)), np.zeros(2)), np.full(100, NV), np.zeros(0, int))
    low, high = figure.axes[0].get_xlim()
    assert high < 10
    drawn = np.concatenate([one.get_offsets().data for one in figure.axes[0].collections])
    assert len(drawn) == 100
    assert low < drawn[:, 0].min() < drawn[:, 0].max() < high


def test_real_points_are_hollow_and_generated_ones_filled() -> None:
    points = Projection(normal(4, 2), normal(4, 2), np.zeros(2))
    figure = projection_figure(points, np.full(4, MEL), np.full(4, MEL))
    real, generated = (one for one in figure.axes[0].collections if len(one.get_offsets()))
    assert len(real.get_facecolor()) == 0
    assert generated.get_facecolor()[0].tolist() == [0, 0, 0, 1]  # melanoma is black


def test_the_table_shows_the_numbers_beside_the_counts() -> None:
    numbers = {code: {} for code in CLASSES} | {"MEL": {"generated_to_own": 0.5, "real_to_own": 0.25}}
    figure = similarity_figure(numbers, dict.fromkeys(CLASSES, (0, 0)) | {"MEL": (945, 12)})
    row = [text.get_text() for text in figure.axes[1].texts if text.get_position()[1] == MEL]
    assert row == ["945, 12", "+0.50", "+0.25", "–", "–"]


@pytest.mark.parametrize(("count", "drawn"), [(0, 2), (1, 0), (20, 1)])
def test_charts_of_classes_are_drawn_for_any_number_of_images(count: int, drawn: int) -> None:
    features = normal(count, 5), np.full(count, MEL), normal(drawn, 5), np.full(drawn, DF)
    assert (pixels_of(cls_projection(*features)) != 255).any()
    png, numbers = class_similarity(*features)
    assert Image.open(io.BytesIO(png)).size == (1320, 504)
    assert set(numbers) == set(CLASSES)


def test_charts_of_equal_features_are_drawn() -> None:
    equal, labels = np.full((6, 5), 0.3), np.array([MEL] * 3 + [NV] * 3)
    assert (pixels_of(cls_projection(equal, labels, equal, labels)) != 255).any()
    assert class_similarity(equal, labels, equal, labels)[1]["MEL"]["generated_to_own"] == 0.0


def test_labels_that_do_not_fit_their_features_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each"):
        cls_projection(normal(3, 2), np.zeros(2, int), normal(1, 2), np.zeros(1, int))


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
