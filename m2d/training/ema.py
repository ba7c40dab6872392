"""Exponential moving average of a module's parameters and float buffers, without a host synchronisation."""

import copy
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

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
