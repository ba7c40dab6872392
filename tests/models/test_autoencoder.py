"""The autoencoder has the shapes it promises and loads what diffusers saved, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_networks import AUTOENCODER
from torch.testing import assert_close

from m2d.errors import CheckpointError
from m2d.models.autoencoder import build_autoencoder, from_uint8, to_uint8
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
