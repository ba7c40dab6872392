"""What a sweep minimises. It knows no loss weight: a total of weighted losses would reward zero weights."""

from collections.abc import Mapping
from math import isfinite

OBJECTIVE = "objective"
WORST = 1e6  # of a trial that gave no samples or no numbers; finite, so that ranks and means exist


def reconstruction_error(psnr_db: float) -> float:
    """Root mean square error of pixels in [0, 1] that a PSNR stands for: 10^(-PSNR / 20)."""
    return float(10 ** (-psnr_db / 20))


def objective(measures: Mapping[str, float], reconstruction_weight: float) -> float:
    """Kernel distance of generated to validation features + weight * reconstruction error. Lower is better.

    measures: `val/kernel_distance` and `val/psnr_db` of one validation. A distance of 0 is as good as real images, and
    30 dB is an error of 0.032, so a weight of 10 puts both on one scale: 0.3 each where samples are fair.
    """
    values = [measures.get("val/kernel_distance"), measures.get("val/psnr_db")]
    if any(value is None or not isfinite(value) for value in values):
        return WORST
    return float(measures["val/kernel_distance"]) + reconstruction_weight * reconstruction_error(
        measures["val/psnr_db"]
    )
