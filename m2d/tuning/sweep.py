"""The driver of a sweep: starts or resumes Ray Tune, follows its trials, writes what came out."""

import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher

from m2d.cluster.nodes import node_resources, places, require_shared
from m2d.cluster.start import ray_cluster
from m2d.errors import ConfigError, ExperimentError, Incomplete
from m2d.experiment import read_mapping
from m2d.files.atomic import try_lock, write_whole
from m2d.training.settings import as_dict, differences, with_absolute_paths
from m2d.training.telemetry import Console
from m2d.tuning.ledger import Ledger, TrialRecord, objective
from m2d.tuning.outcome import TrialOutcome, read_outcome, write_outcome
from m2d.tuning.settings import Distribution, SweepConfig
from m2d.tuning.trial import NUMBER, OBJECTIVE, REPORT, FollowTrials, run_trial

SETTINGS = "sweep.yaml"
STOPPING_S = 60.0  # in which a stopped trial's processes end
DRIVER_CPUS = 0.1  # of a trial's own process, which waits for its workers


def sweep(config: SweepConfig) -> list[TrialOutcome]:
    """Search to the end, starting or resuming. Returns what came out, which is also in the sweep's folder.

    Raises an M2DError for what a user can fix. Finished trials stay whatever happens; the same command resumes.
    Raises Incomplete, once all is written, where a trial failed.
    """
    config = with_absolute_paths(config)
    console = Console()
    _ = config.checked_data_root
    folder = Path(config.experiments_dir) / "sweeps" / config.name
    known = (folder / SETTINGS).is_file()
    if config.resume and not known:
        raise ExperimentError(f"resume: there is no sweep {folder}; leave --resume out to begin it")
    if known and config.fresh:
        with held(folder):  # not from under a sweep that runs
            began = datetime.fromtimestamp((folder / SETTINGS).stat().st_mtime, UTC)
            folder.rename(folder.with_name(f"{folder.name}_until_{began:%Y%m%d_%H%M%S}"))
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        ledger = Ledger(folder)
        begun = max(ledger.records, default=-1) + 1
        if begun:  # one that was refused before its first trial is repeated with what was wrong put right
            require_same(folder, config)
        if config.search != "grid" and config.num_trials < begun:
            raise ConfigError(
                f"num_trials is {config.num_trials}, and the sweep {folder} has begun {begun} trials already; give at "
                f"least {begun}, or start over with --fresh or another --name"
            )
        write_settings(folder, config)
        ledger.take_up()
        if len(ledger.in_state("done", "stopped")) < config.count:
            _run(config, folder, ledger, console)
        _leave_stopped(ledger)
        if len(ledger.in_state("done", "stopped", "failed")) < config.count:
            raise KeyboardInterrupt  # Tune takes it for a wish to end, and returns as if the sweep were over
        outcome = read_outcome(config, ledger)
        write_outcome(outcome, config, folder, console.rich)
    if failed := ledger.in_state("failed"):
        raise Incomplete(
            f"incomplete: {len(failed)} of {config.count} trials failed ({failed[0].name}: {failed[0].error}); "
            "the same command tries them again"
        )
    return outcome


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the sweep for this process. Raises ExperimentError where another one does."""
    lock = try_lock(folder / ".running.lock")
    if lock is None:
        raise ExperimentError(f"the sweep {folder} is being run by another process; wait for it")
    with lock:
        yield


def write_settings(folder: Path, config: SweepConfig) -> None:
    """Keep the settings, atomically."""
    write_whole(folder / SETTINGS, yaml.safe_dump(as_dict(config), sort_keys=False))


def require_same(folder: Path, config: SweepConfig) -> None:
    """Raises ExperimentError, with the difference, where a sweep's trials were begun with other settings."""
    old, new = read_mapping(folder / SETTINGS), yaml.safe_load(yaml.safe_dump(as_dict(config)))
    if not old:
        raise ExperimentError(f"{folder / SETTINGS} is empty or damaged; restore it, or start over with --fresh")
    for settings in (old, new):
        del settings["resume"], settings["num_trials"]
        settings["sweep"].pop("max_concurrent", None)
    if changed := differences(old, new, defaults=as_dict(SweepConfig())):
        raise ExperimentError(
            f"the sweep {folder} was begun with other settings ({'; '.join(changed)}); repeat its command to resume, "
            "or start over with --fresh or another --name"
        )


