"""Where a run's features come from, the cache that setup_data wrote or the extractor, and what is fitted to them.

A cached feature and an extracted one are of the same pixels; they differ by the cache's fp16 rounding alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2d.classes import NUM_CLASSES
from m2d.data.features import FeatureTable
from m2d.data.reader import ImageReader
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.models.extractors import FeatureExtractor, Features
from m2d.training.step import extract, on_device
from m2d.training.update import all_reduce_sum


@dataclass(frozen=True)
class FeatureSource:
    """Features of the images of one split, from the cache where there is one."""

    device: torch.device
    extractor: FeatureExtractor | None = None
    table: FeatureTable | None = None

    @property
    def num_patches(self) -> int:
        """N of an image."""
        if self.table is not None:
            return self.table.num_patches
        assert self.extractor is not None, "no extractor and no cached features"
        return self.extractor.num_patches

    def features(self, pixels: Tensor, rows: np.ndarray, views: np.ndarray) -> Features:
        """float32 on the device. pixels: uint8 [B, 3, H, W] there; rows int64 [B] of the split, views int8 [B]."""
        if self.table is not None:
            return on_device(self.table.batch(rows, views), self.device)
        assert self.extractor is not None, "no extractor and no cached features"
        return extract(self.extractor, pixels)

    def cls_of(self, pixels: Tensor, rows: np.ndarray) -> Tensor:
        """The cls features [B, D] alone, of rows as they are (view 0), whose pixels are given; float32."""
        if self.table is not None:
            return self.table.cls(rows, np.zeros(len(rows), dtype=np.int8)).to(self.device).float()
        assert self.extractor is not None, "no extractor and no cached features"
        return extract(self.extractor, pixels).cls

    def cls(self, reader: ImageReader, rows: np.ndarray) -> Tensor:
        """The same, of rows that are yet to be read; the cache needs no pixels."""
        if self.table is not None:
            return self.cls_of(torch.empty(0), rows)
        read = reader.read(rows, np.zeros(len(rows), dtype=np.int8))
        return self.cls_of(torch.from_numpy(read["images"]).to(self.device).permute(0, 3, 1, 2), read["catalog_rows"])


@dataclass(frozen=True)
class FeatureFit:
    """What conditioning and generation need to know of the training split's cls features."""

    mean: Tensor  # [D], every image of the split weighing the same
    std: Tensor  # [D]
    prior: FeaturePrior


@torch.no_grad()
def fit_features(
    source: FeatureSource,
    reader: ImageReader,
    *,
    dim: int,
    images: int,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
) -> FeatureFit:
    """Fit to the training split, each worker extracting a share. Every worker gets the same.

    dim: D. images: so many at most are extracted, all of a rare class before a common one's surplus; cached features
    cost nothing, so all of them are taken. The means of the classes are weighed by the split's counts.
    """
    rows = spread_over_classes(reader.labels, len(reader) if source.table is not None else images, seed)
    gathered = torch.zeros(len(rows), dim, device=source.device)
    mine = np.arange(rank, len(rows), world_size)
    for start in range(0, len(mine), batch_size):
        share = mine[start : start + batch_size]
        gathered[torch.from_numpy(share).to(source.device)] = source.cls(reader, rows[share])
    cls = all_reduce_sum(gathered).cpu()
    labels = reader.labels[rows]
    mean, std = class_weighted_moments(cls, labels, np.bincount(reader.labels, minlength=NUM_CLASSES))
    return FeatureFit(mean, std, FeaturePrior.fit(cls, torch.from_numpy(labels)))


def spread_over_classes(labels: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """At most `wanted` rows, int64 ascending, with as even a count over classes as their sizes allow."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels), dtype=np.int64)  # of a row within its class: 0, 1, 2 ...
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        place[of_class] = np.arange(len(of_class))
    first = np.lexsort((order.argsort(), place))  # every class's first rows, then every class's second ones ...
    return np.sort(first[:wanted])


def class_weighted_moments(cls: Tensor, labels: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] of the mixture in which class c weighs counts[c]; cls [n, D], labels int64 [n].

    std^2 = sum_c w_c E_c[x^2] - mean^2: the law of total variance.
    """
    present = np.unique(labels)
    weights = counts[present] / counts[present].sum()
    cls = cls.double()
    mean, square = torch.zeros(cls.shape[1], dtype=torch.float64), torch.zeros(cls.shape[1], dtype=torch.float64)
    for label, weight in zip(present, weights, strict=True):
        of_class = cls[torch.from_numpy(labels == label)]
        mean += weight * of_class.mean(dim=0)
        square += weight * of_class.square().mean(dim=0)
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()
