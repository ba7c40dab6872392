"""Removing what a plan names, so that neither a crash half-way nor a run that starts meanwhile does harm.

A path first gets a hidden name, under the experiment's lock, and is then deleted, so that half an experiment never lies
under its name. What a crash leaves under the hidden one the next clean removes.
"""

import os
import shutil
from pathlib import Path

from m2d.errors import ExperimentError
from m2d.experiments.clean_plan import HIDDEN, Removal
from m2d.experiments.record import Record, read_record


def remove(removal: Removal) -> str | None:
    """Remove it. Returns why it was left alone where its experiment changed since the plan was made.

    Raises ExperimentError where the disk refuses; what is left of it then has its hidden name.
    """
    try:
        if removal.record is None:
            hidden = list(removal.paths)
        else:
            found = _hide(removal, removal.record)
            if isinstance(found, str):
                return found
            hidden = found
        for path in hidden:  # the lock is given up by now: NFS cannot delete a folder with an open file in it
            _delete(path)
    except OSError as error:
        raise ExperimentError(
            f"{removal.label} cannot be removed whole ({error.strerror or error}: {error.filename}); "
            "see to its rights, then clean again"
        ) from None
    return None


def _hide(removal: Removal, planned: Record) -> list[Path] | str:
    """The paths under their hidden names, or why they were left alone."""
    experiment = planned.experiment
    if not experiment.path.is_dir():
        return "it is gone already"
    try:
        with experiment.running():
            now = read_record(experiment, held=True)
            if (now.state, now.checkpoints) != (planned.state, planned.checkpoints):
                return f"it changed meanwhile: it is {now.state} now"
            return [_hidden(path) for path in removal.paths]
    except ExperimentError:
        return "a run has just started in it"


def _hidden(path: Path) -> Path:
    if path.name.startswith(HIDDEN):
        return path
    return path.rename(path.with_name(HIDDEN + path.name))


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    while os.path.lexists(path):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            continue  # another clean removes it too
