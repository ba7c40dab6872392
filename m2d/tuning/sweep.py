"""The driver of a sweep: starts or resumes Ray Tune, follows its trials, writes what came out."""

import fcntl
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher

from m2d.cluster import ray_cluster
from m2d.config import as_dict, differences, with_absolute_paths
from m2d.errors import ConfigError, ExperimentError
from m2d.experiment import list_experiments
from m2d.training.console import Console
from m2d.tuning.objective import OBJECTIVE
from m2d.tuning.outcome import Outcome, read_outcome, write_outcome
from m2d.tuning.settings import SweepConfig
from m2d.tuning.space import Distribution, parse_distribution
from m2d.tuning.trial import run_trial

STOPPING_S = 30.0  # in which a stopped trial's processes end
DRIVER_CPUS = 0.1  # of a trial's own process, which waits for its workers
STATE, SETTINGS, TRIALS, AT_ONCE = "tune", "sweep.yaml", "trials", "trials_at_once.json"
# May differ between a sweep and its resumption, besides what may of a training run.
CHANGEABLE = frozenset({"resume", "num_trials"})


def sweep(config: SweepConfig) -> Outcome:
    """Search to the end, starting or going on. Returns what came out, which also lies in the sweep's folder.

    Raises an M2DError for what a user can mend. Finished trials stay whatever happens; the same command goes on.
    """
    config = with_absolute_paths(config)
    console = Console()
    _ = config.checked_data_root
    folder = Path(config.experiments_dir) / "sweeps" / config.name
    known = (folder / SETTINGS).is_file()
    if config.resume and not known:
        raise ExperimentError(f"resume: there is no sweep {folder}; leave --resume out to begin it")
    if known and config.fresh:
        _set_aside(folder)
        known = False
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        if known:
            _require_same(folder, config)
        else:
            _write_settings(folder, config)
        per_trial = trial_cpus(config)
        with ray_cluster(verbose=config.verbose, min_cpus=per_trial + DRIVER_CPUS):
            at_once = _agreed(folder, concurrent_trials(config, ray.cluster_resources()))
            console.say(
                f"sweep {config.name}: {_count(config)} trials by {config.search} search, scheduler "
                f"{config.sweep.scheduler}, {at_once} at a time, in {folder}"
            )
            results = _tuner(config, folder, at_once, console).fit()
        outcome = read_outcome(config, results)
        _leave_stopped(folder, outcome)
        write_outcome(outcome, config, folder, console.rich)
    return outcome


def trial_cpus(config: SweepConfig) -> float:
    """Logical CPUs that a trial's workers and its data stream ask for at once."""
    return config.workers[1] * config.ray.cpus_per_worker + config.data.read_cpus


