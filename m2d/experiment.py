"""One experiment directory: NAME_YYYYMMDD_HHMMSS with everything a run reads and leaves. What a run writes, no more.

The root may be a path or a URI. For a URI the run works in a staging directory of this machine; `publish` copies it to
the root and `fetch` brings it to a machine that does not hold it. `m2d.experiments` reads it.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.fs
import yaml

from m2d import __version__
from m2d.errors import ExperimentError
from m2d.files.atomic import is_locked, try_lock, write_whole
from m2d.files.paths import private_folder
from m2d.files.storage import copy_changed, inside, open_storage
from m2d.models.settings import COMPLETE
from m2d.records import back_up_code

FOLDERS = (
    "checkpoints", "logs", "outputs", "generated_images", "cache", "wandb", "configs", "code_backup", "metrics",
    "visualizations",
)  # fmt: skip
INFO = "experiment_info.json"
CONFIG = "configs/config.yaml"
LOCK = ".running.lock"  # held by the process that trains
BEST = "best"  # the link to the best checkpoint
REPORTED_PACKAGES = ("torch", "torchvision", "ray", "diffusers", "timm", "lpips", "numpy", "pyarrow", "pillow", "wandb")


@dataclass(frozen=True)
class Experiment:
    """A directory on this machine, and the URI it is published to (None where the two are the same)."""

    path: Path
    remote: str | None = None

    @property
    def name(self) -> str:
        """NAME_YYYYMMDD_HHMMSS."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    def info(self) -> dict[str, Any]:
        """experiment_info.json; empty where there is none. Raises ExperimentError where it is damaged."""
        path = self.path / INFO
        if not path.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{path} is damaged ({error}); remove the experiment, or put the file back") from None
        return found

    def update_info(self, **values: Any) -> None:
        """Merge values into experiment_info.json, atomically, without the secrets of URIs in them."""
        write_whole(self.path / INFO, json.dumps({**self.info(), **values}, indent=2, default=str))
        self.publish(INFO)

    def config(self) -> dict[str, Any]:
        """The resolved configuration the experiment was made with, without the secrets of URIs in it."""
        loaded: dict[str, Any] = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        found: dict[str, Any] = loaded
        return found

    def publish(self, relative: str = "") -> None:
        """Copy what changed in a file or folder (default: everything) to the remote root. Does nothing for a local one.

        Raises ExperimentError where the root cannot be written.
        """
        if self.remote is None:
            return

        def wanted(name: str) -> bool:
            # Hidden: locks and partial files. checkpoints/best is a link; best.json says the same.
            return not name.startswith("checkpoints/best/") and not any(p.startswith(".") for p in Path(name).parts)

        try:
            copy_changed(str(self.path / relative), inside(self.remote, relative) if relative else self.remote, wanted)
        except OSError as error:
            raise _unreachable(self.remote, "written", error) from None

    def fetch(self) -> None:
        """Bring a remote experiment to this machine where it is further there: all but its older checkpoints.

        Raises ExperimentError where the root cannot be read.
        """
        if self.remote is None:
            return
        try:
            there = checkpoint_names(*open_storage(inside(self.remote, "checkpoints")))
            here = complete_checkpoints(self.checkpoints)
            if here and (not there or here[-1].name >= there[-1]):
                return
            _make_folders(self.path)  # object stores know no empty ones
            copy_changed(self.remote, str(self.path), lambda name: not name.startswith("checkpoints/step_"))
            record = self.checkpoints / "best.json"
            best = json.loads(record.read_text(encoding="utf-8"))["checkpoint"] if record.is_file() else None
            for name in {*there[-1:], *([best] if best else [])}:
                copy_changed(inside(self.remote, f"checkpoints/{name}"), str(self.checkpoints / name), lambda _: True)
            if best is not None:
                (self.checkpoints / BEST).unlink(missing_ok=True)
                (self.checkpoints / BEST).symlink_to(best)
        except OSError as error:
            raise _unreachable(self.remote, "read", error) from None

    def discard(self) -> bool:
        """Remove the local directory of a run that has just been created and never began; returns whether it did.

        A directory with anything in checkpoints/ stays, whatever the caller believes.
        """
        if any(self.checkpoints.iterdir()):
            return False
        shutil.rmtree(self.path)
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the experiment for this process. Raises ExperimentError where another process trains in it."""
        path = self.path / LOCK
        removed = ExperimentError(f"{self.path} has just been removed; run the same command again to start over")
        try:
            lock = try_lock(path)
        except FileNotFoundError:
            raise removed from None
        except OSError as error:
            raise ExperimentError(
                f"{path} cannot be locked ({error.strerror}); name another --experiments_dir"
            ) from None
        if lock is None:
            raise ExperimentError(
                f"{self.path} is being trained by another process; wait for it, or start beside it with --fresh"
            )
        with lock:
            # `experiments clean` may have moved the directory away between the opening and the locking.
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise removed
            yield

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine holds it now."""
        return is_locked(self.path / LOCK)


