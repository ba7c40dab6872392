"""Procedural dermoscopy: draws one lesion of a diagnosis as a dermatoscope would show it. Knows nothing of files.

Skin and lesion are optical densities of melanin and blood (Beer-Lambert) under painted layers (veil, scar, keratin), so
tones mix as in skin. The structures of each class follow Kittler et al., J Am Acad Dermatol 74:1093 (2016); the tones
were matched by eye to HAM10000 (Tschandl et al., Scientific Data 5:180161, 2018). No real image is copied.
Textures are looked up at continuous coordinates, so a drawing has no pixel grid of its own: the same lesion can be
photographed at another size, angle or distance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from m2d.classes import ISIC7

Array = NDArray[np.floating[Any]]  # float32 throughout, for speed
Curve = tuple[NDArray[np.float64], float]  # points [N, 2] as x, y, and thickness
Colour = tuple[float, float, float]

MELANIN: Colour = (0.37, 0.88, 1.04)  # optical density per channel of one unit; red passes best
BLOOD: Colour = (0.10, 1.00, 0.62)
SKIN_TONES: tuple[Colour, ...] = ((226, 158, 168), (208, 176, 182), (224, 172, 150), (210, 184, 206), (232, 148, 142))
_TEXELS = 512  # side of a texture; a power of two, so that wrapping is a bit mask
_CYCLES_PER_TILE = 16  # of the longest wavelength in the cloud texture
_CELLS_PER_TILE = 32


@dataclass
class Tissue:
    """What light meets. melanin, blood: densities [H, W]."""

    melanin: Array
    blood: Array
    layers: list[tuple[Array, Colour]] = field(
        default_factory=list
    )  # cover [H, W] in 0..1, RGB in 0..255; lowest first
    vessels: list[Curve] = field(default_factory=list)  # points [N, 2] and thickness, in radii of the lesion

    def paint(self, cover: Array, colour: Colour) -> None:
        """Lay `colour` over what was painted so far."""
        self.layers.append((cover, colour))


class Cells(NamedTuple):
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
        return self._look_up((_clouds(1.9),), wavelength * _CYCLES_PER_TILE, stretch)[0]

    def swell(self, wavelength: float) -> Array:
        """Smooth noise [H, W] of mean 0 and deviation 1 with hardly anything finer than `wavelength`."""
        return self._look_up((_clouds(4.0),), wavelength * _CYCLES_PER_TILE)[0]

    def cells(self, spacing: float, *, warp: float = 0.12, stretch: float = 1.0) -> Cells:
        """Cells about `spacing` apart, their walls bent by `warp` spacings."""
        bend = warp * spacing * self.swell(spacing * 3)
        bent = Fields(self.u + bend, self.v - bend, self.rng)
        return Cells(*bent._look_up(_voronoi(), spacing * _CELLS_PER_TILE, stretch))

    def _look_up(self, textures: tuple[Array, ...], tile: float, stretch: float = 1.0) -> list[Array]:
        """The textures, `tile` units wide and laid at a random place and angle, at every pixel."""
        angle, row, column = self.rng.uniform(0, 1, 3)
        if stretch != 1.0:  # "along v" holds only for a texture that is not turned
            angle = 0.0
        along = np.float32(np.cos(2 * np.pi * angle) * _TEXELS / tile)
        across = np.float32(np.sin(2 * np.pi * angle) * _TEXELS / tile)
        rows = self.u * across + self.v * (along / np.float32(stretch)) + np.float32(row * _TEXELS)
        return _bilinear(textures, rows, self.u * along - self.v * across + np.float32(column * _TEXELS))


def render_lesion(label: str, seed: int, *, width: int = 200, height: int = 150, view: int = 0) -> NDArray[np.uint8]:
    """Photograph number `view` of the lesion `seed` of class `label`: uint8 [height, width, 3], RGB.

    The picture is a function of the arguments alone. Another size shows the same lesion; another view turns, moves and
    relights it. Raises KeyError for an unknown class and ValueError for a negative seed.
    """
    index = ISIC7.index(label)
    lesion_rng = np.random.default_rng([seed, index])
    view_rng = np.random.default_rng([seed, index, 1 + view])
    draw, radii, sun_damage = _CLASSES[label]

    radius = lesion_rng.uniform(*radii)
    turn = lesion_rng.uniform(0, 2 * np.pi) + (view_rng.uniform(-1.2, 1.2) if view else 0)
    zoom = view_rng.uniform(0.85, 1.2) if view else 1.0
    centre_x, centre_y = view_rng.normal(0, 0.1, 2)
    x, y = np.meshgrid(
        (np.arange(width, dtype=np.float32) + 0.5 - width / 2) * np.float32(2 / height),
        (np.arange(height, dtype=np.float32) + 0.5 - height / 2) * np.float32(2 / height),
    )  # the frame is 2 units high
    cos, sin = np.float32(np.cos(turn) / zoom), np.float32(np.sin(turn) / zoom)
    skin_u = (x - np.float32(centre_x)) * cos + (y - np.float32(centre_y)) * sin
    skin_v = (y - np.float32(centre_y)) * cos - (x - np.float32(centre_x)) * sin

    tissue = draw(Fields(skin_u / np.float32(radius), skin_v / np.float32(radius), lesion_rng))
    tone = _add_skin(tissue, Fields(skin_u, skin_v, lesion_rng), sun_damage)
    if tissue.vessels:
        paths = []
        for points, thickness in tissue.vessels:  # from the lesion to pixels: the inverse of the pose above
            a, b = (points * radius * zoom).T
            across = a * np.cos(turn) - b * np.sin(turn) + centre_x
            down = a * np.sin(turn) + b * np.cos(turn) + centre_y
            pixels = np.stack([across, down], 1) * (height / 2) + (width / 2, height / 2)
            paths.append((pixels, thickness * (radius * zoom * height / 2)))
        tissue.blood = tissue.blood + 0.75 * strokes(paths, width=width, height=height)

    # Light that comes back, in 0..255.
    density = np.maximum(tissue.melanin, -0.1)[..., None] * np.array(MELANIN, np.float32)
    density += np.maximum(tissue.blood, -0.1)[..., None] * np.array(BLOOD, np.float32)
    light: Array = tone * np.exp(-density)
    for cover, colour in tissue.layers:
        light += cover[..., None] * (np.array(colour, np.float32) - light)
    return _photograph(light, x, y, lesion_rng, view_rng)


# --- the lesions: each takes Fields in units of the lesion's radius and returns its Tissue ---


def _silhouette(fields: Fields, *, irregularity: float, lobes: float, elongation: float = 0.25) -> Array:
    """Depth [H, W] below the border in radii: about 1 at the heart, 0 on the border, negative outside.

    lobes: coarse lumps of the outline; irregularity: fine wander of the border.
    """
    stretch = 1 + fields.rng.uniform(0, elongation)
    push_u, push_v = fields.swell(2.0), fields.swell(2.0)
    distance = np.hypot(fields.u * stretch + lobes * push_u, fields.v / stretch + lobes * push_v)
    return 1 - distance + irregularity * fields.noise(0.8)


def _draw_naevus(fields: Fields) -> Tissue:
    """NV: symmetric, brown, soft border; a regular network, globules, or homogeneous; darker heart or darker rim."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=rng.uniform(0.03, 0.1), lobes=rng.uniform(0.05, 0.15))
    softness = rng.uniform(0.12, 0.4)
    inside = ramp(depth, -softness * 0.6, softness)
    heart = ramp(depth, 0, 1) if rng.random() < 0.7 else 0.6 * bump(depth - 0.3, 0.3)
    strength = rng.uniform(0.5, 1.25)
    melanin = inside * (strength * (0.55 + 0.6 * heart) + 0.16 * fields.noise(0.5))
    pattern = rng.choice(["network", "globules", "homogeneous"], p=[0.55, 0.25, 0.2])
    if pattern == "network":
        walls = bump(fields.cells(rng.uniform(0.1, 0.17)).edge, 0.32)
        melanin = melanin * (0.72 + 0.75 * walls * (0.6 + 0.4 * ramp(-depth, -0.9, 0)))
    elif pattern == "globules":
        cells = fields.cells(rng.uniform(0.14, 0.22))
        melanin = melanin * (0.7 + 0.85 * ramp(cells.distance, 0.5, 0.25) * (0.5 + 0.5 * cells.value))
    return Tissue(melanin, inside * rng.uniform(0.0, 0.28))


