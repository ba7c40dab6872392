"""How far work has come: a bar on a terminal, a plain line every few seconds anywhere else."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """What `progress` yields. Here the plain lines."""

    def __init__(self, what: str, total: int | None, unit: str, *, stderr: bool) -> None:
        self._what, self._unit, self._file = what, unit, sys.stderr if stderr else sys.stdout
        self._done, self._total = 0, total or 0
        self._first: tuple[float, int] | None = None  # of the first report: starting up and what was kept are not speed
        self._shown = 0.0

    def advance(self, count: int) -> None:
        """Report `count` more as done."""
        self.show(self._done + count, self._total)

    def show(self, done: int, total: int) -> None:
        """Report `done` of `total`."""
        self._done, self._total = done, total
        now = time.monotonic()
        if self._first is None:
            self._first, self._shown = (now, done), now
        began, at_first = self._first
        if now - self._shown < PLAIN_LINE_EVERY_S or done in (at_first, total):
            return
        self._shown = now
        per_second = (done - at_first) / (now - began)
        left = (total - done) / per_second
        text = f"{left:.0f} s left" if left < 100 else f"{left / 60:.1f} min left"
        speed = f"{per_second:.1f} {self._unit}/s"
        print(f"{self._what}: {done:,} of {total:,} {self._unit}, {speed}, {text}", file=self._file, flush=True)


class _OnBar(Progress):
    def __init__(self, bar: Bar, what: str, total: int | None) -> None:
        super().__init__(what, total, "", stderr=False)
        self._bar, self._task = bar, bar.add_task(what, total=total)

    def show(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._bar.update(self._task, completed=done, total=total)


def in_notebook() -> bool:
    """Whether a notebook's `!` runs this: in its terminal a bar does not replace itself, every frame is kept."""
    return "JPY_PARENT_PID" in os.environ


@contextmanager
def progress(what: str, total: int | None = None, *, unit: str = "images", stderr: bool = True) -> Iterator[Progress]:
    """Shows how far work has come during the block.

    what: the work in a word. total: None where the reports tell it; for 0 nothing is shown. unit: what is counted,
    plural. stderr: where to, instead of stdout.
    """
    console = Console(stderr=stderr)
    if total == 0 or in_notebook() or not console.is_terminal:
        yield Progress(what, total, unit, stderr=stderr)
        return
    text = TextColumn("{task.description}", markup=False)
    with Bar(text, BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn(), console=console) as bar:
        yield _OnBar(bar, what, total)


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Of the last half minute."""
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")


def say(line: str) -> None:
    """One line on stderr: what a person may want to know, apart from the result on stdout."""
    print(line, file=sys.stderr, flush=True)
