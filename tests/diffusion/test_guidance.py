"""Guidance is held to its formula, and to the number and size of the passes it asks of the network."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from m2d.diffusion.solver import GuidedVelocity, solve


class CountingModel:
    """velocity = x t + the context's first number; remembers the size of each batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.batches.append(len(x_t))
        assert len(t) == len(context) == len(x_t)
        return x_t * t.view(-1, 1, 1, 1) + context[:, 0, :1, None, None]


X = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 2, 2)
CONDITIONAL = torch.tensor([3.0, 5.0]).view(2, 1, 1)
NULL = torch.tensor([1.0]).view(1, 1, 1)
HALF = torch.tensor(0.5, dtype=torch.float64)


def guided(model: CountingModel, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> GuidedVelocity:
    return GuidedVelocity(model, CONDITIONAL, NULL, scale=scale, interval=interval)


def test_guidance_goes_from_the_null_velocity_past_the_conditional_one() -> None:
    # v_null = x t + 1; v_cond = x t + (3, 5); v_null + 2.5 (v_cond - v_null) = x t + 1 + 2.5 (2, 4)
    velocity = guided(CountingModel(), scale=2.5)(X, HALF)
    assert_close(velocity, X * 0.5 + torch.tensor([6.0, 11.0]).view(2, 1, 1, 1))


def test_both_halves_share_one_pass() -> None:
    model = CountingModel()
    guided(model, scale=2.0)(X, HALF)
    assert model.batches == [4]


def test_scale_1_is_the_conditional_velocity_alone() -> None:
    model = CountingModel()
    assert_close(guided(model, scale=1.0)(X, HALF), X * 0.5 + CONDITIONAL.view(2, 1, 1, 1))
    assert model.batches == [2]


def test_scale_0_is_the_null_velocity() -> None:
    assert_close(guided(CountingModel(), scale=0.0)(X, HALF), X * 0.5 + 1)


@pytest.mark.parametrize(("t", "passes"), [(0.19, [2]), (0.2, [4]), (0.5, [4]), (0.7, [4]), (0.71, [2])])
def test_the_null_half_is_computed_inside_the_interval_alone(t: float, passes: list[int]) -> None:
    model = CountingModel()
    velocity = guided(model, scale=3.0, interval=(0.2, 0.7))(X, torch.tensor(t, dtype=torch.float64))
    assert model.batches == passes
    if passes == [2]:
        assert_close(velocity, X * t + CONDITIONAL.view(2, 1, 1, 1))


def test_one_pass_a_step_through_a_whole_solve() -> None:
    # euler's ten times are 1, .9, ... .1: two above the interval, eight inside
    model = CountingModel()
    solve(guided(model, scale=3.0, interval=(0.0, 0.85)), X, steps=10, solver="euler")
    assert model.batches == [2] * 2 + [4] * 8


def test_guidance_is_computed_in_the_precision_of_the_state() -> None:
    class Bfloat16Model:
        def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return (x_t + context[:, 0, :1, None, None]).bfloat16()

    velocity = GuidedVelocity(Bfloat16Model(), CONDITIONAL, NULL, scale=1.3)(torch.zeros(2, 1, 1, 1), HALF)
    assert velocity.dtype == torch.float32
    assert_close(velocity.flatten(), torch.tensor([1 + 1.3 * 2, 1 + 1.3 * 4]))
