"""Files that are whole or absent, and locks that end with the process that holds them."""

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from m2d.errors import DataError

PARTIAL = ".partial"  # ends the hidden name of a file that is being written


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a hidden name beside `path` to write to; it becomes `path` at the end, or is removed on an error.

    An older file is replaced. durable: the content is on the disk first, so that a power cut cannot leave the name
    without it. A killed process leaves the hidden file at most (see `clear_leftovers`).
    """
    # Nodes, processes and threads may write one file at the same time: each its own, and the last one counts.
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}")
    try:
        yield partial
        if durable:
            with partial.open("rb+") as written:
                os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def cache_file(path: Path) -> Iterator[Path]:
    """As whole_file, durable, its folder made. Raises DataError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, durable=True) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} cannot be written ({reason}); check its disk, then run again to resume") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file of this text (UTF-8) or these bytes as `whole_file` does."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def clear_leftovers(folder: Path) -> int:
    """Remove what killed processes left half written below the folder; returns how many files that were."""
    leftovers = list(folder.rglob(f"*{PARTIAL}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def try_lock(path: Path) -> IO[str] | None:
    """The file at `path`, made if need be, locked until it is closed; None while another process holds it.

    A killed process loses its lock. Raises OSError where the file cannot be opened or its disk knows no locks.
    """
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock at `path`; True also where that cannot be found out. Makes no file.

    Looking shares the lock, so that two processes that look do not take each other for its holder.
    """
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return False


def share_lock(path: Path) -> IO[bytes] | None:
    """The file at `path`, held until it is closed so that `is_in_use` finds it so; None where it was just removed.

    Several may share it. Raises OSError where there is none or its disk knows no locks.
    """
    lock = path.open("rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except FileNotFoundError:
        pass
    except OSError:
        lock.close()
        raise
    lock.close()
    return None


def is_in_use(path: Path) -> bool:
    """Whether a process shares the lock of the file at `path`; False also where that cannot be found out."""
    try:
        with path.open("r+b") as lock:  # NFS locks for one alone only what may be written
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