def _draw_melanoma(fields: Fields) -> Tissue:
    """MEL: asymmetric, ragged, many colours: dark blotches, broken network, streaks, blue-white veil, regression."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=rng.uniform(0.1, 0.22), lobes=rng.uniform(0.2, 0.32), elongation=0.5)
    angle = np.arctan2(fields.v, fields.u)
    streaks = np.zeros_like(depth)
    for frequency in rng.integers(14, 34, 3):
        streaks = streaks + np.sin(int(frequency) * angle + rng.uniform(0, 6.3) + 1.5 * depth)
    side = ramp(np.cos(angle - rng.uniform(0, 6.3)), 0.0, 0.7)  # streaks sit on one side
    ragged = depth + rng.uniform(0.02, 0.08) * streaks * side
    inside = ramp(ragged, -0.12, rng.uniform(0.1, 0.3))
    blotch = fields.noise(1.6) + 0.7 * (fields.u * rng.normal() + fields.v * rng.normal())
    uneven = rng.uniform(0.8, 1.5) * ramp(blotch, -0.3, 1.1) + 0.2 * fields.noise(0.3)
    melanin = inside * (rng.uniform(0.5, 0.85) + uneven)
    network = fields.cells(rng.uniform(0.17, 0.28), warp=0.2)
    where = ramp(fields.noise(1.0), -0.4, 0.6)
    melanin = melanin * (1 - 0.3 * where + 0.9 * where * bump(network.edge, 0.3))
    dots = fields.cells(0.2, warp=0.2)
    clustered = ramp(depth, -0.2, -0.02) * ramp(fields.noise(0.9), 0.0, 0.6)
    melanin = melanin + 1.6 * clustered * ramp(dots.distance, 0.34, 0.18) * (dots.value > 0.45)
    tissue = Tissue(melanin, inside * rng.uniform(0.0, 0.25) * (1 + 0.4 * fields.noise(0.8)))
    tissue.paint(0.8 * inside * ramp(blotch, rng.uniform(0.0, 0.5), 2.0), (48, 32, 36))
    if rng.random() < 0.7:
        veil = ramp(fields.noise(1.3) + 0.5 * depth, -0.1, 1.5) * ramp(depth, 0.0, 0.5)
        tissue.paint(rng.uniform(0.4, 0.75) * veil, (92, 86, 112))
    if rng.random() < 0.55:
        scar = ramp(fields.noise(1.2), 0.2, 1.9) * ramp(depth, -0.05, 0.3)
        tissue.paint(rng.uniform(0.4, 0.7) * scar, (216, 188, 194))
        pepper = ramp(fields.cells(0.11).distance, 0.3, 0.1)
        tissue.paint(0.5 * scar * pepper, (110, 102, 118))
    return tissue


def _draw_keratosis(fields: Fields) -> Tissue:
    """BKL: waxy tan to grey-brown plaque, sharp moth-eaten border, fissures, milia-like cysts, comedo openings."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=rng.uniform(0.08, 0.18), lobes=rng.uniform(0.12, 0.26), elongation=0.5)
    bites = ramp(fields.cells(rng.uniform(0.35, 0.6)).distance, 0.55, 0.25) * ramp(depth, 0.35, 0)
    inside = ramp(depth - 0.3 * bites, -0.06, rng.uniform(0.1, 0.26))
    patchy = 0.75 + 0.4 * fields.noise(0.8)
    tissue = Tissue(inside * rng.uniform(0.25, 0.75) * patchy, inside * rng.uniform(0, 0.2))
    waxy = [(164, 124, 92), (150, 120, 108), (176, 138, 112)][rng.integers(3)]
    ridges = fields.swell(rng.uniform(0.3, 0.5))
    fissures = bump(ridges, 0.28) * inside
    tissue.melanin = tissue.melanin + rng.uniform(0.2, 0.9) * fissures
    tissue.paint(inside * rng.uniform(0.25, 0.55) * np.clip(0.7 + 0.3 * fields.noise(0.6) - 0.5 * fissures, 0, 1), waxy)
    keratin = fields.cells(rng.uniform(0.17, 0.26))
    spot = ramp(keratin.distance, 0.36, 0.16) * ramp(depth, 0.08, 0.2)
    tissue.paint(0.75 * spot * (keratin.value > rng.uniform(0.72, 0.95)), (238, 222, 196))
    tissue.paint(0.8 * spot * (keratin.value < rng.uniform(0.05, 0.3)), (74, 48, 32))
    return tissue


