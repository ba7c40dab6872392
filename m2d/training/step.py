"""One training step, in pure torch: runs in a test, a notebook or a bare GPU box as well as in a Ray worker.

`JointStep` trains VAE and U-Net together as REPA-E does (arXiv 2504.10483), `LatentStep` the U-Net alone on cached
posteriors, `DecoderStep` the VAE's decoder alone. All skip a step whose loss or gradient is not finite, count it, and
leave every tensor as it was. Each part's backward pass follows as soon as its loss is known, so that no two parts'
activations are kept at the same time.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m2d.errors import TrainingError
from m2d.models.autoencoder import from_uint8
from m2d.models.extractors import Features
from m2d.models.perceptual import FeatureDistance, LpipsDistance, ProjectedDiscriminator
from m2d.models.precision import DTYPES
from m2d.models.settings import Precision
from m2d.training.batch import Draws, ImageBatch, LatentBatch, extract, on_device
from m2d.training.ema import Ema
from m2d.training.losses import (
    AutoencoderPhase,
    DenoiserPhase,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
    frozen,
    reconstruction_loss,
)
from m2d.training.measure import GradientStatistics, add_up, count_flops, gradient_statistics
from m2d.training.networks import Networks, all_reduce_sum
from m2d.training.settings import OptimizerConfig, TrainConfig

BatchT = TypeVar("BatchT", ImageBatch, LatentBatch)
MicroBatchT = TypeVar("MicroBatchT")


@dataclass(frozen=True)
class StepConfig:
    """What the step needs to know of the run."""

    run: TrainConfig
    precision: Precision
    total_steps: int
    vae_warmup_steps: int = 0

    def trains_autoencoder(self, step: int) -> bool:
        """Whether the joint stage updates the VAE at a step: each one of its warm-up, then every k-th."""
        joint = step - self.vae_warmup_steps
        return joint < 0 or joint % self.run.schedule.vae_every_k_steps == 0

    def aligns(self, step: int) -> bool:
        """Whether the alignment still acts at a step. Source: HASTE (arXiv 2505.16792): help early, then let go."""
        return step < round(self.run.alignment.stop_fraction * self.total_steps)

    @property
    def compile(self) -> dict[str, Any] | None:
        """What torch.compile is given; None: networks run eagerly."""
        return {"mode": self.run.compile_mode} if self.run.compile else None


def learning_rate(config: OptimizerConfig, peak: float, step: int, first_step: int, total_steps: int) -> float:
    """Rate at `step` for a network that learns from `first_step` on: linear warm-up, then constant or cosine."""
    local, span = step - first_step, max(total_steps - first_step, 1)
    warm = min(1.0, (local + 1) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return peak * warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(local / span, 0.0), 1.0)))
    return peak * warm * (config.final_fraction + (1 - config.final_fraction) * cosine)


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimiser of what of a network is not frozen. Its fused kernel skips the update where found_inf is 1."""
    learns = [parameter for parameter in module.parameters() if parameter.requires_grad]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(learns, betas=betas, weight_decay=config.weight_decay, fused=True)


def load_moments(optimizer: torch.optim.AdamW, state: dict[str, Any]) -> None:
    """The optimiser's state, its moments laid out in memory as their parameters are.

    The fused kernel walks parameter and moments side by side through memory: a channels_last parameter beside
    contiguous moments, as they come from a file, would be updated with other elements' moments.
    """
    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        for name, moment in entry.items():
            if moment.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter).copy_(moment)


def guarded_update(
    optimizers: Sequence[Any], losses: Tensor, scaler: torch.amp.GradScaler, clip_norm: float, look: Callable[[], None]
) -> tuple[Tensor, list[Tensor]]:
    """Step every optimiser, or none where a loss or a gradient is not finite on any worker; the host never waits.

    losses: 1-D, every loss of the step. look: called once the gradients are on their true scale and not yet clipped.
    Returns (accepted: 0-dim bool, gradient norms before clipping, one a network). Every parameter and optimiser state
    is left as it was where accepted is False.
    """
    norms = []
    finite = torch.isfinite(losses.detach()).all()
    if scaler.is_enabled():
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    look()
    for optimizer in optimizers:
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
        norms.append(norm)
        finite = finite & torch.isfinite(norm)
    # A loss can be non-finite on one worker alone.
    rejected = all_reduce_sum((~finite).float()).clamp(max=1).reshape(())
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = None, rejected
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler.is_enabled():
        scaler.update()
    return rejected == 0, norms


