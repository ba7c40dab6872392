"""What a run trains, from its configuration or an earlier checkpoint; sums over its workers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from m2d.classes import ISIC7, ClassSet
from m2d.errors import CheckpointError
from m2d.models.autoencoder import Autoencoder, build_autoencoder
from m2d.models.checkpoint import load_checkpoint, read_info
from m2d.models.extractors import FeatureExtractor, load_feature_extractor
from m2d.models.perceptual import LITE0_MAPS, Discriminator, PatchDiscriminator, ProjectedDiscriminator
from m2d.models.settings import DiscriminatorConfig, FeatureExtractorConfig
from m2d.models.unet import AlignmentProjector, Denoiser, build_denoiser, tap_channels
from m2d.training.settings import TrainConfig


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


@dataclass
class Networks:
    """What is trained, and what is frozen beside it."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    projector: AlignmentProjector
    extractor: FeatureExtractor | None  # None where every feature comes from the cache
    feature_dim: int  # D
    discriminator: Discriminator | None = None
    denoiser_is_new: bool = True  # not taken from a checkpoint, so its feature statistics are yet to be fitted

    def trained(self) -> dict[str, nn.Module]:
        """Name to module, of those that a checkpoint holds."""
        modules = {"autoencoder": self.autoencoder, "denoiser": self.denoiser, "projector": self.projector}
        return modules if self.discriminator is None else modules | {"discriminator": self.discriminator}


def build_networks(
    config: TrainConfig, device: torch.device, cached_dim: int | None = None, classes: ClassSet = ISIC7
) -> Networks:
    """New networks, the same on every worker (seeded), or those of `init_checkpoint`. Moved to the device.

    cached_dim: D of the cached features, with which no extractor is loaded; None: one is.
    """
    extractor = None if cached_dim is not None else build_extractor(config.feature_extractor)
    torch.manual_seed(config.seed)  # after the extractor, whose construction draws too: cached or not, the same start
    feature_dim = extractor.dim if extractor is not None else cached_dim
    assert feature_dim is not None
    size = config.data.image_size
    autoencoder = build_autoencoder(config.autoencoder, size, weights=not config.dry_run)
    denoiser = build_denoiser(
        config.unet,
        config.conditioning,
        latent_channels=autoencoder.latent_channels,
        latent_size=size // autoencoder.downsampling,
        feature_dim=feature_dim,
        num_classes=len(classes),
    )
    projector = AlignmentProjector(tap_channels(denoiser, config.alignment.tap), config.projector, feature_dim)
    networks = Networks(autoencoder, denoiser, projector, extractor, feature_dim)
    if config.discriminator.enabled and config.stage != "latent":
        networks.discriminator = _discriminator(config.discriminator)
    if config.init_checkpoint is not None:
        networks.denoiser_is_new = not _start_from(
            config.init_checkpoint, networks, config.feature_extractor.name, classes
        )
        if config.stage == "decoder" and networks.denoiser_is_new:
            raise CheckpointError(
                f"init_checkpoint: stage decoder keeps the U-Net of {config.init_checkpoint}, and that has another "
                "shape or extractor than the settings; use the settings it was trained with (its experiment's "
                "configs/config.yaml)"
            )
        shift = read_info(config.init_checkpoint).time_shift
        if config.stage == "decoder" and shift != config.schedule.time_shift:
            raise CheckpointError(
                f"init_checkpoint: stage decoder keeps the U-Net of {config.init_checkpoint}, whose images are sampled "
                f"with schedule.time_shift {shift:g}; add --schedule.time_shift {shift:g}"
            )
    for module in (*networks.trained().values(), extractor):
        if module is not None:
            module.to(device)
            if config.channels_last:
                module.to(memory_format=torch.channels_last)
    return networks


def build_extractor(config: FeatureExtractorConfig) -> FeatureExtractor:
    """The extractor that the settings name."""
    return load_feature_extractor(config.name, config.weights, config.input_size, config.crop)


def _discriminator(config: DiscriminatorConfig) -> Discriminator:
    if config.kind == "projected":
        return ProjectedDiscriminator(LITE0_MAPS, config.channels)
    return PatchDiscriminator(config.channels, config.layers)


def _start_from(path: str, networks: Networks, extractor: str, classes: ClassSet) -> bool:
    """Take over the VAE, and the averaged denoiser and projector where they fit. Returns whether the denoiser did.

    It does not where its shape or its classes are others, or where another extractor guided it.
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
    same = checkpoint.info.feature_extractor == extractor and checkpoint.info.classes.codes == classes.codes
    if not same or not _fits(theirs, networks.denoiser):
        # A new U-Net on a tuned VAE is a recipe of its own (REPA-E's best FID); its latent scale is the VAE's, though.
        networks.denoiser.latent_norm.load_state_dict(checkpoint.denoiser.latent_norm.state_dict())
        return False
    networks.denoiser.load_state_dict(theirs)
    projector = Path(path) / "training" / "projector.safetensors"
    if projector.is_file() and _fits(state := load_file(projector), networks.projector):
        networks.projector.load_state_dict(state)
    return True


def _fits(state: dict[str, Tensor], module: nn.Module) -> bool:
    return {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in module.state_dict().items()}


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
