"""The straight path between data (t = 0) and noise (t = 1), its velocity, and the times that training looks at.

The convention is SiT's (arXiv 2401.08740, linear path): x_t = (1 - t) x_0 + t eps.
"""

import torch
from torch import Tensor

from m2d.diffusion.settings import TimeDensity


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point x_t = (1 - t) x_0 + t eps of the path.

    clean, noise: [B, ...], normalised latents; t: [B] in [0, 1], one time per sample. Returns x_t, shape of clean.
    """
    t = t.reshape(-1, *(1,) * (clean.dim() - 1))
    return (1 - t) * clean + t * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the path: d x_t / d t = eps - x_0.

    clean, noise: [B, ...], normalised latents. Returns the same shape. Constant in t, so it takes none.
    """
    return noise - clean


def training_times(share: Tensor, density: TimeDensity = "uniform", shift: float = 1.0) -> Tensor:
    """Times below which `share` of the density lies: its quantiles, then `shifted`. Both float [B] in [0, 1].

    logit_normal: log(t / (1 - t)) is standard normal. Source: Stable Diffusion 3 (arXiv 2403.03206), section 3.1, whose
    location m is log(shift) here.
    """
    if density == "uniform" and shift == 1:
        return share
    wide = share.double()
    times = torch.special.ndtri(wide).sigmoid() if density == "logit_normal" else wide
    return shifted(times, shift).to(share.dtype)


def shifted(times: Tensor, shift: float) -> Tensor:
    """t -> shift t / (1 + (shift - 1) t): above 1 nearer to the noise, and log(t / (1 - t)) grows by log(shift).

    Source: Stable Diffusion 3 (arXiv 2403.03206), eq. 23; there shift is sqrt(m / n) for latents of m and n positions.
    """
    return shift * times / (1 + (shift - 1) * times)
