"""Charts of features put every image where the numbers say; the numbers against numpy's SVD and against all pairs."""

import io
from itertools import product

import numpy as np
import pytest
from PIL import Image
from plots.pictures import figure_of, pixels_of

from m2d.classes import ISIC7
from m2d.plots.charts import (
    class_similarities,
    class_similarity,
    cls_projection,
    confusion_matrix_picture,
    gradient_histogram,
    median_of,
    principal_components,
    project_cls,
    similarity_figure,
)

pytestmark = pytest.mark.filterwarnings("error")
MEL, NV, DF = (ISIC7.index(code) for code in ("MEL", "NV", "DF"))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- pictures


def test_every_point_of_a_class_is_in_its_chart_and_in_that_of_all() -> None:
    given = np.random.default_rng(0).uniform(-1, 1, (20, 2)), np.random.default_rng(1).uniform(-0.9, 0.9, (6, 2))
    real, generated, _ = project_cls(*given)
    figure = figure_of(cls_projection, given[0], np.repeat([MEL, NV], 10), given[1], np.repeat([MEL, NV], 3))
    charts = {axes.get_title("left"): axes for axes in figure.axes}
    mel = charts["MEL melanoma\n10 real, 3 generated"]
    shown = [one.get_offsets().data for one in mel.collections if len(one.get_offsets())]
    np.testing.assert_allclose(shown[0], real[10:])
    np.testing.assert_allclose(shown[1], real[:10])
    np.testing.assert_allclose(shown[-1], generated[:3])
    everybody = charts["all classes\n20 real, 6 generated"].collections
    assert sum(len(one.get_offsets()) for one in everybody) == 26
    assert "DF dermatofibroma\n0 real, 0 generated" in charts


def test_a_point_far_away_is_drawn_at_the_edge() -> None:
    real = np.concatenate([normal(99, 2), [[1e6, 0.0]]])
    figure = figure_of(cls_projection, real, np.full(100, NV), np.zeros((0, 2)), np.zeros(0, int))
    low, high = figure.axes[0].get_xlim()
    assert np.abs([low, high]).max() < 5 < np.abs(project_cls(real, real)[0]).max()
    drawn = np.concatenate([one.get_offsets().data for one in figure.axes[0].collections])
    assert len(drawn) == 100
    assert low < drawn[:, 0].min() < drawn[:, 0].max() < high


def test_real_points_are_hollow_and_generated_ones_filled() -> None:
    figure = figure_of(cls_projection, normal(4, 2), np.full(4, MEL), normal(4, 2), np.full(4, MEL))
    real, generated = (one for one in figure.axes[0].collections if len(one.get_offsets()))
    assert len(real.get_facecolor()) == 0
    assert generated.get_facecolor()[0].tolist() == [0, 0, 0, 1]  # melanoma is black


def test_the_table_shows_the_numbers_beside_the_counts() -> None:
    numbers = {code: {} for code in ISIC7.codes} | {"MEL": {"generated_to_own": 0.5, "real_to_own": 0.25}}
    figure = similarity_figure(numbers, dict.fromkeys(ISIC7.codes, (0, 0)) | {"MEL": (945, 12)})
    row = [text.get_text() for text in figure.axes[1].texts if text.get_position()[1] == MEL]
    assert row == ["945, 12", "+0.50", "+0.25", "–", "–"]


@pytest.mark.parametrize(("count", "drawn"), [(0, 2), (1, 0), (20, 1)])
def test_charts_of_classes_are_drawn_for_any_number_of_images(count: int, drawn: int) -> None:
    features = normal(count, 5), np.full(count, MEL), normal(drawn, 5), np.full(drawn, DF)
    assert (pixels_of(cls_projection(*features)) != 255).any()
    png, numbers = class_similarity(*features)
    assert Image.open(io.BytesIO(png)).size == (1320, 504)
    assert set(numbers) == set(ISIC7.codes)


