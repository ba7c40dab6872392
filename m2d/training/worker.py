"""The loop of one worker, without Ray: start or resume, train, validate, save. Called by a Ray worker or in-process."""

import os
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from m2d.config import as_dict
from m2d.data.order import worker_rows
from m2d.models.checkpoint import CheckpointInfo
from m2d.models.perceptual import build_perceptual
from m2d.training.batch import Draws, ImageBatch, LatentBatch, draw, draws_seed
from m2d.training.latents import LatentTable, cache_latents
from m2d.training.networks import build_networks
from m2d.training.plan import RunPlan
from m2d.training.reduce import all_reduce_sum, barrier
from m2d.training.saving import CheckpointKeeper, complete_checkpoints, load_training_state, take_snapshot
from m2d.training.step import JointStep, LatentStep, Networks, StepConfig, extract
from m2d.training.telemetry import MetricsLog, Wandb
from m2d.training.validation import score, validate


class WorkerLink(Protocol):
    """What a worker needs of whoever runs it."""

    rank: int
    world_size: int
    device: torch.device

    def images(self, first_micro_batch: int, num_micro_batches: int) -> Iterator[dict[str, Tensor]]:
        """The worker's micro-batches, from the stream."""

    def report(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        """Tell the driver of a checkpoint; called by every worker equally often."""


def train_worker(plan: RunPlan, link: WorkerLink) -> None:
    """Train from the newest checkpoint, or from the start, to the plan's last step."""
    config = plan.config
    _set_up_torch(plan, link)
    networks = build_networks(config, link.device)
    checkpoints = complete_checkpoints(plan.experiment.checkpoints)
    table: LatentTable | None = None
    if not checkpoints and config.init_checkpoint is None:
        _fit_feature_statistics(plan, networks, link)
    if config.stage == "latent":
        table = _latent_table(plan, networks, link)
        if not checkpoints:
            mean, variance = table.moments()
            networks.denoiser.latent_norm.running_mean.copy_(mean)
            networks.denoiser.latent_norm.running_var.copy_(variance)
    _Run(plan, link, networks, table).train()


class _Run:
    """State of the loop."""

    def __init__(self, plan: RunPlan, link: WorkerLink, networks: Networks, table: LatentTable | None) -> None:
        config = plan.config
        self.plan, self.link, self.networks, self.table = plan, link, networks, table
        self.latent_shape = networks.denoiser.latent_shape(config.data.image_size, networks.autoencoder.downsampling)
        self.perceptual = build_perceptual(plan.perceptual, networks.extractor, config.perceptual.lpips_net)
        self.perceptual.to(link.device)
        step_config = StepConfig(
            weights=config.loss_weights,
            optimizer=config.optimizer,
            schedule=config.schedule,
            precision=plan.precision,
            total_steps=plan.total_steps,
            vae_warmup_steps=plan.vae_warmup_steps,
            discriminator_start=config.discriminator.start_step,
            compile=config.compile,
        )
        distributed = link.world_size > 1
        self.step: JointStep | LatentStep
        if table is None:
            self.step = JointStep(networks, self.perceptual, step_config, link.device, distributed)
        else:
            self.step = LatentStep(networks, step_config, link.device, distributed)
        self.leads = link.rank == 0
        self.keeper = CheckpointKeeper(plan.experiment.checkpoints, config.saving.keep_last) if self.leads else None
        self.log = MetricsLog(plan.experiment.path / "metrics", "train") if self.leads else None
        self.validation_log = MetricsLog(plan.experiment.path / "metrics", "validation") if self.leads else None
        self.wandb: Wandb | None = None
        if self.leads and config.use_wandb:
            folder = plan.experiment.path
            self.wandb = Wandb(folder, config.wandb_project, plan.experiment.name, config.wandb_mode, as_dict(config))
        self.validation_reader = plan.reader("val") if len(plan.catalog("val")) else None
        self.reported: dict[str, float] = {}

    def train(self) -> None:
        """From the newest checkpoint to the last step."""
        start = self._resume()
        plan, link = self.plan, self.link
        batches = self._batches(start)
        waited, began, since = 0.0, time.perf_counter(), start
        for step in range(start, plan.total_steps):
            micro_batches = []
            for k in range(plan.config.gradient_accumulation_steps):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                micro_batches.append((batch, self._draws(step * plan.config.gradient_accumulation_steps + k)))
            self.step(micro_batches, step)  # type: ignore[arg-type]
            done = step + 1
            if done % plan.config.schedule.log_every_steps == 0 or done == plan.total_steps:
                seconds = time.perf_counter() - began
                speed = {
                    "images_per_s": (done - since) * plan.global_batch / seconds,
                    "data_wait_share": waited / seconds,
                }
                self._log_scalars(done, speed)
                waited, began, since = 0.0, time.perf_counter(), done
            if done % plan.save_every == 0 or done == plan.total_steps:
                self._save(done)
                waited, began, since = 0.0, time.perf_counter(), done
        self._report(self.keeper.wait() if self.keeper is not None else None)
        if self.log is not None and self.validation_log is not None:
            self.log.write_csv()
            self.validation_log.write_csv()
            plan.experiment.publish()
        if self.wandb is not None:
            self.wandb.finish()
        link_done = torch.zeros(1, device=link.device)
        all_reduce_sum(link_done)  # nobody leaves before the last checkpoint is whole

    def _resume(self) -> int:
        checkpoints = complete_checkpoints(self.plan.experiment.checkpoints)
        start = 0
        if checkpoints:
            state, document = load_training_state(checkpoints[-1], self.step.state_dict())
            self.step.load_state_dict(state)
            start = int(document["position"]["step"])
        for log in (self.log, self.validation_log):
            if log is not None:
                log.resume_at(start)
        barrier()
        return start

    def _batches(self, start: int) -> Iterator[ImageBatch | LatentBatch]:
        first, count = self.plan.micro_batches_from(start)
        if self.table is None:
            for batch in self.link.images(first, count):
                yield ImageBatch(images=batch["images"], labels=batch["labels"])
            return
        config = self.plan.config
        order = self.plan.order(self.plan.reader("train"))
        for micro_batch in range(first, first + count):
            rows = worker_rows(
                micro_batch, batch_size=config.batch_size, rank=self.link.rank, world_size=self.link.world_size
            )
            yield self.table.batch(*order.lookup(rows))

    def _draws(self, micro_batch: int) -> Draws:
        config = self.plan.config
        generator = torch.Generator(self.link.device)
        generator.manual_seed(draws_seed(config.seed, micro_batch, self.link.rank))
        return draw(generator, config.batch_size, self.latent_shape, self.networks.extractor.dim, config.conditioning)

    def _log_scalars(self, step: int, speed: dict[str, float]) -> None:
        scalars = self.step.read_scalars()
        names = sorted(scalars)
        mean = all_reduce_sum(torch.tensor([scalars[name] for name in names], device=self.link.device))
        values = dict(zip(names, (mean / self.link.world_size).tolist(), strict=True)) | speed
        for name, network in self.step.optimized.items():
            if name == "denoiser" and self.table is None and step <= self.plan.vae_warmup_steps:
                continue  # it does not learn yet
            values[f"learning_rate/{name}"] = float(network.optimizer.param_groups[0]["lr"])
        values["epoch"] = step * self.plan.global_batch / self.plan.train_images
        if self.link.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.link.device) / 2**30
        if self.log is not None:
            self.log.write(step, values)
        if self.wandb is not None:
            self.wandb.log(step, values)

    def _save(self, done: int) -> None:
        """Validate, snapshot, write in the background; report the checkpoint before this one, which is whole by now."""
        plan, link = self.plan, self.link
        measures: dict[str, float] = {}
        if self.validation_reader is not None:
            measures = validate(
                self.networks, self.step.ema.module, self.perceptual, self.validation_reader,
                images=plan.config.saving.validation_images, batch_size=plan.config.batch_size,
                rank=link.rank, world_size=link.world_size, device=link.device,
            )  # fmt: skip
        previous = None
        if self.keeper is not None and self.validation_log is not None:
            state = self.step.state_dict()
            state["position"] = {"step": done, "stream_row": done * plan.global_batch, "seed": plan.config.seed}
            snapshot = take_snapshot(self._info(done), self.networks, state, measures)
            previous = self.keeper.wait()
            self.keeper.save(snapshot, score(measures, plan.config.stage))
            self.validation_log.write(done, measures)
            if self.wandb is not None:
                self.wandb.log(done, measures)
            plan.experiment.publish("metrics")
        if self.reported:
            self._report(previous)
        self.reported = measures | {"step": float(done)}

    def _report(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            self.plan.experiment.publish(f"checkpoints/{checkpoint.name}")
        self.link.report(self.reported, None if checkpoint is None else str(checkpoint))

    def _info(self, step: int) -> CheckpointInfo:
        config = self.plan.config
        grid = self.networks.extractor.input_size // 32
        return CheckpointInfo(
            step=step,
            stage=config.stage,
            image_size=config.data.image_size,
            feature_extractor=config.feature_extractor.name,
            feature_dim=self.networks.extractor.dim,
            num_patches=grid * grid,
            conditioning=vars(config.conditioning),
            config=self.plan.experiment.config(),
        )


def _set_up_torch(plan: RunPlan, link: WorkerLink) -> None:
    if link.device.type == "cpu":
        cores = os.cpu_count() or 1
        torch.set_num_threads(plan.config.ray.threads_per_worker or max(1, cores // max(1, link.world_size)))
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


@torch.no_grad()
def _fit_feature_statistics(plan: RunPlan, networks: Networks, link: WorkerLink) -> None:
    """Mean and deviation of cls over some training images, each worker extracting a share."""
    config, reader = plan.config, plan.reader("train")
    chosen = np.random.default_rng(config.seed).permutation(len(reader))[: config.feature_extractor.statistics_images]
    dim = networks.extractor.dim
    sums = torch.zeros(2 * dim + 1, dtype=torch.float64, device=link.device)
    share = np.sort(chosen)[link.rank :: link.world_size]
    for start in range(0, len(share), config.batch_size):
        rows = share[start : start + config.batch_size]
        pixels = torch.from_numpy(reader.read(rows, np.zeros(len(rows), dtype=np.int8))["images"])
        cls = extract(networks.extractor, pixels.to(link.device).permute(0, 3, 1, 2)).cls.double()
        sums += torch.cat([cls.sum(dim=0), cls.square().sum(dim=0), cls.new_tensor([float(len(rows))])])
    total = all_reduce_sum(sums)
    mean = total[:dim] / total[-1]
    variance = (total[dim : 2 * dim] / total[-1] - mean.square()).clamp(min=0)
    networks.denoiser.conditioning.set_statistics(mean.float(), variance.sqrt().float())


def _latent_table(plan: RunPlan, networks: Networks, link: WorkerLink) -> LatentTable:
    config = plan.config

    def progress(done: int, total: int) -> None:
        if link.rank == 0:
            print(f"caching latents: {done} of {total} image views", flush=True)

    return cache_latents(
        networks, plan.reader("train"), plan.experiment.path / "cache" / "latents",
        views=config.data.views, batch_size=max(config.batch_size, 64), rank=link.rank,
        world_size=link.world_size, device=link.device, progress=progress,
    )  # fmt: skip
