"""In which type networks compute: one rule for training, generation and evaluation; group norms that keep it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d.models.settings import Precision

DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(asked: Precision | None, device: torch.device) -> Precision:
    """What the user asked for, otherwise bf16 on a GPU that computes in it natively, otherwise no (float32).

    Emulated bf16 (before Ampere: T4, RTX 20xx, V100) is slower than float32; fp16 has to be asked for.
    """
    if asked is not None:
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


class GroupNorm(nn.GroupNorm):
    """torch's, but the output has the input's type, in bf16 and fp16 too.

    CUDA's autocast computes group norms in float32 and keeps the result for the backward pass, beside the copy that the
    next convolution needs: a VAE then saves 14 % of its memory by bf16 instead of half. The kernel accumulates in
    float32 whatever its input's type is.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...]."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def keep_input_type(network: nn.Module) -> None:
    """Make every group norm of a network one of these; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
