"""Training on two of three nodes: what a killed worker, a killed node and a preempted one cost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import records, write_images

TESTS = Path(__file__).resolve().parents[1]
EVERY = 20  # steps from checkpoint to checkpoint, in nodes_run.py


def run_on_three_nodes(what: str, folder: Path) -> tuple[dict[str, Any], Path, list[dict[str, float]]]:
    """What nodes_run.py reports, the run's directory, and its record of each step."""
    data_root, experiments, report = write_images(folder / "data"), folder / "experiments", folder / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    script = [sys.executable, str(TESTS / "training" / "nodes_run.py"), what]
    done = subprocess.run(
        [*script, str(data_root), str(experiments), str(report)],
        capture_output=True, text=True, timeout=1150, check=False, env=environment,
    )  # fmt: skip
    assert report.is_file(), done.stdout + done.stderr
    told = json.loads(report.read_text(encoding="utf-8"))
    assert "error" not in told, told
    assert told["hosts"] == 2
    (run,) = experiments.glob("run_*")
    return told, run, records(run)


@pytest.mark.processes
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_killed_node_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    told, run, records = run_on_three_nodes("killed", tmp_path)
    last = records[-1]["step"]
    # No step is missing or told twice, although a group died and its last steps were taken again.
    assert [record["step"] for record in records] == list(range(1, last + 1))
    assert EVERY <= told["node_killed_at"] < last
    # SIGTERM at the end: the last step is in a checkpoint of its own.
    assert told["stopped"].startswith(f"stopped at step {last:,} of ")
    assert (run / "checkpoints" / f"step_{last:08d}" / "complete.json").is_file()
    assert json.loads((run / "experiment_info.json").read_text(encoding="utf-8"))["state"] == "stopped"


@pytest.mark.processes
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_an_elastic_run_goes_on_with_the_nodes_that_are_left_and_saves_before_one_goes(tmp_path: Path) -> None:
    told, _, records = run_on_three_nodes("preempted", tmp_path)
    last = records[-1]["step"]
    assert [record["step"] for record in records] == list(range(1, last + 1))
    assert [records[0]["workers"], records[-1]["workers"]] == [2, 1]
    # The notice led to a checkpoint of its own, beside the scheduled ones.
    assert told["before_notice"] < told["saved_on_notice"]
    assert told["saved_on_notice"] % EVERY != 0
