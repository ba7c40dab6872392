"""Settings of the data room. Light on purpose: the command line reads them before anything heavy is imported."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal, Self
from urllib.parse import urlsplit

from m2d.classes import ISIC7, NAMED, named_class_set
from m2d.errors import require, require_range
from m2d.files.paths import absolute, input_path
from m2d.models.settings import FeatureExtractorConfig

Balance = Literal["natural", "sqrt", "balanced"]

PUBLIC_API = "https://api.isic-archive.com/api/v2"
COLLECTIONS = {  # numbers as `isic collection list` prints them
    "ham10000": 212,  # 11,720 images: training, validation and test images of ISIC 2018 task 3 together
    "isic2018-task3": 66,  # its 10,015 training images, which are what the HAM10000 paper counts
}
SKIP = "skip"  # in place of a class code: leave such images out


def collection_number(collection: int | str) -> int | None:
    """The collection's number in the archive: of a known name, or the number itself; None for anything else."""
    number = COLLECTIONS.get(str(collection), collection)
    return int(number) if re.fullmatch(r"[0-9]{1,9}", str(number)) else None


def require_seed(name: str, seed: int, highest: int = 2**64 - 1) -> None:
    """Raise ConfigError for a seed that a generator would refuse in the middle of a run."""
    require(0 <= seed <= highest, f"{name} is {seed}; it must be a whole number from 0 to {highest}")


def is_web_address(url: str) -> bool:
    """Whether this is an http or https URL with a host and without a name or password in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images are found, split, decoded and ordered."""

    image_size: int = 64  # pixels a side, after centre crop
    balance: Balance = "sqrt"  # class weights: count^1, count^0.5, count^0
    views: Literal[1, 4, 8] = 8  # 1: as is; 4: flips and the half turn; 8: also the quarter turns
    val_fraction: float = 0.1  # of lesions
    test_fraction: float = 0.1  # of lesions; never trained on, kept for evaluation
    split_seed: int = 0  # another seed, other lesions in each split
    classes: str | None = None  # isic7, isic8, milk11, binary, folders or FILE.yaml; null: the first that fits
    class_map: dict[str, str] = field(default_factory=dict)  # folder name or diagnosis -> class code
    table: str | None = None  # CSV file of labels, lesions or splits; null: those found below data_root
    columns: dict[str, str] = field(default_factory=dict)  # of data.table: image, label, lesion, split -> column name
    drop: str | None = None  # diagnoses to leave out, separated by commas
    clinical: bool = False  # take clinical photographs too, where a dataset has both kinds
    group_near_duplicates: bool = False  # images that look the same count as one lesion, on one side of the split
    split: Literal["published", "seeded"] = "published"  # keep a dataset's own split, or draw all of it
    max_pixels: int = 100_000_000  # larger images are rejected (decompression bombs)
    object_store_share: float = 0.3  # encoded bytes stay in Ray's object store while they fit this share of it
    read_cpus: float = 1.0  # logical CPUs a decoding task asks of Ray

    def __post_init__(self) -> None:
        require_seed("data.split_seed", self.split_seed)
        fractions = (self.val_fraction, self.test_fraction)
        sets = [] if self.classes == "folders" else [named_class_set(self.classes)] if self.classes else NAMED.values()
        codes = list(dict.fromkeys(code for one in sets for code in one.codes))
        roles = ("image", "label", "lesion", "split")
        for name, sound, wanted in (
            ("image_size", self.image_size >= 16 and self.image_size % 8 == 0, "a multiple of 8, at least 16"),
            ("val_fraction", 0 <= self.val_fraction < 1, "at least 0 and below 1"),
            ("test_fraction", 0 <= self.test_fraction < 1, "at least 0 and below 1"),
            ("val_fraction", sum(fractions) < 1, "so small that with data.test_fraction it leaves some to train on"),
            ("class_map", not codes or {*self.class_map.values()} <= {*codes}, f"a map to some of {' '.join(codes)}"),
            ("columns", {*self.columns} <= {*roles}, f"a map of some of {' '.join(roles)}"),
            ("columns", not self.columns or self.table is not None, "empty, for data.table is not set"),
            ("max_pixels", self.max_pixels >= 1, "at least 1"),
            ("object_store_share", 0 < self.object_store_share <= 0.8, "in (0, 0.8]"),
            ("read_cpus", self.read_cpus > 0, "above 0"),
        ):
            require(sound, f"data.{name} is {getattr(self, name)}; it must be {wanted}")

    def in_this_place(self) -> Self:
        """The same with its files where a job of Ray finds them, absolute: see m2d.files.paths. Raises ConfigError."""
        own_classes = None if self.classes in (None, "folders", *NAMED) else self.classes
        return replace(
            self,
            table=absolute(input_path("data.table", self.table)),
            classes=absolute(input_path("data.classes", own_classes)) or self.classes,
        )


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What is fetched from the ISIC archive's public API before the scan, and how patiently."""

    enabled: bool = False  # fetch into data_root the images that it lacks; run again to resume
    collection: int | str = "ham10000"  # ham10000, isic2018-task3, or a collection's number in the archive
    limit: int | None = None  # images at most, in the archive's order; null: all
    diagnoses: dict[str, str] = field(default_factory=dict)  # diagnosis in the archive's words -> class code, or skip
    fresh_listing: bool = False  # ask the archive again what the collection holds; the images are kept
    connections: int = 8  # files fetched at the same time
    retries: int = 5  # further attempts after a dropped connection, HTTP 429 or 5xx
    timeout_s: float = 30.0  # silence after which a connection counts as dropped
    api: str = PUBLIC_API  # address of the API; another one for a mirror

    def __post_init__(self) -> None:
        known, codes = collection_number(self.collection) is not None, ISIC7.codes
        for name, sound, wanted in (
            ("collection", known, f"one of {' '.join(COLLECTIONS)} or a number"),
            ("limit", self.limit is None or self.limit >= 1, "at least 1, or null for all"),
            ("diagnoses", {*self.diagnoses.values()} <= {*codes, SKIP}, f"a map to {' '.join(codes)} or {SKIP}"),
            ("connections", 1 <= self.connections <= 64, "from 1 to 64"),
            ("retries", 0 <= self.retries <= 100, "from 0 to 100"),
            ("timeout_s", 0 < self.timeout_s <= 3600, "above 0 and at most 3600"),
            ("api", is_web_address(self.api) and "?" not in self.api, "a plain http or https address"),
        ):
            require(sound, f"download.{name} is {getattr(self, name)}; it must be {wanted}")