class BaseStep(Generic[BatchT]):
    """What the stages share: precision, DDP, the losses of the decoder, the guarded update, EMA and the scalars."""

    trains: ClassVar[tuple[str, ...]]  # `denoiser`, `autoencoder` or both

    def __init__(
        self,
        networks: Networks,
        perceptual: FeatureDistance | LpipsDistance,
        config: StepConfig,
        device: torch.device,
        distributed: bool = False,
    ) -> None:
        self.networks, self.perceptual, self.config, self.device = networks, perceptual, config, device
        optimizer, schedule, discriminator = config.run.optimizer, config.run.schedule, networks.discriminator
        alignment = config.run.alignment
        if "autoencoder" not in self.trains:
            networks.autoencoder.requires_grad_(False)
        if "denoiser" not in self.trains:
            for module in (*networks.autoencoder.encoder_parts, networks.denoiser, networks.projector):
                module.requires_grad_(False)
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.denoiser_phase = DenoiserPhase(
            networks.denoiser, networks.projector, alignment.tap, alignment.spatial_norm
        )
        # The phases as they are called: DDP may wrap them.
        self._denoiser: nn.Module = self.denoiser_phase
        self._autoencoder: nn.Module = AutoencoderPhase(networks.autoencoder)
        self._discriminator: nn.Module | None = discriminator
        if config.compile is not None:
            self.denoiser_phase.compile(**config.compile)
        if "denoiser" in self.trains:
            self.optimizers["denoiser"] = adamw(self.denoiser_phase, optimizer)
            self._denoiser = parallel(self._denoiser, device) if distributed else self._denoiser
        if "autoencoder" in self.trains:
            if config.compile is not None:  # not the whole phase: its graph is cut in the middle
                networks.autoencoder.vae.encoder.compile(**config.compile)
                decoder: Any = networks.autoencoder.vae.decoder
                if isinstance(discriminator, ProjectedDiscriminator):
                    # A compiled decoder has one backward pass for all of it; `_balanced` asks the last layer alone.
                    decoder.conv_out.forward = torch.compiler.disable(decoder.conv_out.forward)
                decoder.compile(**config.compile)
            self.optimizers["autoencoder"] = adamw(networks.autoencoder, optimizer)
            self._autoencoder = parallel(self._autoencoder, device) if distributed else self._autoencoder
            if discriminator is not None:
                self.optimizers["discriminator"] = adamw(discriminator, optimizer)
                self._discriminator = parallel(discriminator, device) if distributed else discriminator
        ema_device = torch.device("cpu") if schedule.ema_on_cpu else None
        self.ema = Ema(networks.denoiser, schedule.ema_decay, schedule.ema_warmup, ema_device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # a loss may join in the middle of an interval
        self._pulls: dict[str, Tensor] = {}  # of a step: gradients at the decoder's last layer, see `_balanced`
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_row = torch.zeros((), device=device)
        self.watch_gradients = False  # whether the next step leaves `gradients` behind
        self.gradients: GradientStatistics | None = None

    def __call__(self, micro_batches: Sequence[tuple[BatchT, Draws]], step: int) -> None:
        """One optimiser step over the micro-batches; `step` counts from 0 in the whole run."""
        norm_before = self._norm_state()
        self._pulls = {}
        losses = self.forward_backward(micro_batches, step)
        starts, config = self._learning(step), self.config
        active = {name: self.optimizers[name] for name in starts}
        for name, optimizer in active.items():
            peak: float = getattr(config.run.optimizer, f"lr_{name}")
            rate = learning_rate(config.run.optimizer, peak, step, starts[name], config.total_steps)
            optimizer.param_groups[0]["lr"] = rate

        def look_at_gradients() -> None:
            if self.watch_gradients:
                self.gradients = gradient_statistics(self.networks.trained())
                self.watch_gradients = False

        every_loss, clip_norm = torch.stack(list(losses.values())), config.run.optimizer.clip_norm
        accepted, norms = guarded_update(list(active.values()), every_loss, self.scaler, clip_norm, look_at_gradients)
        self._restore_norm(norm_before, accepted)
        if self._pulls:
            self._weigh_adversary(accepted)
        if "denoiser" in active:
            self.ema.update(self.networks.denoiser, accepted)
        self.skipped += (~accepted).float()
        self.skipped_in_row = torch.where(accepted, 0.0, self.skipped_in_row + 1)
        scalars = {f"loss/{name}": loss for name, loss in losses.items()}
        scalars |= {f"gradient_norm/{name}": norm for name, norm in zip(active, norms, strict=True)}
        if isinstance(self.networks.discriminator, ProjectedDiscriminator):
            scalars["adaptive_weight"] = self.networks.discriminator.adaptive_weight
        for name, scalar in scalars.items():
            add_up(self._sums, name, scalar.detach().float())
            self._counts[name] = self._counts.get(name, 0) + 1

    def forward_backward(self, micro_batches: Sequence[tuple[BatchT, Draws]], step: int) -> dict[str, Tensor]:
        """Forward and backward passes of a step's micro-batches. Returns the unweighted losses, means over them."""
        raise NotImplementedError

    def _learning(self, step: int) -> dict[str, int]:
        """The networks that learn at a step, and the step from which on each does."""
        return dict.fromkeys(self.optimizers, 0)

    def kind(self, step: int) -> Hashable:
        """Steps of one kind do the same work."""
        return ()

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward pass's precision."""
        if self.config.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.config.precision])

    def read_scalars(self) -> dict[str, float]:
        """Means since the last call. The only place that waits for the device.

        Raises TrainingError where all steps, or too many in a row, were skipped, naming the losses not finite.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        means |= {"skipped_steps": self.skipped, "in_row": self.skipped_in_row}
        scalars: dict[str, float] = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        in_row = int(scalars.pop("in_row"))
        every = scalars["skipped_steps"] >= self.config.total_steps  # of a short run: it has not trained
        if every or in_row >= self.config.run.schedule.max_skipped_in_row:
            bad = [name for name, value in scalars.items() if not math.isfinite(value)]
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
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; strict."""
        for name, module in self.networks.trained().items():
            module.load_state_dict(state["networks"][name])
        self.ema.load_state_dict(state["ema"])
        for name, optimizer in self.optimizers.items():
            load_moments(optimizer, state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped.copy_(state["skipped"])

    def flops(self, batch: BatchT, draws: Draws, step: int) -> int:
        """What forward and backward of a micro-batch take at `step`, by computing them once for nothing.

        On real tensors, because counting decomposes some operations and so rounds otherwise; what it leaves behind in
        gradients and statistics is taken back.
        """
        norm_before = self._norm_state()
        counted = count_flops(lambda: self.forward_backward([(batch, draws)], step))
        for module in self.networks.trained().values():
            module.zero_grad(set_to_none=True)
        self._restore_norm(norm_before, torch.zeros((), dtype=torch.bool, device=self.device))
        return counted

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

    def _denoiser_half(
        self, clean: Tensor, labels: Tensor, features: Features, draws: Draws, step: int, losses: "_Means"
    ) -> None:
        """The U-Net's losses on normalised latents, and their backward pass."""
        weights = self.config.run.loss_weights
        with self.autocast():
            flow = self._denoiser(clean, labels.to(self.device, non_blocking=True), features, draws)
        losses.add(flow)
        # A stopped alignment weighs nothing, but stays in the sum: DDP waits for every gradient.
        alignment = weights.alignment if self.config.aligns(step) else 0.0
        aligned = alignment * (flow["alignment"] + weights.manifold * flow["manifold"])
        self._backward(weights.diffusion * flow["diffusion"] + aligned, losses.parts)

    def _decoder_backward(
        self, images: Tensor, reconstructed: Tensor, step: int, micro_batches: int
    ) -> dict[str, Tensor]:
        """Losses of the reconstructions and the discriminator's own, and their backward passes, as far as the latents.

        Each loss leaves its gradient at the pixels; the decoder takes the sum of them.
        """
        weights, discriminator = self.config.run.loss_weights, self.networks.discriminator
        drawn = reconstructed.detach().requires_grad_()
        with self.autocast():
            losses = {"reconstruction": reconstruction_loss(drawn, images)}
        self._backward(weights.reconstruction * losses["reconstruction"], micro_batches)
        # What perceptual loss and discriminator look at: the images, or maps of them that both share.
        maps = None
        if isinstance(discriminator, ProjectedDiscriminator):
            assert self.perceptual.maps is not None, "build_perceptual was not told of the projected discriminator"
            with torch.no_grad():
                of_images = self.perceptual.maps(images)
            maps = (self.perceptual.maps(drawn), of_images)
        with self.autocast():
            distance = self.perceptual(drawn, images) if maps is None else self.perceptual(drawn, images, maps)
            losses["perceptual"] = distance.float().mean()
        self._backward(weights.perceptual * losses["perceptual"], micro_batches, retain_graph=maps is not None)
        if discriminator is not None:
            acts = step >= self.config.run.discriminator.start_step
            with frozen(discriminator), torch.set_grad_enabled(acts):
                with self.autocast():
                    losses["adversarial"] = adversarial_loss(discriminator(drawn if maps is None else maps[0]))
                if acts:
                    if maps is None:
                        self._backward(weights.adversarial * losses["adversarial"], micro_batches)
                    else:
                        self._balanced(losses["adversarial"], reconstructed, drawn, micro_batches)
        reconstructed.backward(drawn.grad)
        if self._discriminator is not None:
            with self.autocast():  # one call on both halves: DDP allows one forward a backward
                both: Any = torch.cat([images, drawn.detach()])
                if maps is not None:
                    both = [torch.cat([real, made.detach()]) for made, real in zip(*maps, strict=True)]
                losses["discriminator"] = discriminator_loss(*self._discriminator(both).chunk(2))
            self._backward(losses["discriminator"], micro_batches)
        return losses

    def _backward(self, loss: Tensor, micro_batches: int, *, retain_graph: bool = False) -> None:
        self.scaler.scale(loss / micro_batches).backward(retain_graph=retain_graph)

    def _balanced(self, loss: Tensor, reconstructed: Tensor, drawn: Tensor, micro_batches: int) -> None:
        """Add the adversarial loss's gradient at the pixels to that of the others, by weights and adaptive weight.

        What each pulls at the decoder's last layer is kept for `_weigh_adversary`: only that layer's weights take a
        backward pass here, and DDP hears nothing of it.
        """
        discriminator = self.networks.discriminator
        assert isinstance(discriminator, ProjectedDiscriminator)
        pointwise, drawn.grad = drawn.grad, None
        self._backward(loss, micro_batches)
        decoder: Any = self.networks.autoencoder.vae.decoder
        adversarial, last = drawn.grad, decoder.conv_out.weight
        assert pointwise is not None
        assert adversarial is not None
        for name, pull in {"pointwise": pointwise, "adversarial": adversarial}.items():
            (at_last,) = torch.autograd.grad(reconstructed, last, pull, retain_graph=True)
            add_up(self._pulls, name, at_last)
        drawn.grad = pointwise + self.config.run.loss_weights.adversarial * discriminator.adaptive_weight * adversarial

    def _weigh_adversary(self, accepted: Tensor) -> None:
        """The next step's adaptive weight, of this one's gradients over all micro-batches and workers.

        VQGAN weighs each batch by its own; so a step would depend on how it is divided.
        """
        discriminator = self.networks.discriminator
        assert isinstance(discriminator, ProjectedDiscriminator)
        pulls = all_reduce_sum(torch.stack([self._pulls["pointwise"], self._pulls["adversarial"]]))
        weight = discriminator.adaptive_weight
        weight.copy_(torch.where(accepted, adaptive_weight(pulls[0], pulls[1]), weight))

    def _pixels(self, batch: ImageBatch) -> Tensor:
        return batch.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)

    def _norm_state(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.networks.denoiser.latent_norm.named_buffers()}

    def _restore_norm(self, before: dict[str, Tensor], accepted: Tensor) -> None:
        """Statistics of the latent norm as they were, where `accepted` (0-dim bool on the device) is False."""
        for name, buffer in self.networks.denoiser.latent_norm.named_buffers():
            buffer.copy_(torch.where(accepted, buffer, before[name]))


