"""What a run is measured by: FLOPs and utilisation, speed, memory, gradients. The step and the loop call it."""

import re
import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from m2d.models.precision import DTYPES
from m2d.models.settings import Precision

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
    flop_formulas()
    with FlopCounterMode(display=False) as counter:
        compute()
    return int(counter.get_total_flops())


def flop_formulas() -> dict[Any, Any]:
    """torch's own registry, by operation, completed by attention on a CPU, which torch 2.11 does not count."""
    for backward in ("", "_backward"):
        gpu, cpu = (f"_scaled_dot_product_flash_attention{place}{backward}" for place in ("", "_for_cpu"))
        flop_registry.setdefault(getattr(torch.ops.aten, cpu), flop_registry[getattr(torch.ops.aten, gpu)])
    return flop_registry


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
        _synchronize(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput:
    """Images a second, the share of time that waits for data, and model FLOP utilisation, between two readings.

    `restart` leaves out what is not a step, such as saving.
    """

    def __init__(self, device: torch.device, precision: Precision | None, start: int, images_per_step: int) -> None:
        """precision: None where no FLOPs are counted. start: steps taken already. images_per_step: of all workers."""
        self.device, self.images_per_step = device, images_per_step
        self.peak = None if precision is None else peak_flops(device, DTYPES[precision])[0]  # FLOP/s
        self._flops: dict[Hashable, int] = {}
        self.restart(start)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    def count(self, kind: Hashable, compute: Callable[[], int]) -> None:
        """Note the FLOPs of the step to come; computed once for each kind of step, outside the time."""
        if self.peak is None:
            return
        if kind not in self._flops:
            _synchronize(self.device)
            began = time.perf_counter()
            self._flops[kind] = compute()
            _synchronize(self.device)
            self._began += time.perf_counter() - began
        self._computed += self._flops[kind]

    def read(self, done: int) -> dict[str, float]:
        """Since the last reading, `done` steps of the run being taken."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        values = {
            "images_per_s": (done - self._since) * self.images_per_step / seconds,  # of all workers
            "data_wait_share": self._waited / seconds,
        }
        if self.peak is not None:
            values["model_tflops_per_s"] = self._computed / seconds / 1e12  # of one worker
            values["model_flop_utilisation"] = self._computed / seconds / self.peak
        self.restart(done)
        return values

    def restart(self, done: int) -> None:
        """Start over after `done` steps."""
        self._since, self._began, self._waited, self._computed = done, time.perf_counter(), 0.0, 0


def peak_memory_gib(device: torch.device) -> float:
    """The most that was allocated on a GPU, or on a CPU the most that this process had resident, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20


LOWEST, HIGHEST, BINS = -12.0, 4.0, 64  # of log10 |g|: what lies outside is counted in the outermost bins
EDGES = [LOWEST + (HIGHEST - LOWEST) * k / BINS for k in range(BINS + 1)]


@dataclass(frozen=True)
class GradientStatistics:
    """Of one step, before clipping."""

    norms: dict[str, float]  # `denoiser.unet.mid_block` and so on -> the L2 norm of its gradient
    histograms: dict[str, list[int]]  # network -> how many elements have log10 |g| in each bin between EDGES
    zeros: dict[str, float]  # network -> share of elements that are exactly 0, which no bin counts


@torch.no_grad()
def gradient_statistics(networks: Mapping[str, nn.Module]) -> GradientStatistics:
    """Of every network that has gradients; parameters without one count as nothing. Elements that are no number too."""
    squares: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach().float()
            add_up(squares, ".".join(filter(None, (network, part_of(name)))), gradient.square().sum())
            size = gradient[gradient != 0].abs().log10()
            add_up(counts, network, torch.histc(size.clamp(LOWEST, HIGHEST), bins=BINS, min=LOWEST, max=HIGHEST))
            add_up(zeros, network, (gradient == 0).sum())
            sizes[network] = sizes.get(network, 0) + gradient.numel()
    return GradientStatistics(
        norms={part: total.sqrt().item() for part, total in squares.items()},
        histograms={network: [int(count) for count in total.tolist()] for network, total in counts.items()},
        zeros={network: total.item() / sizes[network] for network, total in zeros.items()},
    )


def part_of(parameter: str) -> str:
    """The part that a parameter belongs to: `unet.down_blocks.1`, `unet.mid_block`, `conditioning`, `vae.decoder`.

    Two levels deep under a network that wraps a diffusers model (`unet.`, `vae.`), and blocks by their number; the
    first level elsewhere. "" for a parameter of the network itself.
    """
    words = parameter.split(".")[:-1]  # without `weight` or `bias`
    depth = 1
    if words[:1] in (["unet"], ["vae"]):
        depth = 3 if words[1:2] in (["down_blocks"], ["up_blocks"]) else 2
    return ".".join(words[:depth])


def add_up(totals: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Add a value to its total, not in place."""
    totals[key] = totals[key] + value if key in totals else value
