"""A Ray head of the tests' own, started in a copy of this repository: on loopback, on free ports, closed by a token."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cluster_files import ROOT
from processes import descendants, end_all

BIN = Path(sys.executable).parent  # not resolved: of the virtual environment, not of the Python that it was made with
CPUS = 4  # Ray Data starts a process for each that is free, at seconds of CPU time
LOOPBACK = "127.0.0.2"  # 127.0.0.1 Ray would replace by the machine's address, and listen to others
# Detached and without a CPU. Of the first three Ray Data keeps one for as long as the cluster lives; the last one, of
# Ray Train, ends after a run, but stays idle where its controller was killed (Ray 2.60: a thread cannot end its actor).
OF_RAY = {"ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor", "PlacementGroupCleaner"}
STARTING_S, COMMAND_S, ENDING_S = 120.0, 420.0, 3.0


@dataclass(frozen=True)
class JobCluster:
    """What a user of it knows: where its head was started, its address, and the token."""

    repository: Path
    session: Path  # Ray's own files, the copies of submitted directories among them
    address: str  # of the dashboard, http://127.0.0.1:PORT
    token: str
    environment: dict[str, str]

    def ray(self, *arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """A command of Ray's, as a user types it somewhere; stdout holds both streams."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments],
            cwd=cwd,
            env={**self.environment, "RAY_ADDRESS": self.address, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_S,
        )

    def get(self, path: str, token: str | None, *, posted: Any = None) -> tuple[int, Any]:
        """HTTP status and JSON that the dashboard answers. posted: JSON to send with a POST."""
        body = None if posted is None else json.dumps(posted).encode()
        request = urllib.request.Request(f"{self.address}{path}", body, {"Content-Type": "application/json"})
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None

    def job_status(self, submission_id: str) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return str(self.get(f"/api/jobs/{submission_id}", self.token)[1]["status"])

    def living_actors(self) -> list[str]:
        """Classes of the actors that are not dead, without those of OF_RAY."""
        rows = self.get("/api/v0/actors?limit=1000&detail=0", self.token)[1]["data"]["result"]["result"]
        return [row["class_name"] for row in rows if row["state"] != "DEAD" and row["class_name"] not in OF_RAY]

    def free_cpus(self) -> float:
        """Logical CPUs that nobody holds."""
        report = self.get("/api/cluster_status", self.token)[1]["data"]["clusterStatus"]["loadMetricsReport"]
        used, total = report["usage"]["CPU"]
        return float(total - used)


def await_that(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Return once it holds. Fails with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.25)


def copy_repository(target: Path) -> Path:
    """What a clone of the working tree as it is now would hold: what git tracks, and what it does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # one that was removed and not committed yet is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@contextmanager
def job_cluster(folder: Path) -> Iterator[JobCluster]:
    """Start the head in a fresh copy of the repository, and end it with everything that it started."""
    repository, home = copy_repository(folder / "m2d"), folder / "home"
    home.mkdir()
    token_file = home / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token := secrets.token_hex(32))
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "M2D_", "PYTEST_", "WANDB_")) and name != "PYTHONPATH"
    }
    environment = inherited | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # see tests/conftest.py
        "RAY_prestart_worker_first_driver": "0",
    }
    session = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: a socket's path has at most 107 characters
    dashboard, *others = _free_ports(7)
    # What cluster.yaml gives its head: the m2d that jobs and workers import, and time to save when a job is stopped.
    own = {"PYTHONPATH": str(repository), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [*_start_command(session, dashboard, others)],
            cwd=repository, env=environment | own, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    cluster = JobCluster(repository, session, f"http://127.0.0.1:{dashboard}", token, environment)
    try:
        await_that(lambda: _is_up(cluster, head, log), STARTING_S, "the job API answers")
        yield cluster
    finally:
        _end(head)
        shutil.rmtree(session, ignore_errors=True)


def _start_command(session: Path, dashboard: int, ports: list[int]) -> list[str]:
    named = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "runtime-env-agent-port", "metrics-export-port")  # fmt: skip
    return [
        str(BIN / "ray"), "start", "--head", "--block", f"--node-ip-address={LOOPBACK}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={session}", f"--num-cpus={CPUS}",
        "--num-gpus=0", f"--object-store-memory={200 * 2**20}", "--disable-usage-stats", "--node-manager-port=0",
        "--object-manager-port=0", "--min-worker-port=0", "--max-worker-port=0",
        *(f"--{name}={port}" for name, port in zip(named, ports, strict=True)),
    ]  # fmt: skip


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _is_up(cluster: JobCluster, head: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert head.poll() is None, log.read_text()
    try:
        return cluster.get("/api/jobs/", cluster.token)[0] == 200
    except OSError:
        return False


def _end(head: "subprocess.Popen[bytes]") -> None:
    """The head would take half a minute to end its processes, so what is left soon is ended here, by its id."""
    ours = descendants(of=head.pid)
    head.terminate()
    try:
        head.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    end_all(ours, patience_s=1)
