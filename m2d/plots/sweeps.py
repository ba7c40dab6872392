"""Pictures of a sweep: what its trials chose, and which choices mattered."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from m2d.plots.style import FAINT, INK, new_figure, png, styled

_BEST = "#D55E00"
_CARD = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}  # behind a number, over the lines


def parallel_coordinates(
    chosen: Sequence[Mapping[str, float]],
    objectives: Sequence[float],
    whole: Sequence[bool],
    logarithmic: Mapping[str, bool],
) -> bytes:
    """PNG with an axis for each setting and one for the objective, a line for each trial; the best one thick.

    chosen: dotted setting -> value, one mapping a trial. objectives: lower is better; colours go by their rank.
    whole: whether a trial took all its steps; the objective of one that was stopped is of an earlier step, so its line
    is broken, and it is the best only where none is whole. logarithmic: whether a setting's axis is. ValueError where
    there is no trial.
    """
    if not chosen:
        raise ValueError("no trial to draw")
    names = [*logarithmic, "objective"]
    values = np.array([[*(one[name] for name in logarithmic), found] for one, found in zip(chosen, objectives)])
    places = np.column_stack([_place(values[:, k], logarithmic.get(name, False)) for k, name in enumerate(names)])
    rank = np.argsort(np.argsort(values[:, -1]))
    best_one = best_trial(objectives, whole)
    with styled():
        figure = new_figure(max(8.0, 1.7 * len(names)), 4.6)
        axes = figure.subplots()
        colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(values)))
        for trial in np.argsort(-values[:, -1]):
            best = trial == best_one
            axes.plot(
                range(len(names)), places[trial], color=_BEST if best else colours[rank[trial]],
                linewidth=3 if best else 1.3, alpha=1 if best else 0.75, zorder=3 if best else 2,
                linestyle="-" if whole[trial] else (0, (4, 3)),
            )  # fmt: skip
        for k, name in enumerate(names):
            _axis(axes, k, values[:, k], logarithmic.get(name, False))
        axes.set_xticks(range(len(names)), [_wrapped(name) for name in names])
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        stopped = "" if all(whole) else f"; broken lines: {len(whole) - sum(whole)} stopped early, judged as they stood"
        axes.set_title(
            f"{len(values)} trials; orange: the best, {objectives[best_one]:.4g}; dark: the better ones{stopped}"
        )
        return png(figure)


def best_trial(objectives: Sequence[float], whole: Sequence[bool]) -> int:
    """Index of the lowest objective among the trials that took all their steps; among all where none did."""
    candidates = [k for k, is_whole in enumerate(whole) if is_whole] or range(len(objectives))
    return min(candidates, key=lambda k: objectives[k])


def importance_chart(shares: Mapping[str, float], *, trials: int, report: int) -> bytes:
    """PNG of bars: the share of the objective's variance that each setting explains. {}: it says that it is unknown."""
    with styled():
        figure = new_figure(8, 1.3 + 0.45 * max(len(shares), 1))
        axes = figure.subplots()
        names = list(shares)
        axes.barh(range(len(names)), [100 * shares[name] for name in names], color="#0072B2", height=0.6)
        for y, name in enumerate(names):
            axes.text(100 * shares[name] + 1, y, f"{100 * shares[name]:.0f} %", va="center", color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xlabel("share of the objective's variance, %")
        few = "\nWith so few trials it is a hint, no more." if trials < 20 else ""
        figure.suptitle(f"What mattered, by fANOVA over {trials} trials at report {report}{few}", x=0.01, ha="left")
        if not names:
            axes.text(0.5, 0.5, "too few trials to tell", transform=axes.transAxes, ha="center", color=FAINT)
        return png(figure)


def _place(values: np.ndarray, logarithmic: bool) -> np.ndarray:
    """Between 0 and 1 along an axis; the middle where all are equal."""
    values = np.log(values) if logarithmic else values
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.full(len(values), 0.5)


def _axis(axes: Axes, k: int, values: np.ndarray, logarithmic: bool) -> None:
    """A vertical line with its lowest and its highest value, and a few between."""
    axes.axvline(k, color=FAINT, linewidth=0.8, zorder=1)
    low, high = values.min(), values.max()
    between = np.geomspace(low, high, 3) if logarithmic else np.linspace(low, high, 3)
    ticks = between if high > low else [low]
    for place, value in zip(_place(np.asarray(ticks), logarithmic), ticks):
        axes.text(k + 0.03, place, f"{value:.3g}", fontsize=8, color=INK, va="center", zorder=4, bbox=_CARD)


def _wrapped(name: str) -> str:
    group, _, last = name.rpartition(".")
    return f"{group}\n{last}" if group else last
