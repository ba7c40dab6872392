"""Settings of the networks. Light on purpose: the command line reads them before torch is imported."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from m2d.errors import ConfigError

KNOWN_EXTRACTORS = ("efficientnet-lite0", "efficientnet-lite1", "panderm-large", "panderm-base")
TIMM_PREFIX = "timm:"  # and the name of any timm model that has spatial features
PANDERM_PREFIX = "panderm-"
CROPS = ("whole", "official")
Crop = Literal["whole", "official"]
Precision = Literal["no", "bf16", "fp16"]  # of the networks' passes: float32, or autocast to the other two


MIDDLE = "middle"
PerceptualKind = Literal["lpips", "features"]
COMPLETE = "complete.json"  # lists a checkpoint's files, and is written last


def parse_tap(tap: str) -> tuple[str, int]:
    """("down", 1) of `down_1`, ("middle", 0) of `middle`. Raises ConfigError for any other form."""
    matched = re.fullmatch(r"(down|up)_(\d+)", tap)
    if tap != MIDDLE and matched is None:
        raise ConfigError(f"alignment.tap is {tap}; it must be middle, or down_K or up_K with K counted from 0")
    return (matched[1], int(matched[2])) if matched else (MIDDLE, 0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(config: object, group: str, **least: float) -> None:
    for name, minimum in least.items():
        value = getattr(config, name)
        _require(value >= minimum, f"{group}.{name} is {value}; it must be at least {minimum}")


def require_extractor(name: str, weights: str | None, input_size: int | None, crop: str) -> None:
    """Raise ConfigError where an extractor cannot be built from these settings, as far as that shows without torch."""
    known = name in KNOWN_EXTRACTORS or (name.startswith(TIMM_PREFIX) and name != TIMM_PREFIX)
    _require(known, f"feature_extractor.name is {name}; known: {' '.join(KNOWN_EXTRACTORS)} {TIMM_PREFIX}MODEL")
    _require(
        weights is not None or not name.startswith(PANDERM_PREFIX),
        f"feature_extractor.weights is not set, and {name} needs its file, which only its authors distribute; "
        "docs/panderm.md says where",
    )
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(f"feature_extractor.weights: {weights} is not a file; give the path of a local one")
    if input_size is not None and name in KNOWN_EXTRACTORS:
        cell = 16 if name.startswith(PANDERM_PREFIX) else 32
        _require(
            input_size >= 32 and input_size % cell == 0,
            f"feature_extractor.input_size is {input_size}; {name} needs a multiple of {cell}, at least 32",
        )
    elif input_size is not None:  # timm's models know for themselves which others they take
        _require(input_size >= 1, f"feature_extractor.input_size is {input_size}; it must be at least 1")
    _require(crop in CROPS, f"feature_extractor.crop is {crop}; known: {' '.join(CROPS)}")


@dataclass(frozen=True, kw_only=True)
class FeatureExtractorConfig:
    """The frozen network whose features guide and align the U-Net."""

    name: str = "efficientnet-lite0"  # or efficientnet-lite1, panderm-large, panderm-base, timm:MODEL
    weights: str | None = None  # a local file; None: the extractor's own (PanDerm has none: docs/panderm.md)
    input_size: int | None = None  # pixels a side fed to the extractor; None: its native size
    crop: Crop = "whole"  # whole: resized whole, so patches are where the U-Net's cells are; official: the centre
    statistics_images: int = 2048  # training images to which feature moments and prior are fitted; all of rare classes

    def __post_init__(self) -> None:
        require_extractor(self.name, self.weights, self.input_size, self.crop)
        _require_at_least(self, "feature_extractor", statistics_images=2)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """diffusers AutoencoderKL: from scratch by shape, or `pretrained` from a local folder or hub id."""

    pretrained: str | None = None  # a local folder or a hub id; the shape below is then its own
    block_channels: list[int] = field(default_factory=lambda: [64, 128, 256])  # one entry a level; halves between
    layers_per_block: int = 1  # residual blocks a level; the decoder has one more
    latent_channels: int = 8  # numbers kept of each latent cell
    norm_groups: int = 16  # of the group norms; every width must divide by it
    mid_attention: bool = False  # self-attention at the lowest resolution
    gradient_checkpointing: bool = False  # less memory in training, about a third more time

    def __post_init__(self) -> None:
        _require_at_least(self, "autoencoder", norm_groups=1, latent_channels=1, layers_per_block=1)
        _require(len(self.block_channels) >= 1, "autoencoder.block_channels is empty; give one width a level")
        for width in self.block_channels:
            _require(
                width % self.norm_groups == 0,
                f"autoencoder.block_channels has {width}; every width must divide by norm_groups {self.norm_groups}",
            )

    @property
    def downsampling(self) -> int:
        """Image pixels a latent cell, along one side, of a network built from scratch."""
        return int(2 ** (len(self.block_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """diffusers UNet2DConditionModel on normalised latents."""

    block_channels: list[int] = field(default_factory=lambda: [128, 256, 256])  # one entry a level; halves between
    layers_per_block: int = 2  # residual blocks a level; the way up has one more
    attention_levels: list[bool] = field(default_factory=lambda: [False, True, True])  # cross-attention at each level
    head_dim: int = 32  # channels an attention head
    norm_groups: int = 32  # of the group norms; every width must divide by it
    gradient_checkpointing: bool = False  # less memory, about a third more time

    def __post_init__(self) -> None:
        _require(len(self.block_channels) >= 1, "unet.block_channels is empty; give one width a level")
        _require_at_least(self, "unet", layers_per_block=1, head_dim=1, norm_groups=1)
        _require(
            len(self.attention_levels) == len(self.block_channels),
            f"unet.attention_levels has {len(self.attention_levels)} entries and unet.block_channels "
            f"{len(self.block_channels)}; give one a level",
        )
        for width in self.block_channels:
            _require(
                width % self.norm_groups == 0 and width % self.head_dim == 0,
                f"unet.block_channels has {width}; every width must divide by norm_groups {self.norm_groups} "
                f"and head_dim {self.head_dim}",
            )


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the U-Net's cross-attention reads: one class token and a few feature tokens."""

    context_dim: int = 256  # width of a token
    feature_tokens: int = 4  # tokens that the cls feature becomes
    class_dropout: float = 0.1  # probability, a sample
    feature_dropout: float = 0.3  # probability, a sample; independent of the class
    feature_noise: float = 0.5  # largest noise level added to the standardised feature; drawn uniformly from [0, this]

    def __post_init__(self) -> None:
        for name in ("class_dropout", "feature_dropout"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"conditioning.{name} is {value}; it is a probability")
        _require_at_least(self, "conditioning", feature_noise=0, feature_tokens=1, context_dim=1)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The alignment projector on the output of a U-Net block (U-REPA: project, then upsample)."""

    kind: Literal["mlp", "conv3x3"] = "mlp"  # mlp: U-REPA's, cell by cell; conv3x3: iREPA's single convolution
    hidden_dim: int = 512  # width of the MLP

    def __post_init__(self) -> None:
        _require_at_least(self, "projector", hidden_dim=1)


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual distance of reconstructions."""

    kind: PerceptualKind | None = None  # None: lpips where its weights can be had, else features
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"  # LPIPS's backbone


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """PatchGAN on reconstructions (hinge loss); off by default in the small presets."""

    enabled: bool = False  # train one, and the VAE against it
    channels: int = 64  # of the first layer; doubled by each further one, at most to eight times
    layers: int = 3  # halvings; 3 judge patches of 70 pixels, 2 of 34, 1 of 16
    start_step: int = 2000  # the generator's adversarial term begins here; the discriminator learns from step 0

    def __post_init__(self) -> None:
        _require(
            self.channels >= 4 and self.channels % 4 == 0,
            f"discriminator.channels is {self.channels}; it must be a multiple of 4",
        )
        _require_at_least(self, "discriminator", layers=1, start_step=0)