def _draw_basal_cell(fields: Fields) -> Tissue:
    """BCC: pearly pink, arborising vessels, blue-grey ovoid nests, often an ulcer; little or no brown."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=rng.uniform(0.08, 0.2), lobes=rng.uniform(0.15, 0.3))
    inside = ramp(depth, -0.25, 0.35)
    tissue = Tissue(0.06 * inside, inside * rng.uniform(0.15, 0.4) * (1 + 0.3 * fields.noise(0.7)))
    pearl = ramp(fields.noise(0.9) + 0.6 * depth, 0, 1.4) * inside
    tissue.paint(rng.uniform(0.3, 0.6) * pearl, (232, 198, 212))
    shine = ramp(fields.noise(0.3, stretch=4.0), 1.2, 2.4) * ramp(depth, 0, 0.4)
    tissue.paint(0.6 * shine, (246, 232, 238))
    if rng.random() < 0.8:
        nests = fields.cells(rng.uniform(0.3, 0.55), warp=0.25)
        clustered = ramp(fields.swell(1.2), -0.4, 0.5) * ramp(depth, -0.12, 0.15)
        chosen = nests.value > rng.uniform(0.3, 0.6)
        ovoid = ramp(nests.distance + 0.06 * fields.noise(0.3), 0.65, 0.2) * clustered * chosen
        tissue.paint(rng.uniform(0.6, 0.9) * ovoid, [(92, 84, 106), (98, 74, 82), (76, 68, 84)][rng.integers(3)])
    if rng.random() < 0.35:
        middle = np.hypot(fields.u - rng.normal(0, 0.3), fields.v - rng.normal(0, 0.3))
        ulcer = ramp(middle + 0.12 * fields.noise(0.5), rng.uniform(0.25, 0.45), 0.12)
        tissue.paint(0.8 * ulcer, (168, 72, 44))
        tissue.paint(0.5 * ulcer * ramp(fields.noise(0.25), 0.3, 1), (96, 34, 28))
    for _ in range(rng.integers(2, 6)):
        _grow_vessel(tissue, rng)
    return tissue


def _draw_actinic(fields: Fields) -> Tissue:
    """AKIEC: ill-defined red pseudo-network around pale follicles (strawberry), scale, often patchy brown pigment."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=rng.uniform(0.2, 0.35), lobes=rng.uniform(0.25, 0.4), elongation=0.5)
    inside = ramp(depth, -0.45, 0.6)
    follicles = fields.cells(rng.uniform(0.2, 0.3))
    strawberry = rng.uniform(0.3, 0.75)
    red = inside * (0.45 + 0.2 * fields.noise(0.5) + 0.3 * ramp(follicles.distance, 0.15, 0.45))
    tissue = Tissue(0.12 * inside, strawberry * red)
    if rng.random() < 0.65:
        patches = ramp(fields.noise(0.8) + 0.5 * depth, 0.1, 1.0) * ramp(depth, -0.2, 0.2)
        speckle = 0.55 + 0.6 * bump(follicles.edge, 0.35)
        tissue.melanin = tissue.melanin + rng.uniform(0.3, 0.8) * patches * speckle
    plugs = ramp(follicles.distance, 0.27, 0.08) * ramp(depth, -0.1, 0.25) * (follicles.value > 0.25)
    tissue.paint(rng.uniform(0.25, 0.6) * plugs, (236, 204, 176))
    scale = ramp(fields.noise(0.4, stretch=1.6) + 0.5 * depth, rng.uniform(0.9, 1.5), 2.6) * ramp(depth, -0.05, 0.3)
    tissue.paint(rng.uniform(0.5, 0.85) * scale, (244, 232, 212))
    return tissue


