"""One training step, in pure torch: runs in a test, a notebook or a bare GPU box as well as in a Ray worker.

`JointStep` trains VAE and U-Net together as REPA-E does (arXiv 2504.10483), `LatentStep` the U-Net alone on cached
posteriors, `DecoderStep` the VAE's decoder alone. All skip a step whose loss or gradient is not finite, count it, and
leave every tensor as it was. Each part's backward pass follows as soon as its loss is known, so that no two parts'
activations are kept at the same time.
"""

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m2d.errors import TrainingError
from m2d.models.autoencoder import Autoencoder, from_uint8
from m2d.models.extractors import FeatureExtractor, Features
from m2d.models.perceptual import PatchDiscriminator
from m2d.models.precision import DTYPES
from m2d.models.settings import Precision
from m2d.models.unet import AlignmentProjector, Denoiser
from m2d.training.batch import Draws, ImageBatch, LatentBatch
from m2d.training.losses import adversarial_loss, discriminator_loss, reconstruction_loss
from m2d.training.measure import GradientStatistics, count_flops, gradient_statistics
from m2d.training.phases import AutoencoderPhase, DenoiserLosses, DenoiserPhase, frozen, sample
from m2d.training.settings import AlignmentConfig, LossWeights, OptimizerConfig, ScheduleConfig
from m2d.training.update import Ema, Optimized, guarded_update, learning_rate

