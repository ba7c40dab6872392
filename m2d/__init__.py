"""M2D: PanDerm-guided latent diffusion on dermoscopy images, trained and sampled on Ray."""

__version__ = "0.2.0"
