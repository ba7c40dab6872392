"""Pictures of a sweep: what its trials chose, and which choices mattered."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from m2d.plots.style import FAINT, INK, LINE_COLOURS, drawn, new_figure

_CARD = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}  # behind a number, over the lines


@drawn
def parallel_coordinates(
    chosen: Sequence[Mapping[str, float]],
    objectives: Sequence[float],
    whole: Sequence[bool],
    logarithmic: Mapping[str, bool],
) -> Figure:
    """An axis for each setting and one for the objective, a line for each trial; the best one thick.

    chosen: dotted setting -> value, one mapping per trial. objectives: lower is better; colours go by their rank.
    whole: whether a trial took all its steps; the objective of one that was stopped is of an earlier step, so its line
    is broken, and it is the best only where none is whole. logarithmic: whether a setting's axis is. ValueError where
    there is no trial.
    """
    if not chosen:
        raise ValueError("no trial to draw")
    names = [*logarithmic, "objective"]
    values = np.array([[*(one[name] for name in logarithmic), found] for one, found in zip(chosen, objectives)])
    places = np.empty_like(values)  # between 0 and 1 along an axis; the middle where all are equal
    best_one = best_trial(objectives, whole)
    figure = new_figure(max(8.0, 1.7 * len(names)), 4.6)
    axes = figure.subplots()
    for k, name in enumerate(names):
        scale, spaced = (np.log, np.geomspace) if logarithmic.get(name) else (np.asarray, np.linspace)
        low, high = values[:, k].min(), values[:, k].max()
        span = scale(high) - scale(low)
        places[:, k] = (scale(values[:, k]) - scale(low)) / span if span > 0 else 0.5
        axes.axvline(k, color=FAINT, linewidth=0.8, zorder=1)
        for tick in spaced(low, high, 3) if span > 0 else [low]:
            at = (scale(tick) - scale(low)) / span if span > 0 else 0.5
            axes.text(k + 0.03, at, f"{tick:.3g}", fontsize=8, color=INK, va="center", zorder=4, bbox=_CARD)
    order = np.argsort(values[:, -1])
    colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(values)))
    for rank, trial in reversed(list(enumerate(order))):
        best = trial == best_one
        axes.plot(
            range(len(names)), places[trial], color=LINE_COLOURS[1] if best else colours[rank],
            linewidth=3 if best else 1.3, alpha=1 if best else 0.75, zorder=3 if best else 2,
            linestyle="-" if whole[trial] else (0, (4, 3))
        )  # fmt: skip
    axes.set_xticks(range(len(names)), ["\n".join(name.rsplit(".", 1)) for name in names])
    axes.set_yticks([])
    axes.set_ylim(-0.12, 1.12)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    stopped = "" if all(whole) else f"; broken lines: {len(whole) - sum(whole)} stopped early, judged as they stood"
    best_text = f"orange: the best, {objectives[best_one]:.4g}"
    axes.set_title(f"{len(values)} trials; {best_text}; dark: the better ones{stopped}")
    return figure


def best_trial(objectives: Sequence[float], whole: Sequence[bool]) -> int:
    """Index of the lowest objective among the trials that took all their steps; among all where none did."""
    candidates = [k for k, is_whole in enumerate(whole) if is_whole] or range(len(objectives))
    return min(candidates, key=lambda k: objectives[k])


@drawn
def importance_chart(shares: Mapping[str, float], *, trials: int, report: int) -> Figure:
    """Bars: the share of the objective's variance that each setting explains. {}: it says that it is unknown."""
    figure = new_figure(8, 1.3 + 0.45 * max(len(shares), 1))
    axes = figure.subplots()
    axes.barh(list(shares), [100 * share for share in shares.values()], color=LINE_COLOURS[0], height=0.6)
    for y, share in enumerate(shares.values()):
        axes.text(100 * share + 1, y, f"{100 * share:.0f} %", va="center", color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("share of the objective's variance, %")
    few = "\nWith so few trials it is a hint, no more." if trials < 20 else ""
    figure.suptitle(f"What mattered, by fANOVA over {trials} trials at report {report}{few}", x=0.01, ha="left")
    if not shares:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "too few trials to say", transform=axes.transAxes, ha="center", color=FAINT)
    return figure
