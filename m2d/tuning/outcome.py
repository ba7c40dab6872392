"""What a sweep found: a table, two pictures, and the best trial's settings as a file that training takes unchanged."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from m2d.errors import TrainingError
from m2d.files.atomic import csv_text
from m2d.plots.sweeps import importance_chart, parallel_coordinates
from m2d.training.settings import as_dict
from m2d.tuning.ledger import WORST, Ledger, objective
from m2d.tuning.settings import Distribution, SweepConfig

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


def best_first(trials: Sequence[TrialOutcome]) -> list[TrialOutcome]:
    """By the last objective; trials that took all their steps come first, those without an objective last of each."""
    return sorted(trials, key=lambda t: (not t.finished, t.objective is None, t.objective or 0.0))


def read_outcome(config: SweepConfig, ledger: Ledger) -> list[TrialOutcome]:
    """From the sweep's ledger and its trials' runs, the best one first."""
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
    return best_first(trials)


def write_outcome(trials: Sequence[TrialOutcome], config: SweepConfig, folder: Path, console: Console) -> None:
    """results.json, results.csv, best.yaml, two pictures, and the table on the console.

    trials: the best one first. Raises TrainingError where no trial could be judged.
    """
    space = config.distributions
    results = [{**asdict(trial), "objective": trial.objective} for trial in trials]
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    columns = ["trial", "objective", "reports", "step", "finished", *space, *MEASURES, "error"]
    rows = [r | t.chosen | t.measures | {"reports": len(t.objectives)} for t, r in zip(trials, results)]
    (folder / "results.csv").write_text(csv_text(rows, columns), encoding="utf-8", newline="")
    # Into a file the table goes whole: there is no width to fit.
    wide = console if console.is_terminal else Console(file=console.file, width=240)
    wide.print(_table(trials, list(space)))
    judged = [trial for trial in trials if trial.objective is not None]
    if not judged:
        reasons = "; ".join(sorted({trial.error for trial in trials if trial.error})) or "no trial gave samples"
        raise TrainingError(f"no trial of the sweep {folder} could be judged ({reasons}); see results.csv there")
    best = judged[0]
    settings = yaml.safe_dump(as_dict(config.training(best.chosen)), sort_keys=False)
    head = f"# The best of {len(trials)} trials of the sweep {config.name}: objective {best.objective:.4g}.\n"
    (folder / "best.yaml").write_text(head + settings, encoding="utf-8")
    (folder / "parallel_coordinates.png").write_bytes(
        parallel_coordinates(
            [trial.chosen for trial in judged],
            [trial.objectives[-1] for trial in judged],
            [trial.finished for trial in judged],
            {setting: one.is_logarithmic for setting, one in space.items()},
        )
    )
    shares, report = importances(judged, space, config.sweep.seed)
    (folder / "importance.png").write_bytes(importance_chart(shares, trials=len(judged), report=report))
    command = f"python jobs/train.py --config {folder / 'best.yaml'}"
    console.print(f"best: {best.trial}; train it with: {command}", markup=False)


def _table(trials: Sequence[TrialOutcome], settings: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for name in ("objective", "step", *(setting.rpartition(".")[2] for setting in settings)):
        table.add_column(name, justify="right")
    table.add_column("ended")
    for trial in trials:
        ended = "failed: " + trial.error if trial.error else "whole" if trial.finished else "stopped early"
        objective = "-" if trial.objective is None else f"{trial.objective:.4g}"
        chosen = [f"{trial.chosen[setting]:.3g}" if setting in trial.chosen else "-" for setting in settings]
        table.add_row(trial.trial, objective, str(trial.step), *chosen, ended)
    return table


def importances(
    trials: Sequence[TrialOutcome], space: Mapping[str, Distribution], seed: int
) -> tuple[dict[str, float], int]:
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
    for name, one in space.items():
        if len({trial.chosen.get(name) for trial in trials}) > 1:
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
