"""On a cluster of several nodes: all of them work, and the loss of one costs nothing but time."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_checkpoint import write_checkpoint

from m2d.models.checkpoint import Checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(prior_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What sharding_run.py tells of its run; in a process of its own, since it needs a cluster of its own."""
    folder = tmp_path_factory.mktemp("sharding")
    checkpoint = write_checkpoint(prior_checkpoint, folder / "ham" / "checkpoints" / "best")
    script = [sys.executable, str(Path(__file__).with_name("sharding_run.py"))]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [*script, str(checkpoint), str(folder / "out"), str(folder / "report.json")],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    document: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return document


def test_every_node_makes_groups(report: dict[str, Any]) -> None:
    print(f"groups of four images by node: {report['groups']}")
    assert len(report["nodes"]) == 3
    assert report["groups"].keys() == set(report["nodes"])


def test_a_node_lost_in_mid_run_costs_no_image_and_makes_none_twice(report: dict[str, Any]) -> None:
    before, after, lost = report["groups_at_removal"], report["groups"], report["removed"]
    assert sum(before.values()) < 45 - 3, "the run was over before the node was taken away"
    assert after[lost] < 15, "it has worked on"
    root = Path(report["output"])
    rows = pq.read_table(root / "manifest.parquet").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(
        f"{label}_{index:06d}" for label in ("DF", "MEL", "NV") for index in range(60)
    )
    for row in rows:
        assert hashlib.sha256((root / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    assert len(list(root.glob("*/*.png"))) == 180
