"""A telemetry log as curves: which values a name took at which steps, few enough to draw. Draws nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        known: np.ndarray = self.values[np.isfinite(self.values)]
        return known


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
    keep: list[int] = []
    for stretch in np.array_split(np.arange(len(one.steps)), most // 2):
        values = one.values[stretch]
        if np.isnan(values).all():
            keep.append(int(stretch[0]))
        else:
            keep.extend(sorted({int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}))
    return Series(one.steps[keep], one.values[keep])


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
