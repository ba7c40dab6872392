"""What the driver prints: a bar that follows metrics/train.jsonl on a terminal, plain lines anywhere else."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from m2d.training.telemetry import MetricsLog

PLAIN_SECONDS = 15.0  # between two plain lines
SHOWN = {
    "loss/diffusion": "diffusion",
    "loss/reconstruction": "reconstruction",
    "loss/alignment": "alignment",
    "loss/perceptual": "perceptual",
    "images_per_s": "images/s",
}


class Console:
    """Facts, warnings and progress of one run."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=False, highlight=False, soft_wrap=True)
        self.interactive = sys.stdout.isatty()

    def say(self, line: str) -> None:
        """One fact, one line."""
        self.rich.print(line, markup=False)

    def warn(self, line: str) -> None:
        """A degraded path, said once at the start."""
        self.rich.print(f"WARNING: {line}", style="yellow", markup=False)

    @contextmanager
    def progress(self, metrics: Path, total_steps: int, steps_per_epoch: int, start: int) -> Iterator[None]:
        """Follow a run's metrics file until the block ends."""
        epochs = -(-total_steps // steps_per_epoch)
        stop = threading.Event()
        pace = _Pace(start, total_steps)  # now: the thread may start after the first record
        thread = threading.Thread(target=self._follow, args=(metrics, epochs, pace, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)

    def _follow(self, metrics: Path, epochs: int, pace: "_Pace", stop: threading.Event) -> None:
        columns = (
            TextColumn("epoch {task.fields[epoch]}"), TextColumn("step"), MofNCompleteColumn(), BarColumn(),
            TextColumn("{task.fields[left]}"), TextColumn("{task.description}"),
        )  # fmt: skip
        log = MetricsLog(metrics.parent, metrics.stem)
        shown, at, ended = pace.start, 0.0, False
        with Progress(*columns, console=self.rich, disable=not self.interactive) as bar:
            task = bar.add_task(
                "starting workers", total=pace.total, completed=pace.start, epoch=f"-/{epochs}", left=""
            )
            while not ended:
                ended = stop.wait(1.0)
                records = log.read()
                if not records or records[-1]["time"] < pace.since:  # of an earlier run, whose steps are taken again
                    continue
                record = records[-1]
                step, left = record["step"], pace.left(record)
                if self.interactive:
                    epoch = f"{min(int(record['epoch']) + 1, epochs)}/{epochs}"
                    bar.update(task, completed=step, epoch=epoch, description=_describe(record), left=left)
                elif step > shown and (ended or time.monotonic() - at >= PLAIN_SECONDS):
                    shown, at = step, time.monotonic()
                    self.say(
                        f"epoch {record['epoch']:.2f}/{epochs}  step {step}/{pace.total}  {_describe(record)}  {left}"
                    )


class _Pace:
    """How long a run will take yet, by the steps since its first record: starting the workers says nothing of it."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total
        self.since = time.time() - 0.001  # records tell milliseconds
        self._first: tuple[int, float] | None = None

    def left(self, record: dict[str, Any]) -> str:
        """`12 min left`, from the times that the records carry; "" while there is one record only."""
        if self._first is None:
            self._first = record["step"], record["time"]
        steps, seconds = record["step"] - self._first[0], record["time"] - self._first[1]
        if steps <= 0:
            return ""
        remaining = (self.total - record["step"]) * seconds / steps
        return f"{remaining / 3600:.1f} h left" if remaining >= 5400 else f"{remaining / 60:.1f} min left"


def _describe(record: dict[str, Any]) -> str:
    return "  ".join(f"{label} {record[name]:.3g}" for name, label in SHOWN.items() if name in record)
