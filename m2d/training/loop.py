"""The loop of one worker, without Ray: start or resume, train, validate, save. Called by a Ray worker or in-process."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from joblib import cpu_count
from torch import Tensor

from m2d.data.order import Share
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.experiment import complete_checkpoints
from m2d.files.paths import checkpoint_folder
from m2d.models.autoencoder import LinearAutoencoder, block_pca, load_vae
from m2d.models.checkpoint import CheckpointInfo, read_prior
from m2d.models.perceptual import ProjectedDiscriminator, build_perceptual
from m2d.training.batch import Draws, ImageBatch, LatentBatch, draw, pinned
from m2d.training.features import FeatureSource, LatentTable, Told, cache_latents, fit_features, fit_linear
from m2d.training.measure import Throughput, peak_memory_gib
from m2d.training.networks import Networks, all_reduce_sum, build_networks, idle_modules
from m2d.training.run import RunPlan, Wish, stop_is_wanted
from m2d.training.saving import CheckpointKeeper, load_training_state, take_snapshot
from m2d.training.step import StepConfig, build_step
from m2d.training.telemetry import Preparing, Telemetry
from m2d.training.validation import RunView, score, show_gradients

AHEAD = 2  # batches that are read while the device computes


class WorkerLink(Protocol):
    """What a worker needs of whoever runs it."""

    rank: int
    world_size: int
    device: torch.device

    def images(self, share: Share, turns: range) -> Iterator[dict[str, Tensor]]:
        """The worker's micro-batches, from the stream."""

    def report(self, metrics: dict[str, float], checkpoint: str | None) -> None:
        """Tell the driver of a checkpoint; called by every worker equally often."""

    def preempted(self) -> bool:
        """Whether a node of the group is about to be taken away, reported once; all workers call it equally often."""


def train_worker(plan: RunPlan, link: WorkerLink) -> None:
    """Train from the newest checkpoint, or from the start, to the plan's last step."""
    if link.device.type == "cpu":
        threads = max(1, cpu_count() // max(1, link.world_size))
        torch.set_num_threads(plan.config.ray.threads_per_worker or threads)
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    _Run(plan, link).train()


def read_ahead(batches: Iterator[ImageBatch | LatentBatch], *, pin_memory: bool) -> Iterator[ImageBatch | LatentBatch]:
    """The batches, read and (for a GPU) put into pinned memory by a thread that is AHEAD of them."""

    def read() -> ImageBatch | LatentBatch | None:
        batch = next(batches, None)
        return pinned(batch) if batch is not None and pin_memory else batch

    thread = ThreadPoolExecutor(1, thread_name_prefix="m2d-read")
    try:
        waiting = deque(thread.submit(read) for _ in range(AHEAD))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(read))
            yield batch
    finally:  # a run that stops early leaves what it has asked for
        thread.shutdown(wait=False, cancel_futures=True)


def _fit_features(
    plan: RunPlan, networks: Networks, source: FeatureSource, link: WorkerLink, told: Told, *, set_statistics: bool
) -> FeaturePrior:
    """The prior of the training split's features; a new denoiser also learns their mean and deviation."""
    place = link.rank, link.world_size
    prior, mean, std = fit_features(source, plan.reader("train"), plan.config, *place, plan.classes, told)
    if set_statistics and networks.denoiser_is_new:
        networks.denoiser.conditioning.set_statistics(mean, std)
    return prior


