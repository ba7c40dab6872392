"""Validation on fixed images, sharded over the workers. Its measures do not depend on the loss weights."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from m2d.data.reader import ImageReader
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.models.unet import Denoiser
from m2d.training.features import FeatureSource
from m2d.training.losses import psnr
from m2d.training.reduce import all_reduce_sum
from m2d.training.step import Networks

SEED = 20261122  # of the choice of images and of their noise


def validation_rows(num_rows: int, wanted: int) -> np.ndarray:
    """The rows of the validation split that every validation of every run uses, int64 [min(wanted, num_rows)]."""
    return np.sort(np.random.default_rng(SEED).permutation(num_rows)[:wanted])


@torch.no_grad()
def validate(
    networks: Networks,
    averaged: Denoiser,
    perceptual: nn.Module,
    reader: ImageReader,
    source: FeatureSource,
    *,
    images: int,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Means over the validation images of all workers.

    val/psnr_db and val/perceptual: reconstructions from the posterior's mean. val/velocity_mse: the averaged denoiser
    at fixed times and noise, guided by class and feature. Every worker returns the same numbers; {} without images.
    """
    rows = validation_rows(len(reader), images)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    autoencoder = networks.autoencoder
    for share in _batches(rows[rank::world_size], batch_size):
        read = reader.read(share, np.zeros(len(share), dtype=np.int8))
        pixels = torch.from_numpy(read["images"]).to(device).permute(0, 3, 1, 2)
        labels = torch.from_numpy(read["labels"]).to(device)
        targets = pixels.float() / 127.5 - 1.0
        latents = autoencoder.encode(targets).mean
        reconstructed = autoencoder.decode(latents).float().clamp(-1, 1)
        clean = averaged.normalize(latents)
        t, noise = fixed_noise(share, clean)
        cls = source.cls_of(pixels, read["catalog_rows"])
        velocity = averaged.velocity(interpolate(clean, noise, t), t, averaged.context(labels, cls))
        error = (velocity - velocity_target(clean, noise)).square().flatten(1).mean(dim=1)
        distance = perceptual(reconstructed, targets)
        sums += torch.stack(
            [psnr(reconstructed, targets).sum(), distance.sum(), error.sum(), error.new_tensor(float(len(share)))]
        ).double()
    total = all_reduce_sum(sums).tolist()
    if total[3] == 0:
        return {}
    names = ("val/psnr_db", "val/perceptual", "val/velocity_mse")
    return {name: value / total[3] for name, value in zip(names, total[:3], strict=True)}


def score(measures: dict[str, float], stage: str) -> float:
    """What `best` minimises: the perceptual distance of reconstructions where the VAE learns, or the velocity error.

    Neither knows the loss weights. The latents move in the joint stage, so velocity errors of two moments of it do not
    compare.
    """
    return measures.get("val/velocity_mse" if stage == "latent" else "val/perceptual", float("inf"))


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def fixed_noise(rows: np.ndarray, clean: Tensor) -> tuple[Tensor, Tensor]:
    """A time and a noise for each image, by its row: the same whoever evaluates it, whenever."""
    generators = [torch.Generator().manual_seed(SEED + int(row)) for row in rows]
    t = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
    return t.to(clean.device), noise.to(clean.device)
