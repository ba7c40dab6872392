"""Settings of the gates. Light on purpose: the command line reads them before torch is imported."""

from dataclasses import dataclass
from math import isfinite

from m2d.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Which new images are refused and made anew from another seed. docs/results/gates.md has what the defaults do."""

    enabled: bool = True  # false: every image is kept, and the manifest says that the gates were off
    near_copy: bool = True  # refuse what is nearer to a training image than images of two lesions are to each other
    class_consistency: bool = True  # refuse what is further from its class's training images than they are themselves
    blank: bool = True  # refuse images without contrast, such as are mostly black or white, and plain noise
    near_copy_quantile: float = 0.01  # share of real images that would be refused as near-copies; higher: stricter
    class_quantile: float = 0.99  # share of a class's real images that would pass; lower: stricter
    neighbours: int = 5  # nearest training images of the class whose mean distance counts
    min_contrast: float | None = None  # deviation of luma, grey levels; None: half of the flattest training images'
    max_saturated_share: float | None = None  # of pixels black or white; None: well above any training image's
    max_roughness: float | None = None  # mean step between pixels, grey levels; None: twice the roughest training ones
    max_attempts: int = 10  # seeds tried for one image before it is given up

    def __post_init__(self) -> None:
        for name in ("near_copy_quantile", "class_quantile"):
            quantile = getattr(self, name)
            if not (isfinite(quantile) and 0 <= quantile <= 1):
                raise ConfigError(f"gates.{name} is {quantile}; it must be from 0 to 1")
        for name in ("neighbours", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gates.{name} is {getattr(self, name)}; it must be at least 1")
        contrast, share = self.min_contrast, self.max_saturated_share
        if contrast is not None and not 0 <= contrast <= 127.5:
            raise ConfigError(f"gates.min_contrast is {contrast}; it must be from 0 to 127.5 grey levels")
        if self.max_roughness is not None and not 0 <= self.max_roughness <= 255:
            raise ConfigError(f"gates.max_roughness is {self.max_roughness}; it must be from 0 to 255 grey levels")
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"gates.max_saturated_share is {share}; it must be from 0 to 1")
