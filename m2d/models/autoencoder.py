"""The autoencoder: diffusers AutoencoderKL from scratch, from a folder, or from a hub id, behind encode and decode."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from m2d.errors import CheckpointError, first_line
from m2d.models.norms import keep_input_type
from m2d.models.settings import AutoencoderConfig

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
        """Image pixels a latent cell, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        """The posterior of images [B, 3, H, W] in [-1, 1]."""
        return self.vae.encode(images).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of latents [B, C, h, w]."""
        return self.vae.decode(latents).sample


def build_autoencoder(config: AutoencoderConfig, image_size: int) -> Autoencoder:
    """A new or pretrained autoencoder. Raises CheckpointError where `pretrained` cannot be loaded."""
    vae = _from_scratch(config, image_size) if config.pretrained is None else _pretrained(config.pretrained)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return Autoencoder(vae)


def _from_scratch(config: AutoencoderConfig, image_size: int) -> AutoencoderKL:
    levels = len(config.block_channels)
    return AutoencoderKL(
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
        scaling_factor=1.0,  # the latent batch norm scales; a constant on top would be a second truth
    )


def _pretrained(location: str) -> AutoencoderKL:
    try:
        folder = Path(location)
        if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            location = str(folder / "vae")
        vae, loading = AutoencoderKL.from_pretrained(location, torch_dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # diffusers, huggingface_hub, safetensors and torch each have their own
        raise CheckpointError(
            f"autoencoder.pretrained: {location} is neither a folder with an AutoencoderKL nor a hub id that can be "
            f"reached ({first_line(error)}); give a local folder"
        ) from None
    strangers = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if strangers:  # diffusers warns and leaves such tensors at random values
        raise CheckpointError(
            f"autoencoder.pretrained: the weights in {location} do not fit its config.json: {len(strangers)} tensors "
            f"are missing or not known, the first is {strangers[0]}; take the folder of an AutoencoderKL"
        )
    return vae


def coded_at_once(image_size: int) -> int:
    """Images that a VAE encodes or decodes at once, so that its memory has a bound whatever the batch size."""
    return max(1, _CODED_PIXELS // image_size**2)
