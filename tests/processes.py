"""Processes below a test's own, any of which may be gone by the next line."""

from collections.abc import Iterable
from contextlib import suppress

import psutil


def descendants(named: str = "", *, of: int | None = None) -> list[psutil.Process]:
    """Those of the process `of` (this one) whose command line holds `named`; Ray names workers by actor."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(of).children(recursive=True):
            with suppress(psutil.Error):
                if named in " ".join(process.cmdline()):
                    found.append(process)
    return found


def end_all(processes: Iterable[psutil.Process], *, patience_s: float) -> None:
    """Wait so long for them, kill the rest by their ids, and wait until they are gone."""
    _, alive = psutil.wait_procs(list(processes), timeout=patience_s)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=20)
