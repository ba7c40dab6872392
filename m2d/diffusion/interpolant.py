"""The straight path between data (t = 0) and noise (t = 1) and its velocity.

The convention is SiT's (arXiv 2401.08740, linear path): x_t = (1 - t) x_0 + t eps.
"""

from torch import Tensor


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
