import pickle

import numpy as np
import pytest

from m2d.data.order import Share, StreamOrder
from m2d.data.settings import Balance
from m2d.errors import DataError

COUNTS = np.array([28, 44, 93, 10, 95, 570, 12])  # a tenth of HAM10000
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(7), COUNTS))
ROWS = len(LABELS)
BALANCES: tuple[Balance, ...] = ("natural", "sqrt", "balanced")


def order(balance: Balance = "sqrt", *, views: int = 8, seed: int = 1) -> StreamOrder:
    return StreamOrder(LABELS, balance=balance, views=views, seed=seed)


def epoch(number: int) -> np.ndarray:
    return np.arange(number * ROWS, (number + 1) * ROWS)


def test_a_natural_epoch_shows_each_row_once_also_where_a_batch_straddles_two() -> None:
    stream = order("natural")
    for number in (0, 1, 1000):
        assert sorted(stream.lookup(epoch(number))[0]) == list(range(ROWS))
    batches = [stream.lookup(np.arange(start, start + 64))[0] for start in range(0, 64 * ROWS, 64)]  # 64 epochs
    assert (np.bincount(np.concatenate(batches), minlength=ROWS) == 64).all()


@pytest.mark.parametrize(("balance", "exponent"), [("natural", 1.0), ("sqrt", 0.5), ("balanced", 0.0)])
@pytest.mark.parametrize("number", [0, 7])
def test_counts_are_floor_or_ceil_of_the_expectation(balance: Balance, exponent: float, number: int) -> None:
    """A class has a share of count^exponent over its sum, a row that over the count; both rows and classes keep it."""
    catalog_rows, _ = order(balance).lookup(epoch(number))
    of_class = ROWS * COUNTS**exponent / (COUNTS**exponent).sum()
    of_row = (of_class / COUNTS)[LABELS]
    for counts, expected in (
        (np.bincount(catalog_rows, minlength=ROWS), of_row),
        (np.bincount(LABELS[catalog_rows], minlength=7), of_class),
    ):
        assert (counts >= np.floor(expected + 1e-9)).all()
        assert (counts <= np.ceil(expected - 1e-9)).all()


@pytest.mark.parametrize("balance", BALANCES)
def test_equal_classes_are_natural_under_every_balance(balance: Balance) -> None:
    """Six rows a class: each expectation is one, though the floats say 0.9999999999999997."""
    stream = StreamOrder(np.repeat(np.arange(7), 6), balance=balance, views=8, seed=0)
    for number in range(20):
        catalog_rows, _ = stream.lookup(np.arange(number * 42, (number + 1) * 42))
        assert sorted(catalog_rows) == list(range(42))


def test_over_many_epochs_each_row_of_a_large_class_has_its_turn() -> None:
    catalog_rows, _ = order("balanced").lookup(np.arange(60 * ROWS))
    counts = np.bincount(catalog_rows, minlength=ROWS)[LABELS == 5]  # 0.21 expected in one epoch
    assert counts.mean() == pytest.approx(60 * ROWS / 7 / 570, rel=0.01)
    assert counts.min() > 0


def test_a_class_without_rows_takes_no_share() -> None:
    stream = StreamOrder(np.array([0, 0, 0, 6]), balance="balanced", views=1, seed=0)
    catalog_rows, _ = stream.lookup(np.arange(400))
    assert np.count_nonzero(catalog_rows == 3) == 200


@pytest.mark.parametrize("balance", BALANCES)
def test_lookup_is_the_same_whatever_the_chunking_and_the_process(balance: Balance) -> None:
    rows = np.arange(3 * ROWS + 17)
    whole, whole_views = order(balance).lookup(rows)
    shuffled = np.random.default_rng(1).permutation(rows)
    stream = order(balance)
    bare = len(pickle.dumps(stream))
    stream.lookup(rows)
    assert len(pickle.dumps(stream)) == bare  # without its permutations
    stream = pickle.loads(pickle.dumps(stream))  # noqa: S301
    for chunk in np.array_split(shuffled, 50):  # five epochs in each, more than are cached
        catalog_rows, views = stream.lookup(chunk)
        np.testing.assert_array_equal(catalog_rows, whole[chunk])
        np.testing.assert_array_equal(views, whole_views[chunk])


