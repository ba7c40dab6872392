"""bench/kills.py of training: how it counts, and three kills of a real run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.kills import Strike, held_against, table, training


def run(place: Path, weight: float, steps: list[int]) -> Any:
    """What held_against asks of a run, with a checkpoint of one number and a loss a step."""
    checkpoint = place / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.tensor([weight])}, checkpoint / "denoiser.safetensors")
    records = [{"step": step, "loss/diffusion": 1 / step} for step in steps]
    return SimpleNamespace(place=place, records=lambda: records, seconds=20.0)


def test_a_run_like_the_unbroken_one_differs_in_nothing(tmp_path: Path) -> None:
    found = held_against(run(tmp_path / "one", 1.0, [1, 2, 3]), run(tmp_path / "other", 1.0, [1, 2, 3, 4]), 3)
    assert (found.unlike_tensors, found.largest_difference, found.unlike_losses) == (0, 0.0, 0)
    assert (found.tensors, found.missing, found.twice, found.broken_s) == (1, 0, 0, 20.0)


def test_other_weights_and_steps_missing_or_told_twice_are_counted(tmp_path: Path) -> None:
    found = held_against(run(tmp_path / "one", 1.5, [1, 3, 3]), run(tmp_path / "other", 1.0, [1, 2, 3]), 3)
    assert (found.unlike_tensors, found.largest_difference, found.unlike_losses) == (1, 0.5, 1)
    assert (found.missing, found.twice) == (1, 1)


def test_the_table_has_a_row_for_each_kind(tmp_path: Path) -> None:
    same = held_against(run(tmp_path / "one", 1.0, [1, 2, 3]), run(tmp_path / "other", 1.0, [1, 2, 3]), 3)
    strikes = [Strike("worker", 60.0, 25, 20, 10.0), Strike("worker", 60.0, 37, 20, 14.0), Strike("notice", 9, 9, 9, 3)]
    lines = table(strikes, same).splitlines()
    assert "| worker | 2 | 5, 17 | 11 | 10, 14 | 12 |" in lines
    assert "| node, after a notice | 1 | 0 | 0 | 3 | 3 |" in lines


@pytest.mark.processes
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_run_whose_worker_driver_and_node_are_killed_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """Anything else is a SystemExit."""
    output = tmp_path / "kills.json"
    training(kills=3, notices=1, mtbf_s=5.0, notice_s=3.0, every_steps=20, output=str(output))
    strikes = json.loads(output.read_text(encoding="utf-8"))["strikes"]
    assert sorted(strike["what"] for strike in strikes) == ["driver", "node", "notice", "worker"]
