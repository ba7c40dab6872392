"""Settings of a sampler. Light on purpose: the command line reads them before torch is imported."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from m2d.errors import ConfigError

Solver = Literal["euler", "heun", "dpmpp", "unipc"]
SOLVERS: tuple[str, ...] = get_args(Solver)
TimeDensity = Literal["uniform", "logit_normal"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How noise becomes an image: everything but the model and the noise itself."""

    solver: Solver = "unipc"  # heun runs the network twice per step, the others once
    steps: int = 25  # of the solver, from noise to image
    guidance_scale: float = 1.5  # 1: the class alone, no guidance; above: further from the unconditional
    guidance_interval: tuple[float, float] = (0.0, 0.8)  # guided where low <= t <= high; t = 1 is noise

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"solver is {self.solver}; known: {' '.join(SOLVERS)}")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1")
        if not (isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ConfigError(f"guidance_scale is {self.guidance_scale}; it must be a number of at least 0 (1: off)")
        interval = list(self.guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ConfigError(f"guidance_interval is {interval}; it must be [low, high], 0 <= low <= high <= 1")
