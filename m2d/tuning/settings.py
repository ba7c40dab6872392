"""Settings of a sweep, and what it may choose them from. Light: the command line reads them before anything else."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from m2d.arguments import setting_types
from m2d.data.settings import require_seed
from m2d.errors import require, require_range
from m2d.training.settings import TrainConfig

ConfigT = TypeVar("ConfigT")
DEFAULT_SPACE = {
    "loss_weights.diffusion": "loguniform(0.25, 4)",
    "loss_weights.reconstruction": "loguniform(0.1, 4)",
    "loss_weights.alignment": "loguniform(0.03, 3)",
    "loss_weights.perceptual": "loguniform(0.03, 3)",
    "optimizer.lr_autoencoder": "loguniform(1e-4, 5e-3)",
    "optimizer.lr_denoiser": "loguniform(5e-5, 2e-3)",
}
_FORM = re.compile(r"\s*(\w+)\s*\(([^()]*)\)\s*")


@dataclass(frozen=True)
class Distribution:
    """Where a setting's values come from. numbers: low and high of a range, or the values themselves."""

    kind: str  # loguniform, uniform, choice or fixed
    numbers: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether a grid can hold every value."""
        return self.kind in ("choice", "fixed")

    @property
    def is_logarithmic(self) -> bool:
        """Whether a plot's axis should be: equal ratios are equally likely, or the choice spans more than a decade."""
        low, high = min(self.numbers), max(self.numbers)
        return self.kind == "loguniform" or (self.kind == "choice" and 0 < 10 * low < high)


