"""From catalog rows to pixels: reads, decodes (or takes what setup_data decoded), crops and turns. Without Ray.

`iterate_local` is the training stream in one process: the batches of m2d.data.stream, for tests and notebooks.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from m2d.data.catalog import classes_of
from m2d.data.decode import ImageRejected, decode_resized
from m2d.data.order import Share, StreamOrder
from m2d.data.store import PreparedImages, PreparedRows
from m2d.data.views import apply_view
from m2d.errors import DataError
from m2d.files.storage import Storage, open_storage, read_file

if TYPE_CHECKING:  # every decoding process imports this file, and needs no torch: seconds and 200 MB each
    import torch

logger = logging.getLogger(__name__)

READ_THREADS = 16  # they wait for storage, not for the CPU
MAX_SUBSTITUTES = 32  # this many bad files of one class in a row mean lost storage, not a few broken files


def decode_unchanged(
    storage: Storage, path: str, sha256: str, decode: Callable[[bytes], np.ndarray]
) -> np.ndarray | str:
    """What `decode` makes of a file; or in one line why there is nothing, also where it has changed since the scan."""
    return _decode_unchanged(read_file(storage, path), sha256, decode)


def _decode_unchanged(encoded: bytes | str, sha256: str, decode: Callable[[bytes], np.ndarray]) -> np.ndarray | str:
    if isinstance(encoded, str):
        return encoded
    if hashlib.sha256(encoded).hexdigest() != sha256:
        return "has changed since the scan"
    try:
        return decode(encoded)
    except ImageRejected as rejection:
        return rejection.reason


class ImageReader:
    """Decodes catalog rows at one size. Cheap to pickle: encoded bytes stay behind and are given back with `attach`.

    Rows that setup_data prepared are not decoded: their encoded bytes are raw pixels. The images are the same.
    labels: int64 [N], the class index of each catalog row. sizes: int64 [N], the length of each row's encoded bytes:
    of its file at the scan, or 3 S^2 where it is prepared.
    """

    def __init__(
        self,
        catalog: pa.Table,
        data_root: str,
        *,
        image_size: int,
        max_pixels: int,
        prepared: PreparedImages | None = None,
    ) -> None:
        """catalog: as m2d.data.catalog.CATALOG_SCHEMA; its columns path, label, bytes and sha256 are read.

        prepared: images decoded at this size, found by `sha256`; rows that it lacks are decoded from their files.
        """
        self.data_root, self.image_size, self.max_pixels = data_root, image_size, max_pixels
        self._codes = classes_of(catalog).codes
        self.labels = np.array([self._codes.index(code) for code in catalog["label"].to_pylist()], dtype=np.int64)
        self.sizes: np.ndarray = catalog["bytes"].to_numpy().astype(np.int64)
        self._paths, self._sums = catalog["path"].combine_chunks(), catalog["sha256"].combine_chunks()
        self._prepared: PreparedRows | None = None
        self._is_raw = np.zeros(len(catalog), dtype=bool)
        if prepared is not None:
            if prepared.image_size != image_size:
                raise ValueError(f"images prepared at {prepared.image_size} px for a reader of {image_size} px")
            self._prepared = prepared.rows(catalog["sha256"].to_pylist())
            self._is_raw = self._prepared.present
            self.sizes = np.where(self._is_raw, 3 * image_size**2, self.sizes)
        self._bad: dict[int, str] = {}  # catalog row -> reason
        self._encoded: pa.ChunkedArray | None = None
        self._storage: Storage | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def attach(self, encoded: pa.ChunkedArray) -> None:
        """From now on rows come from these bytes: large_binary [N], null for an unreadable file. No copy is made."""
        if len(encoded) != len(self):
            raise ValueError(f"{len(encoded)} encoded images for a catalog of {len(self)} rows")
        self._encoded = encoded

    def load_encoded(self, first: int = 0, stop: int | None = None) -> pa.ChunkedArray:
        """The bytes of files first .. stop - 1 (all by default), large_binary; of prepared rows their raw pixels.

        A file that cannot be read is null: `read` puts another in its place.
        """
        rows = np.arange(first, len(self) if stop is None else stop)
        blobs: list[bytes | None] = []
        for row, fetched in zip(rows.tolist(), self._fetch(rows), strict=True):
            # A damaged shard gives a file's bytes where raw pixels are expected.
            found = self._decode(row, fetched) if self._is_raw[row] else fetched
            if isinstance(found, np.ndarray):
                found = found.tobytes()
            blobs.append(found if isinstance(found, bytes) else None)
        return pa.chunked_array([pa.array(blobs, type=pa.large_binary())])

    def read(self, catalog_rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """Decodes rows, each in its view.

        catalog_rows: int64 [B]. views: int8 [B] (m2d.data.views). Returns images uint8 [B, S, S, 3] RGB, labels int64
        [B], catalog_rows int64 [B], views int8 [B], substituted bool [B].
        A file that went bad after the scan is replaced by the next good row of its class: there `substituted` is true,
        and `catalog_rows` names the row whose pixels these are. Raises DataError when no good row of a class is found.
        """
        size = self.image_size
        images = np.empty((len(catalog_rows), size, size, 3), dtype=np.uint8)
        shown_rows = np.array(catalog_rows, dtype=np.int64)
        for slot, (row, fetched) in enumerate(zip(shown_rows, self._fetch(shown_rows), strict=True)):
            decoded = self._decode(int(row), fetched)
            if decoded is None:
                shown_rows[slot], decoded = self._substitute(int(row))
            viewed = apply_view(decoded, int(views[slot]))
            if viewed.strides[1:] == decoded.strides[1:]:
                images[slot] = viewed  # rows are contiguous in memory
            else:
                for channel in range(3):  # five times as fast as one copy of turned, interleaved pixels
                    images[slot, :, :, channel] = viewed[:, :, channel]
        return {
            "images": images,
            "labels": self.labels[shown_rows],
            "catalog_rows": shown_rows,
            "views": np.array(views, dtype=np.int8),
            "substituted": shown_rows != catalog_rows,
        }

    def _fetch(self, rows: np.ndarray) -> "list[np.ndarray | bytes | str]":
        """Of each row its pixels where they are prepared, otherwise its file's bytes, or why there are none."""
        if self._encoded is not None:
            return [self._fetch_attached(self._encoded, int(row)) for row in rows]
        if self._threads is None or self._storage is None:
            self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="m2d-read")
            self._storage = open_storage(self.data_root)
        storage = self._storage
        prepared = [None] * len(rows) if self._prepared is None else self._prepared.read(rows)
        files = [int(row) for row, pixels in zip(rows, prepared, strict=True) if pixels is None]
        from_files = self._threads.map(
            lambda row: self._bad.get(row) or read_file(storage, self._paths[row].as_py()), files
        )
        return [next(from_files) if pixels is None else pixels for pixels in prepared]

    def _fetch_attached(self, encoded: pa.ChunkedArray, row: int) -> np.ndarray | bytes | str:
        if row in self._bad:
            return self._bad[row]
        if not encoded[row].is_valid:
            return "could not be read when the run began"
        content = encoded[row].as_buffer()
        if self._is_raw[row]:
            return np.frombuffer(content, dtype=np.uint8).reshape(self.image_size, self.image_size, 3)
        return bytes(content)

    def _decode(self, row: int, encoded: np.ndarray | bytes | str) -> np.ndarray | None:
        """uint8 [S, S, 3], or None and a note in `_bad` for a bad file. encoded: as _fetch gives it."""
        if isinstance(encoded, np.ndarray):
            return encoded
        decode = partial(decode_resized, size=self.image_size, max_pixels=self.max_pixels)
        found = _decode_unchanged(encoded, self._sums[row].as_py(), decode)
        if isinstance(found, np.ndarray):
            return found
        if row not in self._bad:
            self._bad[row] = found
            logger.warning("%s: %s; another image of its class takes its place", self._paths[row].as_py(), found)
        return None

    def _substitute(self, row: int) -> tuple[int, np.ndarray]:
        classmates = np.flatnonzero(self.labels == self.labels[row])
        after = np.roll(classmates, -1 - int(np.searchsorted(classmates, row)))[:-1]  # behind it first
        for candidate in map(int, after[:MAX_SUBSTITUTES]):
            decoded = self._decode(candidate, self._fetch(np.array([candidate]))[0])
            if decoded is not None:
                return candidate, decoded
        raise DataError(
            f"{self._paths[row].as_py()} in {self.data_root}: {self._bad[row]}; nor is any of the "
            f"next {min(len(after), MAX_SUBSTITUTES)} images of {self._codes[self.labels[row]]} readable. "
            "Check that data_root can be reached, then scan it again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoded": None, "_storage": None, "_threads": None}


def iterate_local(
    reader: ImageReader, order: StreamOrder, share: Share, turns: range
) -> "Iterator[dict[str, torch.Tensor]]":
    """The worker's micro-batches of these turns, each full, read when they are asked for.

    Yields images uint8 [B, S, S, 3], labels, catalog_rows, stream_rows int64 [B], views int8 [B], substituted bool [B];
    the consumer owns them.
    """
    import torch

    for rows in map(share.rows, turns):
        columns = reader.read(*order.lookup(rows)) | {"stream_rows": rows}
        yield {name: torch.from_numpy(column) for name, column in columns.items()}