def _run(config: SweepConfig, folder: Path, ledger: Ledger, console: Console) -> None:
    """Run Ray Tune over the trials that are left, informed of what the others were worth.

    Tune could restore its own state instead, but that is up to ten seconds old, knows nothing of the scheduler's, and
    is bound to the number of trials that it was begun with.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's boxes and advice; its old output heeds verbose=0
    if not config.verbose:
        logging.getLogger("ray.tune.utils.util").setLevel(logging.ERROR)  # it counts steps above 0.5 s
    weight = config.sweep.reconstruction_weight
    ended = ledger.in_state("done", "stopped")
    worth = [(record, [objective(row, weight) for row in ledger.rows(record)]) for record in ended]
    with ray_cluster(verbose=config.verbose, min_cpus=trial_cpus(config) + DRIVER_CPUS):
        require_shared(
            written={"experiments_dir": config.experiments_dir},
            read={"data_root": config.checked_data_root, "cache_dir": config.cache_dir},
        )
        at_once = min(concurrent_trials(config, node_resources()), config.count - len(ended))
        before = f", {len(ended)} of them ended before" if ended else ""
        console.say(
            f"sweep {config.name}: {config.count} trials by {config.search} search{before}, scheduler "
            f"{config.sweep.scheduler}, {at_once} at a time, in {folder}"
        )
        space: dict[str, Any] = {}
        search: SearchAlgorithm | Searcher
        chosen, samples = None, 1
        if config.search == "optuna":
            samples, left = config.count - len(ended), ledger.in_state("open")
            search = optuna_search(config, [(record, found[-1]) for record, found in worth if found], left, at_once)
        else:
            chosen = planned(config)
            numbers = sorted(set(range(len(chosen))) - {record.number for record in ended})
            space, search = {NUMBER: tune.grid_search(numbers)}, BasicVariantGenerator(max_concurrent=at_once)
        trial = tune.with_parameters(run_trial, config=config, folder=str(folder))
        tuner = Tuner(
            tune.with_resources(trial, {"CPU": DRIVER_CPUS}),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                search_alg=search,  # it holds the limit of trials at a time: Tune ignores its own where there is one
                scheduler=trial_scheduler(config, {record.name: objectives for record, objectives in worth}),
                trial_dirname_creator=lambda trial: str(trial.trial_id),  # the default has every value in its name
            ),
            run_config=RunConfig(
                name=f"{datetime.now(UTC):%Y%m%d_%H%M%S}",
                storage_path=str(folder / "tune"),  # what Tune keeps of each time that the sweep ran
                verbose=0,
                callbacks=[FollowTrials(ledger, config.count, chosen)],
                failure_config=FailureConfig(max_failures=1),
                checkpoint_config=CheckpointConfig(num_to_keep=None),
            ),
        )
        logging.getLogger("ray.tune.tune").addFilter(in_own_words)
        tuner.fit()


def in_own_words(record: logging.LogRecord) -> bool:
    """A filter of Tune's messages: what an interruption means here, not how to restore a state that we do without."""
    message = record.getMessage()
    if message.startswith("Stop signal received"):
        Console().say("ending the trials that run; Ctrl-C again ends at once")
        return False
    return "has been interrupted" not in message


def trial_cpus(config: SweepConfig) -> float:
    """Logical CPUs that a trial's workers and its data stream ask for at once."""
    return config.workers[1] * config.ray.cpus_per_worker + config.data.read_cpus


