"""What judges reconstructions in training: LPIPS or the distance of an extractor's maps, and the discriminators."""

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d.errors import first_line
from m2d.models.extractors import LITE0, EfficientNetLite, load_feature_extractor
from m2d.models.settings import PerceptualKind

LITE0_MAPS = (16, 24, 40, 112)  # channels of EfficientNet-Lite0's pyramid
Maps = Sequence[Tensor]  # [B, C_k, h_k, w_k], from fine to coarse


class _Frozen(nn.Module):
    """Its network is outside the module tree: it is frozen and may be the caller's, so it is in no checkpoint."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = [network]

    @property
    def hidden(self) -> list[nn.Module]:
        """Its own, and those of what is in it."""
        return [network for part in self.modules() if isinstance(part, _Frozen) for network in part._network]

    def to(self, *args: Any, **kwargs: Any) -> "_Frozen":
        """Moves the hidden networks too."""
        for network in self.hidden:
            network.to(*args, **kwargs)
        return self


class FeatureMaps(_Frozen):
    """Maps of a frozen network with `mean`, `std` and `pyramid`, such as EfficientNetLite, at the images' own size."""

    def forward(self, images: Tensor) -> Maps:
        """images: [B, 3, H, W] in [-1, 1]."""
        network = self._network[0]
        # Depthwise convolutions are slower in bf16 than in float32 on CPUs, and unit-normalising loses what bf16 keeps.
        with torch.autocast(images.device.type, enabled=False):
            maps: Maps = network.pyramid(((images.float() + 1) * 127.5 - network.mean) / network.std)
            return maps


class FeatureDistance(_Frozen):
    """Distance of feature maps, unit-normalised over channels: LPIPS without its learned channel weights.

    Source: Zhang et al., arXiv 1801.03924, eq. 1 with w = 1.
    """

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.maps = FeatureMaps(network)

    def forward(self, images: Tensor, targets: Tensor, maps: tuple[Maps, Maps] | None = None) -> Tensor:
        """images, targets: [B, 3, H, W] in [-1, 1]; maps: `self.maps` of both, where they are known.

        Returns [B], 0 for equal images.
        """
        first, second = maps or (self.maps(images), self.maps(targets))
        with torch.autocast(images.device.type, enabled=False):
            total = first[0].new_zeros(images.shape[0])
            for a, b in zip(first, second, strict=True):
                difference = F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)
                total = total + difference.square().sum(dim=1).mean(dim=(1, 2))
            return total / len(first)


class LpipsDistance(_Frozen):
    """The `lpips` package's distance, frozen. maps: those that a projected discriminator judges beside it."""

    def __init__(self, network: nn.Module, maps: FeatureMaps | None = None) -> None:
        """network: as `load_lpips` gives it."""
        super().__init__(network)
        self.maps = maps

    def forward(self, images: Tensor, targets: Tensor, maps: tuple[Maps, Maps] | None = None) -> Tensor:
        """images, targets: [B, 3, H, W] in [-1, 1]. Returns [B]. maps: of no use here."""
        with torch.autocast(images.device.type, enabled=False):
            return self._network[0](images.float(), targets.float()).flatten()


def lpips_available(net: str) -> tuple[bool, str]:
    """Whether LPIPS can be built here, and why not. It needs torchvision's ImageNet weights, from cache or network."""
    try:
        load_lpips(net)
    except URLError:  # its own text is a socket's error number
        return False, "no network to fetch them from, and not in the torch hub cache"
    except Exception as error:
        return False, first_line(error)
    return True, ""


def build_perceptual(
    kind: PerceptualKind,
    extractor: nn.Module | None,
    net: str = "vgg",
    *,
    projected: bool = False,
    weights: bool = True,
) -> FeatureDistance | LpipsDistance:
    """The distance of that kind; both take images in [-1, 1] and give one number per image.

    "features" takes the maps of `extractor` where it has a pyramid, else those of the packaged EfficientNet-Lite0: a
    ViT has no map finer than its patches, and cached features come with no network at all. projected: a
    ProjectedDiscriminator shares the maps, which must be Lite0's then; beside LPIPS they are computed for it alone.
    weights: False: none are read, where shapes alone matter.
    """
    network: Any = None
    if kind == "features" or projected:
        gives_maps = hasattr(extractor, "pyramid") and (not projected or getattr(extractor, "name", None) == LITE0)
        lite0 = load_feature_extractor if weights else EfficientNetLite
        network = extractor if gives_maps else lite0(LITE0)
    if kind == "features":
        return FeatureDistance(network)
    return LpipsDistance(load_lpips(net, weights=weights), None if network is None else FeatureMaps(network))


