"""The extractor's features of every image in every view, computed once by setup_data and read by memory mapping.

    FOLDER/features/<extractor key>-from64px/view_<v>/shard_*.safetensors
        cls fp16 [n, D], patches fp16 [n, N, D], sha256 uint8 [n, 32] of the image files, crc32 int64 [n, 2] of the rows
The extractor saw the training image: decoded at this size, turned by apply_view(view), then preprocessed. Knows no Ray.
"""

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d.data.shards import DIGEST_BYTES, ShardIndex, cache_file, digests, shard_name
from m2d.errors import DataError
from m2d.files.storage import one_line
from m2d.models.extractors import Features

logger = logging.getLogger(__name__)

FORMAT = 1
LARGEST_HALF = 65504.0
COLUMNS = ("cls", "patches")  # in the order of crc32's columns


def features_folder(folder: Path, extractor_key: str, image_size: int) -> Path:
    """Where the features of one extractor, from images of one size, lie in a dataset's folder."""
    return folder / "features" / f"{extractor_key}-from{image_size}px"


def feature_bytes(dim: int, num_patches: int) -> int:
    """What one image in one view takes on the disk."""
    return 2 * dim * (1 + num_patches) + DIGEST_BYTES + 8 * len(COLUMNS)


def write_features(
    folder: Path,
    extractor_key: str,
    image_size: int,
    view: int,
    sha256: Sequence[str],
    features: Features,
    *,
    names: Sequence[str] | None = None,
) -> Path:
    """One file of features in fp16, whole or not at all. Returns its path.

    features: cls [n, D], patches [n, N, D], in any precision, on any device. names: what an error calls the images;
    by default their sha256. Raises DataError for a value that is not finite or beyond fp16.
    """
    if not len(sha256) == len(features.cls) == len(features.patches):
        raise ValueError(f"{len(sha256)} images, {len(features.cls)} cls and {len(features.patches)} patches")
    cls, patches = _half(features.cls), _half(features.patches)
    fits = cls.isfinite().all(dim=1) & patches.isfinite().flatten(1).all(dim=1)
    if not fits.all():
        row = int((~fits).nonzero()[0])
        raise DataError(
            f"features of {(names or sha256)[row]}, view {view}, hold a value that is not finite or beyond fp16's "
            f"{LARGEST_HALF:g}; is this the right weights file for {extractor_key}?"
        )
    keys = digests(sha256)
    columns = {
        "cls": cls,
        "patches": patches,
        "sha256": torch.from_numpy(np.frombuffer(keys.tobytes(), dtype=np.uint8).reshape(-1, DIGEST_BYTES).copy()),
        "crc32": torch.tensor([[_checksum(row) for row in pair] for pair in zip(cls, patches, strict=True)]),
    }
    path = _view_folder(folder, extractor_key, image_size, view) / shard_name(keys, ".safetensors")
    with cache_file(path) as partial:
        try:
            save_file(columns, partial, metadata=_notes(extractor_key, image_size, view))
        except SafetensorError as error:  # of a full disk, say
            raise OSError(str(error)) from error
    return path