@pytest.mark.parametrize("balance", BALANCES)
def test_epochs_and_seeds_differ(balance: Balance) -> None:
    first, first_views = order(balance).lookup(epoch(0))
    for rows, views in (order(balance).lookup(epoch(1)), order(balance, seed=2).lookup(epoch(0))):
        assert np.count_nonzero(rows == first) < 0.05 * ROWS
        assert np.count_nonzero(views == first_views) < 0.25 * ROWS  # 1/8 by chance


def test_the_stream_is_the_one_it_was() -> None:
    """A changed number here means that no interrupted run can be resumed: an order is part of what a seed promises."""
    catalog_rows, views = StreamOrder(np.array([0, 0, 0, 0, 5, 5, 1]), balance="sqrt", views=8, seed=3).lookup(
        np.arange(9)
    )
    assert catalog_rows.tolist() == [2, 4, 1, 4, 5, 6, 3, 6, 5]
    assert views.tolist() == [0, 4, 6, 0, 6, 0, 4, 2, 3]


def test_a_shuffle_leaves_no_trace_of_the_catalogs_order() -> None:
    catalog_rows, _ = order("natural").lookup(epoch(3))
    assert abs(np.corrcoef(catalog_rows, np.arange(ROWS))[0, 1]) < 4 / np.sqrt(ROWS)


@pytest.mark.parametrize("views", [4, 8])
def test_views_are_uniform(views: int) -> None:
    _, drawn = order(views=views).lookup(np.arange(80_000))
    counts = np.bincount(drawn, minlength=views)
    assert len(counts) == views
    chi_square = ((counts - 80_000 / views) ** 2 / (80_000 / views)).sum()
    assert chi_square < 26  # 1 in 2,000 by chance, of 7 degrees of freedom; the draw itself is fixed


def test_an_image_is_seen_in_other_views_in_other_epochs() -> None:
    catalog_rows, views = order("natural").lookup(np.arange(64 * ROWS))
    seen = np.zeros((ROWS, 8), dtype=bool)
    seen[catalog_rows, views] = True
    assert seen.mean() > 0.99


def test_one_view_is_the_image_as_it_is_and_an_empty_split_an_error_for_the_user() -> None:
    _, views = order(views=1).lookup(np.arange(1000))
    assert views.dtype == np.int8
    assert not views.any()
    with pytest.raises(DataError, match="no image"):
        StreamOrder(np.array([], dtype=np.int64), balance="sqrt", views=8, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_together_cover_the_stream_once(world_size: int) -> None:
    rows = [
        Share(batch_size=4, rank=rank, world_size=world_size).rows(micro_batch)
        for micro_batch in range(5)
        for rank in range(world_size)
    ]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(4 * 5 * world_size))


@pytest.mark.parametrize(("workers", "each"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 3), (5, 2), (6, 2), (7, 2)])
def test_a_step_begins_at_the_same_row_and_misses_nothing_however_many_workers_there_are(
    workers: int, each: int
) -> None:
    """Steps of eight micro-batches; workers that divide them take exactly those."""
    for step in (0, 5):
        shares = [Share(batch_size=4, rank=rank, world_size=workers, step_micro_batches=8) for rank in range(workers)]
        places = [(share, turn) for turn in range(step * each, (step + 1) * each) for share in shares]
        numbers = [share.number(turn) for share, turn in places]
        assert sorted(numbers) == list(range(step * 8, step * 8 + each * workers))
        rows = np.concatenate([share.rows(turn) for share, turn in places])
        assert sorted(rows) == list(range(step * 32, step * 32 + 4 * each * workers))
