"""What is known of one experiment from its files: its state, its record, its checkpoints. All commands read it here."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import isfinite
from typing import Any, Literal, TypeGuard

import yaml

from m2d.experiment import CONFIG, INFO, Experiment, step_of
from m2d.experiments.files import END_BYTES, ExperimentFiles

State = Literal["running", "done", "resumable", "failed", "superseded", "broken", "unknown"]
FINISHED: tuple[State, ...] = ("done", "superseded")  # no command continues them
DIRECTORY = re.compile(r"(.+)_(\d{8}_\d{6})")
TRAIN, VALIDATION = "metrics/train.jsonl", "metrics/validation.jsonl"
# What m2d.training.validation.score minimises, by stage; that module loads torch.
SCORES = {"latent": "val/velocity_mse"}
SCORE = "val/perceptual"


@dataclass(frozen=True)
class Record:
    """One experiment as its files tell it."""

    experiment: Experiment
    files: ExperimentFiles
    state: State
    info: dict[str, Any]  # experiment_info.json; {} where it cannot be read
    config: dict[str, Any]  # the resolved configuration; {} where it cannot be read
    problem: str | None  # what cannot be read
    checkpoints: tuple[str, ...]  # complete ones, oldest first

    @property
    def name(self) -> str:
        """NAME_YYYYMMDD_HHMMSS."""
        return self.experiment.name

    @property
    def family(self) -> str:
        """NAME, which a command's --name gave."""
        return self.name[: -len("_YYYYMMDD_HHMMSS")]

    @property
    def stamp(self) -> str:
        """YYYYMMDD_HHMMSS."""
        return self.name[-len("YYYYMMDD_HHMMSS") :]

    @property
    def location(self) -> str:
        """Its path, or its URI."""
        return self.experiment.remote or str(self.experiment.path)

    @cached_property
    def started(self) -> datetime:
        """When it was made, in this machine's time zone; by its directory's name where the record does not say."""
        try:
            return datetime.fromisoformat(str(self.info["created"])).astimezone()
        except (KeyError, ValueError):
            pass
        try:
            return datetime.strptime(self.stamp, "%Y%m%d_%H%M%S").astimezone()
        except ValueError:  # digits that are no time
            return datetime.fromtimestamp(0).astimezone()

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
    def checkpoint_step(self) -> int:
        """The step that resuming continues from; 0 without a checkpoint."""
        return step_of(self.checkpoints[-1]) if self.checkpoints else 0

    @property
    def steps_done(self) -> int:
        """Optimiser steps so far, those after the last checkpoint included."""
        return max(self.checkpoint_step, int(self.last.get("step", 0)))

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run; None where it never came to know."""
        total = self.info.get("total_steps")
        return total if isinstance(total, int) else None

    @cached_property
    def best(self) -> tuple[str, str, float] | None:
        """(checkpoint, measure, value) of the best checkpoint; None where none was judged."""
        found = self.files.json("checkpoints/best.json")
        try:
            name, value = str(found["checkpoint"]), float(found["score"])
        except (ValueError, KeyError, TypeError):
            return None
        return (name, SCORES.get(self.config.get("stage", ""), SCORE), value) if isfinite(value) else None

    @property
    def images_a_step(self) -> int | None:
        """Images of one optimiser step, all workers together; None where the record does not tell."""
        batch, micro = self.config.get("batch_size"), self.config.get("gradient_accumulation_steps")
        workers = self.info.get("world_size")
        if isinstance(batch, int) and isinstance(micro, int) and isinstance(workers, int):
            return batch * micro * workers
        return None

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
        try:
            ended: Any = datetime.fromisoformat(str(self.info["finished"])).timestamp()
        except (KeyError, ValueError):
            ended = self.last.get("time")
        return max(ended - self.started.timestamp(), 0.0) if is_finite(ended) else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the run's last step at its last speed; None where that is not known."""
        speed = self.last.get("images_per_s")
        if self.images_a_step is None or self.total_steps is None or not is_finite(speed) or not speed:
            return None
        return (self.total_steps - self.steps_done) * self.images_a_step / speed


def read_record(experiment: Experiment, *, held: bool = False) -> Record:
    """Read an experiment's files. held: this process holds its lock, so no other trains in it.

    Raises DataError for a remote one that cannot be reached.
    """
    files = ExperimentFiles.of(experiment)
    info, problem = _parsed(files, INFO, "JSON", json.loads)
    config, no_config = _parsed(files, CONFIG, "YAML", _load_yaml)
    checkpoints = files.checkpoints()
    recorded, problem = info.get("state"), problem or no_config
    state: State = "resumable" if checkpoints else "failed"
    if not held and experiment.is_running:
        state = "running"
    elif problem:
        state = "broken"
    elif recorded == "done" or recorded == "superseded":
        state = recorded
    elif recorded == "running" and experiment.remote is not None:
        state = "unknown"  # its lock, if any, is on another machine
    return Record(experiment, files, state, info, config, problem, checkpoints)


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a record's value is a number."""
    return isinstance(value, (int, float)) and isfinite(value)


def within(settings: Any, group: str, name: str) -> Any:
    """settings[group][name]; None where there is no such thing."""
    inside = settings.get(group) if isinstance(settings, dict) else None
    return inside.get(name) if isinstance(inside, dict) else None


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values; a mapping without entries is a value."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return values


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _parsed(
    files: ExperimentFiles, name: str, kind: str, load: Callable[[str], Any]
) -> tuple[dict[str, Any], str | None]:
    """(what the file holds, what is wrong with it)."""
    text = files.text(name)
    if text is None:
        return {}, f"{name} is missing"
    if not text.strip():
        return {}, f"{name} is empty"
    try:
        found = load(text)
    except (ValueError, yaml.YAMLError) as error:
        return {}, f"{name} is not {kind} ({str(error).splitlines()[0]})"
    return (found, None) if isinstance(found, dict) else ({}, f"{name} holds no {kind} mapping")
