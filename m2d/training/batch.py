"""What a training step takes: a batch of images or of cached latents, and every random number that it will use.

Randomness is an input: what an image is given depends on the run's seed and its row of the stream alone, so a step is
the same however it is divided into workers and micro-batches, and whether the run was resumed or not.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from m2d.diffusion.interpolant import training_times
from m2d.diffusion.settings import TimeDensity
from m2d.models.extractors import FeatureExtractor, Features
from m2d.models.settings import ConditioningConfig

BatchT = TypeVar("BatchT")


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
    """Every random number of one micro-batch, a row for each image."""

    posterior: Tensor  # standard normal [B, C, h, w]
    noise: Tensor  # standard normal [B, C, h, w]
    t: Tensor  # in (0, 1), of schedule.times and time_shift, [B]
    drop_class: Tensor  # bool [B]
    drop_feature: Tensor  # bool [B]
    feature_noise: Tensor  # standard normal [B, D]
    feature_noise_level: Tensor  # [B]


def pinned(batch: BatchT) -> BatchT:
    """The same batch in pinned memory, from which a GPU copies while it computes."""

    def pin(value: Any) -> Any:
        if value is None or isinstance(value, Tensor):
            return None if value is None else value.pin_memory()
        return dataclasses.replace(value, **{name: pin(part) for name, part in vars(value).items()})

    pinned_batch: BatchT = pin(batch)
    return pinned_batch


def on_device(features: Features, device: torch.device) -> Features:
    """Features, cached ones in fp16 among them, as float32 on a device."""
    return Features(*(part.to(device, non_blocking=True).float() for part in (features.cls, features.patches)))


@torch.no_grad()
def extract(extractor: FeatureExtractor, pixels: Tensor) -> Features:
    """Features of uint8 images [B, 3, H, W], computed in float32: as statistics, prior and caches have them.

    In bf16 EfficientNet-Lite0's are another network's: 9 % off, rms.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        features: Features = extractor(extractor.preprocess(pixels))
    return Features(cls=features.cls.float(), patches=features.patches.float())


def draw(
    run_seed: int,
    rows: Tensor,
    latent_shape: tuple[int, int, int],
    feature_dim: int,
    conditioning: ConditioningConfig,
    times: TimeDensity = "uniform",
    time_shift: float = 1.0,
) -> Draws:
    """The draws of stream rows int64 [B], on their device; the same few kernels whatever B is.

    Each row has a SplitMix64 stream of its own, and every number its place in it, whatever the density of t.
    """
    batch, latent = len(rows), math.prod(latent_shape)
    key = int.from_bytes(hashlib.sha256(f"m2d draws {run_seed}".encode()).digest()[:8], "little")
    starts = _mixed(_mixed(rows) + _signed(key))
    bits = splitmix64(starts, 4 + latent + (feature_dim + 1) // 2)
    # float32 in [0, 1): the upper 24 bits, as many as float32 holds
    t, drop_class, drop_feature, level = (((bits[:, :4] >> 40) & (2**24 - 1)).float() * 2**-24).unbind(1)
    normal = _normal(bits[:, 4:])
    posterior, noise, feature_noise = normal[:, : 2 * latent + feature_dim].split([latent, latent, feature_dim], 1)
    return Draws(
        posterior=posterior.reshape(batch, *latent_shape),
        noise=noise.reshape(batch, *latent_shape),
        t=training_times(t, times, time_shift).clamp(1e-4, 1 - 1e-4),
        drop_class=drop_class < conditioning.class_dropout,
        drop_feature=drop_feature < conditioning.feature_dropout,
        feature_noise=feature_noise,
        feature_noise_level=level * conditioning.feature_noise,
    )


def splitmix64(starts: Tensor, count: int) -> Tensor:
    """The first `count` outputs of SplitMix64 from each state, int64 [B, count] of int64 [B]; the bits are uint64's.

    The n-th output is a hash of start + n gamma, so all are computed at once. Source: Steele, Lea, Flood, Fast
    splittable pseudorandom number generators, 2014; the constants are of its reference code.
    """
    number = torch.arange(1, count + 1, device=starts.device)
    return _mixed(starts[:, None] + number * _signed(0x9E3779B97F4A7C15))


def _mixed(z: Tensor) -> Tensor:
    """int64 wraps around as uint64 does; shifts are made logical by a mask."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _normal(bits: Tensor) -> Tensor:
    """Standard normal float32 [B, 2 n] of bits [B, n]: Box and Muller's transform of both halves of each word."""
    radius = (-2 * torch.log((((bits >> 32) & (2**32 - 1)).float() + 0.5) * 2**-32)).sqrt()
    angle = (bits & (2**32 - 1)).float() * (2 * math.pi * 2**-32)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)
