"""The step of stage `decoder`: sharper images from the latents that the U-Net already knows.

Encoder, U-Net and projector stay as they are, so every latent means what it meant; only what is drawn from it changes.
A decoder trained on a pixel loss alone averages over what it cannot know, and a classifier sees that it is synthetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2d.training.batch import Draws, ImageBatch
from m2d.training.step import BaseStep, Networks, StepConfig, model_images


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
        super().__init__(networks, config, device, distributed)
        vae = networks.autoencoder.vae
        for module in (vae.encoder, vae.quant_conv, networks.denoiser, networks.projector):
            if module is not None:
                module.requires_grad_(False)
        self._autoencoder = self._with_autoencoder(perceptual, distributed)

    def __call__(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> None:
        """One optimiser step over the micro-batches; `step` counts from 0 in the whole run."""
        norm_before = self._norm_buffers()
        totals = self._accumulate(micro_batches, step, (self._autoencoder, self._discriminator))
        for name in self.optimized:
            self._set_rate(name, step, 0)
        self._finish(self.optimized, totals, norm_before)

    def forward_backward(self, batch: ImageBatch, draws: Draws, step: int, micro_batches: int) -> dict[str, Tensor]:
        """See BaseStep."""
        weights = self.config.weights
        _, images = model_images(batch, self.device)
        with self.autocast():
            vae = self._autoencoder(images, draws.posterior)
            losses = {"reconstruction": vae.reconstruction, "perceptual": vae.perceptual}
            total = weights.reconstruction * vae.reconstruction + weights.perceptual * vae.perceptual
            total = total + self._adversarial(vae.reconstructed, step, losses)
        self._backward(total, micro_batches)
        self._teach_discriminator(images, vae.reconstructed, micro_batches, losses)
        return losses
