"""The path and its velocity are held to the definition x_t = (1 - t) x_0 + t eps."""

import pytest
import torch
from torch.testing import assert_close

from m2d.diffusion.interpolant import (
    clean_from_velocity,
    interpolate,
    sample_time,
    sample_time_logit_normal,
    velocity_target,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)


def test_the_path_runs_from_data_at_0_to_noise_at_1(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = pair
    x_t = interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert_close(x_t[0], clean[0])
    assert_close(x_t[1], noise[1])
    assert_close(x_t[2], 0.75 * clean[2] + 0.25 * noise[2])


def test_the_velocity_is_the_derivative_of_the_path(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = pair
    t = torch.tensor([0.1, 0.5, 0.8])
    h = 2.0**-6
    derivative = (interpolate(clean, noise, t + h) - interpolate(clean, noise, t - h)) / (2 * h)
    assert_close(velocity_target(clean, noise), derivative, atol=1e-4, rtol=0)


def test_the_true_velocity_points_back_to_the_data(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = pair
    t = torch.tensor([0.0, 0.6, 1.0])
    assert_close(clean_from_velocity(interpolate(clean, noise, t), velocity_target(clean, noise), t), clean)


def test_uniform_times_are_uniform_in_the_open_interval() -> None:
    t = sample_time(torch.Generator().manual_seed(0), 200_000, "cpu")
    assert t.dtype == torch.float32
    assert t.min() > 0
    assert t.max() < 1
    # Five standard errors of each moment.
    assert_close(t.mean().item(), 0.5, atol=5 * (1 / 12 / 200_000) ** 0.5, rtol=0)
    assert_close(t.square().mean().item(), 1 / 3, atol=5 * (4 / 45 / 200_000) ** 0.5, rtol=0)


def test_logit_normal_times_have_the_asked_logit() -> None:
    t = sample_time_logit_normal(torch.Generator().manual_seed(0), 200_000, "cpu", mean=0.4, std=0.8)
    assert t.min() > 0
    assert t.max() < 1
    logit = t.double().logit()
    assert_close(logit.mean().item(), 0.4, atol=5 * 0.8 / 200_000**0.5, rtol=0)
    assert_close(logit.std().item(), 0.8, atol=5 * 0.8 / 400_000**0.5, rtol=0)


@pytest.mark.parametrize("draw", [sample_time, sample_time_logit_normal])
def test_times_follow_their_generator(draw) -> None:  # type: ignore[no-untyped-def]
    again = [draw(torch.Generator().manual_seed(7), 5, "cpu") for _ in range(2)]
    assert torch.equal(*again)
