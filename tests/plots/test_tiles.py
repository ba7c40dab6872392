"""Pages show the images' own pixels, maps beside their images, reconstructions under their originals."""

import math

import numpy as np
import pytest
from matplotlib import colormaps
from plots.pictures import enlarged, noise, place_of, shows

from m2d.classes import ISIC7
from m2d.plots.tiles import alignment_map, difference, heat, patch_colours, patch_pca, reconstruction_grid

pytestmark = pytest.mark.filterwarnings("error")
MEL, NV, DF = (ISIC7.index(code) for code in ("MEL", "NV", "DF"))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def grid(originals: np.ndarray, reconstructed: np.ndarray, psnr: float = 30.0) -> np.ndarray:
    count = len(originals)
    return np.asarray(reconstruction_grid(originals, reconstructed, [0] * count, [psnr] * count, step=10))


def test_each_original_stands_above_its_reconstruction_above_their_difference() -> None:
    originals, reconstructed = noise(3, 64, seed=1), noise(3, 64, seed=2)
    page = grid(originals, reconstructed)
    columns = []
    for original, copy in zip(originals, reconstructed, strict=True):
        gap = np.minimum(4 * np.abs(original.astype(int) - copy.astype(int)), 255).astype(np.uint8)
        places = [place_of(page, enlarged(tile, 2)) for tile in (original, copy, gap)]  # 64 px are shown as 128
        assert len({x for x, _ in places}) == 1
        assert [y - places[0][1] for _, y in places] == [0, 136, 272]
        columns.append(places[0][0])
    assert columns == sorted(set(columns))


def test_the_difference_is_absolute_times_four_and_cut_at_white() -> None:
    originals = np.array([10, 20, 0, 255], np.uint8)
    assert difference(originals, np.array([13, 10, 200, 255], np.uint8)).tolist() == [12, 40, 255, 0]


@pytest.mark.parametrize(("side", "factor"), [(8, 16), (128, 1), (256, 1)])
def test_pixels_are_enlarged_by_a_whole_factor(side: int, factor: int) -> None:
    originals = noise(1, side)
    assert place_of(grid(originals, noise(1, side, seed=9)), enlarged(originals[0], factor))


def test_many_images_go_into_rows_on_a_page_of_a_screens_width() -> None:
    page = grid(noise(20, 64), noise(20, 64, seed=3))
    assert page.shape[1] < 1400
    places = [place_of(page, enlarged(image, 2)) for image in noise(20, 64)]
    assert len({y for _, y in places}) == 3  # 8, 8 and 4 would be 7, 7 and 6


def test_the_class_is_told_by_its_colour() -> None:
    images = np.full((7, 32, 32, 3), 200, np.uint8)
    page = np.asarray(reconstruction_grid(images, images, np.arange(7), [30.0] * 7, step=1))
    assert all(shows(page, diagnosis.colour) for diagnosis in ISIC7.diagnoses)


@pytest.mark.parametrize("psnr", [math.inf, math.nan])
def test_equal_images_have_no_number_and_are_drawn(psnr: float) -> None:
    images = np.full((1, 16, 16, 3), 7, np.uint8)
    assert shows(grid(images, images, psnr), "#070707")


@pytest.mark.parametrize(("side", "cells", "factors"), [(64, 7, (2, 18)), (64, 16, (2, 8)), (256, 14, (1, 18))])
def test_each_grid_of_patches_stands_beside_its_image(side: int, cells: int, factors: tuple[int, int]) -> None:
    images, patches = noise(2, side), normal(2, cells * cells, 6)
    page = np.asarray(patch_pca(images, patches, [MEL, DF]))
    for image, colour in zip(images, patch_colours(patches)[0], strict=True):
        x, y = place_of(page, enlarged(image, factors[0]))
        assert place_of(page, enlarged(colour, factors[1])) == (x + side * factors[0] + 8, y)


def test_each_alignment_map_stands_beside_its_image() -> None:
    images, cosine = noise(2, 64), np.random.default_rng(0).uniform(0, 1, (2, 8, 8))
    page = np.asarray(alignment_map(images, cosine, [MEL, NV]))
    for image, one in zip(images, cosine, strict=True):
        x, y = place_of(page, enlarged(image, 2))
        assert place_of(page, enlarged(heat(one), 16)) == (x + 136, y)


def test_a_cosine_has_its_colour_whatever_the_others_are() -> None:
    """Else two steps would not compare."""
    assert heat(np.array([0.5, 0.0])).tolist()[0] == heat(np.array([0.5, 0.9])).tolist()[0]
    np.testing.assert_allclose(heat(np.array([1.0]))[0], 255 * np.array(colormaps["viridis"](1.0)[:3]), atol=1)
    below, zero, missing = heat(np.array([-0.7, 0.0, np.nan])).tolist()
    assert below == zero
    assert missing == [224, 224, 224]


def test_no_images_one_image_and_equal_values_are_pages() -> None:
    assert (grid(noise(0, 32), noise(0, 32)) != 255).any()
    assert alignment_map(noise(0, 8), np.zeros((0, 4, 4)), []).size[0] > 500
    assert patch_pca(noise(0, 8), np.zeros((0, 4, 3)), []).size[0] > 500
    assert shows(np.asarray(patch_pca(noise(1, 8), np.ones((1, 4, 3)), [MEL])), "#808080")
    assert alignment_map(noise(1, 8), np.full((1, 4, 4), np.nan), [MEL]).size[0] > 500


def test_arrays_that_do_not_fit_are_refused() -> None:
    two, one = noise(2, 32), noise(1, 32)
    for draw in (
        lambda: grid(two, one),
        lambda: grid(one, one.astype(np.float32)),
        lambda: reconstruction_grid(two, two, [0], [1.0, 2.0], step=1),
        lambda: reconstruction_grid(two, two, [0, 1], [1.0], step=1),
        lambda: alignment_map(two, np.zeros((1, 4, 4)), [0, 0]),
        lambda: alignment_map(two, np.zeros((2, 4, 4)), [0, -1]),
        lambda: alignment_map(two, np.zeros((2, 16)), [0, 0]),
        lambda: patch_pca(one, normal(1, 6, 3), [0]),
    ):
        with pytest.raises(ValueError, match=r"."):
            draw()


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
    red = patch_colours(patches)[0][0, :, :, 0].astype(int).ravel()[10:390]
    assert np.abs(np.diff(red)).max() <= 2
    assert np.ptp(red) > 200


def test_patches_of_all_images_share_their_colours() -> None:
    patches = normal(1, 9, 5)
    colours, _ = patch_colours(np.concatenate([patches, patches]))
    np.testing.assert_array_equal(colours[0], colours[1])
