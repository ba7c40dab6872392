"""A bar on a terminal, a plain line every few seconds elsewhere; both on stderr."""

import sys
import time
from types import TracebackType

import rich.progress
from rich.console import Console

PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """Shows how far work of a known size has come. Use it in a `with` statement."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.began = self.shown = time.monotonic()
        console = Console(stderr=True)
        columns = (
            rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = rich.progress.Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.show(self.done + count, self.total)

    def show(self, done: int, total: int) -> None:
        """So many are done, of so many."""
        self.done, self.total = done, total
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.shown >= PLAIN_LINE_EVERY_S:
            self.shown = now
            left = (total - done) * (now - self.began) / max(done, 1)
            print(f"{self.what}: {done:,}/{total:,}, {left:.0f} s left", file=sys.stderr, flush=True)
