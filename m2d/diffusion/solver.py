"""From noise to data: solvers of dx/dt = v(x, t) along x_t = (1 - t) x_0 + t eps, from t = 1 (or less) to t = 0.

A velocity is any callable; guidance and the network live behind it. Nothing here is random.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from m2d.diffusion.settings import Solver

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t: float64 scalar tensor on the CPU) -> d x / d t, the shape of x."""

# The multistep solvers work in log((1 - t) / t), which is infinite at t = 1 (UniPC then solves a system with infinities
# in it). The first step starts this much later; the noise is the same to seven digits.
_BELOW_ONE = 1e-6
_ABOVE_ZERO = 1e-6  # and at t = 0; there the path has arrived


@torch.no_grad()
def solve(
    velocity: Velocity,
    start: Tensor,
    *,
    steps: int,
    solver: Solver = "unipc",
    shift: float = 1.0,
    start_time: float = 1.0,
) -> Tensor:
    """Follow the flow from `start` at t = start_time, noise at t = 1, to data at t = 0.

    start: [B, ...] with at least two dimensions, a point x_t of the path at t = start_time in [0, 1]. Below 1e-6 it is
    data already, to six digits, and is returned without a call of the network. Returns the same shape, in float32
    whatever the network's type, or in float64 if start is float64 (the multistep solvers still compute in float32, as
    diffusers does).
    The network runs `steps` times, or 2 `steps` times with heun.
    shift > 1 spends more of the steps near the noise, see `time_grid`.
    """
    start = start.to(torch.float64 if start.dtype == torch.float64 else torch.float32)
    times = time_grid(steps, shift, start_time)
    if start_time < _ABOVE_ZERO:
        return start
    match solver:
        case "euler":
            return _euler(velocity, start, times)
        case "heun":
            return _heun(velocity, start, times)
        case "dpmpp":
            return _multistep(DPMSolverMultistepScheduler(**_flow_options("dpmsolver++")), velocity, start, times)
        case "unipc":
            return _multistep(UniPCMultistepScheduler(**_flow_options(None)), velocity, start, times)


def time_grid(steps: int, shift: float = 1.0, start_time: float = 1.0) -> Tensor:
    """Times from start_time to 0, float64 [steps + 1] on the CPU: uniform, then t -> shift t / (1 + (shift - 1) t).

    The uniform times begin at the u that the shift leads to start_time, so u n steps from there are the last ones of n
    steps from 1. Source of the shift: Stable Diffusion 3 (arXiv 2403.03206), eq. 23.
    """
    if not 0 <= start_time <= 1:
        raise ValueError(f"start_time is {start_time}; it must be in [0, 1]")
    first = start_time / (start_time + shift * (1 - start_time))  # 1 at 1, exactly
    times = torch.linspace(first, 0, steps + 1, dtype=torch.float64)
    return shift * times / (1 + (shift - 1) * times)


def _euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t).to(x.dtype)
    return x


def _heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """The trapezoid rule with an Euler predictor, also in the last step: this path's velocity is finite at t = 0."""
    for t, t_next in pairwise(times):
        here = velocity(x, t).to(x.dtype)
        there = velocity(x + (t_next - t) * here, t_next).to(x.dtype)
        x = x + (t_next - t) * (here + there) / 2
    return x


def _multistep(scheduler: Any, velocity: Velocity, start: Tensor, times: Tensor) -> Tensor:
    """Second-order multistep solvers of diffusers. Its flow_prediction is our velocity: it reads x_0 = x - sigma v.

    Sources: DPM-Solver++ (arXiv 2211.01095), UniPC (arXiv 2302.04867).
    """
    steps = len(times) - 1
    times = times.clamp(max=1 - _BELOW_ONE)
    scheduler.set_timesteps(steps)
    # diffusers' own flow grids start at 0.999 (DPM-Solver++) or are off by up to 1/1000 (UniPC), and their integer
    # timesteps can repeat; ours is the grid of the other solvers, walked by index.
    scheduler.sigmas = times.float()
    scheduler.set_begin_index(0)
    x = start.float()
    for index in range(steps):
        v = velocity(x.to(start.dtype), times[index]).float()
        x = scheduler.step(v, scheduler.timesteps[index], x, return_dict=False)[0]
    return x.to(start.dtype)


def _flow_options(algorithm: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "final_sigmas_type": "zero",  # the last step lands on t = 0 itself
    }
    return options if algorithm is None else {**options, "algorithm_type": algorithm}
