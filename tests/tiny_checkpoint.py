"""A tiny real U-Net and VAE, 16-pixel images, and its checkpoint directory, for actors and subprocesses to load."""

from pathlib import Path

import torch
from torch import nn

from m2d.classes import ISIC7, ClassSet
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.files.atomic import mark_complete
from m2d.models.autoencoder import build_autoencoder
from m2d.models.checkpoint import Checkpoint, CheckpointInfo, write_inference_files
from m2d.models.settings import AutoencoderConfig, ConditioningConfig, UNetConfig
from m2d.models.unet import build_denoiser


def make_checkpoint(classes: ClassSet = ISIC7) -> Checkpoint:
    """What load_checkpoint returns, with random weights that make the class matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = build_autoencoder(
            AutoencoderConfig(block_channels=[16, 16], norm_groups=8, latent_channels=4), 16
        )
        denoiser = build_denoiser(
            UNetConfig(
                block_channels=[16, 32], layers_per_block=1, attention_levels=[False, True], head_dim=8, norm_groups=8
            ),
            ConditioningConfig(context_dim=16),
            latent_channels=4,
            latent_size=8,
            feature_dim=6,
            num_classes=len(classes),
        )
        nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)  # it starts at zero: no velocity, nothing to test
        nn.init.normal_(autoencoder.vae.decoder.conv_out.weight, std=0.1)  # images that use the whole range
        nn.init.normal_(denoiser.conditioning.class_embedding.weight, std=3.0)
    denoiser.latent_norm.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    denoiser.latent_norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 2.0]))
    return Checkpoint(
        path="somewhere/experiments/tiny/checkpoints/step_1000",
        sha256="c0ffee" + 58 * "0",
        info=CheckpointInfo(
            step=1000,
            stage="joint",
            image_size=16,
            feature_extractor="none",
            feature_dim=6,
            num_patches=4,
            conditioning={"context_dim": 16},
            config={},
            classes=classes,
        ),
        autoencoder=autoencoder.eval(),
        denoiser=denoiser.eval(),
    )


def make_prior(counts: dict[str, int]) -> FeaturePrior:
    """Fitted to so many random 6-dimensional features a class; the classes' means are apart."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([ISIC7.index(code) for code, count in counts.items() for _ in range(count)])
    means = 5 * torch.randn(len(ISIC7.codes), 6, generator=generator)
    return FeaturePrior.fit(means[labels] + torch.randn(len(labels), 6, generator=generator), labels)


def write_checkpoint(checkpoint: Checkpoint, directory: Path) -> Path:
    """Write a loaded checkpoint as training does; returns the directory."""
    for folder in ("vae", "unet"):
        (directory / folder).mkdir(parents=True)
    tensors = {"vae": checkpoint.autoencoder.vae.state_dict(), "denoiser": checkpoint.denoiser.state_dict()}
    write_inference_files(
        directory, checkpoint.info, checkpoint.autoencoder, checkpoint.denoiser.unet, tensors, checkpoint.prior
    )
    mark_complete(directory)
    return directory