class FeatureStore:
    """All cached features of one extractor from images of one size."""

    def __init__(self, folder: Path, extractor_key: str, image_size: int) -> None:
        self.extractor_key = extractor_key
        self.unreadable: dict[Path, str] = {}  # file -> reason; what stands in them counts as missing
        self._folder = folder
        self._image_size = image_size
        self._views: dict[int, ShardIndex] = {}

    @classmethod
    def open(cls, folder: Path, extractor_key: str, image_size: int) -> Self:
        """An empty one where nothing is there. Only the images' sums are read, of a view when it is asked for."""
        return cls(folder, extractor_key, image_size)

    def missing(self, sha256: Sequence[str], views: int) -> np.ndarray:
        """Which features are not there: bool [n, views], of views 0 .. views - 1."""
        keys = digests(sha256)
        absent = [self._index(view).locate(keys)[0] < 0 for view in range(views)]
        return np.stack(absent, axis=1)

    def files(self, view: int) -> tuple[Path, ...]:
        """All readable shards of a view."""
        return self._index(view).files

    def table(self, sha256: Sequence[str], views: int) -> "FeatureTable":
        """The features of these images, in this order, in views 0 .. views - 1. Raises DataError if one is missing."""
        keys = digests(sha256)
        files: list[Path] = []
        file_numbers, rows = [], []
        for view in range(views):
            index = self._index(view)
            file, row = index.locate(keys)
            file_numbers.append(np.where(file < 0, -1, file + len(files)).astype(np.int32))
            rows.append(row)
            files += index.files
        file_of, row_of = np.stack(file_numbers, axis=1), np.stack(rows, axis=1)
        absent = int((file_of < 0).sum())
        if absent:
            raise DataError(
                f"the feature cache of {self.extractor_key} in {self._folder} lacks {absent:,} of {file_of.size:,} "
                "image views; complete it with setup_data --features"
            )
        return FeatureTable(files, file_of, row_of)

    def _index(self, view: int) -> ShardIndex:
        if view not in self._views:
            files: list[Path] = []
            keys: list[np.ndarray] = []
            wanted = _notes(self.extractor_key, self._image_size, view)
            folder = _view_folder(self._folder, self.extractor_key, self._image_size, view)
            for path in sorted(folder.glob("shard_*.safetensors")):
                try:
                    with safe_open(path, framework="np") as shard:
                        if shard.metadata() != wanted:
                            raise ValueError("made by another version of M2D, or for another extractor, size or view")
                        sums = shard.get_tensor("sha256")
                        if shard.get_slice("patches").get_shape()[0] != len(sums):
                            raise ValueError("holds more or fewer features than names")
                except (SafetensorError, OSError, ValueError) as error:
                    reason = one_line(error)
                    self.unreadable[path] = reason
                    logger.warning(
                        "features: %s cannot be read (%s); setup_data --features makes it again", path, reason
                    )
                    continue
                files.append(path)
                keys.append(np.frombuffer(sums.tobytes(), dtype=f"S{DIGEST_BYTES}"))
            self._views[view] = ShardIndex(files, keys)
        return self._views[view]


class FeatureTable:
    """Features by row and view. Small to pickle: files are mapped when first read, anew in each process.

    dim: D. num_patches: N.
    """

    def __init__(self, files: Sequence[Path], file: np.ndarray, row: np.ndarray) -> None:
        """file, row: int32 [n, views], the file and the row in it of each image and view."""
        self._files = tuple(files)
        self._file = file
        self._row = row
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._checked: dict[int, np.ndarray] = {}  # bool [rows, columns]: whose sum this process has found right
        self.num_patches, self.dim = (0, 0) if not file.size else self._open(int(file.flat[0]))["patches"].shape[1:]

    def __len__(self) -> int:
        return len(self._file)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Features:
        """cls [B, D] and patches [B, N, D] in fp16 on the CPU; rows int64 [B], views int8 [B].

        Raises DataError for a file that has changed since it was written.
        """
        return Features(cls=self._column("cls", rows, views), patches=self._column("patches", rows, views))

    def cls(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """The cls features alone, fp16 [B, D]; the patches are not read."""
        return self._column("cls", rows, views)

    def _column(self, name: str, rows: np.ndarray, views: np.ndarray) -> Tensor:
        places = zip(self._file[rows, views].tolist(), self._row[rows, views].tolist(), strict=True)
        return torch.stack([self._value(name, file, row) for file, row in places])

    def _value(self, name: str, file: int, row: int) -> Tensor:
        columns, number = self._open(file), COLUMNS.index(name)
        value = columns[name][row]
        if not self._checked[file][row, number]:
            if _checksum(value) != int(columns["crc32"][row, number]):
                raise self._damage(file, f"the {name} of row {row} have changed since they were written")
            self._checked[file][row, number] = True
        return value

    def _open(self, file: int) -> dict[str, Tensor]:
        if file not in self._mapped:
            try:
                columns = load_file(self._files[file])
            except (SafetensorError, OSError) as error:
                raise self._damage(file, one_line(error)) from None
            self._mapped[file] = columns
            self._checked[file] = np.zeros((len(columns["cls"]), len(COLUMNS)), dtype=bool)
        return self._mapped[file]

    def _damage(self, file: int, reason: str) -> DataError:
        return DataError(
            f"features: {self._files[file]} is damaged ({reason}); delete it and run setup_data --features, which "
            "makes it again"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}, "_checked": {}}


def _half(values: Tensor) -> Tensor:
    return values.detach().to(device="cpu", dtype=torch.float16).contiguous()


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.numpy().data)


def _notes(extractor_key: str, image_size: int, view: int) -> dict[str, str]:
    return {"format": str(FORMAT), "extractor": extractor_key, "image_size": str(image_size), "view": str(view)}


def _view_folder(folder: Path, extractor_key: str, image_size: int, view: int) -> Path:
    return features_folder(folder, extractor_key, image_size) / f"view_{view}"
