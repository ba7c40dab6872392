"""A run that is asked to stop saves first; asked twice, it stops at once."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, records

from m2d.cli import main
from m2d.errors import ConfigError, M2DError, TrainingError
from m2d.experiment import complete_checkpoints
from m2d.training.run import CONTROL, failures_recorded, recorded_failure, stop_is_wanted, stop_requests
from m2d.training.settings import TrainConfig

CONFIG = TrainConfig()


def test_a_signal_asks_once_and_the_second_one_ends_the_process(tmp_path: Path) -> None:
    said: list[str] = []
    with stop_requests(tmp_path, said.append) as asked:
        assert not stop_is_wanted(tmp_path)
        signal.raise_signal(signal.SIGTERM)
        assert stop_is_wanted(tmp_path)
        assert asked == [signal.SIGTERM]
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert said == ["SIGTERM: saving a checkpoint, then stopping; once more to stop at once"]


def test_a_closed_terminal_asks_and_hurries_nobody(tmp_path: Path) -> None:
    """The shell sends SIGHUP to its jobs, and the kernel again as the shell ends."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with stop_requests(tmp_path, print) as asked:
            for _ in range(2):
                signal.raise_signal(signal.SIGHUP)
            assert stop_is_wanted(tmp_path)
            assert asked == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_closed_terminal_is_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests(tmp_path, print) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_signals_mean_what_they_meant_before_and_the_request_is_forgotten(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    (tmp_path / CONTROL).write_text("stop", encoding="utf-8")  # of an earlier run that was killed
    with stop_requests(tmp_path, print):
        assert signal.getsignal(signal.SIGINT) != before
        assert not stop_is_wanted(tmp_path)
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / CONTROL).exists()


def test_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    """A sweep's trials run in threads, where Python allows no handler."""
    handlers: list[object] = []

    def trial() -> None:
        with stop_requests(tmp_path, print):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=trial)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert handlers == [before]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ConfigError("image_size is 7; use 8"), "ConfigError: image_size is 7; use 8"),
        (
            OSError(28, "No space left on device", "metrics/train.jsonl"),
            "TrainingError: metrics/train.jsonl cannot be written (No space",
        ),
    ],
)
def test_what_a_user_has_to_mend_is_left_for_the_driver(tmp_path: Path, raised: Exception, told: str) -> None:
    with stop_requests(tmp_path, print):
        with pytest.raises(M2DError) as error, failures_recorded(tmp_path, CONFIG):
            raise raised
        failure = recorded_failure(tmp_path)
        assert type(failure) is type(error.value)
        assert str(failure) == str(error.value)
        assert f"{type(failure).__name__}: {failure}".startswith(told)
    assert recorded_failure(tmp_path) is None, "a later run would give up before it began"


@pytest.mark.parametrize(
    "work",
    [lambda: raised(torch.OutOfMemoryError("CUDA out of memory.")), lambda: raised(MemoryError()),
     lambda: torch.empty(2**60)],
    ids=["GPU", "Python", "torch on a CPU"],
)  # fmt: skip
def test_out_of_memory_is_not_tried_again_and_says_what_takes_less(tmp_path: Path, work: Callable[[], object]) -> None:
    config = TrainConfig(batch_size=4, gradient_accumulation_steps=8)
    halved = "batch_size 4 .*--batch_size 2 --gradient_accumulation_steps 16"
    with stop_requests(tmp_path, print):
        with pytest.raises(TrainingError, match=halved), failures_recorded(tmp_path, config):
            work()
        failure = str(recorded_failure(tmp_path))
    assert "unet.gradient_checkpointing" in failure
    assert "autoencoder.gradient_checkpointing" in failure
    assert "\n" not in failure


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("NCCL error: remote process exited"), OSError(104, "Connection reset by peer")]
)
def test_what_may_go_better_the_next_time_is_not_recorded(tmp_path: Path, error: Exception) -> None:
    with stop_requests(tmp_path, print):
        with pytest.raises(type(error), match=r"NCCL|reset"), failures_recorded(tmp_path, CONFIG):
            raise error
        assert recorded_failure(tmp_path) is None


def test_a_word_can_be_left_where_no_new_file_can(tmp_path: Path) -> None:
    """As on a disk that is full: the file keeps the size that it took at the start."""
    with stop_requests(tmp_path, print):
        before = (tmp_path / CONTROL).stat().st_size
        with pytest.raises(M2DError), failures_recorded(tmp_path, CONFIG):
            raise ConfigError("x" * 2 * before)
        assert (tmp_path / CONTROL).stat().st_size == before
        assert str(recorded_failure(tmp_path)).startswith("xxx")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_of_the_last_step_and_the_same_command_goes_on(
    number: signal.Signals, data_root: Path, tmp_path: Path
) -> None:
    """Ctrl-C, which ends the `tee` behind the run first; or a closed terminal."""
    places = ["--data_root", str(data_root), "--experiments_dir", str(tmp_path / "runs"), "--name", "run"]
    settings = [*places, *TINY, "--num_workers", "0", "--saving.every_steps", "1000", "--max_steps", "30"]
    line = [sys.executable, "-m", "m2d", "train", *settings]
    not_by_nohup = partial(signal.signal, number, signal.SIG_DFL)  # these tests may run under it
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=not_by_nohup)
    deadline = time.monotonic() + 400
    while not steps(tmp_path) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.send_signal(number)
    err = process.stderr.read()
    last = steps(tmp_path)[-1]
    assert process.wait(timeout=120) == 128 + number, err
    assert f"stopped at step {last:,} of 30; the same command resumes" in err
    (run,) = (tmp_path / "runs").glob("run_*")
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == [f"step_{last:08d}"]
    main("train", settings)
    assert steps(tmp_path) == list(range(1, 31))


def steps(root: Path) -> list[int]:
    return [record["step"] for run in root.glob("runs/run_*") for record in records(run)]
