"""One experiment directory: NAME_YYYYMMDD_HHMMSS with everything a run reads and leaves. What a run writes, no more.

The root may be a path or a URI. For a URI the run works in a staging directory of this machine; `publish` copies it to
the root and `fetch` brings it to a machine that does not hold it. `m2d.experiments` reads it.
"""

import getpass
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from m2d import __version__
from m2d.errors import ExperimentError
from m2d.files.atomic import COMPLETE, FULL, damage, is_locked, to_disk, try_lock, write_whole
from m2d.files.paths import best_name, private_folder
from m2d.files.storage import copy_changed, inside, open_storage

logger = logging.getLogger(__name__)
FOLDERS = (
    "checkpoints", "logs", "outputs", "generated_images", "cache", "wandb", "configs", "code_backup", "metrics",
    "visualizations",
)  # fmt: skip
INFO = "experiment_info.json"
CONFIG = "configs/config.yaml"
LOCK = ".running.lock"  # held by the process that trains
HIDDEN = ".removing-"  # before the name of what is being removed; no list shows it, `experiments clean` removes it
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

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine holds it now."""
        return is_locked(self.path / LOCK)

    def info(self) -> dict[str, Any]:
        """experiment_info.json; empty where there is none or it is damaged, so the run counts as unfinished."""
        found = read_mapping(self.path / INFO)
        if found is None and (self.path / INFO).exists():
            logger.warning("%s is empty or damaged; the run counts as unfinished", self.path / INFO)
        return found or {}

    def update_info(self, **values: Any) -> None:
        """Merge values into experiment_info.json, atomically."""
        write_whole(self.path / INFO, json.dumps({**self.info(), **values}, indent=2, default=str))
        self.publish(INFO)

    def config(self) -> dict[str, Any]:
        """The resolved configuration that the experiment was made with; each checkpoint has a copy of it.

        Raises ExperimentError where it is lost or damaged and there is no checkpoint.
        """
        found = read_mapping(self.path / CONFIG)
        for checkpoint in complete_checkpoints(self.checkpoints):
            found = found or (read_mapping(checkpoint / "checkpoint.yaml") or {}).get("config")
        if not found:
            raise ExperimentError(
                f"{self.path / CONFIG} is missing, empty or damaged, and no checkpoint has a copy of it; start over "
                "with --fresh"
            )
        return found

    def mend(self) -> list[str]:
        """Put in order what a power cut or a disk damaged, so that the run can resume; a line about each thing done.

        A checkpoint whose files are not those that it lists keeps them, but counts as none from now on.
        """
        lines = []
        for path in complete_checkpoints(self.checkpoints):
            if reason := damage(path):
                (path / COMPLETE).replace(path / "damaged.json")
                newest = newest_step(self.checkpoints)
                left = f"the newest whole one is of step {newest}" if newest else "none is left, so it begins again"
                lines.append(f"checkpoint: {reason}, so {path.name} does not count; {left}")
        if read_mapping(self.path / CONFIG) is None:
            write_whole(self.path / CONFIG, yaml.safe_dump(self.config(), sort_keys=False))
            lines.append(f"{CONFIG} was damaged and is written again, from a checkpoint's copy")
        return lines

    def publish(self, relative: str = "") -> None:
        """Copy what changed in a file or folder (default: everything) to the remote root. Does nothing for a local one.

        Raises ExperimentError where the root cannot be written.
        """
        if self.remote is None:
            return

        def wanted(name: str) -> bool:
            # Hidden: locks and partial files. checkpoints/best is a link; best.json says the same.
            return not name.startswith("checkpoints/best/") and not any(p.startswith(".") for p in Path(name).parts)

        with _reaching(self.remote, "written"):
            copy_changed(str(self.path / relative), inside(self.remote, relative) if relative else self.remote, wanted)

    def fetch(self) -> None:
        """Bring a remote experiment to this machine where it is further there: all but its older checkpoints.

        Raises ExperimentError where the root cannot be read.
        """
        if self.remote is None:
            return
        with _reaching(self.remote, "read"):
            there = checkpoint_names(*open_storage(inside(self.remote, "checkpoints")))
            here = complete_checkpoints(self.checkpoints)
            if here and (not there or here[-1].name >= there[-1]):
                return
            _make_folders(self.path)  # object stores know no empty ones
            copy_changed(self.remote, str(self.path), lambda name: not name.startswith("checkpoints/step_"))
            best = best_name(self.checkpoints)
            for name in {*there[-1:], *([best] if best else [])}:
                copy_changed(inside(self.remote, f"checkpoints/{name}"), str(self.checkpoints / name), lambda _: True)
            if best is not None:
                link_best(self.checkpoints, best)

    def discard(self) -> bool:
        """Remove the local directory of a run that has just been created and never began; returns whether it did.

        A directory with anything in checkpoints/ stays, whatever the caller believes.
        """
        if any(self.checkpoints.iterdir()):
            return False
        hidden = self.path.rename(self.path.with_name(HIDDEN + self.name))
        shutil.rmtree(hidden, ignore_errors=True)  # NFS keeps what is open, such as the lock
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
            if not path.exists():  # `experiments clean` moved the directory away between the opening and the locking
                raise removed
            yield


def open_experiment(
    root: str,
    name: str,
    config: dict[str, Any],
    differences: Callable[[dict[str, Any], dict[str, Any]], list[str]],
    repeats: Callable[[Experiment], bool] = lambda done: False,
    *,
    fresh: bool,
    command: list[str],
) -> tuple[Experiment, bool]:
    """The experiment to train in, and whether it is an earlier one: the newest unfinished one of this user and name.

    Where there is none, the newest one if it is done and these settings would repeat it. differences: what of an
    earlier run's settings and these no continuation allows. repeats: whether the images of a run that is done are those
    of this one. Raises ExperimentError, with the differences, where the unfinished one was made with other settings.
    """
    found = list_experiments(root, name)
    user = getpass.getuser()
    own = [one for one in found if one.info().get("user", user) == user]
    finished = ("done", "superseded")
    unfinished = [one for one in own if one.info().get("state") not in finished]
    for one in () if unfinished else set(found) - set(own):
        if (info := one.info()).get("state") not in finished:
            logger.warning("%s is unfinished and of the user %s; a new one begins beside it", one.path, info["user"])
    newest = own[-1] if own and not unfinished and not fresh else None
    if newest is not None and newest.info().get("state") == "done" and not differences(newest.config(), config):
        newest.fetch()
        if repeats(newest):
            return newest, True
    if unfinished and not fresh:
        experiment = unfinished[-1]
        experiment.fetch()
        if changed := differences(experiment.config(), config):
            raise ExperimentError(
                f"{experiment.path} is unfinished and was made with other settings ({'; '.join(changed)}); "
                "repeat its command to continue, or start over with --fresh or another --name"
            )
        return experiment, True
    for experiment in unfinished:
        if not experiment.is_running:
            experiment.update_info(state="superseded")
    return _create(root, name, config, command), False


def list_experiments(root: str, name: str | None = None) -> list[Experiment]:
    """Experiments under a root, oldest first by their records; those of one name only where it is given."""
    pattern = re.compile(rf"(?!\.){re.escape(name) if name else '.+'}_\d{{8}}_\d{{6}}")
    with _reaching(root, "read"):
        filesystem, base = open_storage(root)
        found = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
        names = [info.base_name for info in found if pattern.fullmatch(info.base_name)]
        experiments = [Experiment((Path(base) / name).resolve()) for name in names]
        if "://" in root:
            experiments = [Experiment(_staging(root) / name, inside(root, name)) for name in names]
            for one in experiments:
                copy_changed(str(one.remote), str(one.path), {INFO, CONFIG}.__contains__)  # as far as a list needs it
    made = [experiment for experiment in experiments if (experiment.path / INFO).is_file()]

    def age(experiment: Experiment) -> tuple[datetime, str]:
        with suppress(ExperimentError):  # who opens a damaged one is told
            return created(experiment.name, experiment.info()), experiment.name
        return created(experiment.name, {}), experiment.name

    return sorted(made, key=age)


def created(name: str, info: dict[str, Any]) -> datetime:
    """When an experiment was made, by its record; else by its name, whose time is UTC (in older ones local)."""
    for text in (str(info.get("created")), f"{name[-15:].replace('_', 'T')}+00:00"):
        with suppress(ValueError):  # digits that are no time
            return datetime.fromisoformat(text).astimezone(UTC)
    return datetime.fromtimestamp(0, UTC)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run on this machine, oldest first. directory: its checkpoints/."""
    return [directory / name for name in checkpoint_names(fs.LocalFileSystem(), str(directory))]


