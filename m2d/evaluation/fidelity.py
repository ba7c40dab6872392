"""Fidelity and diversity: how near the generated images come to the training images, beside what real ones reach.

Called by the evaluation, once for each extractor. Knows features and labels, no files; the maths is in metrics.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np

from m2d.evaluation.images import FeatureSet
from m2d.metrics.distances import (
    LEAST_GROUPS,
    NEIGHBOURS,
    KernelDistance,
    frechet_distance,
    kernel_distance,
    neighbour_scores,
    vendi_score,
)
from m2d.metrics.neighbours import LEAST_DEVIATION, Standardizer, at_least_part_of_median

GENERATED, FLOOR, UNSEEN, AUTOENCODER = "generated", "floor", "unseen", "autoencoder"
_WHAT = {
    GENERATED: "generated images with training images",
    FLOOR: "one half of the training images with the other, no lesion in both: what a perfect model would reach",
    UNSEEN: "test images, of lesions that are not in training, with training images",
    AUTOENCODER: "reconstructions of the test images by the model's autoencoder with training images: no sample can be "
    "better than its decoder",
}
_CIRCULARITY = {
    None: "Whether {} guided the training of the model is not known; if so, its distances say too little.",
    True: "{} guided the training of the model, so its distances flatter the generated images: read those of an "
    "extractor that did not beside them.",
    False: "{} had no part in the training of the model.",
}
METHOD = (
    "Every feature is standardised by its mean and deviation over the training images, the deviation taken as no less "
    f"than {LEAST_DEVIATION} of the median feature's. "
    "Kernel distance: all images, pairs of one lesion not counted, standard error by leaving out one lesion at a time; "
    "overall it is the mean over the classes. "
    "All else is computed at equal N: both sides are drawn at random down to n_matched images, the same in every "
    "comparison of a class where it has enough, and the mean over the draws is given; overall, every comparison draws "
    f"the same number of each class and puts them together. k = {NEIGHBOURS}."
)
LEAST_MATCHED = 4 * NEIGHBOURS  # images a side; with fewer, a ball to the k-th neighbour holds over a quarter of them
LEAST_FRECHET = 50  # images a side; with fewer, the bias in N is nearly all that a Fréchet distance says
_DRAWN, _MOST_DRAWS = 2000, 10  # small draws are repeated and averaged, up to so many images in all
_KERNEL = ("kernel_distance", "kernel_distance_se")
_AT_EQUAL_N = ("frechet_distance", "precision", "recall", "density", "coverage", "vendi_reference", "vendi_other")


@dataclass(frozen=True, kw_only=True)
class FidelityRow:
    """One comparison for one class or overall. What could not be measured is None, and left_out says why."""

    extractor: str
    comparison: str  # GENERATED, FLOOR, UNSEEN, AUTOENCODER
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


@dataclass(frozen=True, kw_only=True)
class FidelityResult:
    """All comparisons with one extractor's features."""

    extractor: str
    circular: bool | None  # the extractor guided the training of the model; None: not known
    circularity: str  # the same as a sentence
    method: str
    comparisons: dict[str, str]  # name -> what is compared with what
    overall_counts: dict[str, int]  # class code -> images of either side in the overall rows
    rows: list[FidelityRow]  # by comparison; overall first, then the classes in their order
    notes: list[str]
    seed: int

    def row(self, comparison: str, label: str | None = None) -> FidelityRow | None:
        """A class's row of a comparison, or the overall one; None where the comparison was not made."""
        return next((row for row in self.rows if (row.comparison, row.label) == (comparison, label)), None)