class _Means:
    """Losses, each the mean over the micro-batches of a step."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.values: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Those of one micro-batch."""
        for name, loss in losses.items():
            add_up(self.values, name, loss.detach() / self.parts)


class JointStep(BaseStep[ImageBatch]):
    """VAE and U-Net together. The diffusion loss never reaches the VAE; the alignment loss does."""

    trains = ("denoiser", "autoencoder")

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
        losses = _Means(len(micro_batches))
        encoded = [
            self._autoencoder_half(*micro_batch, step, losses)
            for micro_batch in self._in_turn(micro_batches, self._autoencoder, self._discriminator)
        ]
        # However a step is divided, it normalises by the same numbers.
        clean = self.networks.denoiser.latent_norm(torch.cat([latents for latents, _ in encoded]))
        if step < self.config.vae_warmup_steps:
            return losses.values  # the norm's statistics are ready when the U-Net joins
        shares = clean.split([len(latents) for latents, _ in encoded])
        halves = list(zip(micro_batches, shares, encoded, strict=True))
        for (batch, draws), share, (_, features) in self._in_turn(halves, self._denoiser):
            assert features is not None
            self._denoiser_half(share, batch.labels, features, draws, step, losses)
        return losses.values

    def _autoencoder_half(
        self, batch: ImageBatch, draws: Draws, step: int, losses: _Means
    ) -> tuple[Tensor, Features | None]:
        """Steps 1 to 3 of the VAE's half, with its backward passes. Returns detached latents [B, C, h, w], features."""
        config, weights, parts = self.config, self.config.run.loss_weights, losses.parts
        pixels = self._pixels(batch)
        images = from_uint8(pixels)
        features = None if step < config.vae_warmup_steps else self._features(batch, pixels)
        if not config.trains_autoencoder(step):
            with torch.no_grad(), self.autocast():
                posterior = self.networks.autoencoder.encode(images)
                return posterior.mean.float() + posterior.std.float() * draws.posterior, features
        with self.autocast():
            kl, latents, decoder_input, reconstructed = self._autoencoder(images, draws.posterior)
        losses.add({"kl": kl, **self._decoder_backward(images, reconstructed, step, parts)})
        if features is not None and weights.alignment_vae > 0 and config.aligns(step):
            labels = batch.labels.to(self.device, non_blocking=True)
            with frozen(self.denoiser_phase):
                with self.autocast():
                    alignment = self.denoiser_phase.align_autoencoder(decoder_input, labels, features, draws)
                self._backward(weights.alignment_vae * alignment, parts)
            losses.add({"alignment_vae": alignment})
        divergence = self.scaler.scale(weights.kl * kl / parts)
        torch.autograd.backward([latents, divergence], [decoder_input.grad, None])
        return latents.detach(), features

    def _features(self, batch: ImageBatch, pixels: Tensor) -> Features:
        if batch.features is not None:
            return on_device(batch.features, self.device)
        assert self.networks.extractor is not None, "no extractor and no cached features"
        return extract(self.networks.extractor, pixels)


