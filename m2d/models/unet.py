"""The denoiser: diffusers UNet2DConditionModel, its conditioning and the latent batch norm, which share one EMA."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from m2d.models.conditioning import ConditionEncoder
from m2d.models.latent_norm import LatentNorm
from m2d.models.settings import ConditioningConfig, UNetConfig

TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding was made for steps 0..1000; t is in [0, 1]


class Denoiser(nn.Module):
    """Predicts the velocity eps - x_0 of normalised latents, given a context."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: ConditionEncoder, latent_channels: int) -> None:
        super().__init__()
        self.unet = unet
        self.conditioning = conditioning
        self.latent_norm = LatentNorm(latent_channels)

    def latent_shape(self, image_size: int, downsampling: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image."""
        side = image_size // downsampling
        return int(self.unet.config.in_channels), side, side

    def normalize(self, latents: Tensor) -> Tensor:
        """VAE latents [B, C, h, w] to the U-Net's scale by running statistics."""
        return self.latent_norm.normalize(latents)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return self.latent_norm.denormalize(normalized)

    def context(self, labels: Tensor, cls: Tensor | None = None) -> Tensor:
        """Cross-attention context [B, L, Dc] of labels int64 [B] (NUM_CLASSES: null), raw features [B, D] or None."""
        tokens: Tensor = self.conditioning(labels, cls)
        return tokens

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """d x_t / d t, [B, C, h, w], at t [B] in [0, 1]."""
        velocity: Tensor = self.unet(x_t, t * TIME_SCALE, context, return_dict=False)[0]
        return velocity

    def velocity_and_middle(self, x_t: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and the middle block's output [B, M, h', w'] of the same pass."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, inputs: Any, output: Tensor) -> None:
            captured.append(output)

        handle = self.unet.mid_block.register_forward_hook(capture)
        try:
            velocity = self.velocity(x_t, t, context)
        finally:
            handle.remove()
        return velocity, captured[0]

    def middle(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Only as far as the middle block: [B, M, h', w']. The up path costs half and the alignment needs none of it.

        The order of calls is that of UNet2DConditionModel.forward in diffusers 0.42, held to it by a test.
        """
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t * TIME_SCALE), None)
        sample = unet.conv_in(x_t)
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                sample, _ = block(hidden_states=sample, temb=embedding, encoder_hidden_states=context)
            else:
                sample, _ = block(hidden_states=sample, temb=embedding)
        middle: Tensor = unet.mid_block(sample, embedding, encoder_hidden_states=context)
        return middle


def build_denoiser(
    config: UNetConfig, conditioning: ConditioningConfig, *, latent_channels: int, latent_size: int, feature_dim: int
) -> Denoiser:
    """A new denoiser for latents [latent_channels, latent_size, latent_size]; its last layer starts at zero."""
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention_levels)]
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.block_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        cross_attention_dim=conditioning.context_dim,
        # diffusers reads `attention_head_dim` as the number of heads for this class; one a level.
        attention_head_dim=tuple(width // config.head_dim for width in config.block_channels),
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return Denoiser(unet, ConditionEncoder(conditioning, feature_dim), latent_channels)


@torch.no_grad()
def middle_channels(denoiser: Denoiser) -> int:
    """Channels M of the middle block."""
    return int(denoiser.unet.config.block_out_channels[-1])
