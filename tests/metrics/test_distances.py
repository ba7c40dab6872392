"""Distances between feature sets agree with closed forms, torchmetrics and prdc."""

import numpy as np
import prdc
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from m2d.metrics import distances
from m2d.metrics.distances import frechet_distance, kernel_distance, neighbour_scores, vendi_score


def gaussian(count: int, dimensions: int, seed: int, *, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """Correlated features of different sizes, as an extractor gives them."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((dimensions, dimensions)) / np.sqrt(dimensions)
    return shift + spread * generator.standard_normal((count, dimensions)) @ mix


def root_mean_square(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# --- Fréchet ----------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    a, b = gaussian(400, 32, 0), gaussian(300, 32, 1, shift=0.3, spread=1.4)
    means_and_covariances = [torch.from_numpy(part) for side in (a, b) for part in (side.mean(axis=0), np.cov(side.T))]
    expected = float(_compute_fid(*means_and_covariances))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_gaussians_has_a_closed_form() -> None:
    """N(0, 1) and N(2, 9) in each of 4 dimensions: 4 (2^2 + (3 - 1)^2)."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((200_000, 4)), 2 + 3 * generator.standard_normal((200_000, 4))
    assert frechet_distance(a, b) == pytest.approx(32, rel=0.01)


def test_frechet_distance_is_exact_with_fewer_images_than_dimensions() -> None:
    """Four points on two axes of ten: variances 2 s^2 / 3 on each, so the roots' differences are known."""
    axes = np.eye(10)[:2]
    a = np.concatenate([3 * axes[:1], -3 * axes[:1], 1 * axes[1:], -1 * axes[1:]])
    b = np.concatenate([5 * axes[:1], -5 * axes[:1], 4 * axes[1:], -4 * axes[1:]]) + np.eye(10)[7] * 6
    assert frechet_distance(a, b) == pytest.approx(36 + 2 / 3 * ((5 - 3) ** 2 + (4 - 1) ** 2), rel=1e-12)
    for count in (20, 600):
        c = gaussian(count, 50, 0)
        assert frechet_distance(c, c[::-1]) == pytest.approx(0, abs=1e-10)


# --- kernel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_kernel_distance_of_all_images_is_that_of_torchmetrics_in_float64(kind: type) -> None:
    """KID of one subset that holds all images."""
    a, b = gaussian(96, 40, 0).astype(kind), gaussian(96, 40, 1, shift=0.2).astype(kind)
    expected = float(poly_mmd(torch.from_numpy(a).double(), torch.from_numpy(b).double()))
    assert kernel_distance(a, b).value == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_two_points_has_a_closed_form() -> None:
    """Copies of u and copies of v: k(u, u) + k(v, v) - 2 k(u, v), at different N."""
    u, v = np.array([1.0, 2.0, 0.0, 1.0]), np.array([0.0, 1.0, 3.0, 1.0])
    found = kernel_distance(np.tile(u, (5, 1)), np.tile(v, (9, 1)))
    expected = (6 / 4 + 1) ** 3 + (11 / 4 + 1) ** 3 - 2 * (3 / 4 + 1) ** 3
    assert (found.value, found.standard_error) == pytest.approx((expected, 0), abs=1e-12)


def test_kernel_distance_is_unbiased_and_its_error_is_the_spread_of_its_values() -> None:
    """N(0, 1) and N(m, 1) in one dimension: the moments of x y up to the third give the distance; 24 images suffice."""
    m, repeats = 1.0, 600
    generator = np.random.default_rng(0)
    found = [
        kernel_distance(generator.standard_normal((24, 1)), m + generator.standard_normal((24, 1)))
        for _ in range(repeats)
    ]
    values = np.array([one.value for one in found])
    of_shifted = 1 + 3 * m**2 + 3 * (1 + m**2) ** 2 + (m**3 + 3 * m) ** 2
    expected = 4 + of_shifted - 2 * (1 + 3 * (1 + m**2))
    assert values.mean() == pytest.approx(expected, abs=4 * values.std() / np.sqrt(repeats))
    assert 0.9 < root_mean_square([one.standard_error for one in found]) / values.std() < 1.3


def test_the_error_is_at_most_a_root_of_two_too_large_where_nothing_differs() -> None:
    found = [kernel_distance(gaussian(48, 12, 2 * seed), gaussian(48, 12, 2 * seed + 1)) for seed in range(300)]
    error = root_mean_square([one.standard_error for one in found])
    assert 1.0 < error / np.std([one.value for one in found]) < 1.6


def photographs(lesions: int, each: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features of several photographs that hardly differ within a lesion, and their lesions."""
    groups = np.repeat(np.arange(lesions), each)
    features = generator.standard_normal((lesions, 4))[groups] + 0.1 * generator.standard_normal((lesions * each, 4))
    return features, groups


def test_photographs_of_one_lesion_do_not_push_the_distance_up() -> None:
    """Both sides are of one distribution, so the mean is 0 if the pairs of a lesion do not count, and far off if so."""
    generator = np.random.default_rng(3)
    values, naive = [], []
    for _ in range(300):
        (a, lesions_a), (b, lesions_b) = photographs(10, 4, generator), photographs(10, 4, generator)
        values.append(kernel_distance(a, b, groups_a=lesions_a, groups_b=lesions_b).value)
        naive.append(kernel_distance(a, b).value)
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error < np.mean(naive)


def test_the_error_counts_lesions() -> None:
    """Sides that differ: the spread over new lesions, which an error over images would understate."""
    generator = np.random.default_rng(4)
    found, by_image = [], []
    for _ in range(300):
        (a, lesions_a), (b, lesions_b) = photographs(20, 4, generator), photographs(20, 4, generator)
        found.append(kernel_distance(a, b + 1, groups_a=lesions_a, groups_b=lesions_b))
        by_image.append(kernel_distance(a, b + 1).standard_error)
    spread, error = np.std([one.value for one in found]), root_mean_square([one.standard_error for one in found])
    assert 0.9 < error / spread < 1.4
    assert root_mean_square(by_image) < 0.8 * spread


def test_leaving_a_lesion_out_is_what_the_error_is_made_of() -> None:
    """The jackknife by hand: the distance anew without each lesion of either side."""
    generator = np.random.default_rng(5)
    a, b = generator.standard_normal((9, 3)), generator.standard_normal((7, 3)) + 0.5
    of_a, of_b = np.array([0, 0, 1, 1, 1, 2, 3, 3, 4]), np.array([5, 5, 6, 7, 8, 8, 8])
    variance = 0.0
    for side, lesions in (("a", of_a), ("b", of_b)):
        values = []
        for lesion in np.unique(lesions):
            in_a, in_b = (of_a != lesion, of_b >= 0) if side == "a" else (of_a >= 0, of_b != lesion)
            values.append(kernel_distance(a[in_a], b[in_b], groups_a=of_a[in_a], groups_b=of_b[in_b]).value)
        variance += (len(values) - 1) / len(values) * np.square(values - np.mean(values)).sum()
    found = kernel_distance(a, b, groups_a=of_a, groups_b=of_b)
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-10)


# --- neighbours and Vendi ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "shift", "k"), [(150, 0.0, 5), (150, 0.5, 5), (90, 0.3, 3), (7, 0.2, 5)])
def test_neighbour_scores_are_those_of_prdc(count: int, shift: float, k: int) -> None:
    reference, other = gaussian(120, 10, 0), gaussian(count, 10, 1, shift=shift, spread=1.2)
    expected = prdc.compute_prdc(reference, other, nearest_k=k)
    assert neighbour_scores(reference, other, k=k) == pytest.approx(expected, rel=1e-6)


def test_duplicates_lower_coverage_and_not_precision() -> None:
    reference, other = gaussian(200, 10, 0), gaussian(200, 10, 1)
    whole, copies = neighbour_scores(reference, other), neighbour_scores(reference, np.repeat(other[:10], 20, axis=0))
    assert copies["coverage"] < 0.5 * whole["coverage"]
    assert copies["precision"] > 0.7 * whole["precision"]


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="1 vectors"):
        frechet_distance(np.ones((1, 3)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="of 2 lesions"):
        kernel_distance(np.ones((6, 2)), np.ones((5, 2)), groups_a=np.array([1, 1, 1, 2, 2, 2]))
    with pytest.raises(ValueError, match="5 vectors"):
        neighbour_scores(gaussian(50, 4, 0), gaussian(5, 4, 1), k=5)
    with pytest.raises(ValueError, match="zeros"):
        vendi_score(np.zeros((3, 2)))


@pytest.mark.parametrize("dimensions", [8, 40])
def test_vendi_score_counts_what_differs(dimensions: int) -> None:
    """Copies count once, orthogonal images each; (3, 1) of two directions: exp of the entropy of (3/4, 1/4)."""
    assert vendi_score(np.tile(np.arange(1.0, dimensions + 1), (20, 1))) == pytest.approx(1)
    assert vendi_score(np.eye(dimensions) * 7) == pytest.approx(dimensions)
    mixed = np.eye(dimensions)[[0, 0, 0, 1] * 5]
    assert vendi_score(mixed) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_the_size_of_the_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, lesions = gaussian(70, 6, 0), gaussian(45, 6, 1), np.arange(70) // 2

    def all_values() -> list[float]:
        return [*vars(kernel_distance(a, b, groups_a=lesions)).values(), *neighbour_scores(a, b).values()]

    whole = all_values()
    monkeypatch.setattr(distances, "_BLOCK_VALUES", 300)
    assert all_values() == pytest.approx(whole, rel=1e-10)
