"""Conditioning of M2D 0.2.0, and what it needs of M2D's sources, word for word.

Made by `m2d export`. MIT licence.
"""

import torch
import torch.distributed as dist
from dataclasses import dataclass
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from math import inf
from torch import Tensor, nn
from typing import Any, Self


# --- m2d/errors.py ---
class M2DError(Exception):
    """What is wrong, where, and what to do, in one line."""

    exit_code = 2  # the command did not do what it was asked for; 1 is Python's, for a bug


class ConfigError(M2DError):
    """A setting has a value that cannot work."""


def require(condition: object, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_range(
    config: object, room: str, low: float, *names: str, high: float = inf, above: bool = False, below: bool = False
) -> None:
    """Each named number of the settings is None or finite and in [low, high].

    room: "schedule." say. above, below: an end that is left out.
    """
    shown = f"above {low:g}" if above else f"at least {low:g}"
    if high < inf:
        shown = f"in [{low:g}, {high:g}{')' if below else ']'}"
    for name in names:
        value = getattr(config, name)
        inside = value is None or (low <= value <= high and value != inf)  # and not nan
        excluded = [low] * above + [high] * below
        require(inside and value not in excluded, f"{room}{name} is {value}; it must be {shown}")


# --- m2d/models/settings.py ---
@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the U-Net's cross-attention reads: one class token and a few feature tokens."""

    context_dim: int = 256  # width of a token
    feature_tokens: int = 4  # tokens that the cls feature becomes
    class_dropout: float = 0.1  # probability, per sample
    feature_dropout: float = 0.3  # probability, per sample; independent of the class
    feature_noise: float = 0.5  # largest noise level added to the standardised feature; drawn uniformly from [0, this]

    def __post_init__(self) -> None:
        require_range(self, "conditioning.", 0, "class_dropout", "feature_dropout", high=1)
        require_range(self, "conditioning.", 0, "feature_noise")
        require_range(self, "conditioning.", 1, "feature_tokens", "context_dim")


# --- m2d/models/unet.py ---
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


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel.view(1, -1, 1, 1)


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


# --- m2d/diffusion/feature_prior.py ---
def draw_features(
    labels: Tensor, noise: Tensor, mean: Tensor, scale: Tensor, factors: Tensor, isotropic: Tensor
) -> Tensor:
    """What FeaturePrior.sample gives, of its tensors; the class of each label has images."""
    labels = labels.to(noise.device)
    along, around = noise.double().split([factors.shape[1], mean.shape[1]], dim=1)
    features = torch.empty_like(around)
    for index in labels.unique().tolist():
        chosen = labels == index
        parts = (mean[index], scale, factors[index], isotropic[index])
        centre, spread, directions, rest = (part.to(noise.device, torch.float64) for part in parts)
        features[chosen] = centre + spread * (along[chosen] @ directions + rest * around[chosen])
    return features.float()


# --- m2d/export/conditioning.py ---
class Conditioning(ModelMixin, ConfigMixin):
    """Class codes and drawn features to the U-Net's context; statistics of the latents.

    prior_rank: directions that the feature prior keeps of a class; None: there is no prior, a class alone guides.
    time_shift: of the solver's times, as the U-Net was trained.
    """

    @register_to_config
    def __init__(
        self,
        classes: list[str],
        image_size: int,
        feature_dim: int,
        context_dim: int,
        feature_tokens: int,
        latent_channels: int,
        prior_rank: int | None = None,
        time_shift: float = 1.0,
    ) -> None:
        super().__init__()
        config = ConditioningConfig(context_dim=context_dim, feature_tokens=feature_tokens)
        self.conditioning = ConditionEncoder(config, feature_dim, len(classes))
        self.latent_norm = LatentNorm(latent_channels)
        self.prior: nn.Module | None = None
        if prior_rank is not None:
            self.prior, k = nn.Module(), len(classes)
            self.prior.register_buffer("counts", torch.zeros(k, dtype=torch.int64))
            self.prior.register_buffer("mean", torch.zeros(k, feature_dim))
            self.prior.register_buffer("scale", torch.zeros(feature_dim))
            self.prior.register_buffer("factors", torch.zeros(k, prior_rank, feature_dim))
            self.prior.register_buffer("isotropic", torch.zeros(k))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As any diffusers model, but in float32 whatever is asked: see `to`."""
        own = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
        return super().from_pretrained(*args, **own)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves to a device and stays in float32: rounded, a feature that hardly varies would come out huge."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return self if device is None else super().to(device)

    @property
    def noise_dim(self) -> int:
        """Standard normal numbers that a drawn feature is made of; 0 without a prior."""
        return 0 if self.prior is None else int(self.config.prior_rank) + int(self.config.feature_dim)

    @property
    def drawable(self) -> list[str]:
        """Codes of the classes that the prior knows images of."""
        counts = [] if self.prior is None else self.prior.get_buffer("counts").tolist()
        return [code for code, count in zip(self.config.classes, counts) if count > 0]

    def forward(self, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Context [B, L, Dc] of labels int64 [B]; the number of classes is the null class.

        noise: [B, noise_dim] on the CPU, so that every device draws the same features; None: no feature.
        """
        features = None
        if noise is not None and self.prior is not None:
            prior = {name: tensor.cpu() for name, tensor in self.prior.named_buffers() if name != "counts"}
            features = draw_features(labels.cpu(), noise, **prior).to(labels.device)
        return self.conditioning(labels, features)
