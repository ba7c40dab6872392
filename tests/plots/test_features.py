"""Principal components against numpy's SVD and planted directions; real features alone choose the axes."""

from itertools import product

import numpy as np
import pytest

from m2d.classes import CLASSES, class_index
from m2d.plots.features import class_similarities, patch_colours, principal_components, project_cls

pytestmark = pytest.mark.filterwarnings("error")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)], ids=["many rows", "many columns"])
def test_components_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    features = normal(*shape) * np.linspace(1, 3, shape[1])
    centred = features - features.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    found = principal_components(features, 3)
    np.testing.assert_allclose(found.share, singular[:3] ** 2 / (singular**2).sum())
    np.testing.assert_allclose(np.abs((found.axes * rows[:3]).sum(axis=1)), 1.0)
    np.testing.assert_allclose(np.abs(found.coordinates(features)), np.abs(centred @ rows[:3].T), atol=1e-10)


def test_the_largest_entry_of_each_axis_is_positive() -> None:
    for seed in range(10):
        axes = principal_components(normal(40, 6, seed=seed), 3).axes
        assert (axes[np.arange(3), np.abs(axes).argmax(axis=1)] > 0).all()


def test_components_that_are_not_there_are_zero() -> None:
    line = np.outer(np.arange(5.0), [3.0, 4.0])
    found = principal_components(line, 3)
    np.testing.assert_allclose(found.share, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.axes, [[0.6, 0.8], [0, 0], [0, 0]], atol=1e-12)


@pytest.mark.parametrize("features", [np.ones((4, 3)), np.ones((1, 3)), np.ones((0, 3))], ids=["equal", "one", "none"])
def test_features_without_variance_have_no_components(features: np.ndarray) -> None:
    found = principal_components(features, 2)
    assert not found.axes.any()
    assert not found.share.any()


def test_planted_components_give_planted_colours_up_to_sign() -> None:
    """Rows of four by four patches vary most, columns less, opposite quarters least; rotated into twelve dimensions."""
    rows, columns = np.divmod(np.arange(16), 4) - np.full((2, 1), 1.5)
    planted = np.stack([9 * rows, 4 * columns, np.sign(rows * columns)], axis=1)
    rotation = np.linalg.qr(normal(12, 12))[0][:3]
    colours, share = patch_colours((planted @ rotation)[None] + 5)
    for channel, plan in enumerate(planted.T):
        drawn = colours[0, :, :, channel].ravel().astype(float)
        assert abs(np.corrcoef(drawn, plan)[0, 1]) > 0.999
        assert {drawn.min(), drawn.max()} == {0, 255}
    np.testing.assert_allclose(share, planted.var(axis=0) / planted.var(axis=0).sum())


def test_one_odd_patch_does_not_take_the_contrast_from_the_rest() -> None:
    patches = np.zeros((1, 400, 2))
    patches[0, :, 0] = np.arange(400)
    patches[0, 399, 0] = 1e6
    red = patch_colours(patches)[0][0, :, :, 0].astype(int)
    assert np.abs(np.diff(red.ravel()[10:390])).max() <= 2
    assert np.ptp(red.ravel()[10:390]) > 200


def test_patches_of_all_images_share_their_colours() -> None:
    patches = normal(1, 9, 5)
    colours, _ = patch_colours(np.concatenate([patches, patches]))
    np.testing.assert_array_equal(colours[0], colours[1])


def test_equal_patches_are_grey() -> None:
    colours, share = patch_colours(np.full((2, 4, 3), 0.1))
    assert (colours == 128).all()
    assert not share.any()


def test_a_number_of_patches_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="50 patches an image are no square"):
        patch_colours(np.zeros((2, 50, 4)))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        patch_colours(np.full((1, 4, 3), np.nan))


def test_generated_features_do_not_move_real_ones() -> None:
    real = normal(30, 6)
    near, far = project_cls(real, real[:3]), project_cls(real, 1e4 + normal(500, 6, seed=1))
    np.testing.assert_array_equal(near.real, far.real)
    np.testing.assert_array_equal(near.share, far.share)


def test_a_generated_copy_of_a_real_image_falls_on_it() -> None:
    real = normal(30, 6)
    found = project_cls(real, real[7:9])
    np.testing.assert_allclose(found.generated, found.real[7:9])


def test_the_unit_of_a_feature_does_not_change_the_projection() -> None:
    real, generated = normal(30, 6), normal(4, 6, seed=1)
    scale, shift = np.array([1, 10, 100, 1e3, 1e4, 1e5]), 7.0
    plain, scaled = project_cls(real, generated), project_cls(real * scale + shift, generated * scale + shift)
    np.testing.assert_allclose(np.abs(plain.real), np.abs(scaled.real), atol=1e-8)
    np.testing.assert_allclose(np.abs(plain.generated), np.abs(scaled.generated), atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1], ids=["spread 0", "spread of rounding"])
def test_a_feature_that_is_constant_among_real_images_is_left_out(value: float) -> None:
    """A unit that never fires has no spread to divide by."""
    real, generated = normal(30, 4), normal(5, 4, seed=1)
    with_constant = project_cls(np.c_[real, np.full(30, value)], np.c_[generated, np.full(5, 99.0)])
    np.testing.assert_allclose(with_constant.generated, project_cls(real, generated).generated)


MEL, NV, DF = (class_index(code) for code in ("MEL", "NV", "DF"))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_the_numbers_equal_those_of_all_pairs_by_hand() -> None:
    draw = np.random.default_rng(0)
    members = {MEL: draw.normal(size=(4, 5)), NV: draw.normal(size=(9, 5)) + 1, DF: draw.normal(size=(2, 5)) - 1}
    generated = draw.normal(size=(3, 5))
    centre = np.mean([features.mean(axis=0) for features in members.values()], axis=0)
    found = class_similarities(
        np.concatenate(list(members.values())),
        np.repeat(list(members), [4, 9, 2]),
        generated,
        np.full(3, MEL),
    )["MEL"]
    real, drawn = {k: v - centre for k, v in members.items()}, generated - centre
    own = [cosine(a, b) for a, b in product(drawn, real[MEL])]
    others = [np.mean([cosine(a, b) for a, b in product(drawn, real[k])]) for k in (NV, DF)]
    pairs = [cosine(real[MEL][i], real[MEL][j]) for i, j in product(range(4), range(4)) if i != j]
    real_others = [np.mean([cosine(a, b) for a, b in product(real[MEL], real[k])]) for k in (NV, DF)]
    assert found["generated_to_own"] == pytest.approx(np.mean(own))
    assert found["generated_to_others"] == pytest.approx(np.mean(others))
    assert found["real_to_own"] == pytest.approx(np.mean(pairs))
    assert found["real_to_others"] == pytest.approx(np.mean(real_others))


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
    assert list(numbers) == list(CLASSES)
    assert set(numbers["MEL"]) == {"real_to_others"}  # one image alone has no other of its own
    assert set(numbers["DF"]) == {"generated_to_others"}
    assert numbers["VASC"] == {}


def test_equal_features_have_no_direction() -> None:
    real, labels = np.full((6, 3), 0.1), np.repeat([MEL, NV], 3)
    assert (real[:3].mean(axis=0) != 0.1).all()  # so centring leaves rounding, which points somewhere
    numbers = class_similarities(real, labels, real, labels)
    assert set(numbers["MEL"].values()) == {0.0}


def test_no_real_features_give_no_numbers() -> None:
    numbers = class_similarities(np.zeros((0, 3)), np.zeros(0, int), np.ones((1, 3)), np.array([MEL]))
    assert numbers == {code: {} for code in CLASSES}
