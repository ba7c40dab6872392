"""Networks that only training needs: the alignment projector and the PatchGAN discriminator of reconstructions."""

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
        projected = self.layers(tapped)
        if projected.shape[-2:] != (grid, grid):
            projected = F.interpolate(projected, size=(grid, grid), mode="bilinear", align_corners=False)
        return projected.flatten(2).transpose(1, 2)


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to a map of logits [B, 1, h, w], one a patch (Isola et al., arXiv 1611.07004).

    Group norm in place of the original's batch norm: real and reconstructed images are judged in separate passes, and
    batch statistics would tell them apart by the company they keep.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            previous, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            stages += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(8, width), width),
                nn.LeakyReLU(0.2),
            ]
        stages.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.stages = nn.Sequential(*stages)

    def forward(self, images: Tensor) -> Tensor:
        """Positive means real."""
        return self.stages(images)
