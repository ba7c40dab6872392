"""cluster.yaml and its sibling for machines of one's own, as far as they can be held without a cloud."""

import socket
from pathlib import Path
from typing import Any

import pytest
from cluster.cluster_files import FOLDER, LAUNCHER_FILES, ROOT, locked
from cluster.launcher_rules import problems

AWS, LOCAL = LAUNCHER_FILES


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a check went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.name)
def test_the_launcher_takes_the_file(path: Path) -> None:
    assert problems(path.read_text(), ROOT) == []


RAY, PYTHON = str(locked()[0]), f"py{locked()[1]}"
BREAKS = {
    "no provider": (AWS, "provider:\n", "provided:\n", "provider"),
    "no maximum": (AWS, "max_workers: 4\n\n", "\n", "max_workers is missing"),
    "no setup, so a nightly build": (AWS, "\nsetup_commands:", "\nmetadata:\n  setup:", "setup_commands is missing"),
    "a head type that is not there": (AWS, "head_node_type: head", "head_node_type: boss", "head_node_type"),
    "no container's name": (AWS, "  container_name: m2d\n", "", "container"),
    "a word for a number": (AWS, "idle_timeout_minutes: 15", "idle_timeout_minutes: soon", "'soon' is not of type"),
    "half a GPU": (AWS, '"GPU": 4', '"GPU": 0.5', "0.5 is not of type 'integer'"),
    "a misspelt key": (AWS, "upscaling_speed", "upscaling_spede", "upscaling_spede"),
    "a misspelt EC2 parameter": (AWS, "InstanceMarketOptions", "InstanceMarketOption", "InstanceMarketOption'"),
    "more workers kept than allowed": (AWS, "min_workers: 1", "min_workers: 5", "max_workers"),
    "broken YAML": (AWS, "cluster_name: m2d", "cluster_name: [m2d", "not YAML"),
    "another Ray": (AWS, f"ray:{RAY}-{PYTHON}-gpu", f"ray:2.59.0-{PYTHON}-gpu", "not requirements.lock's"),
    "another Python": (AWS, f"ray:{RAY}-{PYTHON}\n", f"ray:{RAY}-py310\n", "not requirements.lock's"),
    "an open cluster": (AWS, "    - --env RAY_AUTH_MODE=token\n", "", "RAY_AUTH_MODE"),
    "no token": (AWS, "  /home/ray/.ray/auth_token: ~/.ray/auth_token\n", "", "the token is not mounted"),
    "a public dashboard": (AWS, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "not on loopback"),
    "little shared memory": (AWS, "--shm-size=44gb", "--shm-size=8gb", "worker: --shm-size"),
    "a head that works": (AWS, '"CPU": 0, "GPU": 0', '"CPU": 8, "GPU": 0', "the head takes work"),
    "a file that is not there": (AWS, "m2d/jobs: jobs", "m2d/jobs: job", "job is not in the repository"),
    "no shared storage": (AWS, "    - --volume /mnt/m2d:/mnt/m2d\n", "", "/mnt/m2d is not mounted"),
    "jobs that do not know the storage": (AWS, "    - --env M2D_STORAGE=/mnt/m2d\n", "", "M2D_STORAGE"),
    "jobs killed at once": (AWS, "STOP_WAIT_TIME_S=60", "STOP_WAIT_TIME_S=3", "a stopped job has no time to save"),
    "on premises, jobs that do not know the storage": (LOCAL, "M2D_STORAGE=/mnt", "M2D_STORAGE=/tmp", "M2D_STORAGE"),
    "a syntax error in a command": (AWS, "- command -v", "- (command -v", "initialization_commands"),
    "on premises, no address of the head": (LOCAL, "  head_ip: 192.0.2.10\n", "", "head_ip"),
    "on premises, node types": (LOCAL, "max_workers: 2", "available_node_types: {a: {}}", "not supported"),
    "on premises, a text for a list": (LOCAL, "[192.0.2.11, 192.0.2.12]", "many", "is not of type 'array'"),
    "on premises, another Ray": (LOCAL, f"ray:{RAY}-", "ray:2.61.0-", "not requirements.lock's"),
    "on premises, a head that works": (LOCAL, "--num-cpus=0 ", "", "the head takes work"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_copy_is_caught(name: str) -> None:
    path, whole, broken, told = BREAKS[name]
    text = path.read_text()
    assert whole in text
    found = problems(text.replace(whole, broken, 1), ROOT)
    assert any(told in line for line in found), found


def test_only_what_ray_must_read_at_every_start_is_mounted() -> None:
    """Ray hashes whole directories, ignored files too: the repository's root holds .venv and experiments."""
    for path in LAUNCHER_FILES:
        assert "/home/ray/m2d: ." not in path.read_text()


def test_the_folder_holds_nothing_that_is_not_checked() -> None:
    checked = {*LAUNCHER_FILES, *(FOLDER / name for name in ("kuberay-rayjob.yaml", "kuberay-rayservice.yaml"))}
    checked |= {FOLDER / name for name in ("slurm.sh", "README.md", "Dockerfile")}
    assert {path for path in FOLDER.iterdir() if path.is_file()} <= checked
