"""A run on Ray Train, from both ends: `fit` starts the worker group, and each worker enters at `ray_worker`."""

import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor

from m2d.data.order import Share
from m2d.data.stream import build_stream, iterate_stream, stream_options
from m2d.errors import M2DError, TrainingError
from m2d.experiment import log_file, newest_step
from m2d.files.storage import open_storage
from m2d.training.run import RunPlan, allocator_settings, failures_recorded, recorded_failure
from m2d.training.telemetry import WandbKey

# gloo's, NCCL's and Ray's own
WORDS_OF_HANGS = (
    "Timed out waiting",
    "Watchdog caught collective operation timeout",
    "BroadcastCollectiveTimeoutError",
    "A worker health check failed",
)
HEALTH_CHECK_S = 600.0  # Ray's default


def fit(plan: RunPlan, on_gpu: bool, callbacks: Sequence[Any], key: WandbKey | None) -> None:
    """Train by a group of workers to the plan's last step. key: wandb's, for the first worker."""
    config = plan.config
    fewest, most = config.workers
    # Of Ray's own barriers and health checks; torch's timeout is set below.
    patience_s = config.ray.collective_timeout_s
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(patience_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(patience_s, HEALTH_CHECK_S))
    # As mappings: the types that mypy sees are those of Ray Train's first version.
    scaling: dict[str, Any] = {
        "num_workers": most if fewest == most else (fewest, most),
        "elastic_resize_monitor_interval_s": config.ray.resize_check_s,
        "use_gpu": on_gpu,
        "resources_per_worker": {"CPU": config.ray.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
    }
    workers: dict[str, Any] = {"worker_runtime_env": {"env_vars": allocator_settings()}} if on_gpu else {}
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
    failures: list[BaseException] = []

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    # Beside the main thread, which is then free for signals: Ray's own answer to Ctrl-C saves nothing.
    thread = threading.Thread(target=work, name="m2d-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    for error in failures:
        raise _cause(error, plan) if isinstance(error, TrainingFailedError) else error
    failure = recorded_failure(plan.experiment.path)
    if failure is not None:
        raise failure


def _cause(error: TrainingFailedError, plan: RunPlan) -> Exception:
    """The user's error inside Ray's, or one line that says where the logs are."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {}) or {}
    seen: list[BaseException] = [error, *failures.values()]
    while seen:
        current = seen.pop()
        if isinstance(current, M2DError):
            return type(current)(str(current))
        seen += [e for e in (current.__cause__, current.__context__, getattr(current, "cause", None)) if e is not None]
    logs = plan.experiment.path / "logs"
    if any(words in str(error) for words in WORDS_OF_HANGS):
        return TrainingError(
            f"the workers waited {plan.config.ray.collective_timeout_s:g} s for one that does not answer "
            f"(ray.collective_timeout_s); the same command resumes; the logs: {logs}"
        )
    return TrainingError(f"a worker failed: {str(error).strip().splitlines()[-1]}; its log: {logs}")


def ray_worker(loop_config: dict[str, Any]) -> None:
    """TorchTrainer's train_loop_per_worker. loop_config: plan, a RunPlan; wandb, a WandbKey or None."""
    from m2d.training.loop import train_worker  # the networks, which Ray's controller imports this module without

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    plan: RunPlan = loop_config["plan"]
    link = RayLink(plan)
    if link.rank == 0 and loop_config["wandb"] is not None:
        loop_config["wandb"].use()
    with log_file(plan.experiment.path / "logs" / f"worker_{link.rank}.log"):
        try:
            if recorded_failure(plan.experiment.path) is None:  # else this group is Ray's next try at what cannot work
                with failures_recorded(plan.experiment.path, plan.config):
                    train_worker(plan, link)
        except Exception:
            logging.getLogger("m2d").exception("worker %d of %d failed", link.rank, link.world_size)
            raise


class RayLink:
    """A Ray Train worker's rank, device, shard and reports: a WorkerLink."""

    def __init__(self, plan: RunPlan) -> None:
        context = ray.train.get_context()
        self.plan = plan
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._leaving: set[str] = set()  # nodes already reported

    def images(self, share: Share, turns: range) -> Iterator[dict[str, Tensor]]:
        """See WorkerLink."""
        shard = ray.train.get_dataset_shard(GroupStream.NAME)
        return iterate_stream(shard, share, turns, pin_memory=self.device.type == "cuda")

    def report(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        """See WorkerLink. The checkpoint is in the experiment already, so Ray copies nothing."""
        ray.train.report(
            metrics,
            checkpoint=None if checkpoint is None else ray.train.Checkpoint(checkpoint),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def preempted(self) -> bool:
        """See WorkerLink. Ray starts the group again on other nodes once those that are being drained are gone."""
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids if info is not None else ()) - self._leaving
        self._leaving |= new
        return bool(new)


class GroupStream(ray.train.DataConfig):
    """Makes the training stream for each worker group, from the newest checkpoint on, in an actor of the group.

    Ray asks for datasets before it knows how many workers an elastic group has; here it tells.
    """

    NAME = "train"

    def __init__(self, plan: RunPlan) -> None:
        super().__init__(execution_options=stream_options(), enable_shard_locality=False)
        self.plan = plan

    @classmethod
    def placeholder(cls) -> dict[str, Any]:
        """TorchTrainer's datasets: the name alone matters."""
        return {cls.NAME: ray.data.range(1)}

    def configure(
        self, datasets: Any, world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """See DataConfig: a shard of the stream for each of `world_size` workers."""
        streams = {self.NAME: self.stream(world_size)}
        return super().configure(streams, world_size, worker_handles, worker_node_ids, **kwargs)

    def stream(self, world_size: int) -> ray.data.Dataset:
        """The rest of the run's rows."""
        plan, data, reader = self.plan, self.plan.config.data, self.plan.reader("train")
        turns = plan.turns_from(newest_step(plan.experiment.checkpoints), world_size)
        return build_stream(
            reader,
            plan.order(reader),
            plan.share(0, world_size),
            turns or range(1),  # a group restarted after the last checkpoint asks for none of them
            object_store_share=data.object_store_share,
            read_cpus=data.read_cpus,
        )
