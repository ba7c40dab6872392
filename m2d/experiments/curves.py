"""Curves of a run's measures, drawn with braille dots: 2 x 4 to a character cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10
from statistics import median
from typing import Any

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column of a cell, Unicode 28xx
LOG_FROM = 100.0  # a measure whose largest value is this many times its smallest is drawn on a log axis


@dataclass(frozen=True)
class Curve:
    """A measure against the step, in the order of the steps."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def is_log(self) -> bool:
        """Whether its values span too much for a linear axis."""
        return min(self.values) > 0 and max(self.values) >= LOG_FROM * min(self.values)

    def thinned(self, points: int) -> "Curve":
        """At most so many points, each the median of its stretch of steps; the first and last step stay."""
        if len(self.steps) <= points:
            return self
        stretches: dict[int, list[int]] = {}
        first, span = self.steps[0], max(self.steps[-1] - self.steps[0], 1)
        for index, step in enumerate(self.steps):
            stretches.setdefault(min((step - first) * points // span, points - 1), []).append(index)
        groups = stretches.values()
        return Curve(
            self.name,
            (first, *(self.steps[group[-1]] for group in list(groups)[1:])),
            tuple(median(self.values[index] for index in group) for group in groups),
        )


def curves(records: Sequence[Mapping[str, Any]], *prefixes: str) -> list[Curve]:
    """A curve for each measure of the records whose name begins so, in the order of the prefixes, then by name.

    Values that are no finite number are left out, and measures with fewer than two of them.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(prefixes) and isinstance(value, (int, float)) and isfinite(value):
                points.setdefault(name, []).append((record["step"], float(value)))
    names = sorted(points, key=lambda name: (next(i for i, p in enumerate(prefixes) if name.startswith(p)), name))
    return [Curve(name, *zip(*points[name])) for name in names if len(points[name]) > 1]


def drawn(curve: Curve, width: int, height: int) -> list[str]:
    """The curve as `height` lines of `width` braille characters; its lowest value lies on the last line."""
    curve = curve.thinned(2 * width)
    columns, rows = 2 * width, 4 * height
    values = [log10(value) for value in curve.values] if curve.is_log else list(curve.values)
    low, span = min(values), max(values) - min(values)
    first, steps = curve.steps[0], curve.steps[-1] - curve.steps[0]
    xs = [round((step - first) / steps * (columns - 1)) if steps else 0 for step in curve.steps]
    # A curve that never changes runs through the middle.
    ys = [round((value - low) / span * (rows - 1)) if span else rows // 2 for value in values]
    cells = [[0] * width for _ in range(height)]
    for x, y in _joined(xs, ys):
        row = rows - 1 - y
        cells[row // 4][x // 2] |= DOTS[row % 4][x % 2]
    return ["".join(chr(0x2800 + dots) for dots in line) for line in cells]


def _joined(xs: Sequence[int], ys: Sequence[int]) -> list[tuple[int, int]]:
    """The points and what lies on the straight lines between them."""
    dots = [(xs[0], ys[0])]
    for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]):
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        dots += [(x0 + round((x1 - x0) * i / length), y0 + round((y1 - y0) * i / length)) for i in range(1, length + 1)]
    return dots
