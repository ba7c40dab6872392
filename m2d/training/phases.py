"""The two halves of the joint step as modules, one for each set of parameters that DistributedDataParallel guards.

`AutoencoderPhase` owns the VAE, `DenoiserPhase` the U-Net, its conditioning and the projector. Each is called once a
micro-batch, so DDP sees one forward and one backward; neither holds the other's parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m2d.classes import NUM_CLASSES
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.models.autoencoder import Autoencoder
from m2d.models.feature_extractor import Features
from m2d.models.projector import AlignmentProjector
from m2d.models.settings import MIDDLE
from m2d.models.unet import Denoiser
from m2d.training.batch import Draws
from m2d.training.losses import (
    alignment_loss,
    diffusion_loss,
    kl_loss,
    manifold_loss,
    reconstruction_loss,
    spatially_normalized,
)


@dataclass(frozen=True)
class AutoencoderLosses:
    """Losses of the VAE's half, unweighted, and what later parts of the step reuse."""

    reconstruction: Tensor
    perceptual: Tensor
    kl: Tensor
    latents: Tensor  # [B, C, h, w], with gradient
    reconstructed: Tensor  # [B, 3, H, W]


class AutoencoderPhase(nn.Module):
    """Encode, sample, decode; the losses that need nothing but the VAE."""

    def __init__(self, autoencoder: Autoencoder, perceptual: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self._perceptual = [perceptual]  # frozen and shared: outside the module tree, so outside DDP

    def forward(self, images: Tensor, posterior_noise: Tensor) -> AutoencoderLosses:
        """images: float [B, 3, H, W] in [-1, 1]. posterior_noise: standard normal [B, C, h, w]."""
        posterior = self.autoencoder.encode(images)
        latents = posterior.mean.float() + posterior.std.float() * posterior_noise
        reconstructed = self.autoencoder.decode(latents).float()
        return AutoencoderLosses(
            reconstruction=reconstruction_loss(reconstructed, images),
            perceptual=self._perceptual[0](reconstructed, images).float().mean(),
            kl=kl_loss(posterior.mean, posterior.logvar),
            latents=latents,
            reconstructed=reconstructed,
        )


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

    def forward(
        self, latents: Tensor, labels: Tensor, features: Features, draws: Draws, update_norm: bool = True
    ) -> DenoiserLosses:
        """latents: detached VAE latents [B, C, h, w]; labels int64 [B].

        update_norm: normalise by batch statistics and follow them (joint stage), or by the running ones (latent stage).
        """
        denoiser = self.denoiser
        clean = denoiser.latent_norm(latents) if update_norm else denoiser.normalize(latents)
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
        """Alignment loss as the VAE sees it: through the frozen U-Net, by running statistics, conditions undropped.

        Nothing of this module gets a gradient; `latents` does. Call it on the bare module, not through DDP.
        """
        with frozen(self):
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
