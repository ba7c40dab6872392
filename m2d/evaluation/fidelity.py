"""Fidelity and diversity: how near the generated images come to the training images, beside what real ones reach.

Called by the evaluation, once for each extractor. Knows features and labels, no files; the maths is in distances.
"""

from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES
from m2d.errors import DataError
from m2d.evaluation.distances import LEAST_GROUPS, NEIGHBOURS
from m2d.evaluation.fidelity_rows import FidelityRow, class_row, matched_count, overall_row
from m2d.evaluation.fidelity_sides import LEAST_DEVIATION, Comparison, Scale, Side, check_sets, lesion_disjoint_halves
from m2d.evaluation.images import FeatureSet

GENERATED, FLOOR, UNSEEN, AUTOENCODER = "generated", "floor", "unseen", "autoencoder"
_WHAT = {
    GENERATED: "generated images with training images",
    FLOOR: "one half of the training images with the other, no lesion in both: what a perfect model would reach",
    UNSEEN: "test images, of lesions that are not in training, with training images",
    AUTOENCODER: "reconstructions of the test images by the model's autoencoder with training images: no sample can be "
    "better than its decoder",
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

    @property
    def side_by_side(self) -> dict[str | None, dict[str, FidelityRow]]:
        """Class code (None: overall) -> comparison -> row: the generated images beside their floors."""
        labels = dict.fromkeys(row.label for row in self.rows)
        return {label: {row.comparison: row for row in self.rows if row.label == label} for label in labels}


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
    for the classes of the generated set, and overall.

    Features are standardised by the training images because the dimensions of an extractor differ by orders of
    magnitude, and a few large ones would else be the whole of every distance; so would a few that hardly ever fire, see
    fidelity_sides.LEAST_DEVIATION. So the Fréchet distance is no FID that could be set beside a published one; nor
    could any of another extractor or another N.
    Overall, the kernel distance is the mean over the classes: independent of the class mix, and it sees a model that
    ignores its class. The other metrics pool as many images of each class from either side, in every comparison alike:
    the class's smallest number in any of them.

    Raises DataError for a class that the training images lack, an empty set or features that are not finite.
    """
    check_sets([one for one in (train, test, generated, reconstructions) if one is not None])
    labels = [int(label) for label in np.unique(generated.labels)]
    unknown = [CLASSES[label] for label in labels if not len(train.rows(label))]
    if unknown:
        raise DataError(
            f"generated: images of {' '.join(unknown)} in {generated.images.source}, but {train.images.source} has "
            f"only {' '.join(train.images.counts)} to compare them with; add training images or leave the class out"
        )
    comparisons = _comparisons(train, test, generated, reconstructions, seed)
    counts, notes = _overall_counts(comparisons, labels)
    matched = {label: matched_count([one.of_class(label) for one in comparisons]) for label in labels}
    rows = []
    for comparison in comparisons:
        # A generator for each row: a set more or a class less does not change what the others draw.
        place = list(_WHAT).index(comparison.name)
        of_class = {
            label: class_row(
                comparison.of_class(label), label, matched[label], np.random.default_rng([seed, place, label])
            )
            for label in labels
        }
        generator = np.random.default_rng([seed, place, len(CLASSES)])
        rows.append(overall_row(comparison, [of_class[label] for label in counts], counts, generator))
        rows.extend(of_class.values())
    for name, absent in (("test images", test is None), ("reconstructions", reconstructions is None)):
        if absent:
            notes.append(f"no {name} were given, so there is no comparison with them")
    return FidelityResult(
        extractor=train.extractor,
        circular=circular,
        circularity=_circularity(train.extractor, circular),
        method=METHOD,
        comparisons={one.name: _WHAT[one.name] for one in comparisons},
        overall_counts={CLASSES[label]: count for label, count in counts.items()},
        rows=rows,
        notes=notes,
        seed=seed,
    )


def _comparisons(
    train: FeatureSet, test: FeatureSet | None, generated: FeatureSet, reconstructions: FeatureSet | None, seed: int
) -> list[Comparison]:
    scale = Scale.of(train)
    reference = Side.whole(train, scale)
    one_half, other_half = lesion_disjoint_halves(train.labels, train.groups, seed=seed)
    comparisons = [
        Comparison(GENERATED, reference, Side.whole(generated, scale)),
        Comparison(FLOOR, Side(train, one_half, scale), Side(train, other_half, scale)),
    ]
    for name, others in ((UNSEEN, test), (AUTOENCODER, reconstructions)):
        if others is not None:
            comparisons.append(Comparison(name, reference, Side.whole(others, scale)))
    return comparisons


def _overall_counts(comparisons: list[Comparison], labels: list[int]) -> tuple[dict[int, int], list[str]]:
    """Images of each class for the overall rows; a class that some comparison cannot measure is left out, and noted."""
    counts, notes = {}, []
    for label in labels:
        of_class = [one.of_class(label) for one in comparisons]
        poor = [f"{one.name} {one.lesions}" for one in of_class if one.lesions < LEAST_GROUPS]
        if poor:
            notes.append(
                f"{CLASSES[label]} is left out of the overall rows: fewer than {LEAST_GROUPS} lesions on a side "
                f"({', '.join(poor)})"
            )
        else:
            counts[label] = min(one.smaller for one in of_class)
    return counts, notes


def _circularity(extractor: str, circular: bool | None) -> str:
    if circular is None:
        return (
            f"Whether {extractor} guided the training of the model is not known; if so, its distances say too little."
        )
    if circular:
        return (
            f"{extractor} guided the training of the model, so its distances flatter the generated images: read those "
            "of an extractor that did not beside them."
        )
    return f"{extractor} had no part in the training of the model."
