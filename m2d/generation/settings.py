"""Settings of a generation run. Light on purpose: the command line reads them before torch is imported."""

import re
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from m2d.classes import CLASSES
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import ConfigError
from m2d.models.settings import Precision

Feature = Literal["prior", "none", "reference"]
Mode = Literal["standard", "image2image", "interpolate", "balance"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
OutputFormat = Literal["folder", "webdataset", "parquet"]
BalanceSplit = Literal["all", "train"]
_CHOICES = {
    "mode": Mode,
    "format": OutputFormat,
    "compile_mode": CompileMode,
    "balance_split": BalanceSplit,
    "mixed_precision": Precision,
    "feature": Feature,
}


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Which new images are refused and made again from another seed; docs/results/gates.md has what the defaults do."""

    enabled: bool = True  # false: every image is kept, and the manifest says that the gates were off
    near_copy: bool = True  # refuse what is nearer to a training image than images of two lesions are to each other
    class_consistency: bool = True  # refuse what is further from its class's training images than they are themselves
    blank: bool = True  # refuse images without contrast, such as are mostly black or white, and plain noise
    near_copy_quantile: float = 0.01  # share of real images that would be refused as near-copies; higher: stricter
    class_quantile: float = 0.99  # share of a class's real images that would pass; lower: stricter
    neighbours: int = 5  # nearest training images of the class whose mean distance counts
    min_contrast: float | None = None  # deviation of luma, grey levels; None: half of the flattest training images'
    max_saturated_share: float | None = None  # of pixels black or white; None: well above any training image's
    max_roughness: float | None = None  # mean step between pixels, grey levels; None: twice the roughest training ones
    max_attempts: int = 10  # seeds tried for one image before it is given up

    def __post_init__(self) -> None:
        for name in ("near_copy_quantile", "class_quantile"):
            quantile = getattr(self, name)
            if not (isfinite(quantile) and 0 <= quantile <= 1):
                raise ConfigError(f"gates.{name} is {quantile}; it must be from 0 to 1")
        for name in ("neighbours", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gates.{name} is {getattr(self, name)}; it must be at least 1")
        contrast, share = self.min_contrast, self.max_saturated_share
        if contrast is not None and not 0 <= contrast <= 127.5:
            raise ConfigError(f"gates.min_contrast is {contrast}; it must be from 0 to 127.5 grey levels")
        if self.max_roughness is not None and not 0 <= self.max_roughness <= 255:
            raise ConfigError(f"gates.max_roughness is {self.max_roughness}; it must be from 0 to 255 grey levels")
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"gates.max_saturated_share is {share}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingSettings):
    """Which images to make, from which checkpoint, and where they go."""

    checkpoint: str  # a checkpoint directory
    output: str | None = None  # None: generated_images/<hash of the settings> in the checkpoint's experiment
    mode: Mode = "standard"  # image2image needs init_images, interpolate the reference_images, balance a data_root
    classes: str | None = None  # comma-separated codes, any letter case; None: all seven
    num_samples: int = 8  # per class; balance and interpolate count for themselves
    seed: int = 0  # of the run; every image has its own, made from this, its class and its index
    feature: Feature | None = None  # drawn from the prior, the reference's own, or none; None: as the mode has it
    feature_temperature: float = 1.0  # spread of the drawn features; 0: the class mean for every image
    init_images: str | None = None  # image2image: a folder of class folders, or a flat one with one of --classes
    strength: float = 0.75  # image2image: 0 returns the image as the VAE sees it, 1 nothing of it but its feature
    reference_images: str | None = None  # interpolate: where the walks begin; a folder as of init_images
    reference_images_b: str | None = None  # interpolate: where they end
    steps_between: int = 5  # interpolate: images between the two ends of a walk
    data_root: str | None = None  # dataset that balance counts, merge joins and the gates know; None: training's own
    catalog: str | None = None  # its catalog.parquet, instead of a scan
    to: str = "max"  # balance: as many as the largest class has, a number of images, or a share such as 0.5 of it
    balance_split: BalanceSplit = "all"  # balance: the real images that count, of all splits or of train alone
    plan: str | None = None  # run this plan.parquet; it decides what is made, and how
    plan_only: bool = False  # write plan.parquet and stop; read it, edit it, give it as --plan
    batch_size: int = 32  # images at once; does not change them
    device: str | None = None  # None: cuda where there is one, otherwise cpu
    mixed_precision: Precision | None = None  # None: bf16 on a GPU that has it, otherwise no
    compile: bool = False  # torch.compile of the U-Net; pays off over thousands of images
    compile_mode: CompileMode = "default"  # torch.compile's; reduce-overhead: CUDA graphs, for small batches on a GPU
    num_actors: int | None = None  # generators on Ray; 0: this process, without Ray; None: by devices and work
    gpus_per_actor: float | None = None  # GPUs an actor reserves, or a fraction of one; None: one where it uses any
    format: OutputFormat = "folder"  # folder: CLASS/<id>.png; webdataset: tar shards; parquet: shards of PNG bytes
    shard_images: int = 512  # images a shard; a killed run loses those in the making
    merge: bool = False  # write one index of data_root and the new images; nothing is copied
    extractor_weights: str | None = None  # file of the feature extractor's weights; None: where training had it
    verbose: bool = False  # show Ray's own bars and messages
    gates: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ConfigError("checkpoint is empty; name a checkpoint directory")
        for name in ("num_samples", "batch_size", "shard_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "steps_between", "num_actors"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name, kind in _CHOICES.items():
            optional = name in ("mixed_precision", "feature")
            if getattr(self, name) not in (*get_args(kind), *([None] if optional else [])):
                raise ConfigError(f"{name} is {getattr(self, name)}; known: {' '.join(get_args(kind))}")
        if self.compile_mode != "default" and not self.compile:
            raise ConfigError(f"compile_mode is {self.compile_mode}, but nothing is compiled; add --compile true")
        if not (isfinite(self.feature_temperature) and self.feature_temperature >= 0):
            raise ConfigError(
                f"feature_temperature is {self.feature_temperature}; it must be a number of at least 0 "
                "(1: spread as the training features)"
            )
        if not 0 <= self.strength <= 1:
            raise ConfigError(
                f"strength is {self.strength}; it must be from 0 (the image itself) to 1 (nothing of it is left)"
            )
        if self.gpus_per_actor is not None and not (isfinite(self.gpus_per_actor) and self.gpus_per_actor >= 0):
            raise ConfigError(f"gpus_per_actor is {self.gpus_per_actor}; it must be a number of at least 0")
        if self.gpus_per_actor is not None and self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ConfigError(f"gpus_per_actor is {self.gpus_per_actor}; above 1 it must be a whole number")
        parse_target(self.to)
        if self.plan is None:
            self._check_mode()
        elif self.plan_only:
            raise ConfigError("plan_only would write the plan that --plan names; leave one of them out")
        if self.merge and self.data_root is None:
            raise ConfigError("merge needs the real images; name their folder by --data_root")
        _ = self.class_codes  # a wrong class is reported before anything is loaded

    def _check_mode(self) -> None:
        """What a mode needs is there, and nothing is given that it would leave unused."""
        needs = {"image2image": ("init_images",), "interpolate": ("reference_images", "reference_images_b")}
        for name in needs.get(self.mode, ()):
            if not getattr(self, name):
                raise ConfigError(f"mode {self.mode} needs --{name}, a folder of images")
        for mode, names in needs.items():
            for name in names:
                if mode != self.mode and getattr(self, name) is not None:
                    raise ConfigError(f"{name} is for mode {mode}, and the mode is {self.mode}; add --mode {mode}")
        if self.mode == "balance" and self.data_root is None and self.catalog is None:
            raise ConfigError("mode balance needs what is to be balanced; name it by --data_root or --catalog")
        if self.feature == "reference" and self.mode in ("standard", "balance"):
            raise ConfigError(f"feature reference needs an image to take it from, and mode {self.mode} has none")
        if self.mode == "interpolate" and self.feature not in (None, "reference"):
            raise ConfigError(
                f"feature is {self.feature}; mode interpolate walks between the features of its references, so it is "
                "reference"
            )

    @property
    def class_codes(self) -> tuple[str, ...]:
        """The classes asked for, in the order of m2d.classes, each once. Raises ConfigError for an unknown one."""
        if self.classes is None:
            return CLASSES
        asked = {code.strip().upper() for code in self.classes.split(",")} - {""}
        unknown = sorted(asked - set(CLASSES))
        if unknown:
            raise ConfigError(f"classes: {', '.join(unknown)} is not known; choose from {','.join(CLASSES)}")
        if not asked:
            raise ConfigError(f"classes is empty; choose from {','.join(CLASSES)}, or leave it out for all")
        return tuple(code for code in CLASSES if code in asked)


@dataclass(frozen=True)
class Target:
    """What a class is filled up to: `images`, or `share` of the largest class; exactly one of them is set."""

    images: int | None = None
    share: float | None = None

    def resolve(self, largest: int) -> int:
        """Images that each class shall have where the largest one has `largest`; a share is rounded to the nearest."""
        return self.images if self.share is None else int(self.share * largest + 0.5)  # type: ignore[return-value]


def parse_target(to: str) -> Target:
    """`max`, a whole number of images, or a share of the largest class in (0, 1], such as `0.5`, with a point.

    The share is what imbalanced-learn calls a float `sampling_strategy`: images of the class over images of the largest
    one, afterwards. `x0.5` and `ratio 0.5` are other spellings of it; a whole number behind them is a share too, so
    `x1` is `max`. Raises ConfigError for anything else.
    """
    text = to.strip().lower()
    if text == "max":
        return Target(share=1.0)
    if re.fullmatch(r"[0-9]+", text) and int(text) > 0:
        return Target(images=int(text))
    share = re.fullmatch(r"(?:(?:ratio|x)\s*)?([0-9]+\.[0-9]*|\.[0-9]+)|(?:ratio|x)\s*([0-9]+)", text)
    if share is None:
        raise ConfigError(
            f"to is {to or '(empty)'}; it must be max (as many as the largest class), a whole number of images such as "
            "300, or a share of the largest class such as 0.5"
        )
    if not 0 < float(share[1] or share[2]) <= 1:
        raise ConfigError(
            f"to is {to}; a ratio is a share of the largest class, above 0 and at most 1 (0.5: half as many as it has)"
        )
    return Target(share=float(share[1] or share[2]))
