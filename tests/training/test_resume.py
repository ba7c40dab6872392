"""Killed and run again is the same as never killed, and one run to whoever listens."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb_files
from PIL import Image
from safetensors.torch import load_file
from tiny_run import TINY, records, write_images

from m2d.classes import ISIC7
from m2d.cli import main, parse
from m2d.errors import ExperimentError
from m2d.training.trainer import train

HAM10000 = Path(__file__).parents[3] / "shared" / "ham10000"

STEPS, EVERY = 30, 8  # an epoch is 14 steps, so 8 stands in its middle
SETTINGS = [
    *TINY, "--num_workers", "0", "--max_steps", str(STEPS), "--saving.every_steps", str(EVERY), "--data.balance",
    "natural", "--schedule.vae_warmup_fraction", "0.2", "--saving.keep_last", "20",
]  # fmt: skip
# Pictures at steps 14 and 28 for reconstructions, at 28 for the rest, and all at the end.
LOUD = [
    "--use_wandb", "--wandb_mode", "offline", "--telemetry.pictures", "true", "--telemetry.samples_every_epochs", "2",
    "--telemetry.features_every_epochs", "2", "--telemetry.gradients_every_steps", "10", "--telemetry.tensorboard",
    "--telemetry.sample_steps", "2", "--telemetry.samples_per_class", "1", "--telemetry.upload_best",
]  # fmt: skip
RECONSTRUCTIONS, OTHERS, GRADIENTS = [14, 28, 30], [28, 30], [10, 20, 30]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten real images of each class where this machine has HAM10000, painted ones elsewhere."""
    root = tmp_path_factory.mktemp("data")
    if not HAM10000.is_dir():
        return write_images(root)
    for code in ISIC7.codes:
        (root / code).mkdir()
        for path in sorted((HAM10000 / code).glob("*.jpg"))[:10]:
            shutil.copy(path, root / code)
    return root


def flags(data_root: Path, experiments: Path, *more: str) -> list[str]:
    return ["--data_root", str(data_root), "--experiments_dir", str(experiments), "--name", "run", *SETTINGS, *more]


def command(line: list[str]) -> list[str]:
    return [sys.executable, "-m", "m2d", "train", *line]


def environment() -> dict[str, str]:
    """Without the wandb service that another test of this process may have started: it would outlive the killed run."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


def logged_steps(experiments: Path) -> list[int]:
    return [record["step"] for experiment in experiments.glob("run_*") for record in records(experiment)]


def killed_once(line: list[str], experiments: Path, step: int) -> None:
    """A run that was killed as soon as it had passed a step."""
    killed = subprocess.Popen(command(line), stdout=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 400
    while max(logged_steps(experiments), default=0) <= step:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert max(logged_steps(experiments)) < STEPS


def final_tensors(experiments: Path) -> dict[str, torch.Tensor]:
    (experiment,) = experiments.glob("run_*")
    checkpoint = experiment / "checkpoints" / f"step_{STEPS:08d}"
    return {
        f"{path.relative_to(checkpoint)}:{name}": tensor
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def unbroken(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left in peace, in this process, and shows nothing."""
    experiments = tmp_path_factory.mktemp("unbroken")
    main("train", flags(data_root, experiments))
    return experiments


