"""Sums over workers that also work with one."""

import torch.distributed as dist
from torch import Tensor


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
