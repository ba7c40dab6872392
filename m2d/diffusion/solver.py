"""From noise to data: solvers of dx/dt = v(x, t) along x_t = (1 - t) x_0 + t eps, from t = 1 (or less) to t = 0.

A velocity is any callable; GuidedVelocity makes one of a network. Nothing here is random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import expm1
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m2d.diffusion.interpolant import shifted
from m2d.diffusion.settings import Solver

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t: float64 scalar tensor on the CPU) -> d x / d t, the shape of x."""

Watch = Callable[[int, Tensor], Sequence[int] | None]
"""(steps taken, the estimate of x_0 [B, ...]) -> the rows to go on with, or None for all of them."""

# The multistep solvers work in log((1 - t) / t), infinite at t = 1: the first step starts this much later, where the
# noise is the same to seven digits. So near t = 0 the path has arrived.
_EDGE = 1e-6


class VelocityModel(Protocol):
    """What guidance asks of a network; m2d.models' Denoiser is one."""

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x_t: [B, C, h, w]; t: [B] in [0, 1]; context: [B, L, D]. Returns [B, C, h, w]."""
        ...


@dataclass
class GuidedVelocity:
    """v = v_null + scale (v_cond - v_null) where low <= t <= high, and v_cond elsewhere.

    conditional: contexts [B, L, D]; null: the same shape, or [1, L, D] for one that the batch shares. Where guidance
    acts, both halves go through the network in one pass of 2B samples; elsewhere, and at scale 1, where the formula is
    v_cond anyway, the null half is not computed at all.
    Sources: classifier-free guidance (arXiv 2207.12598), limited interval (arXiv 2404.07724).
    """

    model: VelocityModel
    conditional: Tensor
    null: Tensor
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._both = torch.cat([self.null.expand_as(self.conditional), self.conditional])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, h, w]; t: one time for the batch, a scalar tensor on the CPU (on a GPU, reading it would wait)."""
        time, (low, high) = float(t), self.interval
        if self.scale == 1 or not low <= time <= high:
            return self.model.velocity(x, x.new_full((len(x),), time), self.conditional)
        velocity = self.model.velocity(torch.cat([x, x]), x.new_full((2 * len(x),), time), self._both)
        # In the state's precision: the difference of two nearly equal bf16 velocities is what guidance lives on.
        null, conditional = velocity.to(x.dtype).chunk(2)
        return null + self.scale * (conditional - null)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch alone."""
        both = self._both.unflatten(0, (2, -1))
        self._both = torch.cat([keep_rows(half, rows) for half in both])
        self.conditional = keep_rows(self.conditional, rows)


@dataclass
class AutoguidedVelocity:
    """v = v_guide + scale (v - v_guide) where low <= t <= high, and v elsewhere: away from a weaker network's errors.

    context, guide_context: [B, L, D], of the same classes and features, each by its network's own encoder. The guide
    is asked where GuidedVelocity would compute its null half, so that the cost is the same.
    Source: autoguidance (arXiv 2406.02507), section 4; the two networks share the path and the space it is in.
    """

    model: VelocityModel
    guide: VelocityModel
    context: Tensor
    guide_context: Tensor
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """As GuidedVelocity's."""
        time, (low, high) = float(t), self.interval
        times = x.new_full((len(x),), time)
        velocity = self.model.velocity(x, times, self.context)
        if self.scale == 1 or not low <= time <= high:
            return velocity
        velocity, guide = velocity.to(x.dtype), self.guide.velocity(x, times, self.guide_context).to(x.dtype)
        return guide + self.scale * (velocity - guide)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch alone."""
        self.context, self.guide_context = keep_rows(self.context, rows), keep_rows(self.guide_context, rows)


@dataclass
class HeldVelocity:
    """A velocity within a region; outside, that of the known path x_t = (1 - t) x_0 + t eps, which is eps - x_0.

    As that is constant, every solver keeps the outside on its path: at each step it is the known latents noised to that
    time, the inpainting of RePaint (arXiv 2201.09865, eq. 8) and of diffusers, with one draw of noise.
    region: bool [B, 1, h, w]; known: eps - x_0, [B, C, h, w].
    """

    velocity: GuidedVelocity | AutoguidedVelocity
    region: Tensor
    known: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """As GuidedVelocity's."""
        return torch.where(self.region, self.velocity(x, t).to(x.dtype), self.known)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch alone."""
        self.velocity.keep(rows)
        self.region, self.known = keep_rows(self.region, rows), keep_rows(self.known, rows)


@torch.no_grad()
def solve(
    velocity: Velocity,
    start: Tensor,
    *,
    steps: int,
    solver: Solver = "unipc",
    shift: float = 1.0,
    start_time: float = 1.0,
    watch: Watch | None = None,
) -> Tensor:
    """Follow the flow from `start` at t = start_time, noise at t = 1, to data at t = 0.

    start: [B, ...] with at least two dimensions, a point x_t of the path at t = start_time in [0, 1]. Below 1e-6 it is
    data already, to six digits, and is returned without a call of the network. Returns the same shape, in float32
    whatever the network's type, or in float64 if start is float64.
    The network runs `steps` times, or 2 `steps` times with heun.
    watch: called after each step. The rows that it returns are all that goes on, in their order, and all that is
    returned; a velocity that knows of rows is for the caller to narrow. Where none is left, the rest is not computed.
    shift > 1 spends more of the steps near the noise, see `time_grid`.
    """
    start = start.to(torch.float64 if start.dtype == torch.float64 else torch.float32)
    times = time_grid(steps, shift, start_time)
    if start_time < _EDGE:
        return start
    if solver in ("dpmpp", "unipc"):
        return _multistep(velocity, start, times, watch, corrected=solver == "unipc")
    return _one_step(velocity, start, times, watch, corrected=solver == "heun")


def keep_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """[B, ...] to [len(rows), ...]. An index would be copied to a GPU, and the host would wait for it."""
    return torch.stack([x[row] for row in rows]) if rows else x[:0]


def time_grid(steps: int, shift: float = 1.0, start_time: float = 1.0) -> Tensor:
    """Times from start_time to 0, float64 [steps + 1] on the CPU: uniform, then `shifted`.

    The uniform times begin at the u that the shift leads to start_time, so u n steps from there are the last ones of n
    steps from 1.
    """
    if not 0 <= start_time <= 1:
        raise ValueError(f"start_time is {start_time}; it must be in [0, 1]")
    first = start_time / (start_time + shift * (1 - start_time))  # 1 at 1, exactly
    times = torch.linspace(first, 0, steps + 1, dtype=torch.float64)
    return shifted(times, shift)


def _one_step(velocity: Velocity, x: Tensor, times: Tensor, watch: Watch | None, *, corrected: bool) -> Tensor:
    """Euler; corrected: Heun, the trapezoid rule, also in the last step: this path's velocity is finite at t = 0."""
    for step, (t, t_next) in enumerate(pairwise(times), 1):
        slope = end = velocity(x, t).to(x.dtype)
        if corrected:
            end = velocity(x + (t_next - t) * slope, t_next).to(x.dtype)
            slope = (slope + end) / 2
        x = x + (t_next - t) * slope
        if watch is not None and (rows := watch(step, x - t_next * end)) is not None:
            x = keep_rows(x, rows)
            if not rows:
                break
    return x


