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
        self.folder, self.path = folder, folder / "trials.json"
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
            self.records = {entry["number"]: TrialRecord(**entry) for entry in entries}
        except (ValueError, TypeError, KeyError) as error:
            raise ExperimentError(f"{self.path} is damaged ({error}); restore it, or start over with --fresh") from None

    def take_up(self) -> None:
        """At the start of a driver: what the last one knew as running or failed is open, unless it came to its end."""
        for number, record in self.records.items():
            if record.state in ("open", "failed"):
                state: State = "done" if self.info(record).get("state") == "done" else "open"
                record = replace(record, state=state, error=None)
            self.records[number] = replace(record, tune_id="")
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
        self.records[number] = TrialRecord(number=number, chosen=dict(chosen), tune_id=tune_id)
        self._write()
        return self.records[number]

    def end(self, tune_id: str, state: State, *, step: int | None = None, error: str | None = None) -> None:
        """Record how a trial ended."""
        record = self.of(tune_id)
        self.records[record.number] = replace(record, state=state, step=step, error=error)
        self._write()

    def of(self, tune_id: str) -> TrialRecord:
        """The record of a trial that Ray Tune runs now."""
        return {record.tune_id: record for record in self.records.values()}[tune_id]

    def in_state(self, *states: State) -> list[TrialRecord]:
        """Records in these states, by number."""
        return [record for _, record in sorted(self.records.items()) if record.state in states]

    def experiment(self, record: TrialRecord) -> Experiment | None:
        """The newest run of the trial; None where it had none yet."""
        return next(reversed(list_experiments(str(self.folder / TRIALS), record.name)), None)

    def info(self, record: TrialRecord) -> dict[str, Any]:
        """What the trial's run says of itself."""
        experiment = self.experiment(record)
        return {} if experiment is None else experiment.info()

    def rows(self, record: TrialRecord) -> list[dict[str, Any]]:
        """The trial's validations that count, in order: `step` and every measure."""
        experiment = self.experiment(record)
        found = [] if experiment is None else MetricsLog(experiment.path / "metrics", "validation").read()
        return [row for row in found if record.step is None or row["step"] <= record.step]

    def _write(self) -> None:
        write_whole(self.path, json.dumps([asdict(record) for _, record in sorted(self.records.items())], indent=1))


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
