"""A measure of a run's samples while it goes on: how far generated features lie from those of validation images.

A sweep judges its trials by it. It knows no loss weight, so zero weights win nothing. The extractor is the run's own,
which guided the U-Net: good for comparing trials of one sweep, not for a paper (m2d.evaluation has a second one).
"""

import logging

import numpy as np
import torch

from m2d.classes import CLASSES
from m2d.data.reader import ImageReader
from m2d.errors import M2DError
from m2d.evaluation.distances import kernel_distance
from m2d.evaluation.fidelity_sides import Scale
from m2d.models.checkpoint import CheckpointInfo
from m2d.models.extractors import FeatureExtractor
from m2d.training.features import FeatureSource
from m2d.training.sampling import RunState
from m2d.training.step import extract
from m2d.training.validation import SEED

logger = logging.getLogger(__name__)
LEAST = 3  # images on a side, below which no unbiased kernel distance exists


class SampleQuality:
    """Kernel distance between as many generated as validation images of each class."""

    def __init__(self, state: RunState, reader: ImageReader, source: FeatureSource, images: int) -> None:
        """images: generated ones at most, shared evenly by the classes that validation images are of."""
        self.state, self.reader, self.source = state, reader, source
        self.rows = rows_of_each_class(reader.labels, images)
        self._real: np.ndarray | None = None

    def measure(self, info: CheckpointInfo) -> dict[str, float]:
        """`val/kernel_distance` and its standard error; {} where images are too few or none can be made."""
        if len(self.rows) < LEAST:
            return {}
        try:
            return self._measured(info)
        except M2DError as error:
            logger.warning("no kernel distance at step %d: %s", info.step, error)
        except torch.OutOfMemoryError:  # no reason to end the run
            size, device = self.state.plan.config.batch_size, self.state.device
            logger.warning(
                "no kernel distance at step %d: samples in batches of %d do not fit the memory of %s beside the run; "
                "lower batch_size",
                info.step,
                size,
                device,
            )
        return {}

    def _measured(self, info: CheckpointInfo) -> dict[str, float]:
        labels = self.reader.labels[self.rows]
        counts = {CLASSES[label]: int((labels == label).sum()) for label in np.unique(labels)}
        images, _ = self.state.samples(info, counts)
        extractor = self.state.extractor()
        real, generated = self._real_cls(extractor), self._cls(extractor, images)
        scale = Scale.of_rows(real)
        generated, real = ((side - scale.mean) / scale.deviation for side in (generated, real))
        distance = kernel_distance(generated, real)
        return {"val/kernel_distance": distance.value, "val/kernel_distance_se": distance.standard_error}

    def _real_cls(self, extractor: FeatureExtractor) -> np.ndarray:
        if self._real is None:
            if self.source.table is not None:
                self._real = self.source.cls(self.reader, self.rows).cpu().double().numpy()
            else:
                read = self.reader.read(self.rows, np.zeros(len(self.rows), dtype=np.int8))
                self._real = self._cls(extractor, read["images"])
        return self._real

    def _cls(self, extractor: FeatureExtractor, images: np.ndarray) -> np.ndarray:
        """float64 [N, D] of images uint8 [N, H, W, 3]."""
        size = self.state.plan.config.batch_size
        parts = [
            extract(extractor, torch.from_numpy(images[first : first + size]).to(self.state.device).permute(0, 3, 1, 2))
            for first in range(0, len(images), size)
        ]
        return torch.cat([part.cls.cpu() for part in parts]).double().numpy()


def rows_of_each_class(labels: np.ndarray, images: int) -> np.ndarray:
    """Rows int64, ascending: of every class there the same number, or all it has; at most `images`."""
    present = np.unique(labels)
    share = images // max(len(present), 1)
    order = np.random.default_rng(SEED).permutation(len(labels))
    chosen = [order[labels[order] == label][:share] for label in present]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
