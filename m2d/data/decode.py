"""Encoded bytes to RGB pixels, for everything that an ISIC folder really holds. Called by the scan and by the stream.

Knows nothing of files, labels or Ray. Safe in many threads at once: it neither reads nor sets Pillow's global switches.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
MIN_SIDE = 8  # pixels; anything less is an icon or a spacer, not a photograph of skin


class ImageRejected(Exception):
    """This file cannot be used as an image; `reason` says why in one line, without the file's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(encoded: bytes, *, max_pixels: int) -> np.ndarray:
    """The whole picture at full size: uint8 [H, W, 3], RGB, contiguous, turned as its EXIF orientation says.

    Transparency is laid on white, 16-bit grey is scaled to 8 bits, an embedded colour profile is applied (to sRGB), of
    several frames the first counts.
    max_pixels: larger images are refused from their header, before any pixel is decoded.
    Raises ImageRejected for bytes that are no whole JPEG, PNG, BMP, TIFF or WEBP image.
    """
    loaded = _load(encoded, max_pixels)
    return np.array(_upright(loaded.image, loaded.orientation).convert("RGB"))


def decode_resized(encoded: bytes, size: int, *, max_pixels: int) -> np.ndarray:
    """The centre square at `size` pixels: uint8 [size, size, 3], RGB, contiguous.

    The shorter side becomes `size` (antialiased bicubic) and the longer one is cropped about its centre. A JPEG is
    decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that leaves the shorter side at `size` or more, which is faster and
    within a few grey levels of the full way. Otherwise as decode_image.
    """
    return decode_measured(encoded, size, max_pixels=max_pixels)[0]


def decode_measured(encoded: bytes, size: int, *, max_pixels: int) -> tuple[np.ndarray, int, int]:
    """decode_resized's square, and the width and height of the whole picture in pixels, upright."""
    image, orientation, full, (width, height) = _load(encoded, max_pixels, draft=size)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # A centred square stays centred when turned, so the turn comes last, on the few pixels that are left.
    square = image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side), reducing_gap=2.0
    )
    across, down = full if orientation < 5 else full[::-1]  # from 5 on, a quarter turn
    return np.array(_upright(square, orientation).convert("RGB")), across, down


