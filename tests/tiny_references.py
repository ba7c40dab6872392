"""Input images for tests of generation, and an extractor that fits tests/generation's tiny checkpoint."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from m2d.models.extractors import FeatureExtractor, Features


class SixFeatures(FeatureExtractor):
    """A frozen random convolution whose cls has the six dimensions of the tiny checkpoint."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__("six", dim, 16, torch.full((3,), 127.0), torch.full((3,), 64.0), num_patches=4)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.network = nn.Conv2d(3, dim, 8, stride=8).requires_grad_(False)
            nn.init.normal_(self.network.weight, std=0.5)

    def forward(self, x: Tensor) -> Features:
        patches = self.network(x).flatten(2).transpose(1, 2)
        return Features(cls=patches.mean(dim=1), patches=patches)


def write_photograph(path: Path, number: int, size: tuple[int, int] = (24, 20)) -> Path:
    """A smooth picture of its own for each number; width x height pixels."""
    stream = np.random.default_rng(number)
    pixels = Image.fromarray(stream.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels.save(path)
    return path


def write_photographs(folder: Path, counts: dict[str, int], first: int = 0) -> list[Path]:
    """Class folders with so many PNGs each, no two alike, `first` shifting what they show."""
    places: Iterable[Path] = (folder / code / f"{n}.png" for code, count in counts.items() for n in range(count))
    return [write_photograph(place, first + number) for number, place in enumerate(places)]
