"""Where a run's features come from, what is fitted to them, and the latent stage's cache of latents.

Cached features and extracted ones are of the same pixels; they differ by the cache's fp16 rounding alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d.classes import ISIC7, ClassSet
from m2d.data.features import FeatureTable
from m2d.data.reader import ImageReader
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.files.atomic import whole_file
from m2d.models.autoencoder import Autoencoder, Vae, block_pca, coded_at_once, from_uint8
from m2d.models.extractors import FeatureExtractor, Features
from m2d.training.batch import LatentBatch, extract, on_device
from m2d.training.networks import all_reduce_sum
from m2d.training.settings import TrainConfig

Told = Callable[[str, int, int], None]  # of preparations: what is done, how much of it, of how much
SHARD = 1024  # (image, view) pairs in a file of cached latents


@dataclass(frozen=True)
class FeatureSource:
    """Features of the images of one split, float32 on the device: from the cache where there is one."""

    device: torch.device
    extractor: FeatureExtractor | None = None
    table: FeatureTable | None = None

    @property
    def source(self) -> FeatureTable | FeatureExtractor:
        """Where they come from. Its dim: D; its num_patches: N."""
        source = self.table if self.table is not None else self.extractor
        assert source is not None, "no extractor and no cached features"
        return source

    def features(self, pixels: Tensor, rows: np.ndarray, views: np.ndarray) -> Features:
        """pixels: uint8 [B, 3, H, W] on the device; rows int64 [B] of the split, views int8 [B]."""
        if self.table is not None:
            return on_device(self.table.batch(rows, views), self.device)
        assert self.extractor is not None, "no extractor and no cached features"
        return extract(self.extractor, pixels)

    def cls_of(self, pixels: Tensor, rows: np.ndarray) -> Tensor:
        """The cls features [B, D] alone, of rows as they are (view 0), whose pixels are given."""
        views = np.zeros(len(rows), dtype=np.int8)
        if self.table is not None:
            return self.table.cls(rows, views).to(self.device).float()
        return self.features(pixels, rows, views).cls

    def cls(self, reader: ImageReader, rows: np.ndarray) -> Tensor:
        """The same, of rows that are yet to be read; the cache needs no pixels."""
        return self.cls_of(
            *((torch.empty(0), rows) if self.table is not None else read_pixels(reader, rows, self.device))
        )


def read_pixels(reader: ImageReader, rows: np.ndarray, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Images of rows as they are (view 0): uint8 [B, 3, H, W] on the device, and the rows that they are of.

    Another image of its class takes the place of one that cannot be read any more.
    """
    read = reader.read(rows, np.zeros(len(rows), dtype=np.int8))
    return torch.from_numpy(read["images"]).to(device).permute(0, 3, 1, 2), read["catalog_rows"]


@torch.no_grad()
def fit_features(
    source: FeatureSource,
    reader: ImageReader,
    config: TrainConfig,
    rank: int,
    world_size: int,
    classes: ClassSet = ISIC7,
    told: Told = lambda *_: None,
) -> tuple[FeaturePrior, Tensor, Tensor]:
    """(prior, mean [D], std [D]) of the split's cls features, of which each worker extracts a share; equal on all.

    At most statistics_images are extracted, all of a rare class before a common one's surplus; cached features cost
    nothing, so all of them are taken. In mean and std every image of the split weighs the same.
    """
    images = len(reader) if source.table is not None else config.feature_extractor.statistics_images
    rows = spread_over_classes(reader.labels, images, config.seed)
    gathered = torch.zeros(len(rows), source.source.dim, device=source.device)
    mine = np.arange(rank, len(rows), world_size)
    for start in range(0, len(mine), config.batch_size):
        share = mine[start : start + config.batch_size]
        gathered[torch.from_numpy(share).to(source.device)] = source.cls(reader, rows[share])
        told("features of training images", min(world_size * (start + config.batch_size), len(rows)), len(rows))
    cls = all_reduce_sum(gathered).cpu()
    labels = reader.labels[rows]
    counts = np.bincount(reader.labels, minlength=len(classes))
    return FeaturePrior.fit(cls, torch.from_numpy(labels), classes=classes), *class_weighted_moments(
        cls, labels, counts
    )


