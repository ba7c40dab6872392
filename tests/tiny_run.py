"""A training run of seconds: its flags, and the images it trains on."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from m2d.classes import ISIC7
from m2d.cli import parse

TINY = [
    "--data.image_size", "16", "--perceptual.kind", "features", "--feature_extractor.input_size", "32",
    "--feature_extractor.statistics_images", "16", "--autoencoder.block_channels", "[8,16]",
    "--autoencoder.latent_channels", "4", "--autoencoder.norm_groups", "4", "--unet.block_channels", "[16,32]",
    "--unet.layers_per_block", "1", "--unet.attention_levels", "[false,true]", "--unet.head_dim", "8",
    "--unet.norm_groups", "8", "--conditioning.context_dim", "16", "--projector.hidden_dim", "16",
    "--saving.validation_images", "8", "--batch_size", "4", "--schedule.log_every_steps", "1",
    "--ray.threads_per_worker", "1", "--telemetry.pictures", "false"
]  # fmt: skip


def write_images(root: Path) -> Path:
    """70 noisy images of a class-dependent colour; 56 of them train, 14 steps of 4."""
    generator = torch.Generator().manual_seed(0)
    for index, code in enumerate(ISIC7.codes):
        (root / code).mkdir(parents=True)
        for number in range(10):
            pixels = torch.randint(0, 120, (24, 32, 3), generator=generator) + 15 * index
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / code / f"{code}_{number}.png")
    return root


def tiny_config(data_root: Path, root: Path, *more: str) -> Any:
    """A run's settings, by default in the calling process."""
    places = ["--data_root", str(data_root), "--experiments_dir", str(root), "--cache_dir", str(root / "cache")]
    return parse("train", [*places, "--name", "run", "--num_workers", "0", *TINY, *more])


def records(experiment: Path, name: str = "train") -> list[dict[str, Any]]:
    """Of metrics/NAME.jsonl, but for a line that is being written."""
    path = experiment / "metrics" / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
