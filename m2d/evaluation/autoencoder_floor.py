"""Reconstructions of unseen real images by a checkpoint's VAE: no sample can be better than its decoder.

Called by m2d.evaluation.evaluate; compares nothing itself.
"""

import numpy as np
import torch

from m2d.errors import ConfigError
from m2d.evaluation.images import ImageSet, with_pixels
from m2d.files.progress import progress
from m2d.models.autoencoder import Autoencoder, coded_at_once, from_uint8, to_uint8
from m2d.models.checkpoint import Checkpoint

BATCH = 32


def reconstructions(
    images: ImageSet, checkpoint: Checkpoint, *, device: str, cache_dir: str, batch_size: int | None = None
) -> ImageSet:
    """The images after encoding (the posterior's mean) and decoding, as uint8 of the same size.

    images: at the checkpoint's image size; the caller sees to it. batch_size: at most so many at once; None: 32. Of
    large images it is fewer. Raises ConfigError for a batch that does not fit the device.
    """
    autoencoder = checkpoint.autoencoder.to(device)
    size = min(batch_size or BATCH, coded_at_once(images.image_size))
    pixels = np.empty(images.pixels.shape, dtype=np.uint8)
    with progress(f"reconstructing {images.name}", len(images)) as shown:
        for first in range(0, len(images), size):
            batch = images.pixels[first : first + size]
            try:
                pixels[first : first + size] = _redrawn(batch, autoencoder, device)
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"batch_size {size} does not fit the memory of {device}; try --batch_size {max(1, size // 2)} (the "
                    "result stays the same)"
                ) from None
            shown.advance(len(batch))
    return with_pixels(
        images,
        name="reconstructions",
        source=f"reconstructions of {images.source} by checkpoint {checkpoint.sha256[:12]}",
        pixels=pixels,
        cache_dir=cache_dir,
    )


def drawn_like(train: ImageSet, generated: ImageSet, seed: int) -> ImageSet:
    """Training images, drawn without repeats: as many of each class as were generated, or all where there are fewer.

    Each is a group of its own, as a generated image is.
    """
    generator = np.random.default_rng(seed)
    labels, counts = np.unique(generated.labels, return_counts=True)
    drawn = [generator.permutation(np.flatnonzero(train.labels == k))[:n] for k, n in zip(labels, counts)]
    rows = np.concatenate(drawn)
    return ImageSet(
        name="training images",
        source=f"{len(rows):,} images of {train.source}",
        sha256=tuple(train.sha256[row] for row in rows),
        paths=tuple(train.paths[row] for row in rows),
        labels=train.labels[rows],
        groups=np.array([f"reconstruction {row}" for row in rows], dtype=object),
        pixels=train.pixels[rows],
    )


def psnr_db(images: ImageSet, redrawn: ImageSet) -> float:
    """Mean over the images of the peak signal-to-noise ratio, in decibels."""
    difference = images.pixels.astype(np.float32) - redrawn.pixels.astype(np.float32)
    squared = np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(squared, 1e-8))))


@torch.inference_mode()
def _redrawn(batch: np.ndarray, autoencoder: Autoencoder, device: str) -> np.ndarray:
    """uint8 [B, S, S, 3] to the same."""
    x = from_uint8(torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2))
    return to_uint8(autoencoder.decode(autoencoder.encode(x).mode()))
