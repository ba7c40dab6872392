"""Experiment directories as a run leaves them, and a second process that trains in one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_run import Page, Run, write_full_run, write_run

from m2d.config import TrainConfig, as_dict

MakeExperiment = Callable[..., Path]
HoldLock = Callable[[Path], AbstractContextManager[None]]

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
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def make_experiment(root: Path) -> MakeExperiment:
    """make_experiment(name, state, steps=(checkpoint steps), train=[...], validation=[...], config={...}, **info)."""

    def make(
        name: str,
        state: str = "done",
        *,
        steps: tuple[int, ...] = (),
        train: list[dict[str, Any]] | None = None,
        validation: list[dict[str, Any]] | None = None,
        config: dict[str, Any] | None = None,
        best: tuple[int, float] | None = None,
        **info: Any,
    ) -> Path:
        path = root / name
        for folder in ("configs", "metrics", "checkpoints", "cache", "generated_images"):
            (path / folder).mkdir(parents=True)
        settings = as_dict(TrainConfig(name=name[:-16])) | (config or {})
        (path / "configs" / "config.yaml").write_text(
            yaml.dump(settings, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
        )
        record = {"name": name, "state": state, "command": "jobs/train.py --name tiny", **info}
        (path / "experiment_info.json").write_text(json.dumps(record))
        for step in steps:
            folder_of_step = path / "checkpoints" / f"step_{step:08d}"
            folder_of_step.mkdir()
            (folder_of_step / "weights.safetensors").write_bytes(bytes(1000))
            (folder_of_step / "complete.json").write_text("{}")
        if best is not None:
            record_of_best = {"checkpoint": f"step_{best[0]:08d}", "score": best[1]}
            (path / "checkpoints" / "best.json").write_text(json.dumps(record_of_best))
            (path / "checkpoints" / "best").symlink_to(f"step_{best[0]:08d}")
        for log, records in (("train", train), ("validation", validation)):
            (path / "metrics" / f"{log}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records or []))
        return path

    return make


@pytest.fixture
def hold_lock() -> HoldLock:
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