@pytest.fixture(scope="module")
def refusal(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that was killed in mid-epoch, and what it says to another weight of a loss."""
    experiments = tmp_path_factory.mktemp("broken")
    killed_once(flags(data_root, experiments, *LOUD), experiments, EVERY + 8)
    with pytest.raises(ExperimentError) as error:
        train(parse("train", flags(data_root, experiments, *LOUD, "--loss_weights.diffusion", "2.0")))
    return experiments, str(error.value)


@pytest.fixture(scope="module")
def broken(data_root: Path, refusal: tuple[Path, str]) -> Path:
    """The same after it was run again. It shows all it can."""
    experiments, _ = refusal
    line = command(flags(data_root, experiments, *LOUD))
    again = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False, env=environment())
    assert again.returncode == 0, again.stderr
    assert "(resumed)" in again.stdout
    return experiments


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_and_run_again_ends_bit_equal_to_an_unbroken_one(
    unbroken: Path, broken: Path
) -> None:
    """CPU, one worker: weights, averages, moments and counters are equal bit for bit, pictures or none."""
    assert logged_steps(broken) == list(range(1, STEPS + 1))
    expected, found = final_tensors(unbroken), final_tensors(broken)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []


@pytest.mark.slow
def test_it_is_one_run_to_wandb(broken: Path) -> None:
    (experiment,) = broken.glob("run_*")
    files = sorted(experiment.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert set().union(*(wandb_files.run_ids(file) for file in files)) == {experiment.name}
    config = wandb_files.config_of(files[0])
    assert config["seed"] == 0
    assert config["dataset"]["counts"]["train"]["NV"] == 8
    assert config["git"].keys() == {"commit", "uncommitted_changes"}
    best = wandb_files.artifacts(files[1])  # as it was asked for
    assert best.keys() == {f"{experiment.name}-best"}
    assert {"checkpoint.yaml", "complete.json", "unet/config.json"} <= set(best[f"{experiment.name}-best"])


@pytest.fixture(scope="module")
def rows(broken: Path) -> dict[int, dict[str, Any]]:
    """Everything that wandb was told, by our step; of a step taken twice the later."""
    found: dict[int, dict[str, Any]] = {}
    for file in sorted(broken.glob("run_*/wandb/offline-run-*/*.wandb")):
        for row in wandb_files.history(file):
            found.setdefault(row["step"], {}).update(row)
    return found


@pytest.mark.slow
def test_wandb_has_every_scalar_at_its_step(rows: dict[int, dict[str, Any]]) -> None:
    def steps_with(*names: str) -> list[int]:
        return sorted(step for step, row in rows.items() if set(names) <= row.keys())

    every = list(range(1, STEPS + 1))
    vae = ["loss/reconstruction", "loss/perceptual", "loss/kl"]
    learns = ["learning_rate/autoencoder", "gradient_norm/autoencoder"]
    speed = ["images_per_s", "data_wait_share", "model_flop_utilisation", "model_tflops_per_s", "peak_memory_gib"]
    assert sorted(rows) == steps_with(*vae, *learns, *speed, "skipped_steps", "epoch") == every
    unet = ["loss/diffusion", "loss/alignment", "loss/alignment_vae", "loss/manifold"]
    assert steps_with(*unet, "learning_rate/denoiser", "gradient_norm/denoiser") == every[6:]
    assert steps_with("val/psnr_db", "val/perceptual", "val/velocity_mse") == [*range(EVERY, STEPS, EVERY), STEPS]
    looked = ["gradient_norm/denoiser.unet.mid_block", "gradient_norm/autoencoder.vae.decoder"]
    assert steps_with(*looked, "gradient_zeros/projector", "gradient_histogram/autoencoder") == GRADIENTS
    assert rows[GRADIENTS[0]]["gradient_histogram/autoencoder"]["_type"] == "histogram"
    assert steps_with("features/NV/generated_to_own") == OTHERS


PICTURES = {
    "reconstructions": RECONSTRUCTIONS,
    "gradients": GRADIENTS,
    **dict.fromkeys(["samples", "patch_features", "alignment", "feature_projection", "class_similarity"], OTHERS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_in_wandb_and_in_the_experiment_at_its_step(
    broken: Path, rows: dict[int, dict[str, Any]], name: str
) -> None:
    (experiment,) = broken.glob("run_*")
    kept = sorted((experiment / "visualizations" / name).glob("*.png"))
    assert [int(path.stem.removeprefix("step_")) for path in kept] == PICTURES[name]
    sent = {step: row[f"pictures/{name}"] for step, row in sorted(rows.items()) if f"pictures/{name}" in row}
    assert list(sent) == PICTURES[name]
    with Image.open(kept[-1]) as image:
        assert (sent[PICTURES[name][-1]]["width"], sent[PICTURES[name][-1]]["height"]) == image.size


@pytest.mark.slow
def test_the_same_numbers_lie_in_the_experiments_tables(broken: Path) -> None:
    (experiment,) = broken.glob("run_*")
    for name, rows in (("train", STEPS), ("validation", 4), ("gradients", 3), ("features", 2)):
        with (experiment / "metrics" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) == rows


@pytest.mark.slow
def test_tensorboard_has_scalars_pictures_and_histograms(broken: Path) -> None:
    """Its event files are records of protobufs: length, two checksums, the event."""
    from tensorboardX.proto.event_pb2 import Event

    tags: dict[str, set[int]] = {}
    for file in broken.glob("run_*/tensorboard/events.out.tfevents.*"):
        content, place = file.read_bytes(), 0
        while place + 12 <= len(content):
            length = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                tags.setdefault(value.tag, set()).add(event.step)
            place += 16 + length
    assert tags["loss/reconstruction"] == set(range(1, STEPS + 1))
    assert tags["samples"] == set(OTHERS)
    assert tags["gradient_histogram/denoiser"] == set(GRADIENTS)


@pytest.mark.slow
def test_a_changed_configuration_is_refused_with_the_difference(refusal: tuple[Path, str]) -> None:
    """An unfinished experiment is not continued under other settings; that nothing is lost by asking is held above."""
    experiments, line = refusal
    assert "loss_weights.diffusion: 1.0 -> 2.0" in line
    assert "--fresh" in line
    assert "\n" not in line
    assert len(list(experiments.glob("run_*"))) == 1
