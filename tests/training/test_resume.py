"""Killed and run again is the same as never killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m2d.classes import CLASSES

STEPS, EVERY = 60, 8
SETTINGS = [
    "--num_workers", "0", "--max_steps", str(STEPS), "--batch_size", "4", "--saving.every_steps", str(EVERY),
    "--schedule.log_every_steps", "1", "--schedule.vae_warmup_fraction", "0.1", "--data.image_size", "16",
    "--data.balance", "natural", "--perceptual.kind", "features", "--feature_extractor.input_size", "32",
    "--feature_extractor.statistics_images", "16", "--autoencoder.block_channels", "[8,16]",
    "--autoencoder.latent_channels", "4", "--autoencoder.norm_groups", "4", "--unet.block_channels", "[16,32]",
    "--unet.layers_per_block", "1", "--unet.attention_levels", "[false,true]", "--unet.head_dim", "8",
    "--unet.norm_groups", "8", "--conditioning.context_dim", "16", "--projector.hidden_dim", "16",
    "--saving.validation_images", "4", "--saving.keep_last", "20", "--ray.threads_per_worker", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 noisy images of a class-dependent colour; 56 train, so an epoch is 14 steps and 8 stands in its middle."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for index, code in enumerate(CLASSES):
        (root / code).mkdir()
        for number in range(10):
            pixels = torch.randint(0, 120, (24, 32, 3), generator=generator) + 15 * index
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / code / f"{code}_{number}.png")
    return root


def command(data_root: Path, experiments: Path) -> list[str]:
    places = ["--data_root", str(data_root), "--experiments_dir", str(experiments), "--name", "run"]
    return [sys.executable, "-m", "m2d", "train", *places, *SETTINGS]


def run(data_root: Path, experiments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(data_root, experiments), capture_output=True, text=True, timeout=280, check=False)


def logged_steps(experiments: Path) -> list[int]:
    found = sorted(experiments.glob("run_*/metrics/train.jsonl"))
    if not found:
        return []
    lines = found[-1].read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def final_tensors(experiments: Path) -> dict[str, torch.Tensor]:
    (experiment,) = experiments.glob("run_*")
    checkpoint = experiment / "checkpoints" / f"step_{STEPS:08d}"
    return {
        f"{path.relative_to(checkpoint)}:{name}": tensor
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_and_run_again_ends_bit_equal_to_an_unbroken_one(
    data_root: Path, tmp_path: Path
) -> None:
    """CPU, one worker: weights, averages, optimiser moments and counters are equal bit for bit."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = run(data_root, unbroken)
    assert done.returncode == 0, done.stderr

    killed = subprocess.Popen(command(data_root, broken), stdout=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 200
    while not any(step > EVERY + 2 for step in logged_steps(broken)):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert max(logged_steps(broken)) < STEPS

    again = run(data_root, broken)
    assert again.returncode == 0, again.stderr
    assert "(resumed)" in again.stdout
    assert logged_steps(broken) == list(range(1, STEPS + 1))
    expected, found = final_tensors(unbroken), final_tensors(broken)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []


@pytest.mark.slow
def test_a_changed_configuration_is_refused_with_the_difference(data_root: Path, tmp_path: Path) -> None:
    """An unfinished experiment is not continued under other settings, and nothing is lost by asking."""
    killed = subprocess.Popen(command(data_root, tmp_path), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not logged_steps(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    (experiment,) = tmp_path.glob("run_*")
    changed = subprocess.run(
        [*command(data_root, tmp_path), "--loss_weights.diffusion", "2.0"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert changed.returncode == 2
    (line,) = changed.stderr.strip().splitlines()
    assert "loss_weights.diffusion: 1.0 -> 2.0" in line
    assert "--fresh" in line
    assert list(tmp_path.glob("run_*")) == [experiment]
