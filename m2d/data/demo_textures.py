"""Tileable noise, cells and brush strokes: what the procedural lesions of demo_lesions.py are made of.

Textures are built once per process (about 0.3 s) and looked up at continuous coordinates, so a drawing has no pixel
grid of its own: the same lesion can be photographed at another size, angle or distance. Knows nothing of classes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

Array = NDArray[np.floating[Any]]  # float32 throughout, for speed
Curve = tuple[NDArray[np.float64], float]  # points [N, 2] as x, y, and thickness

_TEXELS = 512  # side of a texture; a power of two, so that wrapping is a bit mask
_CYCLES_PER_TILE = 16  # of the longest wavelength in the cloud texture
_CELLS_PER_TILE = 32


@dataclass(frozen=True)
class Cells:
    """Voronoi cells around jittered points, in units of the cell spacing. Each array is [H, W]."""

    distance: Array  # to the nearest point: 0 at a cell's heart
    edge: Array  # second nearest minus nearest: 0 on the walls between cells
    value: Array  # uniform in [0, 1], one number a cell


@dataclass(frozen=True)
class Fields:
    """Random fields over a patch of skin. u, v: coordinates [H, W]; wavelengths and spacings are in the same unit.

    Each call takes a fresh part of the textures, drawn from `rng`: equal seeds and equal calls give equal fields,
    at any resolution.
    """

    u: Array
    v: Array
    rng: np.random.Generator

    def noise(self, wavelength: float, *, stretch: float = 1.0) -> Array:
        """Cloudy noise [H, W] of mean 0 and deviation 1: `wavelength` and finer; streaks along v if `stretch` > 1."""
        return _bilinear((_clouds(1.9),), *self._place(wavelength * _CYCLES_PER_TILE, stretch))[0]

    def swell(self, wavelength: float) -> Array:
        """Smooth noise [H, W] of mean 0 and deviation 1 with hardly anything finer than `wavelength`."""
        return _bilinear((_clouds(4.0),), *self._place(wavelength * _CYCLES_PER_TILE, 1.0))[0]

    def cells(self, spacing: float, *, warp: float = 0.12, stretch: float = 1.0) -> Cells:
        """Cells about `spacing` apart, their walls bent by `warp` spacings."""
        bend = warp * spacing * self.swell(spacing * 3)
        bent = Fields(self.u + bend, self.v - bend, self.rng)
        return Cells(*_bilinear(_voronoi(), *bent._place(spacing * _CELLS_PER_TILE, stretch)))

    def _place(self, tile: float, stretch: float) -> tuple[Array, Array]:
        """Rows and columns [H, W] in texels of a texture `tile` units wide, laid at a random place and angle."""
        angle, row, column = self.rng.uniform(0, 1, 3)
        if stretch != 1.0:  # "along v" holds only for a texture that is not turned
            angle = 0.0
        along = np.float32(np.cos(2 * np.pi * angle) * _TEXELS / tile)
        across = np.float32(np.sin(2 * np.pi * angle) * _TEXELS / tile)
        rows = self.u * across + self.v * (along / np.float32(stretch)) + np.float32(row * _TEXELS)
        return rows, self.u * along - self.v * across + np.float32(column * _TEXELS)


def ramp(values: Array, start: float, end: float) -> Array:
    """0 up to `start`, 1 from `end` on, a smooth step between; falls where start > end. Same shape as `values`."""
    t: Array = np.clip((values - np.float32(start)) * np.float32(1 / (end - start)), 0, 1)
    step: Array = t * t * (3 - 2 * t)
    return step


def bump(values: Array, width: float) -> Array:
    """Gaussian bump: 1 where `values` is 0, exp(-1) at `width`."""
    height: Array = np.exp(-np.square(values * np.float32(1 / width)))
    return height


def strokes(paths: list[Curve], *, width: int, height: int, oversampling: int = 3) -> Array:
    """Antialiased coverage [height, width] in [0, 1] of curves in pixels."""
    canvas = Image.new("L", (width * oversampling, height * oversampling))
    draw = ImageDraw.Draw(canvas)
    for points, thickness in paths:
        scaled = [(float(x), float(y)) for x, y in points * oversampling]
        draw.line(scaled, fill=255, width=max(1, round(thickness * oversampling)), joint="curve")
    return np.asarray(canvas.reduce(oversampling), np.float32) / np.float32(255)


def _bilinear(textures: tuple[Array, ...], rows: Array, columns: Array) -> list[Array]:
    """Values of tileable textures at fractional positions [H, W]. Twice as fast here as ndimage.map_coordinates."""
    row_floor, column_floor = np.floor(rows), np.floor(columns)
    down, right = rows - row_floor, columns - column_floor
    top, left = row_floor.astype(np.intp) & (_TEXELS - 1), column_floor.astype(np.intp) & (_TEXELS - 1)
    bottom, beside = ((top + 1) & (_TEXELS - 1)) * _TEXELS, (left + 1) & (_TEXELS - 1)
    top *= _TEXELS
    corners = (top + left, top + beside, bottom + left, bottom + beside)
    found = []
    for texture in textures:
        upper, upper_right, lower, lower_right = (texture.take(corner, mode="wrap") for corner in corners)
        upper += right * (upper_right - upper)
        lower += right * (lower_right - lower)
        upper += down * (lower - upper)
        found.append(upper)
    return found


@lru_cache(maxsize=2)
def _clouds(decay: float) -> Array:
    """Gaussian random field [512, 512] with amplitude f^-decay above the base frequency, mean 0, deviation 1."""
    size = _TEXELS
    white = np.random.default_rng(20180161).standard_normal((size, size))
    cycles = np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.fft.rfftfreq(size, 1 / size)[None, :])
    amplitude = np.where(cycles >= _CYCLES_PER_TILE, np.maximum(cycles, 1) ** -decay, 0)
    amplitude[cycles > size / 3] = 0
    field = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(size, size))
    return np.ascontiguousarray((field - field.mean()) / field.std(), dtype=np.float32)


@lru_cache(maxsize=1)
def _voronoi() -> tuple[Array, Array, Array]:
    """Distance, edge and value textures [512, 512] of jittered lattice points on a torus."""
    size, n = _TEXELS, _CELLS_PER_TILE
    rng = np.random.default_rng(190203368)
    lattice = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2)
    points = np.mod(lattice + rng.uniform(0.05, 0.95, lattice.shape), n)
    values = rng.uniform(0, 1, len(points)).astype(np.float32)
    steps = np.arange(size) * (n / size)
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    distances, nearest = cKDTree(points, boxsize=n).query(grid, k=2)
    distance = ndimage.gaussian_filter(distances[:, 0].reshape(size, size), 0.7, mode="wrap")
    edge = (distances[:, 1] - distances[:, 0]).reshape(size, size)
    return distance.astype(np.float32), edge.astype(np.float32), values[nearest[:, 0]].reshape(size, size)
