"""The two halves of the joint step as modules, one for each set of parameters that DistributedDataParallel guards.

`AutoencoderPhase` owns the VAE, `DenoiserPhase` the U-Net, its conditioning and the projector. Each is called once a
micro-batch, so DDP sees one forward and one backward; neither holds the other's parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from m2d.classes import NUM_CLASSES
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.models.autoencoder import Autoencoder
from m2d.models.extractors import Features
from m2d.models.settings import MIDDLE
from m2d.models.unet import AlignmentProjector, Denoiser
from m2d.training.batch import Draws
from m2d.training.losses import (
    alignment_loss,
    diffusion_loss,
    kl_loss,
    manifold_loss,
    spatially_normalized,
)


@dataclass(frozen=True)
class Autoencoded:
    """A pass through the VAE, its graph cut at the latents: decoder and encoder take their backward passes apart."""

    kl: Tensor  # 0-dim
    latents: Tensor  # [B, C, h, w], the encoder's
    decoder_input: Tensor  # the same numbers, a leaf: gathers the gradient that the latents get from all of their uses
    reconstructed: Tensor  # float32 [B, 3, H, W]


class AutoencoderPhase(nn.Module):
    """Encode, sample, decode."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, posterior_noise: Tensor) -> Autoencoded:
        """images: float [B, 3, H, W] in [-1, 1]. posterior_noise: standard normal [B, C, h, w]."""
        posterior = self.autoencoder.encode(images)
        latents = sample(posterior, posterior_noise)
        decoder_input = latents.detach().requires_grad_()
        return Autoencoded(
            kl=kl_loss(posterior.mean, posterior.logvar),
            latents=latents,
            decoder_input=decoder_input,
            reconstructed=self.autoencoder.decode(decoder_input).float(),
        )


def sample(posterior: DiagonalGaussianDistribution, noise: Tensor) -> Tensor:
    """Latents of a posterior, float32 [B, C, h, w]; noise: standard normal, the same shape."""
    latents: Tensor = posterior.mean.float() + posterior.std.float() * noise
    return latents


@dataclass(frozen=True)
class DenoiserLosses:
    """Losses of the U-Net's half, unweighted."""

    diffusion: Tensor
    alignment: Tensor
    manifold: Tensor


class DenoiserPhase(nn.Module):
    """Velocity and alignment on latents that carry no gradient."""

    def __init__(
        self, denoiser: Denoiser, projector: AlignmentProjector, tap: str = MIDDLE, spatial_norm: float = 0.0
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.projector = projector
        self.tap = tap
        self.spatial_norm = spatial_norm

    def forward(self, clean: Tensor, labels: Tensor, features: Features, draws: Draws) -> DenoiserLosses:
        """clean: normalised latents [B, C, h, w], without a gradient; labels int64 [B]."""
        denoiser = self.denoiser
        context = denoiser.conditioning(
            torch.where(draws.drop_class, NUM_CLASSES, labels),
            features.cls,
            drop_feature=draws.drop_feature,
            noise=draws.feature_noise,
            noise_level=draws.feature_noise_level,
        )
        x_t = interpolate(clean, draws.noise, draws.t)
        velocity, tapped = denoiser.velocity_and_tap(x_t, draws.t, context, self.tap)
        target = self._target(features)
        predicted = self.projector(tapped, target.shape[1])
        return DenoiserLosses(
            diffusion=diffusion_loss(velocity, velocity_target(clean, draws.noise)),
            alignment=alignment_loss(predicted, target),
            manifold=manifold_loss(predicted, target),
        )

    def align_autoencoder(self, latents: Tensor, labels: Tensor, features: Features, draws: Draws) -> Tensor:
        """Alignment loss as the VAE sees it: through the U-Net, by running statistics, conditions undropped.

        Call it on the bare module, not through DDP, and within `frozen`, forward and backward: under gradient
        checkpointing the backward pass computes the blocks again, and would meet other parameters after a thaw.
        """
        denoiser = self.denoiser
        clean = denoiser.normalize(latents)
        x_t = interpolate(clean, draws.noise, draws.t)
        tapped = denoiser.tapped(x_t, draws.t, denoiser.context(labels, features.cls), self.tap)
        target = self._target(features)
        return alignment_loss(self.projector(tapped, target.shape[1]), target)

    def _target(self, features: Features) -> Tensor:
        return spatially_normalized(features.patches, self.spatial_norm) if self.spatial_norm else features.patches


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters that require a gradient stop doing so inside; only those do again afterwards.

    Turning every parameter on again would thaw what was frozen for good (REPA-E's code thaws its position table so).
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