BatchT = TypeVar("BatchT", ImageBatch, LatentBatch)
MicroBatchT = TypeVar("MicroBatchT")


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
    compile: Mapping[str, Any] | None = None  # what torch.compile is given; None: networks run eagerly

    def trains_autoencoder(self, step: int) -> bool:
        """Whether the joint stage updates the VAE at a step: each one of its warm-up, then every k-th."""
        joint = step - self.vae_warmup_steps
        return joint < 0 or joint % self.schedule.vae_every_k_steps == 0

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
        if config.compile is not None:
            self.denoiser_phase.compile(**config.compile)
        schedule = config.schedule
        ema_device = torch.device("cpu") if schedule.ema_on_cpu else None
        self.ema = Ema(networks.denoiser, schedule.ema_decay, schedule.ema_warmup, ema_device)
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

    def __call__(self, micro_batches: Sequence[tuple[BatchT, Draws]], step: int) -> None:
        """One optimiser step over the micro-batches; `step` counts from 0 in the whole run."""
        norm_before = self._norm_buffers()
        losses = self.forward_backward(micro_batches, step)
        starts, config = self._learning(step), self.config
        active = {name: self.optimized[name] for name in starts}
        for name, network in active.items():
            rate = learning_rate(config.optimizer, network.peak_rate, step, starts[name], config.total_steps)
            for group in network.optimizer.param_groups:
                group["lr"] = rate

        def look_at_gradients() -> None:
            if self.watch_gradients:
                self.gradients = gradient_statistics(self.networks.trained())
                self.watch_gradients = False

        accepted, norms = guarded_update(
            list(active.values()), torch.stack(list(losses.values())), self.scaler, look_at_gradients
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

    def _learning(self, step: int) -> dict[str, int]:
        """The networks that learn at a step, and the step from which on each does."""
        return dict.fromkeys(self.optimized, 0)

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward pass's precision."""
        if self.config.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.config.precision])

    def read_scalars(self) -> dict[str, float]:
        """Means since the last call. The only place that waits for the device.

        Raises TrainingError where too many steps in a row were skipped, naming the losses that were not finite.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        means |= {"skipped_steps": self.skipped, "in_row": self.skipped_in_row}
        scalars: dict[str, float] = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        in_row = int(scalars.pop("in_row"))
        if in_row >= self.config.schedule.max_skipped_in_row:
            bad = [name for name, value in scalars.items() if not torch.isfinite(torch.tensor(value))]
            raise TrainingError(
                f"{in_row} steps in a row had a loss or gradient that is not finite ({', '.join(bad) or 'gradients'}); "
                "lower the learning rates or use --mixed_precision no, and run again to resume from the last checkpoint"
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

    def kind(self, step: int) -> Hashable:
        """Steps of one kind do the same work."""
        return ()

    def flops(self, batch: BatchT, draws: Draws, step: int) -> int:
        """What forward and backward of a micro-batch take at `step`, by computing them once for nothing.

        On real tensors, because counting decomposes some operations and so rounds otherwise; what it leaves behind in
        gradients and statistics is taken back.
        """
        norm_before = self._norm_buffers()
        counted = count_flops(lambda: self.forward_backward([(batch, draws)], step))
        for module in self.networks.trained().values():
            module.zero_grad(set_to_none=True)
        self._restore_norm(norm_before, torch.zeros((), dtype=torch.bool, device=self.device))
        return counted

    def forward_backward(self, micro_batches: Sequence[tuple[BatchT, Draws]], step: int) -> dict[str, Tensor]:
        """Forward and backward passes of a step's micro-batches. Returns the unweighted losses, means over them."""
        raise NotImplementedError

    def _in_turn(self, micro_batches: Sequence[MicroBatchT], *phases: nn.Module | None) -> Iterator[MicroBatchT]:
        """The micro-batches. Gradients are added up here and reduced over workers once, in the last one.

        phases: those that DDP may wrap, each called once a micro-batch.
        """
        for number, micro_batch in enumerate(micro_batches, start=1):
            with ExitStack() as stack:
                for phase in phases:
                    if number < len(micro_batches) and isinstance(phase, DistributedDataParallel):
                        stack.enter_context(phase.no_sync())
                yield micro_batch

    def _with_autoencoder(self, perceptual: nn.Module, distributed: bool) -> nn.Module:
        """The VAE's phase, as a stage that trains it calls it, and optimisers of what of it is not frozen."""
        networks, optimizer = self.networks, self.config.optimizer
        self.perceptual = perceptual
        phase = AutoencoderPhase(networks.autoencoder)
        if self.config.compile is not None:  # not the whole phase: its graph is cut in the middle
            networks.autoencoder.vae.encoder.compile(**self.config.compile)
            networks.autoencoder.vae.decoder.compile(**self.config.compile)
        self.optimized["autoencoder"] = Optimized(networks.autoencoder, optimizer, optimizer.lr_autoencoder)
        if networks.discriminator is not None:
            self.optimized["discriminator"] = Optimized(networks.discriminator, optimizer, optimizer.lr_discriminator)
        return parallel(phase, self.device) if distributed else phase

    def _decoder_backward(
        self, images: Tensor, reconstructed: Tensor, step: int, micro_batches: int
    ) -> dict[str, Tensor]:
        """Losses of the reconstructions and the discriminator's own, and their backward passes, as far as the latents.

        Each loss leaves its gradient at the pixels; the decoder takes the sum of them.
        """
        weights, discriminator = self.config.weights, self.networks.discriminator
        drawn = reconstructed.detach().requires_grad_()
        with self.autocast():
            losses = {"reconstruction": reconstruction_loss(drawn, images)}
        self._backward(weights.reconstruction * losses["reconstruction"], micro_batches)
        with self.autocast():
            losses["perceptual"] = self.perceptual(drawn, images).float().mean()
        self._backward(weights.perceptual * losses["perceptual"], micro_batches)
        if discriminator is not None:
            acts = step >= self.config.discriminator_start
            with frozen(discriminator), torch.set_grad_enabled(acts):
                with self.autocast():
                    losses["adversarial"] = adversarial_loss(discriminator(drawn))
                if acts:
                    self._backward(weights.adversarial * losses["adversarial"], micro_batches)
        reconstructed.backward(drawn.grad)
        if self._discriminator is not None:
            with self.autocast():  # one call on both halves: DDP allows one forward a backward
                logits = self._discriminator(torch.cat([images, drawn.detach()]))
                losses["discriminator"] = discriminator_loss(*logits.chunk(2))
            self._backward(losses["discriminator"], micro_batches)
        return losses

    def _backward(self, loss: Tensor, micro_batches: int) -> None:
        self.scaler.scale(loss / micro_batches).backward()

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

    def kind(self, step: int) -> Hashable:
        """See BaseStep: whether the U-Net joins, and whether the VAE learns."""
        return step < self.config.vae_warmup_steps, self.config.trains_autoencoder(step)

    def _learning(self, step: int) -> dict[str, int]:
        """See BaseStep."""
        joins = {"denoiser": self.config.vae_warmup_steps}
        if not self.config.trains_autoencoder(step):
            return joins
        return {name: start for name, start in (super()._learning(step) | joins).items() if step >= start}

    def forward_backward(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> dict[str, Tensor]:
        """See BaseStep. The U-Net's half waits for the latents of all micro-batches, whose statistics it takes."""
        losses = Means(len(micro_batches))
        encoded = [
            self._autoencoder_half(*micro_batch, step, losses)
            for micro_batch in self._in_turn(micro_batches, self._autoencoder, self._discriminator)
        ]
        # However a step is divided, it normalises by the same numbers.
        clean = self.networks.denoiser.latent_norm(torch.cat([latents for latents, _ in encoded]))
        if step < self.config.vae_warmup_steps:
            return losses.values  # the norm's statistics are ready when the U-Net joins
        shares = clean.split([len(latents) for latents, _ in encoded])
        halves = [
            (*micro_batch, share, features) for micro_batch, share, (_, features) in zip(micro_batches, shares, encoded)
        ]
        for batch, draws, share, features in self._in_turn(halves, self._denoiser):
            assert features is not None
            labels = batch.labels.to(self.device, non_blocking=True)
            with self.autocast():
                flow = self._denoiser(share, labels, features, draws)
            losses.add(vars(flow))
            self._backward(self._denoiser_total(flow, step), len(micro_batches))
        return losses.values

    def _autoencoder_half(
        self, batch: ImageBatch, draws: Draws, step: int, losses: "Means"
    ) -> tuple[Tensor, Features | None]:
        """Steps 1 to 3 of the VAE's half, with its backward passes. Returns detached latents [B, C, h, w], features."""
        config, weights, parts = self.config, self.config.weights, losses.parts
        pixels, images = model_images(batch, self.device)
        features = None if step < config.vae_warmup_steps else self._features(batch, pixels)
        if not config.trains_autoencoder(step):
            with torch.no_grad(), self.autocast():
                return sample(self.networks.autoencoder.encode(images), draws.posterior), features
        with self.autocast():
            vae = self._autoencoder(images, draws.posterior)
        losses.add({"kl": vae.kl, **self._decoder_backward(images, vae.reconstructed, step, parts)})
        if features is not None and weights.alignment_vae > 0 and config.aligns(step):
            latents, labels = vae.decoder_input, batch.labels.to(self.device, non_blocking=True)
            with frozen(self.denoiser_phase):
                with self.autocast():
                    alignment = self.denoiser_phase.align_autoencoder(latents, labels, features, draws)
                self._backward(weights.alignment_vae * alignment, parts)
            losses.add({"alignment_vae": alignment})
        divergence = self.scaler.scale(weights.kl * vae.kl / parts)
        torch.autograd.backward([vae.latents, divergence], [vae.decoder_input.grad, None])
        return vae.latents.detach(), features

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

    def forward_backward(self, micro_batches: Sequence[tuple[LatentBatch, Draws]], step: int) -> dict[str, Tensor]:
        """See BaseStep."""
        losses = Means(len(micro_batches))
        for batch, draws in self._in_turn(micro_batches, self._denoiser):
            mean, std, labels = (
                tensor.to(self.device, non_blocking=True) for tensor in (batch.mean, batch.std, batch.labels)
            )
            features = on_device(batch.features, self.device)
            clean = self.networks.denoiser.normalize(mean.float() + std.float() * draws.posterior)
            with self.autocast():
                flow = self._denoiser(clean, labels, features, draws)
            losses.add(vars(flow))
            self._backward(self._denoiser_total(flow, step), len(micro_batches))
        return losses.values


class Means:
    """Losses, each the mean over the micro-batches of a step."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.values: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Those of one micro-batch."""
        for name, loss in losses.items():
            share = loss.detach() / self.parts
            self.values[name] = self.values[name] + share if name in self.values else share


@torch.no_grad()
def extract(extractor: FeatureExtractor, pixels: Tensor) -> Features:
    """Features of uint8 images [B, 3, H, W], computed in float32: as statistics, prior and caches have them.

    In bf16 EfficientNet-Lite0's are another network's: 9 % off, rms.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        features: Features = extractor(extractor.preprocess(pixels))
    return Features(cls=features.cls.float(), patches=features.patches.float())


def model_images(batch: ImageBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch's images on the device, [B, 3, H, W]: uint8 as they are, and float32 in [-1, 1]."""
    pixels = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return pixels, from_uint8(pixels)


def on_device(features: Features, device: torch.device) -> Features:
    """Features, cached ones in fp16 among them, as float32 on a device."""
    return Features(
        cls=features.cls.to(device, non_blocking=True).float(),
        patches=features.patches.to(device, non_blocking=True).float(),
    )


def parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module as DDP wants it here: one forward a backward, no buffers sent around."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    before_2_15 = "forward_sync_buffers" not in parameters
    settings: dict[str, Any] = {
        # The only buffers that move are the latent norm's, already equal on every worker.
        "broadcast_buffers" if before_2_15 else "forward_sync_buffers": False,
        "device_ids": [device] if device.type == "cuda" else None,
        "gradient_as_bucket_view": True,
    }
    return DistributedDataParallel(module, **settings)


class DecoderStep(BaseStep[ImageBatch]):
    """Reconstruction, perceptual and adversarial loss on the decoder (and its 1 x 1 convolution in front) alone.

    Source: latent diffusion's first stage (arXiv 2112.10752, appendix G) with its encoder frozen, as the decoders that
    were tuned for Stable Diffusion's latents were made.
    """

    def __init__(
        self,
        networks: Networks,
        perceptual: nn.Module,
        config: StepConfig,
        device: torch.device,
        distributed: bool = False,
    ) -> None:
        vae = networks.autoencoder.vae
        for module in (vae.encoder, vae.quant_conv, networks.denoiser, networks.projector):
            if module is not None:
                module.requires_grad_(False)
        super().__init__(networks, config, device, distributed)
        self._autoencoder = self._with_autoencoder(perceptual, distributed)

    def forward_backward(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> dict[str, Tensor]:
        """See BaseStep."""
        losses = Means(len(micro_batches))
        for batch, draws in self._in_turn(micro_batches, self._autoencoder, self._discriminator):
            _, images = model_images(batch, self.device)
            with self.autocast():
                reconstructed = self._autoencoder(images, draws.posterior).reconstructed
            losses.add(self._decoder_backward(images, reconstructed, step, len(micro_batches)))
        return losses.values
