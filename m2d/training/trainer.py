"""The driver of a training run: checks, opens the experiment, scans the data, starts the workers, shows progress."""

import dataclasses
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from m2d.classes import CLASSES
from m2d.cluster.nodes import GpuFacts, cluster_gpu, gpu_facts, node_resources, places, require_shared
from m2d.cluster.start import ray_cluster
from m2d.data.catalog import class_counts
from m2d.data.reader import iterate_local
from m2d.errors import ConfigError, DataError, M2DError, TrainingError
from m2d.experiment import Experiment, log_file, newest_step, open_experiment
from m2d.files.storage import open_storage
from m2d.models.perceptual import lpips_available
from m2d.models.settings import PerceptualKind, Precision
from m2d.training.console import Console
from m2d.training.run_plan import CATALOG, RunPlan, prepared_parts, run_catalog
from m2d.training.settings import TrainConfig, as_dict, differences, with_absolute_paths
from m2d.training.stopping import Stopped, StopRequest, failures_recorded, recorded_failure
from m2d.training.telemetry import WandbKey, find_wandb_key

# gloo's, NCCL's and Ray's own
WORDS_OF_HANGS = (
    "Timed out waiting", "Watchdog caught collective operation timeout", "BroadcastCollectiveTimeoutError",
    "A worker health check failed",
)  # fmt: skip
HEALTH_CHECK_S = 600.0  # Ray's default
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
    experiment, resumed = open_experiment(
        config.experiments_dir, config.name, as_dict(config), differences, fresh=config.fresh, command=sys.argv
    )
    with experiment.running(), log_file(experiment.path / "logs" / "driver.log"):
        try:
            with _resources(config):
                opening = _opening(config)
                console.say(opening.line)
                for line in opening.degraded:
                    console.warn(line)
                console.say(f"experiment: {experiment.path}{' (resumed)' if resumed else ''}")
                if config.workers[1] > 0:
                    init = config.init_checkpoint or ""
                    require_shared(
                        written={"experiments_dir": config.experiments_dir},
                        read={"data_root": data_root, "cache_dir": config.cache_dir, "init_checkpoint": init},
                    )
                catalog = run_catalog(config, experiment, data_root, console)
                _train_in(config, experiment, catalog, opening, console, callbacks, stoppable)
        except BaseException as error:
            never_began = isinstance(error, M2DError) and not resumed and not (experiment.path / CATALOG).is_file()
            if not (never_began and experiment.discard()):  # so a wrong data_root leaves no trace
                asked = isinstance(error, (Stopped, KeyboardInterrupt, SystemExit))
                failed: dict[str, Any] = {"state": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
                with suppress(OSError):  # of a full disk; the error is raised all the same
                    experiment.update_info(**({"state": "stopped", "error": None} if asked else failed))
            raise
        experiment.update_info(state="done", finished=datetime.now(UTC).isoformat(timespec="seconds"), error=None)
        console.say(f"done; best checkpoint: {experiment.checkpoints / 'best'}")
    return experiment


@dataclasses.dataclass(frozen=True)
class _Opening:
    """What a run is going to do, as far as settings and machines say."""

    line: str  # the first thing that a person reads
    device: str
    on_gpu: bool
    precision: Precision
    perceptual: PerceptualKind
    degraded: list[str]


def _opening(config: TrainConfig) -> _Opening:
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
    return _Opening(line, device, gpu is not None, precision, perceptual, degraded)


def _train_in(
    config: TrainConfig,
    experiment: Experiment,
    catalog: pa.Table,
    opening: _Opening,
    console: Console,
    callbacks: Sequence[Any],
    stoppable: bool,
) -> None:
    """Plan, announce and run, once the data is known."""
    train_images = sum(class_counts(catalog, "train").values())
    if train_images == 0:
        raise DataError("the train split is empty; lower data.val_fraction and data.test_fraction, or add images")
    plan = RunPlan(
        config=config,
        experiment=experiment,
        world_size=max(config.workers[1], 1),
        train_images=train_images,
        precision=opening.precision,
        perceptual=opening.perceptual,
        **prepared_parts(config, experiment, catalog, console),
    )
    counts = class_counts(catalog, "train")
    console.say(f"training images: {' '.join(f'{code} {counts[code]}' for code in CLASSES)}")
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
    done = newest_step(experiment.checkpoints)
    if done >= plan.total_steps:
        return
    record = experiment.path / "metrics" / "train.jsonl"
    with (
        StopRequest(experiment.path, console.say, signals=stoppable) as request,
        console.progress(record, plan.total_steps, plan.steps_per_epoch, done),
    ):
        if config.workers[1] == 0:
            from m2d.training.loop import train_worker  # the networks; on Ray the driver does without

            with failures_recorded(experiment.path, config):
                train_worker(plan, _LocalLink(plan, torch.device("cuda" if opening.on_gpu else "cpu")))
        else:
            online = config.use_wandb and config.wandb_mode == "online"
            _fit(plan, opening.on_gpu, callbacks, find_wandb_key(console.warn) if online else None)
    done = newest_step(experiment.checkpoints)
    if request.signal is not None and done < plan.total_steps:
        raise Stopped(f"stopped at step {done:,} of {plan.total_steps:,}; the same command resumes", request.signal)


def _resources(config: TrainConfig) -> AbstractContextManager[None]:
    """Ray, unless the calling process trains."""
    if config.workers[1] == 0:
        os.environ.update(allocator_settings())
        return nullcontext()
    fewest = config.workers[0]
    needed = fewest * config.ray.cpus_per_worker + config.data.read_cpus + 1
    return ray_cluster(
        verbose=config.verbose,
        min_cpus=needed,
        bundles=[{"CPU": config.ray.cpus_per_worker, "GPU": 1}] * fewest,
        wait_s=config.ray.wait_for_nodes_s,
    )


def allocator_settings() -> dict[str, str]:
    """Environment of a process that trains on a GPU, against fragmentation of its memory; the user's own comes first.

    torch reads it when CUDA starts. Of its two variables some versions prefer the one and some the other.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        return {}
    return {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}


def _gpu(config: TrainConfig, degraded: list[str]) -> GpuFacts | None:
    """What each worker gets: this process's GPU, or one of the cluster's (where the driver may have none)."""
    if config.workers[1] == 0:
        facts = gpu_facts()
        if facts.name is None and facts.driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            degraded.append(f"torch sees no GPU: {facts.advice}")
        return None if facts.name is None else facts
    nodes = node_resources()
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if 0 < gpus < config.workers[0]:
        raise ConfigError(f"num_workers is {config.num_workers} and the cluster has {gpus:g} GPUs; lower --num_workers")
    per_worker = config.ray.cpus_per_worker
    fit = places({"CPU": per_worker, "GPU": float(gpus > 0)}, nodes)
    if fit < config.workers[0]:
        each = f"{per_worker:g} CPUs{' and a GPU' if gpus else ''}"
        raise ConfigError(
            f"num_workers is {config.num_workers} and the cluster's nodes hold {fit} workers of {each} each; lower "
            "--num_workers or --ray.cpus_per_worker, or add a node"
        )
    return cluster_gpu() if gpus else None


def _perceptual(config: TrainConfig, degraded: list[str]) -> PerceptualKind:
    kind = config.perceptual.kind
    if kind == "features":
        return "features"
    available, reason = lpips_available(config.perceptual.lpips_net)
    if available:
        return "lpips"
    if kind == "lpips":
        raise ConfigError(
            f"perceptual.kind is lpips, whose {config.perceptual.lpips_net} weights cannot be had here ({reason}); "
            "put torchvision's file into the torch hub cache, or use --perceptual.kind features"
        )
    degraded.append(f"LPIPS weights cannot be had ({reason}): the perceptual loss uses the feature extractor's maps")
    return "features"


def _fit(plan: RunPlan, on_gpu: bool, callbacks: Sequence[Any], key: WandbKey | None) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from m2d.training.ray_worker import GroupStream, ray_worker

    config = plan.config
    fewest, most = config.workers
    # Of Ray's own barriers and health checks; torch's timeout is set below.
    patience_s = config.ray.collective_timeout_s
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(patience_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(patience_s, HEALTH_CHECK_S))
    # As a mapping: the type that mypy sees is that of Ray Train's first version.
    scaling: dict[str, Any] = {
        "num_workers": most if fewest == most else (fewest, most),
        "elastic_resize_monitor_interval_s": config.ray.resize_check_s,
        "use_gpu": on_gpu,
        "resources_per_worker": {"CPU": config.ray.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
    }
    workers: dict[str, Any] = {}
    if on_gpu:
        workers["worker_runtime_env"] = {"env_vars": allocator_settings()}
    # Ray asks that every checkpoint on its own list exist, but m2d.training.saving deletes old ones; resuming reads the
    # directory, so Ray starts each time with an empty list.
    (plan.experiment.checkpoints / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    # The filesystem made here, so that Ray shows no URI and so no key in one.
    remote, here = plan.experiment.remote, str(plan.experiment.path)
    filesystem, place = (None, here) if remote is None else open_storage(remote)
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"plan": plan, "wandb": key},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=math.ceil(patience_s)),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name="checkpoints",
            **workers,
            callbacks=list(callbacks),
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),  # m2d.training.saving keeps and deletes
        ),
        datasets=GroupStream.placeholder() if config.stage != "latent" else None,
        dataset_config=GroupStream(plan),
    )
    try:
        _in_a_thread(trainer.fit)
    except TrainingFailedError as error:
        raise _cause(error, plan) from error
    failure = recorded_failure(plan.experiment.path)
    if failure is not None:
        raise failure


def _in_a_thread(work: Callable[[], Any]) -> None:
    """Work beside the main thread, which is then free for signals: Ray's own answer to Ctrl-C saves nothing."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="m2d-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    if failures:
        raise failures[0]


def _cause(error: Exception, plan: RunPlan) -> Exception:
    """The user's error inside Ray's, or one line that says where the logs are."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {}) or {}
    seen: list[BaseException] = [error, *failures.values()]
    while seen:
        current = seen.pop()
        if isinstance(current, M2DError):
            return type(current)(str(current))
        seen += [e for e in (current.__cause__, current.__context__, getattr(current, "cause", None)) if e is not None]
    if any(words in str(error) for words in WORDS_OF_HANGS):
        return TrainingError(
            f"the workers waited {plan.config.ray.collective_timeout_s:g} s for one that does not answer "
            f"(ray.collective_timeout_s); the same command resumes; the logs: {plan.experiment.path / 'logs'}"
        )
    return TrainingError(
        f"a worker failed: {str(error).strip().splitlines()[-1]}; its log: {plan.experiment.path / 'logs'}"
    )


class _LocalLink:
    """The calling process as the only worker: no Ray, so a debugger can step through."""

    rank = 0
    world_size = 1

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        self.plan = plan
        self.device = device

    def images(self, first_micro_batch: int, num_micro_batches: int) -> Iterator[dict[str, Tensor]]:
        """See WorkerLink."""
        reader = self.plan.reader("train")
        return iterate_local(
            reader,
            self.plan.order(reader),
            batch_size=self.plan.config.batch_size,
            rank=0,
            world_size=1,
            start_micro_batch=first_micro_batch,
            num_micro_batches=num_micro_batches,
        )

    def report(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        """Nobody to tell."""

    def preempted(self) -> bool:
        """The calling process gets no notice."""
        return False
