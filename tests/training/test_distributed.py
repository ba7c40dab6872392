"""Two workers of batch B are one worker of batch 2B."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

TESTS = Path(__file__).resolve().parents[1]


def gradients_of(world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    output = folder / f"gradients_{world_size}.pt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "training" / "ddp_gradients.py"), str(rank), str(world_size),
             str(folder / f"rendezvous_{world_size}"), str(output)],
            env=environment,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert [worker.wait(timeout=200) for worker in workers] == [0] * world_size
    return torch.load(output, weights_only=True)


def test_two_workers_of_half_the_batch_have_the_gradients_and_latent_statistics_of_one(tmp_path: Path) -> None:
    """With two micro-batches each, a discriminator, and the latent norm's statistics reduced over both workers."""
    one, two = gradients_of(1, tmp_path), gradients_of(2, tmp_path)
    assert one.keys() == two.keys()
    assert len(one) > 100
    for name, expected in one.items():
        assert_close(two[name], expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
