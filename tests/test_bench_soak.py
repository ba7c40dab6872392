"""bench/soak.py: what it calls growth, and a soak of seconds."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.soak import Sample, soak, table, trends


def samples(minutes: int, per_minute: float) -> list[Sample]:
    """Twelve a minute, with a noise of 1 MiB and a spike in every twentieth."""
    noise = np.random.default_rng(0).normal(size=12 * minutes)
    return [
        {
            "seconds": 5.0 * number,
            "steps": float(number),
            "driver: processes": 1.0,
            "driver: open files": 40.0,
            "driver: threads": 8.0,
            "driver: private MiB": 300 + per_minute * number / 12 + noise[number] + 50 * (number % 20 == 0),
        }
        for number in range(12 * minutes)
    ]


@pytest.mark.parametrize(("per_minute", "verdict"), [(0.0, "flat"), (1.0, "grows"), (-1.0, "falls")])
def test_a_slope_is_told_from_noise_and_spikes(per_minute: float, verdict: str) -> None:
    (found,) = [trend for trend in trends(samples(20, per_minute)) if trend.name == "driver: private MiB"]
    assert found.verdict == verdict
    assert found.low <= 60 * per_minute <= found.high


def test_a_process_that_only_sometimes_runs_counts_as_nothing_in_between() -> None:
    half = [{**sample, "tasks: processes": 1.0} if n % 12 < 3 else sample for n, sample in enumerate(samples(6, 0.0))]
    (found,) = [trend for trend in trends(half) if trend.name == "tasks: processes"]
    assert (found.first, found.last, found.verdict) == (0.0, 0.0, "flat")


def test_a_process_is_a_row_with_its_files_and_threads() -> None:
    row = next(line for line in table(trends(samples(10, 0.0))).splitlines() if line.startswith("| driver"))
    assert row.startswith("| driver | 1 | 40 | 8 | ")
    assert row.endswith(" | flat |")


@pytest.mark.processes
@pytest.mark.exhaustive
def test_a_soak_of_seconds_looks_at_every_process_and_leaves_none(tmp_path: Path) -> None:
    soak(minutes=1.5, num_workers=1, sample_s=2.0, output=str(tmp_path / "soak.json"))
    found = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert found["steps"] > 0
    assert (found["exit_code"], found["processes_left"]) == (143, 0)
    last = found["samples"][-1]
    assert {"driver: threads", "RayTrainWorker: private MiB", "raylet: open files", "object store: MiB"} <= last.keys()
