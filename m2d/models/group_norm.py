"""Group norm in the type of its input.

CUDA's autocast computes group norms in float32 and keeps the result for the backward pass, beside the copy that the
next convolution wants: a VAE then saves 14 % of its memory by bf16 instead of half. The kernel accumulates in float32
whatever its input's type is, and keeps mean and deviation in the input's: means of many deviations lose digits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's, but what comes in as bf16 or fp16 goes out so; float32 is as it was."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...]."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def keep_input_type(network: nn.Module) -> None:
    """Make every group norm of a network one of these, its parameters and their names as they are."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
