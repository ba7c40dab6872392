"""Batches are read ahead in their order, and no further than stated."""

from collections.abc import Iterator

import pytest
import torch

from m2d.errors import DataError
from m2d.training.batch import ImageBatch
from m2d.training.loop import AHEAD, read_ahead


def numbered(count: int, read: list[int]) -> Iterator[ImageBatch]:
    for number in range(count):
        read.append(number)
        yield ImageBatch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.tensor([number]))


def test_every_batch_comes_once_and_in_order() -> None:
    batches = read_ahead(numbered(7, []), pin_memory=False)
    assert [int(batch.labels) for batch in batches] == list(range(7))


def test_a_run_that_stops_early_has_read_no_more_than_it_may() -> None:
    read: list[int] = []
    batches = read_ahead(numbered(100, read), pin_memory=False)
    for _ in range(3):
        next(batches)
    batches.close()  # type: ignore[attr-defined] # a generator
    assert len(read) <= 3 + AHEAD


def test_what_reading_raises_reaches_the_loop_at_its_batch() -> None:
    def broken() -> Iterator[ImageBatch]:
        yield from numbered(2, [])
        raise DataError("data_root: image.jpg is gone")

    batches = read_ahead(broken(), pin_memory=False)
    assert [int(next(batches).labels) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="data_root"):
        next(batches)
