"""The typed configuration of a training run. It only nests what each room owns; nothing heavy is imported here."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from m2d.data.settings import DataConfig
from m2d.errors import ConfigError
from m2d.files.paths import absolute, input_path, result_path
from m2d.models.settings import (
    AutoencoderConfig,
    ConditioningConfig,
    DiscriminatorConfig,
    FeatureExtractorConfig,
    PerceptualConfig,
    Precision,
    ProjectorConfig,
    UNetConfig,
    parse_tap,
)
from m2d.training.settings import (
    AlignmentConfig,
    LossWeights,
    OptimizerConfig,
    RayConfig,
    SavingConfig,
    ScheduleConfig,
    TelemetryConfig,
)

PRESETS_DIR = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The flags that people know stand at the top; the rest belongs to its room."""

    data_root: str | None = None  # a folder of class folders: a path or a URI (s3://, gs://)
    experiments_dir: str = "./experiments"  # a path that all nodes see; a URI only where one machine does all the work
    cache_dir: str = "./cache"  # what setup_data prepared; read where it is there. A path that every node sees
    name: str = "m2d"  # of the experiment; its directory is NAME_YYYYMMDD_HHMMSS
    seed: int = 0  # of weights, order, noise and dropout; the split has data.split_seed
    stage: Literal["joint", "latent", "decoder"] = "joint"  # latent: the U-Net alone; decoder: the VAE's decoder alone
    init_checkpoint: str | None = None  # networks to start from; stages latent and decoder need one, or a published VAE
    epochs: int = 100  # passes over the training split
    max_steps: int | None = None  # optimiser steps; ends the run before its epochs do
    batch_size: int = 32  # images a worker and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches an optimiser step
    num_workers: int | str = 1  # 0: train in the calling process, for a debugger; "2-8": as many as there is room for
    mixed_precision: Precision | None = None  # None: bf16 on a GPU that has it, otherwise no
    compile: bool = False  # torch.compile of VAE and U-Net
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"  # reduce-overhead: CUDA graphs
    channels_last: bool = True  # memory layout of the networks; usually the faster one
    dry_run: bool = False  # print memory, time and disk that the run will need, from fake tensors; train nothing
    fresh: bool = False  # start a new experiment although an unfinished one of this name exists
    use_wandb: bool = False  # besides the JSON lines and CSV that are always written
    wandb_project: str = "m2d"  # where the run appears on wandb
    wandb_group: str | None = None  # runs that wandb shows together; a sweep sets it for its trials
    wandb_mode: Literal["online", "offline", "disabled"] = "online"  # offline: `wandb sync` sends it later
    verbose: bool = False  # show Ray's own bars and messages
    data: DataConfig = field(default_factory=DataConfig)
    feature_extractor: FeatureExtractorConfig = field(default_factory=FeatureExtractorConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps is {self.max_steps}; it must be at least 1")
        parse_num_workers(self.num_workers)
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if not re.fullmatch(r"[\w.-]+", self.name, flags=re.ASCII):
            raise ConfigError(f"name is {self.name!r}; use letters, digits, '.', '_' and '-'")
        begins = self.init_checkpoint is not None or self.dry_run
        if self.stage == "latent" and not begins and self.autoencoder.pretrained is None:
            raise ConfigError(
                "stage latent trains on a frozen VAE; name an earlier run's checkpoint by --init_checkpoint, or a "
                "published VAE by --autoencoder.pretrained"
            )
        if self.stage == "decoder" and not begins:
            raise ConfigError(
                "stage decoder keeps encoder and U-Net as they are; name an earlier run's checkpoint by "
                "--init_checkpoint"
            )
        if self.autoencoder.pretrained is None:
            self._check_sizes()
        levels = len(self.unet.block_channels)
        if parse_tap(self.alignment.tap)[1] >= levels:
            raise ConfigError(
                f"alignment.tap is {self.alignment.tap}; the U-Net has {levels} blocks each way, numbered from 0"
            )
        smallest = 3 * 2**self.discriminator.layers
        if self.discriminator.enabled and self.data.image_size < smallest:
            raise ConfigError(
                f"data.image_size {self.data.image_size} is too small for discriminator.layers "
                f"{self.discriminator.layers}, which need {smallest} pixels; use fewer layers"
            )

    def _check_sizes(self) -> None:
        size, down = self.data.image_size, self.autoencoder.downsampling
        latent, levels = size // down, 2 ** (len(self.unet.block_channels) - 1)
        if size % down or latent % levels:
            raise ConfigError(
                f"data.image_size {size} gives latents of {latent} x {latent}, which {len(self.unet.block_channels)} "
                f"U-Net levels cannot halve evenly; use an image size that divides by {down * levels}"
            )

    @property
    def workers(self) -> tuple[int, int]:
        """(fewest, most) training processes; the same number twice but for an elastic run."""
        return parse_num_workers(self.num_workers)

    @property
    def checked_data_root(self) -> str:
        """data_root, or ConfigError where it was not given or is no folder of this machine."""
        if self.data_root is None:
            raise ConfigError("data_root is not set; name the folder that holds the class folders by --data_root")
        if "://" not in self.data_root and not Path(self.data_root).expanduser().is_dir():
            raise ConfigError(f"data_root: {self.data_root} is not a folder; name the one that holds the class folders")
        return self.data_root


def parse_num_workers(value: int | str) -> tuple[int, int]:
    """(fewest, most) workers of `4`, or of the elastic `2-8`. Raises ConfigError for anything else."""
    matched = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(value))
    if matched is None:
        raise ConfigError(f"num_workers is {value}; it must be a number (0: this process) or a range such as 2-8")
    fewest = int(matched[1])
    most = fewest if matched[2] is None else int(matched[2])
    if matched[2] is not None and not 1 <= fewest <= most:
        raise ConfigError(f"num_workers is {value}; a range begins at 1 or more and ends where it began or above")
    return fewest, most


TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)  # a sweep's settings are a run's and more

# What divides a step among workers and micro-batches.
DIVISION = frozenset(["num_workers", "batch_size", "gradient_accumulation_steps"])

# What may differ between a run and its resumption: where it runs and how it talks, never what it computes.
RESUMABLE_CHANGES = frozenset(
    [
        "dry_run",
        "fresh",
        "use_wandb",
        "wandb_project",
        "wandb_group",
        "wandb_mode",
        "verbose",
        "telemetry",
        "experiments_dir",
        "cache_dir",
        "ray",
        "data_root",
        "compile",
        "compile_mode",
        "channels_last",
        "autoencoder.gradient_checkpointing",
        "unet.gradient_checkpointing",
        "schedule.ema_on_cpu",
    ]
)


def with_absolute_paths(config: TrainConfigT) -> TrainConfigT:
    """The same run with its local paths absolute: workers and trials may start in another directory. URIs stay.

    Raises ConfigError for a path that cannot mean in a job of Ray what it says: see m2d.files.paths.
    """
    weights = input_path("feature_extractor.weights", config.feature_extractor.weights)
    return dataclasses.replace(
        config,
        data_root=absolute(input_path("data_root", config.data_root)),
        experiments_dir=absolute(result_path("experiments_dir", config.experiments_dir)),
        init_checkpoint=absolute(input_path("init_checkpoint", config.init_checkpoint)),
        cache_dir=absolute(input_path("cache_dir", config.cache_dir, required=False)),
        feature_extractor=dataclasses.replace(config.feature_extractor, weights=absolute(weights)),
    )


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, for YAML."""
    values: dict[str, Any] = dataclasses.asdict(config)
    return values


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", defaults: dict[str, Any] | None = None
) -> list[str]:
    """`key: old -> new` for every value that differs and matters to the run's result.

    A setting that `old` lacks, since it is from before there was one, has the default value.
    """
    changed = []
    defaults = as_dict(TrainConfig()) if defaults is None else defaults
    ignored = RESUMABLE_CHANGES
    if not prefix and _global_batch({**defaults, **old}) == _global_batch({**defaults, **new}):
        ignored = ignored | DIVISION  # the same steps, of the same images, with the same noise
    for key in sorted(old.keys() | new.keys()):
        if prefix + key in ignored:
            continue
        before, after = old.get(key, defaults.get(key)), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            within = defaults.get(key)
            changed += differences(before, after, f"{prefix}{key}.", within if isinstance(within, dict) else {})
        elif before != after:
            changed.append(f"{prefix}{key}: {before} -> {after}")
    return changed


def _global_batch(settings: dict[str, Any]) -> Any:
    """Images an optimiser step; None where the settings are none that a run could have."""
    try:
        most = parse_num_workers(settings["num_workers"])[1]
    except ConfigError:
        return None
    return settings["batch_size"] * settings["gradient_accumulation_steps"] * max(most, 1)


def preset_path(name: str) -> Path:
    """The YAML of a preset. Raises ConfigError that lists the known ones."""
    path = PRESETS_DIR / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"preset {name} is not known; choose from {' '.join(preset_names())}")
    return path


def preset_files(name: str) -> list[Path]:
    """The files whose settings a preset is, later ones over earlier: isic-256-latent lies over isic-256."""
    below = [base for base in preset_names() if name.startswith(f"{base}-")]
    return [*map(preset_path, below), preset_path(name)]


def preset_names() -> list[str]:
    """The presets that come with M2D."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
