"""Settings of a generation run. Light on purpose: the command line reads them before torch is imported."""

import re
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Literal, get_args, get_origin, get_type_hints

from m2d.classes import ClassSet
from m2d.data.settings import require_seed
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import ConfigError
from m2d.models.settings import Precision

Feature = Literal["prior", "none", "reference"]
Mode = Literal["standard", "image2image", "interpolate", "balance"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
OutputFormat = Literal["folder", "webdataset", "parquet"]
BalanceSplit = Literal["all", "train"]
BalanceFrom = Literal["noise", "real", "flips"]
SELF_MADE = "self-made"  # instead of a file of certificates


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
        highest = {"near_copy_quantile": 1, "class_quantile": 1, "max_saturated_share": 1}
        for name, high in (highest | {"min_contrast": 127.5, "max_roughness": 255}).items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high:
                raise ConfigError(f"gates.{name} is {value}; it must be from 0 to {high}")
        for name in ("neighbours", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gates.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingSettings):
    """Which images to make, from which checkpoint, and where they go."""

    checkpoint: str  # a checkpoint directory, a name in weights/, or hub:USER/NAME[@REVISION]
    guide_checkpoint: str | None = None  # an earlier one of the run; guidance leads away from it (autoguidance)
    output: str | None = None  # None: generated_images/<hash of the settings> in the checkpoint's experiment, or here
    mode: Mode = "standard"  # image2image needs init_images, interpolate the reference_images, balance a data_root
    classes: str | None = None  # comma-separated codes, any letter case; None: all of them
    num_samples: int = 8  # per class; balance and interpolate count for themselves
    seed: int = 0  # of the run; every image has its own, made from this, its class and its index
    time_shift: float | None = None  # above 1: more of the steps near the noise; 1: even; None: as in training
    feature: Feature | None = None  # drawn from the prior, the reference's own, or none; None: as the mode has it
    feature_temperature: float = 1.0  # spread of the drawn features; 0: the class mean for every image
    init_images: str | None = None  # image2image: a folder of class folders, or a flat one with one of --classes
    strength: float | str = 0.75  # of a variation: 0 is its image, 1 nothing of it but its feature; 0.3..0.6: drawn
    reference_images: str | None = None  # interpolate: where the walks begin; a folder as of init_images
    reference_images_b: str | None = None  # interpolate: where they end
    steps_between: int = 5  # interpolate: images between the two ends of a walk
    data_root: str | None = None  # dataset that balance counts, merge joins and the gates know; None: training's own
    catalog: str | None = None  # its catalog.parquet, instead of a scan
    to: str = "max"  # balance: as many as the largest class has, a number of images, or a share such as 0.5 of it
    balance_split: BalanceSplit = "all"  # balance: the real images that count, of all splits or of train alone
    balance_from: BalanceFrom = "noise"  # balance: real: training lesions varied, see strength; flips: only turned
    masks: str | None = None  # folder of NAME_segmentation.png: redraw lesions alone; balance: in other skins
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
    sign: str | None = None  # self-made, or a PEM file of your certificate chain: a C2PA manifest in each image
    sign_key: str | None = None  # PEM file of its private key; None: it is in the same file
    verbose: bool = False  # show Ray's own bars and messages
    gates: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sign(self.sign, self.sign_key)
        require_seed("seed", self.seed)
        if not self.checkpoint:
            raise ConfigError("checkpoint is empty; name a checkpoint directory")
        least = {"num_samples": 1, "batch_size": 1, "shard_images": 1, "steps_between": 0, "num_actors": 0}
        for name, minimum in least.items():
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name, hint in get_type_hints(type(self)).items():
            known = next((get_args(kind) for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal), None)
            if known is not None and getattr(self, name) not in (None, *known):
                raise ConfigError(f"{name} is {getattr(self, name)}; known: {' '.join(known)}")
        if self.compile_mode != "default" and not self.compile:
            raise ConfigError(f"compile_mode is {self.compile_mode}, but nothing is compiled; add --compile true")
        for name in ("feature_temperature", "gpus_per_actor"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be a number of at least 0")
        if self.time_shift is not None and not (isfinite(self.time_shift) and self.time_shift > 0):
            raise ConfigError(f"time_shift is {self.time_shift}; it must be a number above 0")
        if self.guide_checkpoint is not None and self.guidance_scale == 1 and self.plan is None:
            raise ConfigError(
                "guide_checkpoint has nothing to do at guidance_scale 1, which is no guidance; raise --guidance_scale"
            )
        parse_strength(self.strength)
        if self.gpus_per_actor is not None and self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ConfigError(f"gpus_per_actor is {self.gpus_per_actor}; above 1 it must be a whole number")
        parse_target(self.to)
        if self.classes is not None and not self.classes.strip(" ,"):
            raise ConfigError("classes is empty; name some, or leave it out for all")
        if self.merge and self.data_root is None:
            raise ConfigError("merge needs the real images; name their folder by --data_root")
        if self.plan is not None:  # which decides what is made, and how
            if self.plan_only:
                raise ConfigError("plan_only would write the plan that --plan names; leave one of them out")
            return
        needs = {"init_images": "image2image", "reference_images": "interpolate", "reference_images_b": "interpolate"}
        for name, mode in needs.items():
            if mode == self.mode and not getattr(self, name):
                raise ConfigError(f"mode {mode} needs --{name}, a folder of images")
            if mode != self.mode and getattr(self, name) is not None:
                raise ConfigError(f"{name} is for mode {mode}, and the mode is {self.mode}; add --mode {mode}")
        if self.mode == "balance" and self.data_root is None and self.catalog is None:
            raise ConfigError("mode balance needs what is to be balanced; name it by --data_root or --catalog")
        if self.balance_from != "noise" and (self.mode != "balance" or self.data_root is None):
            raise ConfigError(
                f"balance_from {self.balance_from} varies training images in mode balance; add --mode balance and name "
                "their folder by --data_root"
            )
        if self.masks is not None and self.mode != "image2image" and self.balance_from == "noise":
            raise ConfigError(
                "masks are of real lesions, and these images come from noise; add --mode balance --balance_from real, "
                "or --mode image2image"
            )
        if self.strength != GenerateConfig.strength and self.mode != "image2image" and self.balance_from != "real":
            start = f"balance_from {self.balance_from}" if self.mode == "balance" else f"mode {self.mode}"
            raise ConfigError(
                f"strength is {self.strength}, and {start} has none; leave it out, or add --mode image2image, or "
                "--mode balance --balance_from real"
            )
        if self.balance_from == "flips" and self.feature not in (None, "none"):
            raise ConfigError(f"feature is {self.feature}, but nothing guides a flip; leave it out")
        if self.feature == "reference" and not self.starts_from_images:
            raise ConfigError(f"feature reference needs an image to take it from, and mode {self.mode} has none")
        if self.mode == "interpolate" and self.feature not in (None, "reference"):
            raise ConfigError(
                f"feature is {self.feature}; mode interpolate walks between the features of its references"
            )

    @property
    def starts_from_images(self) -> bool:
        """Whether the mode's images have input images, and so a feature of their own to be guided by."""
        return self.mode in ("image2image", "interpolate") or self.balance_from == "real"

    @property
    def own_feature(self) -> Feature | None:
        """What guides the mode's images where `feature` does not say; None: the prior, where there is one."""
        return "reference" if self.starts_from_images else "none" if self.balance_from == "flips" else None

    def class_codes(self, known: ClassSet) -> tuple[str, ...]:
        """The classes asked for, in the order of those known, each once. Raises ConfigError for an unknown one."""
        if self.classes is None:
            return known.codes
        code_of = {code.casefold(): code for code in known.codes}
        asked = [word.strip() for word in self.classes.split(",") if word.strip()]
        unknown = sorted({word for word in asked if word.casefold() not in code_of})
        if unknown:
            raise ConfigError(f"classes: {', '.join(unknown)} is not known; choose from {','.join(known.codes)}")
        return tuple(code for code in known.codes if code.casefold() in {word.casefold() for word in asked})


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Which images to ask what they say of themselves."""

    files: list[str]  # images, shards of them, or folders of either; the words without a flag
    trust: str | None = None  # PEM file of certificates whose word counts: a run's certificates.pem, or an authority's

    def __post_init__(self) -> None:
        if not self.files or not all(self.files):
            raise ConfigError("files is empty; name images, or folders of them")


def require_sign(sign: str | None, sign_key: str | None) -> None:
    """Raise ConfigError for settings that do not go together."""
    if sign == "":
        raise ConfigError(f"sign is empty; say {SELF_MADE}, or name a PEM file of your certificate chain")
    if sign_key is not None and sign in (None, SELF_MADE):
        raise ConfigError("sign_key is the key of your own certificate; name that by --sign FILE")


def parse_target(to: str) -> int | float:
    """What each class is filled up to: images (int), or a share of the largest class's (float in (0, 1]).

    to: `max`, a whole number of images, or a share with a point, such as `0.5`: what imbalanced-learn calls a float
    `sampling_strategy`. `x0.5` and `ratio 0.5` are other spellings of it; a whole number behind them is a share too, so
    `x1` is `max`. Raises ConfigError for anything else.
    """
    text = to.strip().lower()
    if text == "max":
        return 1.0
    if re.fullmatch(r"[0-9]+", text) and int(text) > 0:
        return int(text)
    share = re.fullmatch(r"(?:(?:ratio|x)\s*)?([0-9]+\.[0-9]*|\.[0-9]+)|(?:ratio|x)\s*([0-9]+)", text)
    if share is None or not 0 < float(share[1] or share[2]) <= 1:
        raise ConfigError(
            f"to is {to or '(empty)'}; it must be max (as many as the largest class), a whole number of images such as "
            "300, or a share of the largest class, above 0 and at most 1, such as 0.5"
        )
    return float(share[1] or share[2])


def parse_strength(strength: float | str) -> tuple[float, float]:
    """Lowest and highest strength that is drawn; a number is both. Raises ConfigError for anything outside [0, 1]."""
    low, dots, high = str(strength).partition("..")
    try:
        ends = float(low), float(high if dots else low)
    except ValueError:
        ends = nan, nan
    if not 0 <= ends[0] <= ends[1] <= 1:
        raise ConfigError(
            f"strength is {strength}; it must be from 0 (the image itself) to 1 (no trace of it), or a range such as "
            "0.3..0.6"
        )
    return ends
