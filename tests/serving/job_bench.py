"""A job's work in a thread of the test's process, which has torch already; a Bench does it at the test's pace."""

import asyncio
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m2d.generation.generator import Generator
from m2d.generation.settings import GenerateConfig
from m2d.serving.jobs import make_images


async def run_in_thread(config: GenerateConfig, sha256: str, log: Path) -> None:
    """A `Run` at its own pace."""
    await asyncio.to_thread(make_images, replace(config, num_actors=0), sha256)


class Bench:
    """A `Run` that makes as many groups as the test allows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed = threading.Semaphore(0)
        self._stopping = threading.Event()
        self.begun: list[str] = []  # ids of jobs, in order
        self.drawn: list[str] = []  # ids of images
        real = Generator.generate

        def paced(generator: Generator, rows: Any, *arguments: Any) -> Any:
            while not self._allowed.acquire(timeout=0.01):
                if self._stopping.is_set():
                    raise _Stopped
            self.drawn.extend(row.id for row in rows)
            return real(generator, rows, *arguments)

        monkeypatch.setattr(Generator, "generate", paced)

    def allow(self, groups: int) -> None:
        self._allowed.release(groups)

    async def __call__(self, config: GenerateConfig, sha256: str, log: Path) -> None:
        def work() -> None:
            with suppress(_Stopped):
                make_images(replace(config, num_actors=0), sha256)

        self.begun.append(log.parent.name)
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            await asyncio.shield(working)
        finally:
            self._stopping.set()
            await asyncio.wait([working])
            self._stopping.clear()


class _Stopped(BaseException):
    """Ends the thread's work, as a signal ends a process."""
