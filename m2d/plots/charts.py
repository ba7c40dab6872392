"""Charts of a run's features by class and of its gradients. Telemetry calls them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from m2d.classes import CLASSES, DIAGNOSES
from m2d.plots.features import Projection, class_similarities, project_cls
from m2d.plots.style import (
    FAINT,
    INK,
    LINE_COLOURS,
    class_colours,
    class_edges,
    class_markers,
    new_figure,
    percent,
    png,
    styled,
)
from m2d.plots.tiles import require_labels

_KEYS = {
    "generated_to_own": "generated,\nown class",
    "real_to_own": "real,\nown class",
    "generated_to_others": "generated,\nother classes",
    "real_to_others": "real,\nother classes",
}


def cls_projection(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, generated_labels: np.ndarray
) -> bytes:
    """PNG of the two principal components of real `cls` features, generated ones placed among them.

    real [N, D], generated [M, D]; labels: class indices. A chart of all classes, then one for each: its real images
    hollow, its generated ones filled, all other real ones grey. Titles give the counts. The axes hold the middle 90 %
    of both and room around; what is beyond is drawn at the edge, so that outliers do not squash the rest.
    """
    require_labels(real_labels, len(real))
    require_labels(generated_labels, len(generated))
    return png(projection_figure(project_cls(real, generated), real_labels, generated_labels))


def projection_figure(projection: Projection, real_labels: np.ndarray, generated_labels: np.ndarray) -> Figure:
    """What cls_projection draws, as a figure."""
    low, high = _limits(projection)
    real, generated = projection.real.clip(low, high), projection.generated.clip(low, high)
    with styled():
        figure = new_figure(12, 6.8)
        grid = figure.subplots(2, 4, sharex=True, sharey=True).ravel()
        for axes, label in zip(grid, (None, *range(len(CLASSES))), strict=True):
            shown = range(len(CLASSES)) if label is None else [label]
            if label is not None:
                others = real[real_labels != label]
                axes.scatter(others[:, 0], others[:, 1], s=6, color="#CFCFCF", linewidths=0)
            # The largest class first, so that it does not bury the others.
            for one in sorted(shown, key=lambda index: -int((real_labels == index).sum())):
                _scatter(axes, real[real_labels == one], CLASSES[one], filled=False)
            for one in shown:
                _scatter(axes, generated[generated_labels == one], CLASSES[one], filled=True)
            name = "all classes" if label is None else f"{CLASSES[label]} {DIAGNOSES[label].name}"
            counts = [int(np.isin(found, shown).sum()) for found in (real_labels, generated_labels)]
            axes.set_title(f"{name}\n{counts[0]:,} real, {counts[1]:,} generated", fontsize=10)
        margin = np.where(high > low, (high - low) / 20, 1.0)  # so that a marker at the edge is whole
        left, bottom, right, top = *(low - margin), *(high + margin)
        grid[0].set(xlim=(left, right), ylim=(bottom, top))  # shared by all
        for axes, part, name in zip((grid[4], grid[0]), projection.share, ("x", "y"), strict=True):
            getattr(axes, f"set_{name}label")(f"component, {percent(part)} of the variance")
        figure.suptitle(
            "Features of real (hollow) and generated (filled) images. Axes: principal components of real ones only. "
            "The furthest are at the edge.",
            fontsize=10,
        )
        return figure


def class_similarity(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, generated_labels: np.ndarray
) -> tuple[bytes, dict[str, dict[str, float]]]:
    """PNG of how alike generated and real `cls` features are by class, and the numbers: see class_similarities."""
    require_labels(real_labels, len(real))
    require_labels(generated_labels, len(generated))
    numbers = class_similarities(real, real_labels, generated, generated_labels)
    counts = {
        code: (int((real_labels == label).sum()), int((generated_labels == label).sum()))
        for label, code in enumerate(CLASSES)
    }
    return png(similarity_figure(numbers, counts)), numbers


def similarity_figure(numbers: dict[str, dict[str, float]], counts: dict[str, tuple[int, int]]) -> Figure:
    """What class_similarity draws, as a figure. counts: class code to its real and its generated images."""
    with styled():
        figure = new_figure(11, 4.2)
        axes, table = figure.subplots(1, 2, width_ratios=(1.1, 1))
        table.set_axis_off()
        table.set_xlim(0, len(_KEYS) + 1)
        table.set_ylim(len(CLASSES) - 0.5, -0.5)
        for column, heading in enumerate(("images\nreal, gen.", *_KEYS.values())):
            table.text(column + 0.9, -0.55, heading, ha="right", va="bottom", fontsize=8, color=FAINT)
        for row, code in enumerate(CLASSES):
            found, edge, marker = numbers[code], class_edges()[code], class_markers()[code]
            own, others = found.get("generated_to_own"), found.get("generated_to_others")
            if own is not None and others is not None:
                axes.plot([others, own], [row, row], color=edge, linewidth=1, alpha=0.5, zorder=2)
            if others is not None:
                axes.plot(others, row, "|", color=edge, markersize=13, markeredgewidth=2, zorder=3)
            look = {"marker": marker, "linestyle": "none", "markeredgecolor": edge}
            if "real_to_own" in found:
                axes.plot(found["real_to_own"], row, markerfacecolor="white", markersize=11, zorder=3, **look)
            if own is not None:
                axes.plot(own, row, markerfacecolor=class_colours()[code], markersize=8, zorder=4, **look)
            cells = [f"{found[key]:+.2f}" if key in found else "–" for key in _KEYS]
            for column, text in enumerate((f"{counts[code][0]:,}, {counts[code][1]:,}", *cells)):
                table.text(column + 0.9, row, text, ha="right", va="center", fontsize=9, color=INK if column else FAINT)
        axes.axvline(0, color="#9A9A9A", linewidth=1)
        axes.set_yticks(range(len(CLASSES)), CLASSES)
        axes.set_ylim(len(CLASSES) - 0.5, -0.5)
        axes.set_xlabel("mean cosine with real images, features centred")
        axes.set_title("● generated and ○ real with own class; | generated with others")
        return figure


def _limits(projection: Projection) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner, [2] each, of the middle 90 % of real and of generated points, with room around."""
    groups = [points for points in (projection.real, projection.generated) if len(points)]
    if not groups:
        return np.zeros(2), np.zeros(2)
    low = np.min([np.percentile(points, 5, axis=0) for points in groups], axis=0)
    high = np.max([np.percentile(points, 95, axis=0) for points in groups], axis=0)
    room = (high - low) * 0.4
    return low - room, high + room


