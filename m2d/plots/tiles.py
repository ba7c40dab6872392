"""Pages of enlarged images with text around them: reconstructions, patch features, alignment. Telemetry calls them."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from m2d.plots.features import patch_colours
from m2d.plots.style import FAINT, GRID, INK, class_code, class_colours, class_edges, percent

TILE = 128  # pixels a side that images are enlarged to, about
MARGIN, GAP, STRIPE = 24, 8, 6
PAGE_WIDTH = 1200
TITLE_SIZE, TEXT_SIZE, LINE = 20, 13, 19
HEAD = LINE + STRIPE + 4  # a class's code and stripe
DIFFERENCE_GAIN = 4
_NAMES_WIDTH = 118  # of the rows' names
_BAR_HEIGHT = 54
_BETWEEN = 20  # from one pair to the next, more than within one
_NO_VALUE = (224, 224, 224)


def reconstruction_grid(
    originals: np.ndarray,
    reconstructed: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    psnr_db: Sequence[float] | np.ndarray,
    *,
    step: int,
) -> Image.Image:
    """A column for each pair: its class, original, reconstruction, absolute difference times 4, PSNR.

    originals, reconstructed: uint8 [N, H, W, 3]. labels: [N] class indices. psnr_db: [N], dB; infinite for equal
    images. Pixels are enlarged by a whole factor. ValueError where shapes do not fit each other.
    """
    psnr_db = np.asarray(psnr_db, dtype=float)
    require_images(originals, "originals")
    require_images(reconstructed, "reconstructed")
    if originals.shape != reconstructed.shape:
        raise ValueError(f"originals are {originals.shape}, reconstructed {reconstructed.shape}; expected the same")
    count, height, width = originals.shape[:3]
    if psnr_db.shape != (count,):
        raise ValueError(f"psnr_db is of shape {psnr_db.shape} beside {count} images; expected one for each")
    factor = whole_factor(max(height, width))
    tile_h, tile_w = height * factor, width * factor
    below = 3 * (tile_h + GAP) - GAP + 4  # where the PSNR is, under the class's stripe
    finite = psnr_db[np.isfinite(psnr_db)]
    size = f" Each pixel is shown as {factor} × {factor}." if factor > 1 else ""
    page, places = _grid(
        labels, count, (tile_w, below + LINE), gaps=(GAP, 2 * GAP), left=_NAMES_WIDTH,
        title=f"Reconstructions at step {step:,}" + (f": {finite.mean():.1f} dB on average" if len(finite) else ""),
        caption=f"Third row: the absolute difference of the two times {DIFFERENCE_GAIN}; black is none. Below: PSNR "
        f"over the image, more is better.{size}",
    )  # fmt: skip
    rows = {
        "original": originals,
        "reconstruction": reconstructed,
        f"difference × {DIFFERENCE_GAIN}": difference(originals, reconstructed),
    }
    for number, (x, y) in enumerate(places):
        for row, (name, images) in enumerate(rows.items()):
            tile_y = y + row * (tile_h + GAP)
            if x == page.left + _NAMES_WIDTH:
                page.words(name, page.left, tile_y + (tile_h - LINE) // 2)
            page.paste(images[number], x, tile_y, factor)
        value = psnr_db[number]
        text = "identical" if value == math.inf else f"{value:.1f} dB" if math.isfinite(value) else "no PSNR"
        page.words(text, x, y + below)
    return page.image


def difference(originals: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """|original - reconstruction| times 4, cut at 255; uint8 of the same shape."""
    gap = np.abs(originals.astype(np.int16) - reconstructed.astype(np.int16))
    return np.minimum(gap * DIFFERENCE_GAIN, 255).astype(np.uint8)


def patch_pca(images: np.ndarray, patches: np.ndarray, labels: Sequence[int] | np.ndarray) -> Image.Image:
    """Each image beside its patch features' first three principal components as red, green and blue.

    images: uint8 [N, H, W, 3]. patches: float [N, P, D], P = g^2 row by row. labels: [N] class indices. The components
    are those of all patches together, so equal colours mean alike features in all images. ValueError where P is no
    square.
    """
    colours, share = patch_colours(np.asarray(patches))
    grid = colours.shape[1]
    shares = ", ".join(percent(part) for part in share)
    return _pairs(
        images, colours, labels,
        title="Patch features",
        caption=f"Red, green, blue: the first three principal components of all {len(colours)} × {grid} × {grid} patch "
        f"features together, {shares} of their variance, each from its 1st to its 99th percentile. Equal colours: "
        "alike features.",
    )  # fmt: skip


def alignment_map(images: np.ndarray, cosine: np.ndarray, labels: Sequence[int] | np.ndarray) -> Image.Image:
    """Each image beside the cosine of its tokens, U-Net against feature extractor, and their mean.

    images: uint8 [N, H, W, 3]. cosine: [N, h, w] in [-1, 1]. labels: [N] class indices. The colours always run from 0
    to 1, so that pictures of two steps compare; below 0 is drawn as 0. Tokens that are not finite are grey.
    """
    cosine = np.asarray(cosine, dtype=float)
    if cosine.ndim != 3:
        raise ValueError(f"cosine is of shape {cosine.shape}; expected [N, h, w]")
    known = np.isfinite(cosine)
    overall = f": {cosine[known].mean():.2f} on average" if known.any() else ""
    return _pairs(
        images, heat(cosine), labels,
        title=f"Alignment with the feature extractor{overall}",
        caption="Cosine of each token's projected U-Net features with the extractor's; the number is the image's mean.",
        notes=[f"{one[there].mean():.2f}" if there.any() else "" for one, there in zip(cosine, known)],
        bar={0.0: "0 or less", 0.5: "0.5", 1.0: "1"},
    )  # fmt: skip


def heat(cosine: np.ndarray) -> np.ndarray:
    """[...] to uint8 [..., 3] by viridis from 0 to 1, which the colour-blind and a grey printer keep in order."""
    known = np.isfinite(cosine)
    colours = colormaps["viridis"](np.where(known, cosine, 0.0).clip(0, 1), bytes=True)[..., :3]
    return np.where(known[..., None], colours, np.array(_NO_VALUE, np.uint8))


def _pairs(
    images: np.ndarray,
    maps: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    *,
    title: str,
    caption: str,
    notes: Sequence[str] = (),
    bar: dict[float, str] | None = None,
) -> Image.Image:
    """A page of images [N, H, W, 3] each beside its map [N, h, w, 3], both enlarged to about the same size."""
    require_images(images)
    if len(maps) != len(images):
        raise ValueError(f"{len(images)} images beside {len(maps)} maps; expected one for each")
    height, width = images.shape[1:3]
    factor = whole_factor(max(height, width))
    map_factor = max(1, round(factor * max(height, width) / max(maps.shape[1:3])))
    second = width * factor + GAP
    cell = second + maps.shape[2] * map_factor, max(height * factor, maps.shape[1] * map_factor)
    page, places = _grid(
        labels,
        len(images),
        cell,
        gaps=(_BETWEEN, _BETWEEN),
        top=_BAR_HEIGHT if bar else 0,
        title=title,
        caption=caption,
    )
    if bar:
        page.colour_bar(heat(np.linspace(0, 1, 256)), page.left, page.top, 256, bar)
    for number, (x, y) in enumerate(places):
        if notes:
            page.words(notes[number], x + second, y - HEAD)
        page.paste(images[number], x, y, factor)
        page.paste(maps[number], x + second, y, map_factor)
    return page.image


def _grid(
    labels: Sequence[int] | np.ndarray,
    count: int,
    cell: tuple[int, int],
    *,
    gaps: tuple[int, int],
    left: int = 0,
    top: int = 0,
    title: str,
    caption: str,
) -> tuple["Page", list[tuple[int, int]]]:
    """A page of `count` cells of (width, height), each under its class, and the upper left corners of the cells.

    left, top: room in the body beside and above them.
    """
    labels = np.asarray(labels, dtype=int)
    require_labels(labels, count)
    width, height = cell[0] + gaps[0], HEAD + cell[1] + gaps[1]
    columns = columns_for(count, width)
    body = max(height * -(-count // columns) - gaps[1], LINE)
    page = Page(left + columns * width - gaps[0], top + body, title=title, caption=caption)
    places = [
        (page.left + left + n % columns * width, page.top + top + n // columns * height + HEAD) for n in range(count)
    ]
    for label, (x, y) in zip(labels, places):
        page.class_stripe(int(label), x, y - HEAD, cell[0])
    if not count:
        page.words("no images", page.left, page.top + top, fill=FAINT)
    return page, places


class Page:
    """A white page with a title, a caption under it, and a body below both that the caller fills.

    width, height: of the body, pixels. `left` and `top` say where the body begins.
    """

    def __init__(self, width: int, height: int, *, title: str, caption: str) -> None:
        width = max(width, 560)  # text needs room even where there is one image
        titles = wrapped(title, font(TITLE_SIZE, bold=True), width)
        captions = wrapped(caption, font(TEXT_SIZE), width)
        self.left = MARGIN
        self.top = MARGIN + 27 * len(titles) + 4 + LINE * len(captions) + 14
        self.image = Image.new("RGB", (width + 2 * MARGIN, self.top + height + MARGIN), "white")
        self.draw = ImageDraw.Draw(self.image)
        for number, line in enumerate(titles):
            self.draw.text((MARGIN, MARGIN + 27 * number), line, fill=INK, font=font(TITLE_SIZE, bold=True))
        for number, line in enumerate(captions):
            y = MARGIN + 27 * len(titles) + 4 + LINE * number
            self.draw.text((MARGIN, y), line, fill=FAINT, font=font(TEXT_SIZE))

    def paste(self, pixels: np.ndarray, x: int, y: int, factor: int) -> None:
        """uint8 [H, W, 3], each pixel enlarged to factor x factor, its upper left corner at (x, y) of the page."""
        self.image.paste(Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1)), (x, y))

    def words(self, text: str, x: int, y: int, *, fill: str = INK, bold: bool = False) -> None:
        """One line, its upper left corner at (x, y)."""
        self.draw.text((x, y), text, fill=fill, font=font(TEXT_SIZE, bold=bold))

    def class_stripe(self, label: int, x: int, y: int, width: int) -> None:
        """The class's colour as a bar, and its code above it: a name is a cue that needs no colour. Takes 27 px."""
        code = class_code(label)
        self.words(code, x, y, bold=True)
        box = (x, y + LINE, x + width - 1, y + LINE + STRIPE - 1)
        self.draw.rectangle(box, fill=class_colours()[code], outline=class_edges()[code])

    def colour_bar(self, colours: np.ndarray, x: int, y: int, width: int, labels: dict[float, str]) -> None:
        """colours: uint8 [K, 3] from low to high. labels: place in 0..1 to the words under it. Takes 36 px."""
        bar = colours[np.linspace(0, len(colours) - 1, width).round().astype(int)]
        self.image.paste(Image.fromarray(np.repeat(bar[None], 12, axis=0)), (x, y))
        self.draw.rectangle((x - 1, y - 1, x + width, y + 12), outline=GRID)
        for place, text in labels.items():
            anchor = "la" if place == 0 else "ra" if place == 1 else "ma"
            at = (x + round(place * (width - 1)), y + 17)
            self.draw.text(at, text, fill=FAINT, font=font(TEXT_SIZE), anchor=anchor)


def whole_factor(side: int) -> int:
    """The whole factor, at least 1, that brings `side` pixels nearest to a tile's."""
    return max(1, round(TILE / side))


def columns_for(count: int, cell_width: int) -> int:
    """How many cells a row takes on a page of about 1,200 px, rows filled alike: 9 cells of 8 to a row go 5 and 4."""
    most = max(1, PAGE_WIDTH // cell_width)
    rows = max(1, -(-count // most))
    return max(1, -(-count // rows))


def require_images(images: np.ndarray, name: str = "images") -> None:
    """ValueError unless uint8 [N, H, W, 3]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name} are {images.dtype} {images.shape}; expected uint8 [N, H, W, 3]")


def require_labels(labels: np.ndarray, count: int) -> None:
    """ValueError unless there is one label for each of `count` images."""
    if labels.shape != (count,):
        raise ValueError(f"labels are of shape {labels.shape} beside {count} images; expected one for each")


def wrapped(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words that fit `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes inside matplotlib: the charts' own face, the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
