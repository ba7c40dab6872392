"""The denoiser: diffusers UNet2DConditionModel, its conditioning (a class token and a few tokens projected from the
extractor's cls feature) and the latent batch norm, which share one EMA; and the projector of the alignment loss.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from m2d.classes import ISIC7
from m2d.models.precision import keep_input_type
from m2d.models.settings import MIDDLE, ConditioningConfig, ProjectorConfig, UNetConfig, parse_tap

TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding was made for steps 0..1000; t is in [0, 1]


class ConditionEncoder(nn.Module):
    """Labels and optional features to a context [B, 1 + K, context_dim].

    The feature is standardised by training-set statistics (buffers), Gaussian noise of a given level is added, and the
    network learns the level from a vector added to the feature tokens, so that a feature guides without dictating.
    """

    def __init__(self, config: ConditioningConfig, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.num_classes = num_classes  # also the index of the null class
        self.feature_tokens = config.feature_tokens
        width = config.context_dim
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.feature_projection = nn.Linear(feature_dim, config.feature_tokens * width)
        self.noise_level_embedding = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.null_feature = nn.Parameter(torch.randn(1, config.feature_tokens, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.feature_mean: Tensor
        self.feature_std: Tensor

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take mean and deviation [D] of the training set's features as the standard."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp(min=1e-6))

    def forward(
        self,
        labels: Tensor,
        cls: Tensor | None = None,
        *,
        drop_feature: Tensor | None = None,
        noise: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Context tokens.

        labels: int64 [B]; `num_classes` is the null class. cls: [B, D] raw features, or None for no feature at all
        (sampling; in training every parameter must get a gradient, so drop features by drop_feature there).
        drop_feature: bool [B], True where the feature is left out. noise: [B, D] standard normal, scaled by
        noise_level [B] (0 where None). Returns [B, 1 + K, context_dim].
        """
        batch = labels.shape[0]
        null = tokens = self.null_feature.expand(batch, -1, -1)
        if cls is not None:
            level = torch.zeros(batch, device=cls.device) if noise_level is None else noise_level
            standardized = (cls - self.feature_mean) / self.feature_std
            if noise is not None:
                standardized = standardized + level.unsqueeze(1) * noise
            tokens = self.feature_projection(standardized).view(batch, self.feature_tokens, -1)
            tokens = tokens + self.noise_level_embedding(level.unsqueeze(1)).unsqueeze(1)
            if drop_feature is not None:
                tokens = torch.where(drop_feature.view(-1, 1, 1), null.to(tokens.dtype), tokens)
        return self.norm(torch.cat([self.class_embedding(labels).unsqueeze(1), tokens], dim=1))


class LatentNorm(nn.Module):
    """BatchNorm2d(affine=False, eps=1e-4, momentum=0.1) whose batch statistics are reduced over all workers.

    torch's SyncBatchNorm is for GPUs only and differentiates through the reduction. Here the batch-statistics path
    only ever sees detached latents (the diffusion loss must not reach the VAE), so two sums need no gradient and one
    all-reduce serves every backend. Source: REPA-E (arXiv 2504.10483), its latent batch norm inside the denoiser.
    """

    eps = 1e-4
    momentum = 0.1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        """Normalise [B, C, h, w] by batch statistics and fold them into the running ones.

        Raises ValueError for latents that require a gradient: that path would carry the diffusion loss to the VAE.
        """
        if latents.requires_grad:
            raise ValueError("LatentNorm.forward takes detached latents; use normalize() where a gradient is wanted")
        wide, channels = latents.double(), latents.shape[1]  # E[x^2] - E[x]^2 loses half the digits
        # Filled in on the device: a copy of a number from the host would wait for all that came before.
        count = torch.full((1,), latents.numel() / channels, dtype=wide.dtype, device=wide.device)
        sums = torch.cat([count, wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        mean, square = (sums[1:] / sums[0]).chunk(2)
        var = (square - mean.square()).clamp(min=0).float()
        mean, count = mean.float(), sums[0].float()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return (latents - _wide(mean)) * _wide((var + self.eps).rsqrt())

    def normalize(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] by the running statistics; differentiable, changes nothing."""
        return (latents - _wide(self.running_mean)) * _wide((self.running_var + self.eps).rsqrt())

    def denormalize(self, normalized: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return normalized * _wide((self.running_var + self.eps).sqrt()) + _wide(self.running_mean)


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel.view(1, -1, 1, 1)


class Denoiser(nn.Module):
    """Predicts the velocity eps - x_0 of normalised latents, given a context."""

    def __init__(self, unet: UNet2DConditionModel, conditioning: ConditionEncoder, latent_channels: int) -> None:
        super().__init__()
        keep_input_type(unet)
        self.unet = unet
        self.conditioning = conditioning
        self.latent_norm = LatentNorm(latent_channels)
        self.num_classes = conditioning.num_classes  # also the index of the null class

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
        """Cross-attention context [B, L, Dc] of labels int64 [B] (num_classes: null), raw features [B, D] or None."""
        return self.conditioning(labels, cls)

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """d x_t / d t, [B, C, h, w], at t [B] in [0, 1]."""
        return self.unet(x_t, t * TIME_SCALE, context, return_dict=False)[0]

    def velocity_and_tap(self, x_t: Tensor, t: Tensor, context: Tensor, tap: str = MIDDLE) -> tuple[Tensor, Tensor]:
        """The velocity and a block's output [B, M, h', w'] of the same pass. tap: see `tap_channels`."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, inputs: Any, output: Any) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)  # down blocks also give their skips

        side, number = parse_tap(tap)
        blocks = {"down": self.unet.down_blocks, "up": self.unet.up_blocks, MIDDLE: [self.unet.mid_block]}
        handle = blocks[side][number].register_forward_hook(capture)
        try:
            velocity = self.velocity(x_t, t, context)
        finally:
            handle.remove()
        return velocity, captured[0]

    def tapped(self, x_t: Tensor, t: Tensor, context: Tensor, tap: str = MIDDLE) -> Tensor:
        """The block's output alone, [B, M, h', w']: the way up costs half of a pass, and the middle needs none of it.

        The order of calls is that of UNet2DConditionModel.forward in diffusers 0.42, held to it by a test.
        """
        side, number = parse_tap(tap)
        if side == "up":
            return self.velocity_and_tap(x_t, t, context, tap)[1]
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t * TIME_SCALE), None)
        sample = unet.conv_in(x_t)
        for level, block in enumerate(unet.down_blocks):
            attended = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            sample, _ = block(hidden_states=sample, temb=embedding, **attended)
            if side == "down" and level == number:
                return sample
        return unet.mid_block(sample, embedding, encoder_hidden_states=context)