def _scatter(axes: Axes, points: np.ndarray, code: str, *, filled: bool) -> None:
    crowd = len(points) > 1000
    axes.scatter(
        points[:, 0],
        points[:, 1],
        marker=class_markers()[code],
        s=30 if filled else 9 if crowd else 14,
        facecolors=class_colours()[code] if filled else "none",
        edgecolors=INK if filled else class_edges()[code],
        linewidths=0.5 if filled else 0.7,
        alpha=1.0 if filled else 0.35 if crowd else 0.6,
        zorder=4 if filled else 3,
    )


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


@styled()
def confusion_matrix_picture(confusion: Sequence[Sequence[int]], title: str) -> bytes:
    """Of a probe: colours are shares of the true class, numbers are images."""
    figure = new_figure(6.4, 5.6)
    axes = figure.subplots()
    confusion_map(axes, confusion, title, "true", counts=True)
    figure.colorbar(axes.images[0], ax=axes, shrink=0.8, label="share of the true class")
    return png(figure)


def confusion_map(axes: Axes, confusion: Sequence[Sequence[int]], title: str, rows: str, *, counts: bool) -> None:
    """Draw a confusion matrix: colours and, without `counts`, numbers are shares of a row."""
    matrix = np.array(confusion)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.grid(visible=False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share):
        if matrix[row].sum():
            text = f"{matrix[row, column]:,}" if counts else f"{100 * value:.0f}"
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45)
    axes.set_yticks(range(len(CLASSES)), [f"{code} ({matrix[k].sum():,})" for k, code in enumerate(CLASSES)])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("classified as")
    axes.set_ylabel(rows)
