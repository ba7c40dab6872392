"""The autoencoder: diffusers AutoencoderKL from scratch, from a folder, or from a hub id, behind encode and decode."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from m2d.errors import CheckpointError, first_line
from m2d.models.precision import keep_input_type
from m2d.models.settings import AutoencoderConfig

NetworkT = TypeVar("NetworkT", bound=ModelMixin)
_CODED_PIXELS = 32 * 128**2  # through a VAE at once; its activations at 256 px: 1.3 GiB in bf16, 1.6 in float32


class Autoencoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to a Gaussian over latents [B, C, h, w] and back.

    Latents are as the VAE gives them; `Denoiser.normalize` puts them on the U-Net's scale.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        keep_input_type(vae)
        self.vae = vae

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.vae.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        """The posterior of images [B, 3, H, W] in [-1, 1]."""
        return self.vae.encode(images).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of latents [B, C, h, w]."""
        return self.vae.decode(latents).sample


def from_uint8(pixels: Tensor) -> Tensor:
    """Images in [-1, 1], float32, of pixels from 0 to 255, in any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded to the nearest; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def build_autoencoder(config: AutoencoderConfig, image_size: int) -> Autoencoder:
    """A new or pretrained autoencoder. Raises CheckpointError where `pretrained` cannot be loaded."""
    if config.pretrained is not None:
        vae = _pretrained(config.pretrained)
    else:
        levels = len(config.block_channels)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.block_channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            sample_size=image_size,
            mid_block_add_attention=config.mid_attention,
            scaling_factor=1.0,  # the latent batch norm scales; a second constant would contradict it
        )
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return Autoencoder(vae)


def load_strictly(kind: type[NetworkT], location: str | Path, setting: str, **options: Any) -> NetworkT:
    """A diffusers network with every tensor in its file: diffusers only warns and leaves others at random values."""
    network, report = kind.from_pretrained(location, torch_dtype=torch.float32, output_loading_info=True, **options)
    strangers = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if strangers:
        raise CheckpointError(
            f"{setting}: the weights in {location} do not fit its config.json: {len(strangers)} tensors are missing or "
            f"unknown, the first is {strangers[0]}"
        )
    return network


def _pretrained(location: str) -> AutoencoderKL:
    try:
        folder = Path(location)
        if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            location = str(folder / "vae")
        return load_strictly(AutoencoderKL, location, "autoencoder.pretrained")
    except CheckpointError:
        raise
    except Exception as error:  # diffusers, huggingface_hub, safetensors and torch each have their own
        raise CheckpointError(
            f"autoencoder.pretrained: {location} is neither a folder with an AutoencoderKL nor a hub id that can be "
            f"reached ({first_line(error)}); give a local folder"
        ) from None


def coded_at_once(image_size: int) -> int:
    """Images that a VAE encodes or decodes at once, so that its memory has a bound whatever the batch size."""
    return max(1, _CODED_PIXELS // image_size**2)
