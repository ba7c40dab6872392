"""Checkpoints of a run: a snapshot in memory, written in the background; the last few and the best are kept.

A checkpoint appears whole or not at all: it is written under a temporary name, listed in complete.json, then renamed.
"""

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map

from m2d.diffusion.feature_prior import FeaturePrior
from m2d.errors import CheckpointError, TrainingError
from m2d.experiment import BEST, complete_checkpoints
from m2d.files.atomic import is_in_use, write_whole
from m2d.models.checkpoint import CheckpointInfo, mark_complete, save_tensors, write_inference_files
from m2d.models.settings import COMPLETE
from m2d.training.networks import Networks


@dataclass(frozen=True)
class Snapshot:
    """A run's state at one step, copied to the CPU so that training continues while it is written."""

    info: CheckpointInfo
    networks: Networks  # for their configurations only
    state: dict[str, Any]  # of the step, tensors on the CPU
    random_state: Tensor
    metrics: dict[str, float]
    prior: FeaturePrior | None


def take_snapshot(
    info: CheckpointInfo,
    networks: Networks,
    state: dict[str, Any],
    metrics: dict[str, float],
    prior: FeaturePrior | None = None,
) -> Snapshot:
    """Copy the step's state to the CPU. This is all that the training loop waits for."""

    def copied(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    return Snapshot(info, networks, tree_map(copied, state), torch.get_rng_state(), dict(metrics), prior)


def write_snapshot(snapshot: Snapshot, directory: Path) -> None:
    """Write a whole checkpoint as `directory`, atomically. Raises OSError, and leaves nothing then.

    A whole checkpoint that is there already stays: it is of the same step, and a crash while it is being replaced
    would leave neither.
    """
    if (directory / COMPLETE).is_file():
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_files(snapshot, partial)
        for path in filter(Path.is_file, partial.rglob("*")):
            with path.open("rb") as file:  # older checkpoints are deleted next, and the power may fail then
                os.fsync(file.fileno())
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # so that a full disk has room for the record of the failure
        raise
    shutil.rmtree(directory, ignore_errors=True)  # half of a deleted one
    partial.rename(directory)


def _write_files(snapshot: Snapshot, partial: Path) -> None:
    training, state, networks = partial / "training", snapshot.state, snapshot.networks
    training.mkdir(parents=True)
    averaged = {name: tensor for name, tensor in state["ema"].items() if name != "ema_updates"}
    vae = {name.removeprefix("vae."): tensor for name, tensor in state["networks"]["autoencoder"].items()}
    inference = {"vae": vae, "denoiser": averaged}
    write_inference_files(
        partial, snapshot.info, networks.autoencoder, networks.denoiser.unet, inference, snapshot.prior
    )
    files = {name: tensors for name, tensors in state["networks"].items() if name != "autoencoder"}  # vae/ holds it
    for name, optimizer in state["optimizers"].items():
        files[f"optimizer_{name}"] = {
            f"{index}.{key}": tensor for index, entry in optimizer["state"].items() for key, tensor in entry.items()
        }
    files["counters"] = {
        "ema_updates": state["ema"]["ema_updates"],
        "skipped": state["skipped"],
        "random_state": snapshot.random_state,
    }
    for name, tensors in files.items():
        save_tensors(tensors, training / f"{name}.safetensors")
    document = {"metrics": snapshot.metrics, "scaler": state["scaler"], "position": state.get("position", {})}
    (training / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    mark_complete(partial)


def load_training_state(directory: Path, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The step's state from a checkpoint, in the shape of `state` (a fresh step's state_dict), and state.json.

    Raises CheckpointError where it was written for inference only.
    """
    training = directory / "training"
    if not (training / "state.json").is_file():
        raise CheckpointError(f"checkpoint: {directory} holds no training state; start from it by --init_checkpoint")
    document = json.loads((training / "state.json").read_text(encoding="utf-8"))
    counters = load_file(training / "counters.safetensors")
    averaged = load_file(directory / "conditioning.safetensors")
    unet, vae = (load_file(directory / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "vae"))
    averaged |= {f"unet.{name}": tensor for name, tensor in unet.items()}
    networks = {
        name: load_file(training / f"{name}.safetensors") for name in state["networks"] if name != "autoencoder"
    }
    networks["autoencoder"] = {f"vae.{name}": tensor for name, tensor in vae.items()}
    optimizers = {}
    for name, fresh in state["optimizers"].items():
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(training / f"optimizer_{name}.safetensors").items():
            index, _, moment = key.partition(".")
            entries.setdefault(int(index), {})[moment] = tensor
        optimizers[name] = {"state": entries, "param_groups": fresh["param_groups"]}
    torch.set_rng_state(counters["random_state"])
    return {
        "networks": networks,
        "ema": {**averaged, "ema_updates": counters["ema_updates"]},
        "optimizers": optimizers,
        "scaler": document["scaler"],
        "skipped": counters["skipped"],
    }, document


class CheckpointKeeper:
    """Writes snapshots one at a time in a thread, keeps the last k and the best (lowest score)."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="m2d-checkpoint")
        self._pending: Future[Path] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, snapshot: Snapshot, score: float) -> None:
        """Begin to write; waits only for a write that is still under way."""
        self.wait()
        self._pending = self._thread.submit(self._write, snapshot, score)

    def wait(self) -> Path | None:
        """The last checkpoint once it is whole. Raises TrainingError where it could not be written."""
        pending, self._pending = self._pending, None
        try:
            return None if pending is None else pending.result()
        except OSError as error:
            raise TrainingError(
                f"a checkpoint could not be written to {self.directory}: {error}; those before it are intact, "
                "make room and run the same command again"
            ) from None

    def _write(self, snapshot: Snapshot, score: float) -> Path:
        path = self.directory / f"step_{snapshot.info.step:08d}"
        write_snapshot(snapshot, path)
        best = read_best(self.directory)
        if best is None or score <= best[1]:
            best = (path.name, score)
            write_whole(self.directory / f"{BEST}.json", json.dumps({"checkpoint": path.name, "score": score}))
        link = self.directory / f".{BEST}.partial"  # each time: a crash may have come between the record and the link
        link.unlink(missing_ok=True)
        link.symlink_to(best[0])
        link.replace(self.directory / BEST)
        for old in complete_checkpoints(self.directory)[: -self.keep_last]:
            if old.name != best[0] and not is_in_use(old / COMPLETE):  # else after the next save
                (old / COMPLETE).unlink()  # first: half a deletion must not look like a checkpoint
                shutil.rmtree(old, ignore_errors=True)
        return path


def read_best(directory: Path) -> tuple[str, float] | None:
    """(checkpoint name, score) of the best checkpoint so far."""
    path = directory / f"{BEST}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return str(record["checkpoint"]), float(record["score"])
