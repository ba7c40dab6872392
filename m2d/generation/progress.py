"""How far a generation run has come: a bar on a terminal, a plain line every few seconds elsewhere; both on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_LINE_EVERY_S = 10.0


class ProgressReport(Protocol):
    """Counts images that are kept."""

    def advance(self, images: int) -> None:
        """So many more."""
        ...


@contextmanager
def progress(total: int, what: str = "generating") -> Iterator[ProgressReport]:
    """For `total` images; nothing is shown where there is nothing to do."""
    console = Console(stderr=True)
    if not total or not console.is_terminal:
        yield _PlainLines(total, what)
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _ImagesPerSecond(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield _Bar(bar, total)


def say(line: str) -> None:
    """One line on stderr: what a person may want to know, apart from the result on stdout."""
    print(line, file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, bar: Progress, total: int) -> None:
        self.bar = bar
        self.task = bar.add_task("generating", total=total)

    def advance(self, images: int) -> None:
        self.bar.advance(self.task, images)


class _PlainLines:
    def __init__(self, total: int, what: str) -> None:
        self.total = total
        self.what = what
        self.done = 0
        self.began = self.last_line = time.monotonic()

    def advance(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if not self.total or (now - self.last_line < PLAIN_LINE_EVERY_S and self.done < self.total):
            return
        self.last_line = now
        per_second = max(self.done, 1) / max(now - self.began, 1e-9)
        left = (self.total - self.done) / per_second
        say(f"{self.what}: {self.done:,}/{self.total:,} images, {per_second:.1f} images/s, {left:.0f} s left")


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Of the last half minute."""
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")
