"""Pages of enlarged images with text around them: reconstructions, patch features, alignment. Telemetry calls them."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from m2d.classes import ISIC7, ClassSet, Diagnosis
from m2d.plots.charts import principal_components
from m2d.plots.style import FAINT, GRID, INK, edge_colour, percent, require_labels

TILE = 128  # pixels a side that images are enlarged to, about
MARGIN, GAP, STRIPE = 24, 8, 6
PAGE_WIDTH, NARROWEST = 1200, 560  # text needs room even where there is one image
TITLE_SIZE, TITLE_LINE, TEXT_SIZE, LINE = 20, 27, 13, 19
HEAD = LINE + STRIPE + 4  # a class's code and stripe
DIFFERENCE_GAIN = 4
_NAMES_WIDTH = 118  # of the rows' names
_BETWEEN = 20  # from one pair to the next, more than within one
_WHITE, _NO_VALUE = 255, 224


def reconstruction_grid(
    originals: np.ndarray,
    reconstructed: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    psnr_db: Sequence[float] | np.ndarray,
    *,
    step: int,
    classes: ClassSet = ISIC7,
) -> Image.Image:
    """A column for each pair: its class, original, reconstruction, absolute difference times 4, PSNR.

    originals, reconstructed: uint8 [N, H, W, 3]. labels: [N] class indices. psnr_db: [N], dB; infinite for equal
    images. Pixels are enlarged by a whole factor. ValueError where shapes do not fit each other.
    """
    psnr_db = np.asarray(psnr_db, dtype=float)
    factor = _whole_factor(originals, reconstructed)
    rows = (originals, reconstructed, difference(originals, reconstructed))
    height = originals.shape[1] * factor
    names = ("original", "reconstruction", f"difference × {DIFFERENCE_GAIN}")
    texts = ["identical" if db == math.inf else f"{db:.1f} dB" if math.isfinite(db) else "no PSNR" for db in psnr_db]
    finite = psnr_db[np.isfinite(psnr_db)]
    return _page(
        _side_by_side([_enlarged(images, factor) for images in rows], axis=1),
        labels,
        classes,
        title=f"Reconstructions at step {step:,}" + (f": {finite.mean():.1f} dB on average" if len(finite) else ""),
        caption=f"Third row: the absolute difference of the two times {DIFFERENCE_GAIN}; black is none. Below: PSNR "
        "over the image, more is better." + (f" Each pixel is shown as {factor} × {factor}." if factor > 1 else ""),
        gaps=(GAP, 2 * GAP),
        row_names={row * (height + GAP) + (height - LINE) // 2: name for row, name in enumerate(names)},
        below=texts,
    )


def difference(originals: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """|original - reconstruction| times 4, cut at 255; uint8 of the same shape."""
    gap = np.abs(originals.astype(np.int16) - reconstructed.astype(np.int16))
    return np.minimum(gap * DIFFERENCE_GAIN, 255).astype(np.uint8)


def patch_pca(
    images: np.ndarray, patches: np.ndarray, labels: Sequence[int] | np.ndarray, classes: ClassSet = ISIC7
) -> Image.Image:
    """Each image beside its patch features' first three principal components as red, green and blue.

    images: uint8 [N, H, W, 3]. patches: float [N, P, D], P = g^2 row by row. labels: [N] class indices. The components
    are those of all patches together, so equal colours mean alike features in all images. ValueError where P is no
    square.
    """
    colours, share = patch_colours(np.asarray(patches))
    count, grid = colours.shape[:2]
    return _pairs(
        images,
        colours,
        labels,
        classes,
        title="Patch features",
        caption=f"Red, green, blue: the first three principal components of all {count} × {grid} × {grid} patch "
        f"features together, {', '.join(map(percent, share))} of their variance, each from its 1st to its 99th "
        "percentile. Equal colours: alike features.",
    )


def patch_colours(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Three components of all patches together as red, green, blue: uint8 [N, g, g, 3], and their shares [3].

    patches: [N, P, D], P = g^2, row by row. Each component runs from its 1st to its 99th percentile, so that one odd
    patch does not take the contrast from the rest. ValueError where P is no square or a value is not finite.
    """
    count, number, dim = patches.shape
    side = math.isqrt(number)
    flat = patches.reshape(-1, dim)
    mean, axes, share = principal_components(flat, 3)
    coordinates = (flat - mean) @ axes.T
    low, high = np.percentile(coordinates, (1, 99), axis=0) if count else np.zeros((2, 3))
    scaled = np.clip((coordinates - low) / np.where(high > low, high - low, 1.0), 0, 1) * 255
    colours = np.where(share > 0, scaled.round(), 128).astype(np.uint8)  # grey: a component that does not vary
    return colours.reshape(count, side, side, 3), share


