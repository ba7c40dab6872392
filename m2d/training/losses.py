"""The losses, each a function of tensors to one number. Weights and sums are the step's business."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def psnr(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one an image, [B, 3, H, W] in [-1, 1] each (a range of 2, clamped)."""
    error = (reconstructed.float().clamp(-1, 1) - images.float()) / 2
    return -10.0 * torch.log10(error.square().flatten(1).mean(dim=1).clamp(min=1e-12))