def measure_fidelity(
    *,
    train: FeatureSet,
    test: FeatureSet | None,
    generated: FeatureSet,
    reconstructions: FeatureSet | None,
    circular: bool | None,
    seed: int,
) -> FidelityResult:
    """Compare the generated images with the training images, and real ones and reconstructions for scale.

    All sets by one extractor. reconstructions: of the test images, by the model's autoencoder. Each comparison is made
    for the classes of the generated set, and overall: the kernel distance as the mean over the classes, so that it sees
    a model that ignores its class; the others on as many images of each class from either side, in every comparison
    alike. Standardised features: otherwise the few large dimensions of an extractor would be the whole of a distance.
    So the Fréchet distance is no FID that could be set beside a published one.
    """
    standard = Standardizer.of(train.cls, at_least_part_of_median)
    halves = lesion_disjoint_halves(train.labels, train.groups, seed=seed)
    others = {GENERATED: generated, FLOOR: train, UNSEEN: test, AUTOENCODER: reconstructions}
    comparisons = [
        _Comparison(
            name, standard, (train, other), halves if name == FLOOR else (np.arange(len(train)), np.arange(len(other)))
        )
        for name, other in others.items()
        if other is not None
    ]
    labels, codes = np.unique(generated.labels).tolist(), train.classes.codes
    counts, matched, notes = {}, {}, []
    for label in labels:
        of_class = [one.of_class(label) for one in comparisons]
        smaller = [min(one.sizes) for one in of_class]
        # Drawn down to the smallest side of those that have enough; where none has, each keeps its own N, too small.
        matched[label] = min((size for size in smaller if size >= LEAST_MATCHED), default=LEAST_MATCHED)
        poor = [f"{one.name} {one.lesions}" for one in of_class if one.lesions < LEAST_GROUPS]
        if poor:
            notes.append(
                f"{codes[label]} is left out of the overall rows: fewer than {LEAST_GROUPS} lesions on a side "
                f"({', '.join(poor)})"
            )
        else:
            counts[label] = min(smaller)
    if reconstructions is None:
        notes.append("no reconstructions were given, so there is no comparison with them")

    rows = []
    for one in comparisons:
        place = list(others).index(one.name)
        # A generator for each row: a set more or a class less does not change what the others draw.
        generators = {label: np.random.default_rng([seed, place, label]) for label in (*labels, len(codes))}
        of_label = {}
        for label in labels:
            mine = one.of_class(label)
            drawn = {label: min(matched[label], *mine.sizes)}
            of_label[label] = _row(mine, codes[label], mine.sizes, mine.kernel(), drawn, generators[label])
        counted = [of_label[label] for label in counts]
        values = [row.kernel_distance for row in counted if row.kernel_distance is not None]
        errors = [row.kernel_distance_se for row in counted if row.kernel_distance_se is not None]
        kernel: KernelDistance | str = "no class has it in every comparison"
        if values:
            kernel = KernelDistance(float(np.mean(values)), float(np.linalg.norm(errors)) / len(errors))
        sizes = sum(row.n_reference for row in counted), sum(row.n_other for row in counted)
        rows += [_row(one, None, sizes, kernel, counts, generators[len(codes)]), *of_label.values()]
    return FidelityResult(
        extractor=train.extractor,
        circular=circular,
        circularity=_CIRCULARITY[circular].format(train.extractor),
        method=METHOD,
        comparisons={one.name: _WHAT[one.name] for one in comparisons},
        overall_counts={codes[label]: count for label, count in counts.items()},
        rows=rows,
        notes=notes,
        seed=seed,
    )