def alignment_map(
    images: np.ndarray, cosine: np.ndarray, labels: Sequence[int] | np.ndarray, classes: ClassSet = ISIC7
) -> Image.Image:
    """Each image beside the cosine of its tokens, U-Net against feature extractor, and their mean.

    images: uint8 [N, H, W, 3]. cosine: [N, h, w] in [-1, 1]. labels: [N] class indices. The colours always run from 0
    to 1, so that pictures of two steps compare; below 0 is drawn as 0. Tokens that are not finite are grey.
    """
    cosine = np.asarray(cosine, dtype=float)
    known = np.isfinite(cosine)
    bar = Image.new("RGB", (258, 54), "white")
    draw = ImageDraw.Draw(bar)
    draw.rectangle((0, 0, 257, 13), outline=GRID)
    bar.paste(Image.fromarray(np.repeat(heat(np.linspace(0, 1, 256))[None], 12, axis=0)), (1, 1))
    for x, text, anchor in ((1, "0 or less", "la"), (129, "0.5", "ma"), (256, "1", "ra")):
        draw.text((x, 18), text, fill=FAINT, font=font(TEXT_SIZE), anchor=anchor)
    return _pairs(
        images,
        heat(cosine),
        labels,
        classes,
        title="Alignment with the feature extractor"
        + (f": {cosine[known].mean():.2f} on average" if known.any() else ""),
        caption="Cosine of each token's projected U-Net features with the extractor's; the number is the image's mean.",
        notes=[f"{one[there].mean():.2f}" if there.any() else "" for one, there in zip(cosine, known)],
        header=bar,
    )


def heat(cosine: np.ndarray) -> np.ndarray:
    """[...] to uint8 [..., 3] by viridis from 0 to 1, which the colour-blind and a grey printer keep in order."""
    known = np.isfinite(cosine)
    colours = colormaps["viridis"](np.where(known, cosine, 0.0).clip(0, 1), bytes=True)[..., :3]
    return np.where(known[..., None], colours, np.uint8(_NO_VALUE))


def _pairs(
    images: np.ndarray,
    maps: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    classes: ClassSet,
    *,
    title: str,
    caption: str,
    notes: Sequence[str] = (),
    header: Image.Image | None = None,
) -> Image.Image:
    """A page of images [N, H, W, 3] each beside its map [N, h, w, 3], both enlarged to about the same size.

    notes: the text above each map.
    """
    factor = _whole_factor(images)
    map_factor = max(1, round(factor * max(images.shape[1:3]) / max(maps.shape[1:3])))
    cells = _side_by_side([_enlarged(images, factor), _enlarged(maps, map_factor)], axis=2)
    above = {images.shape[2] * factor + GAP: notes}
    return _page(
        cells, labels, classes, title=title, caption=caption, gaps=(_BETWEEN, _BETWEEN), above=above, header=header
    )


