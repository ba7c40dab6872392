"""Settings of a training run. Light on purpose: the command line reads them before torch is imported."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from m2d.data.settings import DataConfig, require_seed
from m2d.diffusion.settings import TimeDensity
from m2d.errors import ConfigError, require, require_range
from m2d.files.paths import absolute, checkpoint_folder, input_path, require_outside, result_path
from m2d.models.published import checkpoint_path
from m2d.models.settings import (
    MIDDLE,
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

LONGEST_NAME = 200  # characters: of a folder's 255 bytes the date takes 16, and its removal and a sweep's past more


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the joint objective. The first four are the ones that a sweep searches.

    At weight 0 `alignment_vae` is not computed; the others are, and are logged.
    """

    diffusion: float = 1.0  # velocity error, on the U-Net alone
    reconstruction: float = 0.5  # mean absolute error of the VAE's images
    alignment: float = 0.3  # on the U-Net; the VAE's share is `alignment_vae`
    perceptual: float = 0.2  # distance of the VAE's images, LPIPS or the extractor's
    alignment_vae: float = 0.1  # on the VAE, through the frozen U-Net
    manifold: float = 3.0  # times `alignment`: U-REPA's w
    kl: float = 1e-6  # of the sum over a latent, as in REPA-E
    adversarial: float = 0.1  # on the VAE, where discriminator.enabled; a projected one needs some 0.8: it is adaptive

    def __post_init__(self) -> None:
        require_range(self, "loss_weights.", 0, *vars(self))


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How the U-Net is aligned with the extractor's patch features. How strongly: loss_weights."""

    tap: str = MIDDLE  # the U-Net block that is aligned: middle, or down_K or up_K (K from 0, in the order of the pass)
    spatial_norm: float = 0.0  # iREPA's gamma: this share of their mean is taken off the target patches; 0: as they are
    stop_fraction: float = 1.0  # of the run's steps, after which the alignment ends (HASTE); 1: it never does

    def __post_init__(self) -> None:
        parse_tap(self.tap)
        require_range(self, "alignment.", 0, "spatial_norm", "stop_fraction", high=1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for each network. The learning rate follows from the step alone, so resuming needs no scheduler state."""

    lr_autoencoder: float = 1e-4  # peak learning rate
    lr_denoiser: float = 1e-4  # of the U-Net, the conditioning and the projector
    lr_discriminator: float = 1e-4  # where discriminator.enabled
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rates, after their warm-up
    final_fraction: float = 0.05  # of the peak rate, where cosine ends
    warmup_steps: int = 100  # linear, counted from the step at which the network starts to learn
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW's
    weight_decay: float = 0.0  # AdamW's
    clip_norm: float = 1.0  # of each network's gradient

    def __post_init__(self) -> None:
        require_range(self, "optimizer.", 0, "lr_autoencoder", "lr_denoiser", "lr_discriminator", above=True)
        require(self.clip_norm > 0, f"optimizer.clip_norm is {self.clip_norm}; it must be above 0")  # may be infinite
        require_range(self, "optimizer.", 0, "warmup_steps")
        require_range(self, "optimizer.", 0, "final_fraction", high=1)
        require(len(self.betas) == 2, f"optimizer.betas is {self.betas}; give two numbers")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What happens when, in steps, and at which times t of the path the U-Net learns."""

    times: TimeDensity = "uniform"  # density of t in training; logit_normal: most of it halfway to the noise, as in SD3
    time_shift: float = 1.0  # above 1: t nearer to the noise, here and in what is generated, for larger latents; 1: off
    vae_warmup_fraction: float = 0.0  # of the run's steps, in which the VAE learns alone before the U-Net joins
    ema_decay: float = 0.9999  # of the averaged weights that generation uses, a step
    ema_warmup: float = 10.0  # decay at step n is at most (1 + n) / (ema_warmup + n)
    ema_on_cpu: bool = False  # keep the averages in host memory: less on the GPU, a copy and a wait a step
    vae_every_k_steps: int = 1  # joint stage: train the VAE, most of a step's cost, in each k-th step after warm-up
    log_every_steps: int = 10  # scalars to metrics/ and wandb
    max_skipped_in_row: int = 50  # non-finite steps one after the other, before the run ends with an error

    def __post_init__(self) -> None:
        require_range(self, "schedule.", 0, "time_shift", above=True)
        require_range(self, "schedule.", 0, "vae_warmup_fraction", high=1)
        require_range(self, "schedule.", 0, "ema_decay", high=1, below=True)
        require_range(self, "schedule.", 1, "ema_warmup", "log_every_steps", "vae_every_k_steps", "max_skipped_in_row")


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """Checkpoints and validation. A checkpoint is also written at the end of the run."""

    every_steps: int | None = None  # None: at the end of every epoch
    keep_last: int = 2  # besides the best one
    validation_images: int = 256  # the same ones each time
    validation_samples: int = 0  # generated ones whose kernel distance to validation images is measured; 0: none

    def __post_init__(self) -> None:
        require_range(self, "saving.", 1, "every_steps", "keep_last", "validation_images")
        require_range(self, "saving.", 0, "validation_samples")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What a run shows of itself besides its scalars. Nothing here changes what is computed."""

    reconstructions_every_epochs: int = 1  # pictures of validation images beside their reconstructions; 0: at the end
    samples_every_epochs: int = 5  # a labelled grid of all classes from the averaged U-Net; 0: at the end
    features_every_epochs: int = 5  # what the extractor sees in real and generated images; 0: at the end
    gradients_every_steps: int = 100  # gradient norm of every part and a histogram; 0: never
    images: int = 8  # validation images in a picture, the same ones each time
    samples_per_class: int = 4  # in the grid, from the same seeds each time
    sample_steps: int = 20  # of the solver
    guidance_scale: float = 2.0  # of the samples
    pictures: bool = True  # false: none at all
    tensorboard: bool = False  # TensorBoard files too, in the experiment's tensorboard/
    upload_best: bool = False  # the best checkpoint goes to wandb as an artifact when the run ends
    finish_timeout_s: float = 120.0  # how long the end of a run waits for wandb to send what is left

    def __post_init__(self) -> None:
        every = [name for name in vars(self) if "_every_" in name]
        require_range(self, "telemetry.", 0, *every)
        require_range(self, "telemetry.", 1, "images", "samples_per_class", "sample_steps")
        require_range(self, "telemetry.", 0, "guidance_scale", "finish_timeout_s", above=True)


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """What a training worker asks of the Ray cluster."""

    cpus_per_worker: float = 1.0  # logical ones, a budget and no limit
    max_failures: int = 3  # times a lost worker group is started again from the newest checkpoint
    threads_per_worker: int | None = None  # torch threads on a CPU worker; None: cores / workers
    collective_timeout_s: float = 1800.0  # after which workers that wait for one another end with an error
    wait_for_nodes_s: float = 0.0  # for an autoscaler to bring a GPU for each worker; 0: count what is up
    resize_check_s: float = 600.0  # elastic runs: how often to look for room for more workers; growing costs a restart

    def __post_init__(self) -> None:
        require_range(self, "ray.", 0, "collective_timeout_s", "resize_check_s", "cpus_per_worker", above=True)
        require_range(self, "ray.", 0, "wait_for_nodes_s")
        require_range(self, "ray.", -1, "max_failures")  # -1: without limit


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
        require_range(self, "", 1, "epochs", "batch_size", "gradient_accumulation_steps", "max_steps")
        require_seed("seed", self.seed)
        parse_num_workers(self.num_workers)
        require(
            re.fullmatch(rf"\w[\w.-]{{0,{LONGEST_NAME - 1}}}", self.name, flags=re.ASCII) is not None,
            f"name is {self.name[:300]!r}; use up to {LONGEST_NAME} letters, digits, '.', '_' and '-', and begin with "
            "none of '.' and '-'",
        )
        linear = self.autoencoder.kind == "linear" and self.autoencoder.pretrained is None
        require(
            not linear or self.stage == "latent",
            f"autoencoder.kind linear has nothing that stage {self.stage} could train; use --stage latent",
        )
        if self.init_checkpoint is None and not self.dry_run:
            require(
                self.stage != "latent" or linear or self.autoencoder.pretrained is not None,
                "stage latent trains on a frozen VAE; name an earlier run's checkpoint by --init_checkpoint, a "
                "published VAE by --autoencoder.pretrained, or take --autoencoder.kind linear",
            )
            require(
                self.stage != "decoder",
                "stage decoder keeps encoder and U-Net; name an earlier run's checkpoint by --init_checkpoint",
            )
        levels, size, discriminator = len(self.unet.block_channels), self.data.image_size, self.discriminator
        if self.autoencoder.pretrained is None:
            down, halvings = self.autoencoder.downsampling, 2 ** (levels - 1)
            latent = size // down
            require(
                not (size % down or latent % halvings),
                f"data.image_size {size} gives latents of {latent} x {latent}, which {levels} U-Net levels cannot "
                f"halve evenly; use an image size that is a multiple of {down * halvings}",
            )
        require(
            parse_tap(self.alignment.tap)[1] < levels,
            f"alignment.tap is {self.alignment.tap}; the U-Net has {levels} blocks each way, numbered from 0",
        )
        projected, smallest = discriminator.kind == "projected", 3 * 2**discriminator.layers
        require(
            not discriminator.enabled or projected or size >= smallest,
            f"data.image_size {size} is too small for discriminator.layers {discriminator.layers}, which need "
            f"{smallest} pixels; use fewer layers",
        )

    @property
    def workers(self) -> tuple[int, int]:
        """(fewest, most) training processes; the same number twice but for an elastic run."""
        return parse_num_workers(self.num_workers)

    @property
    def checked_data_root(self) -> str:
        """data_root, or ConfigError where it was not given or is no folder of this machine."""
        if (root := self.data_root) is None:
            raise ConfigError("data_root is not set; name the folder that holds the class folders by --data_root")
        found = "://" in root or Path(root).expanduser().is_dir()
        require(found, f"data_root: {root} is not a folder; name the one that holds the class folders")
        return root


def parse_num_workers(value: int | str) -> tuple[int, int]:
    """(fewest, most) workers of `4`, or of the elastic `2-8`. Raises ConfigError for anything else."""
    matched = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(value))
    if matched is not None and matched[2] is None:
        return int(matched[1]), int(matched[1])
    if matched is None or not 1 <= int(matched[1]) <= int(matched[2]):
        raise ConfigError(f"num_workers is {value}; it must be a number (0: this process) or a range such as 2-8")
    return int(matched[1]), int(matched[2])


TrainConfigT = TypeVar("TrainConfigT", bound=TrainConfig)  # a sweep's settings are a run's and more

# What divides a step among workers and micro-batches.
DIVISION = frozenset(["num_workers", "batch_size", "gradient_accumulation_steps"])

# What may differ between a run and its resumption: where it runs and how it talks, never what it computes.
RESUMABLE_CHANGES = frozenset(
    [
        *("dry_run", "fresh", "use_wandb", "wandb_project", "wandb_group", "wandb_mode", "verbose", "telemetry"),
        *("experiments_dir", "cache_dir", "ray", "data_root", "compile", "compile_mode", "channels_last"),
        *("autoencoder.gradient_checkpointing", "unet.gradient_checkpointing", "schedule.ema_on_cpu"),
    ]
)


def with_absolute_paths(config: TrainConfigT) -> TrainConfigT:
    """The same run with its local paths absolute: workers and trials may start in another directory. URIs stay.

    Raises ConfigError for a path that cannot mean in a job of Ray what it says: see m2d.files.paths.
    """
    weights = input_path("feature_extractor.weights", config.feature_extractor.weights)
    data_root = absolute(input_path("data_root", config.data_root))
    experiments_dir = absolute(result_path("experiments_dir", config.experiments_dir))
    cache_dir = absolute(input_path("cache_dir", config.cache_dir, required=False))
    require_outside(data_root, experiments_dir=experiments_dir, cache_dir=cache_dir)
    return dataclasses.replace(
        config,
        data_root=data_root,
        experiments_dir=experiments_dir,
        init_checkpoint=absolute(checkpoint_folder(checkpoint_path("init_checkpoint", config.init_checkpoint))),
        cache_dir=cache_dir,
        feature_extractor=dataclasses.replace(config.feature_extractor, weights=absolute(weights)),
        data=config.data.in_this_place(),
    )


as_dict = dataclasses.asdict  # a config as plain values, for YAML


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
        before, after, default = old.get(key, defaults.get(key)), new.get(key), defaults.get(key)
        if prefix + key in ignored or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed += differences(before, after, f"{prefix}{key}.", default if isinstance(default, dict) else {})
        else:
            changed.append(f"{prefix}{key}: {before} -> {after if key in new else 'not a setting of this M2D'}")
    return changed


def _global_batch(settings: dict[str, Any]) -> int:
    """Images an optimiser step."""
    most = parse_num_workers(settings["num_workers"])[1]
    return int(settings["batch_size"] * settings["gradient_accumulation_steps"] * max(most, 1))
