"""What a sweep may choose a setting from, as a person writes it: `loguniform(0.1, 10)`. Light: knows no Ray."""

import re
from dataclasses import dataclass
from math import isfinite, log
from typing import Literal

from m2d.errors import ConfigError

Kind = Literal["loguniform", "uniform", "choice", "fixed"]
_FORM = re.compile(r"\s*(\w+)\s*\(([^()]*)\)\s*")


@dataclass(frozen=True)
class Distribution:
    """Where a setting's values come from. numbers: low and high of a range, or the values themselves."""

    kind: Kind
    numbers: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether a grid can hold every value."""
        return self.kind in ("choice", "fixed")

    @property
    def is_logarithmic(self) -> bool:
        """Whether equal ratios are equally likely, so that a plot's axis should be logarithmic."""
        return self.kind == "loguniform" or (
            self.kind == "choice" and min(self.numbers) > 0 and log(max(self.numbers) / min(self.numbers)) > log(10)
        )


def parse_distribution(setting: str, text: str) -> Distribution:
    """The distribution that `text` describes. Raises ConfigError, which names the setting, for anything else."""
    forms = "loguniform(low, high), uniform(low, high), choice(a, b, ...) or fixed(a)"
    matched = _FORM.fullmatch(str(text))
    kind = matched[1].lower() if matched else ""
    if matched is None or kind not in ("loguniform", "uniform", "choice", "fixed"):
        raise ConfigError(f"sweep.space: {setting} is {text}; it must be {forms}")
    try:
        numbers = tuple(float(word) for word in matched[2].split(",") if word.strip())
    except ValueError:
        raise ConfigError(f"sweep.space: {setting} is {text}; between the brackets stand numbers") from None
    if not numbers or not all(isfinite(number) for number in numbers):
        raise ConfigError(f"sweep.space: {setting} is {text}; between the brackets stand finite numbers")
    if kind in ("loguniform", "uniform") and (len(numbers) != 2 or numbers[0] >= numbers[1]):
        raise ConfigError(f"sweep.space: {setting} is {text}; a range is (low, high) with low below high")
    if kind == "loguniform" and numbers[0] <= 0:
        raise ConfigError(f"sweep.space: {setting} is {text}; a logarithmic range begins above 0")
    if kind == "fixed" and len(numbers) != 1:
        raise ConfigError(f"sweep.space: {setting} is {text}; fixed takes one number")
    return Distribution(kind, numbers)  # type: ignore[arg-type]
