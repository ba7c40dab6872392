"""Requests in, uint8 images out, on one device. Runs without Ray: a driver, an actor or a notebook holds one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from m2d.classes import NUM_CLASSES, class_index
from m2d.diffusion.guidance import GuidedVelocity
from m2d.diffusion.settings import SamplingSettings
from m2d.diffusion.solver import solve
from m2d.errors import CheckpointError, ConfigError
from m2d.generation.request import SampleRequest, feature_seed, noise_for
from m2d.generation.settings import Feature, Precision

if TYPE_CHECKING:
    from m2d.models.checkpoint import Checkpoint

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Generator:
    """A checkpoint on a device, ready to draw. Loading happens once; `generate` may be called for ever."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: SamplingSettings,
        *,
        batch_size: int = 32,
        device: str | None = None,
        mixed_precision: Precision | None = None,
        feature: Feature | None = None,
        feature_temperature: float = 1.0,
    ) -> None:
        """Moves the checkpoint's networks to the device.

        None decides, see `pick_device`, `pick_precision` and `pick_feature`. feature_temperature scales the noise of
        the features: 1 draws from the prior as it is, 0 gives every image of a class its mean.
        """
        self.checkpoint = checkpoint
        self.settings = settings
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.precision = pick_precision(mixed_precision, self.device)
        self.feature = pick_feature(feature, checkpoint)
        if self.feature == "none" and feature_temperature != 1:
            raise ConfigError(
                f"feature_temperature is {feature_temperature}, but no feature is drawn (feature none); leave it out"
            )
        self.feature_temperature = feature_temperature
        self.denoiser = checkpoint.denoiser.to(self.device).eval()
        self.autoencoder = checkpoint.autoencoder.to(self.device).eval()

    def generate(self, requests: Sequence[SampleRequest]) -> np.ndarray:
        """Images of the requests, uint8 [N, H, W, 3] RGB, in their order; batches of at most `batch_size`.

        Raises CheckpointError where the model gives something that is not a number, and DataError for a class that
        the feature prior has no image of.
        """
        batches = [
            self._generate_batch(requests[first : first + self.batch_size])
            for first in range(0, len(requests), self.batch_size)
        ]
        size = self.checkpoint.image_size
        return np.concatenate([np.empty((0, size, size, 3), np.uint8), *batches])

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[SampleRequest]) -> np.ndarray:
        noise = torch.stack([noise_for(request.seed, self.checkpoint.latent_shape) for request in requests])
        labels = torch.tensor([class_index(request.label) for request in requests])
        cls = self._draw_features(requests, labels)
        labels = labels.to(self.device)
        # One autocast around all steps, so that the cast weights are kept from step to step.
        with self._autocast(self.precision):
            velocity = GuidedVelocity(
                self.denoiser,
                self.denoiser.context(labels, cls),
                self.denoiser.context(torch.full_like(labels, NUM_CLASSES)),
                scale=self.settings.guidance_scale,
                interval=self.settings.guidance_interval,
            )
            latents = solve(velocity, noise.to(self.device), steps=self.settings.steps, solver=self.settings.solver)
        # fp16 overflows in VAE decoders; one pass in full precision costs little beside the steps.
        with self._autocast("no" if self.precision == "fp16" else self.precision):
            images = self.autoencoder.decode(self.denoiser.denormalize(latents)).float()
        if not torch.isfinite(images).all():
            raise CheckpointError(
                f"{self.checkpoint.path}: the model's images are not finite numbers (precision {self.precision}); "
                "try --mixed_precision no, or an earlier checkpoint"
            )
        return to_uint8(images)

    def _draw_features(self, requests: Sequence[SampleRequest], labels: Tensor) -> Tensor | None:
        """One feature an image, [B, D] on the device, or None where the class alone guides. labels: on the CPU.

        Drawn on the CPU, so that every device gets the same.
        """
        prior = self.checkpoint.prior
        if self.feature == "none" or prior is None:
            return None
        noise = torch.stack([noise_for(feature_seed(request.seed), (prior.noise_dim,)) for request in requests])
        return prior.sample(labels, self.feature_temperature * noise).to(self.device)

    def _autocast(self, precision: Precision) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=_DTYPES[precision], enabled=precision != "no")


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded to the nearest; what lies outside is clipped."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def pick_device(device: str | None) -> torch.device:
    """None: cuda where there is one, otherwise cpu. Raises ConfigError for a device that this machine lacks."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    # Without CUDA support compiled in, torch raises an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {device}, which cannot be used here ({reason}); try cpu") from None
    return picked


def pick_precision(mixed_precision: Precision | None, device: torch.device) -> Precision:
    """None: bf16 on a GPU that computes in it, otherwise no."""
    if mixed_precision is not None:
        return mixed_precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def pick_feature(feature: Feature | None, checkpoint: Checkpoint) -> Feature:
    """None: prior where the checkpoint has one, otherwise none. Raises ConfigError for a prior that is not there."""
    if feature == "prior" and checkpoint.prior is None:
        raise ConfigError(
            f"feature is prior, but the checkpoint {checkpoint.path} holds no feature prior; leave --feature out, or "
            "take a checkpoint that was trained with this M2D"
        )
    if feature is not None:
        return feature
    return "none" if checkpoint.prior is None else "prior"