def open_experiment(
    root: str,
    name: str,
    config: dict[str, Any],
    differences: Callable[[dict[str, Any], dict[str, Any]], list[str]],
    *,
    fresh: bool,
    command: list[str],
) -> tuple[Experiment, bool]:
    """The experiment to train in, and whether it continues an earlier run.

    differences: what of an earlier run's settings and these no continuation allows. Running a command again continues
    the newest unfinished experiment of its name. Raises ExperimentError, with the differences, where that one was made
    with other settings. Keys in URIs make no difference: the record has none, and the new command's are used.
    """
    config = config
    finished = ("done", "superseded")
    unfinished = [found for found in list_experiments(root, name) if found.info().get("state") not in finished]
    if fresh:
        for experiment in unfinished:
            if not experiment.is_running:
                experiment.update_info(state="superseded")
    elif unfinished:
        experiment = unfinished[-1]
        experiment.fetch()
        changed = differences(experiment.config(), config)
        if changed:
            raise ExperimentError(
                f"{experiment.path} is unfinished and was made with other settings ({'; '.join(changed)}); "
                "repeat its command to continue, or start over with --fresh or another --name"
            )
        return experiment, True
    return _create(root, name, config, command), False


def list_experiments(root: str, name: str | None = None) -> list[Experiment]:
    """Experiments under a root, oldest first; those of one name only where it is given."""
    pattern = re.compile(rf"{re.escape(name) if name else '.+'}_\d{{8}}_\d{{6}}")

    def by_time(names: Iterable[str]) -> list[str]:
        return sorted(filter(pattern.fullmatch, names), key=lambda name: name[-len("YYYYMMDD_HHMMSS") :])

    if "://" in root:
        try:
            filesystem, base = open_storage(root)
            found = filesystem.get_file_info(pyarrow.fs.FileSelector(base, allow_not_found=True))
            experiments = []
            for experiment in by_time(info.base_name for info in found):
                there, here = inside(root, experiment), _staging(root) / experiment
                copy_changed(there, str(here), {INFO, CONFIG}.__contains__)  # as far as a list needs it
                experiments.append(Experiment(here, there))
        except OSError as error:
            raise _unreachable(root, "read", error) from None
    else:
        folder = Path(root).expanduser()
        children = os.listdir(folder) if folder.is_dir() else []
        experiments = [Experiment((folder / name).resolve()) for name in by_time(children)]
    return [experiment for experiment in experiments if (experiment.path / INFO).is_file()]


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run on this machine, oldest first. directory: its checkpoints/."""
    return [directory / name for name in checkpoint_names(pyarrow.fs.LocalFileSystem(), str(directory))]


def checkpoint_names(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Names of the complete checkpoints in a checkpoints/ folder, oldest first. Raises OSError."""
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    names = sorted(info.base_name for info in found if info.base_name.startswith("step_"))
    markers = filesystem.get_file_info([f"{folder}/{name}/{COMPLETE}" for name in names])
    return [name for name, marker in zip(names, markers) if marker.type == pyarrow.fs.FileType.File]


def newest_step(directory: Path) -> int:
    """The step of the newest complete checkpoint in a run's checkpoints/; 0 where there is none."""
    return max((step_of(path.name) for path in complete_checkpoints(directory)), default=0)


def step_of(checkpoint: str) -> int:
    """2130 of step_00002130; 0 of another name."""
    digits = checkpoint.removeprefix("step_")
    return int(digits) if digits.isdecimal() else 0


def environment() -> dict[str, Any]:
    """Versions and machine of this process, for the record."""
    packages: dict[str, str | None] = {}
    for package in REPORTED_PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    return {"m2d": __version__, "python": platform.python_version(), "platform": platform.platform(), **packages}


def _create(root: str, name: str, config: dict[str, Any], command: list[str]) -> Experiment:
    remote = "://" in root
    base = _staging(root) if remote else Path(root).expanduser()
    while True:
        path = base / f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            time.sleep(0.2)  # the name counts seconds
        except OSError as error:
            raise _unreachable(root, "written", error) from None
    experiment = Experiment(path.resolve(), inside(root, path.name) if remote else None)
    _make_folders(path)
    write_whole(path / CONFIG, yaml.safe_dump(config, sort_keys=False))
    experiment.publish(CONFIG)  # before the info, which makes the folder an experiment
    experiment.update_info(
        name=path.name,
        state="running",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(command),
        cwd=os.getcwd(),  # where relative paths of the command begin
        versions=environment(),
        git=back_up_code(path / "code_backup"),
    )
    experiment.publish()
    return experiment


def _staging(root: str) -> Path:
    """Where experiments of a remote root lie on this machine; another root's, or another user's, lie elsewhere.

    Its name can be guessed, so another user may have been there first: raises ExperimentError unless it is ours alone.
    """
    key = hashlib.sha256(root.encode()).hexdigest()[:12]
    try:
        return private_folder("staging") / key
    except OSError as error:
        raise ExperimentError(
            f"staging: {error.filename} cannot be used for the files of {root} ({error.strerror}); "
            "remove it, or set TMPDIR to a directory of yours"
        ) from None


def _make_folders(path: Path) -> None:
    for folder in FOLDERS:
        (path / folder).mkdir(parents=True, exist_ok=True)


def _unreachable(root: str, done: str, error: OSError) -> ExperimentError:
    reason = error.strerror or " ".join(str(error).split())
    return ExperimentError(f"experiments_dir: {root} cannot be {done} ({reason}); name another")
