"""Settings of a generation run. Light on purpose: the command line reads them before torch is imported."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from m2d.classes import CLASSES
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import ConfigError

Precision = Literal["no", "bf16", "fp16"]
Feature = Literal["prior", "none"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingSettings):
    """Which images to make, from which checkpoint, and where they go."""

    checkpoint: str  # a checkpoint directory
    output: str | None = None  # None: generated_images/<hash of the settings> in the checkpoint's experiment
    classes: str | None = None  # comma-separated codes, any letter case; None: all seven
    num_samples: int = 8  # per class
    seed: int = 0  # of the run; every image has its own, made from this, its class and its index
    feature: Feature | None = None  # drawn from the checkpoint's prior, or the class alone; None: prior if it has one
    feature_temperature: float = 1.0  # spread of the drawn features; 0: the class mean for every image
    batch_size: int = 32  # images at once; does not change them
    device: str | None = None  # None: cuda where there is one, otherwise cpu
    mixed_precision: Precision | None = None  # None: bf16 on a GPU that has it, otherwise no

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ConfigError("checkpoint is empty; name a checkpoint directory")
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if self.mixed_precision not in (None, *get_args(Precision)):
            raise ConfigError(f"mixed_precision is {self.mixed_precision}; known: {' '.join(get_args(Precision))}")
        if self.feature not in (None, *get_args(Feature)):
            raise ConfigError(f"feature is {self.feature}; known: {' '.join(get_args(Feature))}")
        if not (isfinite(self.feature_temperature) and self.feature_temperature >= 0):
            raise ConfigError(
                f"feature_temperature is {self.feature_temperature}; it must be a number of at least 0 "
                "(1: spread as the training features)"
            )
        _ = self.class_codes  # a wrong class is reported before anything is loaded

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
