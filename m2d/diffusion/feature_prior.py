"""The feature prior: per class, a shrunk Gaussian over the cls features of the training images.

Training fits it and stores it in the checkpoint; generation draws the feature that guides an image from it, so that
generating needs neither the dataset nor the extractor, and no sample copies a real image.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from m2d.classes import ISIC7, ClassSet
from m2d.errors import DataError

WEAK_BELOW = 30
"""A class of fewer images is weak: its mean alone is off by more than 1 / sqrt(30), 18 % of the class's own spread,
and its covariance knows fewer than 29 of the features' hundreds of directions."""

# Measured on HAM10000's EfficientNet-Lite0 features, as the median distance from a draw to the nearest image of the fit
# over that of new real images: with a covariance of their own 0.60 to 0.68 for 3 images, 0.85 to 0.99 for 5, 1.05 or
# more from 10 on. Below, real images would stand behind the draws, and the common variance explains new images better.
_OWN_COVARIANCE_FROM = 10
_DEAD = 1e-6  # a dimension's deviation, relative to its mean where that exceeds 1, up to which it counts as constant


@dataclass(frozen=True, eq=False)
class FeaturePrior:
    """N(mean_c, C_c) for each class c, with C_c = diag(scale) (factors_c^T factors_c + isotropic_c^2 I) diag(scale).

    D dimensions, R the largest number of directions that a class keeps; a class with fewer has rows of zeros.
    """

    counts: Tensor  # int64 [K], images of the fit
    mean: Tensor  # float32 [K, D], zeros for a class without images
    scale: Tensor  # float32 [D], deviation over all images; 0 for a dimension that is constant
    factors: Tensor  # float32 [K, R, D], in units of scale
    isotropic: Tensor  # float32 [K], a deviation, in units of scale
    classes: ClassSet = ISIC7  # of K

    @classmethod
    def fit(
        cls,
        features: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        max_rank: int = 128,
        classes: ClassSet = ISIC7,
    ) -> Self:
        """Fit to features [n, D] (any float type) of labels int64 [n], indices in `classes`: one row for each image.

        Features are divided by their deviation over all images, so that shrinking treats dimensions alike. The
        covariance of a class with n_c >= 10 images is Ledoit and Wolf's (JMVA 88, 2004), as scikit-learn computes it:
        (1 - delta) S + delta mu I with S = X^T X / n_c of the centred rows X and mu = tr S / D. Of S's eigenvalues the
        r <= max_rank largest l_i are kept, and the D - r others become their mean l:

            factors row i = sqrt((1 - delta) (l_i - l)) v_i^T,    isotropic^2 = delta mu + (1 - delta) l.

        This is the likeliest covariance of that form (Tipping and Bishop, JRSS B 61, 1999), with S's trace.

        A class of fewer than ten images, or of equal ones, gets its mean and the isotropic variance that the classes
        have within themselves: the sum of squared distances from class means over (n - classes) D. A class without
        images is left out, see `require`. Constant dimensions take no part and stay at their mean.

        Raises DataError where shapes do not fit, a feature is not finite, or no two images of a class differ.
        """
        rows, label = _checked(features, labels, len(classes))
        centre, deviation = rows.mean(axis=0), rows.std(axis=0)
        alive = deviation > _DEAD * np.maximum(np.abs(centre), 1)
        standardized = (rows[:, alive] - centre[alive]) / deviation[alive]
        counts = np.bincount(label, minlength=len(classes))
        mean, centred = np.zeros((len(classes), rows.shape[1])), {}
        for index in np.flatnonzero(counts):
            mean[index] = rows[label == index].mean(axis=0)
            of_class = standardized[label == index]
            centred[index] = of_class - of_class.mean(axis=0)
        scatter = {index: float(np.square(of_class).sum()) for index, of_class in centred.items()}
        rounding = 1e-12 * alive.sum()
        if max(scatter.values()) <= rounding:
            raise DataError(
                "feature prior: no class has two images with different features, so their spread is unknown; add "
                "images or raise feature_extractor.statistics_images"
            )
        within = sum(scatter.values()) / ((len(rows) - len(centred)) * alive.sum())

        isotropic, kept = np.zeros(len(classes)), {}
        for index, of_class in centred.items():
            variance = within
            if counts[index] >= _OWN_COVARIANCE_FROM and scatter[index] > rounding:
                kept[index], variance = _low_rank_and_isotropic(of_class, max_rank)
            isotropic[index] = np.sqrt(variance)
        factors = np.zeros((len(classes), max(map(len, kept.values()), default=0), rows.shape[1]))
        for index, part in kept.items():
            factors[index, : len(part), alive] = part.T  # an index array between slices: numpy puts its axis first
        arrays = {"mean": mean, "scale": np.where(alive, deviation, 0), "factors": factors, "isotropic": isotropic}
        tensors = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
        return cls(counts=torch.from_numpy(counts), classes=classes, **tensors)

    @property
    def dim(self) -> int:
        """D, of a feature."""
        return self.mean.shape[1]

    @property
    def noise_dim(self) -> int:
        """R + D: standard normal numbers per sample."""
        return self.factors.shape[1] + self.dim

    @property
    def present(self) -> list[str]:
        """Codes of the classes that can be drawn."""
        return [code for code, count in zip(self.classes.codes, self.counts.tolist()) if count > 0]

    @property
    def weak(self) -> list[str]:
        """Codes of the classes that rest on fewer than WEAK_BELOW images, but on some."""
        return [code for code, count in zip(self.classes.codes, self.counts.tolist()) if 0 < count < WEAK_BELOW]

    def require(self, codes: Iterable[str]) -> None:
        """Raise DataError where one of the classes had no image in the fit."""
        wanted = set(codes) - set(self.present)
        absent = [code for code in self.classes.codes if code in wanted]
        if absent:
            raise DataError(
                f"feature prior: no training image was of {', '.join(absent)}, so there is no feature to draw; leave "
                f"it out (--classes {','.join(self.present)}), guide by the class alone (--feature none), or train "
                "with images of it"
            )

    def sample(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Features float32 [B, D] of labels int64 [B]: mean_c + scale (noise[:R] factors_c + isotropic_c noise[R:]).

        noise: standard normal [B, R + D], or scaled; the result is on its device and depends on nothing else. Computed
        in float64, so that a sample rounds to the same float32 in a batch of any size. Raises DataError for a class
        without images, and names it.
        """
        if noise.shape != (len(labels), self.noise_dim):
            raise ValueError(f"noise is {list(noise.shape)}; it must be [{len(labels)}, {self.noise_dim}]")
        self.require(self.classes.codes[index] for index in labels.unique().tolist())
        return draw_features(labels, noise, self.mean, self.scale, self.factors, self.isotropic)

    def tensors(self) -> dict[str, Tensor]:
        """What to store, by name."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], classes: ClassSet = ISIC7) -> Self:
        """The inverse of `tensors`. Raises ValueError, in one line, where they are not those of a prior."""
        names = {field.name for field in fields(cls)} - {"classes"}
        if tensors.keys() != names:
            raise ValueError(f"lacks {sorted(names - tensors.keys())} and has unknown {sorted(tensors.keys() - names)}")
        rank, dim = tensors["factors"].shape[-2:]
        k = len(classes)
        shapes = {"counts": [k], "mean": [k, dim], "scale": [dim], "factors": [k, rank, dim], "isotropic": [k]}
        for name, shape in shapes.items():
            tensor, dtype = tensors[name], torch.int64 if name == "counts" else torch.float32
            if list(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} and must be {dtype} {shape}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has numbers that are not finite")
            if name in ("counts", "scale", "isotropic") and (tensor < 0).any():
                raise ValueError(f"{name} has a negative number")
        return cls(**tensors, classes=classes)


def draw_features(
    labels: Tensor, noise: Tensor, mean: Tensor, scale: Tensor, factors: Tensor, isotropic: Tensor
) -> Tensor:
    """What FeaturePrior.sample gives, of its tensors; the class of each label has images."""
    labels = labels.to(noise.device)
    along, around = noise.double().split([factors.shape[1], mean.shape[1]], dim=1)
    features = torch.empty_like(around)
    for index in labels.unique().tolist():
        chosen = labels == index
        parts = (mean[index], scale, factors[index], isotropic[index])
        centre, spread, directions, rest = (part.to(noise.device, torch.float64) for part in parts)
        features[chosen] = centre + spread * (along[chosen] @ directions + rest * around[chosen])
    return features.float()


def _checked(features: np.ndarray | Tensor, labels: np.ndarray | Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, D] and int64 [n] on the CPU, or DataError."""
    rows = torch.as_tensor(features).detach().cpu().double().numpy()
    classes = torch.as_tensor(labels).cpu().numpy()
    if rows.ndim != 2 or 0 in rows.shape or classes.shape != rows.shape[:1]:
        raise DataError(
            f"feature prior: features are {list(rows.shape)} and labels {list(classes.shape)}; they must be [n, D] and "
            "[n] with at least one image"
        )
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0 or classes.max() >= size:
        raise DataError(f"feature prior: labels must be whole numbers from 0 to {size - 1}")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise DataError(
            f"feature prior: the features of {len(broken)} of {len(rows)} images are not finite (the first is image "
            f"{broken[0]}); compute them again, in float32 if the extractor overflows in a narrower type"
        )
    return rows, classes


def _low_rank_and_isotropic(centred: np.ndarray, max_rank: int) -> tuple[np.ndarray, float]:
    """Factors [r, D] and isotropic variance of the Ledoit-Wolf covariance of centred rows [n, D], see `fit`."""
    from scipy.linalg import eigh
    from sklearn.covariance import ledoit_wolf_shrinkage

    count, dim = centred.shape
    delta = float(np.clip(ledoit_wolf_shrinkage(centred, assume_centered=True), 0, 1))
    trace = np.square(centred).sum() / count
    # X X^T / n and X^T X / n share their eigenvalues; the smaller of the two is the cheaper by far.
    by_images = count < dim
    gram = (centred @ centred.T if by_images else centred.T @ centred) / count
    side = len(gram)
    values, vectors = eigh(gram, subset_by_index=[max(0, side - max_rank), side - 1])
    real = values > values[-1] * side * np.finfo(np.float64).eps  # the rest is zero but for rounding
    values, vectors = values[real], vectors[:, real]
    directions = vectors.T @ centred / np.sqrt(count * values)[:, None] if by_images else vectors.T
    left_out = max(trace - values.sum(), 0.0) / (dim - len(values)) if len(values) < dim else 0.0
    weights = (1 - delta) * np.maximum(values - left_out, 0)
    return directions * np.sqrt(weights)[:, None], delta * trace / dim + (1 - delta) * left_out
