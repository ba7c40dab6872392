"""An image's seeds and its noise: the same for every batch size, worker and device.

Every seed is in [0, 2^63): the first 63 bits of the SHA-256 of a text, the same in every process and Python version.
Plans and writers use the seeds alone, so torch waits until noise is asked for.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def sample_seed(run_seed: int, label: str, index: int) -> int:
    """Of one image's latent noise."""
    return _seed(f"{run_seed}/{label}/{index}")


def feature_seed(seed: int) -> int:
    """Of the guiding feature of the image with this seed.

    A stream of its own: had latents and features of one image numbers in common, they would be correlated as no model
    has seen them.
    """
    return _seed(f"{seed}/feature")


def next_attempt_seed(seed: int, attempt: int) -> int:
    """Of attempt number `attempt` (from 1), from that of the attempt before: a rejected row is all it takes."""
    return _seed(f"{seed}/attempt/{attempt}")


def reference_seed(run_seed: int, label: str, sha256: str) -> int:
    """Of an input image's own sample: the noise at its end of an interpolation. sha256: of its file, in hex.

    Neither its number (another file would shift it) nor its name: two folders often use the same names, and a pair
    would share its noise.
    """
    return _seed(f"{run_seed}/{label}/reference/{sha256}")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def noise_for(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [*shape] on the CPU.

    From NumPy's Mersenne Twister, not torch's: torch's CPU generator looks at the low 32 bits of a seed alone, so
    among 65,000 images some two would likely be the same one. RandomState's stream is frozen for good (NEP 19).
    """
    import torch

    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return torch.from_numpy(stream.standard_normal(shape).astype(np.float32))


def slerp(a: Tensor, b: Tensor, position: float) -> Tensor:
    """Spherical interpolation from a (position 0) to b (position 1), any equal shape, as one long vector; float32.

    sin((1 - p) w) / sin(w) a + sin(p w) / sin(w) b with w the angle between a and b. Noise stays noise: two independent
    draws are at nearly right angles, so the weights' squares sum to 1. Both ends are returned as they are, to the bit;
    where a and b are parallel, so that sin(w) is 0, the weights are 1 - p and p. Source: Shoemake, SIGGRAPH 1985.
    """
    if position in (0, 1):
        return a if position == 0 else b
    wide_a, wide_b = a.double(), b.double()
    lengths = (wide_a.norm() * wide_b.norm()).item()
    cosine = (wide_a * wide_b).sum().item() / lengths if lengths > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    weights = (1 - position, position)
    if math.sin(angle) > 1e-6:
        weights = (math.sin((1 - position) * angle) / math.sin(angle), math.sin(position * angle) / math.sin(angle))
    return (weights[0] * wide_a + weights[1] * wide_b).float()