class LatentStep(BaseStep[LatentBatch]):
    """The U-Net alone, on cached posteriors of a frozen VAE; the latent batch norm's statistics stay as they are."""

    trains = ("denoiser",)

    def forward_backward(self, micro_batches: Sequence[tuple[LatentBatch, Draws]], step: int) -> dict[str, Tensor]:
        """See BaseStep."""
        losses = _Means(len(micro_batches))
        for batch, draws in self._in_turn(micro_batches, self._denoiser):
            mean, std = (tensor.to(self.device, non_blocking=True).float() for tensor in (batch.mean, batch.std))
            clean = self.networks.denoiser.normalize(mean + std * draws.posterior)
            self._denoiser_half(clean, batch.labels, on_device(batch.features, self.device), draws, step, losses)
        return losses.values


class DecoderStep(BaseStep[ImageBatch]):
    """Reconstruction, perceptual and adversarial loss on the decoder (and its 1 x 1 convolution in front) alone.

    Source: latent diffusion's first stage (arXiv 2112.10752, appendix G) with its encoder frozen, as the decoders that
    were tuned for Stable Diffusion's latents were made.
    """

    trains = ("autoencoder",)

    def forward_backward(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> dict[str, Tensor]:
        """See BaseStep."""
        losses = _Means(len(micro_batches))
        for batch, draws in self._in_turn(micro_batches, self._autoencoder, self._discriminator):
            images = from_uint8(self._pixels(batch))
            with self.autocast():
                *_, reconstructed = self._autoencoder(images, draws.posterior)
            losses.add(self._decoder_backward(images, reconstructed, step, losses.parts))
        return losses.values


def build_step(
    stage: str,
    networks: Networks,
    perceptual: FeatureDistance | LpipsDistance,
    config: StepConfig,
    device: torch.device,
    distributed: bool = False,
) -> JointStep | LatentStep | DecoderStep:
    """The step of a stage."""
    kinds: dict[str, Any] = {"joint": JointStep, "latent": LatentStep, "decoder": DecoderStep}
    step: JointStep | LatentStep | DecoderStep = kinds[stage](networks, perceptual, config, device, distributed)
    return step


def parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module as DDP wants it here: one forward a backward, no buffers sent around."""
    before_2_15 = "forward_sync_buffers" not in inspect.signature(DistributedDataParallel.__init__).parameters
    settings: dict[str, Any] = {
        # The only buffers that move are the latent norm's, already equal on every worker.
        "broadcast_buffers" if before_2_15 else "forward_sync_buffers": False,
        "device_ids": [device] if device.type == "cuda" else None,
        "gradient_as_bucket_view": True,
    }
    return DistributedDataParallel(module, **settings)
