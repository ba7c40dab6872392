"""The nearest pairs of generated and training images as one picture, for a person to judge. It measures nothing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2d.classes import DIAGNOSES
from m2d.data.views import apply_view
from m2d.evaluation.images import ImageSet
from m2d.evaluation.memorization import Pair

VIEW_NAMES = (
    "as it is", "mirrored", "upside down", "half turn", "quarter turn", "3/4 turn", "transposed", "anti-transposed",
)  # fmt: skip
_COLUMNS = 8
_TILE, _GAP, _MARGIN = 148, 18, 36  # pixels; eight columns are 1,382 wide
_STRIPE, _LINE = 8, 19
_INK, _FAINT, _ALARM = "#1A1A1A", "#5F5F5F", "#B00020"
_COLOURS = {diagnosis.code: diagnosis.colour for diagnosis in DIAGNOSES}
_CAPTION = (
    "Above: generated, in the view in which it comes nearest. Below: the training image. The stripe has the class's "
    "colour.",
    "Distances run from 0 (a copy) to 2. Real images of different lesions rarely come under the limit; red: this pair "
    "does.",
)


def worst_pairs_picture(pairs: Sequence[Pair], generated: ImageSet, train: ImageSet) -> Image.Image:
    """A page of the pairs in their order, eight to a row, about 1,400 px wide.

    generated, train: the sets that the pairs' rows count in. Small images are enlarged by a whole factor, pixel for
    pixel, so that nothing is shown that is not there; large ones are reduced.
    """
    if not pairs:
        raise ValueError("there are no pairs to draw")
    block = 2 * _TILE + 7 + 5 * _LINE + _GAP
    top = _MARGIN + 40 + _LINE * len(_CAPTION) + _GAP
    width = 2 * _MARGIN + _COLUMNS * (_TILE + _GAP) - _GAP
    page = Image.new("RGB", (width, top + -(-len(pairs) // _COLUMNS) * block + _MARGIN - _GAP), "white")
    draw = ImageDraw.Draw(page)
    title = f"The {len(pairs)} generated images nearest to a training image" if len(pairs) > 1 else "The nearest pair"
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=ImageFont.load_default(24))
    for number, line in enumerate(_CAPTION):
        draw.text((_MARGIN, _MARGIN + 40 + _LINE * number), line, fill=_FAINT, font=ImageFont.load_default(15))
    for number, pair in enumerate(pairs):
        x = _MARGIN + number % _COLUMNS * (_TILE + _GAP)
        y = top + number // _COLUMNS * block
        above = apply_view(np.asarray(generated.pixels[pair.generated_row]), pair.view)
        below = np.asarray(train.pixels[pair.train_row])
        _paste(page, above, x, y, pair.generated_class)
        _paste(page, below, x, y + _TILE + 7, pair.train_class)
        _label(draw, x, y + 2 * _TILE + 11, number + 1, pair)
    return page


def _paste(page: Image.Image, image: np.ndarray, x: int, y: int, code: str) -> None:
    side, room = image.shape[0], _TILE - _STRIPE
    shown, how = (side * (room // side), Image.Resampling.NEAREST) if side <= room else (room, Image.Resampling.LANCZOS)
    top = y + (_TILE - shown) // 2
    page.paste(_COLOURS[code], (x, top, x + _STRIPE, top + shown))
    page.paste(Image.fromarray(np.ascontiguousarray(image)).resize((shown, shown), how), (x + _STRIPE, top))


def _label(draw: ImageDraw.ImageDraw, x: int, y: int, number: int, pair: Pair) -> None:
    same = pair.generated_class == pair.train_class
    classes = f"both {pair.generated_class}" if same else f"{pair.generated_class}, {pair.train_class}"
    # The space that found the pair comes first: its distance is the one that the limit is for.
    spaces = sorted(pair.distances, key=lambda name: name != pair.found_by)
    lines = [
        (f"{number}: {classes}", _INK),
        *((f"{name} {_short(pair.distances[name])}", _INK) for name in spaces),
        (f"{_short(pair.share_of_limit)} x its limit", _ALARM if pair.near_copy else _FAINT),
        (VIEW_NAMES[pair.view], _FAINT),
    ]
    for row, (text, colour) in enumerate(lines):
        draw.text((x, y + _LINE * row), text, fill=colour, font=ImageFont.load_default(15))


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value > 0 else "0"