def parse_distribution(setting: str, text: str) -> Distribution:
    """The distribution that `text` describes. Raises ConfigError, which names the setting, for anything else."""
    matched = _FORM.fullmatch(str(text))
    kind, inside = (matched[1].lower(), matched[2]) if matched else ("", "")
    try:
        numbers = tuple(float(word) for word in inside.split(",") if word.strip())
    except ValueError:
        numbers = ()
    is_range = len(numbers) == 2 and numbers[0] < numbers[1]
    fits = {
        "loguniform": is_range and numbers[0] > 0,
        "uniform": is_range,
        "choice": len(numbers) > 0,
        "fixed": len(numbers) == 1,
    }
    require(
        fits.get(kind, False) and all(map(math.isfinite, numbers)),
        f"sweep.space: {setting} is {text}; it must be loguniform(low, high) with 0 < low < high, uniform(low, high) "
        "with low < high, choice(a, b, ...) or fixed(a), of finite numbers",
    )
    return Distribution(kind, numbers)


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is searched, and by what a trial is judged and stopped."""

    scheduler: Literal["asha", "none"] = "asha"  # asha stops the trials that lag behind
    space: dict[str, str] = field(default_factory=DEFAULT_SPACE.copy)  # setting: loguniform(a, b), uniform, choice(...)
    reports: int = 10  # times that a trial is judged, evenly over max_steps; without max_steps, after every epoch
    grace_reports: int = 2  # asha: reports before a trial may be stopped
    reduction_factor: float = 3.0  # asha: one of so many continues at each rung
    samples: int = 70  # generated images that a trial is judged by each time
    reconstruction_weight: float = 10.0  # objective = kernel distance + this * reconstruction error in [0, 1]
    max_concurrent: int | None = None  # trials at the same time; None: as many as the cluster can hold
    seed: int = 0  # of the search

    def __post_init__(self) -> None:
        require_range(self, "sweep.", 1, "reports", "grace_reports", "max_concurrent")
        require_seed("sweep.seed", self.seed)
        require_range(self, "sweep.", 3, "samples")  # fewer have no unbiased kernel distance
        require_range(self, "sweep.", 1, "reduction_factor", above=True)
        require_range(self, "sweep.", 0, "reconstruction_weight")
        require(
            self.grace_reports <= self.reports,
            f"sweep.grace_reports is {self.grace_reports}, more than sweep.reports {self.reports}",
        )
        require(bool(self.space), "sweep.space is empty; name at least one setting")
        known = dict(setting_types(TrainConfig))
        for setting, text in self.space.items():
            require(setting in known, f"sweep.space names {setting}, which is no setting of training; see --help")
            require(known[setting] in (int, float), f"sweep.space names {setting}, which is no number")
            parse_distribution(setting, text)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """A sweep: every setting of a training run, which its trials share, and what is searched."""

    name: str = "sweep"  # of the sweep; its directory is experiments_dir/sweeps/NAME
    num_trials: int = 12  # trials of the whole sweep; more when resumed: so many in all; a grid has its own
    search: Literal["random", "grid", "optuna"] = "random"  # optuna: its TPE sampler
    resume: bool = False  # resume the sweep of this name, or say that there is none to resume
    sweep: SweepSettings = field(default_factory=SweepSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.dry_run, "dry_run is of the command train; try a trial's settings there")
        require_range(self, "", 1, "num_trials")
        fewest, most = self.workers
        require(most >= 1, "num_workers is 0; a trial trains with at least one Ray worker")
        require(fewest == most, f"num_workers is {self.num_workers}; a sweep's trials have one number, all the same")
        require(not (self.resume and self.fresh), "resume and fresh contradict each other; give one of them")
        require("://" not in self.experiments_dir, "experiments_dir is a URI; a sweep needs a path that all nodes see")
        for setting, one in self.distributions.items():
            require(
                self.search != "grid" or one.is_finite,
                f"sweep.space: {setting} is {self.sweep.space[setting]}, which no grid can hold; write choice(a, ...)",
            )

    @property
    def distributions(self) -> dict[str, Distribution]:
        """Setting -> what it is chosen from."""
        return {setting: parse_distribution(setting, text) for setting, text in self.sweep.space.items()}

    @property
    def count(self) -> int:
        """Trials of the whole sweep."""
        if self.search != "grid":
            return self.num_trials
        return math.prod(len(one.numbers) for one in self.distributions.values())

    def training(self, chosen: Mapping[str, float]) -> TrainConfig:
        """The training settings alone, with the chosen values of dotted settings in their places."""
        config = TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})
        kinds = dict(setting_types(TrainConfig))
        for setting, value in chosen.items():
            config = _with_setting(config, setting, round(value) if kinds[setting] is int else value)
        return config

    def trial(self, chosen: Mapping[str, float], *, name: str, folder: str) -> TrainConfig:
        """A trial's run: judged `sweep.reports` times, in the sweep's own folder, without pictures."""
        config = self.training(chosen)
        every, samples = self.judged_every, self.sweep.samples
        return replace(
            config,
            name=name,
            experiments_dir=folder,
            fresh=False,
            wandb_group=self.name,
            saving=replace(config.saving, every_steps=every, keep_last=1, validation_samples=samples),
            telemetry=replace(config.telemetry, pictures=False),
        )

    @property
    def judged_every(self) -> int | None:
        """Steps between two judgements of a trial; None: an epoch.

        A run's own checkpoints are too few to stop a trial by, so they count only where max_steps does not say how long
        a trial is.
        """
        return self.saving.every_steps if self.max_steps is None else math.ceil(self.max_steps / self.sweep.reports)

    @property
    def reports(self) -> int:
        """Judgements of a whole trial, at most."""
        if self.max_steps is not None and self.judged_every is not None:
            return math.ceil(self.max_steps / self.judged_every)
        return self.epochs if self.saving.every_steps is None else self.sweep.reports


def _with_setting(config: ConfigT, setting: str, value: Any) -> ConfigT:
    """The config with one (dotted) setting changed; checked as every config is."""
    name, _, rest = setting.partition(".")
    new = _with_setting(getattr(config, name), rest, value) if rest else value
    return replace(config, **{name: new})  # type: ignore[type-var]