def _multistep(velocity: Velocity, x: Tensor, times: Tensor, watch: Watch | None, *, corrected: bool) -> Tensor:
    """DPM-Solver++(2M); corrected: UniPC of order 2 with B(h) = e^h - 1, whose prediction is the same.

    Both integrate x_0 = x - t v over the log of the signal-to-noise ratio, along a line through its last two values.
    UniPC repeats a step, without another pass of the network, once it knows the value at the step's end.
    Sources: DPM-Solver++ (arXiv 2211.01095), algorithm 2; UniPC (arXiv 2302.04867), algorithms 1 and 2.
    """
    times = times.clamp(max=1 - _EDGE)
    steps = _steps(times)
    begin, before = x, x  # of the step before: where it began, and the x_0 that was seen there
    slope: Tensor | float = 0.0
    for i, step in enumerate(steps):
        clean = x - step.time * velocity(x, times[i]).to(x.dtype)
        if corrected and i > 0:
            past = steps[i - 1]
            x = past.decay * begin + past.gain * (before + past.by_slope * slope + past.by_end * (clean - before))
        slope = 0.0 if step.ratio is None else (before - clean) / step.ratio
        begin, before = x, clean
        x = step.decay * x + step.gain * (clean + slope / 2)
        if watch is not None and (rows := watch(i + 1, clean)) is not None:
            x, begin, before = (keep_rows(state, rows) for state in (x, begin, before))
            slope = keep_rows(slope, rows) if isinstance(slope, Tensor) else slope
            if not rows:
                break
    return x


class _Step(NamedTuple):
    """Coefficients of a step of `_multistep`: Python numbers, so that the host never waits for a GPU."""

    time: float
    decay: float
    gain: float
    ratio: float | None  # length of the step before, negative, in lengths of this one; None: a step of order 1
    by_slope: float  # what UniPC corrects with, rho_0 and rho_1
    by_end: float


def _steps(times: Tensor) -> list[_Step]:
    """Between each two of `times`, float64 [n + 1] below 1; the first and the last are of order 1."""
    t = times.float().double()  # float32's times, as in diffusers: next to t = 1 they move 1 - t by percents
    noise, log_snr = t.tolist(), (torch.log1p(-t) - t.log()).tolist()
    steps = []
    for i in range(len(noise) - 1):
        h = log_snr[i + 1] - log_snr[i]
        growth = expm1(-h)  # B(h), and phi_1
        ratio, by_slope, by_end = None, 0.0, 0.5
        if 0 < i < len(noise) - 2:
            ratio = (log_snr[i - 1] - log_snr[i]) / h
            # Eq. 9 of UniPC: rho_0 + rho_1 = b_1 and ratio rho_0 + rho_1 = b_2.
            phi_2 = -growth / h - 1
            b_1, b_2 = phi_2 / growth, -(2 * phi_2 / h + 1) / growth
            by_slope = (b_2 - b_1) / (ratio - 1)
            by_end = b_1 - by_slope
        steps.append(_Step(noise[i], noise[i + 1] / noise[i], (noise[i + 1] - 1) * growth, ratio, by_slope, by_end))
    return steps
