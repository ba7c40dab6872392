"""`from m2d import M2DPipeline`: the pipeline of any checkpoint of M2D, by M2D's own classes."""

from typing import Any, Self

import torch

from m2d.export import pipeline
from m2d.export.export import conditioning_of
from m2d.models.checkpoint import load_checkpoint
from m2d.models.published import checkpoint_path


class M2DPipeline(pipeline.M2DPipeline):
    """As m2d.export.pipeline's."""

    @classmethod
    def from_pretrained(
        cls, location: str, *, dtype: torch.dtype | None = None, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> Self:
        """Of a checkpoint directory, exported or not, a name in weights/, or hub:USER/NAME; no remote code is run.

        dtype, or torch_dtype: of the U-Net; the rest is computed in float32. Raises an M2DError.
        """
        checkpoint = load_checkpoint(checkpoint_path("checkpoint", str(location)))
        unet = checkpoint.denoiser.unet.to(dtype or torch_dtype or torch.float32)
        return cls(unet=unet, vae=checkpoint.autoencoder.vae, conditioning=conditioning_of(checkpoint))
