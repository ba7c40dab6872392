"""The curves of a run from its telemetry records, a small chart for each quantity. Telemetry and the report call it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from m2d.plots.style import LINE_COLOURS, LINE_STYLES, drawn, new_figure

_LOOK_OF = {"autoencoder": 0, "VAE": 0, "denoiser": 1, "U-Net": 1, "discriminator": 2}  # the same in every chart
_ROUND = (1, 2, 5, 10)  # what ticks count in
_MOST_WITH_RAW = 3  # curves in one chart; behind more, what was recorded would be a grey cloud
_LOG_FROM = 10.0  # a curve that spans more than this factor, all of it above 0, is drawn on a logarithmic scale
MOST_POINTS = 600  # of a curve: about two for each pixel of a small chart's width
FEWEST_TO_SMOOTH = 10


@dataclass(frozen=True)
class Series:
    """steps [K], rising; values [K], NaN where what was recorded is not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The values that are numbers, [<= K]."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Panel:
    """One small chart. names: records' names to the curves' labels."""

    title: str
    names: dict[str, str]
    best: str = ""  # "min" or "max" where it is known which way is better
    noisy: bool = True  # False: drawn as recorded, with no running median
    logarithmic: bool = True  # if the values call for it
    from_zero: bool = False


_rate = partial(Panel, logarithmic=False, from_zero=True)
_state = partial(_rate, noisy=False)
_TRAINING = (
    Panel(
        "VAE: reconstruction, perceptual", {"loss/reconstruction": "reconstruction", "loss/perceptual": "perceptual"}
    ),
    Panel("VAE: KL divergence", {"loss/kl": "KL"}),
    Panel("U-Net: diffusion", {"loss/diffusion": "diffusion"}),
    Panel("Alignment (-1 is perfect)", {"loss/alignment": "U-Net", "loss/alignment_vae": "VAE"}),
    Panel("U-Net: manifold", {"loss/manifold": "manifold"}),
    Panel("VAE: adversarial", {"loss/adversarial": "adversarial"}),
    Panel("Discriminator", {"loss/discriminator": "discriminator"}),
)
_RUNNING = (
    _rate("Throughput (images/s)", {"images_per_s": "images/s"}),
    _rate("Share of time waiting for data", {"data_wait_share": "waiting"}),
    _rate("Model FLOP utilisation", {"model_flop_utilisation": "of the peak"}),
    _rate("TFLOP/s of one worker", {"model_tflops_per_s": "TFLOP/s"}),
    _state("Peak memory of one worker (GiB)", {"peak_memory_gib": "GiB"}),
    _state("Skipped steps so far", {"skipped_steps": "skipped"}),
)
_lower = partial(Panel, best="min", noisy=False)
_VALIDATION = (
    Panel("PSNR (dB, more is better)", {"val/psnr_db": "last"}, best="max", noisy=False, logarithmic=False),
    _lower("Perceptual distance (less is better)", {"val/perceptual": "last"}),
    _lower("Velocity error (less is better)", {"val/velocity_mse": "last"}),
    _lower("Kernel distance of samples (less is better)", {"val/kernel_distance": "last"}),
)


@drawn
def training_curves(records: Sequence[dict[str, Any]], *, columns: int = 3) -> Figure:
    """metrics/train.jsonl: losses, gradient norms, learning rates, throughput, and whatever else was recorded.

    Faint: as recorded (left out where more than three curves share a chart). Bold: running median; learning rates,
    memory and skipped steps are drawn as recorded. Steps run along the x axis, epochs above the top row where records
    have them. A quantity that no record has gets no chart. columns: charts side by side; 1 suits a phone.
    """
    return _figure(records, training_panels(records), columns, empty="no training records yet")


@drawn
def validation_curves(records: Sequence[dict[str, Any]], *, columns: int = 3) -> Figure:
    """metrics/validation.jsonl: a chart for each measure, its best value ringed where better is known."""
    panels = _present(_VALIDATION, names_of(records))
    return _figure(records, panels, columns, empty="no validation records yet", marked=True)


