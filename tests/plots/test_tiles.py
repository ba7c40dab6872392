"""The grid shows the images' own pixels, each original above its reconstruction above their difference."""

import math

import numpy as np
import pytest
from plots.pictures import enlarged, noise, place_of, shows

from m2d.classes import DIAGNOSES
from m2d.plots.tiles import difference, reconstruction_grid

pytestmark = pytest.mark.filterwarnings("error")


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


@pytest.mark.parametrize(("side", "factor"), [(8, 16), (64, 2), (128, 1), (256, 1)])
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
    for diagnosis in DIAGNOSES:
        assert shows(page, diagnosis.colour)


@pytest.mark.parametrize("psnr", [math.inf, math.nan])
def test_equal_images_have_no_number_and_are_drawn(psnr: float) -> None:
    images = np.full((1, 16, 16, 3), 7, np.uint8)
    assert shows(grid(images, images, psnr), "#070707")


def test_no_images_are_a_page_that_says_so() -> None:
    page = grid(noise(0, 32), noise(0, 32))
    assert (page != 255).any()


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same"):
        grid(noise(2, 32), noise(1, 32))
    with pytest.raises(ValueError, match="uint8"):
        grid(noise(1, 32).astype(np.float32), noise(1, 32))
    with pytest.raises(ValueError, match="one for each"):
        reconstruction_grid(noise(2, 32), noise(2, 32), [0], [1.0, 2.0], step=1)
    with pytest.raises(ValueError, match="psnr_db"):
        reconstruction_grid(noise(2, 32), noise(2, 32), [0, 1], [1.0], step=1)
