"""Which checkpoints a run has. Light on purpose: processes that only look need neither torch nor diffusers."""

from pathlib import Path

from m2d.models.settings import COMPLETE

BEST = "best"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in directory.glob("step_*") if (path / COMPLETE).is_file())


def newest_step(directory: Path) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    checkpoints = complete_checkpoints(directory)
    return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
