"""What fidelity compares: rows of a feature set, standardised by the reference, and two halves without a common lesion.

Called by fidelity alone.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from m2d.errors import DataError
from m2d.evaluation.images import FeatureSet

# Of the median feature's deviation: what a feature is divided by at least. By plain standardisation the features that
# hardly ever fire in training (a tenth of EfficientNet-Lite0's deviate by less than a sixth of the median) are nearly
# all of the cubic kernel wherever one does fire: the prototype's samples were at 16 to 82 in their six classes, with an
# error of a quarter to a half of that. With this they are at 3.1 to 5.1, with an error of a tenth; real ones stay at 0.
LEAST_DEVIATION = 0.3


@dataclass(frozen=True)
class Scale:
    """What standardises features: (x - mean) / deviation."""

    mean: np.ndarray  # [D]
    deviation: np.ndarray  # [D]

    @classmethod
    def of(cls, reference: FeatureSet) -> "Scale":
        """As `of_rows`, of a set's features."""
        return cls.of_rows(reference.cls)

    @classmethod
    def of_rows(cls, reference: np.ndarray) -> "Scale":
        """Mean and deviation of [N, D], the latter at least LEAST_DEVIATION of the median feature's."""
        mean, std = reference.mean(axis=0, dtype=np.float64), reference.std(axis=0, dtype=np.float64)
        alive = std > 1e-6 * std.max()  # what else there is, is rounding
        least = LEAST_DEVIATION * float(np.median(std[alive])) if alive.any() else 1.0
        return cls(mean, np.maximum(std, least))


@dataclass(frozen=True)
class Side:
    """Some rows of a feature set. Features are standardised when they are asked for, so that no copy is kept."""

    features: FeatureSet
    rows: np.ndarray  # int64 [n]
    scale: Scale

    @classmethod
    def whole(cls, features: FeatureSet, scale: Scale) -> "Side":
        """All rows."""
        return cls(features, np.arange(len(features)), scale)

    def of_class(self, label: int) -> "Side":
        """The rows of a class."""
        return Side(self.features, self.rows[self.features.labels[self.rows] == label], self.scale)

    def draw(self, counts: dict[int, int], generator: np.random.Generator) -> "Side":
        """As many rows of each class as counts says, without replacement."""
        drawn = [generator.choice(self.of_class(label).rows, count, replace=False) for label, count in counts.items()]
        return Side(self.features, np.concatenate(drawn), self.scale)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> np.ndarray:
        """Object [n]; equal values are one lesion."""
        groups: np.ndarray = self.features.groups[self.rows]
        return groups

    @property
    def lesions(self) -> int:
        """How many different ones."""
        return len(set(self.groups.tolist()))

    @property
    def standardised(self) -> np.ndarray:
        """float64 [n, D]."""
        features: np.ndarray = (self.features.cls[self.rows] - self.scale.mean) / self.scale.deviation
        return features


@dataclass(frozen=True)
class Comparison:
    """Another side against a reference side."""

    name: str
    reference: Side
    other: Side

    def of_class(self, label: int) -> "Comparison":
        """Both sides' rows of a class."""
        return Comparison(self.name, self.reference.of_class(label), self.other.of_class(label))

    @property
    def smaller(self) -> int:
        """Images of the smaller side."""
        return min(len(self.reference), len(self.other))

    @property
    def lesions(self) -> int:
        """Lesions of the side that has fewer."""
        return min(self.reference.lesions, self.other.lesions)


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


def check_sets(sets: list[FeatureSet]) -> None:
    """One extractor, images in every set, and numbers in every vector. Raises DataError, or ValueError for a bug."""
    extractors = {one.extractor for one in sets}
    if len(extractors) > 1:
        raise ValueError(f"features of different extractors: {' '.join(sorted(extractors))}")
    for one in sets:
        if not len(one):
            raise DataError(f"{one.images.name}: no images in {one.images.source}; fidelity needs some of every set")
        broken = np.flatnonzero(~np.isfinite(one.cls).all(axis=1))
        if len(broken):
            raise DataError(
                f"{one.images.name}: {one.extractor} gives {len(broken):,} of {len(one):,} images features that are "
                f"not finite, first {one.images.paths[broken[0]]}; check that image, and the extractor's weights"
            )
