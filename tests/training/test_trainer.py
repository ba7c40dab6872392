"""Training on Ray: two DDP workers, the stream, the checkpoints, and a worker lost on the way."""

import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import descendants
from safetensors.torch import load_file
from tiny_run import records, tiny_config
from torch.testing import assert_close

from m2d.cli import parse
from m2d.cluster import nodes
from m2d.errors import CheckpointError, ConfigError, DataError, TrainingError
from m2d.experiment import complete_checkpoints, open_experiment
from m2d.generation.run import generate
from m2d.generation.settings import GenerateConfig
from m2d.models.checkpoint import load_checkpoint, read_prior
from m2d.training.run import RunPlan, allocator_settings
from m2d.training.saving import read_best
from m2d.training.settings import TrainConfig, as_dict, differences
from m2d.training.telemetry import MetricsLog
from m2d.training.trainer import opening_of, train


@pytest.mark.ray
@pytest.mark.slow
def test_workers_train_both_stages_and_the_result_generates(ray_cluster: None, data_root: Path, tmp_path: Path) -> None:
    """One of the two is killed on the way: no step is missing or told twice.

    The latent stage trains here in this process; on Ray it does in cluster/test_job_submit.py.
    """
    settings = [
        "--num_workers", "2", "--max_steps", "40", "--saving.every_steps", "10", "--saving.keep_last", "2",
        "--schedule.vae_warmup_fraction", "0.3",
    ]  # fmt: skip
    killer = SignalOneWorker(tmp_path / "joint", signal.SIGKILL)
    joint = train(tiny_config(data_root, tmp_path / "joint", *settings))
    killer.join()
    assert killer.signalled is not None, "the run ended before a worker could be killed"
    assert joint.info()["state"] == "done"
    assert [record["step"] for record in records(joint.path)] == list(range(1, 41))
    assert [record["step"] for record in records(joint.path, "validation")] == [10, 20, 30, 40]
    assert "loss/diffusion" not in records(joint.path)[0]
    assert {"loss/diffusion", "loss/alignment", "loss/reconstruction", "images_per_s", "data_wait_share"} <= set(
        records(joint.path)[-1]
    )
    names = [path.name for path in complete_checkpoints(joint.checkpoints)]
    assert names[-2:] == ["step_00000030", "step_00000040"]
    best = read_best(joint.checkpoints)
    measured = {f"step_{record['step']:08d}": record["val/perceptual"] for record in records(joint.path, "validation")}
    assert best is not None
    assert best[0] == min(measured, key=lambda name: measured[name])

    start = joint.checkpoints / "step_00000040"
    latent = train(
        tiny_config(
            data_root, tmp_path / "latent", "--max_steps", "4", "--stage", "latent", "--init_checkpoint", str(start),
            "--data.views", "4", "--saving.every_steps", "4",
        )
    )  # fmt: skip
    before, after = load_checkpoint(start), load_checkpoint(latent.checkpoints / "step_00000004")
    assert after.info.stage == "latent"
    prepared = MetricsLog(latent.path / "logs", "preparing").last()
    views = 4 * sum(latent.info()["dataset"]["counts"]["train"].values())
    assert prepared is not None
    assert (prepared["what"], prepared["done"], prepared["total"]) == ("caching latents", views, views)
    for name, tensor in before.autoencoder.state_dict().items():
        assert torch.equal(after.autoencoder.state_dict()[name], tensor), name
    assert before.sha256 != after.sha256

    made_by = {"checkpoint": str(latent.checkpoints / "best"), "num_actors": 0}
    output = generate(GenerateConfig(**made_by, num_samples=1, classes="df,mel", steps=2))
    assert sorted(path.parent.name for path in output.rglob("*.png") if path.parent != output) == ["DF", "MEL"]
    assert output.is_relative_to(latent.path / "generated_images")


