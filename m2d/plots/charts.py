"""Charts of a run's features by class, with the numbers that they show, of its gradients and of confusions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from m2d.classes import CLASSES, DIAGNOSES
from m2d.plots.style import (
    CLASS_EDGES,
    CLASS_MARKERS,
    FAINT,
    INK,
    LINE_COLOURS,
    class_colours,
    drawn,
    new_figure,
    percent,
    png,
    require_labels,
    styled,
)

_KEYS = {
    "generated_to_own": "generated,\nown class",
    "real_to_own": "real,\nown class",
    "generated_to_others": "generated,\nother classes",
    "real_to_others": "real,\nother classes",
}


@drawn
def cls_projection(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, generated_labels: np.ndarray
) -> Figure:
    """The two principal components of real `cls` features, generated ones placed among them, see project_cls.

    real [N, D], generated [M, D]; labels: class indices. A chart of all classes, then one for each: its real images
    hollow, its generated ones filled, all other real ones grey. Titles give the counts. The axes hold the middle 90 %
    of both and room around; what is beyond is drawn at the edge, so that outliers do not squash the rest.
    """
    require_labels(real_labels, len(real))
    require_labels(generated_labels, len(generated))
    real, generated, shares = project_cls(real, generated)
    groups = [points for points in (real, generated) if len(points)] or [np.zeros((1, 2))]
    low = np.min([np.percentile(points, 5, axis=0) for points in groups], axis=0)
    high = np.max([np.percentile(points, 95, axis=0) for points in groups], axis=0)
    room = (high - low) * 0.4
    low, high = low - room, high + room
    real, generated = real.clip(low, high), generated.clip(low, high)
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
        counts = np.isin(real_labels, shown).sum(), np.isin(generated_labels, shown).sum()
        axes.set_title(f"{name}\n{counts[0]:,} real, {counts[1]:,} generated", fontsize=10)
    margin = np.where(high > low, (high - low) / 20, 1.0)  # so that a marker at the edge is whole
    (left, bottom), (right, top) = low - margin, high + margin
    grid[0].set(xlim=(left, right), ylim=(bottom, top))  # shared by all
    grid[4].set_xlabel(f"component, {percent(shares[0])} of the variance")
    grid[0].set_ylabel(f"component, {percent(shares[1])} of the variance")
    figure.suptitle(
        "Features of real (hollow) and generated (filled) images. Axes: principal components of real ones only. "
        "The furthest are at the edge.",
        fontsize=10,
    )
    return figure


def _scatter(axes: Axes, points: np.ndarray, code: str, *, filled: bool) -> None:
    crowd = len(points) > 1000
    axes.scatter(
        points[:, 0],
        points[:, 1],
        marker=CLASS_MARKERS[code],
        s=30 if filled else 9 if crowd else 14,
        facecolors=class_colours()[code] if filled else "none",
        edgecolors=INK if filled else CLASS_EDGES[code],
        linewidths=0.5 if filled else 0.7,
        alpha=1.0 if filled else 0.35 if crowd else 0.6,
        zorder=4 if filled else 3,
    )


def project_cls(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates [N, 2] of real features [N, D], [M, 2] of generated ones [M, D], and shares [2] of the variance.

    Principal components of the REAL features; generated ones only fall where they fall. Both are standardised by the
    real ones' mean and deviation. Labels play no part: a projection that looks for the classes would show them apart
    even where the features do not. Without real features all is 0.
    """
    real, generated = _finite(real), _finite(generated)
    if not len(real):
        return np.zeros((0, 2)), np.zeros((len(generated), 2)), np.zeros(2)
    mean, spread = real.mean(axis=0), real.std(axis=0)
    spread = np.where(spread > 1e-12 * np.abs(mean), spread, np.inf)  # a constant feature says nothing
    real, generated = (real - mean) / spread, (generated - mean) / spread
    centre, axes, shares = principal_components(real, 2)
    return (real - centre) @ axes.T, (generated - centre) @ axes.T, shares


