"""In which type networks compute: one rule for training, generation and evaluation."""

import torch

from m2d.models.settings import Precision

DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(asked: Precision | None, device: torch.device) -> Precision:
    """What the user asked for, otherwise bf16 on a GPU that computes in it natively, otherwise no (float32).

    Emulated bf16 (before Ampere: T4, RTX 20xx, V100) is slower than float32; fp16 has to be asked for.
    """
    if asked is not None:
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
