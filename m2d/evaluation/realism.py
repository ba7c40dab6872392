"""How typical each generated image is of its class: for choosing the best and the worst ones to show.

No score of a set: pictures for a person to judge the numbers by.
"""

import numpy as np

from m2d.evaluation.feature_set import FeatureSet
from m2d.metrics.neighbours import Standardizer, nearest, one_where_constant

NEIGHBOURS = 5


def typicality(train: FeatureSet, generated: FeatureSet) -> np.ndarray:
    """Of each generated image the mean distance to the nearest training images of its class: float64 [N].

    Distance: 1 - cosine of features standardised by the training images; up to five neighbours. Small: typical.
    """
    scale = Standardizer.of(train.cls, one_where_constant)
    distances = np.empty(len(generated))
    for label in np.unique(generated.labels):
        rows, bank = generated.rows(int(label)), train.rows(int(label))
        k = min(NEIGHBOURS, len(bank))
        found, _ = nearest(scale.unit(generated.cls[rows]), scale.unit(train.cls[bank]), k)
        distances[rows] = found.mean(dim=1).numpy()
    return distances
