"""How far the one-time work on a dataset has come: a bar on a terminal, a plain line now and then anywhere else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_LINE_EVERY_S = 10.0


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with (done, total). what: the work in a word. unit: what is counted, plural."""
    if not sys.stdout.isatty():
        yield _PlainLines(what, unit)
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _PlainLines:
    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._first: tuple[float, int] | None = None  # when the first were done, and how many: starting up is not speed
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._shown = (now, done), now
        began, at_first = self._first
        if now - self._shown < PLAIN_LINE_EVERY_S or done in (at_first, total):
            return
        self._shown = now
        per_second = (done - at_first) / (now - began)
        speed = f"{per_second:.1f} {self._unit}/s, {(total - done) / per_second / 60:.1f} min left"
        print(f"{self._what}: {done:,} of {total:,} {self._unit}, {speed}", flush=True)


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Of the last half minute."""
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")
