"""Settings of a sampler. Light on purpose: the command line reads them before torch is imported."""

from dataclasses import dataclass
from typing import Literal, get_args

from m2d.errors import require, require_range

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
        require(self.solver in SOLVERS, f"solver is {self.solver}; known: {' '.join(SOLVERS)}")
        require_range(self, "", 1, "steps")
        require_range(self, "", 0, "guidance_scale")
        interval = list(self.guidance_interval)
        sound = len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        require(sound, f"guidance_interval is {interval}; it must be [low, high], 0 <= low <= high <= 1")
