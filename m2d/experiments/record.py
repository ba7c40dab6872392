"""What is known of one experiment from its files: its state, its record, its checkpoints. All commands read it here."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import isfinite
from typing import Any, Literal

import yaml

from m2d.experiment import CONFIG, INFO, Experiment
from m2d.experiments.files import ExperimentFiles, lock_is_held

State = Literal["running", "done", "resumable", "failed", "superseded", "broken", "unknown"]
FINISHED: tuple[State, ...] = ("done", "superseded")  # no command goes on with them
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
        return family(self.name)

    @cached_property
    def started(self) -> datetime:
        """When it was made, in this machine's time zone; by its directory's name where the record does not say."""
        try:
            return datetime.fromisoformat(str(self.info["created"])).astimezone()
        except (KeyError, ValueError):
            stamp = self.name[-len("YYYYMMDD_HHMMSS") :]
        try:
            return datetime.strptime(stamp, "%Y%m%d_%H%M%S").astimezone()
        except ValueError:  # digits that are no time
            return datetime.fromtimestamp(0).astimezone()

    @property
    def checkpoint_step(self) -> int:
        """The step that resuming goes on from; 0 without a checkpoint."""
        return step_of(self.checkpoints[-1]) if self.checkpoints else 0

    @cached_property
    def steps_done(self) -> int:
        """Optimiser steps so far, those after the last checkpoint included."""
        last = self.files.last_record(TRAIN)
        return max(self.checkpoint_step, last["step"] if last else 0)

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run; None where it never came to know."""
        total = self.info.get("total_steps")
        return total if isinstance(total, int) else None

    @cached_property
    def best(self) -> tuple[str, str, float] | None:
        """(checkpoint, measure, value) of the best checkpoint; None where none was judged."""
        try:
            best = json.loads(self.files.text("checkpoints/best.json") or "")
            name, value = str(best["checkpoint"]), float(best["score"])
        except (ValueError, KeyError, TypeError):
            return None
        return (name, SCORES.get(self.config.get("stage", ""), SCORE), value) if isfinite(value) else None


def read_record(experiment: Experiment, *, held: bool = False) -> Record:
    """Read an experiment's files. held: this process holds its lock, so no other trains in it.

    Raises DataError for a remote one that cannot be reached.
    """
    files = ExperimentFiles.of(experiment)
    info, problem = _read_info(files)
    config, no_config = _read_config(files)
    checkpoints = files.complete_checkpoints()
    running = not held and lock_is_held(experiment.path)
    problem = problem or no_config
    state = _state(info, problem, checkpoints, running=running, remote=experiment.remote is not None)
    return Record(experiment, files, state, info, config, problem, checkpoints)


def family(name: str) -> str:
    """NAME of NAME_YYYYMMDD_HHMMSS."""
    return name[: -len("_YYYYMMDD_HHMMSS")]


def step_of(checkpoint: str) -> int:
    """2130 of step_00002130."""
    digits = checkpoint.removeprefix("step_")
    return int(digits) if digits.isdecimal() else 0


def _state(
    info: dict[str, Any], problem: str | None, checkpoints: tuple[str, ...], *, running: bool, remote: bool
) -> State:
    if running:
        return "running"
    if problem:
        return "broken"
    recorded = info.get("state")
    if recorded == "done":
        return "done"
    if recorded == "superseded":
        return "superseded"
    if remote and recorded == "running":
        return "unknown"  # its lock, if any, is on another machine
    return "resumable" if checkpoints else "failed"


def _read_info(files: ExperimentFiles) -> tuple[dict[str, Any], str | None]:
    text = files.text(INFO)
    if text is None:
        return {}, f"{INFO} is missing"
    if not text.strip():
        return {}, f"{INFO} is empty"
    try:
        info = json.loads(text)
    except ValueError as error:
        return {}, f"{INFO} is not JSON ({error})"
    return (info, None) if isinstance(info, dict) else ({}, f"{INFO} holds no record")


def _read_config(files: ExperimentFiles) -> tuple[dict[str, Any], str | None]:
    text = files.text(CONFIG)
    if text is None:
        return {}, f"{CONFIG} is missing"
    try:
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return {}, f"{CONFIG} is not YAML"
    return (config, None) if isinstance(config, dict) else ({}, f"{CONFIG} holds no settings")
