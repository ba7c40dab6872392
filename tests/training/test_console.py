"""What a person at the terminal, or the reader of a log file, gets to see."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from m2d.training.telemetry import Console, MetricsLog, Preparing, time_left


def shown(tmp_path: Path, *, interactive: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run of 40 steps, 10 an epoch, leaves on the screen after step 20."""
    monkeypatch.setattr("m2d.training.telemetry.PLAIN_SECONDS", 0.0)
    screen = io.StringIO()
    console = Console()
    console.interactive = interactive
    console.rich = RichConsole(file=screen, force_terminal=interactive, width=160, highlight=False, soft_wrap=True)
    log = MetricsLog(tmp_path / "metrics", "train")
    log.append({"step": 10, "time": time.time() - 100, "epoch": 1.0, "loss/diffusion": 9.0})  # of the run before
    with console.progress(tmp_path, 40, 10, 10):
        Preparing(tmp_path)("caching latents", 1024, 6804)
        Preparing(tmp_path, leads=False)("caching latents", 2048, 6804)
        wait_for("caching latents", screen)
        log.write(15, {"epoch": 1.5, "loss/diffusion": 0.75, "images_per_s": 31.0})
        wait_for("0.75", screen)
        time.sleep(0.2)
        log.write(20, {"epoch": 2.0, "loss/diffusion": 0.5, "images_per_s": 32.0, "skipped_steps": 3.0})
    return screen.getvalue()


def wait_for(text: str, screen: io.StringIO) -> None:
    deadline = time.monotonic() + 60
    while text not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_log_file_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(tmp_path, interactive=False, monkeypatch=monkeypatch).splitlines()
    assert lines.pop(0) == "caching latents: 1,024 of 6,804"  # as the first worker tells it, and once
    assert lines[0].split() == ["epoch", "1.50/4", "step", "15/40", "diffusion", "0.75", "images/s", "31"]
    assert lines[1].startswith("epoch 2.00/4  step 20/40  diffusion 0.5  images/s 32  skipped 3")
    assert lines[1].endswith("min left")
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_one_bar_with_epoch_step_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = shown(tmp_path, interactive=True, monkeypatch=monkeypatch).rsplit("epoch", 1)[-1]
    assert "3/4" in last  # in the third epoch, now that two are done
    assert "20/40" in last
    assert "diffusion 0.5" in last


def test_the_time_left_counts_from_the_first_record_and_is_in_hours_where_it_is_long() -> None:
    """Ten steps in five seconds: thirty more take fifteen."""
    first = {"step": 0, "time": 1000.0}
    assert time_left(first, first, 40) == ""
    assert time_left(first, {"step": 10, "time": 1005.0}, 40) == "0.2 min left"
    assert time_left(first, {"step": 1, "time": 1001.0}, 7201) == "2.0 h left"


def test_following_a_long_run_reads_the_end_of_its_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a second it read all of it: a core and a GB after a week."""
    log = MetricsLog(tmp_path, "train")
    log.path.write_text("x" * 2**20 + "\n")
    log.write(7, {"loss/diffusion": 0.5})
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "ti')  # being written
    last = log.last()
    assert last is not None
    assert last["step"] == 7
    monkeypatch.setattr(MetricsLog, "read", lambda self: pytest.fail("read whole"))
    assert "step 20/40" in shown(tmp_path / "run", interactive=False, monkeypatch=monkeypatch)
