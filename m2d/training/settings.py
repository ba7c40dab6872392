"""Settings of the training room. Light on purpose: the command line reads them before torch is imported."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from m2d.errors import ConfigError
from m2d.models.settings import MIDDLE, parse_tap
from m2d.models.settings import Precision as Precision  # until step.py asks there


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the joint objective. The first four are the ones that a sweep searches."""

    diffusion: float = 1.0  # velocity error, on the U-Net alone
    reconstruction: float = 0.5  # mean absolute error of the VAE's images
    alignment: float = 0.3  # on the U-Net; the VAE's share is `alignment_vae`
    perceptual: float = 0.2  # distance of the VAE's images, LPIPS or the extractor's
    alignment_vae: float = 0.1  # on the VAE, through the frozen U-Net
    manifold: float = 3.0  # times `alignment`: U-REPA's w
    kl: float = 1e-6  # of the sum over a latent, as in REPA-E
    adversarial: float = 0.1  # on the VAE, where discriminator.enabled

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            _require(
                isfinite(weight) and weight >= 0, f"loss_weights.{name} is {weight}; it must be a number of at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How the U-Net is aligned with the extractor's patch features. How strongly: loss_weights."""

    tap: str = MIDDLE  # the U-Net block that is aligned: middle, or down_K or up_K (K from 0, in the order of the pass)
    spatial_norm: float = 0.0  # iREPA's gamma: this share of their mean is taken off the target patches; 0: as they are
    stop_fraction: float = 1.0  # of the run's steps, after which the alignment ends (HASTE); 1: it never does

    def __post_init__(self) -> None:
        parse_tap(self.tap)
        _require(
            0 <= self.spatial_norm <= 1,
            f"alignment.spatial_norm is {self.spatial_norm}; it must be in [0, 1] (iREPA uses 0.6 to 0.8)",
        )
        _require(
            0 <= self.stop_fraction <= 1,
            f"alignment.stop_fraction is {self.stop_fraction}; it must be in [0, 1]",
        )


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
        for name in ("lr_autoencoder", "lr_denoiser", "lr_discriminator"):
            rate = getattr(self, name)
            _require(isfinite(rate) and rate > 0, f"optimizer.{name} is {rate}; it must be above 0")
        _require(len(self.betas) == 2, f"optimizer.betas is {self.betas}; give two numbers")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; it must be at least 0")
        _require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction is {self.final_fraction}; it is a fraction")
        _require(self.clip_norm > 0, f"optimizer.clip_norm is {self.clip_norm}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What happens when, in steps."""

    vae_warmup_fraction: float = 0.0  # of the run's steps, in which the VAE learns alone before the U-Net joins
    ema_decay: float = 0.9999  # of the averaged weights that generation uses, a step
    ema_warmup: float = 10.0  # decay at step n is at most (1 + n) / (ema_warmup + n)
    ema_on_cpu: bool = False  # keep the averages in host memory: less on the GPU, a copy and a wait a step
    vae_every_k_steps: int = 1  # joint stage: train the VAE, most of a step's cost, in each k-th step after warm-up
    log_every_steps: int = 10  # scalars to metrics/ and wandb
    max_skipped_in_row: int = 50  # non-finite steps one after the other, before the run ends with an error

    def __post_init__(self) -> None:
        _require(
            0 <= self.vae_warmup_fraction <= 1,
            f"schedule.vae_warmup_fraction is {self.vae_warmup_fraction}; it must be in [0, 1]",
        )
        _require(0 <= self.ema_decay < 1, f"schedule.ema_decay is {self.ema_decay}; it must be in [0, 1)")
        _require(self.ema_warmup >= 1, f"schedule.ema_warmup is {self.ema_warmup}; it must be at least 1")
        for name in ("log_every_steps", "vae_every_k_steps"):
            _require(getattr(self, name) >= 1, f"schedule.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.max_skipped_in_row >= 1, "schedule.max_skipped_in_row must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """Checkpoints and validation. A checkpoint is also written at the end of the run."""

    every_steps: int | None = None  # None: at the end of every epoch
    keep_last: int = 2  # besides the best one
    validation_images: int = 256  # the same ones each time
    validation_samples: int = 0  # generated ones whose kernel distance to validation images is measured; 0: none

    def __post_init__(self) -> None:
        _require(
            self.every_steps is None or self.every_steps >= 1,
            f"saving.every_steps is {self.every_steps}; it must be at least 1",
        )
        _require(self.keep_last >= 1, f"saving.keep_last is {self.keep_last}; it must be at least 1")
        _require(self.validation_images >= 1, "saving.validation_images must be at least 1")
        _require(self.validation_samples >= 0, "saving.validation_samples must be at least 0")


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
        for name in ("reconstructions_every_epochs", "samples_every_epochs", "features_every_epochs"):
            _require(getattr(self, name) >= 0, f"telemetry.{name} is {getattr(self, name)}; it must be at least 0")
        _require(
            self.gradients_every_steps >= 0,
            f"telemetry.gradients_every_steps is {self.gradients_every_steps}; it must be at least 0",
        )
        for name in ("images", "samples_per_class", "sample_steps"):
            _require(getattr(self, name) >= 1, f"telemetry.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("guidance_scale", "finish_timeout_s"):
            value = getattr(self, name)
            _require(isfinite(value) and value > 0, f"telemetry.{name} is {value}; it must be above 0")


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
        for name in ("collective_timeout_s", "resize_check_s"):
            value = getattr(self, name)
            _require(isfinite(value) and value > 0, f"ray.{name} is {value}; it must be above 0")
        _require(
            isfinite(self.wait_for_nodes_s) and self.wait_for_nodes_s >= 0,
            f"ray.wait_for_nodes_s is {self.wait_for_nodes_s}; it must be at least 0",
        )
        _require(self.cpus_per_worker > 0, f"ray.cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
        _require(self.max_failures >= -1, "ray.max_failures must be -1 (without limit) or more")
