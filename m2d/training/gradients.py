"""What the gradients of one step look like, part by part. The step calls it when it is asked to look; it waits for the
device, so not at every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOWEST, HIGHEST, BINS = -12.0, 4.0, 64  # of log10 |g|: what lies outside is counted in the outermost bins
_INDEXED = ("down_blocks", "up_blocks")  # lists of blocks: each block is a part of its own


@dataclass(frozen=True)
class GradientStatistics:
    """Of one step, before clipping."""

    norms: dict[str, float]  # `denoiser.unet.mid_block` and so on -> the L2 norm of its gradient
    histograms: dict[str, list[int]]  # network -> how many elements have log10 |g| in each of the BINS
    zeros: dict[str, float]  # network -> share of elements that are exactly 0, which no bin counts

    @property
    def edges(self) -> list[float]:
        """Of the bins, BINS + 1 values of log10 |g|."""
        return [LOWEST + (HIGHEST - LOWEST) * k / BINS for k in range(BINS + 1)]


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
            part = f"{network}.{part_of(name)}" if part_of(name) else network
            _add(squares, part, gradient.square().sum())
            size = gradient[gradient != 0].abs().log10()
            _add(counts, network, torch.histc(size.clamp(LOWEST, HIGHEST), bins=BINS, min=LOWEST, max=HIGHEST))
            _add(zeros, network, (gradient == 0).sum())
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
        depth = 3 if len(words) > 1 and words[1] in _INDEXED else 2
    return ".".join(words[:depth])


def _add(totals: dict[str, Tensor], key: str, value: Tensor) -> None:
    totals[key] = totals[key] + value if key in totals else value
