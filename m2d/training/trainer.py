"""The driver of a training run: checks, opens the experiment, scans the data, starts the workers, shows progress."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from m2d.cluster.nodes import GpuFacts, cluster_gpu, gpu_facts, node_resources, places, require_shared
from m2d.cluster.start import ray_cluster
from m2d.data.catalog import class_counts, classes_of, dataset_fingerprint
from m2d.data.order import Share
from m2d.data.reader import iterate_local
from m2d.errors import ConfigError, DataError
from m2d.experiment import Experiment, log_file, newest_step, open_experiment
from m2d.models.perceptual import lpips_available
from m2d.models.settings import PerceptualKind, Precision
from m2d.training.run import (
    CATALOG,
    RunPlan,
    Stopped,
    allocator_settings,
    failures_recorded,
    prepared_parts,
    run_catalog,
    stop_requests,
    users_error,
)
from m2d.training.settings import TrainConfig, as_dict, differences, with_absolute_paths
from m2d.training.telemetry import Console, MetricsLog, find_wandb_key

# Of all steps. A few cost nothing: the loss scale of fp16 finds its level by them. Beyond the second share more steps
# were left out than taken: the run's schedule is over, and it has not had the training that was asked for.
FEW_SKIPPED, MOST_SKIPPED = 0.01, 0.5
PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


def train(config: TrainConfig, callbacks: Sequence[Any] = (), *, stoppable: bool = True) -> Experiment:
    """Train to the end, starting or resuming. Returns the experiment.

    callbacks: `ray.train.UserCallback`s that hear of every report of the workers; a sweep's trials have one.
    stoppable: SIGINT and SIGTERM make the run save before it ends; False where the caller ends it, as a sweep does.

    Raises an M2DError for what a user can fix. Everything written so far stays; running the same command resumes.
    """
    config = with_absolute_paths(config)
    console = Console()
    data_root = config.checked_data_root

    def has_these_images(done: Experiment) -> bool:
        files = (done.info().get("dataset") or {}).get("files")
        return newest_step(done.checkpoints) > 0 and files == dataset_fingerprint(data_root, config.data)

    settings, root, command = as_dict(config), config.experiments_dir, sys.argv
    experiment, resumed = open_experiment(
        root, config.name, settings, differences, has_these_images, fresh=config.fresh, command=command
    )
    if experiment.info().get("state") == "done":
        console.say(
            f"{experiment.path} is done, and this command would repeat it; --fresh trains once more\n"
            f"best checkpoint: {experiment.checkpoints / 'best'}"
        )
        return experiment
    with experiment.running():
        try:
            with log_file(experiment.path / "logs" / "driver.log"), _resources(config):
                opening = opening_of(config)
                console.say(opening.line)
                for line in opening.degraded:
                    console.warn(line)
                console.say(f"experiment: {experiment.path}{' (resumed)' if resumed else ''}")
                for line in experiment.mend() if resumed else ():
                    console.warn(line)
                if config.workers[1] > 0:
                    init = config.init_checkpoint or ""
                    require_shared(
                        written={"experiments_dir": config.experiments_dir},
                        read={"data_root": data_root, "cache_dir": config.cache_dir, "init_checkpoint": init},
                    )
                catalog = run_catalog(config, experiment, data_root, console)
                plan = _plan(config, experiment, catalog, opening, console)
                if newest_step(experiment.checkpoints) < plan.total_steps:
                    _run(plan, opening.on_gpu, console, callbacks, stoppable)
            experiment.update_info(**_ending(plan, opening.degraded, console))
        except BaseException as error:
            told = users_error(error, experiment.path, config) if isinstance(error, Exception) else None
            never_began = told is not None and not resumed and not (experiment.path / CATALOG).is_file()
            if not (never_began and experiment.discard()):  # so a wrong data_root leaves no trace
                asked = isinstance(error, (Stopped, KeyboardInterrupt, SystemExit))
                failed: dict[str, Any] = {"state": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
                with suppress(OSError):  # of a full disk; the error is raised all the same
                    experiment.update_info(**({"state": "stopped", "error": None} if asked else failed))
            if told is not None and told is not error:
                raise told from error
            raise
        console.say(f"done; best checkpoint: {experiment.checkpoints / 'best'}")
    return experiment


def _resources(config: TrainConfig) -> AbstractContextManager[None]:
    """Ray, unless the calling process trains."""
    fewest, most = config.workers
    if most == 0:
        os.environ.update(allocator_settings())
        return nullcontext()
    return ray_cluster(
        verbose=config.verbose,
        min_cpus=fewest * config.ray.cpus_per_worker + config.data.read_cpus + 1,
        bundles=[{"CPU": config.ray.cpus_per_worker, "GPU": 1}] * fewest,
        wait_s=config.ray.wait_for_nodes_s,
    )


@dataclass(frozen=True)
class Opening:
    """What a run is going to do, as far as settings and machines say."""

    line: str  # the first thing that a person reads
    device: str
    on_gpu: bool
    precision: Precision
    perceptual: PerceptualKind
    degraded: list[str]


def opening_of(config: TrainConfig) -> Opening:
    """Decide what was left to decide. Raises ConfigError where the machines cannot do what was asked for."""
    degraded: list[str] = []
    gpu, (fewest, most) = _gpu(config, degraded), config.workers
    if gpu is None:
        degraded.append("no GPU: training runs on CPU cores")
    if config.feature_extractor.name.startswith("efficientnet-lite"):
        lite = config.feature_extractor.name.replace("efficientnet-lite", "EfficientNet-Lite")
        degraded.append(f"features come from ImageNet {lite}, not from PanDerm")
    perceptual = _perceptual(config, degraded)
    precision = config.mixed_precision or ("no" if gpu is None else gpu.precision)
    workers = str(max(most, 1)) if fewest == most else f"{fewest} to {most}"
    device = f"{workers} CPU worker(s)" if gpu is None else f"{workers} x {gpu.name}"
    limited = f"; {len(degraded)} thing(s) fall short of the best:" if degraded else ""
    line = (
        f"training stage {config.stage} at {config.data.image_size} px on {device}, {PRECISION_NAMES[precision]}, "
        f"guided by {config.feature_extractor.name}{limited}"
    )
    return Opening(line, device, gpu is not None, precision, perceptual, degraded)


def _gpu(config: TrainConfig, degraded: list[str]) -> GpuFacts | None:
    """What each worker gets: this process's GPU, or one of the cluster's (where the driver may have none)."""
    fewest, most = config.workers
    if most == 0:
        facts = gpu_facts()
        if facts.name is None and facts.driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            degraded.append(f"torch sees no GPU: {facts.advice}")
        return None if facts.name is None else facts
    nodes = node_resources()
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if 0 < gpus < fewest:
        raise ConfigError(f"num_workers is {config.num_workers} and the cluster has {gpus:g} GPUs; lower --num_workers")
    per_worker = config.ray.cpus_per_worker
    fit = places({"CPU": per_worker, "GPU": float(gpus > 0)}, nodes)
    if fit < fewest:
        each = f"{per_worker:g} CPUs{' and a GPU' if gpus else ''}"
        raise ConfigError(
            f"num_workers is {config.num_workers} and the cluster's nodes hold {fit} workers of {each} each; lower "
            "--num_workers or --ray.cpus_per_worker, or add a node"
        )
    return cluster_gpu() if gpus else None


def _perceptual(config: TrainConfig, degraded: list[str]) -> PerceptualKind:
    kind, net = config.perceptual.kind, config.perceptual.lpips_net
    if kind == "features":
        return "features"
    available, reason = lpips_available(net)
    if available:
        return "lpips"
    if kind == "lpips":
        raise ConfigError(
            f"perceptual.kind is lpips, whose {net} weights cannot be had here ({reason}); "
            "put torchvision's file into the torch hub cache, or use --perceptual.kind features"
        )
    degraded.append(f"LPIPS weights cannot be had ({reason}): the perceptual loss uses the feature extractor's maps")
    return "features"


def _plan(
    config: TrainConfig, experiment: Experiment, catalog: pa.Table, opening: Opening, console: Console
) -> RunPlan:
    """The plan, announced and on record, once the data is known."""
    began_with = experiment.info().get("perceptual", opening.perceptual)
    if began_with != opening.perceptual and newest_step(experiment.checkpoints):
        raise ConfigError(
            f"perceptual.kind: this run began with {began_with}, and here it would go on with {opening.perceptual}; "
            f"continue it where {began_with} can be had, or start over with --fresh"
        )
    counts = class_counts(catalog, "train")
    if not any(counts.values()):
        raise DataError("the train split is empty; lower data.val_fraction and data.test_fraction, or add images")
    plan = RunPlan(
        config=config,
        experiment=experiment,
        world_size=max(config.workers[1], 1),
        train_images=sum(counts.values()),
        precision=opening.precision,
        perceptual=opening.perceptual,
        classes=classes_of(catalog),
        **prepared_parts(config, experiment, catalog, console),
    )
    console.say(f"training images: {' '.join(f'{code} {count}' for code, count in counts.items())}")
    console.say(
        f"{plan.total_steps:,} steps of {plan.global_batch} images, {plan.steps_per_epoch:,} steps an epoch: "
        f"{plan.total_steps / plan.steps_per_epoch:.3g} epoch(s)"
    )
    experiment.update_info(
        state="running",
        device=opening.device,
        precision=PRECISION_NAMES[plan.precision],
        perceptual=plan.perceptual,
        degraded=opening.degraded,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        world_size=plan.world_size,
    )
    return plan


def _run(plan: RunPlan, on_gpu: bool, console: Console, callbacks: Sequence[Any], stoppable: bool) -> None:
    """Train in this process or on Ray, with progress on the console. Raises Stopped where a signal ended it."""
    config, experiment = plan.config, plan.experiment
    done = newest_step(experiment.checkpoints)
    with (
        stop_requests(experiment.path, console.say, signals=stoppable) as asked,
        console.progress(experiment.path, plan.total_steps, plan.steps_per_epoch, done),
    ):
        if config.workers[1] == 0:
            from m2d.training.loop import train_worker  # the networks; on Ray the driver does without

            with failures_recorded(experiment.path, config):
                train_worker(plan, _LocalLink(plan, torch.device("cuda" if on_gpu else "cpu")))
        else:
            from m2d.training.ray_worker import fit

            online = config.use_wandb and config.wandb_mode == "online"
            fit(plan, on_gpu, callbacks, find_wandb_key(console.warn) if online else None)
    done = newest_step(experiment.checkpoints)
    if asked and done < plan.total_steps:
        raise Stopped(f"stopped at step {done:,} of {plan.total_steps:,}; the same command resumes", asked[0])


def _ending(plan: RunPlan, degraded: list[str], console: Console) -> dict[str, Any]:
    """What the record says of a run that came to its last step; warns of skipped ones."""
    last = MetricsLog(plan.experiment.path / "metrics", "train").last() or {}
    skipped = int(last.get("skipped_steps", 0))
    if skipped > FEW_SKIPPED * plan.total_steps:
        degraded = [
            *degraded,
            f"{skipped:,} of {plan.total_steps:,} steps were skipped, since a loss or gradient was not finite; lower "
            "the learning rates or use --mixed_precision no",
        ]
        console.warn(degraded[-1])
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {"state": "done", "finished": finished, "error": None, "degraded": degraded, "skipped_steps": skipped}


class _LocalLink:
    """The calling process as the only worker: no Ray, so a debugger can step through."""

    rank = 0
    world_size = 1

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device

    def images(self, share: Share, turns: range) -> Iterator[dict[str, Tensor]]:
        """See WorkerLink."""
        reader = self.plan.reader("train")
        return iterate_local(reader, self.plan.order(reader), share, turns)

    def report(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        """There is no driver to report to."""

    def preempted(self) -> bool:
        """The calling process gets no notice."""
        return False
