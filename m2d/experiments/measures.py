"""A run's measures: which way each is better, its best and last value, its curve."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from m2d.experiments.record import is_finite

# A name that is not here has no direction that is known: kl and the two sides of a discriminator's game among them.
DIRECTIONS: dict[str, Literal["lower", "higher"]] = {
    "val/psnr_db": "higher",
    "val/perceptual": "lower",
    "val/velocity_mse": "lower",
    "loss/diffusion": "lower",
    "loss/reconstruction": "lower",
    "loss/perceptual": "lower",
    "loss/alignment": "lower",  # minus a cosine
    "loss/alignment_vae": "lower",
    "loss/manifold": "lower",
    "images_per_s": "higher",
}
CURVE_POINTS = 200  # of a curve in --json; metrics/train.jsonl holds them all

Records = Sequence[Mapping[str, Any]]


def measure_names(records: Records, prefix: str = "") -> list[str]:
    """Names of the numbers that the records hold, in the order they come up; without step and time."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    return [name for name in names if name not in ("step", "time")]


def last_value(records: Records, name: str) -> float | None:
    """The last finite value of a measure; None where there is none."""
    return next((record[name] for record in reversed(records) if is_finite(record.get(name))), None)


def best_value(records: Records, name: str) -> tuple[int, float] | None:
    """(step, value) of the best value; None where none is finite or which way is better is not known."""
    known, direction = _points(records, name), DIRECTIONS.get(name)
    if not known or direction is None:
        return None
    return (min if direction == "lower" else max)(known, key=lambda point: point[1])


def curve(records: Records, name: str, points: int = CURVE_POINTS) -> dict[str, list[Any]] | None:
    """{steps, values} of a measure's finite values; None for fewer than two.

    At most so many points, each the median of its stretch of steps; the first and the last step stay.
    """
    known = _points(records, name)
    if len(known) < 2:
        return None
    first, span = known[0][0], max(known[-1][0] - known[0][0], 1)
    stretches: dict[int, list[tuple[int, float]]] = {}
    for index, (step, value) in enumerate(known):
        place = index if len(known) <= points else min((step - first) * points // span, points - 1)
        stretches.setdefault(place, []).append((step, value))
    groups = list(stretches.values())
    return {
        "steps": [first, *(group[-1][0] for group in groups[1:])],
        "values": [median(value for _, value in group) for group in groups],
    }


def _points(records: Records, name: str) -> list[tuple[int, float]]:
    return [(record["step"], float(record[name])) for record in records if is_finite(record.get(name))]