def lesion_disjoint_halves(labels: np.ndarray, groups: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two halves, ascending, no lesion in both, each class split as evenly as its lesions allow.

    labels: int64 [N]. groups: object [N], equal values are one lesion. In random order a lesion joins the half that has
    fewer images of its class so far; one of several classes stays where its first class put it.
    """
    generator = np.random.default_rng(seed)
    half_of: dict[object, int] = {}
    for label in np.unique(labels):
        lesions = list(Counter(groups[labels == label].tolist()).items())
        sizes = [0, 0]
        for place in generator.permutation(len(lesions)):
            group, images = lesions[place]
            half = half_of.setdefault(group, int(sizes[1] < sizes[0]))
            sizes[half] += images
    halves = np.array([half_of[group] for group in groups.tolist()])
    return np.flatnonzero(halves == 0), np.flatnonzero(halves == 1)


@dataclass(frozen=True)
class _Comparison:
    """Some rows of another set against some rows of a reference."""

    name: str
    standard: Standardizer
    sets: tuple[FeatureSet, FeatureSet]  # reference, other
    rows: tuple[np.ndarray, np.ndarray]  # int64 [N], [M]

    def of_class(self, label: int) -> "_Comparison":
        reference, other = (rows[one.labels[rows] == label] for one, rows in zip(self.sets, self.rows))
        return replace(self, rows=(reference, other))

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.rows[0]), len(self.rows[1])

    @property
    def lesions(self) -> int:
        """Lesions of the side that has fewer."""
        return min(len(set(one.groups[rows].tolist())) for one, rows in zip(self.sets, self.rows))

    def kernel(self) -> KernelDistance | str:
        """The kernel distance of all rows, or why there is none."""
        if self.lesions < LEAST_GROUPS:
            return f"{self.lesions} lesions on the side that has fewer; {LEAST_GROUPS} are needed"
        groups = [one.groups[rows] for one, rows in zip(self.sets, self.rows)]
        return kernel_distance(*self.standardised(), groups_a=groups[0], groups_b=groups[1])

    def standardised(self) -> list[np.ndarray]:
        """Features of both sides, float64 [N, D] and [M, D]; made when asked for, so that no copy is kept."""
        return [self.standard(one.cls[rows]) for one, rows in zip(self.sets, self.rows)]

    def drawn(self, counts: dict[int, int], generator: np.random.Generator) -> "_Comparison":
        """As many rows of each class as counts says, of either side, without replacement."""
        of_class = {label: self.of_class(label) for label in counts}
        reference, other = (
            np.concatenate([generator.choice(of_class[k].rows[side], n, replace=False) for k, n in counts.items()])
            for side in (0, 1)
        )
        return replace(self, rows=(reference, other))


def _row(
    comparison: _Comparison,
    label: str | None,
    sizes: tuple[int, int],
    kernel: KernelDistance | str,
    counts: dict[int, int],
    generator: np.random.Generator,
) -> FidelityRow:
    """kernel: a distance, or why there is none. counts: label -> images of it, of either side, for all else."""
    matched = sum(counts.values())
    draws = int(np.clip(_DRAWN // matched, 1, _MOST_DRAWS)) if matched >= LEAST_MATCHED else 0
    measured = defaultdict[str, list[float]](list)
    for _ in range(draws):
        reference, other = comparison.drawn(counts, generator).standardised()
        one = neighbour_scores(reference, other)
        one |= {"vendi_reference": vendi_score(reference), "vendi_other": vendi_score(other)}
        one |= {"frechet_distance": frechet_distance(reference, other)} if matched >= LEAST_FRECHET else {}
        for name, value in one.items():
            measured[name].append(value)
    means = {name: float(np.mean(values)) for name, values in measured.items()}
    too_few = (
        f"{matched} images a side can be compared at equal N; {LEAST_FRECHET if draws else LEAST_MATCHED} are needed"
    )
    left_out = dict.fromkeys(_KERNEL, kernel) if isinstance(kernel, str) else {}
    left_out |= {name: too_few for name in _AT_EQUAL_N if name not in means}
    return FidelityRow(
        extractor=comparison.sets[0].extractor,
        comparison=comparison.name,
        label=label,
        n_reference=sizes[0],
        n_other=sizes[1],
        n_matched=matched if draws else 0,
        draws=draws,
        kernel_distance=None if isinstance(kernel, str) else kernel.value,
        kernel_distance_se=None if isinstance(kernel, str) else kernel.standard_error,
        left_out=left_out,
        **{name: means.get(name) for name in _AT_EQUAL_N},
    )
