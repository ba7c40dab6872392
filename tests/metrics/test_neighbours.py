"""The search in blocks is exact; scales are those of NumPy; what is drawn to calibrate on is always the same."""

import math

import numpy as np
import torch

from m2d.metrics.neighbours import (
    Standardizer,
    at_least_median,
    calibration_distances,
    nearest,
    one_where_constant,
    unit_rows,
)


def test_the_search_in_blocks_finds_what_a_table_of_all_distances_has() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = (unit_rows(torch.randn(n, 12, generator=generator)) for n in (300, 700))
    groups, bank_groups = (torch.randint(0, 50, (n,), generator=generator) for n in (300, 700))
    table = (queries.double()[:, None] - bank.double()[None]).square().sum(dim=2) / 2
    table = table.masked_fill(groups[:, None] == bank_groups[None], torch.inf)
    expected, rows = table.sort(dim=1)
    for block_values in (1, 256 * 7, 2**22):
        found = nearest(queries, bank, 4, query_groups=groups, bank_groups=bank_groups, block_values=block_values)
        torch.testing.assert_close(found[0], expected[:, :4], rtol=0, atol=1e-12)
        assert torch.equal(found[1], rows[:, :4])


def test_where_too_few_are_left_the_distance_is_infinite() -> None:
    bank = unit_rows(torch.eye(2))
    distances, rows = nearest(bank, bank, 2, query_groups=torch.tensor([0, 1]), bank_groups=torch.tensor([0, 1]))
    assert distances.tolist() == [[1.0, math.inf], [1.0, math.inf]]
    assert rows.tolist() == [[1, -1], [0, -1]]


def test_features_are_standardised_by_the_training_images() -> None:
    features = np.random.default_rng(0).normal(3, [1, 2, 40, 0], (50, 4)).astype(np.float32)
    deviation = features.astype(np.float64).std(axis=0)
    plain, floored = (Standardizer.of(features, scale) for scale in (one_where_constant, at_least_median))
    np.testing.assert_allclose(plain.scale, [*deviation[:3], 1])
    np.testing.assert_allclose(floored.scale, np.maximum(deviation, np.median(deviation)))
    cosine = floored.unit(features[:2])
    expected = (features[:2] - features.mean(axis=0, dtype=np.float64)) / floored.scale
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    torch.testing.assert_close(cosine, torch.from_numpy(expected.astype(np.float32)))


def test_calibration_is_the_nearest_of_another_lesion_in_the_best_view_on_a_draw_that_is_always_the_same() -> None:
    bank = unit_rows(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0, -1]]))
    lesions = torch.tensor([0, 0, 1, 2])
    as_they_are = calibration_distances(lambda rows: [bank[rows]], bank, lesions, most=9)
    table = 1 - (bank.double() @ bank.T.double()).masked_fill(lesions[:, None] == lesions[None], -1).max(dim=1).values
    np.testing.assert_allclose(as_they_are, table, atol=1e-7)
    in_two = calibration_distances(lambda rows: [bank[rows], -bank[rows]], bank, lesions, most=9)
    np.testing.assert_allclose(in_two[2:], 0, atol=1e-12)  # the third image upside down is the fourth
    drawn = [calibration_distances(lambda rows: [bank[rows]], bank, lesions, most=2, seed=3) for _ in range(2)]
    assert len(drawn[0]) == 2
    assert np.array_equal(*drawn)
