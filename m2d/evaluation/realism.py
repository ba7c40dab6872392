"""How typical each generated image is of its class: for choosing the best and the worst ones to show.

No score of a set: pictures for a person to judge the numbers by.
"""

import numpy as np
import torch

from m2d.evaluation.images import FeatureSet
from m2d.generation.neighbours import nearest, unit_rows

NEIGHBOURS = 5


def typicality(train: FeatureSet, generated: FeatureSet) -> np.ndarray:
    """Of each generated image the mean distance to the nearest training images of its class: float64 [N].

    Distance: 1 - cosine of features standardised by the training images; up to five neighbours. Small: typical.
    """
    mean, std = train.cls.mean(axis=0, dtype=np.float64), train.cls.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-6 * std.max(), std, 1)

    def unit(features: np.ndarray) -> torch.Tensor:
        return unit_rows(torch.from_numpy(((features - mean) / std).astype(np.float32)))

    distances = np.empty(len(generated))
    for label in np.unique(generated.labels):
        rows, bank = generated.rows(int(label)), train.rows(int(label))
        k = min(NEIGHBOURS, len(bank))
        found, _ = nearest(unit(generated.cls[rows]), unit(train.cls[bank]), k)
        distances[rows] = found.mean(dim=1).numpy()
    return distances