def checkpoint_names(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """Names of the complete checkpoints in a checkpoints/ folder, oldest first. Raises OSError."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    names = sorted(info.base_name for info in found if info.base_name.startswith("step_"))
    markers = filesystem.get_file_info([f"{folder}/{name}/{COMPLETE}" for name in names])
    return [name for name, marker in zip(names, markers) if marker.type == fs.FileType.File]


def link_best(directory: Path, name: str) -> None:
    """Point the link `best` in a run's checkpoints/ to one of them: for people, where the file system knows links.

    m2d.files.paths.checkpoint_folder reads best.json.
    """
    link = directory / ".best.partial"
    with suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(directory / "best")


def newest_step(directory: Path) -> int:
    """The step of the newest complete checkpoint in a run's checkpoints/; 0 where there is none."""
    return max((step_of(path.name) for path in complete_checkpoints(directory)), default=0)


def step_of(checkpoint: str) -> int:
    """2130 of step_00002130; 0 of another name."""
    digits = checkpoint.removeprefix("step_")
    return int(digits) if digits.isdecimal() else 0


def read_mapping(path: Path) -> dict[str, Any] | None:
    """What a JSON or YAML file of an experiment holds; None where it is missing, empty or damaged."""
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    with suppress(FileNotFoundError, ValueError, yaml.YAMLError):
        found = read(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _create(root: str, name: str, config: dict[str, Any], command: list[str]) -> Experiment:
    remote = "://" in root
    base = _staging(root) if remote else Path(root).expanduser()
    with _reaching(root, "written"):
        while True:
            path = base / f"{name}_{datetime.now(UTC):%Y%m%d_%H%M%S}"
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                time.sleep(0.2)  # the name counts seconds
    experiment = Experiment(path.resolve(), inside(root, path.name) if remote else None)
    try:
        with _reaching(root, "written"):
            _fill(experiment, config, command)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # nobody else knows it yet
        raise
    return experiment


def _fill(experiment: Experiment, config: dict[str, Any], command: list[str]) -> None:
    path = experiment.path
    _make_folders(path)
    write_whole(path / CONFIG, yaml.safe_dump(config, sort_keys=False))
    experiment.publish(CONFIG)  # before the info, which makes the folder an experiment
    versions: dict[str, str | None] = {
        "m2d": __version__, "python": platform.python_version(), "platform": platform.platform()
    }  # fmt: skip
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    experiment.update_info(
        name=path.name,
        state="running",
        user=getpass.getuser(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(command),
        cwd=os.getcwd(),  # where relative paths of the command begin
        versions=versions,
        git=back_up_code(path / "code_backup"),
    )
    experiment.publish()
    to_disk(path.parent)


def _staging(root: str) -> Path:
    """Where experiments of a remote root lie on this machine; another root's, or another user's, lie elsewhere."""
    return private_folder("staging") / hashlib.sha256(root.encode()).hexdigest()[:12]


def _make_folders(path: Path) -> None:
    for folder in FOLDERS:
        (path / folder).mkdir(parents=True, exist_ok=True)


@contextmanager
def _reaching(root: str, done: str) -> Iterator[None]:
    """An OSError inside is the root's, which cannot be `done`: read or written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        remedy = "make room, or name another" if error.errno in FULL else "name another"
        raise ExperimentError(f"experiments_dir: {root} cannot be {done} ({reason}); {remedy}") from None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs the line, and prints no traceback for each."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """M2D's messages inside the `with` block, kept in this file too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("m2d").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("m2d").removeHandler(handler)
        handler.close()


# No setting holds a key: m2d.files.paths refuses URIs with credentials. So what is left is the code.
# What hosts of code scan pushes for: keys that show by their form, and texts that stand behind a name of a secret.
_KEYS = re.compile(
    r"""\b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \bgh[pousr]_[A-Za-z0-9]{30,} | \bgithub_pat_\w{30,} | \bglpat-[\w-]{20,}
    | \bhf_[A-Za-z0-9]{30,} | \bwandb_v\d_\w{30,} | \bsk-[\w-]{32,} | \bxox[abeprs]-[\w-]{20,} | \bAIza[\w-]{35}
    | \beyJ[\w-]{16,}\.eyJ[\w-]{16,}
    | ://[^/@\s:'"]*:[^/@\s'"{}]{4,}@
    | (?i:api_?key|access_?key|secret|token|passw(?:or)?d)\w*["']?\]?\s*(?::\s*\w+\s*)?[:=,]\s*   # a name and a sign
      ["'](?=[^"']*\d)[^\s"'{}]{12,}["']
    | (?i:key)["']?\]?\s*[:=]\s*["'][0-9a-f]{40}["']""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
BLANKED_LINE = "# M2D left this line out of the copy, for it looks as if it held a key"


def back_up_code(target: Path) -> dict[str, Any]:
    """Copy the package's sources; returns the commit and whether the tree had changes (None without git).

    Lines that look as if they held a key are left out, which is said.
    """
    package, script = Path(__file__).parent, Path(sys.argv[0])
    sources = {path: target / path.relative_to(package.parent) for path in package.rglob("*") if path.is_file()}
    if script.suffix == ".py" and script.is_file() and script.parent.name != "m2d":
        sources[script] = target / script.name
    for source, copy in sources.items():
        if source.parent.name != "__pycache__":
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)  # without its permissions: it may be installed for reading only

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.decode(errors="replace")

    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ".")
    if changes:
        (target / "uncommitted.patch").write_text(changes, encoding="utf-8")
    left_out = []
    for path in sorted(target.rglob("*")):
        if path.suffix in (".py", ".patch", ".yaml", ".yml") and not path.is_symlink():
            code, numbers = code_without_keys(path.read_bytes().decode("utf-8", "surrogateescape"))
            if numbers:
                path.write_bytes(code.encode("utf-8", "surrogateescape"))
                left_out += [f"{path.relative_to(target)}:{number}" for number in numbers]
    if left_out:
        where = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        logger.warning(
            "code_backup: lines that look like keys are left out of the copy (%s); give keys by the environment", where
        )
    return {"commit": commit.strip() if commit else None, "uncommitted_changes": bool(changes) if commit else None}


def code_without_keys(text: str) -> tuple[str, list[int]]:
    """Source code or a patch without the lines that look as if they held a key, and the numbers of those lines.

    As many lines as before, so that a patch's line counts hold. Long random words behind a name such as `api_key` or
    `password`, access keys and tokens of known form, private keys, and URIs with a password are found; others are not.
    """
    lines = text.split("\n")
    suspects = {number for number, line in enumerate(lines) if _KEYS.search(line)}
    for found in _PRIVATE_KEY.finditer(text):
        first = text.count("\n", 0, found.start())
        suspects |= set(range(first, first + found[0].count("\n") + 1))
    for number in suspects:
        mark = re.match(r"(?:\+|-(?!----))?\s*", lines[number])  # of a patch, and the indentation
        lines[number] = f"{mark[0] if mark else ''}{BLANKED_LINE}"
    return "\n".join(lines), [number + 1 for number in sorted(suspects)]