@pytest.mark.parametrize(("skipped", "warned"), [(0, False), (2, False), (3, True)])
def test_skipped_steps_are_in_the_record_and_said_where_they_are_more_than_a_few(
    skipped: int, warned: bool, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def trains(plan: RunPlan, *_: object) -> None:
        MetricsLog(plan.experiment.path / "metrics", "train").write(plan.total_steps, {"skipped_steps": float(skipped)})

    monkeypatch.setattr("m2d.training.trainer._run", trains)
    info = train(tiny_config(data_root, tmp_path, "--epochs", "20", "--max_steps", "200")).info()
    told = f"{skipped} of 200 steps were skipped"
    assert (info["state"], info["skipped_steps"]) == ("done", skipped)
    assert any(line.startswith(told) for line in info["degraded"]) == warned
    assert (told in capsys.readouterr().out) == warned


@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_run_on_ray_goes_on_from_its_newest_checkpoint_though_older_ones_were_deleted(
    ray_cluster: None, data_root: Path, tmp_path: Path
) -> None:
    settings = ["--num_workers", "1", "--max_steps", "12", "--saving.every_steps", "3", "--saving.keep_last", "2"]
    config = tiny_config(data_root, tmp_path, *settings)
    first = train(config)
    unbroken = load_file(first.checkpoints / "step_00000012" / "training" / "denoiser.safetensors")
    shutil.rmtree(first.checkpoints / "step_00000012")  # as if it had died after step 9's was whole
    for name in ("best", "best.json"):
        (first.checkpoints / name).unlink()
    first.update_info(state="running")
    second = train(config)
    assert second.path == first.path
    assert [record["step"] for record in records(second.path)] == list(range(1, 13))
    resumed = load_file(second.checkpoints / "step_00000012" / "training" / "denoiser.safetensors")
    for name, tensor in unbroken.items():
        assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_worker_that_hangs_ends_the_run_with_an_error_and_not_with_silence(
    ray_cluster: None, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP: the process is there and answers nobody, neither the other worker nor Ray."""
    monkeypatch.setenv("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
    settings = ["--num_workers", "2", "--max_steps", "2000", "--saving.every_steps", "5", "--ray.max_failures", "0"]
    stopper = SignalOneWorker(tmp_path, signal.SIGSTOP)
    with pytest.raises(TrainingError, match=r"^the workers waited 20 s for one that does not answer"):
        train(tiny_config(data_root, tmp_path, *settings, "--ray.collective_timeout_s", "20"))
    stopper.join()
    (experiment,) = tmp_path.glob("run_*")
    assert complete_checkpoints(experiment / "checkpoints")


class SignalOneWorker(threading.Thread):
    """Once a checkpoint is there, sends a signal to one training worker of this process's own cluster."""

    def __init__(self, experiments: Path, number: signal.Signals) -> None:
        super().__init__()
        self.experiments, self.number = experiments, number
        self.signalled: int | None = None
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            experiments = list(self.experiments.glob("run_*"))
            if experiments and complete_checkpoints(experiments[0] / "checkpoints"):
                for process in descendants("RayTrainWorker")[:1]:
                    process.send_signal(self.number)
                    self.signalled = process.pid
                    return
            time.sleep(0.05)


def test_what_is_wrong_is_said_before_ray_starts_and_a_new_run_without_images_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_root is not set"):
        train(parse("train", ["--experiments_dir", str(tmp_path / "runs")]))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "unmounted").mkdir()
    with pytest.raises(DataError, match="data_root"):
        train(tiny_config(tmp_path / "unmounted", tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("saved", [True, False])
def test_a_resumed_run_without_images_is_kept(tmp_path: Path, saved: bool) -> None:
    """Somebody cleared cache/, and the disk with the images is not mounted when the command is run again.

    Without a checkpoint too: this call did not create it, and what is in it is not ours to remove.
    """
    (tmp_path / "unmounted").mkdir()
    config = tiny_config(tmp_path / "unmounted", tmp_path / "runs")
    (stopped, _) = open_experiment(config.experiments_dir, "run", as_dict(config), differences, fresh=False, command=[])
    marker = stopped.checkpoints / "step_00000004" / "complete.json"
    if saved:
        marker.parent.mkdir()
        marker.write_text('{"files": {}}', encoding="utf-8")
    with pytest.raises(DataError, match="data_root"):
        train(config)
    assert marker.is_file() is saved
    assert stopped.info()["state"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_driver_whose_gpu_torch_does_not_see_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n")
    monkeypatch.setattr(nodes, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = opening_of(TrainConfig(num_workers=0)).degraded
    assert any(line.startswith("torch sees no GPU: ") and "535.183.01" in line for line in told)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user's wish
    assert not any("535.183.01" in line for line in opening_of(TrainConfig(num_workers=0)).degraded)


def test_memory_is_allocated_in_expandable_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert allocator_settings() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert allocator_settings() == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:256")
    assert allocator_settings() == {}


@pytest.mark.ray
def test_workers_that_no_node_can_hold_are_refused(ray_cluster: None, data_root: Path, tmp_path: Path) -> None:
    """Ray would wait for room for ever."""
    message = r"num_workers is 2 and the cluster's nodes hold 1 workers of 5 CPUs each; lower --num_workers or"
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(data_root, tmp_path, "--num_workers", "2", "--ray.cpus_per_worker", "5"))
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_run_changes_the_checkpoints_decoder_alone(data_root: Path, tmp_path: Path) -> None:
    joint = train(tiny_config(data_root, tmp_path / "joint", "--max_steps", "3"))
    start = complete_checkpoints(joint.checkpoints)[-1]
    adversarial = [f"--discriminator.{name}" for name in ("enabled=true", "channels=8", "layers=1", "start_step=2")]
    stage = ["--stage", "decoder", "--init_checkpoint", str(start), "--max_steps", "4", *adversarial]
    made = complete_checkpoints(train(tiny_config(data_root, tmp_path, *stage)).checkpoints)[-1]
    before, after = load_checkpoint(start), load_checkpoint(made)
    assert after.info.stage == "decoder"
    vae, new_vae = before.autoencoder.vae, after.autoencoder.vae
    assert_close(new_vae.encoder.state_dict(), vae.encoder.state_dict(), rtol=0, atol=0)
    assert_close(after.denoiser.state_dict(), before.denoiser.state_dict(), rtol=0, atol=0)
    assert not torch.equal(vae.decoder.conv_in.weight, new_vae.decoder.conv_in.weight)
    assert_close(vars(read_prior(made)), vars(read_prior(start)), rtol=0, atol=0)

    other_unet = ["--name", "other", *stage, "--unet.block_channels", "[16,64]"]
    with pytest.raises(CheckpointError, match=r"stage decoder keeps the U-Net of .* another shape or extractor"):
        train(tiny_config(data_root, tmp_path, *other_unet))
    shifted = ["--name", "shifted", *stage, "--schedule.time_shift", "3"]
    with pytest.raises(CheckpointError, match=r"stage decoder keeps the U-Net of .* add --schedule.time_shift 1"):
        train(tiny_config(data_root, tmp_path, *shifted))


def test_what_a_power_cut_emptied_costs_the_steps_since_the_newest_whole_checkpoint(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data_root, tmp_path, "--max_steps", "4", "--saving.every_steps", "2")
    experiment = train(config)
    names = ("experiment_info.json", "configs/config.yaml", "checkpoints/best.json", "metrics/validation.jsonl")
    for name in (*names, "checkpoints/step_00000004/unet/diffusion_pytorch_model.safetensors"):
        (experiment.path / name).write_bytes(b"")
    (experiment.checkpoints / "best").unlink()
    capsys.readouterr()
    assert train(config).path == experiment.path
    assert re.search(r"is missing or cut short, so step_00000004 .* of step 2$", capsys.readouterr().out, re.MULTILINE)
    assert [load_checkpoint(path).step for path in complete_checkpoints(experiment.checkpoints)] == [2, 4]
    assert load_checkpoint(experiment.checkpoints / "best").step in (2, 4)
    assert experiment.info()["state"] == "done"
    assert [record["step"] for record in records(experiment.path)] == [1, 2, 3, 4]
