"""What is known of experiments from their files alone: each one's record, and which one a name means.

The staging directory of a remote experiment is never filled from here: a run of this machine may be writing in it.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeGuard

import pyarrow as pa
import yaml
from pyarrow import fs

from m2d.errors import ExperimentError
from m2d.experiment import CONFIG, INFO, Experiment, checkpoint_names, created, list_experiments, step_of
from m2d.files.atomic import whole_records
from m2d.files.paths import result_path
from m2d.files.storage import files_below, open_storage

State = Literal["running", "done", "resumable", "failed", "superseded", "broken", "unknown"]
FINISHED: tuple[State, ...] = ("done", "superseded")  # no command continues them
DIRECTORY = re.compile(r"(?!\.).+_\d{8}_\d{6}")
TRAIN, VALIDATION = "metrics/train.jsonl", "metrics/validation.jsonl"
END_BYTES = 2**16  # a hundred records of metrics and more
LATEST = "latest"
NAMED = 8  # so many experiments are named in one message


@dataclass(frozen=True)
class ExperimentFiles:
    """Files below one folder of a filesystem. What is not there, or cannot be read, is None or empty."""

    filesystem: fs.FileSystem
    root: str

    def content(self, name: str, end_bytes: int = 0) -> bytes | None:
        """A file's content, or its last `end_bytes` (0: all)."""
        try:
            with self.filesystem.open_input_file(f"{self.root}/{name}") as file:
                file.seek(max(file.size() - end_bytes, 0) if end_bytes else 0)
                return bytes(file.read())
        except (OSError, pa.ArrowException):
            return None

    def mapping(self, name: str) -> tuple[dict[str, Any], str | None]:
        """(what a JSON or YAML file holds, what is wrong with it)."""
        content = self.content(name)
        if content is None or not content.strip():
            return {}, f"{name} is {'missing' if content is None else 'empty'}"
        text, kind = content.decode("utf-8", errors="replace"), "JSON" if name.endswith(".json") else "YAML"
        try:
            if kind == "JSON":
                found = json.loads(text)
            else:
                found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # a list has many to read
        except (ValueError, yaml.YAMLError) as error:
            return {}, f"{name} is not {kind} ({str(error).splitlines()[0]})"
        return (found, None) if isinstance(found, dict) else ({}, f"{name} holds no {kind} mapping")

    def records(self, name: str, end_bytes: int = 0) -> list[dict[str, Any]]:
        """The whole records of a metrics file, such as metrics/train.jsonl, or of its last `end_bytes` (0: all)."""
        return whole_records(self.content(name, end_bytes) or b"")

    def names(self, folder: str) -> list[str]:
        """Names of what a folder holds."""
        with suppress(OSError, pa.ArrowException):
            found = self.filesystem.get_file_info(fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True))
            return sorted(info.base_name for info in found)
        return []

    def modified(self, name: str) -> int:
        """When a file was written, ns; 0 where that is not known."""
        return self.filesystem.get_file_info(f"{self.root}/{name}").mtime_ns or 0

    def size(self, name: str = "") -> int:
        """Bytes of all files in a folder (default: all); links count for nothing."""
        root = f"{self.root}/{name}".rstrip("/")
        if isinstance(self.filesystem, fs.LocalFileSystem):
            return folder_bytes(root)
        return sum(info.size or 0 for info in files_below(self.filesystem, root))


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder of this machine; links count for nothing."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a run deletes its old checkpoints meanwhile
                found = os.lstat(os.path.join(directory, name))
                total += 0 if stat.S_ISLNK(found.st_mode) else found.st_size
    return total


@dataclass(frozen=True)
class Record:
    """One experiment as its files tell it."""

    experiment: Experiment
    files: ExperimentFiles
    name: str  # NAME_YYYYMMDD_HHMMSS
    family: str  # NAME, which a command's --name gave
    location: str  # its path, or its URI
    state: State
    info: dict[str, Any]  # experiment_info.json; {} where it cannot be read
    config: dict[str, Any]  # the resolved configuration; {} where it cannot be read
    problem: str | None  # what cannot be read
    checkpoints: tuple[str, ...]  # complete ones, oldest first
    total_steps: int | None  # optimiser steps of the whole run; None where it never came to know

    @cached_property
    def started(self) -> datetime:
        """When it was made, in this machine's time zone."""
        return created(self.name, self.info).astimezone()

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """Every record of training."""
        return self.files.records(TRAIN)

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """Every record of validation."""
        return self.files.records(VALIDATION)

    @cached_property
    def last(self) -> dict[str, Any]:
        """The last record of training; {} where there is none. Reads the file's end alone."""
        return next(reversed(self.files.records(TRAIN, END_BYTES)), {})

    @property
    def steps_done(self) -> int:
        """Optimiser steps so far, those after the last checkpoint included."""
        return max(self.last.get("step", 0), *map(step_of, self.checkpoints), 0)

    @cached_property
    def best(self) -> tuple[str, str, float] | None:
        """(checkpoint, measure, value) of the best checkpoint; None where none was judged."""
        found = self.files.mapping("checkpoints/best.json")[0]
        if not is_finite(found.get("score")):
            return None
        # What m2d.training.validation.score minimises, by stage; that module loads torch.
        measure = "val/velocity_mse" if self.config.get("stage") == "latent" else "val/perceptual"
        return str(found.get("checkpoint")), measure, float(found["score"])

    @property
    def images_a_step(self) -> int | None:
        """Images of one optimiser step, all workers together; None where the record does not say."""
        batch, micro = self.config.get("batch_size"), self.config.get("gradient_accumulation_steps")
        workers = self.info.get("world_size")
        return batch * micro * workers if batch and micro and workers else None

    @property
    def training_seconds(self) -> float | None:
        """Seconds that the recorded steps took, by their images/s: no start, validation or pause between two tries."""
        if self.images_a_step is None or not self.train:
            return None
        steps, seconds = 0, 0.0
        for entry in self.train:
            speed = entry.get("images_per_s")
            if is_finite(speed) and speed > 0:
                seconds += (entry["step"] - steps) * self.images_a_step / speed
            steps = entry["step"]
        return seconds

    @property
    def wall_seconds(self) -> float | None:
        """Seconds from its making to its end, or to its last record of training, pauses between two tries included."""
        ended = self.last.get("time")
        with suppress(ValueError):
            ended = datetime.fromisoformat(str(self.info.get("finished"))).timestamp()
        return max(ended - self.started.timestamp(), 0.0) if is_finite(ended) else None