def concurrent_trials(config: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Trials that the cluster can hold together, so that drivers never take what their own workers wait for.

    nodes: resources of each. Raises ConfigError where they cannot hold one, or not as many as were asked for.
    """
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    per_worker, needed = config.ray.cpus_per_worker, trial_cpus(config) + DRIVER_CPUS
    worker = {"CPU": per_worker, "GPU": float(gpus > 0)}

    def places_left(drivers: int) -> int:
        """Workers that the nodes still hold when so many drivers are where they are most in the way."""
        free = places(worker, nodes)
        beside_all = places(worker, [{**node, "CPU": node.get("CPU", 0) - drivers * DRIVER_CPUS} for node in nodes])
        return free - min(free - beside_all, drivers * math.ceil(DRIVER_CPUS / per_worker))

    fit = math.floor(cpus / needed + 1e-9)
    while fit > 0 and places_left(fit) < fit * config.workers[1]:
        fit -= 1
    if fit < 1:
        raise ConfigError(
            f"a trial needs {needed:g} CPUs, {per_worker:g} of them{' and a GPU' if gpus else ''} on one node for each "
            f"of {config.num_workers} worker(s); the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} "
            "node(s); lower --num_workers or --ray.cpus_per_worker, or add a node"
        )
    wanted = config.sweep.max_concurrent or min(fit, config.count)
    if wanted > fit:
        raise ConfigError(f"sweep.max_concurrent is {wanted}, and the cluster can hold {fit} trials at once; lower it")
    return min(wanted, config.count)


def planned(config: SweepConfig) -> list[dict[str, float]]:
    """The values of every trial of a random or grid search, by the trial's number.

    A random trial has a generator of its own, so that the first trials of a longer sweep are those of a shorter one.
    """
    space = config.distributions
    if config.search == "grid":
        return [dict(zip(space, values)) for values in itertools.product(*(one.numbers for one in space.values()))]

    def draw(one: Distribution, generator: np.random.Generator) -> float:
        if one.is_finite:
            return float(generator.choice(one.numbers))
        low, high = one.numbers
        if one.kind == "uniform":
            return float(generator.uniform(low, high))
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    generators = [np.random.default_rng((config.sweep.seed, number)) for number in range(config.num_trials)]
    return [{setting: draw(one, generator) for setting, one in space.items()} for generator in generators]


def optuna_search(
    config: SweepConfig, ended: Sequence[tuple[TrialRecord, float]], left: Sequence[TrialRecord], at_once: int
) -> Searcher:
    """Optuna's TPE, which knows the trials that ended with their objectives and begins with those that are left."""
    from optuna import logging as optuna_logging
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    optuna_logging.set_verbosity(optuna_logging.WARNING)
    space: dict[str, BaseDistribution] = {
        setting: CategoricalDistribution(one.numbers)
        if one.is_finite
        else FloatDistribution(one.numbers[0], one.numbers[1], log=one.kind == "loguniform")
        for setting, one in config.distributions.items()
    }
    # Started over with its old seed, the sampler would propose again what it proposed first.
    seed = int(np.random.default_rng((config.sweep.seed, len(ended))).integers(2**31))
    search = OptunaSearch(
        space,
        metric=OBJECTIVE,
        mode="min",
        sampler=TPESampler(seed=seed),
        points_to_evaluate=[record.chosen for record in left] or None,
    )
    for record, worth in ended:
        search.add_evaluated_point(record.chosen, worth)
    return ConcurrencyLimiter(search, max_concurrent=at_once)


def trial_scheduler(config: SweepConfig, worth: dict[str, list[float]]) -> TrialScheduler:
    """worth: name -> objectives of each trial that has ended, at its reports."""
    settings, reports = config.sweep, config.reports
    if settings.scheduler == "none" or reports <= settings.grace_reports:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr=REPORT,
        metric=OBJECTIVE,
        mode="min",
        max_t=reports - 1,  # at its last report a trial has taken all its steps, and ends by itself
        stop_last_trials=False,
        grace_period=settings.grace_reports,
        reduction_factor=settings.reduction_factor,
    )
    controller: Any = None  # ASHA asks nothing of it
    for name, objectives in worth.items():
        past = Trial("past", stub=True, trial_id=name)
        asha.on_trial_add(controller, past)
        for report, value in enumerate(objectives, start=1):
            asha.on_trial_result(controller, past, {REPORT: report, OBJECTIVE: value})
        asha.on_trial_remove(controller, past)
    return asha


def _leave_stopped(ledger: Ledger) -> None:
    """Runs of trials that Tune stopped have not failed, and none of them is to be resumed."""
    deadline = time.monotonic() + STOPPING_S
    for record in ledger.in_state("done", "stopped"):
        experiment = ledger.experiment(record)
        if experiment is None or experiment.info().get("state") in ("done", "superseded"):
            continue
        while experiment.is_running and time.monotonic() < deadline:
            time.sleep(0.2)  # Tune does not wait for the processes that it stops
        if not experiment.is_running:
            experiment.update_info(state="superseded", error=None, stopped_by="the sweep's scheduler")
