"""Whether the other nodes of a cluster see a run's paths: by pretended answers, and by a node with its own disk."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from m2d.cluster import nodes
from m2d.cluster import start as cluster
from m2d.cluster.nodes import GpuFacts, not_seen, places, require_shared
from m2d.errors import ConfigError

HERE = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"CPU": 2.0}}
THERE = {"NodeID": "b", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": {"CPU": 2.0}}


class PretendedNodes:
    """A cluster of these nodes, ours the first. The others look for paths below a root of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any], root: str = "") -> None:
        self.asked: list[str] = []
        self.root = root

        class Context:
            def get_node_id(self) -> str:
                return str(HERE["NodeID"])

        monkeypatch.setattr(ray, "get_runtime_context", Context)
        monkeypatch.setattr(ray, "nodes", lambda: list(found))
        monkeypatch.setattr(nodes, "_unseen", self.answer)
        monkeypatch.setattr(nodes, "APPEAR_S", 0.0)

    def answer(self, others: dict[str, str], looks: list[Any]) -> dict[str, list[str]]:
        self.asked += others.values()
        elsewhere = [(setting, self.root + path, entries) for setting, path, entries in looks]
        return {node: not_seen(elsewhere) for node in others}


@pytest.mark.parametrize("others", [[], [{**THERE, "Alive": False}], [{**THERE, "Resources": {}}]])
def test_where_no_other_node_works_nothing_is_asked_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: Any
) -> None:
    pretended = PretendedNodes(monkeypatch, HERE, *others)
    require_shared(written={"experiments_dir": str(tmp_path / "runs")}, read={})
    require_shared(written={"experiments_dir": "s3://bucket/runs"}, read={})
    assert pretended.asked == []
    assert list(tmp_path.iterdir()) == []


def test_paths_that_all_nodes_see_pass_and_nothing_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = PretendedNodes(monkeypatch, HERE, THERE)
    (tmp_path / "data" / "MEL").mkdir(parents=True)
    places = {"data_root": str(tmp_path / "data"), "cache_dir": str(tmp_path / "none")}
    require_shared(written={"experiments_dir": str(tmp_path / "runs")}, read={**places, "more": "s3://bucket/data"})
    assert pretended.asked == ["10.0.0.2"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["MEL", "data", "runs"]


@pytest.mark.parametrize("other_has", [[], ["data"], ["data/NV"]], ids=["nothing", "an empty one", "another one"])
def test_a_folder_that_another_node_has_not_or_has_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_has: list[str]
) -> None:
    folder = tmp_path / "data"
    (folder / "MEL").mkdir(parents=True)
    root = tmp_path / "disk of the other"
    for name in other_has:
        (root / str(folder).lstrip("/")).parent.joinpath(name).mkdir(parents=True)
    PretendedNodes(monkeypatch, HERE, THERE, root=str(root))
    with pytest.raises(ConfigError, match=r"^data_root: .*/data .*10\.0\.0\.2.*every node mounts[^\n]*$"):
        require_shared(written={}, read={"data_root": str(folder)})


def test_a_folder_to_write_that_another_node_has_by_the_same_name_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = tmp_path / "runs", tmp_path / "disk of the other"
    (root / str(folder).lstrip("/")).mkdir(parents=True)
    PretendedNodes(monkeypatch, HERE, THERE, {**THERE, "NodeID": "c", "NodeManagerAddress": "10.0.0.3"}, root=str(root))
    with pytest.raises(ConfigError, match=r"^experiments_dir: .*10\.0\.0\.2 and 1 more"):
        require_shared(written={"experiments_dir": str(folder)}, read={})
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "why"), [("s3://bucket/runs", "is a URI.*every node mounts"), ("file/runs", r"cannot be written \(")]
)
def test_a_place_to_write_that_nodes_cannot_share_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, why: str
) -> None:
    PretendedNodes(monkeypatch, HERE, THERE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"^experiments_dir: {place} {why}[^\n]*$"):
        require_shared(written={"experiments_dir": place}, read={})


