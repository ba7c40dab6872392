"""What setup_data keeps of a dataset: its catalog, and its images decoded at one size. Needs neither Ray nor torch.

    CACHE/<name>-<8 hex>/dataset.json  catalog.parquet  rejected.csv  duplicates.csv
    CACHE/<name>-<8 hex>/images/64px/shard_*.parquet     sha256, pixels (raw uint8 RGB, row by row)
Everything is found by the sha256 of the image files, so another split or more images make nothing here invalid.
Features are beside them (m2d.data.features), in shards of the same kind.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from safetensors import SafetensorError

from m2d.data.catalog import Scan, class_counts, dataset_fingerprint, read_catalog, write_catalog, write_csv
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError
from m2d.files.atomic import cache_file
from m2d.files.storage import one_line, open_storage

logger = logging.getLogger(__name__)

FORMAT = 1  # of the whole folder; raised when what is in it can no longer be read as before
DATASET, CATALOG = "dataset.json", "catalog.parquet"
SCAN_SETTINGS = ("val_fraction", "test_fraction", "split_seed", "class_map", "max_pixels")  # that shape a catalog
# They do too, and are recorded where they are set: so the catalogs of an earlier M2D stay good.
LAYOUT_SETTINGS = ("classes", "table", "columns", "drop", "clinical", "group_near_duplicates", "split")
ROW_GROUP_BYTES = 64 * 2**10  # of pixels: what is read for one image. Smaller ones make opening a file slow
OPEN_FILES = 64  # of a reader; an open one costs a parsed footer
DIGEST_BYTES = 32


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
    write_catalog(scan.catalog, folder / CATALOG)
    write_csv(scan.rejected, folder / "rejected.csv")
    write_csv(scan.duplicates, folder / "duplicates.csv")
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
        wanted = (FORMAT, _scan_settings(config), _hash((folder / CATALOG).read_bytes()))
        if (record["format"], record["scan"], record["catalog"]) != wanted:
            return None
        fingerprint = record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return read_catalog(str(folder / CATALOG)) if fingerprint == dataset_fingerprint(data_root, config) else None


def _scan_settings(config: DataConfig) -> dict[str, Any]:
    default = DataConfig()
    layout = {
        name: getattr(config, name) for name in LAYOUT_SETTINGS if getattr(config, name) != getattr(default, name)
    }
    return {name: getattr(config, name) for name in SCAN_SETTINGS} | layout


# --- shards -----------------------------------------------------------------------------------------------------------


def digests(sha256: Sequence[str]) -> bytes:
    """Hex sha256 sums as bytes, one after the other. Raises ValueError for anything else."""
    if any(len(text) != 2 * DIGEST_BYTES for text in sha256):
        raise ValueError("a sha256 of an image is not 64 hex digits; is this catalog from a scan?")
    return bytes.fromhex("".join(sha256))


def content_name(sha256: Sequence[str]) -> str:
    """16 hex digits that depend on the images alone, so that two runs write one file, not two."""
    return _hash(digests(sha256))[:16]


def pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in order, `size` in each file."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


class ShardIndex:
    """Where each image is: in which shard of a folder, and in which row of it. Empty where nothing is there.

    files: the readable shards. unreadable: file -> reason; it is warned of, and its images count as missing.
    """

    def __init__(self, folder: Path, suffix: str, digests_of: Callable[[Path], bytes]) -> None:
        """digests_of: all digests of a file; raises for one that cannot be used."""
        self.files: list[Path] = []
        self.unreadable: dict[Path, str] = {}
        keys: list[bytes] = []
        for path in sorted(folder.glob(f"shard_*{suffix}")):
            try:
                keys.append(digests_of(path))
                self.files.append(path)
            except (pa.ArrowException, SafetensorError, OSError, ValueError, KeyError) as error:
                self.unreadable[path] = one_line(error)
                logger.warning("%s cannot be read (%s); setup_data makes it again", path, self.unreadable[path])
        lengths = [len(key) // DIGEST_BYTES for key in keys]
        self._keys = _digest_array(b"".join(keys))
        self._file = np.append(np.repeat(np.arange(len(lengths)), lengths), -1).astype(np.int32)
        self._row = np.concatenate([*map(np.arange, lengths), [0]]).astype(np.int32)

    def locate(self, sha256: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """File number and row of each image, int32 [n]; file -1 where no file holds it. Of two copies either one."""
        place = pc.index_in(_digest_array(digests(sha256)), value_set=self._keys).fill_null(-1).to_numpy()
        return self._file[place], self._row[place]

    def missing(self, sha256: Sequence[str]) -> np.ndarray:
        """Which of these images are not there, bool [n]."""
        absent: np.ndarray = self.locate(sha256)[0] < 0
        return absent


def write_images(folder: Path, image_size: int, sha256: Sequence[str], pixels: np.ndarray) -> Path:
    """One file of decoded images, whole or not at all. pixels: uint8 [n, S, S, 3]. Returns its path.

    Uncompressed: zstd saves 10 to 30 %, and reading a row then takes two to six times as long.
    """
    row_bytes = 3 * image_size**2
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(row_bytes), len(sha256), [None, pa.py_buffer(np.ascontiguousarray(pixels))]
    )
    table = pa.table({"sha256": pa.array(sha256, type=pa.string()), "pixels": column})
    # The sums are in the footer too: reading the column costs as many seeks as there are row groups.
    notes = {"m2d.format": str(FORMAT), "m2d.image_size": str(image_size), "m2d.sha256": "".join(sha256)}
    path = _images_folder(folder, image_size) / f"shard_{content_name(sha256)}.parquet"
    settings = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True, "store_schema": False}
    with cache_file(path) as partial, pq.ParquetWriter(partial, table.schema, compression="none", **settings) as writer:
        writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
        writer.add_key_value_metadata(notes)
    return path


class PreparedImages(ShardIndex):
    """Decoded images of one size in a dataset's folder. Reads which are there, not the images."""

    def __init__(self, folder: Path, image_size: int) -> None:
        def digests_of(path: Path) -> bytes:
            metadata = pq.read_metadata(path)
            notes = metadata.metadata or {}
            if notes.get(b"m2d.format") != b"%d" % FORMAT or notes.get(b"m2d.image_size") != b"%d" % image_size:
                raise ValueError("made by another version of M2D, or for another size")
            found = bytes.fromhex(notes[b"m2d.sha256"].decode())
            if len(found) != DIGEST_BYTES * metadata.num_rows:
                raise ValueError(f"{metadata.num_rows} images under {len(found) / DIGEST_BYTES:g} names")
            return found

        super().__init__(_images_folder(folder, image_size), ".parquet", digests_of)
        self.image_size = image_size

    def rows(self, sha256: Sequence[str]) -> "PreparedRows":
        """These images, in this order."""
        return PreparedRows(self.image_size, self.files, *self.locate(sha256))


