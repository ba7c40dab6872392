"""What a sweep found: a table, two pictures, and the best trial's settings as a file that training takes unchanged."""

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console as RichConsole
from rich.table import Table

from m2d.errors import TrainingError
from m2d.plots.sweeps import best_trial, importance_chart, parallel_coordinates
from m2d.training.settings import as_dict
from m2d.tuning.ledger import WORST, Ledger, objective
from m2d.tuning.settings import SweepConfig
from m2d.tuning.space import parse_distribution

LEAST_TRIALS = 4  # below, a variance has nothing to be shared out from
MEASURES = ("val/kernel_distance", "val/psnr_db", "val/perceptual", "val/velocity_mse")


@dataclass(frozen=True)
class TrialOutcome:
    """One trial, as far as it came."""

    trial: str
    chosen: dict[str, float]
    objectives: list[float]  # at each report, in order
    step: int  # of the last report
    measures: dict[str, float]  # at the last report
    finished: bool  # it took all its steps
    error: str | None  # why it failed

    @property
    def objective(self) -> float | None:
        """At the last report; None where there was none, or it gave no samples."""
        return self.objectives[-1] if self.objectives and self.objectives[-1] < WORST else None


@dataclass(frozen=True)
class Outcome:
    """All trials of a sweep, the best one first."""

    trials: list[TrialOutcome]

    @property
    def best(self) -> TrialOutcome | None:
        """The lowest last objective among the trials that took all their steps; among all where none did."""
        judged = [trial for trial in self.trials if trial.objective is not None]
        if not judged:
            return None
        return judged[best_trial([t.objective or 0.0 for t in judged], [t.finished for t in judged])]


def read_outcome(config: SweepConfig, ledger: Ledger) -> Outcome:
    """From the sweep's ledger and its trials' runs."""
    trials = []
    for record in ledger.in_state("open", "done", "stopped", "failed"):
        rows = ledger.rows(record)
        last = rows[-1] if rows else {}
        trials.append(
            TrialOutcome(
                trial=record.name,
                chosen=record.chosen,
                objectives=[objective(row, config.sweep.reconstruction_weight) for row in rows],
                step=int(last.get("step", 0)),
                measures={name: float(last[name]) for name in MEASURES if name in last},
                finished=record.state == "done",
                error=record.error,
            )
        )
    # Whole trials first, those without an objective last.
    return Outcome(sorted(trials, key=lambda t: (not t.finished, t.objective is None, t.objective or 0.0)))


def write_outcome(outcome: Outcome, config: SweepConfig, folder: Path, console: RichConsole) -> None:
    """results.json, results.csv, best.yaml, two pictures, and the table on the console.

    Raises TrainingError where no trial could be judged.
    """
    settings = list(config.sweep.space)
    (folder / "results.json").write_text(
        json.dumps([{**asdict(trial), "objective": trial.objective} for trial in outcome.trials], indent=1),
        encoding="utf-8",
    )
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "objective", "reports", "step", "finished", *settings, *MEASURES, "error"])
        for trial in outcome.trials:
            chosen = [trial.chosen.get(setting) for setting in settings]
            measured = [trial.measures.get(name) for name in MEASURES]
            writer.writerow(
                [trial.trial, trial.objective, len(trial.objectives), trial.step, trial.finished, *chosen, *measured,
                 trial.error]
            )  # fmt: skip
    # Into a file the table goes whole: there is no width to fit.
    wide = console if console.is_terminal else RichConsole(file=console.file, width=240)
    wide.print(_table(outcome, settings))
    best = outcome.best
    if best is None:
        reasons = "; ".join(sorted({trial.error for trial in outcome.trials if trial.error})) or "no trial gave samples"
        raise TrainingError(f"no trial of the sweep {folder} could be judged ({reasons}); see results.csv there")
    settings_text = yaml.safe_dump(as_dict(config.training(best.chosen)), sort_keys=False)
    head = f"# The best of {len(outcome.trials)} trials of the sweep {config.name}: objective {best.objective:.4g}.\n"
    (folder / "best.yaml").write_text(head + settings_text, encoding="utf-8")
    judged = [trial for trial in outcome.trials if trial.objective is not None]
    logarithmic = {name: parse_distribution(name, text).is_logarithmic for name, text in config.sweep.space.items()}
    (folder / "parallel_coordinates.png").write_bytes(
        parallel_coordinates(
            [t.chosen for t in judged], [t.objective or 0.0 for t in judged], [t.finished for t in judged], logarithmic
        )
    )
    shares, report = importances(judged, config.sweep.space, config.sweep.seed)
    (folder / "importance.png").write_bytes(importance_chart(shares, trials=len(judged), report=report))
    command = f"python jobs/train.py --config {folder / 'best.yaml'}"
    console.print(f"best: {best.trial}; train it with: {command}", markup=False)


def _table(outcome: Outcome, settings: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for name in ("objective", "step", *(setting.rpartition(".")[2] for setting in settings)):
        table.add_column(name, justify="right")
    table.add_column("ended")
    for trial in outcome.trials:
        ended = "failed: " + trial.error if trial.error else "whole" if trial.finished else "stopped early"
        objective = "-" if trial.objective is None else f"{trial.objective:.4g}"
        chosen = [f"{trial.chosen[setting]:.3g}" if setting in trial.chosen else "-" for setting in settings]
        table.add_row(trial.trial, objective, str(trial.step), *chosen, ended)
    return table


if TYPE_CHECKING:
    from m2d.tuning.outcome import TrialOutcome


def importances(trials: Sequence[TrialOutcome], space: Mapping[str, str], seed: int) -> tuple[dict[str, float], int]:
    """(setting -> share of the objective's variance that it explains, largest first; the report that was compared).

    fANOVA (Hutter et al., ICML 2014) as Optuna has it. All trials are compared at the latest report that every one of
    them reached: the last objectives of trials that were stopped early are of other steps. {} for too few trials.
    """
    from optuna import create_study, logging
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    report = min((len(trial.objectives) for trial in trials), default=0)
    ranges: dict[str, BaseDistribution] = {}
    for name, text in space.items():
        if len({trial.chosen.get(name) for trial in trials}) > 1:
            one = parse_distribution(name, text)
            ranges[name] = FloatDistribution(min(one.numbers), max(one.numbers), log=one.is_logarithmic)
    if len(trials) < LEAST_TRIALS or not ranges:
        return {}, report
    logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = create_study(direction="minimize")
        for trial in trials:
            params = {name: trial.chosen[name] for name in ranges}
            study.add_trial(create_trial(params=params, distributions=ranges, value=trial.objectives[report - 1]))
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    return {name: float(share) for name, share in found.items()}, report
