"""Builds what a run trains, from its configuration or from an earlier checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from m2d.config import TrainConfig
from m2d.errors import CheckpointError
from m2d.models.autoencoder import build_autoencoder
from m2d.models.checkpoint import load_checkpoint
from m2d.models.discriminator import PatchDiscriminator
from m2d.models.feature_extractor import load_feature_extractor
from m2d.models.projector import AlignmentProjector
from m2d.models.unet import build_denoiser, middle_channels
from m2d.training.step import Networks


def build_networks(config: TrainConfig, device: torch.device) -> Networks:
    """New networks, the same on every worker (seeded), or those of `init_checkpoint`. Moved to the device."""
    torch.manual_seed(config.seed)
    extractor_config = config.feature_extractor
    extractor = load_feature_extractor(extractor_config.name, extractor_config.weights, extractor_config.input_size)
    size = config.data.image_size
    autoencoder = build_autoencoder(config.autoencoder, size)
    denoiser = build_denoiser(
        config.unet,
        config.conditioning,
        latent_channels=autoencoder.latent_channels,
        latent_size=size // autoencoder.downsampling,
        feature_dim=extractor.dim,
    )
    networks = Networks(
        autoencoder=autoencoder,
        denoiser=denoiser,
        projector=AlignmentProjector(middle_channels(denoiser), config.projector.hidden_dim, extractor.dim),
        extractor=extractor,
    )
    if config.discriminator.enabled and config.stage == "joint":
        networks.discriminator = PatchDiscriminator(config.discriminator.channels, config.discriminator.layers)
    if config.init_checkpoint is not None:
        _start_from(config.init_checkpoint, networks)
    for module in (*networks.trained().values(), extractor):
        _place(module, device, config.channels_last)
    return networks


def _place(module: nn.Module, device: torch.device, channels_last: bool) -> None:
    module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)


def _start_from(path: str, networks: Networks) -> None:
    """Take over the VAE, and the averaged denoiser and projector where their shapes are the same."""
    checkpoint = load_checkpoint(path)
    try:
        networks.autoencoder.load_state_dict(checkpoint.autoencoder.state_dict())
    except RuntimeError:
        raise CheckpointError(
            f"init_checkpoint: the VAE of {path} has another shape than the autoencoder settings; use the settings it "
            "was trained with (its experiment's configs/config.yaml)"
        ) from None
    try:
        networks.denoiser.load_state_dict(checkpoint.denoiser.state_dict())
    except RuntimeError:
        # A new U-Net on a tuned VAE is a recipe of its own (REPA-E's best FID); its latent scale is the VAE's, though.
        networks.denoiser.latent_norm.load_state_dict(checkpoint.denoiser.latent_norm.state_dict())
        return
    projector = Path(path) / "training" / "projector.safetensors"
    if projector.is_file():
        state = load_file(projector)
        if {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in networks.projector.state_dict().items()
        }:
            networks.projector.load_state_dict(state)
