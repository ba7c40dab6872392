"""The contact sheet shows the images' own pixels, one row a class."""

import numpy as np

from m2d.classes import ISIC7
from m2d.generation.contact_sheet import contact_sheet


def flat(count: int, level: int, size: int = 32) -> np.ndarray:
    return np.full((count, size, size, 3), level, np.uint8)


def count_of(sheet: np.ndarray, colour: tuple[int, ...]) -> int:
    return int((sheet == colour).all(-1).sum())


def test_every_pixel_of_an_image_becomes_a_square_of_equal_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet({"MEL": noise}, title="", scale=3))
    enlarged = noise[0].repeat(3, 0).repeat(3, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (24, 24, 3))[:, :, 0]
    corners = np.argwhere((windows[..., 0, 0, :] == enlarged[0, 0]).all(-1))
    assert any(np.array_equal(windows[y, x], enlarged) for y, x in corners)


def test_every_image_is_on_the_sheet_and_each_row_has_its_class_colour() -> None:
    sheet = contact_sheet({d.code: flat(2, 100 + n) for n, d in enumerate(ISIC7.diagnoses)}, title="", scale=2)
    pixels = np.asarray(sheet)
    for number, diagnosis in enumerate(ISIC7.diagnoses):
        assert count_of(pixels, (100 + number,) * 3) >= 2 * 64 * 64
        assert count_of(pixels, tuple(bytes.fromhex(diagnosis.colour[1:]))) >= 4 * 400
    assert {sheet.getpixel((x, y)) for x in (0, sheet.width - 1) for y in (0, sheet.height - 1)} == {(255, 255, 255)}


def test_small_images_are_enlarged_and_large_ones_left_alone() -> None:
    assert contact_sheet({"MEL": flat(8, 9, size=16)}, title="").width > 8 * 112
    assert contact_sheet({"MEL": flat(2, 9, size=256)}, title="").height < 256 + 160


def test_a_long_caption_is_wrapped_inside_the_sheet() -> None:
    plain = contact_sheet({"MEL": flat(1, 9)}, title="Title")
    captioned = contact_sheet({"MEL": flat(1, 9)}, title="Title", caption="word " * 200)
    assert captioned.width == plain.width
    assert captioned.height > plain.height + 100
    assert (np.asarray(captioned)[:, -10:] == 255).all()


def test_a_class_without_images_keeps_its_row() -> None:
    both = contact_sheet({"MEL": flat(2, 9), "DF": flat(0, 9)}, title="")
    assert both.height > contact_sheet({"MEL": flat(2, 9)}, title="").height
