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
from safetensors.torch import load_file
from tiny_run import TINY, write_images

STEPS, EVERY = 60, 8  # an epoch is 14 steps, so 8 stands in its middle
SETTINGS = [
    *TINY, "--num_workers", "0", "--max_steps", str(STEPS), "--saving.every_steps", str(EVERY), "--data.balance",
    "natural", "--schedule.vae_warmup_fraction", "0.1", "--saving.keep_last", "20",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


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