def principal_components(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], the `count` directions [count, D] of most variance of features [M, D], and their shares of it.

    The sign of each is such that its largest entry is positive, so that a picture does not turn over from one epoch to
    the next. Where M or D is too small, or the variance 0, directions and shares are 0.
    """
    features = _finite(features)
    size, dim = features.shape
    mean = features.mean(axis=0) if size else np.zeros(dim)
    centred = features - mean
    # The smaller of the two symmetric matrices: an image's patches are many or few, and both give the same components.
    gram = dim > size
    product = centred @ centred.T if gram else centred.T @ centred
    values, vectors = np.linalg.eigh(product)
    total = float(np.trace(product))
    # What is left when equal rows are centred.
    rounding = features.size * (1e-14 * float(np.abs(features).max(initial=0.0))) ** 2
    axes, share = np.zeros((count, dim)), np.zeros(count)
    for rank, index in enumerate(np.argsort(values)[::-1][:count]):
        if values[index] > max(1e-12 * total, rounding):
            axis = vectors[:, index] @ centred if gram else vectors[:, index]
            axis = axis / np.linalg.norm(axis)
            axes[rank] = axis * np.sign(axis[np.abs(axis).argmax()])
            share[rank] = values[index] / total
    return mean, axes, share


def class_similarity(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, generated_labels: np.ndarray
) -> tuple[bytes, dict[str, dict[str, float]]]:
    """PNG of how alike generated and real `cls` features are by class, and the numbers: see class_similarities."""
    require_labels(real_labels, len(real))
    require_labels(generated_labels, len(generated))
    numbers = class_similarities(real, real_labels, generated, generated_labels)
    counts = [np.bincount(labels, minlength=len(CLASSES)) for labels in (real_labels, generated_labels)]
    return png(similarity_figure(numbers, dict(zip(CLASSES, zip(*counts), strict=True)))), numbers


@styled()
def similarity_figure(numbers: dict[str, dict[str, float]], counts: dict[str, tuple[int, int]]) -> Figure:
    """What class_similarity draws. counts: class code to its real and its generated images."""
    figure = new_figure(11, 4.2)
    axes, table = figure.subplots(1, 2, width_ratios=(1.1, 1))
    table.set_axis_off()
    table.set(xlim=(0, len(_KEYS) + 1), ylim=(len(CLASSES) - 0.5, -0.5))
    for column, heading in enumerate(("images\nreal, gen.", *_KEYS.values())):
        table.text(column + 0.9, -0.55, heading, ha="right", va="bottom", fontsize=8, color=FAINT)
    for row, code in enumerate(CLASSES):
        found, edge = numbers[code], CLASS_EDGES[code]
        own, others = found.get("generated_to_own"), found.get("generated_to_others")
        if own is not None and others is not None:
            axes.plot([others, own], [row, row], color=edge, linewidth=1, alpha=0.5, zorder=2)
        if others is not None:
            axes.plot(others, row, "|", color=edge, markersize=13, markeredgewidth=2, zorder=3)
        look = {"marker": CLASS_MARKERS[code], "linestyle": "none", "markeredgecolor": edge}
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


def class_similarities(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, generated_labels: np.ndarray
) -> dict[str, dict[str, float]]:
    """For each class the mean cosine between its features and real ones, after centring; in [-1, 1].

    real [N, D], generated [M, D]; labels: class indices. Keys of a class: "generated_to_own" and "generated_to_others"
    (its generated against real features of its class and of the others), "real_to_own" (real against the other real of
    its class: no feature meets itself) and "real_to_others". Each other class counts the same, however many images it
    has. The centre is the mean of the real classes' means: with the plain mean the largest class would be the centre
    and its cosines noise. A number that cannot be had (no images, or one alone) is left out.
    """
    real, generated = _finite(real), _finite(generated)
    members = [real[real_labels == label] for label in range(len(CLASSES))]
    if not len(real):
        return {code: {} for code in CLASSES}
    centre = np.mean([features.mean(axis=0) for features in members if len(features)], axis=0)
    units = [_unit(features, centre) for features in members]
    # The mean cosine of all pairs of two sets is the product of their mean unit vectors.
    means = [own.mean(axis=0) if len(own) else None for own in units]
    numbers: dict[str, dict[str, float]] = {code: {} for code in CLASSES}
    for label, (code, own) in enumerate(zip(CLASSES, units, strict=True)):
        others = [mean for other, mean in enumerate(means) if other != label and mean is not None]
        drawn_units = _unit(generated[generated_labels == label], centre)
        found = numbers[code]
        if len(drawn_units):
            mean = drawn_units.mean(axis=0)
            if means[label] is not None:
                found["generated_to_own"] = float(mean @ means[label])
            if others:
                found["generated_to_others"] = float(np.mean([mean @ other for other in others]))
        if len(own) > 1:  # all pairs less the rows with themselves
            total = own.sum(axis=0)
            found["real_to_own"] = float((total @ total - np.square(own).sum()) / (len(own) * (len(own) - 1)))
        if len(own) and others:
            found["real_to_others"] = float(np.mean([means[label] @ other for other in others]))
    return numbers


def _unit(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Centred rows of length 1; rows on the centre stay 0, so their cosine with anything is 0."""
    centred = features - centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    on_centre = lengths <= 1e-12 * np.linalg.norm(centre)
    return np.where(on_centre, 0.0, centred / np.where(on_centre, 1.0, lengths))


def _finite(features: np.ndarray) -> np.ndarray:
    """As float64 [M, D]; ValueError for another shape or a value that is not finite."""
    features = np.asarray(features, dtype=float)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"features of shape {features.shape} must be [M, D] and finite")
    return features


@drawn
def gradient_histogram(counts: dict[str, tuple[list[int], list[float]]], *, step: int) -> Figure:
    """A histogram of log10 |gradient| for each network, above each other on one x axis.

    counts: network to (K counts, K + 1 rising edges in log10).
    """
    if not counts:
        return new_figure(8, 2.4, "no gradients recorded")
    figure = new_figure(8, 0.9 + 1.5 * len(counts))
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


@drawn
def confusion_matrix_picture(confusion: Sequence[Sequence[int]], title: str) -> Figure:
    """Of a probe: colours are shares of the true class, numbers are images."""
    figure = new_figure(6.4, 5.6)
    axes = figure.subplots()
    confusion_map(axes, confusion, title, "true", counts=True)
    figure.colorbar(axes.images[0], ax=axes, shrink=0.8, label="share of the true class")
    return figure


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
