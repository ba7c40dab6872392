"""One trial of a sweep, inside Ray Tune: a training run whose validation measures Tune gets to see."""

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from m2d.training.trainer import train
from m2d.tuning.objective import OBJECTIVE, objective
from m2d.tuning.settings import SweepConfig


class ReportObjective(TuneReportCallback):
    """Adds the objective to what a worker reports, and hands it to Tune."""

    def __init__(self, reconstruction_weight: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reconstruction_weight = reconstruction_weight

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """See TuneReportCallback; the first worker's metrics count."""
        judged = {**metrics[0], OBJECTIVE: objective(metrics[0], self.reconstruction_weight)}
        super().after_report(run_context, [judged], checkpoint)


def run_trial(chosen: Mapping[str, float], *, config: SweepConfig, folder: str) -> None:
    """Train with the chosen values. A trial that Tune starts again goes on from its own checkpoint.

    chosen: dotted setting -> value. folder: where the trials' experiments lie.
    """
    trial = str(tune.get_context().get_trial_id())
    train(
        config.trial(chosen, name=f"trial_{trial}", folder=folder),
        callbacks=[ReportObjective(config.sweep.reconstruction_weight)],
    )
