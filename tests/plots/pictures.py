"""What the tests of pictures share: PNG bytes as pixels, and where a tile stands on a page."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from m2d.plots.style import styled


def figure_of(draw: Callable[..., bytes], *args: Any, **options: Any) -> Figure:
    """What a function that gives PNG bytes encodes."""
    figure: Figure = styled()(draw.__wrapped__)(*args, **options)  # type: ignore[attr-defined]
    return figure


def pixels_of(png: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Images of which no two pixels are alike, so that a tile is found at one place only."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """By numpy's Kronecker product: each pixel factor x factor."""
    return np.stack([np.kron(image[..., channel], np.ones((factor, factor), np.uint8)) for channel in range(3)], -1)


def place_of(page: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """(x, y) of the only place where the page shows the tile, pixel for pixel."""
    height, width = tile.shape[:2]
    corners = np.argwhere((page[: len(page) - height + 1, : page.shape[1] - width + 1] == tile[0, 0]).all(-1))
    found = [(int(x), int(y)) for y, x in corners if np.array_equal(page[y : y + height, x : x + width], tile)]
    assert len(found) == 1, f"{len(found)} places show the tile"
    return found[0]


def shows(page: np.ndarray, colour: str) -> bool:
    """Whether any pixel has exactly this #RRGGBB."""
    return bool((page == tuple(bytes.fromhex(colour[1:]))).all(-1).any())
