"""What every frozen feature extractor is: its features, and how images are prepared for it."""

import math
import re
from dataclasses import dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from m2d.models.settings import Crop


@dataclass(frozen=True)
class Features:
    """cls: [B, D], one vector per image. patches: [B, N, D], one vector per cell, row by row, N a square number."""

    cls: Tensor
    patches: Tensor


class FeatureExtractor(nn.Module):
    """A frozen network: uint8 images in, features out. It never trains and never leaves eval mode.

    dim: D. input_size: S, pixels a side. num_patches: N. mean, std: three numbers each, of pixels in [0, 255].
    crop "whole" resizes the image to S x S as it is, so that patch (i, j) is where the U-Net's cell is; "official"
    is the authors' evaluation transform: the shorter side to floor(S / crop_pct), then the central S x S (squash: both
    sides to that length). weights_sha256: of the weights' file, or of the tensors where there is none.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        input_size: int,
        mean: Tensor,
        std: Tensor,
        *,
        num_patches: int,
        crop: Crop = "whole",
        crop_pct: float = 0.875,
        squash: bool = False,
        weights_sha256: str = "0" * 64,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.input_size, self.num_patches = name, dim, input_size, num_patches
        self.crop, self.crop_pct, self.squash = crop, crop_pct, squash
        self.weights_sha256 = weights_sha256
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.network: Any  # timm's, set by a class that does not override `forward`

    @property
    def key(self) -> str:
        """What shapes the features, as a folder's name: `<name>-<12 of weights_sha256>-<S>-<crop>`."""
        return extractor_name(self.name, self.weights_sha256, self.input_size, self.crop)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, S, S]: antialiased bilinear resize, crop, then (pixel - mean) / std.

        Float pixels in [0, 255] get a gradient. PIL, and so torchvision's published transforms, rounds to whole grey
        levels after each of its two passes; this does not. docs/panderm.md has the measured difference.
        """
        pixels, side = images.float(), self.input_size
        height, width = old = tuple(pixels.shape[-2:])
        scaled = math.floor(side / self.crop_pct) if self.crop == "official" else side
        if self.crop == "whole" or self.squash:
            new = (scaled, scaled)
        else:  # the longer side is cut to whole pixels, as torchvision's Resize does
            new = (scaled * height // min(old), scaled * width // min(old))
        if new != old:
            pixels = F.interpolate(pixels, size=new, mode="bilinear", antialias=True, align_corners=False)
        top, left = (round((length - side) / 2) for length in new)  # as torchvision's CenterCrop rounds
        return (pixels[..., top : top + side, left : left + side] - self.mean) / self.std

    def forward(self, x: Tensor) -> Features:
        """Preprocessed [B, 3, S, S] to Features; no gradient is kept for the network's own tensors."""
        return features_of(self.network, x)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: its batch norms must not follow the training images."""
        return super().train(False)


def extractor_name(name: str, weights_sha256: str, input_size: int, crop: str) -> str:
    """See FeatureExtractor.key."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{weights_sha256[:12]}-{input_size}-{crop}"


class NoGridError(Exception):
    """What the features are instead of a square grid."""


def features_of(network: Any, x: Tensor) -> Features:
    """Those of a timm network. Raises NoGridError where its patches are no square grid.

    Vision transformers: cls is the class token after the final norm, or the model's own pooling where there is none or
    where the final norm is for the pooled vector alone; patches are the tokens after the norm, without class and
    register tokens. Other networks: patches are the cells of the last map, cls is their mean.
    """
    found = network.forward_features(x)
    if not isinstance(found, Tensor) or found.ndim not in (3, 4):
        raise NoGridError(f"a {type(found).__name__} that is neither tokens nor a map")
    if found.ndim == 4:
        found = found.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else found
        if found.shape[2] != found.shape[3]:
            raise NoGridError(f"{found.shape[2]} x {found.shape[3]} cells")
        patches = found.flatten(2).transpose(1, 2)
        return Features(cls=patches.mean(dim=1), patches=patches)
    has_class_token = isinstance(getattr(network, "cls_token", None), Tensor)
    prefix = int(getattr(network, "num_prefix_tokens", has_class_token))
    count = found.shape[1] - prefix
    if count < 1 or math.isqrt(count) ** 2 != count:
        raise NoGridError(f"{count} tokens")
    # With fc_norm the final norm was trained on the mean of the tokens, and `norm` does nothing.
    pooled_norm = getattr(network, "fc_norm", None) if isinstance(getattr(network, "norm", None), nn.Identity) else None
    patches = found[:, prefix:] if pooled_norm is None else pooled_norm(found[:, prefix:])
    cls = found[:, 0] if has_class_token and pooled_norm is None else network.forward_head(found, pre_logits=True)
    return Features(cls=cls, patches=patches)
