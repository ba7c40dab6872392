"""Nearest neighbours by cosine distance, exact and in bounded memory, of standardised features and of thumbnails.

The gates of generation and the evaluation's memorisation call it, so that both mean the same by a near-copy.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

THUMBNAIL = 8  # pixels a side
LEAST_DEVIATION = 0.3
COPY_FLOOR = 1e-4  # of every limit of near-copies, so that an exact copy is one even where training images repeat
NEAR_DUPLICATE = 3e-3  # of thumbnails; in HAM10000 no two lesions are nearer than 7e-3, copies and small crops are
_BLOCK_VALUES = 2**22  # similarities at once: 16 MiB
_QUERIES = 256


@dataclass(frozen=True)
class Standardizer:
    """Features less a mean, over a scale; [D] each, both of the training images."""

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(
        cls, features: np.ndarray, scale: Callable[[np.ndarray], np.ndarray], dtype: npt.DTypeLike = np.float64
    ) -> Self:
        """features [n, D]. scale: what to divide by, from the deviations: one of the three functions below."""
        mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        return cls(mean.astype(dtype), scale(deviation).astype(dtype))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Standardised, [n, D]."""
        return np.asarray((features - self.mean) / self.scale)

    def unit(self, features: np.ndarray) -> Tensor:
        """Standardised, then at length 1: float32 [n, D]."""
        return unit_rows(torch.from_numpy(self(features).astype(np.float32)))


def at_least_median(deviation: np.ndarray) -> np.ndarray:
    """Features that few training images show would make every new image a stranger: they count less, not more."""
    return deviation.clip(min=max(float(np.median(deviation)), 1e-6))


def at_least_part_of_median(deviation: np.ndarray) -> np.ndarray:
    """At least LEAST_DEVIATION of the median of the features that change at all.

    Otherwise features that hardly ever fire in training are nearly all of a cubic kernel wherever one does fire.
    """
    alive = deviation > 1e-6 * deviation.max()  # what else there is, is rounding
    return np.maximum(deviation, LEAST_DEVIATION * float(np.median(deviation[alive])) if alive.any() else 1.0)


