"""What `train --dry_run` counts, held to closed forms, to torch's own counter and to steps of real tensors."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_networks import random_batch
from tiny_run import TINY, write_images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m2d.cli import main, parse
from m2d.errors import ConfigError
from m2d.models.extractors import Features
from m2d.models.perceptual import build_perceptual
from m2d.training.dry_run import (
    BACKWARD,
    OTHER,
    FakeRun,
    StepCounter,
    count_images,
    kinds_of_steps,
    largest_batch,
    two_alike,
)
from m2d.training.measure import count_flops
from m2d.training.networks import build_networks
from m2d.training.settings import TrainConfig
from m2d.training.step import JointStep, StepConfig

CPU = torch.device("cpu")
WEIGHTS, AVERAGES, MOMENTS = "weights", "averaged weights (EMA)", "AdamW's moments"


def config_of(*more: str) -> TrainConfig:
    config: TrainConfig = parse("train", [*TINY, "--mixed_precision", "no", "--dry_run", *more])
    return config


def rounded(tensors: list[Tensor]) -> int:
    """Bytes as CUDA's allocator gives them, in blocks of 512."""
    return sum(512 * -(-tensor.nbytes // 512) for tensor in tensors)


@pytest.fixture(scope="module")
def joint() -> FakeRun:
    run = FakeRun(config_of(), train_images=800, cached=True)
    run.cost = cache(run.cost)  # type: ignore[method-assign]
    return run


def test_weights_averages_and_moments_take_what_their_numbers_take(joint: FakeRun) -> None:
    """Four bytes each; moments are two a weight, and a step counter a tensor."""
    real = build_networks(joint.config, CPU, 1280)
    weights = [tensor for module in real.trained().values() for tensor in module.state_dict().values()]
    learned = [p for module in real.trained().values() for p in module.parameters() if p.requires_grad]
    parts = joint.cost(4).parts
    assert parts[WEIGHTS] == rounded(weights)
    assert parts[AVERAGES] == rounded(list(real.denoiser.state_dict().values()))
    assert parts[MOMENTS] == 2 * rounded(learned) + 512 * len(learned)


def test_a_checkpoint_holds_weights_averages_and_moments_once(joint: FakeRun) -> None:
    real = build_networks(joint.config, CPU, 1280)
    vae, denoiser, projector = (
        sum(p.numel() for p in module.parameters()) for module in (real.autoencoder, real.denoiser, real.projector)
    )
    numbers = 3 * (vae + denoiser + projector) + denoiser
    assert joint.checkpoint_bytes == pytest.approx(4 * numbers, rel=0.01)


def test_a_gradient_is_a_part_of_its_own_and_as_large_as_its_weight() -> None:
    with FakeTensorMode(), StepCounter("cpu") as counter:
        layer = nn.Linear(1024, 256, bias=False)
        counter.label("weights", layer.parameters())
        counter.follow(layer, "activations")
        layer.weight.register_post_accumulate_grad_hook(lambda weight: counter.label("gradients", [weight.grad]))
        inputs = torch.zeros(64, 1024)
        outputs = layer(inputs)
        outputs.backward(torch.ones_like(outputs))
        counter.restart()
    assert counter.peak_parts == {
        "weights": 4 * 1024 * 256, "gradients": 4 * 1024 * 256, "activations": 4 * 64 * 256,
        OTHER: 4 * 64 * 1024, BACKWARD: 0,
    }  # fmt: skip


def test_twice_the_images_keep_twice_the_activations(joint: FakeRun) -> None:
    eight, sixteen = joint.cost(8).parts["activations: VAE"], joint.cost(16).parts["activations: VAE"]
    assert sixteen == pytest.approx(2 * eight, rel=0.02)


def test_the_largest_batch_fits_and_the_next_one_does_not(joint: FakeRun) -> None:
    low, high = two_alike(joint, joint.cost(1))
    assert len(low.trace) == len(high.trace)
    assert high.batch_size == 2 * low.batch_size
    usable = 60 * 2**20
    found = largest_batch(low, high, usable)
    assert joint.cost(found).peak <= usable < joint.cost(found + 1).peak
    assert largest_batch(low, high, 2**20) == 0, "less than the weights take"


def test_further_micro_batches_add_what_is_kept_of_them() -> None:
    """Four, of which two are computed and two added, against four that are computed."""
    run = FakeRun(config_of("--gradient_accumulation_steps", "4"), train_images=800, cached=True)
    assert run.cost(8).peak == pytest.approx(run.cost(8, computed=4).peak, rel=0.01)


def test_flops_are_those_of_a_step_on_real_tensors(joint: FakeRun) -> None:
    config, plan = joint.config, joint.plan
    networks = build_networks(config, CPU, 1280)
    settings = StepConfig(config, "no", plan.total_steps, plan.vae_warmup_steps)
    step = JointStep(networks, build_perceptual("features", None), settings, CPU)
    images, draws = random_batch(config, networks, 0, 4)
    batch = dataclasses.replace(images, features=Features(torch.zeros(4, 1280), torch.zeros(4, 1, 1280)))
    assert joint.cost(4).flops == count_flops(lambda: step([(batch, draws)], 0))


@pytest.mark.parametrize(
    ("stage", "precision"), [("joint", "bf16"), ("joint", "fp16"), ("latent", "bf16"), ("decoder", "no")]
)
def test_a_step_of_each_stage_and_precision_asks_the_device_for_no_value(stage: str, precision: str) -> None:
    """Gradients add up, so a second micro-batch has them at its peak; an init_checkpoint is not needed."""
    config = config_of(
        "--stage", stage, "--mixed_precision", precision, "--gradient_accumulation_steps", "2",
        "--unet.gradient_checkpointing", "true", "--autoencoder.gradient_checkpointing", "true",
    )  # fmt: skip
    run = FakeRun(config, train_images=800)
    assert run.cost(4).peak > 0
    assert run.counter.host_reads == 0


def test_averages_on_the_cpu_take_nothing_of_the_gpu(joint: FakeRun) -> None:
    aside = FakeRun(config_of("--schedule.ema_on_cpu", "true"), train_images=800, cached=True)
    assert joint.cost(4).between - aside.cost(4).between == joint.cost(4).parts[AVERAGES]


def test_a_run_is_made_of_three_kinds_of_steps() -> None:
    """100 steps: 20 of warm-up; of the 80 after them each third trains all, the first of them included."""
    config = config_of(
        "--schedule.vae_warmup_fraction", "0.2", "--schedule.vae_every_k_steps", "3", "--max_steps", "100"
    )
    assert kinds_of_steps(FakeRun(config, train_images=800, cached=True)) == {0: 20, 20: 27, 21: 53}


def test_images_of_a_folder_are_counted_by_name(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data")
    (root / "metadata.csv").write_text("image_id,lesion_id\n", encoding="utf-8")
    assert count_images(config_of("--data_root", str(root))) == (70, 56, "image files, counted by name", False)


def test_the_command_prints_a_page_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_images(tmp_path / "data")
    places = ["--data_root", str(root), "--experiments_dir", str(tmp_path / "runs"), "--cache_dir", str(tmp_path / "c")]
    main("train", ["--dry_run", *TINY, *places, "--stage", "latent"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("largest batch_size") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_sweep_has_no_dry_run() -> None:
    with pytest.raises(ConfigError, match="dry_run"):
        parse("tune", ["--dry_run", "true"])


def assert_counts_the_same(stage: str, device: torch.device) -> None:
    """A step on fake tensors of the CPU, and of a device whose autocast, attention and optimiser are its own."""
    config = dataclasses.replace(config_of("--stage", stage), mixed_precision="bf16")
    here, there = (FakeRun(config, train_images=800, cached=True, device=each).cost(128) for each in (CPU, device))
    assert here.peak == pytest.approx(there.peak, rel=0.02)
    assert here.flops == there.flops


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("stage", ["joint", "latent", "decoder"])
def test_a_fake_gpu_counts_the_same(stage: str) -> None:
    assert_counts_the_same(stage, torch.device("cuda", 0))
