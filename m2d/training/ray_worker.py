"""The worker loop inside Ray Train: gives `train_worker` the stream, the device and the reports of a Ray worker."""

import logging
from collections.abc import Iterator
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from m2d.data.stream import build_stream, iterate_stream, stream_options
from m2d.experiment import log_file, newest_step
from m2d.training.run_plan import RunPlan
from m2d.training.stopping import failures_recorded, recorded_failure


class RayLink:
    """A Ray Train worker's rank, device, shard and reports."""

    def __init__(self, plan: RunPlan) -> None:
        context = ray.train.get_context()
        self.plan = plan
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._leaving: set[str] = set()  # nodes already reported

    def images(self, first_micro_batch: int, num_micro_batches: int) -> Iterator[dict[str, Tensor]]:
        """See WorkerLink."""
        return iterate_stream(
            ray.train.get_dataset_shard(GroupStream.NAME),
            batch_size=self.plan.config.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            start_micro_batch=first_micro_batch,
            num_micro_batches=num_micro_batches,
            step_micro_batches=self.plan.step_micro_batches,
            pin_memory=self.device.type == "cuda",
        )

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
        leaving = set() if info is None else set(info.preempted_node_ids)
        new = leaving - self._leaving
        self._leaving |= leaving
        return bool(new)


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
        plan = self.plan
        first, count = plan.micro_batches_from(newest_step(plan.experiment.checkpoints), world_size)
        reader = plan.reader("train")
        return build_stream(
            reader,
            plan.order(reader),
            batch_size=plan.config.batch_size,
            num_workers=world_size,
            start_micro_batch=first,
            num_micro_batches=max(count, 1),  # a group restarted after the last checkpoint asks for none of them
            object_store_share=plan.config.data.object_store_share,
            read_cpus=plan.config.data.read_cpus,
            step_micro_batches=plan.step_micro_batches,
        )
