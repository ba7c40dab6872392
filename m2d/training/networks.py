"""Builds what a run trains, from its configuration or from an earlier checkpoint."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m2d.errors import CheckpointError
from m2d.models.autoencoder import build_autoencoder
from m2d.models.checkpoint import load_checkpoint
from m2d.models.extractors import FeatureExtractor, load_feature_extractor
from m2d.models.perceptual import PatchDiscriminator
from m2d.models.settings import FeatureExtractorConfig, Precision
from m2d.models.unet import AlignmentProjector, build_denoiser, tap_channels
from m2d.training.settings import TrainConfig
from m2d.training.step import DecoderStep, JointStep, LatentStep, Networks, StepConfig


def build_networks(config: TrainConfig, device: torch.device, cached_dim: int | None = None) -> Networks:
    """New networks, the same on every worker (seeded), or those of `init_checkpoint`. Moved to the device.

    cached_dim: D of the cached features, with which no extractor is loaded; None: one is.
    """
    extractor = None if cached_dim is not None else build_extractor(config.feature_extractor)
    torch.manual_seed(config.seed)  # after the extractor, whose construction draws too: cached or not, the same start
    feature_dim = extractor.dim if extractor is not None else cached_dim
    assert feature_dim is not None
    size = config.data.image_size
    autoencoder = build_autoencoder(config.autoencoder, size)
    denoiser = build_denoiser(
        config.unet,
        config.conditioning,
        latent_channels=autoencoder.latent_channels,
        latent_size=size // autoencoder.downsampling,
        feature_dim=feature_dim,
    )
    networks = Networks(
        autoencoder=autoencoder,
        denoiser=denoiser,
        projector=AlignmentProjector(tap_channels(denoiser, config.alignment.tap), config.projector, feature_dim),
        extractor=extractor,
        feature_dim=feature_dim,
    )
    if config.discriminator.enabled and config.stage != "latent":
        networks.discriminator = PatchDiscriminator(config.discriminator.channels, config.discriminator.layers)
    if config.init_checkpoint is not None:
        networks.denoiser_is_new = not _start_from(config.init_checkpoint, networks, config.feature_extractor.name)
        if config.stage == "decoder" and networks.denoiser_is_new:
            raise CheckpointError(
                f"init_checkpoint: stage decoder keeps the U-Net of {config.init_checkpoint}, and that has another "
                "shape or extractor than the settings; use the settings it was trained with (its experiment's "
                "configs/config.yaml)"
            )
    for module in (*networks.trained().values(), extractor):
        if module is not None:
            module.to(device)
            if config.channels_last:
                module.to(memory_format=torch.channels_last)
    return networks


def step_config_of(
    config: TrainConfig, *, precision: Precision, total_steps: int, vae_warmup_steps: int = 0
) -> StepConfig:
    """What a run's step needs to know of it."""
    return StepConfig(
        weights=config.loss_weights,
        optimizer=config.optimizer,
        schedule=config.schedule,
        precision=precision,
        total_steps=total_steps,
        vae_warmup_steps=vae_warmup_steps,
        discriminator_start=config.discriminator.start_step,
        alignment=config.alignment,
        compile={"mode": config.compile_mode} if config.compile else None,
    )


def build_step(
    stage: str,
    networks: Networks,
    perceptual: nn.Module,
    config: StepConfig,
    device: torch.device,
    distributed: bool = False,
) -> JointStep | LatentStep | DecoderStep:
    """The step of a stage."""
    if stage == "latent":
        return LatentStep(networks, config, device, distributed)
    kind = DecoderStep if stage == "decoder" else JointStep
    return kind(networks, perceptual, config, device, distributed)


def idle_modules(
    config: TrainConfig, networks: Networks, averaged: nn.Module, frozen: Iterable[nn.Module | None] = ()
) -> list[nn.Module]:
    """What is not on the GPU while the loop runs: averages kept in host memory, and what cached latents do without.

    frozen: extractor and perceptual network.
    """
    apart = config.schedule.ema_on_cpu and averaged is not networks.denoiser  # a frozen one is its own average
    idle: list[nn.Module | None] = [averaged] if apart else []
    if config.stage == "latent":
        idle += [networks.autoencoder, *frozen]
    return [module for module in idle if module is not None]


def build_extractor(config: FeatureExtractorConfig) -> FeatureExtractor:
    """The extractor that the settings name."""
    return load_feature_extractor(config.name, config.weights, config.input_size, config.crop)


def _start_from(path: str, networks: Networks, extractor: str) -> bool:
    """Take over the VAE, and the averaged denoiser and projector where they fit. Returns whether the denoiser did.

    It does not where its shape is another, or where another extractor guided it.
    """
    checkpoint = load_checkpoint(path)
    try:
        networks.autoencoder.load_state_dict(checkpoint.autoencoder.state_dict())
    except RuntimeError:
        raise CheckpointError(
            f"init_checkpoint: the VAE of {path} has another shape than the autoencoder settings; use the settings it "
            "was trained with (its experiment's configs/config.yaml)"
        ) from None
    theirs = checkpoint.denoiser.state_dict()
    if not _fits(theirs, networks.denoiser) or checkpoint.info.feature_extractor != extractor:
        # A new U-Net on a tuned VAE is a recipe of its own (REPA-E's best FID); its latent scale is the VAE's, though.
        networks.denoiser.latent_norm.load_state_dict(checkpoint.denoiser.latent_norm.state_dict())
        return False
    networks.denoiser.load_state_dict(theirs)
    projector = Path(path) / "training" / "projector.safetensors"
    if projector.is_file():
        state = load_file(projector)
        if _fits(state, networks.projector):
            networks.projector.load_state_dict(state)
    return True


def _fits(state: dict[str, Tensor], module: nn.Module) -> bool:
    return {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in module.state_dict().items()}
