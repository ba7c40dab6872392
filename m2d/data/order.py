"""Which image is at which row of the training stream. Pure arithmetic on a seed: every process answers the same,
so nothing is shuffled, stored or sent, and a run resumes at any row. The local and the Ray stream both ask here.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2d.data.settings import Balance
from m2d.errors import DataError

CLASS_EXPONENT: dict[Balance, float] = {"natural": 1.0, "sqrt": 0.5, "balanced": 0.0}  # a class weighs count^exponent
CACHED_EPOCHS = 3  # a batch touches two epochs at most; one more lets a resumed reader look back
ORDER_STREAM, PICK_STREAM, VIEW_STREAM = 0, 1, 2  # independent uses of one seed


class StreamOrder:
    """The endless stream of (catalog row, view), epoch after epoch, without replacement inside an epoch.

    rows_per_epoch: N, the number of catalog rows, whatever the balance.
    """

    def __init__(self, labels: np.ndarray, *, balance: Balance, views: int, seed: int) -> None:
        """labels: int64 [N], class of each catalog row. views: 1, 4 or 8. Raises DataError when there is no row."""
        if len(labels) == 0:
            raise DataError("the training split has no image; lower data.val_fraction and data.test_fraction")
        self.rows_per_epoch = len(labels)
        self._labels, self._balance, self._views, self._seed = labels, balance, views, seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def lookup(self, stream_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """stream_rows: int64 [M], any order, any chunking. Returns catalog rows int64 [M] and views int8 [M]."""
        stream_rows = np.asarray(stream_rows, dtype=np.int64)
        epochs, offsets = np.divmod(stream_rows, self.rows_per_epoch)
        catalog_rows = np.empty_like(stream_rows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            catalog_rows[here] = self._epoch(int(epoch))[offsets[here]]
        views = _hash(stream_rows, self._seed) % np.uint64(self._views)
        return catalog_rows, views.astype(np.int8)

    def expected_counts(self) -> np.ndarray:
        """float64 [N]: how often each row is expected in one epoch; sums to N."""
        _, inverse, counts = np.unique(self._labels, return_inverse=True, return_counts=True)
        weights = counts.astype(np.float64) ** CLASS_EXPONENT[self._balance]
        per_row = self.rows_per_epoch * (weights / weights.sum()) / counts
        return np.asarray(per_row[inverse], dtype=np.float64)

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            picked = np.arange(self.rows_per_epoch) if self._balance == "natural" else self._pick(epoch)
            self._epochs[epoch] = picked[_permutation(self.rows_per_epoch, self._seed, ORDER_STREAM, epoch)]
            while len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def _pick(self, epoch: int) -> np.ndarray:
        """N catalog rows by systematic resampling (Kitagawa 1996), int64 [N], grouped by class.

        Each row occurs floor or ceil of its expectation times, and so does each class as a whole, because the extra
        picks walk through the classes one by one. Whole parts are dealt out exactly; only fractions are floats.
        """
        shuffled = _permutation(self.rows_per_epoch, self._seed, PICK_STREAM, epoch)
        rows = shuffled[np.argsort(self._labels[shuffled], kind="stable")]  # by class, in random order inside a class
        expected = self.expected_counts()[rows]
        whole = np.floor(expected)
        extras = self.rows_per_epoch - int(whole.sum())
        ends = np.minimum(np.cumsum(expected - whole), extras)
        ends[-1] = extras  # the sum in exact arithmetic
        # A start well inside (0, 1): a sum that floats make 0.9999999999999997 counts as the one that it is
        start = ((_generator(self._seed, PICK_STREAM, epoch, 1).random_raw() >> 44) + 0.5) / 2.0**20
        extra = np.diff(np.floor(ends + start), prepend=0.0)
        return np.repeat(rows, (whole + extra).astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict()}  # permutations are cheap to redo and dear to send


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one worker takes of the stream: micro-batches of `batch_size` rows, its `turn`-th of the run at each turn.

    step_micro_batches: M, those of a step, of all workers together; None: one for each worker. A worker takes
    ceil(M / world_size) a step, so turn = step * that + k. Where that makes more than M, the last ones of a step are
    also the first of the next: so a step begins at the same row however many workers there are.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    step_micro_batches: int | None = None

    def number(self, turn: int) -> int:
        """Which of the run's micro-batches, counted over all workers."""
        each_step = self.step_micro_batches or self.world_size
        step, k = divmod(turn, -(-each_step // self.world_size))
        return step * each_step + k * self.world_size + self.rank

    def rows(self, turn: int) -> np.ndarray:
        """Its stream rows, int64 [batch_size]; workers that divide M cover each row once."""
        first = self.number(turn) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.int64)


def _generator(*words: int) -> np.random.PCG64:
    """Raw bits only: numpy promises to keep a bit generator's stream, but not what Generator makes of it (NEP 19)."""
    return np.random.PCG64(np.random.SeedSequence(words))


def _permutation(size: int, *words: int) -> np.ndarray:
    """A seeded permutation, int64 [size]: the order of random 64-bit keys."""
    keys = np.asarray(_generator(*words).random_raw(size), dtype=np.uint64)
    return np.argsort(keys, kind="stable")


def _hash(stream_rows: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [M], splitmix64 (Steele, Lea, Flood 2014) at position stream_row: a random number without state."""
    start = np.uint64(_generator(seed, VIEW_STREAM).random_raw())
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        mixed = start + (stream_rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
