"""Settings of the networks. Light on purpose: the command line reads them before torch is imported."""

import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from m2d.errors import require, require_range

TIMM_PREFIX = "timm:"  # and the name of any timm model that has spatial features
PANDERM_PREFIX = "panderm-"
MIDDLE = "middle"
Crop = Literal["whole", "official"]
PerceptualKind = Literal["lpips", "features"]
DiscriminatorKind = Literal["patch", "projected"]
Precision = Literal["no", "bf16", "fp16"]  # of the networks' passes: float32, or autocast to the other two

_EXTRACTORS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "panderm-large", "panderm-base")


def parse_tap(tap: str) -> tuple[str, int]:
    """("down", 1) of `down_1`, ("middle", 0) of `middle`. Raises ConfigError for any other form."""
    matched = re.fullmatch(r"(down|up)_(\d+)", tap)
    require(matched or tap == MIDDLE, f"alignment.tap is {tap}; it must be middle, or down_K or up_K, K from 0")
    return (matched[1], int(matched[2])) if matched else (MIDDLE, 0)


def require_extractor(name: str, weights: str | None, input_size: int | None, crop: str) -> None:
    """Raise ConfigError where an extractor cannot be built from these settings, as far as that shows without torch."""
    group, panderm = "feature_extractor", name.startswith(PANDERM_PREFIX)
    known = name in _EXTRACTORS or (name.startswith(TIMM_PREFIX) and name != TIMM_PREFIX)
    require(known, f"{group}.name is {name}; known: {' '.join(_EXTRACTORS)} {TIMM_PREFIX}MODEL")
    require(
        weights is not None or not panderm,
        f"{group}.weights is not set; {name} needs its file, which only its authors distribute: see docs/panderm.md",
    )
    found = weights is None or Path(weights).is_file()
    require(found, f"{group}.weights: {weights} is not a file; give the path of a local one")
    if input_size is not None:  # timm's models know for themselves which sizes they take
        least, cell = (1, 1) if name.startswith(TIMM_PREFIX) else (32, 16 if panderm else 32)
        require(
            input_size >= least and input_size % cell == 0,
            f"{group}.input_size is {input_size}; {name} needs a multiple of {cell}, at least {least}",
        )
    require(crop in get_args(Crop), f"{group}.crop is {crop}; known: {' '.join(get_args(Crop))}")


def _require_levels(config: "AutoencoderConfig | UNetConfig", group: str, *divisors: str) -> None:
    """A width for each level, each divisible by what these settings say."""
    require(config.block_channels, f"{group}.block_channels is empty; give one width per level")
    for width, name in product(config.block_channels, divisors):
        divisor = getattr(config, name)
        what = f"every width must be divisible by {name} {divisor}"
        require(width % divisor == 0, f"{group}.block_channels has {width}; {what}")