def build_denoiser(
    config: UNetConfig,
    conditioning: ConditioningConfig,
    *,
    latent_channels: int,
    latent_size: int,
    feature_dim: int,
    num_classes: int = len(ISIC7),
) -> Denoiser:
    """A new denoiser for latents [latent_channels, latent_size, latent_size]; its last layer starts at zero."""
    prefixes = ["CrossAttn" if attends else "" for attends in config.attention_levels]
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(f"{prefix}DownBlock2D" for prefix in prefixes),
        up_block_types=tuple(f"{prefix}UpBlock2D" for prefix in reversed(prefixes)),
        block_out_channels=tuple(config.block_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        cross_attention_dim=conditioning.context_dim,
        # diffusers reads `attention_head_dim` as the number of heads for this class; one per level.
        attention_head_dim=tuple(width // config.head_dim for width in config.block_channels),
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return Denoiser(unet, ConditionEncoder(conditioning, feature_dim, num_classes), latent_channels)


def tap_channels(denoiser: Denoiser, tap: str = MIDDLE) -> int:
    """Channels M of a block's output.

    tap: `middle` (U-REPA's choice), `down_K` or `up_K`, the K-th block on the way down or up, from 0 in the order of
    the pass. Raises ConfigError for another name, IndexError for a block that this U-Net lacks.
    """
    widths = [int(width) for width in denoiser.unet.config.block_out_channels]
    side, number = parse_tap(tap)
    return {"down": widths, "up": widths[::-1], MIDDLE: widths[-1:]}[side][number]


class AlignmentProjector(nn.Module):
    """A block's output [B, M, h', w'] to predicted patch features [B, N, D] on the extractor's g x g grid.

    Project first, then upsample (5.72 against 5.84 FID the other way round: U-REPA, arXiv 2503.18414, table 7). The
    kind `mlp` is U-REPA's, cell by cell; `conv3x3` is iREPA's (arXiv 2512.10794), one convolution that keeps what
    neighbours say of each other.
    """

    def __init__(self, channels: int, config: ProjectorConfig, feature_dim: int) -> None:
        super().__init__()
        hidden = config.hidden_dim
        if config.kind == "conv3x3":
            self.layers = nn.Sequential(nn.Conv2d(channels, feature_dim, 3, padding=1))
        else:
            self.layers = nn.Sequential(
                nn.Conv2d(channels, hidden, 1),
                nn.SiLU(),
                nn.Conv2d(hidden, hidden, 1),
                nn.SiLU(),
                nn.Conv2d(hidden, feature_dim, 1),
            )

    def forward(self, tapped: Tensor, num_patches: int) -> Tensor:
        """num_patches: N = g^2 of the extractor. Returns [B, N, D]."""
        grid = round(num_patches**0.5)
        projected = self.layers(tapped)
        if projected.shape[-2:] != (grid, grid):
            projected = F.interpolate(projected, size=(grid, grid), mode="bilinear", align_corners=False)
        return projected.flatten(2).transpose(1, 2)
