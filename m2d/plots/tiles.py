"""Pages of enlarged images with words around them. The pictures of m2d/plots/ are made of these pieces."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2d.plots.style import FAINT, GRID, INK, class_code, class_colours, class_edges

TILE = 128  # pixels a side that images are enlarged to, about
MARGIN, GAP, STRIPE = 24, 8, 6
PAGE_WIDTH = 1200
TITLE_SIZE, TEXT_SIZE, LINE = 20, 13, 19


class Page:
    """A white page with a title, a caption under it, and a body below both that the caller fills.

    width, height: of the body, pixels. `left` and `top` say where the body begins.
    """

    def __init__(self, width: int, height: int, *, title: str, caption: str) -> None:
        width = max(width, 560)  # words need room even where there is one image
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
        self.image.paste(Image.fromarray(enlarged(pixels, factor)), (x, y))

    def words(self, text: str, x: int, y: int, *, faint: bool = False, bold: bool = False) -> None:
        """One line, its upper left corner at (x, y)."""
        self.draw.text((x, y), text, fill=FAINT if faint else INK, font=font(TEXT_SIZE, bold=bold))

    def class_stripe(self, label: int, x: int, y: int, width: int) -> None:
        """The class's colour as a bar, and its code above it: a name is a cue that needs no colour. Takes 27 px."""
        code = class_code(label)
        self.words(code, x, y, bold=True)
        box = (x, y + LINE, x + width - 1, y + LINE + STRIPE - 1)
        self.draw.rectangle(box, fill=class_colours()[code], outline=class_edges()[code])

    def nothing(self, *, below: int = 0) -> None:
        """Say in the body, `below` px from its top, that there are no images."""
        self.words("no images", self.left, self.top + below, faint=True)

    def colour_bar(self, colours: np.ndarray, x: int, y: int, width: int, labels: dict[float, str]) -> None:
        """colours: uint8 [K, 3] from low to high. labels: place in 0..1 to the words under it. Takes 36 px."""
        bar = colours[np.linspace(0, len(colours) - 1, width).round().astype(int)]
        self.image.paste(Image.fromarray(np.repeat(bar[None], 12, axis=0)), (x, y))
        self.draw.rectangle((x - 1, y - 1, x + width, y + 12), outline=GRID)
        for place, text in labels.items():
            anchor = "la" if place == 0 else "ra" if place == 1 else "ma"
            at = (x + round(place * (width - 1)), y + 17)
            self.draw.text(at, text, fill=FAINT, font=font(TEXT_SIZE), anchor=anchor)


def enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """[H, W, 3] to [H f, W f, 3]: every pixel a square of equal pixels, so that nothing is shown that is not there."""
    return np.ascontiguousarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))


def whole_factor(side: int, room: int = TILE) -> int:
    """The whole factor, at least 1, that brings `side` pixels nearest to `room`."""
    return max(1, round(room / side))


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