@dataclass(frozen=True, kw_only=True)
class FeatureExtractorConfig:
    """The frozen network whose features guide and align the U-Net."""

    name: str = "efficientnet-lite0"  # or efficientnet-lite1, -lite2, panderm-large, panderm-base, timm:MODEL
    weights: str | None = None  # a local file; None: the extractor's own (PanDerm has none: docs/panderm.md)
    input_size: int | None = None  # pixels a side fed to the extractor; None: its native size
    crop: Crop = "whole"  # whole: resized whole, so patches are where the U-Net's cells are; official: the centre
    statistics_images: int = 2048  # training images to which feature moments and prior are fitted; all of rare classes

    def __post_init__(self) -> None:
        require_extractor(self.name, self.weights, self.input_size, self.crop)
        require_range(self, "feature_extractor.", 2, "statistics_images")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """diffusers AutoencoderKL: from scratch by shape, or `pretrained` from a local folder or hub id; or block PCA."""

    kind: Literal["kl", "linear", "residual"] = "kl"  # linear: block PCA of the training images; residual: a VAE on it
    pretrained: str | None = None  # a local folder or a hub id; the shape below is then its own
    block_channels: list[int] = field(default_factory=lambda: [64, 128, 256])  # one entry per level; halves between
    layers_per_block: int = 1  # residual blocks per level; the decoder has one more
    latent_channels: int = 8  # numbers kept of each latent cell
    patch_size: int = 4  # of linear: image pixels per latent cell, along one side
    whitening: float = 0.5  # of block PCA: 0 scales latents as pixels are, 1 each component to variance 1
    norm_groups: int = 16  # of the group norms; every width must be divisible by it
    mid_attention: bool = False  # self-attention at the lowest resolution
    gradient_checkpointing: bool = False  # less memory in training, about a third more time

    def __post_init__(self) -> None:
        require_range(self, "autoencoder.", 1, "norm_groups", "latent_channels", "layers_per_block", "patch_size")
        _require_levels(self, "autoencoder", "norm_groups")
        require_range(self, "autoencoder.", 0, "whitening", high=1)
        most = 3 * self.downsampling**2
        require(
            self.kind == "kl" or self.latent_channels <= most,
            f"autoencoder.latent_channels is {self.latent_channels}; blocks of {self.downsampling} x "
            f"{self.downsampling} pixels have {most} numbers",
        )

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, along one side, of a network built from scratch."""
        if self.kind == "linear":
            return self.patch_size
        return int(2 ** (len(self.block_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """diffusers UNet2DConditionModel on normalised latents."""

    block_channels: list[int] = field(default_factory=lambda: [128, 256, 256])  # one entry per level; halves between
    layers_per_block: int = 2  # residual blocks per level; the way up has one more
    attention_levels: list[bool] = field(default_factory=lambda: [False, True, True])  # cross-attention at each level
    head_dim: int = 32  # channels per attention head
    norm_groups: int = 32  # of the group norms; every width must be divisible by it
    gradient_checkpointing: bool = False  # less memory, about a third more time

    def __post_init__(self) -> None:
        require_range(self, "unet.", 1, "layers_per_block", "head_dim", "norm_groups")
        _require_levels(self, "unet", "norm_groups", "head_dim")
        levels, attending = len(self.block_channels), len(self.attention_levels)
        require(attending == levels, f"unet.attention_levels has {attending} entries; there are {levels} levels")


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What the U-Net's cross-attention reads: one class token and a few feature tokens."""

    context_dim: int = 256  # width of a token
    feature_tokens: int = 4  # tokens that the cls feature becomes
    class_dropout: float = 0.1  # probability, per sample
    feature_dropout: float = 0.3  # probability, per sample; independent of the class
    feature_noise: float = 0.5  # largest noise level added to the standardised feature; drawn uniformly from [0, this]

    def __post_init__(self) -> None:
        require_range(self, "conditioning.", 0, "class_dropout", "feature_dropout", high=1)
        require_range(self, "conditioning.", 0, "feature_noise")
        require_range(self, "conditioning.", 1, "feature_tokens", "context_dim")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The alignment projector on the output of a U-Net block (U-REPA: project, then upsample)."""

    kind: Literal["mlp", "conv3x3"] = "mlp"  # mlp: U-REPA's, cell by cell; conv3x3: iREPA's single convolution
    hidden_dim: int = 512  # width of the MLP

    def __post_init__(self) -> None:
        require_range(self, "projector.", 1, "hidden_dim")


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual distance of reconstructions."""

    kind: PerceptualKind | None = None  # None: lpips where its weights can be had, else features
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"  # LPIPS's backbone


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The judge of reconstructions against which the VAE learns (hinge loss); off by default in the small presets."""

    enabled: bool = False  # train one, and the VAE against it
    kind: DiscriminatorKind = "patch"  # a PatchGAN on pixels; projected: on EfficientNet-Lite0's maps (Projected GAN)
    channels: int = 64  # projected: of all layers; patch: of the first, doubled by each further one, at most to 8 times
    layers: int = 3  # patch: halvings; 3 judge patches of 70 pixels, 2 of 34, 1 of 16
    start_step: int = 2000  # the generator's adversarial term begins here; the discriminator learns from step 0

    def __post_init__(self) -> None:
        require(self.channels % 4 == 0, f"discriminator.channels is {self.channels}; it must be a multiple of 4")
        require_range(self, "discriminator.", 4, "channels")
        require_range(self, "discriminator.", 1, "layers")
        require_range(self, "discriminator.", 0, "start_step")
