"""What a training step takes: a batch of images or of cached latents, and every random number the step will use.

Randomness is an input: it is drawn from (seed, micro-batch, rank) alone, so a resumed run draws what an unbroken run
would have drawn, and two workers can be given the halves of one worker's draws.
"""

import hashlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from m2d.models.feature_extractor import Features
from m2d.models.settings import ConditioningConfig


@dataclass(frozen=True)
class ImageBatch:
    """images: uint8 [B, H, W, 3]. labels: int64 [B]. features: cached ones, or None: the step extracts them."""

    images: Tensor
    labels: Tensor
    features: Features | None = None


@dataclass(frozen=True)
class LatentBatch:
    """Cached posterior mean and std [B, C, h, w], features, labels int64 [B]."""

    mean: Tensor
    std: Tensor
    features: Features
    labels: Tensor


@dataclass(frozen=True)
class Draws:
    """Every random number of one micro-batch."""

    posterior: Tensor  # standard normal [B, C, h, w]
    noise: Tensor  # standard normal [B, C, h, w]
    t: Tensor  # uniform in (0, 1), [B]
    drop_class: Tensor  # bool [B]
    drop_feature: Tensor  # bool [B]
    feature_noise: Tensor  # standard normal [B, D]
    feature_noise_level: Tensor  # [B]

    def to(self, device: torch.device) -> "Draws":
        """The same on another device."""
        return Draws(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def part(self, start: int, stop: int) -> "Draws":
        """The draws of samples start..stop."""
        return Draws(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})


def draw(
    generator: torch.Generator,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    feature_dim: int,
    conditioning: ConditioningConfig,
) -> Draws:
    """Draw for one micro-batch, on the generator's device."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform() -> Tensor:
        return torch.rand(batch_size, generator=generator, device=device)

    return Draws(
        posterior=normal(batch_size, *latent_shape),
        noise=normal(batch_size, *latent_shape),
        t=uniform().clamp(1e-4, 1 - 1e-4),
        drop_class=uniform() < conditioning.class_dropout,
        drop_feature=uniform() < conditioning.feature_dropout,
        feature_noise=normal(batch_size, feature_dim),
        feature_noise_level=uniform() * conditioning.feature_noise,
    )


def draws_seed(run_seed: int, micro_batch: int, rank: int) -> int:
    """63 bits from the run's seed, the micro-batch's number in the run and the worker's rank."""
    digest = hashlib.sha256(f"m2d draws {run_seed} {micro_batch} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