@dataclass(frozen=True, kw_only=True)
class SetupConfig:
    """The one-time work on a dataset. Settings that training has too mean the same, so a preset fits both."""

    data_root: str | None = None  # the dataset's folder, in any published layout: a path or a URI (s3://, gs://)
    import_from: str | None = None  # Parquet files or WebDataset shards, unpacked once into data_root
    cache_dir: str = "./cache"  # where prepared data is kept; a path on a disk that every node sees
    all: bool = False  # scan, images and features
    scan: bool = False  # check every image and write the catalog, where files or settings changed since the last time
    images: bool = False  # keep every image decoded at data.image_size
    features: bool = False  # keep the extractor's features of every image in every view
    num_actors: int | None = None  # extractors; 0: in this process; null: one a GPU, else one a core up to 8 a node
    extract_batch_size: int | None = None  # images an extractor takes at once; null: 128 on a GPU, 16 on a CPU
    shard_images: int = 256  # images, or features of one view, a file; a killed run loses the files in the making
    verbose: bool = False  # show Ray's own bars and messages
    data: DataConfig = field(default_factory=DataConfig)
    feature_extractor: FeatureExtractorConfig = field(default_factory=FeatureExtractorConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)

    def __post_init__(self) -> None:
        require_range(self, "", 0, "num_actors")
        require_range(self, "", 1, "extract_batch_size", "shard_images")

    @property
    def stages(self) -> frozenset[str]:
        """Of scan, images and features those asked for. Raises ConfigError where nothing was asked for."""
        names = ("scan", "images", "features")
        asked = frozenset(name for name in names if self.all or getattr(self, name))
        require(
            asked or self.download.enabled or self.import_from is not None,
            "nothing to do; give --all, or some of --download --import_from --scan --images --features",
        )
        return asked