def one_where_constant(deviation: np.ndarray) -> np.ndarray:
    """A feature that never changes, rounding aside, is divided by 1: in training it is 0 whatever it is divided by."""
    return np.where(deviation > 1e-6 * deviation.max(), deviation, 1)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Mean grey levels of the cells of an 8 x 8 grid: uint8 [n, H, W, 3] to float32 [n, 8, 8, 3]."""
    pixels = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(pixels, THUMBNAIL).permute(0, 2, 3, 1).numpy()


def unit_thumbnails(cells: np.ndarray) -> Tensor:
    """[n, 8, 8, 3] to float32 [n, 192]: less the image's mean over all values, at length 1."""
    flat = torch.from_numpy(np.ascontiguousarray(cells.reshape(len(cells), -1)))
    return unit_rows(flat - flat.mean(dim=1, keepdim=True))


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows at length 1, float32 [n, D]; a row of zeros stays one."""
    lengths = torch.linalg.vector_norm(vectors.float(), dim=1, keepdim=True)
    return vectors.float() / lengths.clamp(min=1e-12)


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int = 1,
    *,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
    block_values: int = _BLOCK_VALUES,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank to each query: distances float64 [B, k] ascending, and their rows int64 [B, k].

    queries [B, D], bank [n, D]: float32, as `unit_rows` makes them. Distance: |a - b|^2 / 2 = 1 - cos(a, b), in float64
    for the rows found, as float32 is too coarse for copies. query_groups [B], or of several each [B, G], bank_groups
    [n]: pairs of one group do not count. Where fewer than k rows are left: distance inf, row -1.
    """
    distances = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    block = max(1, block_values // _QUERIES)
    for first in range(0, len(queries) if len(bank) else 0, _QUERIES):
        some = slice(first, first + _QUERIES)
        best, found = torch.full_like(rows[some], -torch.inf, dtype=torch.float32), rows[some]
        for start in range(0, len(bank), block):
            part = bank[start : start + block]
            similar = queries[some] @ part.T
            if query_groups is not None and bank_groups is not None:
                alike = query_groups[some, ..., None] == bank_groups[start : start + block]
                similar.masked_fill_(alike.any(dim=1) if alike.dim() == 3 else alike, -torch.inf)
            numbers = torch.arange(start, start + len(part), device=rows.device).expand(len(similar), -1)
            best, chosen = torch.cat([best, similar], dim=1).topk(k, dim=1)
            found = torch.cat([found, numbers], dim=1).gather(1, chosen)
        rows[some] = found.masked_fill(best == -torch.inf, -1)
        for place, of_place in enumerate(rows[some].T):
            gap = queries[some].double() - bank[of_place.clamp(min=0)].double()
            distances[some, place] = (gap.square().sum(dim=1) / 2).masked_fill(of_place < 0, torch.inf)
    order = distances.argsort(dim=1, stable=True)
    return distances.gather(1, order), rows.gather(1, order)


def nearest_in_views(
    views: Iterable[Tensor], bank: Tensor, *, query_groups: Tensor | None = None, bank_groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest row of the bank to B images in each of V views: distances float64 [B, V] and rows int64 [B, V].

    views: the images' unit vectors [B, D] in one view after another. Groups: see `nearest`.
    """
    found = [nearest(view, bank, query_groups=query_groups, bank_groups=bank_groups) for view in views]
    distances, rows = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    return distances, rows


def near_duplicates(views: Iterable[Tensor], bank: Tensor) -> list[tuple[int, int]]:
    """Pairs (a < b) of images whose thumbnails are nearer than NEAR_DUPLICATE in some view, in order.

    bank: unit vectors [n, D] of all images, float32; views: the same in each view. An image without contrast, a row of
    zeros, is no one's duplicate. Exact, and not quadratic: a tree over principal components, which never add distance.
    """
    rows = torch.nonzero(bank.any(dim=1)).squeeze(1)
    bank = bank[rows].double()
    if not len(rows):
        return []
    axes = torch.linalg.eigh(bank.T @ bank).eigenvectors[:, -8:]
    tree = cKDTree((bank @ axes).numpy())
    pairs: set[tuple[int, int]] = set()
    for view in views:
        turned = view[rows].double()
        near = cKDTree((turned @ axes).numpy()).sparse_distance_matrix(
            tree, (2 * NEAR_DUPLICATE) ** 0.5, output_type="ndarray"
        )
        a, b = (torch.from_numpy(near[side].astype(np.int64)) for side in "ij")
        close = (turned[a] - bank[b]).square().sum(dim=1) / 2 < NEAR_DUPLICATE
        pairs |= {(min(pair), max(pair)) for pair in zip(rows[a[close]].tolist(), rows[b[close]].tolist(), strict=True)}
    return sorted(pair for pair in pairs if pair[0] != pair[1])


def calibration_distances(
    views: Callable[[np.ndarray], Iterable[Tensor]], bank: Tensor, lesions: Tensor, *, most: int, seed: int = 0
) -> np.ndarray:
    """Distances of training images to the nearest one of another lesion, float64 [at most `most`]: what chance gives.

    views(rows): those images in each view, see `nearest_in_views`. bank [n, D], lesions int64 [n]: of all. Of more than
    `most`, so many are drawn by the seed. Where there is no other lesion the distance is inf.
    """
    drawn = drawn_rows(len(bank), most, seed)
    groups = lesions[torch.from_numpy(drawn).to(lesions.device)]
    distances, _ = nearest_in_views(views(drawn), bank, query_groups=groups, bank_groups=lesions)
    return distances.min(dim=1).values.cpu().numpy()


def drawn_rows(count: int, most: int, seed: int = 0) -> np.ndarray:
    """All row numbers below `count`, or `most` of them, ascending, always the same for a seed."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