def _draw_dermatofibroma(fields: Fields) -> Tissue:
    """DF: central white scar-like patch inside a delicate light-brown network that fades outwards."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=0.08, lobes=rng.uniform(0.06, 0.14))
    inside = ramp(depth, -0.35, 0.4)
    ring = bump(depth - rng.uniform(0.2, 0.35), rng.uniform(0.28, 0.4))
    walls = bump(fields.cells(rng.uniform(0.14, 0.2)).edge, 0.35)
    melanin = rng.uniform(0.3, 0.6) * ring * (0.6 + 0.6 * walls + 0.15 * fields.noise(0.6))
    tissue = Tissue(melanin, rng.uniform(0.08, 0.3) * inside)
    scar = ramp(depth + 0.1 * fields.noise(0.5), rng.uniform(0.3, 0.45), 0.85)
    strands = 0.8 + 0.2 * fields.noise(0.3, stretch=3.0)
    tissue.paint(np.clip(rng.uniform(0.55, 0.85) * scar * strands, 0, 1), (238, 210, 210))
    return tissue


def _draw_vascular(fields: Fields) -> Tissue:
    """VASC: crowded, well-defined lacunae, crimson to purple to blue-black, between pale septa; saturated."""
    rng = fields.rng
    depth = _silhouette(fields, irregularity=rng.uniform(0.02, 0.1), lobes=rng.uniform(0.06, 0.16))
    lacunae = fields.cells(rng.uniform(0.3, 0.65), warp=0.15)
    septa = rng.uniform(0.1, 0.9)
    lumps = depth + 0.25 * (0.45 - lacunae.distance)  # the outline bulges around each lacuna
    inside = ramp(lumps, -0.03, rng.uniform(0.06, 0.16))
    lacuna = (1 - septa * bump(lacunae.edge, 0.35)) * (1.1 - 0.4 * lacunae.distance)
    hue = rng.uniform(0, 1)
    blood = inside * lacuna * rng.uniform(0.9, 1.5) * (0.75 + 0.5 * lacunae.value + 0.12 * fields.noise(0.4))
    tissue = Tissue(0.05 * inside, blood + 0.2 * ramp(depth, -0.6, 0))
    purple = inside * lacuna * np.clip(hue + 0.7 * (lacunae.value - 0.5), 0, 1)
    tissue.paint(0.6 * purple, (92, 42, 84))
    if rng.random() < 0.3:
        clot = ramp(fields.noise(1.2), -0.1, 1.2) * inside
        tissue.paint(0.85 * clot, (38, 26, 44))
    if rng.random() < 0.4:
        veil = ramp(fields.noise(1.0), 0.2, 1.2) * inside
        tissue.paint(0.4 * veil, (204, 178, 206))
    return tissue


def _grow_vessel(tissue: Tissue, rng: np.random.Generator) -> None:
    """Add one arborising vessel: it enters from the rim, wanders inwards, and branches into thinner ones."""
    rim = rng.uniform(0, 2 * np.pi)
    start = 0.95 * np.array([np.cos(rim), np.sin(rim)])
    stems = [(start, rim + np.pi + rng.normal(0, 0.4), rng.uniform(0.035, 0.055), rng.uniform(0.7, 1.2))]
    while stems:
        point, heading, thickness, length = stems.pop()
        steps = max(4, int(length / 0.06))
        headings = heading + np.cumsum(rng.normal(0, 0.28, steps))
        path = point + np.cumsum(0.06 * np.stack([np.cos(headings), np.sin(headings)], 1), 0)
        tissue.vessels.append((path, thickness))
        if thickness > 0.022:
            for _ in range(rng.integers(1, 4)):
                at = rng.integers(1, steps)
                bend = rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
                stems.append((path[at], headings[at] + bend, thickness * 0.62, length * rng.uniform(0.4, 0.65)))


# How it is drawn, its radius in half heights of the frame, the probability of freckled skin with fine red vessels.
_CLASSES: dict[str, tuple[Callable[[Fields], Tissue], tuple[float, float], float]] = {
    "AKIEC": (_draw_actinic, (0.45, 0.8), 0.75),
    "BCC": (_draw_basal_cell, (0.35, 0.7), 0.5),
    "BKL": (_draw_keratosis, (0.35, 0.7), 0.45),
    "DF": (_draw_dermatofibroma, (0.35, 0.7), 0.15),
    "MEL": (_draw_melanoma, (0.45, 0.8), 0.4),
    "NV": (_draw_naevus, (0.35, 0.75), 0.15),
    "VASC": (_draw_vascular, (0.22, 0.5), 0.15),
}


# --- the skin and the camera ---


def _add_skin(tissue: Tissue, fields: Fields, sun_damage: float) -> NDArray[np.float32]:
    """Add mottling, creases and sun damage to `tissue`; returns the bare skin's RGB [3] in 0..255. Frame units."""
    rng = fields.rng
    first, second = rng.choice(len(SKIN_TONES), 2, p=[0.35, 0.2, 0.15, 0.1, 0.2])
    mix = rng.uniform(0, 1)
    tone = mix * np.array(SKIN_TONES[first]) + (1 - mix) * np.array(SKIN_TONES[second]) + rng.normal(0, 4, 3)
    creases = fields.cells(rng.uniform(0.1, 0.18), stretch=rng.uniform(1.3, 2.2))
    tissue.melanin = tissue.melanin + 0.03 * fields.noise(1.2) + 0.022 * fields.noise(0.15)
    tissue.blood = tissue.blood + 0.035 * fields.noise(0.9) - rng.uniform(0, 0.06) * bump(creases.edge, 0.2)
    if rng.random() < sun_damage:
        tissue.melanin = tissue.melanin + rng.uniform(0.1, 0.25) * ramp(fields.noise(0.3), 0.4, 2.6)
        meshes = bump(fields.swell(0.3), 0.16) * ramp(fields.noise(0.9), 0.0, 1.2)
        tissue.blood = tissue.blood + rng.uniform(0.08, 0.4) * meshes
    return tone.astype(np.float32)


