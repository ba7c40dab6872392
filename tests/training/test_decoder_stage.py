"""Stage `decoder` as a run: from a checkpoint to a checkpoint that differs from it in its decoder alone."""

from pathlib import Path

import pytest
import torch
from tiny_run import TINY, write_images
from torch import nn

from m2d.cli import parse
from m2d.errors import CheckpointError
from m2d.experiment import Experiment, complete_checkpoints
from m2d.models.checkpoint import load_checkpoint, read_prior
from m2d.training.trainer import train

IN_PROCESS = ["--num_workers", "0", "--name", "run", *TINY]
ADVERSARIAL = [
    "--discriminator.enabled", "true", "--discriminator.channels", "8", "--discriminator.layers", "1",
    "--discriminator.start_step", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a joint run of three steps."""
    root = tmp_path_factory.mktemp("joint")
    return complete_checkpoints(run(data_root, root, "--max_steps", "3").checkpoints)[-1]


def run(data_root: Path, root: Path, *more: str) -> Experiment:
    places = ["--data_root", str(data_root), "--experiments_dir", str(root), "--cache_dir", str(root / "cache")]
    return train(parse("train", [*places, *IN_PROCESS, *more]))


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_new_checkpoint_differs_in_its_decoder_alone(data_root: Path, start: Path, tmp_path: Path) -> None:
    stage = ["--stage", "decoder", "--init_checkpoint", str(start), "--max_steps", "4", *ADVERSARIAL]
    made = complete_checkpoints(run(data_root, tmp_path, *stage).checkpoints)[-1]
    before, after = load_checkpoint(start), load_checkpoint(made)
    assert after.info.stage == "decoder"
    assert equal(before.autoencoder.vae.encoder, after.autoencoder.vae.encoder)
    assert equal(before.denoiser, after.denoiser)
    assert not equal(before.autoencoder.vae.decoder, after.autoencoder.vae.decoder)
    prior_before, prior_after = read_prior(start), read_prior(made)
    assert prior_before is not None
    assert prior_after is not None
    label, noise = torch.tensor([0]), torch.ones(1, prior_before.noise_dim)
    assert torch.equal(prior_before.sample(label, noise), prior_after.sample(label, noise))


def test_a_unet_of_another_shape_is_refused(data_root: Path, start: Path, tmp_path: Path) -> None:
    stage = ["--stage", "decoder", "--init_checkpoint", str(start), "--unet.block_channels", "[16,64]"]
    with pytest.raises(CheckpointError, match=r"stage decoder keeps the U-Net of .* another shape or extractor"):
        run(data_root, tmp_path, *stage)