def read_record(experiment: Experiment, *, held: bool = False) -> Record:
    """Read an experiment's files. held: this process holds its lock, so no other trains in it.

    Raises DataError for a remote one that cannot be reached.
    """
    is_running = experiment.is_running
    if experiment.remote is None or is_running:
        files = ExperimentFiles(fs.LocalFileSystem(), str(experiment.path))
    else:
        files = ExperimentFiles(*open_storage(experiment.remote))
    info, no_info = files.mapping(INFO)
    config, no_config = files.mapping(CONFIG)
    checkpoints: tuple[str, ...] = ()
    with suppress(OSError):
        checkpoints = tuple(checkpoint_names(files.filesystem, f"{files.root}/checkpoints"))
    recorded, problem = info.get("state"), no_info or no_config
    state: State = "resumable" if checkpoints else "failed"
    if is_running and not held:
        state = "running"
    elif problem:
        state = "broken"
    elif recorded == "done" or recorded == "superseded":
        state = recorded
    elif recorded == "running" and experiment.remote is not None:
        state = "unknown"  # its lock, if any, is on another machine
    return Record(
        experiment,
        files,
        name=experiment.name,
        family=experiment.name[: -len("_YYYYMMDD_HHMMSS")],
        location=experiment.remote or str(experiment.path),
        state=state,
        info=info,
        config=config,
        problem=problem,
        checkpoints=checkpoints,
        total_steps=info.get("total_steps"),
    )


def find_records(root: str, name: str | None = None) -> list[Record]:
    """Experiments under a root, oldest first; those of one name only where it is given.

    In a folder of this machine also those whose record cannot be read. Raises ExperimentError for a root that is not
    there or cannot be read, ConfigError for one in a job's copy, which holds none.
    """
    root = result_path("experiments_dir", root)
    if "://" in root:
        found = list_experiments(root)
    else:
        folder = Path(root).expanduser().absolute()
        try:
            paths = [path for path in folder.iterdir() if DIRECTORY.fullmatch(path.name) and path.is_dir()]
        except OSError as error:
            known = {FileNotFoundError: "not there", NotADirectoryError: "not a folder"}
            why = known.get(type(error), f"not readable ({error.strerror})")
            raise ExperimentError(
                f"experiments_dir: {root} is {why}; name the folder that holds the experiments"
            ) from None
        found = [Experiment(path) for path in paths]
    records = [record for record in map(read_record, found) if name in (None, record.family)]
    return sorted(records, key=lambda record: (record.started, record.name))


def resolve(records: Sequence[Record], wanted: str, root: str) -> Record:
    """The experiment that `wanted` means: a whole name, the beginning of just one, a path ending so, or `latest`.

    records: oldest first. Raises ExperimentError, which names what it could be, where it is none or several.
    """
    where = result_path("experiments_dir", root)
    if not records:
        raise ExperimentError(f"no experiment in {where}; name another folder by --experiments_dir")
    if wanted == LATEST:
        return records[-1]
    word = wanted.rstrip("/").rpartition("/")[2]  # a shell completes names to paths
    whole = [record for record in records if record.name == word]
    found = whole or [record for record in records if word and record.name.startswith(word)]
    if len(found) == 1:
        return found[0]
    candidates = found or records
    more = len(candidates) - NAMED
    names = ", ".join(record.name for record in candidates[-NAMED:]) + (f" ({more} more)" if more > 0 else "")
    if found:
        raise ExperimentError(f"experiment {wanted} may be {names}; give more of its name")
    raise ExperimentError(f"experiment {wanted} is not in {where}; there: {names}, or say {LATEST}")


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a record's value is a number."""
    return isinstance(value, (int, float)) and isfinite(value)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values; a mapping without entries is a value."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return values
