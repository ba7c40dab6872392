"""One training step, in pure torch: runs in a test, a notebook or a bare GPU box as well as in a Ray worker.

`JointStep` trains VAE and U-Net together as REPA-E does (arXiv 2504.10483), `LatentStep` the U-Net alone on cached
posteriors; decoder_step.py has a third. All skip a step whose loss or gradient is not finite, count it, and leave
every tensor as it was.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m2d.errors import TrainingError
from m2d.models.autoencoder import Autoencoder
from m2d.models.discriminator import PatchDiscriminator
from m2d.models.feature_extractor import FeatureExtractor, Features
from m2d.models.projector import AlignmentProjector
from m2d.models.unet import Denoiser
from m2d.training.batch import Draws, ImageBatch, LatentBatch
from m2d.training.ema import Ema
from m2d.training.flops import count_flops
from m2d.training.gradients import GradientStatistics, gradient_statistics
from m2d.training.losses import adversarial_loss, discriminator_loss
from m2d.training.phases import AutoencoderPhase, DenoiserLosses, DenoiserPhase, frozen
from m2d.training.settings import AlignmentConfig, LossWeights, OptimizerConfig, Precision, ScheduleConfig
from m2d.training.update import Optimized, guarded_update, learning_rate

BatchT = TypeVar("BatchT", ImageBatch, LatentBatch)


@dataclass
class Networks:
    """What is trained, and what is frozen beside it."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    projector: AlignmentProjector
    extractor: FeatureExtractor | None  # None where every feature comes from the cache
    feature_dim: int  # D
    discriminator: PatchDiscriminator | None = None
    denoiser_is_new: bool = True  # not taken from a checkpoint, so its feature statistics are yet to be fitted

    def trained(self) -> dict[str, nn.Module]:
        """Name to module, of those that a checkpoint holds."""
        modules: dict[str, nn.Module] = {
            "autoencoder": self.autoencoder,
            "denoiser": self.denoiser,
            "projector": self.projector,
        }
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step needs to know of the run."""

    weights: LossWeights
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: Precision
    total_steps: int
    vae_warmup_steps: int = 0
    discriminator_start: int = 0
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    compile: bool = False

    def aligns(self, step: int) -> bool:
        """Whether the alignment still acts at a step. Source: HASTE (arXiv 2505.16792): help early, then let go."""
        return step < round(self.alignment.stop_fraction * self.total_steps)


class BaseStep(Generic[BatchT]):
    """The parts that the stages share: precision, DDP, the discriminator, the guarded update, EMA and the scalars."""

    def __init__(self, networks: Networks, config: StepConfig, device: torch.device, distributed: bool) -> None:
        self.networks = networks
        self.config = config
        self.device = device
        alignment = config.alignment
        self.denoiser_phase = DenoiserPhase(
            networks.denoiser, networks.projector, alignment.tap, alignment.spatial_norm
        )
        if config.compile:
            self.denoiser_phase.compile()
        self.ema = Ema(networks.denoiser, config.schedule.ema_decay, config.schedule.ema_warmup)
        self.optimized: dict[str, Optimized] = {}
        self._discriminator: nn.Module | None = networks.discriminator
        if networks.discriminator is not None and distributed:
            self._discriminator = parallel(networks.discriminator, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # a loss may join in the middle of an interval
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_row = torch.zeros((), device=device)
        self.watch_gradients = False  # whether the next step leaves `gradients` behind
        self.gradients: GradientStatistics | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward pass's precision."""
        if self.config.precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def read_scalars(self) -> dict[str, float]:
        """Means since the last call. The only place that waits for the device.

        Raises TrainingError where too many steps in a row were skipped, naming the losses that were not finite.
        """
        scalars = {name: (total / self._counts[name]).item() for name, total in self._sums.items()}
        scalars["skipped_steps"] = self.skipped.item()
        in_row = int(self.skipped_in_row.item())
        if in_row >= self.config.schedule.max_skipped_in_row:
            bad = [name for name, value in scalars.items() if not torch.isfinite(torch.tensor(value))]
            raise TrainingError(
                f"{in_row} steps in a row had a loss or gradient that is not finite ({', '.join(bad) or 'gradients'}); "
                "lower the learning rates or use --mixed_precision no, and run again to go on from the last checkpoint"
            )
        self._sums, self._counts = {}, {}
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: networks, EMA, optimisers, fp16 scaler, counters."""
        return {
            "networks": {name: module.state_dict() for name, module in self.networks.trained().items()},
            "ema": self.ema.state_dict(),
            "optimizers": {name: network.optimizer.state_dict() for name, network in self.optimized.items()},
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; strict."""
        for name, module in self.networks.trained().items():
            module.load_state_dict(state["networks"][name])
        self.ema.load_state_dict(state["ema"])
        for name, network in self.optimized.items():
            network.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped.copy_(state["skipped"])

    def _denoiser_total(self, flow: DenoiserLosses, step: int) -> Tensor:
        """The weighted sum. A stopped alignment weighs nothing, but stays in it: DDP waits for every gradient."""
        weights = self.config.weights
        alignment = weights.alignment if self.config.aligns(step) else 0.0
        return weights.diffusion * flow.diffusion + alignment * (flow.alignment + weights.manifold * flow.manifold)

    def flops(self, batch: BatchT, draws: Draws, step: int) -> int:
        """What forward and backward of a micro-batch take at `step`, by computing them once for nothing.

        On real tensors, because counting decomposes some operations and so rounds otherwise; what it leaves behind in
        gradients and statistics is taken back.
        """
        norm_before = self._norm_buffers()
        counted = count_flops(lambda: self.forward_backward(batch, draws.to(self.device), step, 1))
        for module in self.networks.trained().values():
            module.zero_grad(set_to_none=True)
        self._restore_norm(norm_before, torch.zeros((), dtype=torch.bool, device=self.device))
        return counted

    def forward_backward(self, batch: BatchT, draws: Draws, step: int, micro_batches: int) -> dict[str, Tensor]:
        """Forward and backward of one of `micro_batches`, draws on the device. Returns the unweighted losses."""
        raise NotImplementedError

    def _accumulate(
        self, micro_batches: Sequence[tuple[BatchT, Draws]], step: int, phases: Sequence[nn.Module | None]
    ) -> dict[str, Tensor]:
        """Forward and backward of every micro-batch; returns mean losses. phases: those that DDP may wrap."""
        totals: dict[str, Tensor] = {}
        for number, (batch, draws) in enumerate(micro_batches):
            with ExitStack() as stack:
                if number < len(micro_batches) - 1:  # gradients are added up here, and reduced over workers once
                    for phase in phases:
                        if isinstance(phase, DistributedDataParallel):
                            stack.enter_context(phase.no_sync())
                losses = self.forward_backward(batch, draws.to(self.device), step, len(micro_batches))
            for name, loss in losses.items():
                share = loss.detach() / len(micro_batches)
                totals[name] = totals[name] + share if name in totals else share
        return totals

    def _with_autoencoder(self, perceptual: nn.Module, distributed: bool) -> nn.Module:
        """The VAE's phase, as a stage that trains it calls it, and optimisers of what of it is not frozen."""
        networks, optimizer = self.networks, self.config.optimizer
        phase = AutoencoderPhase(networks.autoencoder, perceptual)
        if self.config.compile:
            phase.compile()
        self.optimized["autoencoder"] = Optimized(networks.autoencoder, optimizer, optimizer.lr_autoencoder)
        if networks.discriminator is not None:
            self.optimized["discriminator"] = Optimized(networks.discriminator, optimizer, optimizer.lr_discriminator)
        return parallel(phase, self.device) if distributed else phase

    def _adversarial(self, reconstructed: Tensor, step: int, losses: dict[str, Tensor]) -> Tensor | float:
        """The VAE's weighted loss against the frozen discriminator, nothing before its start; notes it in `losses`."""
        discriminator = self.networks.discriminator
        if discriminator is None:
            return 0.0
        with frozen(discriminator):
            losses["adversarial"] = adversarial_loss(discriminator(reconstructed))
        weight = self.config.weights.adversarial if step >= self.config.discriminator_start else 0.0
        return weight * losses["adversarial"]

    def _teach_discriminator(
        self, images: Tensor, reconstructed: Tensor, micro_batches: int, losses: dict[str, Tensor]
    ) -> None:
        """The discriminator's own forward and backward; notes its loss."""
        if self._discriminator is None:
            return
        with self.autocast():  # one call on both halves: DDP allows one forward a backward
            logits = self._discriminator(torch.cat([images, reconstructed.detach()]))
            losses["discriminator"] = discriminator_loss(*logits.chunk(2))
        self._backward(losses["discriminator"], micro_batches)

    def _backward(self, loss: Tensor, micro_batches: int) -> None:
        self.scaler.scale(loss / micro_batches).backward()

    def _finish(self, active: dict[str, Optimized], losses: dict[str, Tensor], norm_before: list[Tensor]) -> None:
        """Update the active networks, or undo what the forward passes changed, and add up the scalars."""
        accepted, norms = guarded_update(
            list(active.values()), torch.stack(list(losses.values())), self.scaler, self._look_at_gradients
        )
        self._restore_norm(norm_before, accepted)
        if "denoiser" in active:
            self.ema.update(self.networks.denoiser, accepted)
        self.skipped += (~accepted).float()
        self.skipped_in_row = torch.where(accepted, 0.0, self.skipped_in_row + 1)
        scalars = {f"loss/{name}": loss for name, loss in losses.items()}
        scalars |= {f"gradient_norm/{name}": norm for name, norm in zip(active, norms, strict=True)}
        for name, scalar in scalars.items():
            scalar = scalar.detach().float()
            self._sums[name] = self._sums[name] + scalar if name in self._sums else scalar
            self._counts[name] = self._counts.get(name, 0) + 1

    def _look_at_gradients(self) -> None:
        if self.watch_gradients:
            self.gradients = gradient_statistics(self.networks.trained())
            self.watch_gradients = False

    def _set_rate(self, name: str, step: int, first_step: int) -> None:
        network, config = self.optimized[name], self.config
        network.set_rate(learning_rate(config.optimizer, network.peak_rate, step, first_step, config.total_steps))

    def _restore_norm(self, before: list[Tensor], accepted: Tensor) -> None:
        """Statistics of the latent norm as they were, where `accepted` (0-dim bool on the device) is False."""
        latent_norm = self.networks.denoiser.latent_norm
        for buffer, value in zip((latent_norm.running_mean, latent_norm.running_var), before, strict=True):
            buffer.copy_(torch.where(accepted, buffer, value))

    def _norm_buffers(self) -> list[Tensor]:
        latent_norm = self.networks.denoiser.latent_norm
        return [latent_norm.running_mean.clone(), latent_norm.running_var.clone()]


