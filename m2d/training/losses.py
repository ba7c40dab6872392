"""The losses, each a function of tensors to one number, and the two halves of the joint step that compute them.

`AutoencoderPhase` owns the VAE, `DenoiserPhase` the U-Net, its conditioning and the projector. Each is a module that
DistributedDataParallel may wrap and is called once per micro-batch; neither holds the other's parameters. The weights
are applied by the step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.models.autoencoder import Autoencoder
from m2d.models.extractors import Features
from m2d.models.settings import MIDDLE
from m2d.models.unet import AlignmentProjector, Denoiser
from m2d.training.batch import Draws


def diffusion_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, [B, C, h, w] each. Source: SiT (arXiv 2401.08740), unweighted."""
    return F.mse_loss(velocity.float(), target.float())


def reconstruction_loss(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error, [B, 3, H, W] in [-1, 1] each. Source: REPA-E's code (its paper says MSE; its issue 29)."""
    return F.l1_loss(reconstructed.float(), images.float())


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over a latent [C, h, w], mean over the batch, in nats."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1).mean()


def alignment_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean negative cosine over tokens, [B, N, D] each; in [-1, 1]. Source: REPA (arXiv 2410.06940), eq. 8."""
    return -F.cosine_similarity(predicted.float(), target.float(), dim=-1).mean()


def manifold_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities among an image's tokens, [B, N, D] each.

    Source: U-REPA (arXiv 2503.18414), eq. 3 to 5, read as the N x N Gram matrix of each image.
    """
    a, b = F.normalize(predicted.float(), dim=-1), F.normalize(target.float(), dim=-1)
    return F.mse_loss(a @ a.transpose(1, 2), b @ b.transpose(1, 2))


def spatially_normalized(patches: Tensor, gamma: float) -> Tensor:
    """Target patches [B, N, D] with what all tokens of an image share taken back: (x - gamma mean) / (std + 1e-6).

    Mean and (unbiased) deviation are over an image's N tokens, for each of the D dimensions. Spatial structure, not
    global content, is what alignment profits from. Source: iREPA (arXiv 2512.10794), section 4, and its code.
    """
    patches = patches.float()
    mean = patches.mean(dim=1, keepdim=True)
    std = patches.std(dim=1, keepdim=True, correction=min(1, patches.shape[1] - 1))  # one token's: 0
    return (patches - gamma * mean) / (std + 1e-6)


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The generator's side of the hinge loss: -mean of the discriminator's logits on reconstructions."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss, mean over patches: (max(0, 1 - real) + max(0, 1 + fake)) / 2. Source: VQGAN (arXiv 2012.09841)."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def adaptive_weight(pointwise: Tensor, adversarial: Tensor) -> Tensor:
    """What makes the adversarial loss pull as much as the pointwise ones: |pointwise| / |adversarial|, at most 1e4.

    Both: the losses' gradients at one place, the decoder's last layer. Source: VQGAN (arXiv 2012.09841), eq. 7.
    """
    return (pointwise.norm() / adversarial.norm().clamp(min=1e-30)).clamp(max=1e4)


def psnr(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one an image, [B, 3, H, W] in [-1, 1] each (a range of 2, clamped)."""
    error = (reconstructed.float().clamp(-1, 1) - images.float()) / 2
    return -10.0 * torch.log10(error.square().flatten(1).mean(dim=1).clamp(min=1e-12))


class AutoencoderPhase(nn.Module):
    """Encode, sample, decode."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, posterior_noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(kl, latents, the decoder's input, reconstructions float32 [B, 3, H, W]) of images float [B, 3, H, W].

        The graph is cut at the latents [B, C, h, w], so that decoder and encoder take their backward passes apart: the
        decoder's input is a leaf of the same numbers, which gathers the gradient from all of their uses.
        """
        posterior = self.autoencoder.encode(images)
        latents = posterior.mean.float() + posterior.std.float() * posterior_noise
        decoder_input = latents.detach().requires_grad_()
        reconstructed = self.autoencoder.decode(decoder_input).float()
        return kl_loss(posterior.mean, posterior.logvar), latents, decoder_input, reconstructed


class DenoiserPhase(nn.Module):
    """Velocity and alignment on latents that carry no gradient."""

    def __init__(
        self, denoiser: Denoiser, projector: AlignmentProjector, tap: str = MIDDLE, spatial_norm: float = 0.0
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.projector = projector
        self.tap = tap
        self.spatial_norm = spatial_norm

    def forward(self, clean: Tensor, labels: Tensor, features: Features, draws: Draws) -> dict[str, Tensor]:
        """Unweighted losses by name. clean: normalised latents [B, C, h, w], without a gradient; labels int64 [B]."""
        denoiser = self.denoiser
        context = denoiser.conditioning(
            torch.where(draws.drop_class, denoiser.num_classes, labels),
            features.cls,
            drop_feature=draws.drop_feature,
            noise=draws.feature_noise,
            noise_level=draws.feature_noise_level,
        )
        x_t = interpolate(clean, draws.noise, draws.t)
        velocity, tapped = denoiser.velocity_and_tap(x_t, draws.t, context, self.tap)
        target = self._target(features)
        predicted = self.projector(tapped, target.shape[1])
        return {
            "diffusion": diffusion_loss(velocity, velocity_target(clean, draws.noise)),
            "alignment": alignment_loss(predicted, target),
            "manifold": manifold_loss(predicted, target),
        }

    def align_autoencoder(self, latents: Tensor, labels: Tensor, features: Features, draws: Draws) -> Tensor:
        """Alignment loss as the VAE sees it: through the U-Net, by running statistics, conditions undropped.

        Call it on the bare module, not through DDP, and within `frozen`, forward and backward: under gradient
        checkpointing the backward pass computes the blocks again, and would meet other parameters after a thaw.
        """
        denoiser = self.denoiser
        clean = denoiser.normalize(latents)
        x_t = interpolate(clean, draws.noise, draws.t)
        tapped = denoiser.tapped(x_t, draws.t, denoiser.context(labels, features.cls), self.tap)
        target = self._target(features)
        return alignment_loss(self.projector(tapped, target.shape[1]), target)

    def _target(self, features: Features) -> Tensor:
        return spatially_normalized(features.patches, self.spatial_norm) if self.spatial_norm else features.patches


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters that require a gradient stop doing so inside; only those do again afterwards.

    Turning every parameter on again would thaw what was frozen for good (REPA-E's code thaws its position table so).
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
