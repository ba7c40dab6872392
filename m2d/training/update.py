"""One guarded optimiser update for several networks: clip, check, step, all on the device, without a host wait."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2d.training.settings import OptimizerConfig


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

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


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
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(rejected, op=dist.ReduceOp.MAX)  # a loss can be non-finite on one worker alone
    for network in networks:
        network.optimizer.grad_scale = None  # type: ignore[attr-defined]
        network.optimizer.found_inf = rejected.reshape(())  # type: ignore[attr-defined]
        network.optimizer.step()
        network.optimizer.zero_grad(set_to_none=True)
    if scaler.is_enabled():
        scaler.update()
    return rejected.reshape(()) == 0, norms
