"""Settings of `evaluate`. Light on purpose: the command line reads them before anything heavy is imported."""

from dataclasses import dataclass, field, replace

from m2d.data.settings import DataConfig
from m2d.errors import ConfigError
from m2d.evaluation.finetune_settings import FinetuneConfig
from m2d.evaluation.settings import FEWEST_RESAMPLES
from m2d.files.paths import input_path, result_path
from m2d.models.settings import FeatureExtractorConfig

PARTS = ("fidelity", "memorization", "downstream", "consistency")
CLASSIFIERS = ("logistic", "finetune")


def _independent_extractor() -> FeatureExtractorConfig:
    """Works offline, and guides no model by default."""
    return FeatureExtractorConfig(name="efficientnet-lite1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Is a synthetic set real enough, diverse enough, private enough, and does it help? Against which real images."""

    real: str | None = None  # class folders of real images: a path or a URI; its test split is unseen
    generated: str | None = None  # class folders of generated images; a run of `generate`, or any other
    train: str | None = None  # the real training images, where they lie apart; all of `real` is then unseen
    checkpoint: str | None = None  # of the generator: its split, VAE and extractor; None: where the images lie
    image_size: int | None = None  # pixels a side at which everything is compared; None: that of the generated images
    parts: str = ",".join(PARTS)  # which questions to answer
    feature_extractor: FeatureExtractorConfig | None = None  # None: the one that guided the checkpoint, else Lite0
    independent_extractor: FeatureExtractorConfig = field(default_factory=_independent_extractor)  # another one
    classifiers: str | None = None  # logistic, finetune or both; None: finetune only where there is a GPU
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    seeds: int = 3  # repetitions of each training in `downstream`
    c: float | None = None  # inverse strength of the logistic regression's penalty; None: chosen on training lesions
    ratios: str | None = None  # also tries these synthetic : real ratios, as in 0.5,1,2,5,10
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
        for name, known in (("parts", PARTS), ("classifiers", CLASSIFIERS)):
            asked = _words(getattr(self, name))
            unknown = [word for word in asked or () if word not in known]
            if unknown or asked == ():
                raise ConfigError(f"{name} is {getattr(self, name) or 'empty'}; choose some of {' '.join(known)}")
        for name, least in (("seeds", 1), ("bootstrap", FEWEST_RESAMPLES), ("seed", 0), ("num_actors", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.image_size is not None and self.image_size < 16:
            raise ConfigError(f"image_size is {self.image_size}; it must be at least 16")
        if self.c is not None and not 0 < self.c < float("inf"):
            raise ConfigError(f"c is {self.c}; it must be a number above 0")
        if any(not 0 < ratio <= 1000 for ratio in self.ratio_list):
            raise ConfigError(f"ratios is {self.ratios}; each must be above 0 and at most 1000")
        for name in ("cache_dir", "output"):
            folder = getattr(self, name)
            if folder is not None and (not folder or "://" in folder):
                raise ConfigError(f"{name} is {folder or 'empty'}; it must be a folder of this machine")

    def in_this_place(self) -> "EvaluateConfig":
        """The same with the paths of a job of Ray where they are found and outlive it: see m2d.files.paths.

        Raises ConfigError.
        """

        def extractor(name: str, config: FeatureExtractorConfig) -> FeatureExtractorConfig:
            return replace(config, weights=input_path(f"{name}.weights", config.weights))

        return replace(
            self,
            real=input_path("real", self.real),
            generated=input_path("generated", self.generated),
            train=input_path("train", self.train),
            checkpoint=input_path("checkpoint", self.checkpoint),
            cache_dir=result_path("cache_dir", self.cache_dir),
            output=result_path("output", self.output),
            feature_extractor=self.feature_extractor and extractor("feature_extractor", self.feature_extractor),
            independent_extractor=extractor("independent_extractor", self.independent_extractor),
            finetune=replace(self.finetune, weights=input_path("finetune.weights", self.finetune.weights)),
        )

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of PARTS those asked for, in their order."""
        asked = _words(self.parts) or ()
        return tuple(part for part in PARTS if part in asked)

    @property
    def ratio_list(self) -> tuple[float, ...]:
        """Ascending. Raises ConfigError for what is no number."""
        try:
            return tuple(sorted({float(word) for word in _words(self.ratios) or ()}))
        except ValueError:
            raise ConfigError(f"ratios is {self.ratios}; it must be numbers, as in 0.5,1,2,5,10") from None

    def classifier_names(self, *, gpu: bool) -> tuple[str, ...]:
        """Of CLASSIFIERS those to train."""
        asked = _words(self.classifiers)
        if asked is None:
            return CLASSIFIERS if gpu else ("logistic",)
        return tuple(name for name in CLASSIFIERS if name in asked)


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())
