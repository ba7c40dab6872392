"""Image sets and feature sets of a few images, for the evaluation's tests."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from m2d.evaluation.images import FeatureSet, ImageSet


def image_set(
    labels: Sequence[int] | np.ndarray,
    name: str = "set",
    groups: Sequence[str] | None = None,
    pixels: np.ndarray | None = None,
) -> ImageSet:
    """groups: of one lesion; None: each image is its own."""
    ids = tuple(f"{name}-{number}" for number in range(len(labels)))
    blank = np.zeros((len(labels), 1, 1, 3), np.uint8)
    return ImageSet(
        name=name,
        source=f"/{name}",
        sha256=ids,
        paths=tuple(f"{number}.png" for number in range(len(labels))),
        labels=np.array(labels, dtype=np.int64),
        groups=np.array(ids if groups is None else groups, dtype=object),
        pixels=blank if pixels is None else pixels,
    )


def feature_set(images: ImageSet, cls: np.ndarray) -> FeatureSet:
    """These images with other features, by the extractor net-1."""
    own = {field.name: getattr(images, field.name) for field in fields(ImageSet)}
    return FeatureSet(**own, extractor="net-1", cls=np.asarray(cls, dtype=np.float32))


def clouds(
    name: str,
    counts: dict[int, int],
    seed: int,
    *,
    distance: float,
    scales: np.ndarray,
    groups: Sequence[str] | None = None,
) -> FeatureSet:
    """Gaussian clouds, one for each class, about corners `distance` away, times `scales` [D]."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(list(counts), list(counts.values()))
    cls = generator.normal(size=(len(labels), len(scales))) + distance * np.eye(7, len(scales))[labels]
    return feature_set(image_set(labels, name, groups), cls * scales)


def pairs(name: str, counts: dict[int, int], seed: int, scales: np.ndarray) -> FeatureSet:
    """Clouds with two images of each lesion, but for `generated`."""
    lesions = None if name == "generated" else [f"{name}-{number // 2}" for number in range(sum(counts.values()))]
    return clouds(name, counts, seed, distance=2.0, scales=scales, groups=lesions)