class PreparedRows:
    """Decoded images in the order of a catalog's rows. Small to pickle: it holds places, not pixels.

    present: bool [N], which rows are there.
    """

    def __init__(self, image_size: int, files: Sequence[Path], file: np.ndarray, row: np.ndarray) -> None:
        """file, row: int32 [N], as ShardIndex.locate gives them."""
        self.image_size = image_size
        self.present: np.ndarray = file >= 0
        self._files, self._file, self._row = files, file, row
        self._damaged: set[int] = set()
        self.__setstate__({})

    def read(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """Pixels of rows int64 [B], uint8 [S, S, 3] each, read-only; None for one that is not there or damaged."""
        pixels: list[np.ndarray | None] = [None] * len(rows)
        with self._lock:
            group: tuple[int, int] | None = None
            column: Any = None
            for place in np.lexsort((self._row[rows], self._file[rows])):  # rows of one group after one another
                file, row = int(self._file[rows[place]]), int(self._row[rows[place]])
                if file < 0 or file in self._damaged:
                    continue
                try:
                    shard = self._open(file)
                    number, offset = divmod(row, shard.metadata.row_group(0).num_rows)
                    if group != (file, number):
                        column = shard.read_row_group(number, columns=["pixels"], use_threads=False)["pixels"]
                        group = (file, number)
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
        self.__dict__.update(state)
        self._opened: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()  # Arrow's reader is one thread's


def _images_folder(folder: Path, image_size: int) -> Path:
    return folder / "images" / f"{image_size}px"


def _digest_array(content: bytes) -> pa.Array:
    of_32 = pa.binary(DIGEST_BYTES)
    return pa.FixedSizeBinaryArray.from_buffers(of_32, len(content) // DIGEST_BYTES, [None, pa.py_buffer(content)])


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
