"""LinearAutoencoder of M2D 0.2.0, and what it needs of M2D's sources, word for word.

Made by `m2d export`. MIT licence.
"""

import torch
from contextlib import AbstractContextManager, nullcontext
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from typing import Any


# --- m2d/models/autoencoder.py ---
def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext()


class LinearAutoencoder(ModelMixin, ConfigMixin):
    """Principal components of an image's blocks of pixels, with the methods of diffusers' AutoencoderKL.

    Nothing is learned by descent: `set_basis` takes the components from the blocks' covariance. Encoding has no noise,
    and both ways are computed in float32, whatever the autocast.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 16, patch_size: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch_size, stride=patch_size)

    @torch.no_grad()
    def set_basis(self, first: Tensor, second: Tensor, whitening: float) -> None:
        """Take the first C components of blocks x with first moment E[x] [P] and second E[x x'] [P, P]; P = 3 patch^2.

        P is ordered as pixel_unshuffle orders it: colour, row, column. Components are about the mean colour. Component
        k is divided by its deviation to the power `whitening`, then all by one number, so that their mean variance is
        1. At 0 the map is an isometry but for that number: errors of latents count as errors of pixels do. At 1 all
        components weigh alike.
        """
        first, second, block = first.double(), second.double(), self.config.patch_size**2
        colour = first.view(3, block).mean(dim=1)
        centre = colour.repeat_interleave(block)
        crossed = torch.outer(first, centre)
        variance, basis = torch.linalg.eigh(second - crossed - crossed.T + torch.outer(centre, centre))
        kept = slice(-self.config.latent_channels, None)  # eigenvalues ascend
        variance, basis = variance[kept].flip(0).clamp(min=1e-12), basis[:, kept].flip(1).T
        basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()  # eigh may give either
        scale = variance.sqrt()[:, None] ** whitening * (variance ** (1 - whitening)).mean().sqrt()
        kernels = self.encoder.weight.shape
        weights = {"encoder.weight": (basis / scale).view(kernels), "decoder.weight": (basis * scale).view(kernels)}
        self.load_state_dict(weights | {"encoder.bias": -(basis / scale) @ centre, "decoder.bias": colour})

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        """See AutoencoderKL."""
        with _without_autocast(images.device.type):
            mean = self.encoder(images.float())
        parameters = torch.cat([mean, torch.zeros_like(mean)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters, deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """See AutoencoderKL."""
        with _without_autocast(latents.device.type):
            return DecoderOutput(sample=self.decoder(latents.float()))
