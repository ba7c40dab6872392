"""The work of one feature task: extract the features of a few hundred images in one view and write them as one file.

m2d.data.prepare hands such jobs to Ray's actors, which hold the network; nothing here knows of Ray.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2d.cluster.fan_out import JobResult
from m2d.data.feature_store import write_features
from m2d.data.prepared import PreparedRows
from m2d.data.views import apply_view
from m2d.errors import ConfigError, DataError
from m2d.models.extractors import FeatureExtractor, Features, load_feature_extractor
from m2d.models.settings import FeatureExtractorConfig

GPU_BATCH, CPU_BATCH = 128, 16  # a CPU's caches hold the maps of few images: 8 to 16 go faster than 64


@dataclass(frozen=True)
class FeatureJobs:
    """Job j: the features of the rows `rows[j]` in the view `views[j]`. Cheap to pickle."""

    config: FeatureExtractorConfig
    key: str  # of the extractor that the driver has
    pixels: PreparedRows
    folder: Path  # of the dataset, in the cache
    paths: Sequence[str]  # of all rows
    sha256: Sequence[str]
    views: Sequence[int]
    rows: Sequence[np.ndarray]
    batch_size: int | None  # None: as the device likes it

    def run(self, job: int, extractor: FeatureExtractor, device: str) -> JobResult:
        """Write the file of job j. Raises DataError for prepared images that are damaged or values beyond fp16."""
        rows, view = self.rows[job], self.views[job]
        pixels = self.pixels.read(rows)
        for row, image in zip(rows, pixels, strict=True):
            if image is None:
                raise DataError(
                    f"images: {self.pixels.file_of(int(row))} is damaged or gone; delete it, then run setup_data "
                    "--images --features again"
                )
        images = [image for image in pixels if image is not None]
        size = self.batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
        batches = (images[first : first + size] for first in range(0, len(images), size))
        features = [extract_view(extractor, np.stack(batch), view, device) for batch in batches]
        write_features(
            self.folder,
            self.key,
            self.pixels.image_size,
            view,
            [self.sha256[int(row)] for row in rows],
            Features(torch.cat([f.cls for f in features]), torch.cat([f.patches for f in features])),
            names=[self.paths[int(row)] for row in rows],
        )
        return JobResult(len(rows))

    def load(self, device: str, threads: int) -> FeatureExtractor:
        """On the device, ready to use. threads: of torch in this process, for a CPU, never more than it has cores.

        Raises ConfigError where this machine's weights are not the driver's.
        """
        if device == "cpu":
            torch.set_num_threads(min(threads, os.cpu_count() or 1))
        config = self.config
        extractor = load_feature_extractor(config.name, config.weights, config.input_size, config.crop)
        if extractor.key != self.key:
            raise ConfigError(
                f"feature_extractor: a node's weights give {extractor.key}, the driver's {self.key}; every node needs "
                "the same file at the same path"
            )
        on_device: Any = extractor.to(device).to(memory_format=torch.channels_last)
        return on_device


@torch.inference_mode()
def extract_view(extractor: FeatureExtractor, images: np.ndarray, view: int, device: str) -> Features:
    """Features in float32, on the CPU, of images uint8 [n, S, S, 3] as the view shows them."""
    viewed = np.ascontiguousarray(np.stack([apply_view(image, view) for image in images]))
    pixels = torch.from_numpy(viewed).to(device).permute(0, 3, 1, 2)
    features: Features = extractor(extractor.preprocess(pixels))
    return Features(_on_cpu(features.cls), _on_cpu(features.patches))


def _on_cpu(values: Tensor) -> Tensor:
    return values.float().cpu()
