"""What the U-Net is told, as a component of the exported pipeline. Copied into each export by m2d.export.bundle."""

from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from m2d.diffusion.feature_prior import draw_features
from m2d.models.settings import ConditioningConfig
from m2d.models.unet import ConditionEncoder, LatentNorm


class Conditioning(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' mixins are untyped
    """Class codes and drawn features to the U-Net's context; statistics of the latents.

    prior_rank: directions that the feature prior keeps of a class; None: there is no prior, a class alone guides.
    time_shift: of the solver's times, as the U-Net was trained.
    """

    @register_to_config  # type: ignore[untyped-decorator]
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
