"""What the driver prints: a bar that follows metrics/train.jsonl on a terminal, plain lines anywhere else."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for work with a known total; yields the function to call with (done, total)."""
        if not self.interactive:
            yield lambda done, total: None
            return
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=self.rich) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def progress(self, metrics: Path, total_steps: int, start: int) -> Iterator[None]:
        """Follow a run's metrics file until the block ends."""
        stop = threading.Event()
        show = self._show_bar if self.interactive else self._show_lines
        thread = threading.Thread(target=show, args=(metrics, total_steps, start, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)

    def _show_bar(self, metrics: Path, total: int, start: int, stop: threading.Event) -> None:
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        with Progress(*columns, console=self.rich, transient=False) as bar:
            since = time.time()
            task = bar.add_task("starting workers", total=total, completed=start)
            while True:
                ended = stop.wait(1.0)
                record = _newest(metrics, since)
                if record:
                    bar.update(task, completed=record["step"], description=_describe(record))
                if ended:
                    return

    def _show_lines(self, metrics: Path, total: int, start: int, stop: threading.Event) -> None:
        shown, at = start, 0.0
        began, since = time.monotonic(), time.time()
        while True:
            ended = stop.wait(1.0)
            record = _newest(metrics, since)
            due = time.monotonic() - at >= PLAIN_SECONDS or ended
            if record and record["step"] > shown and due:
                shown, at = record["step"], time.monotonic()
                left = (total - shown) * (at - began) / max(shown - start, 1)
                self.say(
                    f"step {shown}/{total}  epoch {record['epoch']:.2f}  {_describe(record)}  {left / 60:.1f} min left"
                )
            if ended:
                return


def _newest(metrics: Path, since: float) -> dict[str, Any] | None:
    """The last record, unless it is one of an earlier run whose steps will be taken again."""
    records = MetricsLog(metrics.parent, metrics.stem).read()
    return records[-1] if records and records[-1]["time"] >= since else None


def _describe(record: dict[str, Any]) -> str:
    return "  ".join(f"{label} {record[name]:.3g}" for name, label in SHOWN.items() if name in record)
