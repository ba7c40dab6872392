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
    spatially_normalized,
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


def test_spatial_normalisation_takes_a_share_of_the_tokens_mean_off_and_divides_by_their_deviation() -> None:
    """Two tokens of two dimensions, by hand: means 4 and 0, unbiased deviations sqrt(8) and sqrt(2), gamma a half."""
    patches = torch.tensor([[[2.0, 1.0], [6.0, -1.0]]])
    expected = [[[(2 - 2) / math.sqrt(8), 1 / math.sqrt(2)], [(6 - 2) / math.sqrt(8), -1 / math.sqrt(2)]]]
    assert_close(spatially_normalized(patches, 0.5), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_spatial_normalisation_is_of_each_image_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 4, 5, generator=generator) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1) + 7
    together = spatially_normalized(patches, 1.0)
    assert_close(together, torch.cat([spatially_normalized(image[None], 1.0) for image in patches]))
    assert_close(together.mean(dim=1), torch.zeros(3, 5), atol=1e-4, rtol=0)


def test_a_single_token_keeps_its_direction_and_one_that_never_changes_stays_finite() -> None:
    """Its deviation is 0, not the unbiased one of a single number."""
    token = torch.tensor([[[3.0, -4.0]]])
    assert_close(torch.nn.functional.normalize(spatially_normalized(token, 0.6), dim=-1), token / 5)
    assert torch.isfinite(spatially_normalized(torch.full((1, 4, 2), 3.0), 1.0)).all()


def test_hinge_losses_take_their_textbook_values() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2))
    assert adversarial_loss(fake).item() == pytest.approx(1.5)


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(2, 3, 4, 4)
    reconstructed = images.clone()
    reconstructed[1] = 0.2  # a tenth of the range [-1, 1]: 20 dB
    assert_close(psnr(reconstructed, images), torch.tensor([120.0, 20.0]), atol=1e-3, rtol=0)
