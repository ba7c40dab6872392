"""One style for every chart and picture: fonts, sizes, colours and markers. All of m2d/plots/ draws through it.

Charts are matplotlib Figures (no pyplot, so no global state of figures); pictures of pixels are PIL images (tiles.py).
"""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1A1A1A", "#5F5F5F", "#E3E3E3"
# Okabe-Ito without its yellow, which a line on white cannot carry.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
_DPI = 120
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9A9A9A",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_LOCK = threading.RLock()  # rcParams belong to the process: two threads that restore them crosswise would keep ours
P = ParamSpec("P")


@contextmanager
def styled() -> Iterator[None]:
    """M2D's style for the figures made and saved inside; rcParams are as they were afterwards, also after an error.

    It starts from matplotlib's own defaults, so a person's matplotlibrc does not change the pictures.
    """
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def drawn(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Makes a function that draws a Figure one that gives its PNG, in M2D's style."""

    @wraps(draw)
    @styled()
    def encoded(*args: P.args, **options: P.kwargs) -> bytes:
        return png(draw(*args, **options))

    return encoded


def new_figure(width: float, height: float, note: str = "") -> Figure:
    """A figure of `width` x `height` inches at 120 px an inch, its parts laid out without overlap. Inside styled().

    note: what it says in the middle where there is nothing to draw.
    """
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if note:
        figure.text(0.5, 0.5, note, ha="center", va="center", color=FAINT)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure: no date, no version inside."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def percent(share: float) -> str:
    """0.41 as "41 %", and a small one not as "0 %"."""
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1g} %"


_MARKERS = ("o", "s", "^", "D", "X", "v", "P", "*", "p", "h", "<", ">")


def edge_colour(colour: str) -> str:
    """A class colour for the edge of a marker: the same, but dark for one that is faint on white."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 190:
        return colour
    return f"#{round(0.32 * red):02X}{round(0.32 * green):02X}{round(0.32 * blue):02X}"


def class_marker(index: int) -> str:
    """The second cue for those who see the colours as one, and for more classes than colours can tell apart."""
    return _MARKERS[index % len(_MARKERS)]


def require_labels(labels: np.ndarray, count: int, classes: int) -> None:
    """ValueError unless there is a class index for each of `count` images (-1 would silently be the last class)."""
    if labels.shape != (count,):
        raise ValueError(f"labels are of shape {labels.shape} beside {count} images; expected one for each")
    if not np.isin(labels, range(classes)).all():
        raise ValueError(f"labels are {np.unique(labels)}; expected class indices from 0 to {classes - 1}")
