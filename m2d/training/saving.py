"""Checkpoints of a run: a snapshot in memory, written in the background; the last few and the best are kept.

A checkpoint appears whole or not at all: it is written under a hidden name, listed in complete.json once the disk has
it, then renamed. Only then do older ones go, and they lose their names first.
"""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_map

from m2d.diffusion.feature_prior import FeaturePrior
from m2d.errors import CheckpointError, TrainingError, first_line
from m2d.experiment import complete_checkpoints, link_best, step_of
from m2d.files.atomic import COMPLETE, FULL, PARTIAL, is_in_use, mark_complete, to_disk, write_whole
from m2d.models.checkpoint import CheckpointInfo, read_info, save_tensors, write_inference_files
from m2d.training.networks import Networks
from m2d.training.validation import score as score_of


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
    for left in directory.parent.glob(f".step_*{PARTIAL}"):  # by a killed process, or by `_remove`
        shutil.rmtree(left, ignore_errors=True)
    partial = _hidden(directory)
    try:
        _write_files(snapshot, partial)
        if directory.exists():  # half of a deleted one
            _remove(directory)
        partial.rename(directory)
        to_disk(directory.parent)  # older checkpoints are deleted next, and the power may fail then
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # so that a full disk has room for the record of the failure
        raise


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.{uuid4().hex[:8]}{PARTIAL}")


def _remove(checkpoint: Path) -> None:
    """Its name goes at once. NFS keeps files that are open, and so the folder: it goes before the next one is saved."""
    shutil.rmtree(checkpoint.rename(_hidden(checkpoint)), ignore_errors=True)


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
    if not (directory / "training" / "state.json").is_file():
        raise CheckpointError(f"checkpoint: {directory} holds no training state; start from it by --init_checkpoint")
    try:
        return _read_training_state(directory, state)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {directory} cannot be resumed from ({first_line(error)}); delete it to resume from the one "
            "before it"
        ) from None


def _read_training_state(directory: Path, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    training = directory / "training"
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
            remedy = "make room" if error.errno in FULL else "see to that"
            raise TrainingError(
                f"a checkpoint could not be written to {self.directory}: {error}; those before it are intact, "
                f"{remedy} and run the same command again"
            ) from None

    def _write(self, snapshot: Snapshot, score: float) -> Path:
        path = self.directory / f"step_{snapshot.info.step:08d}"
        write_snapshot(snapshot, path)
        best = read_best(self.directory)
        if best is None or score <= best[1]:
            best = (path.name, score)
        write_whole(self.directory / "best.json", json.dumps({"checkpoint": best[0], "score": best[1]}))
        link_best(self.directory, best[0])
        for old in complete_checkpoints(self.directory)[: -self.keep_last]:
            if old.name != best[0] and not is_in_use(old / COMPLETE):
                with suppress(OSError):  # CIFS renames no folder with an open file; it goes with a later save
                    _remove(old)
        return path


def read_best(directory: Path) -> tuple[str, float] | None:
    """(checkpoint name, score) of the best checkpoint so far: by best.json, or else by what each says of itself."""
    whole = complete_checkpoints(directory)
    with suppress(OSError, KeyError, TypeError, ValueError):  # it is lost or empty, as after a power cut
        record = json.loads((directory / "best.json").read_text(encoding="utf-8"))
        if (found := str(record["checkpoint"])) in (path.name for path in whole):
            return found, float(record["score"])
    judged = []
    for path in whole:
        with suppress(CheckpointError, OSError, KeyError, TypeError, ValueError):
            measures = json.loads((path / "training" / "state.json").read_text(encoding="utf-8"))["metrics"]
            judged.append((score_of(measures, read_info(path).stage), -step_of(path.name), path.name))
    return (min(judged)[2], min(judged)[0]) if judged else None
