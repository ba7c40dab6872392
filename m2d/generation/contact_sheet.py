"""A contact sheet: one row a class, so that a person sees at a glance what a model draws. And strips of a walk."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2d.classes import DIAGNOSES

_TILE = 112  # pixels a side that small images are enlarged to, at least
_GAP = 6
_MARGIN = 20
_STRIPE = 8
_LABEL_WIDTH = 200
_INK, _FAINT = "#1A1A1A", "#5F5F5F"


def contact_sheet(
    images_by_class: Mapping[str, np.ndarray],
    *,
    title: str | None = None,
    caption: str | None = None,
    totals: Mapping[str, int] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Draw one row for each class code, in the mapping's order.

    images_by_class: code -> uint8 [N, H, W, 3]; N may differ, H and W may not. totals: how many images a class has in
    all, where the sheet shows the first few of them. scale: whole factor by which the images are enlarged; None picks
    one. Every pixel becomes a square of equal pixels: smoothing would show detail that the model did not draw.
    """
    if not images_by_class:
        raise ValueError("a contact sheet needs at least one class")
    height, width = next(iter(images_by_class.values())).shape[1:3]
    scale = scale or max(1, -(-_TILE // max(height, width)))
    tile_w, tile_h = width * scale, height * scale
    row_h = max(tile_h, 76)
    columns = max(max(len(images) for images in images_by_class.values()), 1)
    sheet_w = max(2 * _MARGIN + _LABEL_WIDTH + columns * (tile_w + _GAP) - _GAP, 640)

    title_lines = _wrap(title, font(22), sheet_w - 2 * _MARGIN)
    caption_lines = _wrap(caption, font(13), sheet_w - 2 * _MARGIN)
    top = _MARGIN + 30 * len(title_lines) + (10 if title_lines else 0)
    bottom = top + len(images_by_class) * (row_h + _GAP) - _GAP
    foot = 12 + 20 * len(caption_lines) if caption_lines else 0
    sheet = Image.new("RGB", (sheet_w, bottom + foot + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)

    for number, line in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + 30 * number), line, fill=_INK, font=font(22))
    for number, line in enumerate(caption_lines):
        draw.text((_MARGIN, bottom + 12 + 20 * number), line, fill=_FAINT, font=font(13))
    for row, (code, images) in enumerate(images_by_class.items()):
        y = top + row * (row_h + _GAP)
        _draw_label(draw, code, y, row_h, shown=len(images), total=(totals or {}).get(code, len(images)))
        for column, image in enumerate(images):
            x = _MARGIN + _LABEL_WIDTH + column * (tile_w + _GAP)
            sheet.paste(_enlarged(image, scale), (x, y + (row_h - tile_h) // 2))
    return sheet


def strip(images: Sequence[np.ndarray]) -> Image.Image:
    """Images uint8 [H, W, 3] of one size side by side, first to last, each pixel a square of equal pixels."""
    height, width = images[0].shape[:2]
    scale = max(1, -(-_TILE // max(height, width)))
    sheet = Image.new("RGB", (len(images) * (width * scale + _GAP) - _GAP, height * scale), "white")
    for column, image in enumerate(images):
        sheet.paste(_enlarged(image, scale), (column * (width * scale + _GAP), 0))
    return sheet


def _enlarged(image: np.ndarray, scale: int) -> Image.Image:
    return Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))


def _draw_label(draw: ImageDraw.ImageDraw, code: str, y: int, row_h: int, *, shown: int, total: int) -> None:
    diagnosis = next(diagnosis for diagnosis in DIAGNOSES if diagnosis.code == code)
    draw.rectangle((_MARGIN, y, _MARGIN + _STRIPE - 1, y + row_h - 1), fill=diagnosis.colour)
    x, middle = _MARGIN + _STRIPE + 12, y + row_h // 2
    noun = "image" if total == 1 else "images"
    count = f"{total:,} {noun}" if total == shown else f"{shown} of {total:,} {noun}"
    draw.text((x, middle - 22), code, fill=_INK, font=font(20), anchor="lm")
    draw.text((x, middle + 2), diagnosis.name, fill=_INK, font=font(15), anchor="lm")
    draw.text((x, middle + 24), count, fill=_FAINT, font=font(13), anchor="lm")


def _wrap(text: str | None, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words that fit `width` pixels."""
    lines: list[str] = []
    for word in (text or "").split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, so that a sheet looks the same everywhere."""
    return ImageFont.load_default(size=size)
