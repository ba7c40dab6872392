"""How far apart two sets of feature vectors are, and how varied one is: maths on arrays, in float64 and in blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

NEIGHBOURS = 5  # k of precision, recall, density, coverage: Naeem et al. and the prdc package
LEAST_GROUPS = 3  # on a side of a kernel distance: with one left out, a pair must be left
_BLOCK_VALUES = 2**22  # of a kernel or a distance at once: 32 MiB


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians fitted to a [N, D] and b [M, D] (N, M > 1).

    The squared distance (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6), exact also where
    N <= D leaves covariances singular: with S = F^T F the trace of the root is the sum of the singular values of
    F_a F_b^T. Biased upwards, the more the smaller N and M: compare only values at equal ones, and with what two real
    samples of that size give.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance of {min(len(a), len(b))} vectors")
    means = [side.mean(axis=0, dtype=np.float64) for side in (a, b)]
    factors = [_covariance_factor(side - mean) for side, mean in zip((a, b), means)]
    root = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(np.square(factor).sum() for factor in factors)
    return max(0.0, float(np.square(means[0] - means[1]).sum() + traces - 2 * root))


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance and its standard error. The value may fall below 0, for it is unbiased."""

    value: float
    standard_error: float


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, groups_a: np.ndarray | None = None, groups_b: np.ndarray | None = None
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of a [N, D] and b [M, D], kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, "Demystifying MMD GANs", section 4; N and M may differ. groups_a [N], groups_b [M]: equal
    values are one lesion; without them each vector is its own. Raises ValueError for less than three on a side.

    Value: all pairs but those of one lesion, which are not independent, and with the few lesions of a rare class would
    push the distance up. KID's usual mean over random subsets has the same expectation and more variance.
    Standard error: two-sample jackknife over lesions. KID's deviation over subsets falls to 0 with their number, though
    they overlap. The jackknife errs on the large side in expectation (Efron and Stein 1981, "The jackknife estimate of
    variance"): by up to a root of 2 where both sides are of one distribution.
    """
    codes_a, codes_b = (
        np.arange(len(side)) if groups is None else np.unique(groups, return_inverse=True)[1]
        for side, groups in ((a, groups_a), (b, groups_b))
    )
    sizes_a, within_a, others_a = _within(a, codes_a)
    sizes_b, within_b, others_b = _within(b, codes_b)
    rows, columns = np.empty(len(a)), np.zeros(len(b))  # sums of the kernel over the other side
    for part in _blocks(len(a), len(b)):
        kernel = _kernel(a[part], b)
        rows[part] = kernel.sum(axis=1)
        columns += kernel.sum(axis=0)
    between, n, m = rows.sum(), len(a), len(b)
    value = within_a + within_b - 2 * between / (n * m)
    without_a = others_a - 2 * (between - np.bincount(codes_a, rows)) / ((n - sizes_a) * m)
    without_b = others_b - 2 * (between - np.bincount(codes_b, columns)) / (n * (m - sizes_b))
    variance = sum((len(without) - 1) * without.var() for without in (without_a, without_b))
    return KernelDistance(float(value), float(np.sqrt(variance)))


def neighbour_scores(reference: np.ndarray, other: np.ndarray, *, k: int = NEIGHBOURS) -> dict[str, float]:
    """How the balls around the images of one set, each reaching to its k-th neighbour, hold the images of the other.

    reference [N, D], other [M, D], Euclidean distance. Raises ValueError unless both hold more than k. Precision: share
    of the other set in a ball of the reference. Recall: share of the reference in a ball of the other set
    (Kynkaanniemi et al. 2019). Density: balls of the reference that hold an image of the other set, on average, over k;
    may exceed 1. Coverage: share of the reference's balls that hold one (Naeem et al. 2020). All four depend on N and
    M: compare at equal ones.
    """
    if min(len(reference), len(other)) <= k:
        raise ValueError(f"{min(len(reference), len(other))} vectors have no {k}-th neighbour each")
    reach, reach_of_other = _squared_reach(reference, k), _squared_reach(other, k)
    holders = np.zeros(len(other), dtype=np.int64)  # balls of the reference around each of the other set
    recalled, covered = 0, 0
    for part in _blocks(len(reference), len(other)):
        squared = _squared_distances(reference[part], other)
        inside = squared < reach[part, None]
        holders += inside.sum(axis=0)
        covered += int(inside.any(axis=1).sum())
        recalled += int((squared < reach_of_other).any(axis=1).sum())
    return {
        "precision": float((holders > 0).mean()),
        "recall": recalled / len(reference),
        "density": float(holders.mean() / k),
        "coverage": covered / len(reference),
    }


def vendi_score(features: np.ndarray) -> float:
    """Number of images that differ, from 1 (all alike) to N: exp of the entropy of the eigenvalues of K / N.

    features [N, D], K the cosines (Friedman and Dieng 2022, "The Vendi Score", definition 3.1). At most D, and it grows
    with N: compare at equal ones. Raises ValueError for a vector of zeros, which has no direction.
    """
    lengths = np.linalg.norm(features.astype(np.float64, copy=False), axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a vector of zeros has no cosine")
    unit = features / lengths
    # Both products have the same eigenvalues above 0; the smaller is taken.
    product = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    shares = scipy.linalg.eigvalsh(product / len(unit))
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _covariance_factor(centred: np.ndarray) -> np.ndarray:
    """F [at most D, D] with F^T F the covariance: the triangle of QR, for a product would lose half of the digits."""
    count, dimensions = centred.shape
    if count > dimensions:
        centred = scipy.linalg.qr(centred, mode="r", check_finite=False)[0][:dimensions]
    return centred / np.sqrt(count - 1)


def _within(features: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Sizes of the groups [G], and the mean kernel over the pairs of different groups: with all, and without each [G].

    features [N, D], codes [N]: 0 .. G - 1.
    """
    sizes = np.bincount(codes)
    if len(sizes) < LEAST_GROUPS:
        raise ValueError(f"a kernel distance of {len(sizes)} lesions; {LEAST_GROUPS} are needed on either side")
    rows = np.empty(len(features))
    for part in _blocks(len(features), len(features)):
        kernel = _kernel(features[part], features)
        kernel[codes[part, None] == codes] = 0
        rows[part] = kernel.sum(axis=1)
    of_group, pairs = np.bincount(codes, rows), sizes * (len(codes) - sizes)
    # A pair is in the sums of both its groups, and is in the total twice: (i, j) and (j, i).
    without = (of_group.sum() - 2 * of_group) / (pairs.sum() - 2 * pairs)
    return sizes, float(of_group.sum() / pairs.sum()), without


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    base = a.astype(np.float64, copy=False) @ b.astype(np.float64, copy=False).T / a.shape[1] + 1
    return base * base * base  # base**3 is ten times slower


def _squared_reach(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each to its k-th neighbour, itself not counted, [N]."""
    reach = np.empty(len(features))
    for part in _blocks(len(features), len(features)):
        squared = _squared_distances(features[part], features)
        reach[part] = np.partition(squared, k, axis=1)[:, k]  # place 0 is the vector itself
    return reach


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64, copy=False), b.astype(np.float64, copy=False)
    squared = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * (a @ b.T)
    return squared.clip(min=0, out=squared)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows, so many that a block of all columns stays small."""
    step = max(1, _BLOCK_VALUES // columns)
    return (slice(first, first + step) for first in range(0, rows, step))
