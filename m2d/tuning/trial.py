"""A trial of a sweep on both sides of Ray Tune: a run that Tune sees judged, and what the driver makes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import Checkpoint
from ray.tune import Callback
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2d.experiment import newest_step
from m2d.training.settings import TrainConfig
from m2d.training.telemetry import Console
from m2d.tuning.ledger import TRIALS, Ledger, State, TrialRecord, objective
from m2d.tuning.settings import SweepConfig

OBJECTIVE = "objective"
NUMBER = "number"  # of a trial whose values were planned, in what Tune proposes
REPORT = "report"  # how often a trial has been judged; Tune's own count starts again with each process


class ReportObjective(TuneReportCallback):
    """Adds the objective, and the number of the report, to what a worker reports; hands both to Tune."""

    def __init__(self, reconstruction_weight: float, ledger: Ledger, record: TrialRecord) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reconstruction_weight, self.ledger, self.record = reconstruction_weight, ledger, record

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """See TuneReportCallback; the first worker's metrics count."""
        report = sum(row["step"] <= metrics[0]["step"] for row in self.ledger.rows(self.record))
        super().after_report(run_context, [judged(metrics[0], report, self.reconstruction_weight)], checkpoint)


def judged(measures: Mapping[str, Any], report: int, reconstruction_weight: float) -> dict[str, Any]:
    """What one validation reports to Tune."""
    return {**measures, OBJECTIVE: objective(measures, reconstruction_weight), REPORT: report}


def run_trial(proposed: Mapping[str, float], *, config: SweepConfig, folder: str) -> None:
    """Train with the values that the sweep's ledger names. A trial that was begun before resumes from its checkpoint.

    proposed: what Tune's search gave; the driver has written the values, and the trial's name, into the ledger.
    folder: the sweep's.
    """
    ledger, weight = Ledger(Path(folder)), config.sweep.reconstruction_weight
    record = ledger.of(str(tune.get_context().get_trial_id()))
    experiment = ledger.experiment(record)
    if experiment is not None:
        reached = newest_step(experiment.checkpoints)
        rows = [row for row in ledger.rows(record) if row["step"] <= reached]
        if rows:  # how far it came, which a restarted Tune does not know
            tune.report(judged(rows[-1], len(rows), weight))
    # When a trial is stopped, a detached actor of Ray Train's gives back what its workers held. It asks the State API
    # whether the trial still lives, and that looks for the machine's only cluster: where a second one runs on the
    # machine, the actor fails, and the trial's CPUs are lost. So the run is a task beside this process that knows by
    # RAY_ADDRESS, which its children inherit, which cluster it is in.
    context = ray.get_runtime_context()
    task = ray.remote(_train).options(
        num_cpus=0,
        max_retries=0,
        runtime_env={"env_vars": {"RAY_ADDRESS": context.gcs_address}},
        scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False),
    )
    run = config.trial(record.chosen, name=record.name, folder=str(Path(folder) / TRIALS))
    ray.get(task.remote(run, ReportObjective(weight, ledger, record)))


def _train(run: TrainConfig, callback: ReportObjective) -> None:
    from m2d.training.trainer import train  # here, so that only this process loads torch

    train(run, callbacks=[callback], stoppable=False)


class FollowTrials(Callback):
    """In the driver: writes the ledger as trials start, are judged and end, and prints what happens.

    chosen: the values of planned trials; None where the search proposes them.
    """

    def __init__(self, ledger: Ledger, trials: int, chosen: Sequence[dict[str, float]] | None) -> None:
        self.ledger, self.trials, self.chosen = ledger, trials, chosen  # no console: Tune pickles its callbacks

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process is there and has not begun: it finds its name and its values in the ledger."""
        number = None if self.chosen is None else int(trial.config[NUMBER])
        chosen = trial.config if self.chosen is None or number is None else self.chosen[number]
        record = self.ledger.begin(trial.trial_id, chosen, number)
        settings = "  ".join(f"{name.rpartition('.')[2]} {value:.3g}" for name, value in record.chosen.items())
        Console().say(f"{record.name}  {settings}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial was judged."""
        if OBJECTIVE in result:
            Console().say(
                f"{self.ledger.of(trial.trial_id).name}  report {result[REPORT]}  step {result.get('step', 0):g}  "
                f"objective {result[OBJECTIVE]:.4g}"
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial took all its steps, or was stopped."""
        facts = self.ledger.info(self.ledger.of(trial.trial_id))
        step = int((trial.last_result or {}).get("step", 0))
        whole = facts.get("state") == "done" or 0 < step == facts.get("total_steps")
        self._end(trial, "done" if whole else "stopped", step=None if whole else step)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        error = self.ledger.info(self.ledger.of(trial.trial_id)).get("error") or "its process ended"
        self._end(trial, "failed", error=str(error).strip().splitlines()[0][:300])

    def _end(self, trial: Any, state: State, *, step: int | None = None, error: str | None = None) -> None:
        self.ledger.end(trial.trial_id, state, step=step, error=error)
        ended = len(self.ledger.in_state("done", "stopped", "failed"))
        how = {"done": "took all its steps", "stopped": f"stopped early, at step {step}"}.get(state, f"failed: {error}")
        Console().say(f"{self.ledger.of(trial.trial_id).name}  {how} ({ended} of {self.trials} ended)")
