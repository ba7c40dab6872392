"""How a run is asked to stop, and how it says why it cannot continue: a word in a file that driver and workers share.

A file, because it needs nothing of Ray, and because it is still there for the workers that Ray starts again.
"""

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from m2d import errors
from m2d.errors import M2DError, TrainingError
from m2d.training.settings import TrainConfig

CONTROL = ".control"  # in the experiment's directory
CONTROL_BYTES = 4096  # taken at the start, so that a word can be left on a disk that is full
STOP = "stop"
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in torch's words where the machine's memory runs out: a plain RuntimeError
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish(IntEnum):
    """What a worker is asked for between two steps."""

    GO_ON = 0
    SAVE = 1  # a checkpoint now: a node is about to be taken away
    STOP = 2  # a checkpoint, and no further step


class Stopped(M2DError):
    """The run ended early because it was asked to. exit_code: what a shell expects after that signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def stop_is_wanted(experiment: Path) -> bool:
    """Whether the driver of the run in this directory was asked to stop."""
    return _read(experiment) == STOP


def recorded_failure(experiment: Path) -> M2DError | None:
    """What a worker of the run in this directory left, so that it is not tried again."""
    kind, _, message = _read(experiment).partition(": ")
    return getattr(errors, kind)(message) if message else None


@contextmanager
def failures_recorded(experiment: Path, config: TrainConfig) -> Iterator[None]:
    """Around a worker's work. What the user has to fix is left for the driver: to try again would not help.

    Raises TrainingError in place of an OSError for a full disk, and of what is raised where memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU_ALLOCATOR in str(error)):
            raise
        out_of_memory = TrainingError(_memory_advice(config))
        _write(experiment, f"TrainingError: {out_of_memory}")
        raise out_of_memory from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = TrainingError(
            f"no space left for {error.filename or experiment}; checkpoints are intact, make room and run the same "
            "command again"
        )
        _write(experiment, f"TrainingError: {full}")
        raise full from error
    except M2DError as error:
        _write(experiment, f"{type(error).__name__}: {error}")
        raise


def _memory_advice(config: TrainConfig) -> str:
    """What makes a step need less memory without another result, in one line."""
    batch, accumulated = config.batch_size, config.gradient_accumulation_steps
    halved = (
        f"--batch_size {batch // 2} --gradient_accumulation_steps {accumulated * 2} (the same optimiser step), "
        if batch % 2 == 0
        else ""
    )
    return (
        f"batch_size {batch} with gradient_accumulation_steps {accumulated} does not fit into memory; try {halved}"
        "--unet.gradient_checkpointing true or --autoencoder.gradient_checkpointing true, and the run resumes from its "
        "last checkpoint; train --dry_run predicts what fits"
    )


class StopRequest:
    """For the time of a `with` block in the main thread: SIGINT and SIGTERM ask the run to save and stop.

    The second signal ends the process at once. In another thread, which may set none, signals stay as they are.
    say: prints a line. signals: False leaves them as they are here too.
    """

    def __init__(self, experiment: Path, say: Callable[[str], None], *, signals: bool = True) -> None:
        self.experiment = experiment
        self.say = say
        self.signals = signals
        self.signal: int | None = None  # that asked
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        (self.experiment / CONTROL).write_bytes(b" " * CONTROL_BYTES)  # forgets what an earlier run left
        if self.signals and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        (self.experiment / CONTROL).unlink(missing_ok=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.signal = number
        _write(self.experiment, STOP)
        self.say(f"{signal.Signals(number).name}: saving a checkpoint, then stopping; once more to stop at once")


def _read(experiment: Path) -> str:
    """The word in the file. Opened each time: network file systems show what was closed before."""
    try:
        return (experiment / CONTROL).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def _write(experiment: Path, word: str) -> None:
    """Over what is there, which takes no new space. A run without the file, or that cannot write it, goes without."""
    with suppress(OSError), (experiment / CONTROL).open("r+b") as file:
        file.write(word.encode()[:CONTROL_BYTES].ljust(CONTROL_BYTES))