def concurrent_trials(config: SweepConfig, resources: dict[str, float]) -> int:
    """Trials that the cluster can hold together, so that drivers never take what their own workers wait for.

    Raises ConfigError where it cannot hold one, or not as many as were asked for.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    fit = math.floor(cpus / (trial_cpus(config) + DRIVER_CPUS) + 1e-9)
    if gpus:
        fit = min(fit, math.floor(gpus / config.workers[1]))
    if fit < 1:
        raise ConfigError(
            f"a trial needs {trial_cpus(config) + DRIVER_CPUS:g} CPUs and, where there are GPUs, {config.num_workers}; "
            f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs; lower --num_workers or add a node"
        )
    wanted = config.sweep.max_concurrent
    if wanted is not None and wanted > fit:
        raise ConfigError(f"sweep.max_concurrent is {wanted}, and the cluster can hold {fit} trials at once; lower it")
    return min(wanted or fit, _count(config))


def _agreed(folder: Path, fit: int) -> int:
    """How many trials run at a time: what the sweep was begun with, for Tune keeps that in its state.

    Raises ConfigError where the cluster has become too small for it: drivers would wait for ever for their workers.
    """
    record = folder / AT_ONCE
    if not record.is_file():
        record.write_text(json.dumps(fit), encoding="utf-8")
        return fit
    begun = int(json.loads(record.read_text(encoding="utf-8")))
    if begun > fit:
        raise ConfigError(
            f"the sweep {folder} was begun with {begun} trials at a time, and the cluster holds {fit} now; go on "
            "with it on a cluster of the old size, or begin anew with --fresh or another --name"
        )
    return begun


def _tuner(config: SweepConfig, folder: Path, at_once: int, console: Console) -> Tuner:
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, config=config, folder=str(folder / TRIALS)), {"CPU": DRIVER_CPUS}
    )
    state = folder / STATE
    if Tuner.can_restore(str(state)):
        return Tuner.restore(str(state), trainable=trainable, resume_unfinished=True, restart_errored=True)
    distributions = {setting: parse_distribution(setting, text) for setting, text in config.sweep.space.items()}
    return Tuner(
        trainable,
        param_space={} if config.search == "optuna" else _param_space(config, distributions),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            num_samples=1 if config.search == "grid" else config.num_trials,
            search_alg=_search(config, distributions, at_once),
            scheduler=_scheduler(config),
        ),
        run_config=RunConfig(
            name=STATE,
            storage_path=str(folder),
            verbose=0,
            callbacks=[_Report(console, _count(config))],
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )


def _param_space(config: SweepConfig, distributions: dict[str, Distribution]) -> dict[str, Any]:
    def of(one: Distribution) -> Any:
        if config.search == "grid":
            return tune.grid_search(list(one.numbers))
        makers: dict[str, Any] = {"loguniform": tune.loguniform, "uniform": tune.uniform}
        return makers[one.kind](*one.numbers) if one.kind in makers else tune.choice(list(one.numbers))

    return {setting: of(one) for setting, one in distributions.items()}


def _search(config: SweepConfig, distributions: dict[str, Distribution], at_once: int) -> SearchAlgorithm | Searcher:
    """Who proposes values, for `at_once` trials at most: Tune ignores its own limit where a searcher is given."""
    if config.search != "optuna":
        return BasicVariantGenerator(max_concurrent=at_once, random_state=config.sweep.seed)
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    def of(one: Distribution) -> BaseDistribution:
        if one.is_finite:
            return CategoricalDistribution(one.numbers)
        return FloatDistribution(one.numbers[0], one.numbers[1], log=one.kind == "loguniform")

    space = {setting: of(one) for setting, one in distributions.items()}
    search = OptunaSearch(space, metric=OBJECTIVE, mode="min", sampler=TPESampler(seed=config.sweep.seed))
    return ConcurrencyLimiter(search, max_concurrent=at_once)


def _scheduler(config: SweepConfig) -> TrialScheduler:
    settings = config.sweep
    if settings.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        max_t=settings.reports + 1,  # one more than there are: a trial ends by itself, with its last checkpoint
        grace_period=settings.grace_reports,
        reduction_factor=settings.reduction_factor,
    )


class _Report(Callback):
    """A line for each judgement of a trial."""

    def __init__(self, console: Console, trials: int) -> None:
        self.console, self.trials, self.ended = console, trials, 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial was judged."""
        if OBJECTIVE in result:
            self.console.say(
                f"trial {trial.trial_id}  report {result['training_iteration']}  step {result.get('step', 0):g}  "
                f"objective {result[OBJECTIVE]:.4g}"
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended or was stopped."""
        self.ended += 1
        self.console.say(f"trial {trial.trial_id}  ended ({self.ended} of {self.trials})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the table says why."""
        self.console.say(f"trial {trial.trial_id}  failed")

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks with its state; a console has a lock and cannot be kept."""
        return {"trials": self.trials, "ended": self.ended}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.console = Console()


def _count(config: SweepConfig) -> int:
    if config.search != "grid":
        return config.num_trials
    return math.prod(len(parse_distribution(setting, text).numbers) for setting, text in config.sweep.space.items())


def _write_settings(folder: Path, config: SweepConfig) -> None:
    temporary = folder / f".{SETTINGS}.partial"
    temporary.write_text(yaml.safe_dump(as_dict(config), sort_keys=False), encoding="utf-8")
    temporary.replace(folder / SETTINGS)


def _require_same(folder: Path, config: SweepConfig) -> None:
    """Raises ExperimentError, with the difference, where a sweep was begun with other settings."""
    old, new = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8")), as_dict(config)
    plain = yaml.safe_load(yaml.safe_dump(new))
    changed = differences(
        {key: value for key, value in old.items() if key not in CHANGEABLE},
        {key: value for key, value in plain.items() if key not in CHANGEABLE},
    )
    if changed:
        raise ExperimentError(
            f"the sweep {folder} was begun with other settings ({'; '.join(changed)}); repeat its command to go on, or "
            "begin anew with --fresh or another --name"
        )


def _set_aside(folder: Path) -> None:
    began = datetime.fromtimestamp((folder / SETTINGS).stat().st_mtime)
    shutil.move(str(folder), str(folder.with_name(f"{folder.name}_until_{began:%Y%m%d_%H%M%S}")))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the sweep for this process. Raises ExperimentError where another one does."""
    with (folder / ".running.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ExperimentError(f"the sweep {folder} is being run by another process; wait for it") from None
        yield


def _leave_stopped(folder: Path, outcome: Outcome) -> None:
    """Trials that Tune stopped have not failed, and are no runs that someone should go on with.

    One that it stopped at its last report has taken all its steps, and its last checkpoint is whole.
    """
    states = {
        f"trial_{trial.trial}": "done" if trial.finished else "superseded"
        for trial in outcome.trials
        if trial.error is None
    }
    deadline = time.monotonic() + STOPPING_S
    for experiment in list_experiments(str(folder / TRIALS)):
        while experiment.is_running and time.monotonic() < deadline:
            time.sleep(0.2)  # Tune does not wait for the processes that it stops
        state = states.get(experiment.name[: -len("_YYYYMMDD_HHMMSS")])
        if state is not None and experiment.info().get("state") != "done" and not experiment.is_running:
            experiment.update_info(state=state, error=None, stopped_by="the sweep's scheduler")
