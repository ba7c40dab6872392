"""What a run says of itself survives crashes, and wandb never stops it."""

import csv
import io
import math
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


class PretendedRun:
    """A wandb run in which one thing fails."""

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def define_metric(self, name: str, **options: Any) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
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

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict, teardown=lambda: None))
    run = Wandb(tmp_path, "m2d", "tiny", "online", {})
    run.scalars(1, {"loss": 0.5})
    run.scalars(2, {"loss": 0.4})
    run.finish(None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (
        pretended.calls
        == {"init": ["init", "init"], "log": ["init", "log"], "finish": ["init", "log", "log", "finish"]}[failing]
    )


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

    class Endless(PretendedRun):
        def finish(self) -> None:
            asked.wait(30)

    pretended = Endless("nothing")
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **options: pretended, Settings=dict, teardown=lambda: None)
    )
    run = Wandb(tmp_path, "m2d", "tiny", "online", {}, finish_timeout_s=0.05)
    run.finish(None)
    asked.set()
    assert "still sending after 0.05 s" in caplog.text


class Listener:
    """A sink that remembers."""

    def __init__(self, forgets: int = 0) -> None:
        self.forgets = forgets
        self.heard: list[tuple[Any, ...]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.heard.append(("scalars", step, dict(values)))

    def picture(self, step: int, name: str, png: bytes, caption: str) -> None:
        self.heard.append(("picture", step, name, Image.open(io.BytesIO(png)).size, caption))

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        self.heard.append(("histogram", step, name, list(counts), list(edges)))

    def flush(self) -> None:
        self.heard.append(("flush",))

    def finish(self, best: Path | None) -> None:
        self.heard.append(("finish", best))


def test_what_is_told_is_kept_and_passed_on(tmp_path: Path) -> None:
    listener = Listener()
    telemetry = Telemetry(tmp_path, [listener])
    telemetry.scalars("train", 3, {"loss": 0.5})
    path = telemetry.picture(3, "samples", Image.new("RGB", (4, 2)), "four by two")
    telemetry.histogram(3, "gradients", [1, 2], [0.0, 1.0, 2.0])
    telemetry.flush()
    telemetry.finish()
    assert listener.heard == [
        ("scalars", 3, {"loss": 0.5}),
        ("picture", 3, "samples", (4, 2), "four by two"),
        ("histogram", 3, "gradients", [1, 2], [0.0, 1.0, 2.0]),
        ("flush",),
        ("finish", None),
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
    listener = Listener(forgets=2)
    Telemetry(tmp_path, [listener]).resume_at(4)
    assert listener.heard == [
        ("scalars", 3, {"loss": 0.3}),
        ("scalars", 4, {"loss": 0.4}),
        ("histogram", 4, "gradients", [1], [0.0, 1.0]),
        ("picture", 4, "samples", (4, 2), ""),
    ]


def test_a_listener_that_forgets_nothing_is_told_nothing_twice(tmp_path: Path) -> None:
    Telemetry(tmp_path).scalars("train", 1, {"loss": 0.5})
    listener = Listener()
    Telemetry(tmp_path, [listener]).resume_at(1)
    assert listener.heard == []
