"""Which way a measure is better, its best and last value, and how long a run's steps took."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from math import isfinite
from typing import Any, Literal, TypeGuard

from m2d.experiments.record import Record

Direction = Literal["lower", "higher"]
# A name that is not here has no direction that is known: kl and the two sides of a discriminator's game among them.
DIRECTIONS: dict[str, Direction] = {
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

Records = Sequence[Mapping[str, Any]]


def measure_names(records: Records, prefix: str = "") -> list[str]:
    """Names of the numbers that the records hold, in the order they come up; without step and time."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    return [name for name in names if name not in ("step", "time")]


def last_value(records: Records, name: str) -> float | None:
    """The last finite value of a measure; None where there is none."""
    return next((record[name] for record in reversed(records) if _is_finite(record.get(name))), None)


def best_value(records: Records, name: str) -> tuple[int, float] | None:
    """(step, value) of the best value; None where none is finite or which way is better is not known."""
    direction = DIRECTIONS.get(name)
    known = [(record["step"], float(record[name])) for record in records if _is_finite(record.get(name))]
    if not known or direction is None:
        return None
    return (min if direction == "lower" else max)(known, key=lambda point: point[1])


def training_seconds(record: Record, train: Records) -> float | None:
    """Seconds that the recorded steps took, by their images/s: no start, validation or pause between two tries.

    None where the record does not tell how many images a step has.
    """
    images = images_a_step(record)
    if images is None or not train:
        return None
    steps, seconds = 0, 0.0
    for entry in train:
        speed = entry.get("images_per_s")
        if _is_finite(speed) and speed > 0:
            seconds += (entry["step"] - steps) * images / speed
        steps = entry["step"]
    return seconds


def wall_seconds(record: Record, last: Mapping[str, Any] | None) -> float | None:
    """Seconds from its making to its end, or to its last record of metrics, pauses between two tries included."""
    try:
        ended = datetime.fromisoformat(str(record.info["finished"])).timestamp()
    except (KeyError, ValueError):
        time = (last or {}).get("time")
        if not _is_finite(time):
            return None
        ended = float(time)
    return max(ended - record.started.timestamp(), 0.0)


def seconds_left(record: Record, last: Mapping[str, Any] | None) -> float | None:
    """Seconds to the run's last step at its last speed; None where that is not known."""
    images, speed = images_a_step(record), (last or {}).get("images_per_s")
    if images is None or record.total_steps is None or not _is_finite(speed) or not speed:
        return None
    return (record.total_steps - record.steps_done) * images / float(speed)


def images_a_step(record: Record) -> int | None:
    """Images of one optimiser step, all workers together."""
    config = record.config
    factors = (config.get("batch_size"), config.get("gradient_accumulation_steps"), record.info.get("world_size"))
    product = 1
    for factor in factors:
        if not isinstance(factor, int):
            return None
        product *= factor
    return product


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and isfinite(value)
