"""How much each searched setting matters for the objective."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from m2d.tuning.space import parse_distribution

if TYPE_CHECKING:
    from m2d.tuning.outcome import TrialOutcome

LEAST_TRIALS = 4  # below, a variance has nothing to be shared out from


def importances(trials: "Sequence[TrialOutcome]", space: Mapping[str, str], seed: int) -> tuple[dict[str, float], int]:
    """(setting -> share of the objective's variance that it explains, largest first; the report that was compared).

    fANOVA (Hutter et al., ICML 2014) as Optuna has it. All trials are compared at the latest report that every one of
    them reached: the last objectives of trials that were stopped early are of other steps. {} for too few trials.
    """
    from optuna import create_study, logging
    from optuna.distributions import FloatDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    report = min((len(trial.objectives) for trial in trials), default=0)
    varied = {name: parse_distribution(name, text) for name, text in space.items()}
    varied = {name: one for name, one in varied.items() if len({trial.chosen.get(name) for trial in trials}) > 1}
    if len(trials) < LEAST_TRIALS or not varied:
        return {}, report
    logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = create_study(direction="minimize")
        for trial in trials:
            ranges = {
                name: FloatDistribution(min(one.numbers), max(one.numbers), log=one.is_logarithmic)
                for name, one in varied.items()
            }
            study.add_trial(
                create_trial(
                    params={name: trial.chosen[name] for name in varied},
                    distributions=dict(ranges),
                    value=trial.objectives[report - 1],
                )
            )
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    return {name: float(share) for name, share in found.items()}, report
