"""What a run says of itself survives crashes, and wandb never stops it."""

import csv
import math
import socket
import sys
import threading
import time
from pathlib import Path
from unittest.mock import ANY, Mock, call

import pytest
import wandb_files
from PIL import Image

from m2d.training.telemetry import MetricsLog, Telemetry, Wandb


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


def test_a_last_line_cut_by_a_crash_is_left_out_and_the_next_record_is_whole(log: MetricsLog) -> None:
    log.path.write_text(log.path.read_text()[:-5])
    assert steps(log) == [10, 20]
    log.resume_at(20)
    log.write(30, {"loss": 0.5})
    assert steps(log) == [10, 20, 30]


def test_a_loss_that_is_not_a_number_can_be_read_back(log: MetricsLog) -> None:
    log.write(40, {"loss": float("nan")})
    assert math.isnan(log.read()[-1]["loss"])


def test_the_table_has_a_column_for_every_name_that_occurs(log: MetricsLog) -> None:
    log.write(40, {"loss": 0.4, "alignment": -0.5})
    log.write_csv()
    with log.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "time", "loss", "alignment"]
    assert [row["alignment"] for row in rows] == ["", "", "", "-0.5"]


def pretend(monkeypatch: pytest.MonkeyPatch, run: Mock) -> Mock:
    """A wandb that gives this run."""
    wandb = Mock(init=Mock(return_value=run))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


@pytest.mark.parametrize(
    ("failing", "calls"),
    [("init", [2, 0, 0]), ("log", [1, 1, 0]), ("finish", [1, 2, 1])],
    ids=["init", "log", "finish"],
)
def test_a_wandb_that_fails_is_said_once_and_never_raised(
    failing: str, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretended = Mock()
    wandb = pretend(monkeypatch, pretended)
    getattr(wandb if failing == "init" else pretended, failing).side_effect = ConnectionError("the server is away")
    run = Wandb(tmp_path, "m2d", "tiny", "online", {})
    run.scalars(1, {"loss": 0.5})
    run.scalars(2, {"loss": 0.4})
    run.finish(None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert [wandb.init.call_count, pretended.log.call_count, pretended.finish.call_count] == calls


def test_wandb_that_is_not_installed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    Wandb(tmp_path, "m2d", "tiny", "online", {}).scalars(1, {"loss": 0.5})
    assert "wandb is off for this run" in caplog.text


@pytest.mark.slow
def test_an_online_run_that_reaches_nobody_goes_on_offline_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The base URL is a port of this machine on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = Wandb(tmp_path, "m2d-tests", "tiny_20250101_000000", "online", {}, connect_timeout_s=3.0)
    run.scalars(1, {"loss": 0.5})
    run.finish(None)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "kept offline" in warning
    assert "wandb sync" in warning
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # wandb's own process writes the file
    while not wandb_files.history(file) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [row["loss"] for row in wandb_files.history(file)] == [0.5]


def test_a_wandb_that_never_ends_sending_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = threading.Event()
    pretend(monkeypatch, Mock(finish=lambda: asked.wait(30)))
    run = Wandb(tmp_path, "m2d", "tiny", "online", {}, finish_timeout_s=0.05)
    run.finish(None)
    asked.set()
    assert "still sending after 0.05 s" in caplog.text


def test_what_is_told_is_kept_and_passed_on(tmp_path: Path) -> None:
    listener = Mock(forgets=0)
    telemetry = Telemetry(tmp_path, [listener])
    telemetry.scalars("train", 3, {"loss": 0.5})
    path = telemetry.picture(3, "samples", Image.new("RGB", (4, 2)), "four by two")
    telemetry.histogram(3, "gradients", [1, 2], [0.0, 1.0, 2.0])
    telemetry.flush()
    telemetry.finish()
    assert listener.mock_calls == [
        call.scalars(3, {"loss": 0.5}),
        call.picture(3, "samples", path.read_bytes(), "four by two"),
        call.histogram(3, "gradients", [1, 2], [0.0, 1.0, 2.0]),
        call.flush(),
        call.finish(None),
    ]
    assert path == tmp_path / "visualizations" / "samples" / "step_00000003.png"
    assert Image.open(path).size == (4, 2)
    assert (tmp_path / "metrics" / "train.csv").read_text().splitlines()[0] == "step,time,loss"
    assert not (tmp_path / "metrics" / "features.csv").exists()  # nothing was said of features


def test_a_forgetful_listener_is_told_the_last_records_again(tmp_path: Path) -> None:
    before = Telemetry(tmp_path)
    for step in range(1, 6):
        before.scalars("train", step, {"loss": step / 10})
    before.picture(2, "samples", Image.new("RGB", (4, 2)))
    before.picture(4, "samples", Image.new("RGB", (4, 2)))
    before.histogram(4, "gradients", [1], [0.0, 1.0])
    forgetful, other = Mock(forgets=2), Mock(forgets=0)
    Telemetry(tmp_path, [forgetful, other]).resume_at(4)
    assert forgetful.mock_calls == [
        call.scalars(3, {"loss": 0.3}),
        call.scalars(4, {"loss": 0.4}),
        call.histogram(step=4, name="gradients", counts=[1], edges=[0.0, 1.0]),
        call.picture(4, "samples", ANY, ""),
    ]
    assert other.mock_calls == []
