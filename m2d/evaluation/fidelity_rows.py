"""One row of the fidelity table: all metrics of one comparison, for a class or overall, or why one is left out.

Called by fidelity alone. Which sides are compared with which is decided there.
"""

from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES
from m2d.evaluation.distances import (
    LEAST_GROUPS,
    NEIGHBOURS,
    KernelDistance,
    frechet_distance,
    kernel_distance,
    neighbour_scores,
    vendi_score,
)
from m2d.evaluation.fidelity_sides import Comparison

LEAST_MATCHED = 4 * NEIGHBOURS  # images a side; with fewer, a ball to the k-th neighbour holds over a quarter of them
LEAST_FRECHET = 50  # images a side; with fewer, the bias in N is nearly all that a Fréchet distance says
_DRAWN, _MOST_DRAWS = 2000, 10  # small draws are repeated and averaged, up to so many images in all
_KERNEL = ("kernel_distance", "kernel_distance_se")
_AT_EQUAL_N = ("frechet_distance", "precision", "recall", "density", "coverage", "vendi_reference", "vendi_other")


@dataclass(frozen=True, kw_only=True)
class FidelityRow:
    """One comparison for one class or overall. What could not be measured is None, and left_out says why."""

    extractor: str
    comparison: str  # fidelity.GENERATED, FLOOR, UNSEEN, AUTOENCODER
    label: str | None  # class code; None: overall
    n_reference: int  # images, for the kernel distance
    n_other: int
    n_matched: int  # images of either side, for all else; 0: none of it was measured
    draws: int  # that all else is the mean of
    kernel_distance: float | None  # 0 for one distribution, on average; below 0 by chance
    kernel_distance_se: float | None
    frechet_distance: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    vendi_reference: float | None
    vendi_other: float | None
    left_out: dict[str, str]  # metric -> reason


def matched_count(comparisons: list[Comparison]) -> int:
    """The N of one class that its comparisons are drawn down to: the smallest side of those that have enough images."""
    # Where none has enough, each keeps its own N, which is then too small.
    return min((one.smaller for one in comparisons if one.smaller >= LEAST_MATCHED), default=LEAST_MATCHED)


def class_row(comparison: Comparison, label: int, matched: int, generator: np.random.Generator) -> FidelityRow:
    """comparison: of that class's rows alone. matched: see matched_count."""
    kernel, left_out = None, {}
    if comparison.lesions < LEAST_GROUPS:
        reason = f"{comparison.lesions} lesions on the side that has fewer; {LEAST_GROUPS} are needed"
        left_out = dict.fromkeys(_KERNEL, reason)
    else:
        kernel = kernel_distance(
            comparison.reference.standardised,
            comparison.other.standardised,
            groups_a=comparison.reference.groups,
            groups_b=comparison.other.groups,
        )
    sizes = len(comparison.reference), len(comparison.other)
    counts = {label: min(matched, comparison.smaller)}
    return _row(comparison, CLASSES[label], sizes, kernel, left_out, counts, generator)


def overall_row(
    comparison: Comparison, classes: list[FidelityRow], counts: dict[int, int], generator: np.random.Generator
) -> FidelityRow:
    """classes: this comparison's rows of the classes that count. counts: label -> images of it, of either side."""
    values = [row.kernel_distance for row in classes if row.kernel_distance is not None]
    errors = [row.kernel_distance_se for row in classes if row.kernel_distance_se is not None]
    kernel, left_out = None, {}
    if values:
        kernel = KernelDistance(float(np.mean(values)), float(np.linalg.norm(errors)) / len(errors))
    else:
        left_out = dict.fromkeys(_KERNEL, "no class has it in every comparison")
    sizes = sum(row.n_reference for row in classes), sum(row.n_other for row in classes)
    return _row(comparison, None, sizes, kernel, left_out, counts, generator)


def _row(
    comparison: Comparison,
    label: str | None,
    sizes: tuple[int, int],
    kernel: KernelDistance | None,
    left_out: dict[str, str],
    counts: dict[int, int],
    generator: np.random.Generator,
) -> FidelityRow:
    matched = sum(counts.values())
    draws = int(np.clip(_DRAWN // matched, 1, _MOST_DRAWS)) if matched >= LEAST_MATCHED else 0
    drawn = [_of_draw(comparison, counts, generator) for _ in range(draws)]
    means = {name: float(np.mean([one[name] for one in drawn])) for name in (drawn[0] if drawn else {})}
    needed = LEAST_FRECHET if draws else LEAST_MATCHED
    reason = f"{matched} images a side can be compared at equal N; {needed} are needed"
    return FidelityRow(
        extractor=comparison.reference.features.extractor,
        comparison=comparison.name,
        label=label,
        n_reference=sizes[0],
        n_other=sizes[1],
        n_matched=matched if draws else 0,
        draws=draws,
        kernel_distance=None if kernel is None else kernel.value,
        kernel_distance_se=None if kernel is None else kernel.standard_error,
        left_out=left_out | {name: reason for name in _AT_EQUAL_N if name not in means},
        **{name: means.get(name) for name in _AT_EQUAL_N},
    )


def _of_draw(comparison: Comparison, counts: dict[int, int], generator: np.random.Generator) -> dict[str, float]:
    reference = comparison.reference.draw(counts, generator).standardised
    other = comparison.other.draw(counts, generator).standardised
    measured: dict[str, float] = vars(neighbour_scores(reference, other)) | {
        "vendi_reference": vendi_score(reference),
        "vendi_other": vendi_score(other),
    }
    if len(reference) >= LEAST_FRECHET:
        measured["frechet_distance"] = frechet_distance(reference, other)
    return measured
