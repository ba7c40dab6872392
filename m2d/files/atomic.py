"""Files that appear whole or not at all, and folders that one process writes at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2d.errors import DataError

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the name to write to; afterwards the file is on the disk and takes its real name, replacing an older one.

    A killed process leaves a *.partial file at most, which nothing reads (see `clear_leftovers`).
    Raises DataError where the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())  # otherwise a power cut may leave the name without the content
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path} cannot be written ({reason}); check its disk, then run again to resume") from error
    finally:
        partial.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> int:
    """Remove what killed runs left half written below the folder; returns how many files that were."""
    leftovers = list(folder.rglob(f"*{PARTIAL}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which is made where it is missing; a process that is killed loses the lock.

    Raises BlockingIOError where another process holds it, OSError where it cannot be made.
    """
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
