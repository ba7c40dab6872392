"""Settings of the evaluation room. Light on purpose: the command line reads them before anything heavy is imported."""

from dataclasses import dataclass, field, replace

from m2d.data.settings import DataConfig
from m2d.errors import ConfigError
from m2d.files.paths import input_path, result_path
from m2d.models.settings import FeatureExtractorConfig

FEWEST_RESAMPLES = 100  # below, a 2.5th percentile is one of the two or three lowest resamples: noise


def _official_extractor() -> FeatureExtractorConfig:
    """The probe judges weights, so it shows images to the extractor as the extractor's authors do."""
    return FeatureExtractorConfig(crop="official")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A linear probe: which features, which images to fit on, which to test on."""

    data_root: str | None = None  # a folder of class folders: a path or a URI (s3://, gs://)
    train_catalog: str | None = None  # catalog.parquet to fit on; None: scan data_root, take its train and test split
    test_catalog: str | None = None  # another to test on, all rows of both; None: train and test split of train_catalog
    test_data_root: str | None = None  # where the images of test_catalog are; None: data_root
    feature_extractor: FeatureExtractorConfig = field(default_factory=_official_extractor)
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
        if self.c is not None and not 0 < self.c < float("inf"):
            raise ConfigError(f"c is {self.c}; it must be a number above 0")
        if self.bootstrap < FEWEST_RESAMPLES:
            raise ConfigError(f"bootstrap is {self.bootstrap}; it must be at least {FEWEST_RESAMPLES}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        for name in ("cache_dir", "output"):
            folder = getattr(self, name)
            if folder is not None and (not folder or "://" in folder):
                raise ConfigError(f"{name} is {folder or 'empty'}; it must be a folder of this machine")

    def in_this_place(self) -> "ProbeConfig":
        """The same with the paths of a job of Ray where they are found and outlive it: see m2d.files.paths.

        Raises ConfigError.
        """
        weights = input_path("feature_extractor.weights", self.feature_extractor.weights)
        return replace(
            self,
            data_root=input_path("data_root", self.data_root),
            train_catalog=input_path("train_catalog", self.train_catalog),
            test_catalog=input_path("test_catalog", self.test_catalog),
            test_data_root=input_path("test_data_root", self.test_data_root),
            cache_dir=result_path("cache_dir", self.cache_dir),
            feature_extractor=replace(self.feature_extractor, weights=weights),
        )
