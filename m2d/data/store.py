"""What setup_data keeps of a dataset: its catalog, and its images decoded at one size. Needs neither Ray nor torch.

    CACHE/<name>-<8 hex>/dataset.json  catalog.parquet  rejected.csv  duplicates.csv
    CACHE/<name>-<8 hex>/images/64px/shard_*.parquet     sha256, pixels (raw uint8 RGB, row by row)
Everything is found by the sha256 of the image files, so another split or more images make nothing here invalid.
Features lie beside them (m2d.data.features), in shards of the same kind.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from safetensors import SafetensorError

from m2d.data.catalog import (
    Scan,
    class_counts,
    dataset_fingerprint,
    read_catalog,
    write_catalog,
    write_csv,
)
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError, DataError
from m2d.files.atomic import whole_file
from m2d.files.storage import one_line, open_storage

logger = logging.getLogger(__name__)

FORMAT = 1  # of the whole folder; raised when what is in it can no longer be read as before
DATASET, CATALOG = "dataset.json", "catalog.parquet"
SCAN_SETTINGS = ("val_fraction", "test_fraction", "split_seed", "class_map", "max_pixels")
# Recorded where they are set, so that the catalogs of an earlier M2D stay good.
LAYOUT_SETTINGS = ("classes", "table", "columns", "drop", "clinical", "group_near_duplicates", "split")
ROW_GROUP_BYTES = 64 * 2**10  # of pixels: what is read for one image. Smaller ones make opening a file slow
OPEN_FILES = 64  # of a reader; an open one costs a parsed footer
DIGEST_BYTES = 32


def digests(sha256: Sequence[str]) -> np.ndarray:
    """Hex sha256 sums as sortable bytes, S32 [n]. Raises ValueError for anything else."""
    if any(len(text) != 2 * DIGEST_BYTES for text in sha256):
        raise ValueError("a sha256 of an image is not 64 hex digits; is this catalog from a scan?")
    return np.frombuffer(bytes.fromhex("".join(sha256)), dtype=f"S{DIGEST_BYTES}")


def content_name(keys: np.ndarray) -> str:
    """16 hex digits that depend on the images alone (digests S32 [n]), so that two runs write one file, not two."""
    return hashlib.sha256(keys.tobytes()).hexdigest()[:16]


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
            f"cache: {path} cannot be written ({reason}); check its disk, then run again to resume"
        ) from error


def pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in order, so many a file."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


class ShardIndex:
    """Where each image is: in which file, and in which row of it.

    unreadable: file -> reason; the images in them count as missing.
    """

    def __init__(
        self, files: Sequence[Path], keys: Sequence[np.ndarray], unreadable: dict[Path, str] | None = None
    ) -> None:
        """keys: for each file the digests of its rows, S32 [n]."""
        self.files = tuple(files)
        self.unreadable = unreadable or {}
        lengths = [len(of_file) for of_file in keys]
        together = np.concatenate([*keys, np.empty(0, dtype=f"S{DIGEST_BYTES}")])
        order = np.argsort(together, kind="stable")
        self._keys = together[order]
        self._file = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]
        starts = np.cumsum([0, *lengths])[:-1]
        self._row = (np.arange(len(together)) - np.repeat(starts, lengths))[order].astype(np.int32)

    @classmethod
    def read(cls, folder: Path, suffix: str, digests_of: Callable[[Path], bytes]) -> Self:
        """Of the folder's shards. digests_of: all digests of a file; raises for one that cannot be used."""
        keys: dict[Path, np.ndarray] = {}
        unreadable: dict[Path, str] = {}
        for path in sorted(folder.glob(f"shard_*{suffix}")):
            try:
                keys[path] = np.frombuffer(digests_of(path), dtype=f"S{DIGEST_BYTES}")
            except (pa.ArrowException, SafetensorError, OSError, ValueError, KeyError) as error:
                unreadable[path] = one_line(error)
        return cls(list(keys), list(keys.values()), unreadable)

    def locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File number and row of each digest, int32 [n]; file -1 where no file holds it. Of two copies either one."""
        if not len(self._keys):
            return np.full(len(keys), -1, dtype=np.int32), np.zeros(len(keys), dtype=np.int32)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found = self._keys[place] == keys
        return np.where(found, self._file[place], -1).astype(np.int32), self._row[place]


def prepared_folder(cache_dir: str, data_root: str) -> Path:
    """Where the cache keeps a dataset: its folder's name, and 8 hex digits of its absolute path or URI.

    Access keys in a URI do not count. Raises ConfigError where cache_dir is a URI, DataError for a wrong data_root.
    """
    if "://" in cache_dir:
        raise ConfigError(f"cache_dir is {cache_dir}; it must be a path on a disk that every node sees, not a URI")
    filesystem, path = open_storage(data_root)
    local = isinstance(filesystem, fs.LocalFileSystem)
    identity = os.path.realpath(path) if local else re.sub(r"(://)[^/@\s]+@", r"\1", data_root.rstrip("/"))
    name = re.sub(r"[^\w.-]+", "_", path.rstrip("/").rpartition("/")[2]).strip("._") or "dataset"
    return Path(os.path.realpath(os.path.expanduser(cache_dir))) / f"{name}-{_hash(identity.encode())[:8]}"


def write_scan(folder: Path, scan: Scan, data_root: str, config: DataConfig, fingerprint: str) -> None:
    """Keep a scan. fingerprint: dataset_fingerprint from before the scan, so that a change since then is noticed."""
    write_catalog(scan.catalog, str(folder / CATALOG))
    write_csv(scan.rejected, str(folder / "rejected.csv"))
    write_csv(scan.duplicates, str(folder / "duplicates.csv"))
    record = {
        "format": FORMAT,
        "data_root": data_root,
        "scan": _scan_settings(config),
        "files": fingerprint,
        "catalog": _hash((folder / CATALOG).read_bytes()),
        "images": len(scan.catalog),
        "rejected": len(scan.rejected),
        "duplicates": len(scan.duplicates),
        "counts": {split: class_counts(scan.catalog, split) for split in ("train", "val", "test")},
    }
    with cache_file(folder / DATASET) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def reusable_catalog(folder: Path, data_root: str, config: DataConfig) -> pa.Table | None:
    """The catalog in the folder, if a scan would make the same: by its settings and its files' sizes and times.

    The files are listed, not opened. None without such a catalog. Raises DataError where data_root cannot be listed.
    """
    try:
        record = json.loads((folder / DATASET).read_text(encoding="utf-8"))
        same_scan = record["format"] == FORMAT and record["scan"] == _scan_settings(config)
        if not same_scan or record["catalog"] != _hash((folder / CATALOG).read_bytes()):
            return None
        fingerprint = record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if fingerprint != dataset_fingerprint(data_root, config):
        return None
    try:
        return read_catalog(str(folder / CATALOG))
    except DataError:
        return None


def images_folder(folder: Path, image_size: int) -> Path:
    """Where the images of one size lie in a dataset's folder."""
    return folder / "images" / f"{image_size}px"


