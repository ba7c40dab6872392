"""What an evaluation found, all parts together, as plain numbers: the content of evaluation.json."""

from dataclasses import dataclass
from typing import Self

from m2d.evaluation.consistency import ConsistencyResult
from m2d.evaluation.downstream_result import DownstreamResult
from m2d.evaluation.feature_set import ImageSet
from m2d.evaluation.fidelity import FidelityResult
from m2d.evaluation.memorization import MemorizationResult


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """One of the sets that were compared."""

    name: str
    source: str
    images: dict[str, int]  # class code -> number, of the classes that have some
    lesions: dict[str, int]

    @classmethod
    def of(cls, images: ImageSet) -> Self:
        """Counted."""
        codes = list(images.counts)
        lesions = {
            code: len(set(images.groups[images.labels == label].tolist()))
            for code, label in zip(codes, sorted(set(images.labels.tolist())), strict=True)
        }
        return cls(name=images.name, source=images.source, images=images.counts, lesions=lesions)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A part that was not asked for is None or empty; one that could not be computed is told of in the notes."""

    checkpoint: str | None
    image_size: int
    device: str
    images: list[ImageCounts]  # train, test, generated
    reconstruction_psnr_db: float | None  # of the unseen images by the checkpoint's VAE
    fidelity: list[FidelityResult]  # the independent extractor first, then the one that guided the training
    memorization: MemorizationResult | None
    downstream: list[DownstreamResult]  # a classifier each
    autoencoder_downstream: DownstreamResult | None  # with reconstructions of training images as the synthetic ones
    consistency: ConsistencyResult | None
    notes: list[str]
    seed: int
    seconds: float
    created: str
    version: str
