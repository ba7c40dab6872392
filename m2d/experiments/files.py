"""An experiment's files where they are whole: its directory, or the remote root it is published to. It only reads.

The staging directory of a remote experiment is never filled from here: a run of this machine may be writing in it.
"""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from m2d.experiment import Experiment
from m2d.files.storage import open_storage
from m2d.models.settings import COMPLETE

LOCK = ".running.lock"  # held by Experiment.running
END_BYTES = 2**16  # a hundred records of metrics and more


@dataclass(frozen=True)
class ExperimentFiles:
    """Files below one folder of a filesystem."""

    filesystem: fs.FileSystem
    root: str

    @classmethod
    def of(cls, experiment: Experiment) -> "ExperimentFiles":
        """Where the experiment's files are whole. Raises DataError for a URI that cannot be reached."""
        if experiment.remote is None or lock_is_held(experiment.path):
            return cls(fs.LocalFileSystem(), str(experiment.path))
        return cls(*open_storage(experiment.remote))

    def text(self, name: str) -> str | None:
        """A file's text; None where there is none that can be read."""
        return self._read(name, 0)

    def records(self, name: str) -> list[dict[str, Any]]:
        """Every whole record of a metrics file, such as metrics/train.jsonl."""
        return _records(self.text(name) or "")

    def last_record(self, name: str) -> dict[str, Any] | None:
        """The last whole record of a metrics file; reads its end alone."""
        records = _records(self._read(name, END_BYTES) or "")
        return records[-1] if records else None

    def complete_checkpoints(self) -> tuple[str, ...]:
        """Names of the complete checkpoints, oldest first."""
        try:
            found = self.filesystem.get_file_info(fs.FileSelector(f"{self.root}/checkpoints", allow_not_found=True))
            names = sorted(info.base_name for info in found if info.base_name.startswith("step_"))
            markers = self.filesystem.get_file_info([f"{self.root}/checkpoints/{name}/{COMPLETE}" for name in names])
        except OSError:
            return ()
        return tuple(name for name, marker in zip(names, markers) if marker.type == fs.FileType.File)

    def size(self, name: str = "") -> int:
        """Bytes of all files in a folder (default: all); links count for nothing."""
        root = f"{self.root}/{name}" if name else self.root
        if isinstance(self.filesystem, fs.LocalFileSystem):
            return folder_bytes(root)
        found = self.filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return sum(info.size or 0 for info in found if info.type == fs.FileType.File)

    def _read(self, name: str, end_bytes: int) -> str | None:
        """The file, or its last `end_bytes` (0: all)."""
        try:
            with self.filesystem.open_input_file(f"{self.root}/{name}") as file:
                file.seek(max(file.size() - end_bytes, 0) if end_bytes else 0)
                content: bytes = file.read()
                return content.decode("utf-8", errors="replace")
        except (OSError, pa.ArrowException):
            return None


def lock_is_held(folder: Path) -> bool:
    """Whether a process of this machine trains in the folder.

    Asks for a shared lock, so that two who look do not take each other for a run, and makes no file.
    """
    try:
        lock = (folder / LOCK).open("rb")
    except OSError:
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder of this machine; links count for nothing."""
    total, waiting = 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif not entry.is_symlink():
                        total += entry.stat().st_size
        except OSError:
            continue  # gone meanwhile, as a run deletes its old checkpoints
    return total


def _records(text: str) -> list[dict[str, Any]]:
    """Lines that are whole; the first or the last one may be cut. Records name their step."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
