"""Every loss against a value worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from m2d.training.losses import (
    adversarial_loss,
    alignment_loss,
    diffusion_loss,
    discriminator_loss,
    kl_loss,
    manifold_loss,
    psnr,
    reconstruction_loss,
)


def test_diffusion_loss_is_the_mean_squared_error() -> None:
    velocity = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
    target = torch.tensor([1.0, 0.0, 3.0, 1.0]).view(1, 1, 2, 2)
    assert diffusion_loss(velocity, target).item() == pytest.approx((0 + 4 + 0 + 9) / 4)


def test_reconstruction_loss_is_the_mean_absolute_error() -> None:
    images = torch.tensor([[0.5, -1.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    assert reconstruction_loss(torch.zeros_like(images), images).item() == pytest.approx(2.5 / 4)


def test_kl_of_a_gaussian_to_the_standard_one_is_summed_over_a_latent_and_averaged_over_the_batch() -> None:
    mean = torch.zeros(2, 1, 1, 2)
    mean[0] = 2.0
    logvar = torch.zeros(2, 1, 1, 2)
    logvar[1] = math.log(4.0)
    first = 2 * (0.5 * 2.0**2)  # mean 2, variance 1
    second = 2 * (0.5 * (4.0 - 1.0 - math.log(4.0)))  # mean 0, variance 4
    assert kl_loss(mean, logvar).item() == pytest.approx((first + second) / 2)


def test_alignment_loss_is_the_mean_negative_cosine_and_knows_no_length() -> None:
    predicted = torch.tensor([[[3.0, 0.0], [1.0, 1.0], [0.0, 5.0]]])
    target = torch.tensor([[[7.0, 0.0], [2.0, 0.0], [0.0, -1.0]]])
    assert alignment_loss(predicted, target).item() == pytest.approx(-(1.0 + math.sqrt(0.5) - 1.0) / 3)


def test_manifold_loss_compares_the_cosines_among_tokens() -> None:
    predicted = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # cosine 0 between its two tokens
    target = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # cosine 1
    assert manifold_loss(predicted, target).item() == pytest.approx((0 + 1 + 1 + 0) / 4)


def test_manifold_loss_does_not_see_a_rotation_of_the_feature_space() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 5, 3, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    assert manifold_loss(target @ rotation, target).item() == pytest.approx(0.0, abs=1e-10)


def test_hinge_losses_take_their_textbook_values() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2))
    assert adversarial_loss(fake).item() == pytest.approx(1.5)


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 3, 4, 4)
    reconstructed = images.clone()
    reconstructed[1] = 0.2  # a tenth of the range [-1, 1]: 20 dB
    assert_close(psnr(reconstructed, images), torch.tensor([120.0, 20.0]), atol=1e-3, rtol=0)
