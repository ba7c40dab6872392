"""Originals beside what the autoencoder makes of them. Validation calls it, with the same images each time."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m2d.plots.tiles import (
    GAP,
    LINE,
    STRIPE,
    Page,
    columns_for,
    require_images,
    require_labels,
    whole_factor,
)

DIFFERENCE_GAIN = 4
_ROWS = ("original", "reconstruction", f"difference × {DIFFERENCE_GAIN}")
_NAMES_WIDTH = 118
_HEAD = LINE + STRIPE + 4  # a class's code and stripe


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
    labels, psnr_db = np.asarray(labels, dtype=int), np.asarray(psnr_db, dtype=float)
    require_images(originals, "originals")
    require_images(reconstructed, "reconstructed")
    if originals.shape != reconstructed.shape:
        raise ValueError(f"originals are {originals.shape}, reconstructed {reconstructed.shape}; expected the same")
    count, height, width = originals.shape[:3]
    require_labels(labels, count)
    if psnr_db.shape != (count,):
        raise ValueError(f"psnr_db is of shape {psnr_db.shape} beside {count} images; expected one for each")

    factor = whole_factor(max(height, width))
    tile_h, tile_w = height * factor, width * factor
    columns = columns_for(count, tile_w + GAP)
    block = _HEAD + 3 * (tile_h + GAP) - GAP + 4 + LINE + 2 * GAP
    body_h = max(block * -(-count // columns) - 2 * GAP, LINE)
    page = Page(
        _NAMES_WIDTH + columns * (tile_w + GAP) - GAP, body_h, title=_title(psnr_db, step), caption=_caption(factor)
    )
    if not count:
        page.nothing()
    rows = np.stack([originals, reconstructed, difference(originals, reconstructed)], axis=1)
    for number in range(count):
        x = page.left + _NAMES_WIDTH + number % columns * (tile_w + GAP)
        y = page.top + number // columns * block
        page.class_stripe(int(labels[number]), x, y, tile_w)
        for row, name in enumerate(_ROWS):
            tile_y = y + _HEAD + row * (tile_h + GAP)
            if number % columns == 0:
                page.words(name, page.left, tile_y + (tile_h - LINE) // 2)
            page.paste(rows[number, row], x, tile_y, factor)
        page.words(_decibels(psnr_db[number]), x, y + _HEAD + 3 * (tile_h + GAP) - GAP + 4)
    return page.image


def difference(originals: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """|original - reconstruction| times 4, cut at 255; uint8 of the same shape."""
    gap = np.abs(originals.astype(np.int16) - reconstructed.astype(np.int16))
    times_gain: np.ndarray = np.minimum(gap * DIFFERENCE_GAIN, 255).astype(np.uint8)
    return times_gain


def _title(psnr_db: np.ndarray, step: int) -> str:
    finite = psnr_db[np.isfinite(psnr_db)]
    mean = f": {finite.mean():.1f} dB on average" if len(finite) else ""
    return f"Reconstructions at step {step:,}{mean}"


def _caption(factor: int) -> str:
    size = f" Each pixel is shown as {factor} × {factor}." if factor > 1 else ""
    return (
        f"Third row: the absolute difference of the two times {DIFFERENCE_GAIN}; black is none. Below: PSNR over the "
        f"image, more is better.{size}"
    )


def _decibels(value: float) -> str:
    return "identical" if value == math.inf else f"{value:.1f} dB" if math.isfinite(value) else "no PSNR"
