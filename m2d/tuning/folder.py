"""The folder of a sweep: which settings it was begun with, who holds it, and what a resumption may change."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from m2d.config import as_dict, differences
from m2d.errors import ConfigError, ExperimentError
from m2d.files.atomic import try_lock, write_whole
from m2d.tuning.ledger import Ledger
from m2d.tuning.settings import SweepConfig

SETTINGS = "sweep.yaml"
# May differ between a sweep and its resumption, besides what may of a training run.
CHANGEABLE = frozenset({"resume", "num_trials"})
CHANGEABLE_OF_SWEEP = frozenset({"max_concurrent"})


def write_settings(folder: Path, config: SweepConfig) -> None:
    """Keep the settings, atomically."""
    write_whole(folder / SETTINGS, yaml.safe_dump(as_dict(config), sort_keys=False))


def require_same(folder: Path, config: SweepConfig, ledger: Ledger) -> None:
    """Raises ExperimentError, with the difference, where a sweep's trials were begun with other settings."""
    if not ledger.records:
        return  # it was refused before its first trial, and is repeated with what was wrong put right
    old, new = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8")), as_dict(config)
    changed = differences(_binding(old), _binding(yaml.safe_load(yaml.safe_dump(new))))
    if changed:
        raise ExperimentError(
            f"the sweep {folder} was begun with other settings ({'; '.join(changed)}); repeat its command to go on, or "
            "begin anew with --fresh or another --name"
        )


def _binding(settings: dict[str, Any]) -> dict[str, Any]:
    """What a sweep's resumption must not change."""
    found = {key: value for key, value in settings.items() if key not in CHANGEABLE}
    found["sweep"] = {key: value for key, value in settings["sweep"].items() if key not in CHANGEABLE_OF_SWEEP}
    return found


def require_enough(folder: Path, config: SweepConfig, ledger: Ledger) -> None:
    """Raises ConfigError where fewer trials are asked for than were begun."""
    begun = max(ledger.records, default=-1) + 1
    if config.search != "grid" and config.num_trials < begun:
        raise ConfigError(
            f"num_trials is {config.num_trials}, and the sweep {folder} has begun {begun} trials already; give at "
            f"least {begun}, or begin anew with --fresh or another --name"
        )


def set_aside(folder: Path) -> None:
    """Rename the folder of an older sweep, so that its name is free."""
    began = datetime.fromtimestamp((folder / SETTINGS).stat().st_mtime)
    folder.rename(folder.with_name(f"{folder.name}_until_{began:%Y%m%d_%H%M%S}"))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the sweep for this process. Raises ExperimentError where another one does."""
    lock = try_lock(folder / ".running.lock")
    if lock is None:
        raise ExperimentError(f"the sweep {folder} is being run by another process; wait for it")
    with lock:
        yield
