"""The path and its velocity are held to the definition x_t = (1 - t) x_0 + t eps."""

import pytest
import torch
from torch.testing import assert_close

from m2d.diffusion.interpolant import interpolate, velocity_target


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