def write_images(folder: Path, image_size: int, sha256: Sequence[str], pixels: np.ndarray) -> Path:
    """One file of decoded images, whole or not at all. pixels: uint8 [n, S, S, 3]. Returns its path.

    Uncompressed: zstd saves 10 to 30 %, and reading a row then takes two to six times as long.
    """
    keys = digests(sha256)
    row_bytes = 3 * image_size**2
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(row_bytes), len(sha256), [None, pa.py_buffer(np.ascontiguousarray(pixels))]
    )
    table = pa.table({"sha256": pa.array(sha256, type=pa.string()), "pixels": column})
    # The sums stand in the footer too: reading the column costs as many seeks as there are row groups.
    notes = {"m2d.format": str(FORMAT), "m2d.image_size": str(image_size), "m2d.sha256": "".join(sha256)}
    path = images_folder(folder, image_size) / f"shard_{content_name(keys)}.parquet"
    settings = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True, "store_schema": False}
    with cache_file(path) as partial, pq.ParquetWriter(partial, table.schema, compression="none", **settings) as writer:
        writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
        writer.add_key_value_metadata(notes)
    return path


class PreparedImages:
    """Decoded images of one size in a dataset's folder. files: all readable shards; unreadable: see ShardIndex."""

    def __init__(self, folder: Path, image_size: int) -> None:
        """Reads which images are there, not the images. Empty where nothing is there."""

        def digests_of(path: Path) -> bytes:
            metadata = pq.read_metadata(path)
            notes = metadata.metadata or {}
            if notes.get(b"m2d.format") != b"%d" % FORMAT or notes.get(b"m2d.image_size") != b"%d" % image_size:
                raise ValueError("made by another version of M2D, or for another size")
            found = bytes.fromhex(notes[b"m2d.sha256"].decode())
            if len(found) != DIGEST_BYTES * metadata.num_rows:
                raise ValueError(f"{metadata.num_rows} images under {len(found) / DIGEST_BYTES:g} names")
            return found

        self.image_size = image_size
        self._index = ShardIndex.read(images_folder(folder, image_size), ".parquet", digests_of)
        self.files, self.unreadable = self._index.files, self._index.unreadable

    @classmethod
    def open(cls, folder: Path, image_size: int) -> Self | None:
        """The same with a warning for each broken file; None where nothing can be read."""
        found = cls(folder, image_size)
        for path, reason in found.unreadable.items():
            logger.warning("prepared images: %s cannot be read (%s); setup_data --images makes it again", path, reason)
        return found if found.files else None

    def missing(self, sha256: Sequence[str]) -> np.ndarray:
        """Which of these images are not there, bool [n]."""
        absent: np.ndarray = self._index.locate(digests(sha256))[0] < 0
        return absent

    def covers(self, sha256: Sequence[str]) -> bool:
        """Whether all of these images are there."""
        return not self.missing(sha256).any()

    def rows(self, sha256: Sequence[str]) -> "PreparedRows":
        """These images, in this order."""
        return PreparedRows(self.image_size, self.files, *self._index.locate(digests(sha256)))


