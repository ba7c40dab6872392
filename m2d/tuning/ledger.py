"""trials.json of a sweep: every trial that was begun, what it chose and how it ended; and what a trial is worth.

The sweep's driver alone writes it, at every start and end of a trial, so that a sweep that is killed at any moment
resumes where it was. What a trial measured is in its own experiment.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

from m2d.errors import ExperimentError
from m2d.experiment import Experiment, list_experiments
from m2d.files.atomic import write_whole
from m2d.training.telemetry import MetricsLog

TRIALS = "trials"
WORST = 1e6  # of a trial that gave no samples or no numbers; finite, so that ranks and means exist
State = Literal["open", "done", "stopped", "failed"]  # open: it runs, or has to be resumed


@dataclass(frozen=True)
class TrialRecord:
    """One trial. chosen: dotted setting -> value."""

    number: int
    chosen: dict[str, float] = field(default_factory=dict)
    state: State = "open"
    step: int | None = None  # the last one that counts, of a trial that was stopped; None: all that it took
    error: str | None = None
    tune_id: str = ""  # how Ray Tune calls it while this driver runs

    @property
    def name(self) -> str:
        """Of its experiment, without the date."""
        return f"trial_{self.number:03d}"


class Ledger:
    """The records of a sweep's folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ExperimentError where trials.json is damaged."""
        self.folder = folder
        self.path = folder / "trials.json"
        self.records: dict[int, TrialRecord] = {}
        if self.path.is_file():
            try:
                found = [TrialRecord(**entry) for entry in json.loads(self.path.read_text(encoding="utf-8"))]
            except (ValueError, TypeError) as error:
                raise ExperimentError(
                    f"{self.path} is damaged ({error}); put it back, or start over with --fresh"
                ) from None
            self.records = {record.number: record for record in found}

    def take_up(self) -> None:
        """At the start of a driver: what the last one knew as running or failed is open, unless it came to its end."""
        for record in self.records.values():
            experiment, state = self.experiment(record), record.state
            if state == "failed" or (state == "open" and experiment is not None):
                state = "done" if experiment is not None and experiment.info().get("state") == "done" else "open"
            self.records[record.number] = replace(
                record, state=state, error=None if state == "open" else record.error, tune_id=""
            )
        self._write()

    def begin(self, tune_id: str, chosen: Mapping[str, float], number: int | None) -> TrialRecord:
        """Record a trial that starts, or starts again.

        number: None where the search does not know its trials' numbers; then an open one with these values is resumed.
        """
        known = [record for record in self.records.values() if record.tune_id == tune_id]
        if number is None and not known:
            known = [r for r in self.records.values() if r.state == "open" and not r.tune_id and r.chosen == chosen]
        if known:
            number = known[0].number
        elif number is None:
            number = max(self.records, default=-1) + 1
        record = TrialRecord(number=number, chosen=dict(chosen), tune_id=tune_id)
        self.records[number] = record
        self._write()
        return record

    def end(self, tune_id: str, state: State, *, step: int | None = None, error: str | None = None) -> None:
        """Record how a trial ended."""
        record = self.of(tune_id)
        self.records[record.number] = replace(record, state=state, step=step, error=error)
        self._write()

    def of(self, tune_id: str) -> TrialRecord:
        """The record of a trial that Ray Tune runs now. KeyError where there is none."""
        for record in self.records.values():
            if record.tune_id == tune_id:
                return record
        raise KeyError(tune_id)

    def in_state(self, *states: State) -> list[TrialRecord]:
        """Records in these states, by number."""
        return [self.records[number] for number in sorted(self.records) if self.records[number].state in states]

    def experiment(self, record: TrialRecord) -> Experiment | None:
        """The trial's run; None where it had none yet."""
        return trial_experiment(self.folder, record.name)

    def rows(self, record: TrialRecord) -> list[dict[str, Any]]:
        """The trial's validations that count, in order: `step` and every measure."""
        experiment = self.experiment(record)
        found = [] if experiment is None else validations(experiment)
        return [row for row in found if record.step is None or row["step"] <= record.step]

    def _write(self) -> None:
        entries = [asdict(self.records[number]) for number in sorted(self.records)]
        write_whole(self.path, json.dumps(entries, indent=1))


def trial_experiment(folder: Path, name: str) -> Experiment | None:
    """The newest run of a trial of the sweep in `folder`."""
    found = list_experiments(str(folder / TRIALS), name)
    return found[-1] if found else None


def validations(experiment: Experiment) -> list[dict[str, Any]]:
    """A run's validations so far, in order."""
    return MetricsLog(experiment.path / "metrics", "validation").read()


def objective(measures: Mapping[str, float], reconstruction_weight: float) -> float:
    """Kernel distance of generated to validation features + weight * reconstruction error. Lower is better.

    The reconstruction error is the root mean square error of pixels in [0, 1]: 10^(-PSNR / 20). No loss weight counts:
    a total of weighted losses would reward zero weights.
    measures: `val/kernel_distance` and `val/psnr_db` of one validation. A distance of 0 is as good as real images, and
    30 dB is an error of 0.032, so a weight of 10 puts both on one scale: 0.3 each where samples are fair.
    """
    distance, psnr_db = (measures.get(name, nan) for name in ("val/kernel_distance", "val/psnr_db"))
    if not (isfinite(distance) and isfinite(psnr_db)):
        return WORST
    return float(distance + reconstruction_weight * 10 ** (-psnr_db / 20))
