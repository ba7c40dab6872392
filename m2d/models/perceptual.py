"""What judges reconstructions in training: LPIPS or the distance of an extractor's maps, and a PatchGAN."""

import contextlib
import io
import warnings
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d.errors import first_line
from m2d.models.extractors import LITE0, load_feature_extractor
from m2d.models.settings import PerceptualKind


class _Distance(nn.Module):
    """Its network is outside the module tree: it is frozen and may be the caller's, so it is in no checkpoint."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = [network]

    def to(self, *args: Any, **kwargs: Any) -> "_Distance":
        """Moves the hidden network too."""
        self._network[0].to(*args, **kwargs)
        return self


class FeatureDistance(_Distance):
    """Distance of feature maps, unit-normalised over channels: LPIPS without its learned channel weights.

    Of a frozen network with `mean`, `std` and `pyramid`, such as EfficientNetLite, at the images' own size.
    Source: Zhang et al., arXiv 1801.03924, eq. 1 with w = 1.
    """

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: [B, 3, H, W] in [-1, 1]. Returns [B], 0 for equal images."""
        network = self._network[0]
        # Depthwise convolutions are slower in bf16 than in float32 on CPUs, and unit-normalising loses what bf16 keeps.
        with torch.autocast(images.device.type, enabled=False):
            first, second = (
                network.pyramid(((x.float() + 1) * 127.5 - network.mean) / network.std) for x in (images, targets)
            )
            total = first[0].new_zeros(images.shape[0])
            for a, b in zip(first, second, strict=True):
                difference = F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)
                total = total + difference.square().sum(dim=1).mean(dim=(1, 2))
            return total / len(first)


class LpipsDistance(_Distance):
    """The `lpips` package's distance, frozen."""

    def __init__(self, net: str) -> None:
        super().__init__(_load_lpips(net))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: [B, 3, H, W] in [-1, 1]. Returns [B]."""
        with torch.autocast(images.device.type, enabled=False):
            return self._network[0](images.float(), targets.float()).flatten()


def lpips_available(net: str) -> tuple[bool, str]:
    """Whether LPIPS can be built here, and why not. It needs torchvision's ImageNet weights, from cache or network."""
    try:
        _load_lpips(net)
    except URLError:  # its own text is a socket's error number
        return False, "no network to fetch them from, and not in the torch hub cache"
    except Exception as error:
        return False, first_line(error)
    return True, ""


def build_perceptual(kind: PerceptualKind, extractor: nn.Module | None, net: str = "vgg") -> nn.Module:
    """The distance of that kind; both take images in [-1, 1] and give one number per image.

    "features" takes the maps of `extractor` where it has a pyramid, else those of the packaged EfficientNet-Lite0: a
    ViT has no map finer than its patches, and cached features come with no network at all.
    """
    if kind == "lpips":
        return LpipsDistance(net)
    return FeatureDistance(extractor if hasattr(extractor, "pyramid") else load_feature_extractor(LITE0))


def _load_lpips(net: str) -> nn.Module:
    import lpips

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by arguments that were renamed since
        return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to a map of logits [B, 1, h, w], one per patch (Isola et al., arXiv 1611.07004).

    Group norm in place of the original's batch norm: real and reconstructed images are judged in separate passes, and
    batch statistics alone would distinguish them.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            previous, width = width, channels * min(2**layer, 8)
            convolution = nn.Conv2d(previous, width, 4, stride=2 if layer < layers else 1, padding=1, bias=False)
            stages += [convolution, nn.GroupNorm(min(8, width), width), nn.LeakyReLU(0.2)]
        stages.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.stages = nn.Sequential(*stages)

    def forward(self, images: Tensor) -> Tensor:
        """Positive means real."""
        return self.stages(images)
