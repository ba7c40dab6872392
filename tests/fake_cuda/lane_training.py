"""Training on the GPU: every preset in each stage and precision, validation, the latent cache."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda.lane import CUDA, TOTAL_STEPS, PresetStep, card_of, host_waits, preset

from m2d.arguments import preset_names
from m2d.models.perceptual import build_perceptual
from m2d.models.settings import Precision
from m2d.training.features import FeatureSource, cache_latents
from m2d.training.settings import TrainConfig
from m2d.training.validation import RunView

VAE = {"loss/reconstruction", "loss/perceptual"}
UNET = {"loss/diffusion", "loss/alignment", "loss/manifold"}
LOSSES = {
    "joint": VAE | UNET | {"loss/kl", "loss/alignment_vae"},
    "warm-up": VAE | {"loss/kl"},
    "latent": UNET,
    "decoder": VAE,
}
ADVERSARIAL = {"loss/adversarial", "loss/discriminator"}
# isic-256-pretrained is isic-256 without its file.
JOINT_PRESETS = [name for name in preset_names() if not name.endswith(("-latent", "-decoder", "-pretrained"))]
# Elsewhere bf16, an H100's own, for CPU time. ham-128 has a discriminator, which fp16 scales too.
PRECISIONS: dict[str, tuple[Precision, ...]] = {"demo": ("no", "bf16", "fp16"), "ham-128": ("bf16", "fp16")}
CASES = [
    (name, stage, precision)
    for name in JOINT_PRESETS
    for stage in ({"latent"} if preset(name).autoencoder.kind == "linear" else LOSSES)  # block PCA has no other
    for precision in PRECISIONS.get(name, ("bf16",))
]


def preset_of(name: str, stage: str) -> TrainConfig:
    """A stage's own preset where it has one."""
    return preset(f"{name}-{stage}" if f"{name}-{stage}" in preset_names() else name)


@pytest.mark.parametrize(("name", "stage", "precision"), CASES)
def test_a_step_never_waits_for_the_host(name: str, stage: str, precision: Precision) -> None:
    """Two accumulated steps, the first of which creates the optimiser's moments; the log line then has every loss."""
    warmup = TOTAL_STEPS if stage == "warm-up" else 0
    run = PresetStep(preset_of(name, stage), "joint" if warmup else stage, precision, warmup_steps=warmup)
    with host_waits() as waits:
        for number in range(2):
            run.take(2, micro_batches=2, step=number)
    assert waits == Counter()
    expected = LOSSES[stage] | (ADVERSARIAL if run.networks.discriminator is not None else set())
    assert {scalar for scalar in run.step.read_scalars() if scalar.startswith("loss/")} == expected


@pytest.mark.parametrize("stage", LOSSES)
def test_isic_256_trains_on_a_card_of_8_gb(stage: str) -> None:
    """By torch's own allocator. 8 GiB less 0.5 for CUDA's context and 0.3 for cuDNN's workspaces."""
    config = preset_of("isic-256", stage)
    warmup = TOTAL_STEPS if stage == "warm-up" else 0
    with card_of(7.2):
        run = PresetStep(config, "joint" if warmup else stage, "bf16", warmup_steps=warmup, cached_dim=1280)
        for number in range(2):
            run.take(config.batch_size, min(config.gradient_accumulation_steps, 2), number)


def test_averages_in_host_memory_cost_a_copy_of_the_whole_and_not_one_of_each_tensor() -> None:
    config = preset("demo")
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, ema_on_cpu=True))
    run = PresetStep(config, "joint", "bf16")
    with host_waits() as waits:
        run.take(2)
    assert {tensor.device.type for tensor in run.step.ema.state_dict().values()} == {"cpu"}
    assert 0 < waits.total() <= 3  # whether the step counts, and the weights


def test_a_stage_without_averages_trains_where_they_would_be_in_host_memory() -> None:
    """The decoder stage's U-Net is its own average and stays where the latent norm's statistics are needed."""
    config = preset("demo")
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, ema_on_cpu=True))
    run = PresetStep(config, "decoder", "bf16")
    run.take(2)
    assert next(run.networks.denoiser.parameters()).device.type == "cuda"


def test_a_card_that_is_too_small_for_a_step_runs_out_of_memory() -> None:
    with card_of(0.05), pytest.raises(torch.OutOfMemoryError):
        PresetStep(preset("demo"), "joint", "no").take(8)


class BlankImages:
    """A reader of ten black images."""

    labels = np.zeros(10, dtype=np.int64)

    def __init__(self, side: int) -> None:
        self.image_size = side

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        images = np.zeros((len(rows), self.image_size, self.image_size, 3), np.uint8)
        return {"images": images, "labels": self.labels[rows], "catalog_rows": rows}


def test_validation_and_the_latent_cache_run_on_the_gpu(tmp_path: Path) -> None:
    run = PresetStep(preset("demo"), "joint", "bf16")
    reader: Any = BlankImages(48)
    source = FeatureSource(CUDA, run.networks.extractor)
    perceptual = build_perceptual("features", run.networks.extractor)
    plan: Any = SimpleNamespace(config=dataclasses.replace(run.config, batch_size=4))
    prior: Any = None
    view = RunView(plan, run.networks, run.step.ema.module, prior, perceptual, reader, source)
    measures = view.validate(rank=0, world_size=1)
    assert measures == {}  # the number of images is summed on the GPU, which computes nothing: 0
    table = cache_latents(run.networks.autoencoder, reader, source, tmp_path, views=2, rank=0, world_size=1)
    assert table.batch(np.arange(3), np.zeros(3, dtype=np.int8)).mean.shape == (3, 4, 12, 12)
