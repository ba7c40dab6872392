"""The autoencoder has the shapes it promises and loads what diffusers saved, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_networks import AUTOENCODER
from torch import Tensor
from torch.testing import assert_close

from m2d.errors import CheckpointError
from m2d.models.autoencoder import Autoencoder, build_autoencoder, from_uint8, to_uint8
from m2d.models.settings import AutoencoderConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_latents_are_smaller_by_the_downsampling() -> None:
    config = AutoencoderConfig(block_channels=[8, 8, 16], norm_groups=4, latent_channels=5)
    autoencoder = build_autoencoder(config, 32)
    posterior = autoencoder.encode(torch.zeros(2, 3, 32, 32))
    assert posterior.mean.shape == (2, 5, 8, 8)
    assert autoencoder.decode(posterior.mean).shape == (2, 3, 32, 32)
    assert (autoencoder.downsampling, config.downsampling, autoencoder.latent_channels) == (4, 4, 5)
    assert build_autoencoder(AutoencoderConfig(block_channels=[8], norm_groups=4), 16).downsampling == 1


def test_every_pixel_value_comes_back_and_what_lies_outside_is_clipped() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = from_uint8(pixels)
    assert (images.min(), images.max()) == (-1, 1)
    assert to_uint8(images)[0, :, :, 0].ravel().tolist() == list(range(256))
    assert to_uint8(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2)).ravel().tolist() == [0, 255]


def test_mid_attention_is_there_only_where_asked_for() -> None:
    for asked in (False, True):
        config = AutoencoderConfig(block_channels=[8], norm_groups=4, mid_attention=asked)
        names = build_autoencoder(config, 16).state_dict()
        assert any("attentions" in name for name in names) is asked


def blocks_of(images: Tensor) -> Tensor:
    """[B, 3, H, W] to [B * H/4 * W/4, 48], a row a block of 4 x 4 pixels, cut out one by one."""
    cuts = [images[:, :, y : y + 4, x : x + 4] for y in range(0, 32, 4) for x in range(0, 32, 4)]
    return torch.stack(cuts, dim=1).flatten(0, 1).flatten(1)


def smooth_images(count: int) -> Tensor:
    """Random pictures whose mean is one colour at each place of a block, with a few strong components."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return F.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1) * 2 - 1


def fitted(images: Tensor, channels: int, whitening: float) -> Autoencoder:
    autoencoder = build_autoencoder(AutoencoderConfig(kind="linear", latent_channels=channels), 32)
    blocks = blocks_of(images).double()
    autoencoder.vae.set_basis(blocks.mean(dim=0), blocks.T @ blocks / len(blocks), whitening)
    return autoencoder


def test_block_pca_loses_what_the_components_it_leaves_out_hold() -> None:
    """Beside numpy's singular values of the same blocks; with all components nothing is lost."""
    images = smooth_images(40)
    blocks = blocks_of(images).double().numpy()
    centred = blocks - blocks.reshape(len(blocks), 3, 16).mean(axis=(0, 2)).repeat(16)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2 / len(blocks)
    for channels, whitening in ((5, 0.0), (5, 0.5), (12, 1.0), (48, 0.5)):
        autoencoder = fitted(images, channels, whitening)
        with torch.no_grad():
            latents = autoencoder.encode(images).mode()
            error = (autoencoder.decode(latents) - images).square().mean()
        assert latents.shape == (40, channels, 8, 8)
        assert error == pytest.approx(variances[channels:].sum() / 48, rel=1e-3, abs=1e-9)
        assert latents.square().mean() == pytest.approx(1, rel=0.05)  # about the colour, which is nearly their mean
    assert (autoencoder.downsampling, autoencoder.latent_channels) == (4, 48)


def test_whitening_goes_from_pixels_own_scale_to_equal_components() -> None:
    images = smooth_images(40)
    with torch.no_grad():
        isometric, half, white = (fitted(images, 6, whitening).encode(images).mode() for whitening in (0, 0.5, 1))
    apart = [(isometric[k] - isometric[k + 1]).norm() / (images[k] - images[k + 1]).norm() for k in (0, 2, 4)]
    assert max(apart) / min(apart) == pytest.approx(1, abs=0.05)  # but for what six components leave out
    second_moments = [latents.square().mean(dim=(0, 2, 3)) for latents in (isometric, half, white)]
    assert_close(second_moments[2], torch.ones(6), rtol=0.1, atol=0)
    ratios = [moments[0] / moments[5] for moments in second_moments]
    assert ratios[1].square() == pytest.approx(ratios[0].item(), rel=0.1)


