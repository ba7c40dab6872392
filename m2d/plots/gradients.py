"""How large the gradients of each network are. Telemetry calls it every so many steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from m2d.plots.style import FAINT, INK, LINE_COLOURS, new_figure, png, styled


def gradient_histogram(counts: dict[str, tuple[list[int], list[float]]], *, step: int) -> bytes:
    """PNG with a histogram of log10 |gradient| for each network, above each other on one x axis.

    counts: network to (K counts, K + 1 rising edges in log10). ValueError where the two do not fit.
    """
    return png(gradient_figure(counts, step=step))


def gradient_figure(counts: dict[str, tuple[list[int], list[float]]], *, step: int) -> Figure:
    """What gradient_histogram draws, as a figure."""
    for name, (heights, edges) in counts.items():
        if len(edges) != len(heights) + 1:
            raise ValueError(
                f"{name}: {len(heights)} counts and {len(edges)} edges; expected one edge more than counts"
            )
    with styled():
        figure = new_figure(8, 0.9 + 1.5 * max(len(counts), 1))
        if not counts:
            figure.text(0.5, 0.5, "no gradients recorded", ha="center", va="center", color=FAINT)
            return figure
        grid = figure.subplots(len(counts), 1, squeeze=False, sharex=True)[:, 0]
        for number, (axes, (name, (heights, edges))) in enumerate(zip(grid, counts.items(), strict=True)):
            total = sum(heights)
            colour = LINE_COLOURS[number % len(LINE_COLOURS)]
            axes.stairs(np.array(heights) / max(total, 1) * 100, edges, fill=True, color=colour, alpha=0.75)
            axes.set_ylim(bottom=0, top=None if total else 1)
            axes.set_title(f"{name}: {total:,} gradients" if total else f"{name}: no gradients")
            axes.set_ylabel("%")
            axes.yaxis.set_major_locator(MaxNLocator(3))
            if total:
                middle = median_of(heights, edges)
                axes.axvline(middle, color=INK, linewidth=1.2, linestyle="--", label=f"median {10**middle:.1e}")
                axes.legend(loc="upper left")
        grid[-1].xaxis.set_major_locator(MaxNLocator(9, integer=True))
        grid[-1].xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"1e{power:.0f}"))
        grid[-1].set_xlabel(f"|gradient| at step {step:,}")
        return figure


def median_of(heights: Sequence[int], edges: Sequence[float]) -> float:
    """The median of a histogram that is not empty, as if each bin were filled evenly; in the edges' unit."""
    filled = np.concatenate([[0.0], np.cumsum(heights, dtype=float)])
    half = filled[-1] / 2
    index = int(np.searchsorted(filled, half, side="right")) - 1
    within = (half - filled[index]) / heights[index]
    return float(edges[index] + within * (edges[index + 1] - edges[index]))
