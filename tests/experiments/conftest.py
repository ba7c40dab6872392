"""Experiment directories as a run leaves them, and a second process that trains in one."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from report_run import Page, Run, write_experiment, write_full_run, write_run

HOLDER = """
import sys
from pathlib import Path
from m2d.experiment import Experiment
with Experiment(Path(sys.argv[1])).running():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def make_experiment(root: Path) -> Callable[..., Path]:
    """make_experiment(name, state, steps=(checkpoint steps), train=[...], validation=[...], config={...}, **info)."""
    return partial(write_experiment, root)


@pytest.fixture
def hold_lock() -> Callable[[Path], AbstractContextManager[None]]:
    """A context in which another process trains in a directory."""

    @contextmanager
    def hold(path: Path) -> Iterator[None]:
        program = [sys.executable, "-c", HOLDER, str(path)]
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            try:
                yield
            finally:
                process.communicate("")

    return hold


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(config={...}, **info): a finished run's record and settings, nothing else."""
    return partial(write_run, tmp_path)


@pytest.fixture
def full_run(tmp_path: Path) -> Run:
    """A finished run with one of everything."""
    return write_full_run(tmp_path)


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Its report."""
    return write_full_run(tmp_path_factory.mktemp("full")).page()