class _Run:
    """A run in one worker: what it is made of, and the loop."""

    def __init__(self, plan: RunPlan, link: WorkerLink) -> None:
        config, device = plan.config, link.device
        self.plan, self.link, self.leads = plan, link, link.rank == 0
        self.told = Preparing(plan.experiment.path, leads=self.leads)
        self.accumulation = plan.accumulation(link.world_size)
        self.share = plan.share(link.rank, link.world_size)

        # 1. Networks, and what features tell of the training split.
        features = plan.feature_table("train")
        self.networks = networks = build_networks(
            config, device, None if features is None else features.dim, plan.classes
        )
        self.latent_shape = networks.denoiser.latent_shape(config.data.image_size, networks.autoencoder.downsampling)
        self.source = source = FeatureSource(device, networks.extractor, features)
        self.checkpoints = complete_checkpoints(plan.experiment.checkpoints)
        prior = read_prior(self.checkpoints[-1]) if self.checkpoints else None
        if prior is None and config.stage == "decoder":
            prior = read_prior(Path(config.init_checkpoint or ""))  # as it belongs to the U-Net, which stays
        vae = networks.autoencoder.vae
        if self.checkpoints and block_pca(vae) is not None:  # the latent stage encodes before it resumes
            vae.load_state_dict(load_vae(self.checkpoints[-1] / "vae", "checkpoint").state_dict())
        elif not self.checkpoints and config.init_checkpoint is None and config.autoencoder.pretrained is None:
            fit_linear(vae, plan.reader("train"), device, config, link.rank, link.world_size)
        self.prior = prior or _fit_features(
            plan, networks, source, link, self.told, set_statistics=not self.checkpoints
        )
        self.table = self._latents() if config.stage == "latent" else None

        # 2. The step, and what is not on the device while it is taken.
        projected = isinstance(networks.discriminator, ProjectedDiscriminator)
        self.perceptual = build_perceptual(
            plan.perceptual, networks.extractor, config.perceptual.lpips_net, projected=projected
        )
        self.perceptual.to(device)
        step_config = StepConfig(config, plan.precision, plan.total_steps, plan.vae_warmup_steps)
        self.step = build_step(
            config.stage, networks, self.perceptual, step_config, device, distributed=link.world_size > 1
        )
        averaged = self.step.ema.module
        self.aside = idle_modules(config, networks, averaged, [networks.extractor, self.perceptual])

        # 3. What looks at the run and keeps it; the first worker's business, but for validation.
        reader = plan.reader("val") if len(plan.catalog("val")) else None
        of_validation = dataclasses.replace(source, table=plan.feature_table("val"))
        self.view = RunView(plan, networks, averaged, self.prior, self.perceptual, reader, of_validation)
        self.telemetry: Telemetry | None = None
        if self.leads:
            self.telemetry = Telemetry.of(config, plan.experiment)
            self.keeper = CheckpointKeeper(plan.experiment.checkpoints, config.saving.keep_last)
        self.reported: dict[str, float] = {}

    def train(self) -> None:
        """From the newest checkpoint to the last step."""
        plan, device, accumulation, telemetry = self.plan, self.link.device, self.accumulation, self.telemetry
        config = plan.config
        start = self._resume()
        for module in self.aside:
            module.to("cpu")
        batches = read_ahead(self._batches(start), pin_memory=device.type == "cuda")
        images_per_step = config.batch_size * accumulation * self.link.world_size
        meter = Throughput(device, None if config.compile else plan.precision, start, images_per_step)
        done = start
        for step in range(start, plan.total_steps):
            micro_batches = []
            for k in range(accumulation):
                with meter.waiting():
                    batch = next(batches)
                micro_batches.append((batch, self._draws(step * accumulation + k)))
            meter.count(
                self.step.kind(step),
                lambda: accumulation * self.step.flops(*micro_batches[0], step),  # type: ignore[arg-type] # noqa: B023
            )
            done = step + 1
            gradients_every = config.telemetry.gradients_every_steps
            self.step.watch_gradients = self.leads and gradients_every > 0 and done % gradients_every == 0
            self.step(micro_batches, step)  # type: ignore[arg-type]
            if telemetry is not None and self.step.gradients is not None:
                show_gradients(telemetry, done, self.step.gradients, config.telemetry.pictures)
                self.step.gradients = None
            last = done == plan.total_steps
            if done % config.schedule.log_every_steps == 0 or last:
                self._log_scalars(done, meter.read(done))
            wish = self._wish(done)
            save = done % (config.saving.every_steps or plan.steps_per_epoch) == 0 or last or wish != Wish.GO_ON
            due = plan.pictures_due(done)
            if save or due:
                with self._all_on_device():
                    if save:
                        self._save(done)
                    if due and telemetry is not None:
                        self.view.show(telemetry, self._info(done), due)
                meter.restart(done)
            if wish == Wish.STOP:
                break
        self._report(self.keeper.wait() if self.leads else None)
        if telemetry is not None:
            best = Path(checkpoint_folder(str(plan.experiment.checkpoints / "best")))
            upload = config.telemetry.upload_best and done == plan.total_steps and best.is_dir()
            telemetry.finish(best if upload else None)
            plan.experiment.publish()
        all_reduce_sum(torch.zeros(1, device=device))  # no worker leaves before the last checkpoint is whole

    def _latents(self) -> LatentTable:
        """The latent stage's cache; a new run takes its latents' mean and deviation, but for block PCA's."""
        plan, link, networks = self.plan, self.link, self.networks
        folder, views = plan.experiment.path / "cache" / "latents", plan.config.data.views
        table = cache_latents(
            networks.autoencoder,
            plan.reader("train"),
            self.source,
            folder,
            views,
            link.rank,
            link.world_size,
            self.told,
        )
        if not self.checkpoints and not isinstance(networks.autoencoder.vae, LinearAutoencoder):
            mean, variance = table.moments()
            networks.denoiser.latent_norm.running_mean.copy_(mean)
            networks.denoiser.latent_norm.running_var.copy_(variance)
        return table

    def _resume(self) -> int:
        """The step to begin with."""
        start = 0
        if self.checkpoints:
            state, document = load_training_state(self.checkpoints[-1], self.step.state_dict())
            self.step.load_state_dict(state)
            start = int(document["position"]["step"])
        if self.telemetry is not None:
            self.telemetry.resume_at(start)
        all_reduce_sum(torch.zeros(1, device=self.link.device))  # all have read what the first step may change
        return start

    def _wish(self, done: int) -> Wish:
        """What the first worker is asked for, the same for all. On a GPU it is asked where scalars are read anyway."""
        logs = done % self.plan.config.schedule.log_every_steps == 0
        if not logs and self.link.device.type == "cuda":
            return Wish.GO_ON
        wish = Wish.SAVE if logs and self.link.preempted() else Wish.GO_ON
        if self.leads and stop_is_wanted(self.plan.experiment.path):
            wish = Wish.STOP
        agreed = all_reduce_sum(torch.tensor(float(wish) if self.leads else 0.0, device=self.link.device))
        return Wish(int(agreed.item()))

    def _batches(self, start: int) -> Iterator[ImageBatch | LatentBatch]:
        plan, link, cached = self.plan, self.link, self.source.table
        turns = plan.turns_from(start, link.world_size)
        if self.table is None:
            unguided = plan.total_steps if plan.config.stage == "decoder" else plan.vae_warmup_steps
            warmup = unguided * self.accumulation  # the first micro-batches need no features
            for batch, micro_batch in zip(link.images(self.share, turns), turns):
                features = None
                if cached is not None and micro_batch >= warmup:
                    features = cached.batch(batch["catalog_rows"].numpy(), batch["views"].numpy())
                yield ImageBatch(images=batch["images"], labels=batch["labels"], features=features)
            return
        order = plan.order(plan.reader("train"))
        for rows in map(self.share.rows, turns):
            yield self.table.batch(*order.lookup(rows))

    def _draws(self, micro_batch: int) -> Draws:
        """Those of the worker's micro-batch: the same whichever worker takes it, of however many."""
        config, feature_dim = self.plan.config, self.networks.feature_dim
        times, shift = config.schedule.times, config.schedule.time_shift
        first = self.share.number(micro_batch) * config.batch_size
        rows = torch.arange(first, first + config.batch_size, device=self.link.device)
        return draw(config.seed, rows, self.latent_shape, feature_dim, config.conditioning, times, shift)

    @contextmanager
    def _all_on_device(self) -> Iterator[None]:
        """For what needs every network: validation and samples."""
        for module in self.aside:
            module.to(self.link.device)
        try:
            yield
        finally:
            for module in self.aside:
                module.to("cpu")

    def _log_scalars(self, step: int, speed: dict[str, float]) -> None:
        plan, scalars = self.plan, self.step.read_scalars()
        names = sorted(scalars)
        mean = all_reduce_sum(torch.tensor([scalars[name] for name in names], device=self.link.device))
        if self.telemetry is None:
            return
        values = dict(zip(names, (mean / self.link.world_size).tolist(), strict=True)) | speed
        for name, optimizer in self.step.optimizers.items():
            if name != "denoiser" or self.table is not None or step > plan.vae_warmup_steps:  # else it does not learn
                values[f"learning_rate/{name}"] = float(optimizer.param_groups[0]["lr"])
        fewest, most = plan.config.workers
        if fewest < most:
            values["workers"] = float(self.link.world_size)
        values["epoch"] = step * plan.global_batch / plan.train_images
        values["peak_memory_gib"] = peak_memory_gib(self.link.device)
        self.telemetry.scalars("train", step, values)

    def _save(self, done: int) -> None:
        """Validate, snapshot, write in the background; report the checkpoint before this one, which is whole by now."""
        plan, link = self.plan, self.link
        measures = self.view.validate(link.rank, link.world_size)
        if self.leads and plan.config.saving.validation_samples:
            measures |= self.view.sample_quality(self._info(done))
        previous = None
        if self.telemetry is not None:
            previous = self.keeper.wait()  # first: two snapshots are twice the host memory
            state = self.step.state_dict()
            state["position"] = {"step": done, "stream_row": done * plan.global_batch, "seed": plan.config.seed}
            snapshot = take_snapshot(self._info(done), self.networks, state, measures, self.prior)
            self.telemetry.flush()
            self.keeper.save(snapshot, score(measures, plan.config.stage))
            self.telemetry.scalars("validation", done, measures)
            plan.experiment.publish("metrics")
        if self.reported:
            self._report(previous)
        self.reported = measures | {"step": float(done)}

    def _report(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self.plan.experiment.publish(f"checkpoints/{checkpoint.name}")
        self.link.report(self.reported, None if checkpoint is None else str(checkpoint))

    def _info(self, step: int) -> CheckpointInfo:
        config = self.plan.config
        return CheckpointInfo(
            step=step,
            stage=config.stage,
            image_size=config.data.image_size,
            feature_extractor=config.feature_extractor.name,
            feature_dim=self.networks.feature_dim,
            num_patches=self.source.source.num_patches,
            conditioning=vars(config.conditioning),
            config=self.plan.experiment.config(),
            extractor_key=self.plan.extractor_key,
            classes=self.plan.classes,
        )
