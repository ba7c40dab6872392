"""What setup_data keeps of a dataset: its catalog, and its images decoded at one size. Read without Ray.

    CACHE/<name>-<8 hex>/dataset.json  catalog.parquet  rejected.csv  duplicates.csv
    CACHE/<name>-<8 hex>/images/64px/shard_*.parquet     sha256, pixels (raw uint8 RGB, row by row)
Images are found by the sha256 of their file, so another split or more images make nothing here invalid.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from m2d.data.catalog import (
    Scan,
    class_counts,
    dataset_fingerprint,
    read_catalog,
    write_catalog,
    write_duplicates,
    write_rejected,
)
from m2d.data.settings import DataConfig
from m2d.data.shards import ShardIndex, cache_file, digests, shard_name
from m2d.errors import ConfigError, DataError
from m2d.files.storage import one_line, open_storage

logger = logging.getLogger(__name__)

FORMAT = 1  # of the whole folder; raised when what is in it can no longer be read as before
DATASET, CATALOG = "dataset.json", "catalog.parquet"
SCAN_SETTINGS = ("val_fraction", "test_fraction", "split_seed", "class_map", "max_pixels")
ROW_GROUP_BYTES = 64 * 2**10  # of pixels: what is read for one image. Smaller ones make opening a file slow
OPEN_FILES = 64  # of a reader; an open one costs a parsed footer


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
    write_rejected(scan.rejected, str(folder / "rejected.csv"))
    write_duplicates(scan.duplicates, str(folder / "duplicates.csv"))
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
    if pixels.dtype != np.uint8 or pixels.shape != (len(sha256), image_size, image_size, 3):
        raise ValueError(f"{pixels.dtype} {pixels.shape} for {len(sha256)} images of {image_size} px")
    keys = digests(sha256)
    row_bytes = 3 * image_size**2
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(row_bytes), len(sha256), [None, pa.py_buffer(np.ascontiguousarray(pixels))]
    )
    table = pa.table({"sha256": pa.array(sha256, type=pa.string()), "pixels": column})
    # The sums stand in the footer too: reading the column costs as many seeks as there are row groups.
    notes = {"m2d.format": str(FORMAT), "m2d.image_size": str(image_size), "m2d.sha256": "".join(sha256)}
    path = images_folder(folder, image_size) / shard_name(keys, ".parquet")
    settings = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True, "store_schema": False}
    with cache_file(path) as partial, pq.ParquetWriter(partial, table.schema, compression="none", **settings) as writer:
        writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
        writer.add_key_value_metadata(notes)
    return path


class PreparedImages:
    """Decoded images of one size in a dataset's folder."""

    def __init__(self, image_size: int, index: ShardIndex, unreadable: dict[Path, str]) -> None:
        self.image_size = image_size
        self.unreadable = unreadable  # file -> reason; what stands in them counts as missing
        self._index = index

    @classmethod
    def open(cls, folder: Path, image_size: int) -> Self | None:
        """Read which images are there, not the images. None where nothing can be read. A broken file is logged."""
        found = cls.look(folder, image_size)
        for path, reason in found.unreadable.items():
            logger.warning("prepared images: %s cannot be read (%s); setup_data --images makes it again", path, reason)
        return found if found.files else None

    @classmethod
    def look(cls, folder: Path, image_size: int) -> Self:
        """The same, an empty one where nothing is there; broken files are in `unreadable` and not logged."""
        files: list[Path] = []
        keys: list[np.ndarray] = []
        unreadable: dict[Path, str] = {}
        for path in sorted(images_folder(folder, image_size).glob("shard_*.parquet")):
            try:
                metadata = pq.read_metadata(path)
                notes = metadata.metadata or {}
                if notes.get(b"m2d.format") != b"%d" % FORMAT or notes.get(b"m2d.image_size") != b"%d" % image_size:
                    raise ValueError("made by another version of M2D, or for another size")
                of_file = np.frombuffer(bytes.fromhex(notes[b"m2d.sha256"].decode()), dtype="S32")
                if len(of_file) != metadata.num_rows:
                    raise ValueError(f"{metadata.num_rows} images under {len(of_file)} names")
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                unreadable[path] = one_line(error)
                continue
            files.append(path)
            keys.append(of_file)
        return cls(image_size, ShardIndex(files, keys), unreadable)

    @property
    def files(self) -> tuple[Path, ...]:
        """All readable shards."""
        return self._index.files

    def missing(self, sha256: Sequence[str]) -> np.ndarray:
        """Which of these images are not there, bool [n]."""
        absent: np.ndarray = self._index.locate(digests(sha256))[0] < 0
        return absent

    def covers(self, sha256: Sequence[str]) -> bool:
        """Whether all of these images are there."""
        return not self.missing(sha256).any()

    def rows(self, sha256: Sequence[str]) -> "PreparedRows":
        """These images, in this order."""
        return PreparedRows(self.image_size, self._index.files, *self._index.locate(digests(sha256)))


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
    return {name: value for name, value in asdict(config).items() if name in SCAN_SETTINGS}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