def training_panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """The charts that these records fill, in the order of a page. Nothing recorded is left out, but zero counters."""
    names = [name for name in names_of(records) if name != "skipped_steps" or any(r.get(name) for r in records)]
    rates = {name: name.partition("/")[2] for name in names if name.startswith("learning_rate/")}
    norms: dict[str, dict[str, str]] = {"Gradient norm": {}}
    for name in names:
        if name.startswith("gradient_norm/"):
            network, _, module = name.partition("/")[2].partition(".")
            title = f"Gradient norm within {network}" if module else "Gradient norm"
            norms.setdefault(title, {})[name] = module or network
    own = (_state("Learning rate", rates), *(Panel(title, inside) for title, inside in norms.items()))
    return _present((*_TRAINING, *own, *_RUNNING), names)


def _present(panels: Sequence[Panel], names: Sequence[str]) -> list[Panel]:
    """Known panels with the curves there are, then one for each unknown name."""
    known = {name for panel in panels for name in panel.names}
    found = [
        replace(panel, names={name: label for name, label in panel.names.items() if name in names})
        for panel in panels
        if any(name in names for name in panel.names)
    ]
    return found + [Panel(name, {name: name.rpartition("/")[2]}) for name in names if name not in known]


def _figure(
    records: Sequence[dict[str, Any]], panels: Sequence[Panel], columns: int, *, empty: str, marked: bool = False
) -> Figure:
    if not panels:
        return new_figure(6, 1, empty)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.0 * columns, 2.6 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    epochs = series(records, "epoch")
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _draw_panel(axes, panel, records, marked=marked)
        axes.tick_params(labelbottom=True)
        if number + columns >= len(panels):
            axes.set_xlabel("step")
        if number < columns:
            _epochs_above(axes, epochs)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[dict[str, Any]], *, marked: bool) -> None:
    looks = list(product(LINE_STYLES, LINE_COLOURS))
    curves = {label: series(records, name) for name, label in panel.names.items()}
    for number, (label, curve) in enumerate(curves.items()):
        line_style, colour = looks[_LOOK_OF.get(label, number) % len(looks)]
        few = marked or len(curve.steps) < FEWEST_TO_SMOOTH
        smooth = panel.noisy and not few
        bold = running_median(curve) if smooth else envelope(curve)
        if smooth and len(curves) <= _MOST_WITH_RAW:
            raw = envelope(curve)
            axes.plot(raw.steps, raw.values, color=colour, alpha=0.22, linewidth=0.8, zorder=2)
        axes.plot(
            bold.steps, bold.values, line_style, color=colour, marker="o" if few else "", markersize=4, zorder=3,
            label=f"{label} {_number(bold.finite[-1])}" if len(bold.finite) else f"{label}: not finite"
        )  # fmt: skip
        if panel.best and len(curve.finite):
            at = np.nanargmax(curve.values) if panel.best == "max" else np.nanargmin(curve.values)
            axes.plot(
                curve.steps[at], curve.values[at], "o", markersize=11, markerfacecolor="none", linestyle="none",
                markeredgecolor=LINE_COLOURS[1], markeredgewidth=1.6,
                label=f"best {_number(curve.values[at])} at {curve.steps[at]:,.0f}"
            )  # fmt: skip
    _scale(axes, panel, list(curves.values()))
    axes.set_title(panel.title)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if len(curves) > _MOST_WITH_RAW:  # below, for inside it would cover the curves
        axes.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14), borderaxespad=0)
    else:
        axes.legend()