def load_lpips(net: str, *, weights: bool = True) -> nn.Module:
    """The package's network on one of its backbones, frozen."""
    import lpips

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by arguments that were renamed since
        found = lpips.LPIPS(net=net, pretrained=weights, pnet_rand=not weights, verbose=False)
    return found.eval().requires_grad_(False)


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


class ProjectedDiscriminator(nn.Module):
    """Maps of a frozen network to logits, one head a map. Source: Projected GAN (arXiv 2111.01007, pg_modules/).

    Fixed random 1 x 1 convolutions mix each map's channels, and add the next coarser mix to each but the coarsest, so
    that the heads cannot settle on a few channels. The heads halve all maps down to the coarsest one's size, with group
    norms for PatchDiscriminator's reason. map_channels: of the maps, from fine to coarse. channels: of all mixes.
    """

    def __init__(self, map_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        last = len(map_channels) - 1
        for k, width in enumerate(map_channels):
            self.register_buffer(f"mixing_{k}", _random_mixing(channels, width))
            if k < last:
                self.register_buffer(f"across_{k}", _random_mixing(channels, channels))
        self.heads = nn.ModuleList(_head(channels, halvings=last - k) for k in range(last + 1))
        self.register_buffer("adaptive_weight", torch.zeros(()))  # of the adversarial loss; 0 until it is measured
        self.adaptive_weight: Tensor

    def forward(self, maps: Maps) -> Tensor:
        """Logits [B, N] of maps [B, C_k, h_k, w_k]; positive means real."""
        mixed: list[Tensor] = []
        for k, found in reversed(list(enumerate(maps))):
            mix = F.conv2d(found, self.get_buffer(f"mixing_{k}"))
            if mixed:
                coarser = F.conv2d(mixed[0], self.get_buffer(f"across_{k}"))
                mix = (mix + F.interpolate(coarser, size=mix.shape[2:], mode="nearest")) / math.sqrt(2)
            mixed.insert(0, mix)
        return torch.cat([head(mix).flatten(1) for head, mix in zip(self.heads, mixed, strict=True)], dim=1)


Discriminator = PatchDiscriminator | ProjectedDiscriminator


def _random_mixing(channels: int, of: int) -> Tensor:
    """Weights [channels, of, 1, 1] that keep the variance."""
    return nn.init.normal_(torch.empty(channels, of, 1, 1), std=of**-0.5)


def _head(channels: int, halvings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, stride in [(4, 2)] * halvings + [(3, 1)]:
        convolution = SpectralConv2d(channels, channels, size, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(4, channels), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, SpectralConv2d(channels, 1, 3, padding=1))


class SpectralConv2d(nn.Conv2d):
    """A convolution by its weight divided by that's spectral norm (Miyato et al., arXiv 1802.05957).

    torch's own carries vectors from one call to the next: a step would depend on how it is divided into micro-batches,
    on steps that were skipped, and on passes that only count FLOPs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w]."""
        return self._conv_forward(x, self.weight / spectral_norm(self.weight.flatten(1)), self.bias)


def spectral_norm(matrix: Tensor) -> Tensor:
    """The largest singular value of [m, n], 2 % too small at worst (64 rows). Its gradient takes u and v as fixed.

    Of G = M M^T to the 64th, twice to the 8th for the range of float32, little but the largest eigenvector is left.
    """
    device = matrix.device.type if matrix.device.type != "meta" else "cpu"  # which has no autocast
    with torch.autocast(device, enabled=False):
        gram = matrix @ matrix.T
        power = gram.detach()
        for _ in range(2):
            power = torch.linalg.matrix_power(power / power.norm(), 8)
        return ((gram * power).sum() / power.diagonal().sum()).sqrt()
