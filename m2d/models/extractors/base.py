"""What every frozen feature extractor is: its features, and how images are prepared for it."""

import math
import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from m2d.models.settings import Crop


@dataclass(frozen=True)
class Features:
    """cls: [B, D] one vector an image. patches: [B, N, D] one vector a cell, row by row, N a square number."""

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
        self.name = name
        self.dim = dim
        self.input_size = input_size
        self.num_patches = num_patches
        self.crop = crop
        self.crop_pct = crop_pct
        self.squash = squash
        self.weights_sha256 = weights_sha256
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def key(self) -> str:
        """What shapes the features, as a folder's name: `<name>-<12 of weights_sha256>-<S>-<crop>`."""
        return extractor_name(self.name, self.weights_sha256, self.input_size, self.crop)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, S, S]: antialiased bilinear resize, crop, then (pixel - mean) / std.

        PIL, and so torchvision's published transforms, rounds to whole grey levels after each of its two passes; this
        does not. docs/panderm.md has the measured difference, tests/models/test_panderm.py holds it.
        """
        return self.preprocess_float(images.float())

    def preprocess_float(self, pixels: Tensor) -> Tensor:
        """The same from float pixels in [0, 255]; differentiable."""
        side = self.input_size
        if self.crop == "whole":
            return (_resized(pixels, side, side) - self.mean) / self.std
        shorter = math.floor(side / self.crop_pct)
        height, width = (shorter, shorter) if self.squash else _scaled(pixels.shape[-2], pixels.shape[-1], shorter)
        top, left = round((height - side) / 2), round((width - side) / 2)  # as torchvision's CenterCrop rounds
        pixels = _resized(pixels, height, width)[..., top : top + side, left : left + side]
        return (pixels - self.mean) / self.std

    def forward(self, x: Tensor) -> Features:
        """Preprocessed [B, 3, S, S] to Features; no gradient is kept for the network's own tensors."""
        raise NotImplementedError  # pragma: no cover - the interface

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode: its batch norms must not follow the training images."""
        return super().train(False)


def extractor_name(name: str, weights_sha256: str, input_size: int, crop: str) -> str:
    """What shapes the features, as a folder's name: `<name>-<12 of weights_sha256>-<S>-<crop>`."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{weights_sha256[:12]}-{input_size}-{crop}"


def _scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Sides with the shorter one of that length; the longer is cut to whole pixels, as torchvision's Resize does."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