def _photograph(
    light: Array, x: Array, y: Array, lesion_rng: np.random.Generator, view_rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Hair, gel bubbles, lamp, lens and sensor; uint8 [H, W, 3]. x, y: frame coordinates [H, W]."""
    height, width = x.shape
    if lesion_rng.random() < 0.35:
        dark = lesion_rng.random() < 0.8
        hair = strokes(_hairs(view_rng, width, height), width=width, height=height)[..., None]
        colour = np.array((46, 32, 30) if dark else (206, 186, 160), np.float32)
        light += lesion_rng.uniform(0.55, 0.9) * hair * (colour - light)
    if view_rng.random() < 0.3:
        for _ in range(view_rng.integers(1, 7)):
            radius = view_rng.uniform(0.012, 0.06)
            bx, by = view_rng.uniform(-1.2, 1.2), view_rng.uniform(-0.9, 0.9)
            away = np.hypot(x - np.float32(bx), y - np.float32(by)) - np.float32(radius)
            gleam = 0.5 * bump(away, 0.012) * ramp(x - np.float32(bx) + y - np.float32(by), radius, -radius)
            gleam += 0.9 * bump(np.hypot(x - np.float32(bx - 0.3 * radius), y - np.float32(by - 0.3 * radius)), 0.012)
            light += np.minimum(gleam, 1)[..., None] * (250 - light)
    sigma = view_rng.uniform(0.45, 1.0) * height / 150
    light = ndimage.gaussian_filter(light, (sigma, sigma, 0), truncate=2.5)

    from_axis = np.hypot(x, y)
    lamp = view_rng.normal(1.0, 0.04) + view_rng.normal(0, 0.03) * x + view_rng.normal(0, 0.03) * y
    lamp = lamp - view_rng.uniform(0.0, 0.1) * np.square(from_axis)
    if view_rng.random() < 0.1:  # the dermatoscope's tube shows in the corners
        tube = view_rng.uniform(1.15, 1.5)
        lamp = lamp * (0.04 + 0.96 * ramp(from_axis, tube + view_rng.uniform(0.05, 0.15), tube))
    light *= lamp[..., None] * view_rng.normal(1.0, (0.025, 0.03, 0.045)).astype(np.float32)
    grain = view_rng.standard_normal((height, width, 1), dtype=np.float32)
    light += view_rng.uniform(0.8, 2.2) * grain
    light += view_rng.standard_normal((height, width, 3), dtype=np.float32)
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)


def _hairs(rng: np.random.Generator, width: int, height: int) -> list[Curve]:
    """A few hairs as curves in pixels: long strands across the frame, or short shaved stubble."""
    stubble = rng.random() < 0.35
    lean = rng.uniform(0, 2 * np.pi)
    hairs = []
    for _ in range(rng.integers(6, 22) if stubble else rng.integers(1, 8)):
        length = height * (rng.uniform(0.04, 0.1) if stubble else rng.uniform(0.4, 1.4))
        heading = lean + rng.normal(0, 0.3 if stubble else 0.7)
        bends = heading + np.linspace(0, rng.normal(0, 0.2 if stubble else 0.9), 16)
        path = np.cumsum(length / 16 * np.stack([np.cos(bends), np.sin(bends)], 1), 0)
        start = rng.uniform(0, 1, 2) * (width, height) - path[8]
        hairs.append((start + path, rng.uniform(0.6, 1.3) * height / 150))
    return hairs


# --- textures and strokes ---


def ramp(values: Array, start: float, end: float) -> Array:
    """0 up to `start`, 1 from `end` on, a smooth step between; falls where start > end. Same shape as `values`."""
    t = np.clip((values - np.float32(start)) * np.float32(1 / (end - start)), 0, 1)
    return t * t * (3 - 2 * t)


def bump(values: Array, width: float) -> Array:
    """Gaussian bump: 1 where `values` is 0, exp(-1) at `width`."""
    return np.exp(-np.square(values * np.float32(1 / width)))


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
