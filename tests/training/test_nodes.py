"""Training on three nodes, one killed and one taken away after a notice: what it costs, and that the rest goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_images

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_run_outlives_a_killed_node_and_a_preempted_one(tmp_path: Path) -> None:
    data_root, experiments, report = write_images(tmp_path / "data"), tmp_path / "experiments", tmp_path / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    script = [sys.executable, str(TESTS / "training" / "nodes_run.py"), str(data_root), str(experiments), str(report)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=580, check=False, env=environment)
    assert report.is_file(), done.stdout + done.stderr
    told = json.loads(report.read_text(encoding="utf-8"))
    assert "error" not in told, told
    (run,) = experiments.glob("run_*")
    records = [json.loads(line) for line in (run / "metrics" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    last = records[-1]["step"]
    # No step is missing or told twice, although two groups died and their last steps were taken again.
    assert [record["step"] for record in records] == list(range(1, last + 1))
    assert told["hosts_before"] == 2
    assert [records[told["killed_at"] - 1]["workers"], records[-1]["workers"]] == [2, 1]
    # The notice led to a checkpoint of its own, between two scheduled ones.
    assert told["before_notice"] < told["saved_on_notice"] < told["before_notice"] + 2 * 40
    assert told["saved_on_notice"] % 40 != 0
    # SIGTERM at the end: the last step is in the last checkpoint.
    assert told["stopped"].startswith(f"stopped at step {last:,} of ")
    assert (run / "checkpoints" / f"step_{last:08d}" / "complete.json").is_file()
    assert json.loads((run / "experiment_info.json").read_text(encoding="utf-8"))["state"] == "stopped"
