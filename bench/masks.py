"""Lesion masks by a threshold, for images that come without any: to try `generate --masks` with.

python bench/masks.py --real /data/ISIC --to MASKS

How far each pixel's colour is from the skin's (the median at the picture's edge), smoothed, is divided by Otsu's
threshold (IEEE Transactions on Systems, Man, and Cybernetics 9, 1979); the largest piece that the edge does not cut is
the lesion. Of an image where this finds nothing, or more than half of the picture, no mask is written. Masks drawn by
people are better; the overview shows how good these are.
"""

from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from scipy import ndimage

from m2d.data.catalog import scan_dataset
from m2d.data.settings import DataConfig
from m2d.generation.references import MASK_SUFFIX

SMALLEST, LARGEST = 0.02, 0.5  # parts of the picture
SHOWN, SIDE = 8, 96  # images of a class in the overview, and their pixels a side


def main(real: str, to: str) -> None:
    """Write TO/CLASS/NAME_segmentation.png for each image whose lesion is found, and TO/overview.png."""
    rows = scan_dataset(real, DataConfig()).catalog.to_pylist()
    written, overview = dict.fromkeys(sorted({row["label"] for row in rows}), 0), dict[str, list[np.ndarray]]()
    for row in rows:
        with Image.open(Path(real) / row["path"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        lesion = lesion_of(pixels)
        if lesion is None:
            continue
        place = Path(to, row["label"], Path(row["path"]).stem + MASK_SUFFIX)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(lesion, 255, 0).astype(np.uint8)).save(place)
        written[row["label"]] += 1
        if len(shown := overview.setdefault(row["label"], [])) < SHOWN:
            edge = lesion ^ ndimage.binary_erosion(lesion, iterations=2)
            shown.append(np.where(edge[..., None], np.array([0, 255, 0], np.uint8), pixels))
    for label, count in written.items():
        print(f"{label}: {count:,} of {sum(row['label'] == label for row in rows):,} images have a mask")
    sheet = Image.new("RGB", (SHOWN * SIDE, len(overview) * SIDE))
    for down, shown in enumerate(overview.values()):
        for across, one in enumerate(shown):
            sheet.paste(Image.fromarray(one).resize((SIDE, SIDE)), (across * SIDE, down * SIDE))
    sheet.save(Path(to, "overview.png"))


def lesion_of(pixels: np.ndarray) -> np.ndarray | None:
    """bool [H, W]: the lesion in RGB pixels, uint8 [H, W, 3]; None where there is none to be seen."""
    height, width = pixels.shape[:2]
    ring = np.ones((height, width), dtype=bool)
    ring[height // 12 : -(height // 12), width // 12 : -(width // 12)] = False
    lit = pixels.max(axis=2) > 60  # not the dark corners of a round picture
    if not (ring & lit).any():
        return None
    skin = np.median(pixels[ring & lit], axis=0)
    far = np.linalg.norm(pixels - skin, axis=2) * lit
    far = ndimage.gaussian_filter(far, min(height, width) / 50)
    pieces, count = ndimage.label(ndimage.binary_fill_holes(far > otsu(far)))
    cut = np.unique(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]]))
    whole = np.setdiff1d(np.arange(1, count + 1), cut)
    if not len(whole):
        return None
    lesion = pieces == max(whole, key=lambda piece: np.count_nonzero(pieces == piece))
    smoother = min(height, width) // 20  # gaps are closed that are up to twice as wide
    padded = ndimage.binary_closing(np.pad(lesion, smoother), iterations=smoother)
    lesion = ndimage.binary_fill_holes(padded[smoother:-smoother, smoother:-smoother])
    return lesion if SMALLEST <= lesion.mean() <= LARGEST else None


def otsu(values: np.ndarray) -> float:
    """The threshold between whose sides the values differ most, by variance."""
    counts, edges = np.histogram(values, 256)
    below, sums = np.cumsum(counts), np.cumsum(counts * edges[:-1])
    above = below[-1] - below
    apart = below * above * (sums / below.clip(1) - (sums[-1] - sums) / above.clip(1)) ** 2
    return float(edges[int(apart.argmax()) + 1])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
