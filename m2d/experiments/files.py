"""An experiment's files where they are whole: its directory, or the remote root it is published to. It only reads.

The staging directory of a remote experiment is never filled from here: a run of this machine may be writing in it.
"""

import json
import os
import stat
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from m2d.experiment import Experiment, checkpoint_names
from m2d.files.storage import open_storage

END_BYTES = 2**16  # a hundred records of metrics and more


@dataclass(frozen=True)
class ExperimentFiles:
    """Files below one folder of a filesystem. What is not there, or cannot be read, is None or empty."""

    filesystem: fs.FileSystem
    root: str

    @classmethod
    def of(cls, experiment: Experiment) -> "ExperimentFiles":
        """Where the experiment's files are whole. Raises DataError for a URI that cannot be reached."""
        if experiment.remote is None or experiment.is_running:
            return cls(fs.LocalFileSystem(), str(experiment.path))
        return cls(*open_storage(experiment.remote))

    def content(self, name: str, end_bytes: int = 0) -> bytes | None:
        """A file's content, or its last `end_bytes` (0: all)."""
        try:
            with self.filesystem.open_input_file(f"{self.root}/{name}") as file:
                file.seek(max(file.size() - end_bytes, 0) if end_bytes else 0)
                found: bytes = file.read()
                return found
        except (OSError, pa.ArrowException):
            return None

    def text(self, name: str) -> str | None:
        """A file's text."""
        content = self.content(name)
        return None if content is None else content.decode("utf-8", errors="replace")

    def json(self, name: str) -> dict[str, Any]:
        """What a JSON file holds."""
        try:
            found = json.loads(self.text(name) or "")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def records(self, name: str, end_bytes: int = 0) -> list[dict[str, Any]]:
        """The whole records of a metrics file, such as metrics/train.jsonl, or of its last `end_bytes` (0: all)."""
        records = []
        for line in (self.content(name, end_bytes) or b"").decode("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the first or the last line may be cut
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def names(self, folder: str) -> list[str]:
        """Names of what a folder holds."""
        try:
            found = self.filesystem.get_file_info(fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True))
        except (OSError, pa.ArrowException):
            return []
        return sorted(info.base_name for info in found)

    def modified(self, name: str) -> int:
        """When a file was written, ns; 0 where that is not known."""
        return self.filesystem.get_file_info(f"{self.root}/{name}").mtime_ns or 0

    def checkpoints(self) -> tuple[str, ...]:
        """Names of the complete checkpoints, oldest first."""
        try:
            return tuple(checkpoint_names(self.filesystem, f"{self.root}/checkpoints"))
        except OSError:
            return ()

    def size(self, name: str = "") -> int:
        """Bytes of all files in a folder (default: all); links count for nothing."""
        root = f"{self.root}/{name}" if name else self.root
        if isinstance(self.filesystem, fs.LocalFileSystem):
            return folder_bytes(root)
        found = self.filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return sum(info.size or 0 for info in found if info.type == fs.FileType.File)


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder of this machine; links count for nothing."""
    total = 0
    for directory, _, names in os.walk(folder):  # skips what is gone meanwhile, as a run deletes its old checkpoints
        for name in names:
            try:
                found = os.lstat(os.path.join(directory, name))
            except OSError:
                continue
            total += found.st_size if not stat.S_ISLNK(found.st_mode) else 0
    return total