class GrowingCluster:
    """Has the next of these resources each time it is looked at; remembers what its autoscaler was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
        self.resources = list(resources)
        self.asked: list[list[dict[str, float]]] = []
        self.said: list[str] = []
        monkeypatch.setattr(ray, "cluster_resources", self.look)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(nodes, "POLL_S", 0.01)

    def look(self) -> dict[str, float]:
        return self.resources.pop(0) if len(self.resources) > 1 else self.resources[0]


BUNDLES = [{"CPU": 1.5, "GPU": 1.0}, {"CPU": 1.5, "GPU": 1.0}]


def test_nodes_are_asked_for_waited_for_and_then_left_to_the_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    some, enough = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 2.0}
    growing = GrowingCluster(monkeypatch, {"CPU": 0.0}, some, some, enough)
    assert nodes.wait_for_nodes(BUNDLES, 60, growing.said.append)
    assert growing.asked == [[{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}], []]
    assert [line.partition("has ")[2] for line in growing.said] == ["0 of 3 CPU, 0 of 2 GPU", "1 of 2 GPU"]
    assert nodes.wait_for_nodes(BUNDLES, 60, pytest.fail)  # what is up already is not asked for
    assert len(growing.asked) == 2


def test_nodes_that_do_not_come_are_waited_for_no_longer_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = GrowingCluster(monkeypatch, {"CPU": 8.0})
    assert not nodes.wait_for_nodes(BUNDLES, 0.05, growing.said.append)
    assert growing.asked[-1] == []


@pytest.mark.parametrize(
    ("bundle", "held"),
    [
        ({"CPU": 3}, 4),  # 2 on the first, 1 on each of the others, though 3 more CPUs lie about
        ({"CPU": 3, "GPU": 1}, 2),
        ({"CPU": 0.1}, 149),
        ({"CPU": 9}, 0),
    ],
)
def test_a_worker_takes_all_that_it_needs_from_one_node(bundle: dict[str, float], held: int) -> None:
    assert places(bundle, [{"CPU": 6.9}, {"CPU": 4, "GPU": 8}, {"CPU": 4, "GPU": 1}, {"GPU": 1}]) == held


CUDA_13 = GpuFacts(
    name=None, precision="no", torch="2.15.0+cu132", cuda="13.2", driver="535.183.01", driver_cuda="12.2"
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "CUDA 13.2, NVIDIA's driver is 535.183.01, which runs CUDA up to 12.2; install a newer driver"),
        ({"cuda": None}, "built without CUDA, .* or torch built for CUDA 12.2 or older"),
        ({"driver_cuda": None}, "driver is 535.183.01; libcuda.so.1 cannot be loaded"),
        ({"driver": "580.65.06", "driver_cuda": "13.0"}, "up to 13.0; look whether CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told_with_both_versions(change: Any, told: str) -> None:
    advice = replace(CUDA_13, **change).advice
    assert re.search(told, advice)
    assert "\n" not in advice


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder@U16)", "570.124.06"),
    ],
)
def test_the_drivers_version_is_read(line: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "DRIVER", tmp_path / "version")
    assert nodes.gpu_facts().driver is None
    (tmp_path / "version").write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.3.0\n")
    assert nodes.gpu_facts().driver == version


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_ray_counts_and_torch_does_not_see_is_an_error(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with too old a driver, or here, where the task asks for no GPU."""
    monkeypatch.setattr(nodes, "GPU_SHARE", 0)
    with pytest.raises(ConfigError, match=rf"^Ray counts GPUs .* torch {re.escape(torch.__version__)} .*[^\n]*$"):
        nodes.cluster_gpu()


@pytest.mark.ray
def test_rays_own_dashboard_tells_without_a_token_whether_it_asks_for_one(ray_cluster: None) -> None:
    """The shared cluster's authentication is off."""
    dashboard = ray._private.worker.global_worker.node.address_info["webui_url"]
    assert cluster._answers_without_token(dashboard)


TWO_NODES = """
import ctypes, os, subprocess, sys
import ray
from ray.cluster_utils import Cluster
from m2d.errors import ConfigError
from m2d.cluster.nodes import require_shared

shared, private = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})

ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # at the head, the only node yet
cluster.add_node(num_cpus=1)
# From here on this thread has mounts of its own, and the nodes keep those of before.
assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", private + "_of_the_driver", private], check=True)
try:
    require_shared(written={"experiments_dir": shared}, read={"cache_dir": shared})
    print("the shared one passes")
    try:
        require_shared(written={"experiments_dir": private}, read={})
    except ConfigError as error:
        print(error)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def may_mount() -> bool:
    try:
        done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=20)
    except OSError:
        return False
    return done.returncode == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount (root), to give a node a disk of its own")
def test_a_real_node_with_a_disk_of_its_own_is_found_out(tmp_path: Path) -> None:
    for name in ("shared", "private", "private_of_the_driver"):
        (tmp_path / name).mkdir()
    environment = {
        **os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    program = [sys.executable, "-c", TWO_NODES, str(tmp_path / "shared"), str(tmp_path / "private")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    assert lines[0] == "the shared one passes", done.stderr[-3000:]
    assert lines[1].startswith(f"experiments_dir: {tmp_path / 'private'} of this machine is not seen by the node ")
    assert len(lines) == 2