class JointStep(BaseStep[ImageBatch]):
    """VAE and U-Net together. The diffusion loss never reaches the VAE; the alignment loss does."""

    def __init__(
        self,
        networks: Networks,
        perceptual: nn.Module,
        config: StepConfig,
        device: torch.device,
        distributed: bool = False,
    ) -> None:
        super().__init__(networks, config, device, distributed)
        self.optimized["denoiser"] = Optimized(self.denoiser_phase, config.optimizer, config.optimizer.lr_denoiser)
        self._autoencoder = self._with_autoencoder(perceptual, distributed)
        self._denoiser = parallel(self.denoiser_phase, device) if distributed else self.denoiser_phase

    def __call__(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> None:
        """One optimiser step over the micro-batches; `step` counts from 0 in the whole run."""
        norm_before = self._norm_buffers()
        totals = self._accumulate(micro_batches, step, (self._autoencoder, self._denoiser, self._discriminator))
        active = {"autoencoder": self.optimized["autoencoder"]}
        self._set_rate("autoencoder", step, 0)
        if step >= self.config.vae_warmup_steps:
            active["denoiser"] = self.optimized["denoiser"]
            self._set_rate("denoiser", step, self.config.vae_warmup_steps)
        if "discriminator" in self.optimized:
            active["discriminator"] = self.optimized["discriminator"]
            self._set_rate("discriminator", step, 0)
        self._finish(active, totals, norm_before)

    def forward_backward(self, batch: ImageBatch, draws: Draws, step: int, micro_batches: int) -> dict[str, Tensor]:
        """See BaseStep."""
        weights = self.config.weights
        warming = step < self.config.vae_warmup_steps
        pixels, images = model_images(batch, self.device)
        labels = batch.labels.to(self.device, non_blocking=True)
        with self.autocast():
            features = None if warming else self._features(batch, pixels)
            vae = self._autoencoder(images, draws.posterior)
            losses = {"reconstruction": vae.reconstruction, "perceptual": vae.perceptual, "kl": vae.kl}
            total = (
                weights.reconstruction * vae.reconstruction + weights.perceptual * vae.perceptual + weights.kl * vae.kl
            )
            if features is not None and weights.alignment_vae > 0 and self.config.aligns(step):
                losses["alignment_vae"] = self.denoiser_phase.align_autoencoder(vae.latents, labels, features, draws)
                total = total + weights.alignment_vae * losses["alignment_vae"]
            total = total + self._adversarial(vae.reconstructed, step, losses)
        self._backward(total, micro_batches)
        self._teach_discriminator(images, vae.reconstructed, micro_batches, losses)
        latents = vae.latents.detach()
        if features is None:
            self.networks.denoiser.latent_norm(latents)  # its statistics are ready when the U-Net joins
            return losses
        with self.autocast():
            flow = self._denoiser(latents, labels, features, draws)
        losses |= {"diffusion": flow.diffusion, "alignment": flow.alignment, "manifold": flow.manifold}
        self._backward(self._denoiser_total(flow, step), micro_batches)
        return losses

    def _features(self, batch: ImageBatch, pixels: Tensor) -> Features:
        if batch.features is not None:
            return on_device(batch.features, self.device)
        assert self.networks.extractor is not None, "no extractor and no cached features"
        return extract(self.networks.extractor, pixels)


class LatentStep(BaseStep[LatentBatch]):
    """The U-Net alone, on cached posteriors of a frozen VAE; the latent batch norm's statistics stay as they are."""

    def __init__(self, networks: Networks, config: StepConfig, device: torch.device, distributed: bool = False) -> None:
        super().__init__(networks, config, device, distributed)
        networks.autoencoder.requires_grad_(False)
        self.optimized["denoiser"] = Optimized(self.denoiser_phase, config.optimizer, config.optimizer.lr_denoiser)
        self._denoiser = parallel(self.denoiser_phase, device) if distributed else self.denoiser_phase

    def __call__(self, micro_batches: Sequence[tuple[LatentBatch, Draws]], step: int) -> None:
        """One optimiser step over the micro-batches."""
        norm_before = self._norm_buffers()
        totals = self._accumulate(micro_batches, step, (self._denoiser,))
        self._set_rate("denoiser", step, 0)
        self._finish(self.optimized, totals, norm_before)

    def forward_backward(self, batch: LatentBatch, draws: Draws, step: int, micro_batches: int) -> dict[str, Tensor]:
        """See BaseStep."""
        mean, std, labels = (
            tensor.to(self.device, non_blocking=True) for tensor in (batch.mean, batch.std, batch.labels)
        )
        features = on_device(batch.features, self.device)
        latents = mean.float() + std.float() * draws.posterior
        with self.autocast():
            flow = self._denoiser(latents, labels, features, draws, False)
        self._backward(self._denoiser_total(flow, step), micro_batches)
        return {"diffusion": flow.diffusion, "alignment": flow.alignment, "manifold": flow.manifold}


@torch.no_grad()
def extract(extractor: FeatureExtractor, pixels: Tensor) -> Features:
    """Features of uint8 images [B, 3, H, W] in float32."""
    features: Features = extractor(extractor.preprocess(pixels))
    return Features(cls=features.cls.float(), patches=features.patches.float())


def model_images(batch: ImageBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch's images on the device, [B, 3, H, W]: uint8 as they are, and float32 in [-1, 1]."""
    pixels = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return pixels, pixels.float() / 127.5 - 1.0


def on_device(features: Features, device: torch.device) -> Features:
    """Features, cached ones in fp16 among them, as float32 on a device."""
    return Features(
        cls=features.cls.to(device, non_blocking=True).float(),
        patches=features.patches.to(device, non_blocking=True).float(),
    )


def parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module as DDP wants it here: one forward a backward, no buffers sent around."""
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,  # the only buffers that move are the latent norm's, already equal on every worker
        gradient_as_bucket_view=True,
    )
