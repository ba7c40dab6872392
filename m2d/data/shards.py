"""Files of many images' values: written whole or not at all, and searched by the sha256 of the images in them.

m2d.data.prepared and m2d.data.feature_store keep such files in a cache folder; what stands in them is theirs to know.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from m2d.errors import DataError
from m2d.files.atomic import whole_file
from m2d.files.storage import one_line

DIGEST_BYTES = 32


def digests(sha256: Sequence[str]) -> np.ndarray:
    """Hex sha256 sums as sortable bytes, S32 [n]. Raises ValueError for anything else."""
    if any(len(text) != 2 * DIGEST_BYTES for text in sha256):
        raise ValueError("a sha256 of an image is not 64 hex digits; is this catalog from a scan?")
    return np.frombuffer(bytes.fromhex("".join(sha256)), dtype=f"S{DIGEST_BYTES}")


def shard_name(keys: np.ndarray, suffix: str) -> str:
    """A name that depends on the images alone (digests S32 [n]), so that two runs make the same file, not two."""
    return f"shard_{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}{suffix}"


@contextmanager
def cache_file(path: Path) -> Iterator[Path]:
    """As m2d.files.atomic.whole_file, durable, its folder made. Raises DataError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, durable=True) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(
            f"cache: {path} cannot be written ({reason}); check its disk, then run again to go on"
        ) from error


class ShardIndex:
    """Where each image stands: in which file, and at which row of it."""

    def __init__(self, files: Sequence[Path], keys: Sequence[np.ndarray]) -> None:
        """keys: for each file the digests of its rows, S32 [n]."""
        self.files = tuple(files)
        lengths = [len(of_file) for of_file in keys]
        together = np.concatenate([*keys, np.empty(0, dtype=f"S{DIGEST_BYTES}")])
        order = np.argsort(together, kind="stable")
        self._keys = together[order]
        self._file = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]
        starts = np.cumsum([0, *lengths])[:-1]
        self._row = (np.arange(len(together)) - np.repeat(starts, lengths))[order].astype(np.int32)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File number and row of each digest, int32 [n]; file -1 where no file holds it. Of two copies either one."""
        if not len(self._keys):
            return np.full(len(keys), -1, dtype=np.int32), np.zeros(len(keys), dtype=np.int32)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found = self._keys[place] == keys
        return np.where(found, self._file[place], -1).astype(np.int32), self._row[place]
