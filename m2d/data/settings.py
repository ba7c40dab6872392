"""Settings of the data room. Light on purpose: the command line reads them before anything heavy is imported."""

from dataclasses import dataclass, field
from typing import Literal

from m2d.classes import CLASSES
from m2d.errors import ConfigError

Balance = Literal["natural", "sqrt", "balanced"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images are found, split, decoded and ordered."""

    image_size: int = 64  # pixels a side, after centre crop
    balance: Balance = "sqrt"  # class weights: count^1, count^0.5, count^0
    views: Literal[1, 4, 8] = 8  # 1: as is; 4: flips and the half turn; 8: also the quarter turns
    val_fraction: float = 0.1  # of lesions
    test_fraction: float = 0.1  # of lesions; never trained on, kept for evaluation
    split_seed: int = 0  # another seed, other lesions in each split
    class_map: dict[str, str] = field(default_factory=dict)  # folder name -> class code
    max_pixels: int = 100_000_000  # larger images are rejected (decompression bombs)
    object_store_share: float = 0.3  # encoded bytes stay in Ray's object store while they fit this share of it
    read_cpus: float = 1.0  # logical CPUs a decoding task asks of Ray

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 8:
            raise ConfigError(f"data.image_size is {self.image_size}; it must be a multiple of 8, at least 16")
        for name in ("val_fraction", "test_fraction"):
            fraction = getattr(self, name)
            if not 0 <= fraction < 1:
                raise ConfigError(f"data.{name} is {fraction}; it must be at least 0 and below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise ConfigError("data.val_fraction + data.test_fraction leave nothing to train on; lower one of them")
        for folder, code in self.class_map.items():
            if code not in CLASSES:
                raise ConfigError(f"data.class_map maps {folder} to {code}; known classes: {' '.join(CLASSES)}")
        if self.max_pixels < 1:
            raise ConfigError(f"data.max_pixels is {self.max_pixels}; it must be at least 1")
        if not 0 < self.object_store_share <= 0.8:
            raise ConfigError(f"data.object_store_share is {self.object_store_share}; it must be in (0, 0.8]")
        if self.read_cpus <= 0:
            raise ConfigError(f"data.read_cpus is {self.read_cpus}; it must be above 0")
