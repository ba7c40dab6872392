"""The alignment projector: every cell of a U-Net block's output to a feature, then up to the extractor's grid."""

import torch.nn.functional as F
from torch import Tensor, nn

from m2d.models.settings import ProjectorConfig


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
        projected: Tensor = self.layers(tapped)
        if projected.shape[-2:] != (grid, grid):
            projected = F.interpolate(projected, size=(grid, grid), mode="bilinear", align_corners=False)
        return projected.flatten(2).transpose(1, 2)
