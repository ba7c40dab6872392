"""Settings of the export command. Light on purpose: the command line reads them before torch is imported."""

from dataclasses import dataclass
from typing import Literal

from m2d.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is shared of a checkpoint, and where it goes."""

    checkpoint: str  # a checkpoint directory, a name in weights/, hub:USER/NAME; or a folder of generated images
    to: str  # a new folder, or hub:USER/NAME
    ema_length: float | None = None  # of the average over the steps, in parts of the training; None: as it was trained
    dtype: Literal["fp16", "fp32"] = "fp16"  # of the networks' weights in the files; loading widens them
    title: str | None = None  # of the model card; None: the experiment's or the folder's name
    data_license: str | None = None  # of the training images, as the model card states it, such as CC-BY-NC-4.0
    evaluation: str | None = None  # an evaluation.json; None: the newest in the experiment of this checkpoint's images
    samples: int = 0  # images of each class on a grid, samples.png; 0: none
    seed: int = 0  # of the samples
    private: bool = False  # a repository that is made is for its owner alone
    dry_run: bool = False  # say which files would be sent to the hub, and stop

    def __post_init__(self) -> None:
        for name in ("checkpoint", "to"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; name a folder, or hub:USER/NAME")
        if self.dry_run and not self.to.startswith("hub:"):
            raise ConfigError(f"dry_run lists what would be sent to the hub, and to is the folder {self.to}; drop one")
        if self.dtype not in ("fp16", "fp32"):
            raise ConfigError(f"dtype is {self.dtype}; known: fp16 fp32")
        if self.ema_length is not None and not 0.01 <= self.ema_length <= 0.25:
            raise ConfigError(f"ema_length is {self.ema_length}; it must be from 0.01 to 0.25, parts of the training")
        if not 0 <= self.samples <= 32:
            raise ConfigError(f"samples is {self.samples}; it must be from 0 to 32")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
