"""What the feature extractor and the U-Net see, as pictures of patches, alignment and classes. Telemetry calls it.

The numbers come from components.py and similarity.py; the charts of classes are drawn in class_charts.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image

from m2d.plots.components import patch_colours
from m2d.plots.style import percent
from m2d.plots.tiles import GAP, LINE, STRIPE, Page, columns_for, require_images, require_labels, whole_factor

_HEAD = LINE + STRIPE + 4  # a class's code and stripe
_BETWEEN = 20  # from one pair to the next, more than within one
_NO_VALUE = (224, 224, 224)


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
    means = [float(one[there].mean()) if there.any() else None for one, there in zip(cosine, known, strict=True)]
    overall = f": {cosine[known].mean():.2f} on average" if known.any() else ""
    return _pairs(
        images, heat(cosine), labels,
        title=f"Alignment with the feature extractor{overall}",
        caption="Cosine of each token's projected U-Net features with the extractor's; the number is the image's mean.",
        notes=["" if mean is None else f"{mean:.2f}" for mean in means],
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
    bar: Mapping[float, str] | None = None,
) -> Image.Image:
    """A page of images [N, H, W, 3] each beside its map [N, h, w, 3], both enlarged to about the same size."""
    labels = np.asarray(labels, dtype=int)
    require_images(images)
    if len(maps) != len(images):
        raise ValueError(f"{len(images)} images beside {len(maps)} maps; expected one for each")
    require_labels(labels, len(images))
    count, height, width = images.shape[:3]
    factor = whole_factor(max(height, width))
    map_factor = max(1, round(factor * max(height, width) / max(maps.shape[1:3])))
    left_w, right_w = width * factor, maps.shape[2] * map_factor
    cell_w = left_w + GAP + right_w
    cell_h = max(height * factor, maps.shape[1] * map_factor)
    columns = columns_for(count, cell_w + _BETWEEN)
    block = _HEAD + cell_h + _BETWEEN
    bar_h = 54 if bar else 0
    body_h = bar_h + max(block * -(-count // columns) - _BETWEEN, LINE)
    page = Page(columns * (cell_w + _BETWEEN) - _BETWEEN, body_h, title=title, caption=caption)
    if bar:
        page.colour_bar(heat(np.linspace(0, 1, 256)), page.left, page.top, 256, dict(bar))
    if not count:
        page.nothing(below=bar_h)
    for number in range(count):
        x = page.left + number % columns * (cell_w + _BETWEEN)
        y = page.top + bar_h + number // columns * block
        page.class_stripe(int(labels[number]), x, y, cell_w)
        if notes:
            page.words(notes[number], x + left_w + GAP, y)
        page.paste(images[number], x, y + _HEAD, factor)
        page.paste(maps[number], x + left_w + GAP, y + _HEAD, map_factor)
    return page.image
