"""Draws: fixed by their seed, independent between workers and steps, with the stated distributions."""

import pytest
import torch
from torch.testing import assert_close

from m2d.models.settings import ConditioningConfig
from m2d.training.batch import draw, draws_seed
from m2d.training.settings import OptimizerConfig
from m2d.training.update import learning_rate

CONDITIONING = ConditioningConfig(class_dropout=0.1, feature_dropout=0.3, feature_noise=0.5)


def drawn(seed: int, size: int = 4096):  # type: ignore[no-untyped-def]
    return draw(torch.Generator().manual_seed(seed), size, (2, 2, 2), 3, CONDITIONING)


def test_the_same_seed_draws_the_same_and_its_parts_are_its_parts() -> None:
    first, second = drawn(1, 8), drawn(1, 8)
    assert_close(vars(first), vars(second), rtol=0, atol=0)
    assert torch.equal(first.part(2, 5).noise, first.noise[2:5])
    assert torch.equal(first.part(2, 5).t, first.t[2:5])


def test_seeds_differ_by_run_micro_batch_and_rank() -> None:
    seeds = {draws_seed(run, micro, rank) for run in range(3) for micro in range(50) for rank in range(4)}
    assert len(seeds) == 3 * 50 * 4
    assert draws_seed(0, 1, 0) == draws_seed(0, 1, 0)


def test_draws_have_the_stated_distributions() -> None:
    draws = drawn(0)
    assert draws.drop_class.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert draws.drop_feature.float().mean().item() == pytest.approx(0.3, abs=0.03)
    both = (draws.drop_class & draws.drop_feature).float().mean().item()
    assert both == pytest.approx(0.03, abs=0.01)  # independent
    assert draws.t.min() > 0
    assert draws.t.max() < 1
    assert draws.t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.feature_noise_level.max() <= 0.5
    assert draws.feature_noise_level.mean().item() == pytest.approx(0.25, abs=0.01)
    assert draws.noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(draws.noise, draws.posterior)


def test_the_learning_rate_warms_up_from_a_networks_own_first_step_and_ends_at_its_fraction() -> None:
    config = OptimizerConfig(schedule="cosine", warmup_steps=10, final_fraction=0.1)
    assert learning_rate(config, 1.0, 100, 100, 1100) == pytest.approx(0.1)
    assert learning_rate(config, 1.0, 600, 100, 1100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(config, 1.0, 1100, 100, 1100) == pytest.approx(0.1)
    constant = OptimizerConfig(schedule="constant", warmup_steps=4)
    assert [learning_rate(constant, 2.0, step, 0, 10) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
