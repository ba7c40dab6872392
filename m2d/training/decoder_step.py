"""The step of stage `decoder`: sharper images from the latents that the U-Net already knows.

Encoder, U-Net and projector stay as they are, so every latent means what it meant; only what is drawn from it changes.
A decoder trained on a pixel loss alone averages over what it cannot know, and a classifier sees that it is synthetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m2d.training.batch import Draws, ImageBatch
from m2d.training.step import BaseStep, Means, Networks, StepConfig, model_images


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
        vae = networks.autoencoder.vae
        for module in (vae.encoder, vae.quant_conv, networks.denoiser, networks.projector):
            if module is not None:
                module.requires_grad_(False)
        super().__init__(networks, config, device, distributed)
        self._autoencoder = self._with_autoencoder(perceptual, distributed)

    def __call__(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> None:
        """One optimiser step over the micro-batches; `step` counts from 0 in the whole run."""
        norm_before = self._norm_buffers()
        losses = self.forward_backward(micro_batches, step)
        for name in self.optimized:
            self._set_rate(name, step, 0)
        self._finish(self.optimized, losses, norm_before)

    def forward_backward(self, micro_batches: Sequence[tuple[ImageBatch, Draws]], step: int) -> dict[str, Tensor]:
        """See BaseStep."""
        losses = Means(len(micro_batches))
        for batch, draws in self._in_turn(micro_batches, self._autoencoder, self._discriminator):
            _, images = model_images(batch, self.device)
            with self.autocast():
                reconstructed = self._autoencoder(images, draws.posterior).reconstructed
            losses.add(self._decoder_backward(images, reconstructed, step, len(micro_batches)))
        return losses.values
