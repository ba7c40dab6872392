"""Model FLOP utilisation: what a step computes, beside what the device could. The worker calls it at a run's start."""

import re
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense tensor-core FLOP/s in bf16 (fp16 where there is none) with float32 sums, by NVIDIA's data sheets.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H200 NVL": 835e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "A100": 312e12, "A40": 150e12, "A10": 125e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12, "RTX A5000": 111e12, "RTX A4000": 77e12,
    "RTX 4090": 165e12, "RTX 4080": 97.5e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12,
}  # fmt: skip
# A name is a whole word, the longest one that fits, and not that of a variant, a laptop's chip or a slice of a GPU.
_NAMES = re.compile(
    rf"\b({'|'.join(sorted(PEAKS, key=len, reverse=True))})\b(?! (?:Ti|SUPER|D|Laptop|Max-Q)\b)(?!.*\bMIG\b)"
)


def count_flops(compute: Callable[[], object]) -> int:
    """Run `compute` once and count what its matrix products, convolutions and attentions take, forward and backward.

    A multiplication and an addition are two. Element-wise work is not counted, as is usual for utilisation; the second
    forward pass of gradient checkpointing is, so utilisation is then that of the hardware rather than of the model.
    """
    with FlopCounterMode(display=False) as counter:
        compute()
    return int(counter.get_total_flops())


def known_peak(device_name: str) -> float | None:
    """FLOP/s of a GPU by its data sheet; None where it is not in the table."""
    found = _NAMES.search(device_name)
    return PEAKS[found[1]] if found else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s that the device could reach, where the number comes from).

    bf16 and fp16 on a known GPU: the data sheet. Anything else: the fastest of several matrix products measured here,
    with the threads that training has.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known, "data sheet, dense"
    return measured_peak(device, dtype), "matrix product measured at the start"


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a size x size matrix product in dtype, the best of as many as fit in `seconds`."""
    size = size if device.type == "cpu" else 4 * size
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    torch.mm(a, a)
    while time.perf_counter() < until or best == float("inf"):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
