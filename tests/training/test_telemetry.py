"""What a run says of itself survives crashes, and wandb never stops it."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m2d.training.telemetry import MetricsLog, Wandb


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    """A log of steps 10, 20 and 30."""
    log = MetricsLog(tmp_path / "metrics", "train")
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 100})
    return log


def steps(log: MetricsLog) -> list[int]:
    return [record["step"] for record in log.read()]


def test_records_come_back_with_step_and_time(log: MetricsLog) -> None:
    assert [(record["step"], record["loss"]) for record in log.read()] == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert all(record["time"] > 1.7e9 for record in log.read())


def test_resuming_drops_the_steps_that_will_be_taken_again(log: MetricsLog) -> None:
    log.resume_at(20)
    assert steps(log) == [10, 20]
    log.write(30, {"loss": 0.0})
    assert steps(log) == [10, 20, 30]


def test_resuming_without_a_log_is_a_start(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, "train")
    log.resume_at(0)
    assert log.read() == []


def test_a_last_line_cut_by_a_crash_is_left_out(log: MetricsLog) -> None:
    whole = log.path.read_text()
    log.path.write_text(whole[:-5])
    assert steps(log) == [10, 20]


def test_after_a_cut_line_the_next_record_is_whole(log: MetricsLog) -> None:
    log.path.write_text(log.path.read_text()[:-5])
    log.resume_at(20)
    log.write(30, {"loss": 0.5})
    assert steps(log) == [10, 20, 30]


def test_a_loss_that_is_not_a_number_can_be_read_back(log: MetricsLog) -> None:
    log.write(40, {"loss": float("nan")})
    assert log.read()[-1]["loss"] != log.read()[-1]["loss"]


def test_the_table_has_a_column_for_every_name_that_occurs(log: MetricsLog) -> None:
    log.write(40, {"loss": 0.4, "alignment": -0.5})
    log.write_csv()
    with log.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "time", "loss", "alignment"]
    assert [row["alignment"] for row in rows] == ["", "", "", "-0.5"]


def test_offline_wandb_leaves_its_files_in_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    run = Wandb(tmp_path, "m2d-tests", "tiny_20250101_000000", "offline", {"seed": 0})
    run.log(1, {"loss": 0.5})
    run.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class PretendedRun:
    """A wandb run in which one thing fails."""

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.call("log")

    def finish(self) -> None:
        self.call("finish")

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise ConnectionError("the server is away")


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_wandb_that_fails_is_said_once_and_never_raised(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretended = PretendedRun(failing)

    def init(**options: Any) -> PretendedRun:
        pretended.call("init")
        return pretended

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = Wandb(tmp_path, "m2d", "tiny", "online", {})
    run.log(1, {"loss": 0.5})
    run.log(2, {"loss": 0.4})
    run.finish()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (
        pretended.calls
        == {"init": ["init"], "log": ["init", "log"], "finish": ["init", "log", "log", "finish"]}[failing]
    )


def test_wandb_that_is_not_installed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Wandb(tmp_path, "m2d", "tiny", "online", {}).log(1, {"loss": 0.5})
    assert "wandb is off for this run" in caplog.text
