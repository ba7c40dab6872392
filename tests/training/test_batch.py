"""Draws: fixed by seed and stream row, with the stated distributions. Batches are read ahead in their order."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from tiny_networks import draws_part
from torch.testing import assert_close

from m2d.data.order import Share
from m2d.errors import DataError
from m2d.models.settings import ConditioningConfig
from m2d.training.batch import Draws, ImageBatch, draw, splitmix64
from m2d.training.loop import AHEAD, _Run, read_ahead
from m2d.training.settings import OptimizerConfig, ScheduleConfig, TrainConfig
from m2d.training.step import learning_rate

CONDITIONING = ConditioningConfig(class_dropout=0.1, feature_dropout=0.3, feature_noise=0.5)


def drawn(seed: int = 0, first: int = 0, size: int = 4096) -> Draws:
    return draw(seed, torch.arange(first, first + size), (2, 2, 2), 3, CONDITIONING)


def test_the_generator_is_splitmix64() -> None:
    """The outputs of the published reference code from state 1234567, by Rosetta Code's table."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [word % 2**64 for word in splitmix64(torch.tensor([1234567]), 5)[0].tolist()] == published


def test_a_rows_draws_are_the_same_in_whatever_batch_it_comes() -> None:
    """Hashes are exact; logarithms and cosines of a vector's tail may round otherwise."""
    whole = drawn(first=100, size=8)
    for start, stop in ((0, 1), (1, 4), (4, 8)):
        alone = drawn(first=100 + start, size=stop - start)
        assert_close(vars(alone), vars(draws_part(whole, start, stop)), rtol=1e-6, atol=1e-6)


def test_runs_and_rows_draw_otherwise() -> None:
    first, second = drawn(0, size=50), drawn(1, size=50)
    noise = torch.cat([first.noise, second.noise]).flatten(1)
    correlation = torch.corrcoef(noise)  # of 8 numbers each: a pair that is the same would be 1
    assert correlation.fill_diagonal_(0).abs().max() < 0.9999


def test_draws_have_the_stated_distributions() -> None:
    draws = drawn()
    assert draws.drop_class.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert draws.drop_feature.float().mean().item() == pytest.approx(0.3, abs=0.03)
    both = (draws.drop_class & draws.drop_feature).float().mean().item()
    assert both == pytest.approx(0.03, abs=0.01)  # independent
    assert draws.t.min() > 0
    assert draws.t.max() < 1
    assert draws.t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.feature_noise_level.max() <= 0.5
    assert draws.feature_noise_level.mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_another_density_moves_the_times_and_nothing_else(shift: float) -> None:
    uniform = drawn()
    other = draw(0, torch.arange(4096), (2, 2, 2), 3, CONDITIONING, "logit_normal", shift)
    log_odds = torch.logit(other.t.double()).numpy()
    assert scipy.stats.kstest(log_odds, "norm", args=(math.log(shift), 1)).pvalue > 1e-4
    order = uniform.t.argsort(stable=True)
    assert (other.t[order].diff() >= 0).all()  # of the same numbers of the stream
    others = [name for name in vars(uniform) if name != "t"]
    assert all(torch.equal(getattr(other, name), getattr(uniform, name)) for name in others)


def test_a_run_draws_its_times_as_its_schedule_says() -> None:
    """Micro-batch 5 of the only worker: rows 40 to 47."""
    config = TrainConfig(batch_size=8, seed=7, schedule=ScheduleConfig(times="logit_normal", time_shift=3.0))
    share = Share(batch_size=8)
    networks, link = SimpleNamespace(feature_dim=3), SimpleNamespace(device="cpu")
    run: Any = SimpleNamespace(
        plan=SimpleNamespace(config=config), networks=networks, share=share, link=link, latent_shape=(2, 2, 2)
    )
    expected = draw(7, torch.arange(40, 48), (2, 2, 2), 3, config.conditioning, "logit_normal", 3.0)
    assert_close(vars(_Run._draws(run, 5)), vars(expected), rtol=0, atol=0)


def test_noise_is_normal_and_its_numbers_are_independent() -> None:
    """Kolmogorov and Smirnov's test at 1e-4, moments, and the correlation of neighbouring places and rows."""
    draws = drawn()
    normal = torch.cat([draws.posterior.flatten(1), draws.noise.flatten(1), draws.feature_noise], 1)
    assert scipy.stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-4
    assert normal.pow(4).mean().item() == pytest.approx(3.0, abs=0.15)
    error = 4.5 / math.sqrt(len(normal))
    assert torch.corrcoef(normal.T).fill_diagonal_(0).abs().max() < error
    assert abs(torch.corrcoef(torch.stack([normal[:-1].flatten(), normal[1:].flatten()]))[0, 1]) < error


def test_the_learning_rate_warms_up_from_a_networks_own_first_step_and_ends_at_its_fraction() -> None:
    config = OptimizerConfig(schedule="cosine", warmup_steps=10, final_fraction=0.1)
    assert learning_rate(config, 1.0, 100, 100, 1100) == pytest.approx(0.1)
    assert learning_rate(config, 1.0, 600, 100, 1100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(config, 1.0, 1100, 100, 1100) == pytest.approx(0.1)
    constant = OptimizerConfig(schedule="constant", warmup_steps=4)
    assert [learning_rate(constant, 2.0, step, 0, 10) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def numbered(count: int, read: list[int]) -> Iterator[ImageBatch]:
    for number in range(count):
        read.append(number)
        yield ImageBatch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.tensor([number]))


def test_every_batch_comes_once_and_in_order() -> None:
    batches = read_ahead(numbered(7, []), pin_memory=False)
    assert [int(batch.labels) for batch in batches] == list(range(7))


def test_a_run_that_stops_early_has_read_no_more_than_it_may() -> None:
    read: list[int] = []
    batches = read_ahead(numbered(100, read), pin_memory=False)
    for _ in range(3):
        next(batches)
    batches.close()  # type: ignore[attr-defined] # a generator
    assert len(read) <= 3 + AHEAD


def test_what_reading_raises_reaches_the_loop_at_its_batch() -> None:
    def broken() -> Iterator[ImageBatch]:
        yield from numbered(2, [])
        raise DataError("data_root: image.jpg is gone")

    batches = read_ahead(broken(), pin_memory=False)
    assert [int(next(batches).labels) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="data_root"):
        next(batches)
