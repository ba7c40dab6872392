"""Averages of the weights over the steps of a run, and averages of another length from the checkpoints it kept."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m2d.errors import CheckpointError, ConfigError
from m2d.experiment import complete_checkpoints
from m2d.models.checkpoint import Checkpoint, hold_checkpoint, load_checkpoint, read_info

NetworkT = TypeVar("NetworkT", bound=nn.Module)
CHUNK = 2**24  # numbers that are averaged at once, 64 MiB
WORST_FIT = 0.3  # how far the profile may be from the one asked for, relative to it
SMALLEST_SINGULAR = 1e-3  # of the largest: checkpoints' profiles are alike, and large coefficients add up rounding


class Ema(Generic[NetworkT]):
    """Keeps `module`, a frozen copy that follows the trained one.

    Decay at update n is min(decay, (1 + n) / (warmup + n)), so that early averages forget the random start. Buffers are
    averaged too: the latent batch norm's statistics must suit the averaged weights (REPA-E).
    """

    def __init__(self, source: NetworkT, decay: float, warmup: float, device: torch.device | None) -> None:
        """device: where the averages are kept; None: beside the source. A source that learns nothing is its average."""
        learns = any(parameter.requires_grad for parameter in source.parameters())
        self.module: NetworkT = copy.deepcopy(source) if learns else source
        self.module.eval().requires_grad_(False)
        if device is not None and learns:
            self.module.to(device)
        self.decay = decay
        self.warmup = warmup
        self.updates = torch.zeros((), device=next(self.module.parameters()).device)

    @torch.no_grad()
    def update(self, source: nn.Module, accepted: Tensor) -> None:
        """Follow `source`. accepted: a 0-dim bool on its device; False leaves everything as it was.

        Waits for the source's device where the averages are on another.
        """
        device = self.updates.device
        step_taken = accepted.to(self.updates)
        decay = torch.clamp((1 + self.updates) / (self.warmup + self.updates), max=self.decay)
        weight = (1 - decay) * step_taken
        averages, sources = _float_tensors(self.module), _float_tensors(source)
        start = size = 0
        for end, tensor in enumerate(averages, start=1):  # in chunks: what is computed of one is freed before the next
            size += tensor.numel()
            if size >= CHUNK or end == len(averages):
                difference = torch._foreach_sub(_on(device, sources[start:end]), averages[start:end])
                torch._foreach_mul_(difference, weight)
                torch._foreach_add_(averages[start:end], difference)
                del difference
                start, size = end, 0
        self.updates += step_taken

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors and the number of updates."""
        return {**self.module.state_dict(), "ema_updates": self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; strict."""
        self.updates.copy_(state["ema_updates"])
        self.module.load_state_dict({name: tensor for name, tensor in state.items() if name != "ema_updates"})


def _float_tensors(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


def _on(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on a device, in one copy where they are not there."""
    if tensors[0].device == device:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


# --- another length, after the training -----------------------------------------------------------------------------


def with_length(checkpoint: Checkpoint, length: float) -> tuple[Checkpoint, str]:
    """The checkpoint with its denoiser averaged over another length, and a line that says of what and how well.

    length: relative standard deviation of a power-function average: of 0.1, the weights that it holds lie about a
    tenth of the training apart (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
    arXiv 2312.02696, section 3). It is made of the averages in the run's checkpoints, see `mixture`. Raises
    CheckpointError where there are none, and ConfigError where they do not allow the length.
    """
    folder = Path(checkpoint.path).resolve()
    with ExitStack() as held:
        kept = [Path(held.enter_context(hold_checkpoint(str(one)))) for one in complete_checkpoints(folder.parent)]
        infos = {one: info for one in kept if (info := read_info(one)).step <= checkpoint.step and _counters(one)}
        if folder not in infos:
            raise CheckpointError(
                f"ema_length: {folder} is no checkpoint with training state in an experiment, so which steps it "
                "averages is not known; name one, or leave ema_length out"
            )
        schedules = [info.config.get("schedule", {}) for info in infos.values()]
        decays = {tuple(one.get(name) for name in ("ema_decay", "ema_warmup")) for one in schedules}
        if len(decays) > 1 or None in next(iter(decays)) or checkpoint.info.stage == "decoder":
            raise ConfigError(
                f"ema_length: the run of {folder} changed its ema_decay or ema_warmup, does not say what they were, "
                "or trained no denoiser; leave ema_length out"
            )
        updates = [int(load_file(counters)["ema_updates"]) for one in infos if (counters := _counters(one))]
        decay, warmup = decays.pop()
        shares, error = mixture(updates, float(decay), float(warmup), length)
        if error > WORST_FIT:
            raise ConfigError(
                f"ema_length {length:g} cannot be had of the {len(infos)} checkpoints beside {folder}: the nearest "
                f"average is {error:.0%} off; train with --saving.keep_last 20, or ask for another length"
            )
        averaged = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in _floats(checkpoint).items()}
        for one, share in zip(infos, shares, strict=True):
            for name, tensor in _floats(load_checkpoint(one)).items():
                averaged[name].add_(tensor, alpha=float(share))
    denoiser = copy.deepcopy(checkpoint.denoiser)
    denoiser.load_state_dict({**denoiser.state_dict(), **averaged})
    info = replace(checkpoint.info, config={**checkpoint.info.config, "ema_length": length})
    told = f"weights averaged over a length of {length:g}, of {len(infos)} checkpoints, {error:.1%} off"
    return replace(checkpoint, denoiser=denoiser, info=info), told


def mixture(updates: Sequence[int], decay: float, warmup: float, length: float) -> tuple[np.ndarray, float]:
    """Shares of the averages after so many updates each, ascending, whose sum is nearest to an average of this length.

    Nearest by least squares of the profiles, as equation 123 of arXiv 2312.02696, and scaled to a sum of 1. Profiles
    are computed step by step, for past `ema_decay` they are no power functions. Second: how far the sum's profile is
    from the one asked for, relative to it, in the Euclidean norm.
    """
    last = updates[-1]
    profiles = np.stack([np.pad(profile(count, decay, warmup), (0, last - count)) for count in updates], axis=1)
    power = power_of(length) + 1
    asked = np.concatenate([[0.0], np.diff((np.arange(last + 1) / last) ** power)])
    shares = np.linalg.lstsq(profiles, asked, rcond=SMALLEST_SINGULAR)[0]
    shares /= shares.sum()
    return shares, float(np.linalg.norm(profiles @ shares - asked) / np.linalg.norm(asked))


def profile(updates: int, decay: float, warmup: float) -> np.ndarray:
    """How much of the weights after each update an `Ema` holds after the last one, [updates + 1]; first: at its start.

    Until `decay` is reached it is the power function of exponent warmup - 2; warmup 10 is a length of 0.09.
    """
    count = np.arange(updates)
    decays = np.minimum(decay, (1 + count) / (warmup + count))
    kept = np.cumprod(decays[::-1])[::-1]
    return np.concatenate([[1.0], 1 - decays]) * np.concatenate([kept, [1.0]])


def power_of(length: float) -> float:
    """The exponent of the power function of this relative standard deviation (equation 126 of arXiv 2312.02696)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real[np.isclose(roots.imag, 0)].max())


def _counters(checkpoint: Path) -> Path | None:
    file = checkpoint / "training" / "counters.safetensors"
    return file if file.is_file() else None


def _floats(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in checkpoint.denoiser.state_dict().items() if tensor.is_floating_point()}
