"""How many trials a sweep has, and which values those of a random or grid search take. Knows no Ray."""

import itertools
import math

import numpy as np

from m2d.tuning.settings import SweepConfig
from m2d.tuning.space import Distribution, parse_distribution


def planned(config: SweepConfig) -> list[dict[str, float]]:
    """The values of every trial of a random or grid search, by the trial's number.

    A random trial has a generator of its own, so that the first trials of a longer sweep are those of a shorter one.
    """
    space = distributions(config)
    if config.search == "grid":
        return [
            dict(zip(space, values, strict=True)) for values in itertools.product(*(s.numbers for s in space.values()))
        ]
    trials = []
    for number in range(config.num_trials):
        generator = np.random.default_rng((config.sweep.seed, number))
        trials.append({setting: _draw(one, generator) for setting, one in space.items()})
    return trials


def count(config: SweepConfig) -> int:
    """Trials of the whole sweep."""
    if config.search != "grid":
        return config.num_trials
    return math.prod(len(one.numbers) for one in distributions(config).values())


def distributions(config: SweepConfig) -> dict[str, Distribution]:
    """Setting -> what it is chosen from."""
    return {setting: parse_distribution(setting, text) for setting, text in config.sweep.space.items()}


def _draw(one: Distribution, generator: np.random.Generator) -> float:
    if one.is_finite:
        return float(generator.choice(one.numbers))
    low, high = one.numbers
    if one.kind == "uniform":
        return float(generator.uniform(low, high))
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))
