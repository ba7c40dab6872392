"""Builds what a run trains, from its configuration or from an earlier checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from m2d.config import TrainConfig
from m2d.errors import CheckpointError
from m2d.models.autoencoder import build_autoencoder
from m2d.models.checkpoint import load_checkpoint
from m2d.models.extractors import FeatureExtractor, load_feature_extractor
from m2d.models.heads import AlignmentProjector, PatchDiscriminator
from m2d.models.settings import FeatureExtractorConfig
from m2d.models.unet import build_denoiser, tap_channels
from m2d.training.plan import RunPlan
from m2d.training.step import Networks, StepConfig


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
            _place(module, device, config.channels_last)
    return networks


def step_config_of(plan: RunPlan) -> StepConfig:
    """What a run's step needs to know of it."""
    config = plan.config
    return StepConfig(
        weights=config.loss_weights,
        optimizer=config.optimizer,
        schedule=config.schedule,
        precision=plan.precision,
        total_steps=plan.total_steps,
        vae_warmup_steps=plan.vae_warmup_steps,
        discriminator_start=config.discriminator.start_step,
        alignment=config.alignment,
        compile={"mode": config.compile_mode} if config.compile else None,
    )


def build_extractor(config: FeatureExtractorConfig) -> FeatureExtractor:
    """The extractor that the settings name."""
    return load_feature_extractor(config.name, config.weights, config.input_size, config.crop)


def _place(module: nn.Module, device: torch.device, channels_last: bool) -> None:
    module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)


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
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    fits = shapes == {name: tensor.shape for name, tensor in networks.denoiser.state_dict().items()}
    if not fits or checkpoint.info.feature_extractor != extractor:
        # A new U-Net on a tuned VAE is a recipe of its own (REPA-E's best FID); its latent scale is the VAE's, though.
        networks.denoiser.latent_norm.load_state_dict(checkpoint.denoiser.latent_norm.state_dict())
        return False
    networks.denoiser.load_state_dict(theirs)
    projector = Path(path) / "training" / "projector.safetensors"
    if projector.is_file():
        state = load_file(projector)
        if {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in networks.projector.state_dict().items()
        }:
            networks.projector.load_state_dict(state)
    return True
