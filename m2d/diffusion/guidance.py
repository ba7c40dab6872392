"""Classifier-free guidance, as a velocity that a solver can follow without knowing of it."""

from typing import Protocol

import torch
from torch import Tensor


class VelocityModel(Protocol):
    """What guidance asks of a network; m2d.models' Denoiser is one."""

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x_t: [B, C, h, w]; t: [B] in [0, 1]; context: [B, L, D]. Returns [B, C, h, w]."""
        ...


class GuidedVelocity:
    """v = v_null + scale (v_cond - v_null) where low <= t <= high, and v_cond elsewhere.

    Where guidance acts, both halves go through the network in one pass of 2B samples; where it does not (outside the
    interval, or at scale 1, where the formula is v_cond anyway), the null half is not computed at all.
    Sources: classifier-free guidance (arXiv 2207.12598), limited interval (arXiv 2404.07724).
    """

    def __init__(
        self,
        model: VelocityModel,
        conditional: Tensor,
        null: Tensor,
        *,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """conditional: [B, L, D]; null: the same shape, or [1, L, D] for one null context shared by the batch."""
        self.model = model
        self.conditional = conditional
        self.both = torch.cat([null.expand_as(conditional), conditional])
        self.scale = scale
        self.interval = interval

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, h, w]; t: one time for the batch, a scalar tensor on the CPU (on a GPU, reading it would wait)."""
        time = float(t)
        if not self.is_guided(time):
            return self.model.velocity(x, x.new_full((len(x),), time), self.conditional)
        velocity = self.model.velocity(torch.cat([x, x]), x.new_full((2 * len(x),), time), self.both)
        # In the state's precision: the difference of two nearly equal bf16 velocities is what guidance lives on.
        null, conditional = velocity.to(x.dtype).chunk(2)
        return null + self.scale * (conditional - null)

    def is_guided(self, time: float) -> bool:
        """Whether the null half is needed at this time."""
        low, high = self.interval
        return self.scale != 1 and low <= time <= high
