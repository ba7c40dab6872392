"""The latent stage's cache: posterior mean and std of every (image, view), in fp16, and the extractor's features where
setup_data's cache does not hold them.

Each worker encodes its share of the shards into the experiment's cache; a shard that is there is not made again.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d.data.features import FeatureTable
from m2d.data.reader import ImageReader
from m2d.files.atomic import whole_file
from m2d.models.autoencoder import from_uint8
from m2d.models.extractors import Features
from m2d.training.batch import LatentBatch
from m2d.training.features import FeatureSource
from m2d.training.step import Networks
from m2d.training.update import barrier

SHARD = 1024  # (image, view) pairs a file


class LatentTable:
    """Cached latents, entry = row * views + view. Shards are memory-mapped; workers of a machine share the pages."""

    def __init__(
        self, folder: Path, views: int, labels: np.ndarray, num_entries: int, features: FeatureTable | None = None
    ) -> None:
        """features: setup_data's cache of the same rows; without it the shards hold the features too."""
        self._features = features
        self._shards = [load_file(folder / _name(start)) for start in range(0, num_entries, SHARD)]
        self._views = views
        self._labels = torch.from_numpy(labels)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> LatentBatch:
        """The batch of catalog rows int64 [B] in views int8 [B]."""
        places = [divmod(int(entry), SHARD) for entry in rows * self._views + views]

        def column(name: str) -> Tensor:
            return torch.stack([self._shards[shard][name][offset] for shard, offset in places])

        if self._features is None:
            features = Features(column("cls"), column("patches"))
        else:
            features = self._features.batch(rows, views)
        return LatentBatch(
            mean=column("mean"),
            std=column("std"),
            features=features,
            labels=self._labels[torch.from_numpy(rows)],
        )

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
    networks: Networks,
    reader: ImageReader,
    source: FeatureSource,
    folder: Path,
    *,
    views: int,
    batch_size: int,
    rank: int,
    world_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> LatentTable:
    """Encode what is missing, then open the table. Entries: every row of the reader in every view."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = len(reader) * views
    for number, start in enumerate(range(0, entries, SHARD)):
        if number % world_size != rank or _is_made(folder / _name(start), with_features=source.table is None):
            continue
        indices = np.arange(start, min(start + SHARD, entries))
        parts = [
            _encode(networks, reader, source, indices[i : i + batch_size], views)
            for i in range(0, len(indices), batch_size)
        ]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        with whole_file(folder / _name(start)) as partial:
            save_file(columns, partial)
        if progress is not None:
            progress(min(start + SHARD, entries), entries)
    barrier()
    return LatentTable(folder, views, reader.labels, entries, source.table)


def _encode(
    networks: Networks, reader: ImageReader, source: FeatureSource, entries: np.ndarray, views: int
) -> dict[str, Tensor]:
    rows, view_of_row = entries // views, (entries % views).astype(np.int8)
    read = reader.read(rows, view_of_row)
    pixels = torch.from_numpy(read["images"]).to(source.device).permute(0, 3, 1, 2)
    posterior = networks.autoencoder.encode(from_uint8(pixels))
    columns = {"mean": posterior.mean, "std": posterior.std}
    if source.table is None:
        features = source.features(pixels, rows, view_of_row)
        columns |= {"cls": features.cls, "patches": features.patches}
    return {name: column.half().cpu().contiguous() for name, column in columns.items()}


def _is_made(path: Path, *, with_features: bool) -> bool:
    """Whether a shard is there, with what this run needs: the features' own cache may have come or gone since."""
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as shard:
        return "cls" in shard.keys() or not with_features  # noqa: SIM118 - not a mapping


def _name(start: int) -> str:
    return f"latents_{start:09d}.safetensors"
