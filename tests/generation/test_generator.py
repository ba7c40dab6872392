"""The generator draws the same image for a request whatever stands beside it in the batch."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from m2d.classes import class_index
from m2d.diffusion.settings import SOLVERS, SamplingSettings, Solver
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.generation.generator import Generator, pick_device, pick_feature, pick_precision, to_uint8
from m2d.generation.request import SampleRequest, class_requests, feature_seed, noise_for
from m2d.generation.settings import Feature
from m2d.models.checkpoint import Checkpoint

REQUESTS = class_requests(["DF", "MEL"], num_samples=4, run_seed=0)


def images_of(
    checkpoint: Checkpoint,
    batch_size: int = 8,
    requests: list[SampleRequest] = REQUESTS,
    feature: Feature | None = None,
    feature_temperature: float = 1.0,
    **settings: Any,
) -> np.ndarray:
    sampling = SamplingSettings(**{"steps": 4, "guidance_scale": 2.0, **settings})
    generator = Generator(
        checkpoint,
        sampling,
        batch_size=batch_size,
        device="cpu",
        feature=feature,
        feature_temperature=feature_temperature,
    )
    return generator.generate(requests)


@pytest.fixture
def contexts(prior_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], Any]]:
    """(labels, feature) of every context that the denoiser was asked for."""
    asked: list[tuple[list[int], Any]] = []
    real = prior_checkpoint.denoiser.context

    def recording(labels: torch.Tensor, cls: torch.Tensor | None = None) -> torch.Tensor:
        asked.append((labels.tolist(), cls))
        return real(labels, cls)

    monkeypatch.setattr(prior_checkpoint.denoiser, "context", recording)
    return asked


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_the_batch_size(checkpoint: Checkpoint, solver: Solver) -> None:
    together = images_of(checkpoint, batch_size=8, solver=solver)
    alone = images_of(checkpoint, batch_size=1, solver=solver)
    assert together.std() > 20, "flat images would make this test say nothing"
    # Convolutions of another batch size may add in another order: at most one grey level, where rounding tips.
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1


def test_an_image_does_not_depend_on_its_neighbours(checkpoint: Checkpoint) -> None:
    forward, backward = images_of(checkpoint, 3), images_of(checkpoint, 3, REQUESTS[::-1])
    assert np.abs(forward.astype(int) - backward[::-1].astype(int)).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_with_a_drawn_feature_does_not_depend_on_the_batch(
    prior_checkpoint: Checkpoint, batch_size: int
) -> None:
    together, apart = images_of(prior_checkpoint), images_of(prior_checkpoint, batch_size, REQUESTS[::-1])[::-1]
    assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1


def test_the_drawn_feature_is_of_the_class_and_of_the_seed_of_its_image(
    prior_checkpoint: Checkpoint, contexts: list[tuple[list[int], Any]]
) -> None:
    images_of(prior_checkpoint, requests=REQUESTS[:2])
    prior = prior_checkpoint.prior
    assert prior is not None
    labels = [class_index(request.label) for request in REQUESTS[:2]]
    noise = torch.stack([noise_for(feature_seed(request.seed), (prior.noise_dim,)) for request in REQUESTS[:2]])
    (guided, feature), (null, null_feature) = contexts
    assert guided == labels
    assert torch.equal(feature, prior.sample(torch.tensor(labels), noise))
    assert null == [7, 7]
    assert null_feature is None


def test_at_temperature_zero_every_image_of_a_class_has_its_mean_feature(
    prior_checkpoint: Checkpoint, contexts: list[tuple[list[int], Any]]
) -> None:
    assert prior_checkpoint.prior is not None
    images_of(prior_checkpoint, feature_temperature=0.0)
    labels, feature = contexts[0]
    assert torch.equal(feature, prior_checkpoint.prior.mean[labels])


def test_without_a_feature_a_prior_changes_nothing(checkpoint: Checkpoint, prior_checkpoint: Checkpoint) -> None:
    alone = images_of(prior_checkpoint, feature="none")
    assert np.array_equal(alone, images_of(checkpoint))
    assert not np.array_equal(alone, images_of(prior_checkpoint))


def test_a_checkpoint_with_a_prior_uses_it_unless_told_otherwise(
    checkpoint: Checkpoint, prior_checkpoint: Checkpoint
) -> None:
    assert pick_feature(None, prior_checkpoint) == "prior"
    assert pick_feature(None, checkpoint) == "none"
    assert pick_feature("none", prior_checkpoint) == "none"


def test_a_prior_that_is_not_there_is_a_one_line_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"step_1000 holds no feature prior; leave --feature out") as caught:
        images_of(checkpoint, feature="prior")
    assert "\n" not in str(caught.value)


def test_a_temperature_without_a_feature_is_a_one_line_error(prior_checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"feature_temperature is 0.5, but no feature is drawn"):
        images_of(prior_checkpoint, feature="none", feature_temperature=0.5)


def test_a_class_that_the_prior_does_not_know_is_a_one_line_error(prior_checkpoint: Checkpoint) -> None:
    with pytest.raises(DataError, match="no training image was of VASC"):
        images_of(prior_checkpoint, requests=class_requests(["MEL", "VASC"], num_samples=1, run_seed=0))


def test_images_come_as_uint8_rgb_in_the_order_of_the_requests(checkpoint: Checkpoint) -> None:
    images = images_of(checkpoint)
    assert images.shape == (8, 16, 16, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8


def test_nothing_asked_for_is_nothing_made(checkpoint: Checkpoint) -> None:
    assert images_of(checkpoint, requests=[]).shape == (0, 16, 16, 3)


def test_the_class_and_the_guidance_scale_change_the_image(checkpoint: Checkpoint) -> None:
    request = REQUESTS[0]
    other_class = SampleRequest(label="NV", index=request.index, seed=request.seed)
    first, second = images_of(checkpoint, requests=[request, other_class])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, images_of(checkpoint, requests=[request], guidance_scale=1.0)[0])


def test_latents_are_put_back_on_the_scale_of_the_vae(checkpoint: Checkpoint) -> None:
    """Where the velocity is zero, the image is the decoded noise, spread as the latent batch norm found latents."""
    still = replace(checkpoint, denoiser=copy.deepcopy(checkpoint.denoiser))
    torch.nn.init.zeros_(still.denoiser.unet.conv_out.weight)
    std = torch.tensor([4.0, 0.25, 1.0, 2.0]).add(1e-4).sqrt().view(1, 4, 1, 1)
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0]).view(1, 4, 1, 1)
    with torch.no_grad():
        expected = to_uint8(checkpoint.autoencoder.decode(noise_for(REQUESTS[0].seed, (4, 8, 8))[None] * std + mean))
    drawn = images_of(still, requests=REQUESTS[:1])
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("feature", ["none", "prior"])
def test_bf16_is_near_float32(prior_checkpoint: Checkpoint, feature: Feature) -> None:
    settings = SamplingSettings(steps=4, guidance_scale=2.0)
    half = Generator(prior_checkpoint, settings, device="cpu", mixed_precision="bf16", feature=feature)
    images = half.generate(REQUESTS)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - images_of(prior_checkpoint, feature=feature).astype(int)).mean() < 4


def test_rounding_is_to_the_nearest_level_and_clips() -> None:
    levels = torch.tensor([-1.5, -1.0, -0.997, -0.995, 0.0, 0.999, 1.0, 7.0])
    assert to_uint8(levels.view(1, 1, 1, 8))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_a_model_that_gives_nan_is_a_one_line_error(checkpoint: Checkpoint) -> None:
    broken = replace(checkpoint, autoencoder=copy.deepcopy(checkpoint.autoencoder))
    torch.nn.init.constant_(broken.autoencoder.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(CheckpointError, match="not finite numbers") as caught:
        images_of(broken)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_a_one_line_error() -> None:
    with pytest.raises(ConfigError, match="device is nonsense"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device is cuda, which cannot be used here") as caught:
            pick_device("cuda")
        assert "\n" not in str(caught.value)


def test_the_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert pick_precision(None, torch.device("cpu")) == "no"
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("feature", ["none", "prior"])
def test_the_gpu_draws_the_image_of_the_cpu(prior_checkpoint: Checkpoint, feature: Feature) -> None:
    settings = SamplingSettings(steps=4, guidance_scale=2.0)
    try:
        gpu = Generator(prior_checkpoint, settings, device="cuda", mixed_precision="no", feature=feature).generate(
            REQUESTS
        )
    finally:
        cpu = Generator(prior_checkpoint, settings, device="cpu", feature=feature).generate(REQUESTS)
    assert np.abs(gpu.astype(int) - cpu.astype(int)).mean() < 1
