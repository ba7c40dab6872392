"""The guarded optimiser update and the averaged weights, on the device without a host wait; sums over workers."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2d.training.settings import OptimizerConfig


def distributed() -> bool:
    """Whether more than one worker trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if distributed():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all workers."""
    if distributed():
        dist.barrier()


def learning_rate(config: OptimizerConfig, peak: float, step: int, first_step: int, total_steps: int) -> float:
    """Rate at `step` for a network that learns from `first_step` on: linear warm-up, then constant or cosine."""
    local, span = step - first_step, max(total_steps - first_step, 1)
    warm = min(1.0, (local + 1) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return peak * warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(local / span, 0.0), 1.0)))
    return peak * warm * (config.final_fraction + (1 - config.final_fraction) * cosine)


class Optimized:
    """A network with its AdamW, and the micro-batch scaling that fp16 needs."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, peak_rate: float) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.peak_rate = peak_rate
        self.clip_norm = config.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=peak_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=True,  # its kernel skips the update on the device where found_inf is 1
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The optimiser's state, its moments laid out in memory as their parameters are.

        The fused kernel walks parameter and moments side by side through memory: a channels_last parameter beside
        contiguous moments, as they come from a file, would be updated with other elements' moments.
        """
        self.optimizer.load_state_dict(state)
        for parameter, entry in self.optimizer.state.items():
            for name, moment in entry.items():
                if moment.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter).copy_(moment)


def guarded_update(
    networks: list[Optimized],
    losses: Tensor,
    scaler: torch.amp.GradScaler,
    look: Callable[[], None] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Step every optimiser, or none where a loss or a gradient is not finite on any worker.

    losses: 1-D, every loss of the step. look: called once the gradients are on their true scale and not yet clipped.
    Returns (accepted: 0-dim bool, gradient norms before clipping, one a network). Every parameter and optimiser state
    is left as it was where accepted is False.
    """
    norms = []
    finite = torch.isfinite(losses.detach()).all()
    if scaler.is_enabled():
        for network in networks:
            scaler.unscale_(network.optimizer)
    if look is not None:
        look()
    for network in networks:
        norm = torch.nn.utils.clip_grad_norm_(network.parameters, network.clip_norm)
        norms.append(norm)
        finite = finite & torch.isfinite(norm)
    rejected = (~finite).float()
    if distributed():
        dist.all_reduce(rejected, op=dist.ReduceOp.MAX)  # a loss can be non-finite on one worker alone
    for network in networks:
        network.optimizer.grad_scale = None  # type: ignore[attr-defined]
        network.optimizer.found_inf = rejected.reshape(())  # type: ignore[attr-defined]
        network.optimizer.step()
        network.optimizer.zero_grad(set_to_none=True)
    if scaler.is_enabled():
        scaler.update()
    return rejected.reshape(()) == 0, norms


CHUNK = 2**24  # 64 MiB
NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Ema(Generic[NetworkT]):
    """Keeps `module`, a frozen copy that follows the trained one.

    Decay at update n is min(decay, (1 + n) / (warmup + n)), so that early averages forget the random start. Buffers are
    averaged too: the latent batch norm's statistics must suit the averaged weights (REPA-E).
    """

    def __init__(
        self, source: NetworkT, decay: float, warmup: float = 10.0, device: torch.device | None = None
    ) -> None:
        """device: where the averages are kept; None: beside the source. A source that learns nothing is its average."""
        learns = any(parameter.requires_grad for parameter in source.parameters())
        self.module: NetworkT = copy.deepcopy(source) if learns else source
        self.module.eval().requires_grad_(False)
        if device is not None and self.module is not source:
            self.module.to(device)
        self.decay = decay
        self.warmup = warmup
        self.updates = torch.zeros((), device=next(self.module.parameters()).device)

    @torch.no_grad()
    def update(self, source: nn.Module, accepted: Tensor | None = None) -> None:
        """Follow `source`. accepted: a 0-dim bool on its device; False leaves everything as it was.

        Waits for the source's device where the averages are on another.
        """
        device = self.updates.device
        step_taken = torch.ones_like(self.updates) if accepted is None else accepted.to(self.updates)
        decay = torch.clamp((1 + self.updates) / (self.warmup + self.updates), max=self.decay)
        weight = (1 - decay) * step_taken
        for averaged, current in _chunks(_float_tensors(self.module), _float_tensors(source)):
            difference = torch._foreach_sub(_on(device, current), averaged)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(averaged, difference)
        self.updates += step_taken

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors and the number of updates."""
        return {**self.module.state_dict(), "ema_updates": self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; strict."""
        state = dict(state)
        self.updates.copy_(state.pop("ema_updates"))
        self.module.load_state_dict(state)


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


def _chunks(first: list[Tensor], second: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of slices, of about CHUNK numbers each: what is computed from one is freed before the next."""
    start = size = 0
    for place, tensor in enumerate(first, start=1):
        size += tensor.numel()
        if size >= CHUNK or place == len(first):
            yield first[start:place], second[start:place]
            start, size = place, 0
