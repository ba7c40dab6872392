"""How sharp generated images are, beside real ones and a baseline's: energy of the Laplacian, by class.

python bench/sharpness.py --real ../shared/ham10000 --generated DIR

Every image is cropped and resized to the same size. The Laplacian (x_left + x_right + x_up + x_down - 4 x, of grey
levels in [0, 1]) answers to edges and texture; blur takes it away. 1.0 is as much as real images of the class have.
Noise adds to it too, so a ratio above 1 is no praise: look at the images beside it.
"""

import json
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from m2d.classes import ISIC7
from m2d.data.decode import decode_resized

IMAGES = 400  # of a class at most


def main(
    real: str = "../shared/ham10000",
    prototype: str = "../shared/prototype_samples",
    generated: str | None = None,
    image_size: int = 64,
    output: str | None = None,
) -> None:
    """Print the table; write it as JSON to `output`. generated: a folder of class folders to compare."""
    folders = {"prototype": prototype} | ({"generated": generated} if generated else {})
    energies = {name: by_class(Path(folder), image_size) for name, folder in {"real": real, **folders}.items()}
    ratios = {
        name: {code: found[code] / energies["real"][code] for code in ISIC7.codes if code in found}
        for name, found in energies.items()
    }
    print(f"Laplacian energy at {image_size} px, relative to real images of the class")
    print(f"{'':12}" + "".join(f"{code:>8}" for code in ISIC7.codes))
    for name, row in ratios.items():
        print(f"{name:12}" + "".join(f"{row[code]:8.2f}" if code in row else f"{'-':>8}" for code in ISIC7.codes))
    if output is not None:
        Path(output).write_text(json.dumps({"image_size": image_size, "ratio_to_real": ratios}, indent=1), "utf-8")


def by_class(root: Path, image_size: int) -> dict[str, float]:
    """Mean Laplacian energy of each class that the folder has."""
    found = {}
    for code in ISIC7.codes:
        paths = sorted(path for path in (root / code).glob("*") if path.suffix.lower() in (".png", ".jpg"))[:IMAGES]
        if paths:
            found[code] = float(np.mean([laplacian_energy(path, image_size) for path in paths]))
    return found


def laplacian_energy(path: Path, image_size: int) -> float:
    """Mean square of the Laplacian of one image's grey levels."""
    pixels = decode_resized(path.read_bytes(), image_size, max_pixels=100_000_000)
    grey = pixels.astype(np.float64).mean(axis=2) / 255
    centre = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
    return float(np.square(laplacian).mean())


if __name__ == "__main__":
    auto_cli(main)