@torch.no_grad()
def fit_linear(
    vae: Vae,
    reader: ImageReader,
    device: torch.device,
    config: TrainConfig,
    rank: int,
    world_size: int,
) -> None:
    """Fit an autoencoder's block PCA, if any, to statistics_images of the split; equal on all workers."""
    pca = block_pca(vae)
    if pca is None:
        return
    rows = spread_over_classes(reader.labels, config.feature_extractor.statistics_images, config.seed)[rank::world_size]
    patch = pca.config.patch_size
    size = 3 * patch**2
    sums = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)  # of (1, x) (1, x)'
    for start in range(0, len(rows), config.batch_size):
        pixels, _ = read_pixels(reader, rows[start : start + config.batch_size], device)
        blocks = F.pixel_unshuffle(from_uint8(pixels), patch).movedim(1, -1).reshape(-1, size).double()
        extended = F.pad(blocks, (1, 0), value=1.0)
        sums += extended.T @ extended
    moments = all_reduce_sum(sums) / sums[0, 0]
    pca.set_basis(moments[0, 1:], moments[1:, 1:], config.autoencoder.whitening)
    for tensor in pca.state_dict().values():  # eigenvectors of near-equal eigenvalues depend on the machine
        all_reduce_sum(tensor if rank == 0 else tensor.zero_())


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
    mean, square = torch.zeros(2, cls.shape[1], dtype=torch.float64)
    for label, weight in zip(present, weights, strict=True):
        of_class = cls[torch.from_numpy(labels == label)]
        mean += weight * of_class.mean(dim=0)
        square += weight * of_class.square().mean(dim=0)
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


class LatentTable:
    """The latent stage's cache, fp16: posterior mean and std of every image and view, entry = row * views + view.

    Shards are memory-mapped; workers of one machine share the pages.
    """

    def __init__(
        self, folder: Path, views: int, labels: np.ndarray, num_entries: int, features: FeatureTable | None = None
    ) -> None:
        """features: setup_data's cache of the same rows; without it the shards hold the features too."""
        self._features = features
        self._shards = [load_file(_shard_path(folder, start)) for start in range(0, num_entries, SHARD)]
        self._views = views
        self._labels = torch.from_numpy(labels)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> LatentBatch:
        """The batch of catalog rows int64 [B] in views int8 [B]."""
        places = [divmod(int(entry), SHARD) for entry in rows * self._views + views]

        def column(name: str) -> Tensor:
            return torch.stack([self._shards[shard][name][offset] for shard, offset in places])

        table = self._features
        features = Features(column("cls"), column("patches")) if table is None else table.batch(rows, views)
        return LatentBatch(column("mean"), column("std"), features, self._labels[torch.from_numpy(rows)])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of sampled latents over all entries: E[mean], E[mean^2 + std^2] - E[mean]^2."""
        count, first, second = 0, torch.zeros(()), torch.zeros(())
        for shard in self._shards:
            mean, std = shard["mean"].double(), shard["std"].double()
            count += mean.numel() // mean.shape[1]
            first = first + mean.sum(dim=(0, 2, 3))
            second = second + (mean.square() + std.square()).sum(dim=(0, 2, 3))
        return (first / count).float(), (second / count - (first / count).square()).float()


@torch.no_grad()
def cache_latents(
    autoencoder: Autoencoder,
    reader: ImageReader,
    source: FeatureSource,
    folder: Path,
    views: int,
    rank: int,
    world_size: int,
    told: Told = lambda *_: None,
) -> LatentTable:
    """Encode every image in every view, except shards that are there already, and open the table.

    Each worker makes a share of the shards. They hold the features too where setup_data's cache does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = len(reader) * views

    def encode(indices: np.ndarray) -> dict[str, Tensor]:
        rows, view_of_row = indices // views, (indices % views).astype(np.int8)
        read = reader.read(rows, view_of_row)
        pixels = torch.from_numpy(read["images"]).to(source.device).permute(0, 3, 1, 2)
        posterior = autoencoder.encode(from_uint8(pixels))
        columns = {"mean": posterior.mean, "std": posterior.std}
        if source.table is None:
            columns |= vars(source.features(pixels, rows, view_of_row))
        return {name: column.half().cpu().contiguous() for name, column in columns.items()}

    def is_made(path: Path) -> bool:
        """With what this run needs: the features' own cache may have come or gone since."""
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as shard:
            return "cls" in shard.keys() or source.table is not None  # noqa: SIM118 - not a mapping

    for number, start in enumerate(range(0, entries, SHARD)):
        path, end = _shard_path(folder, start), min(start + SHARD, entries)
        if number % world_size != rank or is_made(path):
            continue
        step = coded_at_once(reader.image_size)
        parts = []
        for i in range(start, end, step):
            parts.append(encode(np.arange(i, min(i + step, end))))
            told("caching latents", min(start + world_size * (i + step - start), entries), entries)
        with whole_file(path) as partial:
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, partial)
    all_reduce_sum(torch.zeros(1, device=source.device))  # all shards are there
    return LatentTable(folder, views, reader.labels, entries, source.table)


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"latents_{start:09d}.safetensors"
