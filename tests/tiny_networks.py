"""The smallest networks of the real kinds, for tests that count or compare: 16 px images, 8 x 8 latents, 8 features."""

from typing import Any

import torch
from torch import Tensor, nn

from m2d.models.autoencoder import build_autoencoder
from m2d.models.extractors import FeatureExtractor, Features
from m2d.models.perceptual import Discriminator, FeatureDistance, PatchDiscriminator, ProjectedDiscriminator
from m2d.models.settings import (
    AutoencoderConfig,
    ConditioningConfig,
    DiscriminatorConfig,
    ProjectorConfig,
    UNetConfig,
)
from m2d.models.unet import AlignmentProjector, build_denoiser, tap_channels
from m2d.training.batch import Draws, ImageBatch, draw
from m2d.training.networks import Networks
from m2d.training.settings import AlignmentConfig, LossWeights, OptimizerConfig, ScheduleConfig, TrainConfig
from m2d.training.step import StepConfig, build_step

IMAGE_SIZE = 16
LATENT_SHAPE = (4, 8, 8)
FEATURE_DIM = 8
CONDITIONING = ConditioningConfig(context_dim=16, feature_tokens=2)
AUTOENCODER = AutoencoderConfig(block_channels=[8, 16], latent_channels=4, norm_groups=4)
UNET = UNetConfig(
    block_channels=[16, 32], layers_per_block=1, attention_levels=[False, True], head_dim=8, norm_groups=8
)
PROJECTOR = ProjectorConfig(hidden_dim=16)
CPU = torch.device("cpu")


class TinyExtractor(FeatureExtractor):
    """A frozen random convolution with the extractor's interface: 2 x 2 patches."""

    def __init__(self) -> None:
        mean, std = torch.full((3,), 127.0), torch.full((3,), 128.0)
        super().__init__("tiny", FEATURE_DIM, IMAGE_SIZE, mean, std, num_patches=4)
        self.network = nn.Conv2d(3, FEATURE_DIM, 8, stride=8).requires_grad_(False)

    def forward(self, x: Tensor) -> Features:
        patches = self.network(x).flatten(2).transpose(1, 2)
        return Features(cls=patches.mean(dim=1), patches=patches)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        return [self.network(x)]


def tiny_networks(
    discriminator: bool | str = False, tap: str = "middle", projector: ProjectorConfig = PROJECTOR
) -> Networks:
    """The same weights each time. The U-Net's last layer is drawn too: its zero start would stop every gradient.

    discriminator: "projected", or True for a PatchGAN.
    """
    torch.manual_seed(0)
    autoencoder = build_autoencoder(AUTOENCODER, IMAGE_SIZE)
    denoiser = build_denoiser(UNET, CONDITIONING, latent_channels=4, latent_size=8, feature_dim=FEATURE_DIM)
    nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)
    return Networks(
        autoencoder=autoencoder,
        denoiser=denoiser,
        projector=AlignmentProjector(tap_channels(denoiser, tap), projector, FEATURE_DIM),
        extractor=TinyExtractor(),
        feature_dim=FEATURE_DIM,
        discriminator=tiny_discriminator(discriminator),
    )


def tiny_discriminator(kind: bool | str) -> Discriminator | None:
    """A projected one judges the only map that TinyExtractor has."""
    if kind == "projected":
        return ProjectedDiscriminator((FEATURE_DIM,), 8)
    return PatchDiscriminator(8, 1) if kind else None


def tiny_step(
    networks: Networks,
    stage: str = "joint",
    *,
    distributed: bool = False,
    weights: LossWeights | None = None,
    alignment: AlignmentConfig | None = None,
    rate: float = 1e-3,
    discriminator_start: int = 0,
    **settings: Any,
) -> Any:
    """A stage's step with plain settings."""
    run = TrainConfig(
        loss_weights=weights or LossWeights(kl=1e-3),
        alignment=alignment or AlignmentConfig(),
        optimizer=OptimizerConfig(lr_autoencoder=rate, lr_denoiser=rate, warmup_steps=0, clip_norm=1e6),
        schedule=ScheduleConfig(ema_decay=0.9, max_skipped_in_row=3),
        discriminator=DiscriminatorConfig(start_step=discriminator_start),
    )
    config = StepConfig(run, **({"precision": "no", "total_steps": 100} | settings))
    return build_step(stage, networks, FeatureDistance(networks.extractor), config, CPU, distributed)


def tiny_batch(size: int = 4, seed: int = 0) -> tuple[ImageBatch, Draws]:
    """Random images and their draws."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 7, (size,), generator=generator)
    return ImageBatch(images, labels), draw(seed, torch.arange(size), LATENT_SHAPE, FEATURE_DIM, CONDITIONING)


def random_batch(config: TrainConfig, networks: Networks, seed: int, size: int) -> tuple[ImageBatch, Draws]:
    """The same of a run's own shapes."""
    side, generator = config.data.image_size, torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
    shape = networks.denoiser.latent_shape(side, networks.autoencoder.downsampling)
    draws = draw(0, torch.arange(size * seed, size * (seed + 1)), shape, networks.feature_dim, config.conditioning)
    return ImageBatch(images, 4 + torch.arange(size) % 3), draws


def part(batch: tuple[ImageBatch, Draws], start: int, stop: int) -> tuple[ImageBatch, Draws]:
    """Samples start..stop of a batch."""
    images, draws = batch
    return ImageBatch(images.images[start:stop], images.labels[start:stop]), draws_part(draws, start, stop)


def draws_part(draws: Draws, start: int, stop: int) -> Draws:
    """The draws of samples start..stop."""
    return Draws(**{name: values[start:stop] for name, values in vars(draws).items()})


def state_of(networks: Networks) -> dict[str, dict[str, Tensor]]:
    """A copy of every trained network's tensors, by network and name."""
    return {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in networks.trained().items()}


def moved(networks: Networks, before: dict[str, dict[str, Tensor]]) -> dict[str, set[str]]:
    """Of every network the names of the tensors that are not what they were."""
    after = state_of(networks)
    return {name: {k for k, v in part.items() if not torch.equal(v, before[name][k])} for name, part in after.items()}