def test_block_pca_is_float32_under_autocast_without_noise_and_loads_as_saved(tmp_path: Path) -> None:
    images = smooth_images(4)
    autoencoder = fitted(images, 6, 0.5)
    autoencoder.vae.save_pretrained(tmp_path / "vae")
    loaded = build_autoencoder(AutoencoderConfig(pretrained=str(tmp_path)), 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = loaded.encode(images)
        assert posterior.mean.dtype == torch.float32
        assert_close(posterior.sample(), posterior.mean, rtol=0, atol=0)
        decoded = loaded.decode(posterior.mean)
    with torch.no_grad():
        assert_close(decoded, autoencoder.decode(autoencoder.encode(images).mean), rtol=0, atol=0)


def test_a_residual_vae_begins_as_block_pca_learns_beside_it_and_loads_as_saved(tmp_path: Path) -> None:
    images = smooth_images(8)
    pca = fitted(images, 5, 0.5)
    config = AutoencoderConfig(kind="residual", block_channels=[8, 8, 8], norm_groups=4, latent_channels=5)
    autoencoder = build_autoencoder(config, 32)
    blocks = blocks_of(images).double()
    autoencoder.vae.linear.set_basis(blocks.mean(dim=0), blocks.T @ blocks / len(blocks), whitening=0.5)
    posterior = autoencoder.encode(images)
    assert_close(posterior.mean, pca.encode(images).mean)
    assert_close(posterior.std, torch.full_like(posterior.std, 0.0183), rtol=1e-2, atol=0)  # exp(-8 / 2)
    assert_close(autoencoder.decode(posterior.mean), pca.decode(posterior.mean))
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=0.05)
    errors = []
    for _ in range(12):
        loss = (autoencoder.decode(autoencoder.encode(images).mean) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < errors[0]
    assert all(
        parameter.grad.abs().max() > 0 for name, parameter in autoencoder.named_parameters() if "quant" not in name
    )
    autoencoder.vae.save_pretrained(tmp_path)
    loaded = build_autoencoder(AutoencoderConfig(pretrained=str(tmp_path)), 32)
    with torch.no_grad():
        assert_close(loaded.encode(images).mean, autoencoder.encode(images).mean, rtol=0, atol=0)
        assert_close(loaded.decode(posterior.mean), autoencoder.decode(posterior.mean), rtol=0, atol=0)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, AutoencoderKL]:
    """A folder with a vae/ in it, as whole diffusion pipelines have, and what was saved there."""
    vae = build_autoencoder(AUTOENCODER, 16).vae
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    return tmp_path / "pipeline", vae


@pytest.mark.parametrize("inside", ["", "vae"])
def test_a_pretrained_folder_gives_the_saved_reconstructions(saved: tuple[Path, AutoencoderKL], inside: str) -> None:
    folder, vae = saved
    loaded = build_autoencoder(AutoencoderConfig(pretrained=str(folder / inside)), 16)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert_close(loaded.decode(loaded.encode(images).mean), vae(images).sample, rtol=0, atol=0)


def refusal_of(location: str) -> str:
    with pytest.raises(CheckpointError) as refusal:
        build_autoencoder(AutoencoderConfig(pretrained=location), 16)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["no/such_vae", "/no/such/folder", "word"])
def test_a_missing_one_is_refused_in_one_line_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal_of(name)
    assert message.startswith(f"autoencoder.pretrained: {name} is neither")
    assert "\n" not in message


def test_a_broken_weights_file_is_refused_in_one_line(saved: tuple[Path, AutoencoderKL]) -> None:
    (saved[0] / "vae" / WEIGHTS).write_bytes(b"half a file")
    assert "\n" not in refusal_of(str(saved[0]))


def test_a_missing_tensor_is_refused_and_not_left_random(saved: tuple[Path, AutoencoderKL]) -> None:
    """diffusers itself only warns of it."""
    path = saved[0] / "vae" / WEIGHTS
    tensors = load_file(path)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "encoder.conv_in.bias" in refusal_of(str(saved[0]))


def test_a_config_of_other_shapes_is_refused(saved: tuple[Path, AutoencoderKL]) -> None:
    path = saved[0] / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latent_channels": 7}))
    assert "\n" not in refusal_of(str(saved[0]))
