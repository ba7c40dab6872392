import contextlib
import io
import struct
import threading
import tracemalloc
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2d.data.decode import ImageRejected, decode_image, decode_resized, probe_image

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
LIMIT = 1_000_000


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def decode(encoded: bytes) -> np.ndarray:
    return decode_image(encoded, max_pixels=LIMIT)


def shrink(encoded: bytes, size: int = 16) -> np.ndarray:
    return decode_resized(encoded, size, max_pixels=LIMIT)


def lossless(image_format: str) -> dict[str, Any]:
    return {"lossless": True, "exact": True} if image_format == "WEBP" else {}


def four_corners(width: int = 64, height: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, grey bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = GREY
    return Image.fromarray(pixels)


def corners_of(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """Top left, top right, bottom left, bottom right, each rounded to one of the four colours."""
    height, width = pixels.shape[:2]
    named = np.array([RED, GREEN, BLUE, GREY])
    found = []
    for row in (height // 4, 3 * height // 4):
        for column in (width // 4, 3 * width // 4):
            distances = np.abs(named - pixels[row, column].astype(int)).sum(1)
            assert distances.min() < 30
            found.append(tuple(named[distances.argmin()].tolist()))
    return found


def dermoscopy_like(width: int = 400, height: int = 300) -> Image.Image:
    """A dark ellipse on skin with a smooth gradient: the low frequencies of a real image."""
    rows, columns = np.mgrid[:height, :width]
    radius = np.hypot((rows - height / 2) / height, (columns - width / 2) / width)
    blob = 1 / (1 + np.exp(-(radius - 0.25) * 30))
    pixels = np.stack([90 + 120 * blob, 60 + 90 * blob + columns * 20 / width, 50 + 90 * blob + rows * 20 / height], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_bit_for_bit(image_format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    decoded = decode(encode(Image.fromarray(pixels), image_format, **lossless(image_format)))
    assert (decoded.dtype, decoded.flags.c_contiguous, decoded.flags.writeable) == (np.uint8, True, True)
    np.testing.assert_array_equal(decoded, pixels)


# The corner that EXIF says is shown top left, top right, bottom left, bottom right (EXIF 2.32, tag 0x0112: for 6 the
# stored row 0 is the right-hand side, the stored column 0 the top).
TURNED = {
    1: [RED, GREEN, BLUE, GREY],
    2: [GREEN, RED, GREY, BLUE],
    3: [GREY, BLUE, GREEN, RED],
    4: [BLUE, GREY, RED, GREEN],
    5: [RED, BLUE, GREEN, GREY],
    6: [BLUE, RED, GREY, GREEN],
    7: [GREY, GREEN, BLUE, RED],
    8: [GREEN, GREY, RED, BLUE],
}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_turns_the_picture(image_format: str, orientation: int) -> None:
    encoded = encode(four_corners(64, 32), image_format, exif=with_orientation(orientation))
    size = (64, 32) if orientation < 5 else (32, 64)
    decoded = decode(encoded)
    assert decoded.shape == (size[1], size[0], 3)
    assert corners_of(decoded) == TURNED[orientation]
    assert corners_of(shrink(encoded, 16)) == TURNED[orientation]
    assert probe_image(encoded, max_pixels=LIMIT) == size


def test_compressed_tiff_is_turned_once() -> None:
    encoded = encode(four_corners(), "TIFF", exif=with_orientation(6), compression="tiff_lzw")
    assert corners_of(decode(encoded)) == TURNED[6]
    assert probe_image(encoded, max_pixels=LIMIT) == (32, 64)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("block", [b"MM\0*\xff\xff\xff\xffnonsense", b"nonsense", b""])
def test_broken_exif_leaves_a_sound_picture_unturned(image_format: str, block: bytes) -> None:
    encoded = encode(four_corners(), image_format, exif=b"Exif\0\0" + block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert corners_of(decode(encoded)) == TURNED[1]


RAMP = np.linspace(0, 65535, 256).round().reshape(16, 16)


@pytest.mark.parametrize(
    ("image", "image_format"),
    [
        (Image.fromarray(RAMP.astype(np.uint16)), "PNG"),
        (Image.fromarray(RAMP.astype(np.uint16)), "TIFF"),
        (Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
        (Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    ],
    ids=["PNG", "TIFF", "big endian", "wide integers"],
)
def test_sixteen_bit_grey_is_scaled_and_not_clipped(image: Image.Image, image_format: str) -> None:
    encoded = encode(image, image_format)
    np.testing.assert_array_equal(decode(encoded), np.rint(RAMP / 257)[..., None].repeat(3, 2))
    assert shrink(encoded, 8).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("peak", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_the_range_they_fill(peak: float) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    decoded = decode_image(encode(Image.fromarray(ramp * np.float32(peak)), "TIFF"), max_pixels=LIMIT)
    np.testing.assert_allclose(decoded[..., 2], ramp * 255, atol=0.51)


@pytest.mark.parametrize("values", [np.float32("nan"), np.float32(1e9), np.int32(70_000)])
def test_numbers_of_no_known_scale_are_refused(values: np.generic) -> None:
    encoded = encode(Image.fromarray(np.full((16, 16), values)), "TIFF")
    for read in (probe_image, decode_image):
        with pytest.raises(ImageRejected, match="holds"):
            read(encoded, max_pixels=LIMIT)


def test_grey_becomes_three_equal_channels() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    encoded = encode(Image.fromarray(ramp), "PNG")
    np.testing.assert_array_equal(decode(encoded), ramp[..., None].repeat(3, 2))
    assert shrink(encoded, 8).shape == (8, 8, 3)


def test_one_bit_images_are_resized_through_greys() -> None:
    """A chequerboard of single pixels averages to mid-grey; nearest-neighbour resizing of mode 1 would not."""
    board = (np.indices((64, 64)).sum(0) % 2).astype(bool)
    resized = decode_resized(encode(Image.fromarray(board), "PNG"), 16, max_pixels=LIMIT)
    assert np.abs(resized.astype(int) - 127).max() <= 20


def test_palette_is_looked_up() -> None:
    palette = four_corners().quantize(4)
    assert palette.mode == "P"
    assert corners_of(decode_image(encode(palette, "PNG"), max_pixels=LIMIT)) == TURNED[1]


def test_transparent_entries_and_key_colours_are_laid_on_white() -> None:
    indices = Image.new("P", (16, 16), 0)
    indices.putpalette([10, 20, 30, 200, 0, 0])
    indices.paste(1, (0, 0, 8, 16))
    decoded = decode(encode(indices, "PNG", transparency=0))
    np.testing.assert_array_equal(decoded[:, :8], np.broadcast_to([200, 0, 0], (16, 8, 3)))
    np.testing.assert_array_equal(decoded[:, 8:], 255)
    keyed = encode(Image.new("RGB", (16, 16), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(keyed), np.full((16, 16, 3), 255))


@pytest.mark.parametrize(
    ("mode", "colour", "image_format", "shown"),
    [  # alpha 0.2: 0.2 * colour + 0.8 * 255; alpha 0.4
        *(("RGBA", (200, 100, 0, 51), name, [244, 224, 204]) for name in ("PNG", "TIFF", "WEBP")),
        ("LA", (100, 102), "PNG", [193, 193, 193]),
    ],
)
def test_transparency_is_composited_on_white(mode: str, colour: Any, image_format: str, shown: list[int]) -> None:
    encoded = encode(Image.new(mode, (16, 16), colour), image_format, **lossless(image_format))
    for pixels in (decode(encoded), shrink(encoded, 8)):
        np.testing.assert_allclose(pixels, np.broadcast_to(shown, pixels.shape), atol=1)


@pytest.mark.parametrize(
    ("ink", "colour"), [((0, 255, 255, 0), RED), ((255, 0, 255, 0), GREEN), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_jpeg_shows_its_colour(ink: tuple[int, ...], colour: tuple[int, ...]) -> None:
    """Pillow writes CMYK JPEGs as Adobe does, inverted, with the Adobe marker."""
    encoded = encode(Image.new("CMYK", (64, 64), ink), "JPEG", quality=95)
    assert b"Adobe" in encoded
    for pixels in (decode(encoded), shrink(encoded, 16)):
        np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=4)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(image_format: str) -> None:
    options = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), BLUE)], **lossless(image_format)}
    encoded = encode(Image.new("RGB", (16, 16), RED), image_format, **options)
    np.testing.assert_array_equal(decode(encoded), np.broadcast_to(RED, (16, 16, 3)))


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_the_crop_is_the_centre_square(turned: bool) -> None:
    """48 x 16, red but for the middle third and 3 pixels each side, which the bicubic filter reaches: green is left."""
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:] = RED
    pixels[:, 13:35] = GREEN
    encoded = encode(Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels), "PNG")
    resized = shrink(encoded, 8)
    np.testing.assert_array_equal(resized, np.broadcast_to(GREEN, (8, 8, 3)))
    assert resized.flags.c_contiguous


@pytest.mark.parametrize("shape", [(8, 20_000), (20_000, 8), (9, 8), (31, 1000)])
def test_any_aspect_ratio_gives_a_square(shape: tuple[int, int]) -> None:
    for image_format in ("JPEG", "PNG"):
        encoded = encode(Image.new("RGB", shape, BLUE), image_format)
        resized = shrink(encoded, 64)
        assert resized.shape == (64, 64, 3)
        np.testing.assert_allclose(resized, np.broadcast_to(BLUE, resized.shape), atol=3)


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_draft_decoding_stays_within_grey_levels_of_full_decoding(size: int) -> None:
    encoded = encode(dermoscopy_like(), "JPEG", quality=95, subsampling=0)
    full = Image.fromarray(decode(encoded)).crop((50, 0, 350, 300))
    expected = np.asarray(full.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(shrink(encoded, size) - expected)
    assert difference.mean() < 1.0
    assert difference.max() <= 6


def test_draft_keeps_the_shorter_side_at_least_at_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows, 64 wanted: 1/4 leaves 75, 1/8 would leave 38."""
    loaded: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def recording(self: Image.Image, *args: object, **kwargs: object) -> Image.Image:
        loaded.append(self.size)
        return resize(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", recording)
    encoded = encode(dermoscopy_like(), "JPEG")
    for size in (64, 75, 76, 300, 301):
        shrink(encoded, size)
    assert loaded == [(100, 75), (100, 75), (200, 150), (400, 300), (400, 300)]


def test_fine_stripes_average_out_instead_of_aliasing() -> None:
    """Single-pixel stripes are far above what 16 pixels can hold; an antialiased result is flat mid-grey."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    resized = decode_resized(encode(Image.fromarray(stripes), "PNG"), 16, max_pixels=LIMIT)
    assert np.abs(resized.astype(int) - 127).max() <= 3


# --- what is refused --------------------------------------------------------------------------------------------------


def assert_refused(encoded: bytes, match: str, max_pixels: int = LIMIT) -> None:
    for read in (
        lambda: decode_image(encoded, max_pixels=max_pixels),
        lambda: decode_resized(encoded, 32, max_pixels=max_pixels),
        lambda: probe_image(encoded, max_pixels=max_pixels),
    ):
        with pytest.raises(ImageRejected, match=match) as caught:
            read()
        assert "\n" not in caught.value.reason
        assert len(caught.value.reason) < 300


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.25, 0.6, 0.95])
def test_truncated_files_are_refused(image_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise), image_format)
    assert_refused(encoded[: int(len(encoded) * share)], "unreadable")


def test_a_jpeg_whose_tail_was_never_written_is_refused_and_zeros_after_its_end_do_no_harm() -> None:
    """A broken download into a preallocated file: the right length, zeros from the middle on."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise), "JPEG")
    assert_refused(encoded[: len(encoded) // 2] + bytes(len(encoded) - len(encoded) // 2), "truncated JPEG")
    assert corners_of(decode(encode(four_corners(), "JPEG") + bytes(1000))) == TURNED[1]
    progressive = encode(dermoscopy_like(), "JPEG", progressive=True, quality=95)
    assert_refused(progressive[: int(len(progressive) * 0.8)], "unreadable JPEG")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_a_header_alone_is_refused(image_format: str) -> None:
    encoded = encode(four_corners(), image_format)
    for length in (12, 20, 29):
        assert_refused(encoded[:length], "unreadable|not one of")


OTHER = "not one of JPEG PNG BMP TIFF WEBP"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"this is no image", OTHER),
        (b"BMI of the patient: 24", "unreadable BMP"),
        (b"<html>404</html>", OTHER),
        (b"\0" * 4096, OTHER),
        (encode(four_corners(), "GIF", save_all=True, append_images=[four_corners(32, 64)]), f"format is GIF, {OTHER}"),
        (encode(four_corners(), "PPM"), OTHER),
    ],
)
def test_what_is_no_image_of_these_formats_is_refused(content: bytes, reason: str) -> None:
    assert_refused(content, reason)


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (1, 1)])
def test_slivers_are_refused(size: tuple[int, int]) -> None:
    assert_refused(encode(Image.new("RGB", size), "PNG"), "too small")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_the_pixel_limit_is_exact(image_format: str) -> None:
    encoded = encode(Image.new("RGB", (50, 40)), image_format)
    assert probe_image(encoded, max_pixels=2000) == (50, 40)
    assert_refused(encoded, "50 x 40 is more than max_pixels = 1999", max_pixels=1999)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height grey pixels and whose few bytes do inflate to zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_a_bomb_is_refused_from_its_header_without_decoding(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded a bomb"))
    bomb = png_bomb(100_000, 100_000) if image_format == "PNG" else encode(Image.new("RGB", (3000, 3500)), "WEBP")
    tracemalloc.start()
    try:
        assert_refused(bomb, "more than max_pixels", max_pixels=10_000_000)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF"])
def test_only_max_pixels_counts_and_not_pillows_own_guard(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit and raises above twice that; with a limit of 10 pixels both would show here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    encoded = encode(Image.new("RGB", (64, 64), RED), image_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded).shape == (64, 64, 3)
        assert shrink(encoded, 8).shape == (8, 8, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_tiff_with_broken_tags_is_refused_in_one_line() -> None:
    encoded = bytearray(encode(four_corners(), "TIFF"))
    encoded[8:60] = b"\xff" * 52
    assert_refused(bytes(encoded), "unreadable TIFF")


def test_threads_with_different_limits_do_not_disturb_each_other() -> None:
    encoded = encode(dermoscopy_like(), "JPEG")
    wrong: list[object] = []

    def read(max_pixels: int, refused: bool) -> None:
        for _ in range(30):
            try:
                decode_resized(encoded, 32, max_pixels=max_pixels)
                outcome = False
            except ImageRejected:
                outcome = True
            if outcome is not refused:
                wrong.append((max_pixels, outcome))

    threads = [
        threading.Thread(target=read, args=(limit, limit < 120_000)) for limit in (1000, 120_000, 119_999, LIMIT)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else() -> None:
    """Seeded fuzzing: no other exception may ever reach a run."""
    generator = np.random.default_rng(0)
    originals = [encode(four_corners(), image_format) for image_format in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")]
    originals.append(encode(four_corners(), "TIFF", compression="tiff_lzw"))
    originals.append(encode(four_corners(), "JPEG", exif=with_orientation(6)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for original in originals:
            for _ in range(60):
                damaged = np.frombuffer(original, np.uint8).copy()
                places = generator.integers(0, min(len(damaged), 400), 6)
                damaged[places] = generator.integers(0, 256, 6)
                with contextlib.suppress(ImageRejected):
                    assert decode_resized(damaged.tobytes(), 16, max_pixels=LIMIT).shape == (16, 16, 3)


def profile_of(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...]) -> bytes:
    """An ICC v2 display profile of these primaries (XYZ under D50) and gamma 2.2, by the ICC specification."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big") + b"\0\0"
    name = b"a test"
    description = b"desc\0\0\0\0" + (len(name) + 1).to_bytes(4, "big") + name + bytes(79 + 4)
    tags = [(b"desc", description), (b"wtpt", xyz((0.9642, 1.0, 0.8249))), (b"cprt", b"text\0\0\0\0none\0\0\0\0")]
    tags += [(b"rXYZ", xyz(red)), (b"gXYZ", xyz(green)), (b"bXYZ", xyz(blue))]
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body = len(tags).to_bytes(4, "big"), b""
    for tag, content in tags:
        padded = content + bytes(-len(content) % 4)
        table += tag + (132 + 12 * len(tags) + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += padded
    header = bytearray(128)
    header[0:4] = (len(table) + len(body) + 128).to_bytes(4, "big")
    header[8:12] = b"\x02\x10\0\0"
    header[12:24] = b"mntrRGB XYZ "
    header[36:40] = b"acsp"
    header[68:80] = b"".join(round(value * 65536).to_bytes(4, "big") for value in (0.9642, 1.0, 0.8249))
    return bytes(header) + table + body


def test_an_embedded_colour_profile_is_applied() -> None:
    """Under sRGB's own primaries with red and green exchanged, what the file calls red is green."""
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    for image_format in ("JPEG", "PNG", "TIFF", "WEBP"):
        encoded = encode(picture, image_format, icc_profile=profile_of(green, red, blue))
        for pixels in (decode_image(encoded, max_pixels=LIMIT), decode_resized(encoded, 16, max_pixels=LIMIT)):
            np.testing.assert_allclose(pixels.mean((0, 1)), (40, 200, 90), atol=6)  # gamma 2.2 is not quite sRGB
    np.testing.assert_array_equal(
        decode_image(encode(picture, "PNG", icc_profile=b"no profile"), max_pixels=LIMIT)[0, 0], (200, 40, 90)
    )


@pytest.mark.parametrize(("peak", "mean"), [(4095, 4095), (255, 255), (40000, 65535)])
def test_sixteen_bits_in_a_png_are_scaled_by_what_was_recorded(peak: int, mean: int) -> None:
    """A scanner's 12 bits in a file of 16 are a picture, not a black one."""
    values = np.linspace(0, peak, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.rint(values * 255.0 / mean)
    decoded = decode_image(encode(Image.fromarray(values), "PNG"), max_pixels=LIMIT)[..., 0]
    np.testing.assert_allclose(decoded, expected, atol=1)