def _page(
    cells: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    classes: ClassSet,
    *,
    title: str,
    caption: str,
    gaps: tuple[int, int],
    header: Image.Image | None = None,  # with a frame of one pixel
    row_names: Mapping[int, str] | None = None,
    above: Mapping[int, Sequence[str]] | None = None,
    below: Sequence[str] = (),
) -> Image.Image:
    """A white page: title, caption, header, then cells uint8 [N, h, w, 3], each under its class's code and colour.

    gaps: from one cell to the next, right and down. row_names: y within a cell to the text left of each row of cells.
    above: x within a cell to the text of each beside its class's code. below: the text under each.
    """
    labels = np.asarray(labels, dtype=int)
    count, height, width = cells.shape[:3]
    require_labels(labels, count, len(classes))
    foot = LINE + 4 if row_names else 0
    step_x, step_y = width + gaps[0], HEAD + height + foot + gaps[1]
    rows = max(1, -(-count // max(1, PAGE_WIDTH // step_x)))
    columns = max(1, -(-count // rows))  # rows filled alike: 9 cells of 8 to a row go 5 and 4
    left = MARGIN + (_NAMES_WIDTH if row_names else 0)
    body = max(left - MARGIN + columns * step_x - gaps[0], NARROWEST)
    height_below = (header.height if header else 0) + max(rows * step_y - gaps[1] if count else 0, LINE)
    page, draw, top = titled_page(body, height_below, title, caption)
    text = font(TEXT_SIZE)
    if header:
        page.paste(header, (MARGIN - 1, top - 1))
        top += header.height
    if not count:
        draw.text((MARGIN, top), "no images", fill=FAINT, font=text)
    texts = below or [""] * count
    for number, (cell, label, text_below) in enumerate(zip(cells, labels, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = left + column * step_x, top + row * step_y
        class_stripe(draw, classes.diagnoses[label], x, y, width, room=min([width, *(above or {})]) - 4)
        for dx, notes in (above or {}).items():
            draw.text((x + dx, y), notes[number] if notes else "", fill=INK, font=text)
        y += HEAD
        page.paste(Image.fromarray(cell), (x, y))
        draw.text((x, y + height + 4), text_below, fill=INK, font=text)
        for dy, name in (row_names or {}).items() if column == 0 else ():
            draw.text((MARGIN, y + dy), name, fill=INK, font=text)
    return page


def titled_page(body: int, height: int, title: str, caption: str) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A white page with a title, a caption, room of `body` x `height` pixels below: from MARGIN and this y."""
    heading, text = font(TITLE_SIZE, bold=True), font(TEXT_SIZE)
    lines = [(line, INK, heading, TITLE_LINE) for line in wrapped(title, heading, body)]
    lines += [(line, FAINT, text, LINE) for line in wrapped(caption, text, body)]
    top = MARGIN + sum(line[-1] for line in lines) + 18
    page = Image.new("RGB", (body + 2 * MARGIN, top + height + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for line, colour, face, advance in lines:
        draw.text((MARGIN, y + (4 if face is text else 0)), line, fill=colour, font=face)
        y += advance
    return page, draw, top


def class_stripe(draw: ImageDraw.ImageDraw, one: Diagnosis, x: int, y: int, width: int, *, room: int) -> None:
    """The class's colour as a bar, and its code above it: a name is a cue that needs no colour. HEAD pixels high.

    room: pixels that the code may take.
    """
    face = font(TEXT_SIZE, bold=True)
    draw.text((x, y), shortened(one.code, face, room), fill=INK, font=face)
    stripe = (x, y + LINE, x + width - 1, y + LINE + STRIPE - 1)
    draw.rectangle(stripe, fill=one.colour, outline=edge_colour(one.colour))


def _side_by_side(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Images [N, H, W, 3] joined along an axis with gaps between, white where the smaller one ends."""
    other = 3 - axis
    longest = max(part.shape[other] for part in parts)
    padded = []
    for number, part in enumerate(parts):
        missing = [(0, 0)] * 4
        missing[other] = (0, longest - part.shape[other])
        missing[axis] = (GAP if number else 0, 0)
        padded.append(np.pad(part, missing, constant_values=_WHITE))
    return np.concatenate(padded, axis=axis)


def _enlarged(images: np.ndarray, factor: int) -> np.ndarray:
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _whole_factor(*groups: np.ndarray) -> int:
    """The whole factor, at least 1, that brings images nearest to a tile; ValueError unless uint8 [N, H, W, 3]."""
    for images in groups:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 [N, H, W, 3]")
    return max(1, round(TILE / max(groups[0].shape[1:3])))


def wrapped(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words that fit `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def shortened(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, its end left out where it does not fit `width` pixels."""
    kept = text
    while len(kept) > 1 and face.getlength(kept if kept == text else f"{kept}…") > width:
        kept = kept[:-1]
    return kept if kept == text else f"{kept}…"


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes inside matplotlib: the charts' own face, the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