def test_charts_of_equal_features_are_drawn() -> None:
    equal, labels = np.full((6, 5), 0.3), np.array([MEL] * 3 + [NV] * 3)
    assert (pixels_of(cls_projection(equal, labels, equal, labels)) != 255).any()
    assert class_similarity(equal, labels, equal, labels)[1]["MEL"]["generated_to_own"] == 0.0


@pytest.mark.parametrize("labels", [[0, 0], [0, 0, -1], [0, 0, 7]])
def test_labels_that_do_not_fit_their_features_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="labels are"):
        cls_projection(normal(3, 2), np.array(labels), normal(1, 2), np.zeros(1, int))


def test_the_median_divides_the_counts_in_halves() -> None:
    assert median_of([0, 10, 0], [-4.0, -3.0, -2.0, -1.0]) == pytest.approx(-2.5)
    assert median_of([1, 1, 2], [0.0, 1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert median_of([3, 1], [0.0, 3.0, 4.0]) == pytest.approx(2.0)
    values = normal(5000) - 4
    counts, edges = np.histogram(values, 60, (-12, 2))
    assert median_of(counts.tolist(), edges.tolist()) == pytest.approx(np.median(values), abs=0.02)


def test_bars_are_shares_of_a_networks_gradients_on_one_axis_of_sizes() -> None:
    counts = {"autoencoder": ([1, 2], [-9.0, -8.0, -7.0]), "denoiser": ([1, 3], [-6.0, -5.0, -4.0])}
    first, second = figure_of(gradient_histogram, counts, step=1200).axes
    assert second.get_title("left") == "denoiser: 4 gradients"
    assert second.patches[0].get_data().values.tolist() == [25, 75]
    assert second.get_xlabel() == "|gradient| at step 1,200"
    assert first.get_xlim() == second.get_xlim()


@pytest.mark.parametrize("counts", [{}, {"denoiser": ([0, 0], [-6.0, -5.0, -4.0])}], ids=["no network", "no gradient"])
def test_nothing_to_count_is_a_picture(counts: dict[str, tuple[list[int], list[float]]]) -> None:
    assert (pixels_of(gradient_histogram(counts, step=1)) != 255).any()


def test_a_confusion_shows_the_counts_and_shares_of_each_row() -> None:
    matrix = np.zeros((7, 7), int)
    matrix[MEL, [MEL, NV]] = 30, 10
    axes = figure_of(confusion_matrix_picture, matrix.tolist(), "A probe", ISIC7.codes).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts if text.get_text() != "0"} == {
        (MEL, MEL): "30", (NV, MEL): "10"
    }  # fmt: skip
    assert axes.images[0].get_array()[MEL, MEL] == 0.75


# --- principal components


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)], ids=["many rows", "many columns"])
def test_components_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    features = normal(*shape) * np.linspace(1, 3, shape[1])
    mean, axes, share = principal_components(features, 3)
    _, singular, rows = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(mean, features.mean(axis=0))
    np.testing.assert_allclose(share, singular[:3] ** 2 / (singular**2).sum())
    np.testing.assert_allclose(np.abs((axes * rows[:3]).sum(axis=1)), 1.0)
    assert (axes[np.arange(3), np.abs(axes).argmax(axis=1)] > 0).all(), "so that a picture does not turn over"


def test_components_that_are_not_there_are_zero() -> None:
    _, axes, share = principal_components(np.outer(np.arange(5.0), [3.0, 4.0]), 3)
    np.testing.assert_allclose(share, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(axes, [[0.6, 0.8], [0, 0], [0, 0]], atol=1e-12)
    for count in (4, 1, 0):  # equal rows, one, none
        assert not any(found.any() for found in principal_components(np.ones((count, 3)), 2)[1:])


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        principal_components(np.full((4, 3), np.nan), 2)


def test_generated_features_do_not_move_real_ones_and_a_copy_falls_on_its_original() -> None:
    real = normal(30, 6)
    near, far = project_cls(real, real[7:9]), project_cls(real, 1e4 + normal(500, 6, seed=1))
    np.testing.assert_array_equal(near[0], far[0])
    np.testing.assert_array_equal(near[2], far[2])
    np.testing.assert_allclose(near[1], near[0][7:9])


def test_the_unit_of_a_feature_does_not_change_the_projection() -> None:
    real, generated = normal(30, 6), normal(4, 6, seed=1)
    scale, shift = np.array([1, 10, 100, 1e3, 1e4, 1e5]), 7.0
    plain, scaled = project_cls(real, generated), project_cls(real * scale + shift, generated * scale + shift)
    for one, other in zip(plain[:2], scaled[:2], strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1], ids=["spread 0", "spread of rounding"])
