"""What the U-Net's cross-attention reads: a class token and a few tokens projected from the extractor's cls feature."""

import torch
from torch import Tensor, nn

from m2d.classes import NUM_CLASSES
from m2d.models.settings import ConditioningConfig


class ConditionEncoder(nn.Module):
    """Labels and optional features to a context [B, 1 + K, context_dim].

    The feature is standardised by training-set statistics (buffers), Gaussian noise of a given level is added, and the
    network learns the level from a vector added to the feature tokens, so that a feature guides without dictating.
    """

    def __init__(self, config: ConditioningConfig, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.feature_tokens = config.feature_tokens
        width = config.context_dim
        self.class_embedding = nn.Embedding(NUM_CLASSES + 1, width)
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

        labels: int64 [B]; NUM_CLASSES is the null class. cls: [B, D] raw features, or None for no feature at all
        (sampling; in training every parameter must get a gradient, so drop features by drop_feature there).
        drop_feature: bool [B], True where the feature is left out. noise: [B, D] standard normal, scaled by
        noise_level [B] (0 where None). Returns [B, 1 + K, context_dim].
        """
        batch = labels.shape[0]
        class_token = self.class_embedding(labels).unsqueeze(1)
        null = self.null_feature.expand(batch, -1, -1)
        if cls is None:
            tokens = null
        else:
            level = torch.zeros(batch, device=cls.device) if noise_level is None else noise_level
            standardized = (cls - self.feature_mean) / self.feature_std
            if noise is not None:
                standardized = standardized + level.unsqueeze(1) * noise
            tokens = self.feature_projection(standardized).view(batch, self.feature_tokens, -1)
            tokens = tokens + self.noise_level_embedding(level.unsqueeze(1)).unsqueeze(1)
            if drop_feature is not None:
                tokens = torch.where(drop_feature.view(-1, 1, 1), null.to(tokens.dtype), tokens)
        return self.norm(torch.cat([class_token, tokens], dim=1))
