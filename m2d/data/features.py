"""Features of images: extracted by one loop, kept by extractor, view and the sha256 of the image, found again by it.

    FOLDER/features/<extractor key>-from64px/view_<v>/shard_*.safetensors  of setup_data, for training
        cls fp16 [n, D], patches fp16 [n, N, D], sha256 uint8 [n, 32] of the image files, crc32 int64 [n, 2] of the rows
    FOLDER/cls_*.safetensors  of the evaluation
        cls float32 [n, D], sha256 uint8 [n, 32]
The extractor saw the image as it is decoded for training, turned by apply_view(view), then preprocessed.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as arrays_as_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d.cluster.fan_out import JobResult
from m2d.data.store import DIGEST_BYTES, PreparedRows, ShardIndex, content_name, digests, pieces
from m2d.data.views import apply_view
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.files.atomic import cache_file
from m2d.files.storage import one_line
from m2d.models.extractors import FeatureExtractor, Features, load_feature_extractor
from m2d.models.settings import FeatureExtractorConfig

logger = logging.getLogger(__name__)

GPU_BATCH, CPU_BATCH = 128, 16  # a CPU's caches hold the maps of few images: 8 to 16 go faster than 64
FORMAT = 1
LARGEST_HALF = 65504.0
COLUMNS = ("cls", "patches")  # in the order of crc32's columns


@dataclass(frozen=True)
class ExtractionJobs:
    """Job j: the features of the images `rows` in the view `view`, (view, rows) = jobs[j]. Cheap to pickle."""

    config: FeatureExtractorConfig
    key: str  # of the extractor that the driver has
    read: Callable[[np.ndarray, FeatureExtractor], Iterable[np.ndarray | str]]  # uint8 [H, W, 3], or why there is none
    keep: Callable[[int, np.ndarray, Features], None]  # view, rows and their features
    jobs: Sequence[tuple[int, np.ndarray]]
    batch_size: int | None = None  # None: as the device likes it
    batch_setting: str = "batch_size"  # its name on the command line
    patches: bool = True  # False: `cls` alone is needed
    keep_batches: bool = False  # each batch as it is done, not a whole job

    def load(self, device: str, threads: int | None = None) -> FeatureExtractor:
        """On the device, ready to use. threads: of torch in this process, for a CPU, never more than it has cores.

        Raises ConfigError where this machine's weights are not the driver's.
        """
        if device == "cpu":
            torch.set_num_threads(min(threads or torch.get_num_threads(), cpu_count()))
        config = self.config
        extractor = load_feature_extractor(config.name, config.weights, config.input_size, config.crop)
        if extractor.key != self.key:
            raise ConfigError(
                f"feature_extractor: a node's weights give {extractor.key}, the driver's {self.key}; every node needs "
                "the same file at the same path"
            )
        return extractor.to(device).to(memory_format=torch.channels_last)

    def run(self, job: int, extractor: FeatureExtractor, device: str) -> JobResult:
        """Extract and keep the features of job j; images that cannot be had are reported.

        Raises ConfigError for a batch that does not fit the device, and what `read` and `keep` raise.
        """
        view, rows = self.jobs[job]
        size = self.batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
        images = iter(self.read(rows, extractor))
        failures: list[str] = []
        kept: list[int] = []
        parts: list[Features] = []
        for batch in pieces(rows, size):
            read = dict(zip(batch.tolist(), images))  # no more than the batch takes
            failures += [image for image in read.values() if isinstance(image, str)]
            good = {row: image for row, image in read.items() if isinstance(image, np.ndarray)}
            if good:
                try:
                    features = extract_view(extractor, np.stack([*good.values()]), view, device)
                except torch.OutOfMemoryError:
                    raise ConfigError(
                        f"{self.batch_setting} {size} does not fit the memory of {device}; try --{self.batch_setting} "
                        f"{max(1, size // 2)} (the result stays the same)"
                    ) from None
                kept += good
                parts.append(features if self.patches else Features(features.cls, features.patches[:, :0].clone()))
            if parts and (self.keep_batches or batch[-1] == rows[-1]):
                together = (torch.cat([getattr(part, column) for part in parts]) for column in COLUMNS)
                self.keep(view, np.array(kept), Features(*together))
                kept, parts = [], []
        return JobResult(len(rows) - len(failures), failures)

    def here(self, device: str) -> Iterator[JobResult]:
        """All jobs one after the other in this process."""
        extractor = self.load(device)
        for number in range(len(self.jobs)):
            yield self.run(number, extractor, device)


@torch.inference_mode()
def extract_view(extractor: FeatureExtractor, images: np.ndarray, view: int, device: str) -> Features:
    """Features in float32, on the CPU, of images uint8 [n, S, S, 3] as the view shows them."""
    viewed = np.ascontiguousarray(np.stack([apply_view(image, view) for image in images]))
    features = extractor(extractor.preprocess(torch.from_numpy(viewed).to(device).permute(0, 3, 1, 2)))
    return Features(features.cls.float().cpu(), features.patches.float().cpu())


def read_prepared(images: PreparedRows, rows: np.ndarray, _: FeatureExtractor) -> Iterator[np.ndarray]:
    """What ExtractionJobs.read takes, of prepared images. Raises DataError for one that is damaged or gone."""
    for row, pixels in zip(rows, images.read(rows), strict=True):
        if pixels is None:
            raise DataError(
                f"images: {images.file_of(int(row))} is damaged or gone; delete it, then run setup_data "
                "--images --features again"
            )
        yield pixels


# --- cls alone, of the evaluation -------------------------------------------------------------------------------------


def write_cls(folder: Path, extractor: str, sha256: Sequence[str], cls: np.ndarray) -> None:
    """One file of vectors float32 [n, D], whole or not at all. Raises CheckpointError for one that is not finite."""
    if not np.isfinite(cls).all():
        raise CheckpointError(
            f"feature extractor {extractor} gives features that are not finite; its weights are broken, get the file "
            "again"
        )
    ids = np.frombuffer(digests(sha256), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    with cache_file(folder / f"cls_{content_name(sha256)}.safetensors") as partial:
        partial.write_bytes(arrays_as_bytes({"sha256": ids, "cls": cls}))


def read_cls(folder: Path, sha256: Iterable[str]) -> dict[str, np.ndarray]:
    """sha256 -> float32 [D] of the wanted images that the folder holds. A damaged file is removed."""
    wanted = set(sha256)
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("cls_*.safetensors")):
        try:
            tensors = load_arrays(path)
            ids, cls = tensors["sha256"], tensors["cls"]
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s cannot be read (%s); its images are extracted again", path, one_line(error))
            if not isinstance(error, OSError):  # a disk that fails does not mean a damaged file
                path.unlink(missing_ok=True)
            continue
        names = (bytes(digest).hex() for digest in ids)
        found |= {name: cls[row] for row, name in enumerate(names) if name in wanted}
    return found


# --- cls and patches of every view, of setup_data ---------------------------------------------------------------------


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
    cls, patches = (
        column.detach().to("cpu", torch.float16).contiguous() for column in (features.cls, features.patches)
    )
    fits = cls.isfinite().all(dim=1) & patches.isfinite().flatten(1).all(dim=1)
    if not fits.all():
        raise DataError(
            f"features of {(names or sha256)[int(fits.long().argmin())]}, view {view}, hold a value that is not finite "
            f"or beyond fp16's {LARGEST_HALF:g}; is this the right weights file for {extractor_key}?"
        )
    columns = {
        "cls": cls,
        "patches": patches,
        "sha256": torch.tensor(list(digests(sha256)), dtype=torch.uint8).view(-1, DIGEST_BYTES),
        "crc32": torch.tensor([[_checksum(row) for row in pair] for pair in zip(cls, patches, strict=True)]),
    }
    path = _view_folder(folder, extractor_key, image_size, view) / f"shard_{content_name(sha256)}.safetensors"
    with cache_file(path) as partial:
        try:
            save_file(columns, partial, metadata=_notes(extractor_key, image_size, view))
        except SafetensorError as error:  # of a full disk, say
            raise OSError(str(error)) from error
    return path


class FeatureStore:
    """All cached features of one extractor from images of one size; empty where nothing is there.

    Only the images' sums are read, of a view when it is asked for. unreadable: see ShardIndex.
    """

    def __init__(self, folder: Path, extractor_key: str, image_size: int) -> None:
        self.unreadable: dict[Path, str] = {}
        self._folder, self._key, self._image_size = folder, extractor_key, image_size
        self._views: dict[int, ShardIndex] = {}

    def missing(self, sha256: Sequence[str], views: int) -> np.ndarray:
        """Which features are not there: bool [n, views], of the first views."""
        return np.stack([self._index(view).missing(sha256) for view in range(views)], axis=1)

    def files(self, view: int) -> list[Path]:
        """All readable shards of a view."""
        return self._index(view).files

    def table(self, sha256: Sequence[str], views: int) -> "FeatureTable":
        """The features of these images, in this order, in views 0 .. views - 1. Raises DataError if one is missing."""
        absent = self.missing(sha256, views)
        if absent.any():
            raise DataError(
                f"the feature cache of {self._key} in {self._folder} lacks {absent.sum():,} of {absent.size:,} "
                "image views; complete it with setup_data --features"
            )
        files: list[Path] = []
        places = []
        for index in map(self._index, range(views)):
            file, row = index.locate(sha256)
            places.append((file + np.int32(len(files)), row))
            files += index.files
        return FeatureTable(files, *np.stack(places, axis=-1))

    def _index(self, view: int) -> ShardIndex:
        if view not in self._views:
            wanted = _notes(self._key, self._image_size, view)

            def digests_of(path: Path) -> bytes:
                with safe_open(path, framework="np") as shard:
                    if shard.metadata() != wanted:
                        raise ValueError("made by another version of M2D, or for another extractor, size or view")
                    sums: np.ndarray = shard.get_tensor("sha256")
                    if shard.get_slice("patches").get_shape()[0] != len(sums):
                        raise ValueError("holds more or fewer features than names")
                return sums.tobytes()

            folder = _view_folder(self._folder, self._key, self._image_size, view)
            self._views[view] = ShardIndex(folder, ".safetensors", digests_of)
            self.unreadable |= self._views[view].unreadable
        return self._views[view]


class FeatureTable:
    """Features by row and view. Small to pickle: files are mapped when first read, in each process.

    dim: D. num_patches: N.
    """

    def __init__(self, files: Sequence[Path], file: np.ndarray, row: np.ndarray) -> None:
        """file, row: int32 [n, views], the file and the row in it of each image and view."""
        self._files, self._file, self._row = files, file, row
        self._mapped: dict[int, dict[str, Tensor]] = {}
        self._checked: dict[int, np.ndarray] = {}  # bool [rows, columns]: whose sum this process has found right
        self.num_patches, self.dim = (0, 0) if not file.size else self._open(int(file.flat[0]))["patches"].shape[1:]

    def __len__(self) -> int:
        return len(self._file)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Features:
        """cls [B, D] and patches [B, N, D] in fp16 on the CPU; rows int64 [B], views int8 [B].

        Raises DataError for a file that has changed since it was written.
        """
        return Features(self.cls(rows, views), self._column("patches", rows, views))

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


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.numpy().data)


def _notes(extractor_key: str, image_size: int, view: int) -> dict[str, str]:
    return {"format": str(FORMAT), "extractor": extractor_key, "image_size": str(image_size), "view": str(view)}


def _view_folder(folder: Path, extractor_key: str, image_size: int, view: int) -> Path:
    return folder / "features" / f"{extractor_key}-from{image_size}px" / f"view_{view}"