class PreparedRows:
    """Decoded images in the order of a catalog's rows. Small to pickle: it holds places, not pixels.

    present: bool [N], which rows are there.
    """

    def __init__(self, image_size: int, files: tuple[Path, ...], file: np.ndarray, row: np.ndarray) -> None:
        """file, row: int32 [N], as ShardIndex.locate gives them."""
        self.image_size = image_size
        self.present: np.ndarray = file >= 0
        self._files = files
        self._file = file
        self._row = row
        self._damaged: set[int] = set()
        self._opened: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()  # Arrow's reader is one thread's

    def read(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """Pixels of rows int64 [B], uint8 [S, S, 3] each, read-only; None for one that is not there or damaged."""
        pixels: list[np.ndarray | None] = [None] * len(rows)
        with self._lock:
            group: tuple[int, int] | None = None
            column = None
            for place in np.lexsort((self._row[rows], self._file[rows])):  # rows of one group after one another
                file, row = int(self._file[rows[place]]), int(self._row[rows[place]])
                if file < 0 or file in self._damaged:
                    continue
                try:
                    number, offset = divmod(row, self._open(file).metadata.row_group(0).num_rows)
                    if group != (file, number):
                        column = self._open(file).read_row_group(number, columns=["pixels"], use_threads=False)[
                            "pixels"
                        ]
                        group = (file, number)
                    assert column is not None
                    values = np.frombuffer(column[offset].as_buffer(), dtype=np.uint8)
                    pixels[int(place)] = values.reshape(self.image_size, self.image_size, 3)
                except (pa.ArrowException, OSError, ValueError, IndexError) as error:
                    self._damaged.add(file)
                    logger.warning(
                        "prepared images: %s is damaged (%s), so files are decoded; delete it and run setup_data "
                        "--images, which makes it again",
                        self._files[file],
                        one_line(error),
                    )
        return pixels

    def file_of(self, row: int) -> Path:
        """The file that holds a row that is present."""
        return self._files[int(self._file[row])]

    def _open(self, file: int) -> pq.ParquetFile:
        if file not in self._opened:
            self._opened[file] = pq.ParquetFile(self._files[file], memory_map=True, page_checksum_verification=True)
            while len(self._opened) > OPEN_FILES:
                self._opened.popitem(last=False)[1].close(force=True)
        self._opened.move_to_end(file)
        return self._opened[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=OrderedDict(), _lock=threading.Lock())


def _scan_settings(config: DataConfig) -> dict[str, Any]:
    """The settings that shape a catalog."""
    defaults = asdict(DataConfig())
    return {
        name: value
        for name, value in asdict(config).items()
        if name in SCAN_SETTINGS or (name in LAYOUT_SETTINGS and value != defaults[name])
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
