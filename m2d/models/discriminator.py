"""The PatchGAN discriminator of reconstructions."""

from torch import Tensor, nn


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
        logits: Tensor = self.stages(images)
        return logits
