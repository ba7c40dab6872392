"""Exponential moving average of a module's parameters and float buffers, without a host synchronisation."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Ema(Generic[NetworkT]):
    """Keeps `module`, a frozen copy that follows the trained one.

    Decay at update n is min(decay, (1 + n) / (warmup + n)), so that early averages forget the random start. Buffers are
    averaged too: the latent batch norm's statistics must suit the averaged weights (REPA-E).
    """

    def __init__(self, source: NetworkT, decay: float, warmup: float = 10.0) -> None:
        self.module: NetworkT = copy.deepcopy(source)
        self.module.eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = torch.zeros((), device=next(source.parameters()).device)

    @torch.no_grad()
    def update(self, source: nn.Module, accepted: Tensor | None = None) -> None:
        """Follow `source`. accepted: a 0-dim bool on the device; False leaves everything as it was."""
        step_taken = torch.ones_like(self.updates) if accepted is None else accepted.to(self.updates.dtype)
        decay = torch.clamp((1 + self.updates) / (self.warmup + self.updates), max=self.decay)
        weight = (1 - decay) * step_taken
        averaged, current = _float_tensors(self.module), _float_tensors(source)
        difference = torch._foreach_sub(current, averaged)
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
