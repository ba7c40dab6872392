"""M2D: PanDerm-guided latent diffusion on dermoscopy images, trained and sampled on Ray."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "M2DPipeline":  # heavy
        from pkgutil import resolve_name

        return resolve_name("m2d.export.export:M2DPipeline")
    raise AttributeError(f"module {__name__} has no attribute {name}")