def test_a_feature_that_is_constant_among_real_images_is_left_out(value: float) -> None:
    """A unit that never fires has no spread to divide by."""
    real, generated = normal(30, 4), normal(5, 4, seed=1)
    with_constant = project_cls(np.c_[real, np.full(30, value)], np.c_[generated, np.full(5, 99.0)])
    np.testing.assert_allclose(with_constant[1], project_cls(real, generated)[1])


# --- how alike classes are


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_the_numbers_equal_those_of_all_pairs_by_hand() -> None:
    draw = np.random.default_rng(0)
    members = {MEL: draw.normal(size=(4, 5)), NV: draw.normal(size=(9, 5)) + 1, DF: draw.normal(size=(2, 5)) - 1}
    generated = draw.normal(size=(3, 5))
    centre = np.mean([features.mean(axis=0) for features in members.values()], axis=0)
    every, labels = np.concatenate(list(members.values())), np.repeat(list(members), [4, 9, 2])
    found = class_similarities(every, labels, generated, np.full(3, MEL))["MEL"]
    real, drawn = {k: v - centre for k, v in members.items()}, generated - centre
    expected = {
        "generated_to_own": [cosine(a, b) for a, b in product(drawn, real[MEL])],
        "generated_to_others": [np.mean([cosine(a, b) for a, b in product(drawn, real[k])]) for k in (NV, DF)],
        "real_to_own": [cosine(real[MEL][i], real[MEL][j]) for i, j in product(range(4), range(4)) if i != j],
        "real_to_others": [np.mean([cosine(a, b) for a, b in product(real[MEL], real[k])]) for k in (NV, DF)],
    }
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()})


def test_a_feature_does_not_meet_itself() -> None:
    """Each of two orthogonal features has cosine 0 with the other and 1 with itself, which is left out."""
    real = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
    numbers = class_similarities(real, np.array([MEL, MEL, NV, NV]), np.zeros((0, 3)), np.zeros(0, int))
    assert numbers["MEL"]["real_to_own"] == pytest.approx(0.0)  # with themselves: 0.5


def test_the_largest_class_is_not_the_centre() -> None:
    real = np.concatenate([np.tile([1.0, 0.1], (98, 1)), np.tile([-1.0, 0.1], (2, 1))])
    numbers = class_similarities(real, np.repeat([NV, MEL], [98, 2]), real[:1], np.array([NV]))
    assert numbers["NV"]["generated_to_own"] == pytest.approx(1.0)
    assert numbers["NV"]["generated_to_others"] == pytest.approx(-1.0)


def test_numbers_that_cannot_be_had_are_left_out() -> None:
    real, labels = np.array([[1.0, 0], [0, 1], [0, 2]]), np.array([MEL, NV, NV])
    numbers = class_similarities(real, labels, np.array([[1.0, 1]]), np.array([DF]))
    assert list(numbers) == list(ISIC7.codes)
    assert set(numbers["MEL"]) == {"real_to_others"}  # one image alone has no other of its own
    assert set(numbers["DF"]) == {"generated_to_others"}
    assert numbers["VASC"] == {}
    none = class_similarities(np.zeros((0, 3)), np.zeros(0, int), np.ones((1, 3)), np.array([MEL]))
    assert none == {code: {} for code in ISIC7.codes}


def test_equal_features_have_no_direction() -> None:
    real, labels = np.full((6, 3), 0.1), np.repeat([MEL, NV], 3)
    assert (real[:3].mean(axis=0) != 0.1).all()  # so centring leaves rounding, which points somewhere
    assert set(class_similarities(real, labels, real, labels)["MEL"].values()) == {0.0}
