"""One image asked for, its seeds and its noise: the same for every batch size, worker and device."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Image number `index` of class `label` (a class code), made from the noise of `seed`."""

    label: str
    index: int
    seed: int

    @property
    def image_id(self) -> str:
        """MEL_000003: the stem of its file and its key in the manifest."""
        return f"{self.label}_{self.index:06d}"


def class_requests(classes: Iterable[str], *, num_samples: int, run_seed: int) -> list[SampleRequest]:
    """`num_samples` requests a class, index by index, so that an interrupted run has as many of each class."""
    labels = list(classes)
    return [
        SampleRequest(label=label, index=index, seed=sample_seed(run_seed, label, index))
        for index in range(num_samples)
        for label in labels
    ]


def sample_seed(run_seed: int, label: str, index: int) -> int:
    """Seed in [0, 2^63) of one image: a SHA-256, so it is the same in every process and Python version."""
    digest = hashlib.sha256(f"{run_seed}/{label}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def feature_seed(seed: int) -> int:
    """Seed in [0, 2^63) of the guiding feature of the image with this seed: a stream of its own.

    The first 63 bits of the SHA-256 of `<seed>/feature`. Latents and features of one image must not share numbers: a
    model could not have seen them correlated.
    """
    digest = hashlib.sha256(f"{seed}/feature".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise_for(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [*shape] on the CPU.

    From NumPy's Mersenne Twister, not torch's: torch's CPU generator looks at the low 32 bits of a seed alone, so
    among 65,000 images some two would likely be the same one. RandomState's stream is frozen for good (NEP 19).
    """
    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return torch.from_numpy(stream.standard_normal(shape).astype(np.float32))
