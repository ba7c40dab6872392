"""The decoder's stage: its step, and a whole run."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_networks import CPU, part, tiny_batch, tiny_networks
from tiny_run import TINY, write_images
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.cli import parse
from m2d.errors import CheckpointError
from m2d.experiment import Experiment, complete_checkpoints
from m2d.models.checkpoint import load_checkpoint, read_prior
from m2d.models.perceptual import FeatureDistance
from m2d.training.networks import Networks
from m2d.training.settings import LossWeights, OptimizerConfig, ScheduleConfig
from m2d.training.step import DecoderStep, StepConfig
from m2d.training.trainer import train

ONLY = {"reconstruction": 0.0, "perceptual": 0.0, "adversarial": 0.0}


def decoder_step(networks: Networks, *, clip_norm: float = 1e6, **settings: object) -> DecoderStep:
    config = StepConfig(
        weights=settings.pop("weights", LossWeights()),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr_autoencoder=1e-2, warmup_steps=0, clip_norm=clip_norm),
        schedule=ScheduleConfig(ema_decay=0.5, max_skipped_in_row=3),
        precision="no",
        total_steps=100,
        **settings,  # type: ignore[arg-type]
    )
    return DecoderStep(networks, FeatureDistance(networks.extractor), config, CPU)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def test_only_the_decoder_and_the_discriminator_learn() -> None:
    networks = tiny_networks(discriminator=True)
    vae, discriminator = weights_of(networks.autoencoder), weights_of(networks.discriminator)
    decoder_step(networks)([tiny_batch()], 0)
    changed = {name.split(".")[1] for name in moved(networks.autoencoder, vae)}
    assert changed == {"decoder", "post_quant_conv"}
    assert moved(networks.discriminator, discriminator)


def test_the_latents_and_all_that_the_unet_is_stay_as_they_were() -> None:
    networks = tiny_networks(discriminator=True)
    step = decoder_step(networks)
    images = tiny_batch()[0].images.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = networks.autoencoder.encode(images).mean
    denoiser, projector = weights_of(networks.denoiser), weights_of(networks.projector)
    averaged = weights_of(step.ema.module)
    for number in range(3):
        step([tiny_batch(seed=number)], number)
    assert torch.equal(networks.autoencoder.encode(images).mean, latents)
    assert moved(networks.denoiser, denoiser) == moved(networks.projector, projector) == set()
    assert moved(step.ema.module, averaged) == set()


def test_the_decoder_fits_what_it_is_shown() -> None:
    networks = tiny_networks()
    step = decoder_step(networks, weights=LossWeights(**{**ONLY, "reconstruction": 1.0}))
    batch = tiny_batch()
    step([batch], 0)
    first = step.read_scalars()["loss/reconstruction"]
    for number in range(1, 30):
        step([batch], number)
    step.read_scalars()
    step([batch], 30)
    assert step.read_scalars()["loss/reconstruction"] < 0.7 * first


def test_the_adversarial_loss_is_in_the_decoder_only_from_its_start_on() -> None:
    networks = tiny_networks(discriminator=True)
    step = decoder_step(networks, weights=LossWeights(**{**ONLY, "adversarial": 1.0}), discriminator_start=2)
    before = weights_of(networks.autoencoder)
    step([tiny_batch()], 1)
    assert moved(networks.autoencoder, before) == set()
    step([tiny_batch()], 2)
    assert moved(networks.autoencoder, before)


def test_two_micro_batches_are_one_batch_of_twice_the_size() -> None:
    """Without a discriminator every loss is a mean over images, so the decoder's gradient is the mean of both."""
    whole, halves = tiny_networks(), tiny_networks()
    batch = tiny_batch(8)
    one, two = decoder_step(whole), decoder_step(halves)
    one([batch], 0)
    two([part(batch, 0, 4), part(batch, 4, 8)], 0)
    assert_close(two.read_scalars()["gradient_norm/autoencoder"], one.read_scalars()["gradient_norm/autoencoder"])


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    networks = tiny_networks(discriminator=True)
    step = decoder_step(networks)
    step([tiny_batch()], 0)
    before, discriminator = weights_of(networks.autoencoder), weights_of(networks.discriminator)
    images, draws = tiny_batch(seed=1)
    draws.posterior[0] = torch.nan
    step([(images, draws)], 1)
    assert moved(networks.autoencoder, before) == moved(networks.discriminator, discriminator) == set()
    assert step.read_scalars()["skipped_steps"] == 1


@pytest.mark.parametrize("discriminator", [False, True])
def test_its_state_goes_on_in_another_step(discriminator: bool) -> None:
    """Two steps in one go, and one step, saved and loaded into fresh networks, and one more: the same weights."""
    unbroken = tiny_networks(discriminator=discriminator)
    step = decoder_step(unbroken)
    step([tiny_batch(seed=0)], 0)
    state = copy.deepcopy(step.state_dict())
    resumed = decoder_step(tiny_networks(discriminator=discriminator))
    resumed.load_state_dict(state)
    step([tiny_batch(seed=1)], 1)
    resumed([tiny_batch(seed=1)], 1)
    assert moved(resumed.networks.autoencoder, weights_of(unbroken.autoencoder)) == set()


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
