"""The straight path between data (t = 0) and noise (t = 1), its velocity, and the times that training draws.

The convention is SiT's (arXiv 2401.08740, linear path): x_t = (1 - t) x_0 + t eps.
"""

import torch
from torch import Tensor

_SMALLEST_TIME = 2.0**-24  # torch.rand's own step in float32; keeps drawn times inside the open interval (0, 1)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point x_t = (1 - t) x_0 + t eps of the path.

    clean, noise: [B, ...], normalised latents; t: [B] in [0, 1], one time a sample. Returns x_t, shape of clean.
    """
    t = _per_sample(t, clean)
    return (1 - t) * clean + t * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the path: d x_t / d t = eps - x_0.

    clean, noise: [B, ...], normalised latents. Returns the same shape. Constant in t, so it takes none.
    """
    return noise - clean


def clean_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The data that a velocity at x_t points back to: x_0 = x_t - t v.

    x_t, velocity: [B, ...]; t: [B] in [0, 1]. With a network's velocity this is its estimate of E[x_0 | x_t].
    """
    return x_t - _per_sample(t, x_t) * velocity


def sample_time(generator: torch.Generator | None, batch_size: int, device: torch.device | str) -> Tensor:
    """Times uniform in (0, 1), float32 [batch_size] on `device`.

    Drawn on the generator's own device, so that a CPU generator gives the same times to every accelerator.
    """
    drawn_on = generator.device if generator is not None else device
    t = torch.rand(batch_size, generator=generator, device=drawn_on)
    return t.clamp_(min=_SMALLEST_TIME).to(device)


def sample_time_logit_normal(
    generator: torch.Generator | None,
    batch_size: int,
    device: torch.device | str,
    *,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Times whose logit is N(mean, std^2), float32 [batch_size] in (0, 1): more of the middle, less of both ends.

    A positive mean leans to noise. Source: Stable Diffusion 3 (arXiv 2403.03206), section 3.1.
    """
    drawn_on = generator.device if generator is not None else device
    logit = mean + std * torch.randn(batch_size, generator=generator, device=drawn_on)
    return logit.sigmoid_().clamp_(_SMALLEST_TIME, 1 - _SMALLEST_TIME).to(device)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], so that t multiplies whole samples."""
    return t.reshape(-1, *(1,) * (like.dim() - 1))
