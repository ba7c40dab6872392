"""The page of worst pairs shows the pixels of the right images, turned as found, and marks near-copies."""

import numpy as np
import pytest
from tiny_sets import image_set

from m2d.classes import DIAGNOSES, class_index
from m2d.data.views import apply_view
from m2d.evaluation.images import ImageSet
from m2d.evaluation.memorization import Pair
from m2d.evaluation.report.plots import nearest_pairs

RED, MEL = (0xB0, 0x00, 0x20), class_index("MEL")


def images(seed: int, size: int = 64) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    return image_set([MEL] * 3, pixels=pixels)


def pair(view: int = 0, share: float = 0.5) -> Pair:
    return Pair(
        generated_row=1,
        train_row=2,
        generated_path="g.png",
        train_path="t.png",
        generated_class="MEL",
        train_class="VASC",
        view=view,
        found_by="thumbnails",
        distances={"features": 0.1234, "thumbnails": 0.00042},
        share_of_limit=share,
    )


def holds(page: np.ndarray, tile: np.ndarray) -> bool:
    """Whether the tile stands anywhere on the page, pixel for pixel."""
    corners = np.argwhere((page == tile[0, 0]).all(axis=-1))
    height, width = tile.shape[:2]
    return any(np.array_equal(page[y : y + height, x : x + width], tile) for y, x in corners)


@pytest.mark.parametrize("view", range(8))
def test_a_pair_shows_the_generated_image_turned_and_the_training_image_as_it_is(view: int) -> None:
    generated, train = images(1), images(2)
    page = np.asarray(nearest_pairs([pair(view)], generated, train))
    twice = np.ones((2, 2, 1), dtype=np.uint8)
    assert holds(page, np.kron(apply_view(generated.pixels[1], view), twice))
    assert holds(page, np.kron(train.pixels[2], twice))


def test_the_page_is_white_about_1400_pixels_wide_and_eight_pairs_go_to_a_row() -> None:
    pages = [nearest_pairs([pair()] * count, images(1), images(2)) for count in (1, 8, 9, 16)]
    heights = [page.height for page in pages]
    assert heights[0] == heights[1] < heights[2] == heights[3]
    assert all(1350 <= page.width <= 1400 for page in pages)
    assert {pages[2].getpixel(at) for at in ((0, 0), (pages[2].width - 1, heights[2] - 1))} == {(255, 255, 255)}


def test_stripes_have_the_colours_of_the_two_classes() -> None:
    page = np.asarray(nearest_pairs([pair()], images(1), images(2)))
    colours = {one.code: tuple(bytes.fromhex(one.colour[1:])) for one in DIAGNOSES}
    for code in ("MEL", "VASC"):
        assert (page == colours[code]).all(axis=-1).sum() >= 8 * 128


@pytest.mark.parametrize(("share", "marked"), [(0.9, True), (1.0, True), (1.1, False)])
def test_only_a_pair_within_the_limit_is_red(share: float, marked: bool) -> None:
    blank = images(1)
    blank.pixels[:] = 200
    page = np.asarray(nearest_pairs([pair(share=share)], blank, blank))
    assert (page == RED).all(axis=-1).any() == marked


@pytest.mark.parametrize("size", [8, 96, 140, 256])
def test_images_of_any_size_fit_their_column(size: int) -> None:
    page = nearest_pairs([pair()] * 8, images(1, size), images(2, size))
    assert page.width == nearest_pairs([pair()], images(1), images(2)).width
