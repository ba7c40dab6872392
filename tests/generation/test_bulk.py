"""On Ray: the images of a run do not depend on who made them, and the loss of an actor costs nothing but time."""

import hashlib
import os
import signal
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from processes import descendants
from tiny_checkpoint import write_checkpoint

from m2d.errors import CheckpointError, ConfigError
from m2d.generation import run
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.generation.workers import ActorPool, pick_pool
from m2d.models.checkpoint import Checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def directory(prior_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The tiny checkpoint on the disk, where actors find it."""
    return write_checkpoint(prior_checkpoint, tmp_path / "ham" / "checkpoints" / "best")


def config(directory: Path, **settings: Any) -> GenerateConfig:
    small = {"checkpoint": str(directory), "classes": "MEL,DF,NV", "num_samples": 20, "steps": 2, "device": "cpu"}
    return GenerateConfig(**{**small, "gates": GateConfig(enabled=False), **settings})


def pngs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for label in ("MEL", "DF", "NV") for path in (root / label).glob("*.png")}


def largest_difference(one: dict[str, bytes], other: dict[str, bytes]) -> int:
    assert one.keys() == other.keys()
    pixels = [[np.asarray(Image.open(BytesIO(images[name]))).astype(int) for name in one] for images in (one, other)]
    return int(np.abs(np.stack(pixels[0]) - np.stack(pixels[1])).max())


def actor_processes() -> list[psutil.Process]:
    """The generators of the Ray that this process started, and of no other."""
    return descendants("BlockActor")


@pytest.mark.parametrize(("gpus", "device"), [(1.0, "cuda"), (0.5, "cuda"), (0.0, "cuda:1")])
def test_an_actor_that_reserves_a_gpu_sees_it_as_its_first(
    gpus: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reserves none sees all of the machine's."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 4.0})
    assert pick_pool(2, gpus, "cuda:1", 4).device == device


@pytest.mark.slow
def test_images_are_those_of_this_process_though_an_actor_is_lost(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed: list[int] = []

    def kill_one_actor() -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            processes = actor_processes()
            if processes and len(list((output / "parts").glob("*.parquet"))) >= 3:
                killed.append(processes[0].pid)
                os.kill(processes[0].pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one_actor)
    killer.start()
    settings = config(directory, num_actors=2, batch_size=2, num_samples=10, steps=8, output=str(output))
    root = run.generate(settings)
    killer.join()
    assert killed, "no actor was there to be killed"
    rows = pq.read_table(root / "manifest.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == len(pngs(root)) == 30
    for row in rows:
        assert hashlib.sha256((root / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    assert pq.read_table(root / "journal.parquet").num_rows == 30, "a group that came twice stands in it once"
    here = run.generate(replace(settings, num_actors=0, output=str(tmp_path / "here")))
    assert pngs(root) == pngs(here)
    other = run.generate(replace(settings, num_actors=0, batch_size=15, output=str(tmp_path / "other batches")))
    assert largest_difference(pngs(root), pngs(other)) <= 1


def test_an_error_in_an_actor_is_the_users_one_line(directory: Path, tmp_path: Path) -> None:
    """The actor loads the checkpoint itself; here it is another one by then."""
    real = run._Run._make

    def swapped(self: Any, *arguments: Any) -> int:
        (directory / "conditioning.safetensors").unlink()
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Run, "_make", swapped)
        with pytest.raises(CheckpointError, match="missing or cut short") as caught:
            run.generate(config(directory, num_actors=1, output=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
    deadline = time.monotonic() + 60
    while ray.available_resources()["CPU"] < ray.cluster_resources()["CPU"]:  # though the error is held here
        assert time.monotonic() < deadline, "the actor lives on"
        time.sleep(0.2)
    assert pq.read_table(tmp_path / "out" / "manifest.parquet").num_rows == 0


def test_actors_leave_a_cpu_to_the_writers_and_are_no_more_than_the_groups() -> None:
    """The fixture's cluster has five CPUs and no GPU."""
    pool = pick_pool(None, None, "cpu", 1000)
    assert pool == ActorPool(most=4, device="cpu", gpus=0.0, threads=1)
    assert pick_pool(2, None, "cpu", 1000).threads == 2
    few = pick_pool(None, None, "cpu", 3)
    assert (few.most, few.threads) == (3, 1), "the last groups are computed like the first"
    with pytest.raises(ConfigError, match="gpus_per_actor is 1 and the Ray cluster has 0 GPUs"):
        pick_pool(None, None, "cuda", 1000)