def _number(value: float) -> str:
    """Four digits that count, without an exponent where it can be read so."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _scale(axes: Axes, panel: Panel, curves: Sequence[Series]) -> None:
    """Logarithmic where values span decades; room around a flat curve, so that rounding does not look like a change."""
    values = np.concatenate([curve.finite for curve in curves])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if panel.logarithmic and low > 0 and high > _LOG_FROM * low:
        axes.set_yscale("log")
        decades = np.log10(high / low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
    elif high - low < 0.001 * max(abs(low), abs(high)):
        margin = 0.01 * max(abs(low), abs(high)) or 1.0
        axes.set_ylim(low - margin, high + margin)
    if panel.from_zero and low >= 0:
        axes.set_ylim(bottom=0, top=None if high > 0 else 1)


def _epochs_above(axes: Axes, epochs: Series) -> None:
    """Ticks at whole epochs (at parts of one where there are no more), placed by the records themselves."""
    known = np.isfinite(epochs.values)
    steps, values = epochs.steps[known], epochs.values[known]
    if len(values) < 2 or not np.all(np.diff(values) > 0):
        return  # nothing to place ticks by, or a log whose epochs run backwards
    whole = values[-1] - values[0] >= 2
    ticks = MaxNLocator(5, integer=whole, steps=_ROUND).tick_values(values[0], values[-1])
    ticks = [tick for tick in ticks if values[0] <= tick <= values[-1]]
    labels = [f"{tick:g}" if number else f"epoch {tick:g}" for number, tick in enumerate(ticks)]
    above = axes.secondary_xaxis("top")
    above.set_ticks(np.interp(ticks, values, steps).tolist(), labels)
    above.spines["top"].set_visible(False)


def series(records: Sequence[dict[str, Any]], name: str) -> Series:
    """What `name` was at each step that has it. A step recorded twice (a resumed run) counts as recorded last."""
    found: dict[float, float] = {}
    for record in records:
        value = record.get(name)
        if isinstance(value, int | float) and "step" in record:
            found[record["step"]] = float(value) if math.isfinite(value) else math.nan
    steps = sorted(found)
    return Series(np.array(steps, dtype=float), np.array([found[step] for step in steps], dtype=float))


def names_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Every name with a number in it, in the order of their first appearance; not `step`, `time` and `epoch`."""
    names = dict.fromkeys(
        name for record in records for name, value in record.items() if isinstance(value, int | float)
    )
    return [name for name in names if name not in ("step", "time", "epoch")]


def envelope(one: Series, most: int = MOST_POINTS) -> Series:
    """The curve in at most `most` points: each stretch's lowest and highest value, so that no spike is lost."""
    if len(one.steps) <= most:
        return one
    keep: set[int] = set()
    for stretch in np.array_split(np.arange(len(one.steps)), most // 2):
        known = stretch[np.isfinite(one.values[stretch])]
        if len(known):
            keep |= {int(known[one.values[known].argmin()]), int(known[one.values[known].argmax()])}
        else:
            keep.add(int(stretch[0]))
    return Series(one.steps[sorted(keep)], one.values[sorted(keep)])


def running_median(one: Series, most: int = MOST_POINTS // 2) -> Series:
    """The course without its noise: the median over a window of a twentieth of the curve.

    At the start, where a loss falls fast, the window is only as wide as it can be on both sides; at the end it looks
    back, so that the last value is no single record's. Long curves are first reduced to `most` medians of stretches.
    Values that are not finite are left out. Fewer than ten points stay as they are.
    """
    known = np.isfinite(one.values)
    steps, values = one.steps[known], one.values[known]
    if len(steps) < FEWEST_TO_SMOOTH:
        return Series(steps, values)
    if len(steps) > most:
        stretches = np.array_split(np.arange(len(steps)), most)
        values = np.array([np.median(values[stretch]) for stretch in stretches])
        steps = np.array([steps[stretch].mean() for stretch in stretches])
    reach = max(2, len(steps) // 40)
    smooth = [np.median(values[max(0, i - reach) : i + min(reach, i) + 1]) for i in range(len(steps))]
    return Series(steps, np.array(smooth))
