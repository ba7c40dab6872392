"""The currency of the evaluation: images of one origin at one size, and the vectors of one extractor for them.

Every part (fidelity, memorization, downstream, consistency) is a function of these; none reads files or knows Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES


@dataclass(frozen=True)
class ImageSet:
    """Images that were decoded to one size. N images of S x S pixels."""

    name: str  # train, test, generated, reconstructions: as the report calls it
    source: str  # where from, in words
    sha256: tuple[str, ...]  # N; of the file's bytes, or of the pixels where there is no file
    paths: tuple[str, ...]  # N; as a person finds the file
    labels: np.ndarray  # int64 [N], index into CLASSES
    groups: np.ndarray  # object [N]; equal values are one lesion; a generated image is a group of its own
    pixels: np.ndarray  # uint8 [N, S, S, 3], perhaps mapped from a file: take rows, never all at once

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """S."""
        return int(self.pixels.shape[1])

    @property
    def counts(self) -> dict[str, int]:
        """Images of each class that has some, in the order of CLASSES."""
        counted = np.bincount(self.labels, minlength=len(CLASSES))
        return {code: int(n) for code, n in zip(CLASSES, counted, strict=True) if n}


@dataclass(frozen=True)
class FeatureSet:
    """The `cls` features of one extractor for an image set, in its order."""

    images: ImageSet
    extractor: str  # m2d.models.extractors.FeatureExtractor.key
    cls: np.ndarray  # float32 [N, D], as the extractor gives them: not standardised

    def __post_init__(self) -> None:
        if self.cls.ndim != 2 or len(self.cls) != len(self.images):
            raise ValueError(f"features of shape {self.cls.shape} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self.images.labels

    @property
    def groups(self) -> np.ndarray:
        """object [N]."""
        return self.images.groups

    def rows(self, label: int) -> np.ndarray:
        """Row numbers of a class, int64 [n]."""
        return np.flatnonzero(self.labels == label)


def shared_classes(sets: Sequence[ImageSet | FeatureSet]) -> list[int]:
    """Class indices that have an image in every set, ascending."""
    present = [set(np.unique(one.labels).tolist()) for one in sets]
    return sorted(set.intersection(*present)) if present else []
