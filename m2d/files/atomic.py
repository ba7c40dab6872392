"""Files and folders that are whole or absent, on the disk before they count; locks that end with their process."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import socket
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from m2d.errors import DataError
from m2d.files.paths import private_folder

logger = logging.getLogger(__name__)
PARTIAL = ".partial"  # ends the hidden name of a file that is being written
COMPLETE = "complete.json"  # a folder's files with their sizes, written last: without it a checkpoint is none
FULL = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would be there after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # a folder of CIFS or FUSE
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a hidden name beside `path` to write to; it becomes `path` at the end, or is removed on an error.

    An older file is replaced; permissions follow the umask, whoever writes. durable: the content is on the disk first,
    then the name, so that a power cut cannot leave the name without it; False for what is checked when it is read. A
    killed process leaves the hidden file at most (see `clear_leftovers`).
    """
    # Nodes, processes and threads may write one file at the same time: each its own, and the last one counts.
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    partial = path.with_name(f".{path.name}.{writer}{PARTIAL}")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        if partial.stat().st_mode != mode:  # safetensors replaces the file by one for the user alone
            partial.chmod(mode)
        if durable:
            to_disk(partial)
        partial.replace(path)
        if durable:
            to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def cache_file(path: Path) -> Iterator[Path]:
    """As whole_file, its folder made. Raises DataError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} cannot be written ({reason}); check its disk, then run again to resume") from error


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file of this text (UTF-8) or these bytes as `whole_file` does."""
    with whole_file(path, durable=durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None, end: str = "\r\n") -> str:
    """A table with a header: of a column for every name that occurs in the rows, or of these columns alone."""
    rows, text = list(rows), io.StringIO(newline="")
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def clear_leftovers(folder: Path) -> int:
    """Remove what killed processes left half written below the folder; returns how many files that were."""
    leftovers = list(folder.rglob(f"*{PARTIAL}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def whole_records(content: bytes) -> list[dict[str, Any]]:
    """Of a JSONL file of metrics, each with its step; a crash may have cut or garbled lines."""
    records = []
    for line in content.decode("utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def mark_complete(folder: Path) -> None:
    """List every file of a folder with its size, once all of them are on the disk: from now on it is whole."""
    paths = [path for path in sorted(folder.rglob("*")) if path != folder / COMPLETE]
    for path in (*paths, folder):
        to_disk(path)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    write_whole(folder / COMPLETE, json.dumps({"files": files}, indent=1))


def damage(folder: Path, *, optional: str | None = None, editable: Collection[str] = ()) -> str | None:
    """What is wrong with a folder that was marked complete; None where all files are there with their sizes.

    optional: a folder in it that may be missing as a whole. editable: files that people may change or remove.
    """
    marker = folder / COMPLETE
    try:
        sizes = dict(json.loads(marker.read_text(encoding="utf-8"))["files"])
    except (KeyError, TypeError, ValueError) as error:
        return f"{marker} is damaged ({' '.join(str(error).split())})"
    for file, size in ((folder / name, size) for name, size in sizes.items()):
        may_be_missing = optional and file.is_relative_to(folder / optional) and not (folder / optional).exists()
        if may_be_missing or str(file.relative_to(folder)) in editable:
            continue
        if not file.is_file() or file.stat().st_size != size:
            return f"{file} is missing or cut short"
    return None


def try_lock(path: Path) -> IO[Any] | None:
    """The file at `path`, made if need be, locked until it is closed; None while another process holds it.

    A killed process loses its lock. Where the file system knows no locks (NFS or Lustre, by how it is mounted), this
    machine's temporary folder holds one for it, which other machines do not see. Raises OSError where the file cannot
    be opened.
    """
    lock = _flock(path, "a", fcntl.LOCK_EX)
    if lock is not None and lock.name != str(path):
        logger.warning("%s: its file system knows no locks, so a run on another machine is not noticed", path.parent)
    return lock


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock at `path`; True also where that cannot be found out. Makes no file.

    Looking shares the lock, so that two processes that look do not take each other for its holder.
    """
    try:
        lock = _flock(path, "rb", fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    if lock is not None:
        lock.close()
    return lock is None


def share_lock(path: Path) -> IO[Any] | None:
    """The file at `path`, held until it is closed so that `is_in_use` finds it so; None where it is being removed.

    Several may share it. Raises OSError where there is none.
    """
    lock = _flock(path, "rb", fcntl.LOCK_SH)
    if lock is not None and not path.exists():
        lock.close()
        return None
    return lock


def is_in_use(path: Path) -> bool:
    """Whether a process shares the lock of the file at `path`; False also where that cannot be found out."""
    try:
        lock = _flock(path, "r+b", fcntl.LOCK_EX)  # NFS locks for one alone only what may be written
    except OSError:
        return False
    if lock is not None:
        lock.close()
    return lock is None


def _flock(path: Path, mode: str, kind: int) -> IO[Any] | None:
    lock = path.open(mode)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return lock
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            return None
        if error.errno not in _UNSUPPORTED or path.parent == private_folder("locks"):
            raise
    return _flock(private_folder("locks") / hashlib.sha256(str(path.resolve()).encode()).hexdigest(), "a", kind)
