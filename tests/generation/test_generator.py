"""The generator draws the same image for a request whatever stands beside it in the batch."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from m2d.diffusion.settings import SOLVERS, SamplingSettings, Solver
from m2d.errors import CheckpointError, ConfigError
from m2d.generation.generator import Generator, pick_device, pick_precision, to_uint8
from m2d.generation.request import SampleRequest, class_requests, noise_for
from m2d.models.checkpoint import Checkpoint

REQUESTS = class_requests(["DF", "MEL"], num_samples=4, run_seed=0)


def images_of(
    checkpoint: Checkpoint, batch_size: int = 8, requests: list[SampleRequest] = REQUESTS, **settings: Any
) -> np.ndarray:
    sampling = SamplingSettings(**{"steps": 4, "guidance_scale": 2.0, **settings})
    return Generator(checkpoint, sampling, batch_size=batch_size, device="cpu").generate(requests)


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


def test_bf16_is_near_float32(checkpoint: Checkpoint) -> None:
    settings = SamplingSettings(steps=4, guidance_scale=2.0)
    half = Generator(checkpoint, settings, device="cpu", mixed_precision="bf16").generate(REQUESTS)
    assert half.dtype == np.uint8
    assert np.abs(half.astype(int) - images_of(checkpoint).astype(int)).mean() < 4


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
def test_the_gpu_draws_the_image_of_the_cpu(checkpoint: Checkpoint) -> None:
    settings = SamplingSettings(steps=4, guidance_scale=2.0)
    try:
        gpu = Generator(checkpoint, settings, device="cuda", mixed_precision="no").generate(REQUESTS)
    finally:
        cpu = Generator(checkpoint, settings, device="cpu").generate(REQUESTS)
    assert np.abs(gpu.astype(int) - cpu.astype(int)).mean() < 1