def probe_image(encoded: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels after the EXIF turn, once every byte of the picture has proved readable.

    Raises ImageRejected exactly where decode_image would.
    """
    # A JPEG's entropy decoding still reads all of the file at the smallest draft; only the inverse DCT gets cheaper.
    _, orientation, (width, height), _ = _load(encoded, max_pixels, draft=1)
    return (height, width) if orientation >= 5 else (width, height)  # a quarter turn


_PLUGINS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,  # also MPO: its first picture is an ordinary JPEG
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    b"RIFF": WebPImageFile,  # reserves two canvases as it opens, but touches no page of them before it decodes
}
_REFUSED = (  # (offset, signature, name): only so that the reason can name what the file is
    (0, b"GIF8", "GIF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\x03\x04", "ZIP"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"jP  ", "JPEG 2000"),
    (128, b"DICM", "DICOM"),
)
_TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Loaded(NamedTuple):
    image: Image.Image  # 8-bit L or RGB
    orientation: int  # of EXIF, 1 to 8, still to be applied
    full_size: tuple[int, int]
    size: tuple[float, float]  # of the picture in `image`


def _load(encoded: bytes, max_pixels: int, *, draft: int | None = None) -> _Loaded:
    """draft: a JPEG's shorter side may be decoded at as little. Whatever Pillow raises becomes ImageRejected.

    The plugin is called directly: Image.open applies Pillow's process-wide size guard.
    """
    if not encoded:
        raise ImageRejected("the file is empty")
    plugin = next((plugin for signature, plugin in _PLUGINS.items() if encoded.startswith(signature)), None)
    if plugin is None:
        names = [name for offset, signature, name in _REFUSED if encoded.startswith(signature, offset)]
        content = f"the real format is {names[0]}" if names else "the content is no image"
        raise ImageRejected(f"{content}, not one of {' '.join(FORMATS)}")
    try:
        image = plugin(io.BytesIO(encoded))
        full_size = width, height = image.size
        if width * height > max_pixels:
            raise ImageRejected(f"{width} x {height} is more than max_pixels = {max_pixels}")
        if min(width, height) < MIN_SIDE:
            raise ImageRejected(f"{width} x {height} is too small; each side must have at least {MIN_SIDE} pixels")
        if isinstance(image, TiffImageFile):  # with memory of its own, Pillow's process-wide size guard is not asked
            image.im = Image.new(image.mode, (image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH])).im
        drafted = None
        if isinstance(image, JpegImageFile):
            if encoded.endswith(bytes(64)) and not encoded.rstrip(b"\0").endswith(b"\xff\xd9"):
                # A download that broke off in a preallocated file. libjpeg takes the zeros for codes: a grey tail.
                raise ImageRejected("truncated JPEG: zeros in place of its tail")
            drafted = image.draft(None, (draft, draft)) if draft else None
        image.load()
        opaque = _opaque(image)
        # A draft of 300 rows at 1/8 has 38, but the picture covers 37.5 of them: the draft's box keeps the fraction.
        return _Loaded(opaque, _orientation(image), full_size, drafted[1][2:] if drafted else opaque.size)
    except ImageRejected:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageRejected(f"unreadable {plugin.format}: {text}") from error


def _opaque(image: Image.Image) -> Image.Image:
    """An 8-bit L or sRGB picture of a loaded image of any mode."""
    image = _srgb(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bit(image))
    if image.has_transparency_data:
        pixels = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        background = Image.new("RGB", pixels.size, "white")
        background.paste(pixels, mask=pixels.getchannel("A"))
        return background
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """The picture as its ICC profile means it; as it is where the profile is sRGB, of another mode, or broken."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        space, name = profile.profile.xcolor_space.strip(), ImageCms.getProfileDescription(profile)
        if space not in ("RGB", "CMYK") or image.mode not in (space, f"{space}A") or "sRGB" in name:
            return image
        mode = "RGB" if space == "CMYK" else image.mode
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (KeyError, OSError, TypeError, ImageCms.PyCMSError):
        return image
    return image if converted is None else converted


def _eight_bit(image: Image.Image) -> np.ndarray:
    """uint8 [H, W] of a 16-bit (or wider) grey image; Pillow's own conversion clips at 255 instead of scaling.

    Integers are scaled by the depth that a TIFF states, or else by the least of 8, 12 and 16 bits that holds them:
    scanners and microscopes write 12 bits into files of 16. Floats likewise: [0, 1], [0, 255] or [0, 65535].
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ImageRejected("holds values that are not finite")
        peak = next((peak for peak in (1.0, 255.0, 65535.0) if values.max() <= peak), None)
        if peak is None:
            raise ImageRejected("holds floating-point values above 65535, whose scale is not known")
        return np.rint(values.clip(0, None) * (255.0 / peak)).astype(np.uint8)
    full_scale = next((peak for peak in (255, 4095) if values.max() <= peak), 65535)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(BITSPERSAMPLE, (16,))[0] < 16:
        full_scale = (1 << image.tag_v2[BITSPERSAMPLE][0]) - 1
    if values.max() > 65535:
        raise ImageRejected("holds integers above 65535, whose scale is not known")
    clipped = values.astype(np.int32).clip(0, full_scale)
    return ((clipped * 255 + full_scale // 2) // full_scale).astype(np.uint8)


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation, 1 to 8, still to be applied. Ask after load(): Pillow turns a TIFF itself while it loads."""
    try:
        return int(image.getexif().get(ExifTag.Orientation, 1))
    except Exception:  # broken EXIF in a sound picture: every viewer shows it unturned
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
