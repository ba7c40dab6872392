"""What fits into one page: nothing is lost before it must be."""

import io

import numpy as np
from PIL import Image

from m2d.experiments.page import Picture, fitted, png_picture


def picture(pixels: np.ndarray) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    found = png_picture(buffer.getvalue())
    assert found is not None
    return found


def smooth(width: int) -> Picture:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.3, 1, 300)[:, None, None]
    return picture((ramp * np.array([1.0, 0.8, 0.6])).astype(np.uint8))


def noise(width: int) -> Picture:
    return picture(np.random.default_rng(0).integers(0, 256, (600, width, 3), dtype=np.uint8))


def pixels_of(shown: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(shown.data)) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_that_fit_stay_as_they_are() -> None:
    given = {"a": smooth(400), "b": noise(100)}
    assert fitted(given, most=10_000_000) == given


def test_the_largest_is_made_lighter_first_and_without_a_loss() -> None:
    large, small = smooth(900), smooth(200)
    found = fitted({"small": small, "large": large}, most=len(large.data) + len(small.data) - 1)
    assert found["small"] == small
    assert found["large"].format == "webp"
    assert (pixels_of(found["large"]) == pixels_of(large)).all()


def test_a_page_that_would_be_too_heavy_still_fits() -> None:
    given = {"a": noise(2000), "b": noise(900)}  # 5.2 MB that no lossless format makes smaller
    found = fitted(given, most=1_000_000)
    assert sum(len(shown.data) for shown in found.values()) <= 1_000_000
    assert found["a"].height / found["a"].width == 600 / 2000


def test_a_cut_file_and_another_format_are_no_picture() -> None:
    whole = smooth(300)
    assert png_picture(whole.data[: len(whole.data) // 2]) is None
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    assert png_picture(buffer.getvalue()) is None
