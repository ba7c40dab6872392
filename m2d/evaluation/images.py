"""Which images an evaluation compares: real training images, unseen real ones, generated ones; decoded to one size.

Every part (fidelity, memorization, downstream, consistency) is a function of the ImageSet and FeatureSet defined here.
"""

import hashlib
import os
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2d.classes import CLASSES
from m2d.data.catalog import read_catalog, scan_dataset
from m2d.data.decode import decode_resized, probe_image
from m2d.data.reader import decode_unchanged
from m2d.data.settings import DataConfig
from m2d.data.store import prepared_folder, reusable_catalog
from m2d.errors import ConfigError, DataError
from m2d.evaluation.settings import EvaluateConfig
from m2d.files.atomic import cache_file
from m2d.files.progress import progress
from m2d.files.storage import inside, open_storage
from m2d.generation.output import experiment_of
from m2d.generation.plan import data_config_of
from m2d.generation.references import read_references
from m2d.models.checkpoint import CheckpointInfo

NAMED = 3  # of shared lesions or unreadable files
PIXELS = "evaluation_v1/pixels"  # in the cache folder; the number goes up when the way from a file to pixels changes
CONTACT_SHEET = "contact_sheet.png"  # lies beside the class folders of m2d's own runs
_THREADS = 16


@dataclass(frozen=True)
class ImageSet:
    """Images that were decoded to one size. N images of S x S pixels."""

    name: str  # train, test, generated, reconstructions: as the report calls it
    source: str  # where from, in words
    sha256: tuple[str, ...]  # N; of the file's bytes, or of the pixels where there is no file
    paths: tuple[str, ...]  # N; as a person finds the file
    labels: np.ndarray  # int64 [N], index into CLASSES
    groups: np.ndarray  # object [N]; equal values are one lesion; a generated image is a group of its own
    pixels: np.ndarray  # uint8 [N, S, S, 3], perhaps mapped from a file: take rows, never all at once

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """S."""
        return int(self.pixels.shape[1])

    @property
    def counts(self) -> dict[str, int]:
        """Images of each class that has some, in the order of CLASSES."""
        counted = np.bincount(self.labels, minlength=len(CLASSES))
        return {code: int(n) for code, n in zip(CLASSES, counted, strict=True) if n}


@dataclass(frozen=True)
class FeatureSet:
    """The `cls` features of one extractor for an image set, in its order."""

    images: ImageSet
    extractor: str  # m2d.models.extractors.base.FeatureExtractor.key
    cls: np.ndarray  # float32 [N, D], as the extractor gives them: not standardised

    def __post_init__(self) -> None:
        if self.cls.ndim != 2 or len(self.cls) != len(self.images):
            raise ValueError(f"features of shape {self.cls.shape} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self.images.labels

    @property
    def groups(self) -> np.ndarray:
        """object [N]."""
        return self.images.groups

    def rows(self, label: int) -> np.ndarray:
        """Row numbers of a class, int64 [n]."""
        return np.flatnonzero(self.labels == label)


def shared_classes(sets: Sequence[ImageSet | FeatureSet]) -> list[int]:
    """Class indices that have an image in every set, ascending."""
    present = [set(np.unique(one.labels).tolist()) for one in sets]
    return sorted(set.intersection(*present)) if present else []


@dataclass(frozen=True)
class Listed:
    """Images that are known and not yet decoded. N of them."""

    name: str
    source: str
    root: str  # of the paths: a folder or a URI
    paths: list[str]  # N, relative to root
    sha256: list[str]  # N
    labels: list[str]  # N, class codes
    groups: list[str]  # N, lesion ids


@dataclass(frozen=True)
class ImageSets:
    """The three sides of an evaluation, and what was left out of them."""

    train: ImageSet
    test: ImageSet  # real, of lesions that no training image shows
    generated: ImageSet
    notes: list[str]  # for the report, one line each


def read_image_sets(config: EvaluateConfig, checkpoint: tuple[str, CheckpointInfo] | None) -> ImageSets:
    """List, check and decode. checkpoint: the one that made the images, and its place, where it is known.

    Raises ConfigError or DataError in one line: a folder that cannot be used, classes that no real image has, lesions
    or images on both sides.
    """
    real, generated_root = class_folder(config.real, "real"), class_folder(config.generated, "generated")
    data = config.data or (data_config_of(checkpoint[1]) if checkpoint else DataConfig())
    notes: list[str] = []
    train, test = _real_sides(config, real, data, checkpoint, notes)
    check_apart(train, test, "real")
    generated = _generated(generated_root, data, notes)
    unknown = sorted(set(generated.labels) - set(train.labels), key=CLASSES.index)
    if unknown:
        raise DataError(
            f"generated: {generated.source} holds images of {' '.join(unknown)}, the real training images are of "
            f"{' '.join(code for code in CLASSES if code in set(train.labels))}; leave those folders out, or name real "
            "images of all classes"
        )
    lacking = [code for code in CLASSES if code in set(train.labels) and code not in set(generated.labels)]
    if lacking:
        notes.append(f"no generated image of {' '.join(lacking)}: these classes keep their real images alone")
    size = config.image_size or _size_of(generated, data.max_pixels)
    decoded = [_decode(side, size, config.cache_dir, data.max_pixels, notes) for side in (train, test, generated)]
    return ImageSets(decoded[0], decoded[1], decoded[2], notes)


def with_pixels(like: ImageSet, *, name: str, source: str, pixels: np.ndarray, cache_dir: str) -> ImageSet:
    """The images of another set, redrawn: pixels uint8 [N, S, S, 3] take the place of its own, kept as a file."""
    sha256 = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)
    stored = _stored(cache_dir, sha256, int(pixels.shape[1]), lambda out: out.__setitem__(slice(None), pixels))
    return replace(like, name=name, source=source, sha256=sha256, pixels=stored)


def _real_sides(
    config: EvaluateConfig,
    real: str,
    data: DataConfig,
    checkpoint: tuple[str, CheckpointInfo] | None,
    notes: list[str],
) -> tuple[Listed, Listed]:
    if config.train is not None:
        train_root = class_folder(config.train, "train")
        train = listed("train", train_root, catalog_of(train_root, data, config.cache_dir, notes), "all of")
        return train, listed("test", real, catalog_of(real, data, config.cache_dir, notes), "all of")
    own = Path(experiment_of(checkpoint[0]), "cache", "catalog.parquet") if checkpoint else None
    recorded = checkpoint[1].config.get("data_root") if checkpoint else None
    same = bool(recorded) and _same_place(str(recorded), real)  # records hold no key of a URI
    if config.data is None and own is not None and own.is_file() and same:
        catalog = read_catalog(str(own))
        notes.append("split of the real images: the checkpoint's own")
    else:
        catalog = catalog_of(real, data, config.cache_dir, notes)
        if checkpoint is None:
            notes.append(
                f"split of the real images: by lesion, seed {data.split_seed}, {data.test_fraction:.0%} for the test; "
                "whether the generator saw the test images is not known (no --checkpoint)"
            )
    sides = []
    for split in ("train", "test"):
        rows = catalog.filter(pc.equal(catalog["split"], split))
        if not len(rows):
            raise DataError(f"real: {real} has no image in its {split} split; set the fractions of --data")
        sides.append(listed(split, real, rows, f"{split} split of"))
    return sides[0], sides[1]


def catalog_of(root: str, data: DataConfig, cache_dir: str, notes: list[str]) -> pa.Table:
    """That of setup_data where it is still right, otherwise of a new scan; what was left out goes to the notes."""
    prepared = reusable_catalog(prepared_folder(cache_dir, root), root, data)
    if prepared is not None:
        return prepared
    with progress(f"scanning {root}") as shown:
        scan = scan_dataset(root, data, shown.show)
    notes += [f"left out {row['path']}: {row['reason']}" for row in scan.rejected.slice(0, NAMED).to_pylist()]
    if scan.rejected.num_rows > NAMED:
        notes.append(f"left out {scan.rejected.num_rows:,} unusable files of {root} in all")
    return scan.catalog


def listed(name: str, root: str, rows: pa.Table, which: str) -> Listed:
    """The images of a catalog's rows; which: `train split of`, as in words before the root."""
    columns = [rows[column].to_pylist() for column in ("path", "sha256", "label", "lesion_id")]
    return Listed(name, f"{which} {root}", root, *columns)


def _generated(root: str, data: DataConfig, notes: list[str]) -> Listed:
    """Every image counts, copies too: a generator that repeats itself must be seen to."""
    if "://" not in root and not any(_is_class(path, data) for path in Path(root).iterdir()):
        other = sorted(path.name for path in Path(root).iterdir())[:NAMED]
        raise DataError(
            f"generated: {root} has no class folder (found: {', '.join(other) or 'nothing'}); only --format folder can "
            "be evaluated"
        )
    references = read_references(root, setting="generated", max_pixels=data.max_pixels)
    rejected = [(path, reason) for path, reason in references.rejected if path != CONTACT_SHEET]
    notes += [f"left out {path}: {reason}" for path, reason in rejected[:NAMED]]
    if len(rejected) > NAMED:
        notes.append(f"left out {len(rejected):,} unusable generated files in all")
    images = [image for code in CLASSES for image in references.by_class.get(code, ())]
    repeated = len(images) - len({image.sha256 for image in images})
    if repeated:
        notes.append(f"{repeated:,} generated images are exact repeats of other generated ones; all are counted")
    base = root if "://" in root else os.path.abspath(root)
    relative = [image.path if "://" in base else os.path.relpath(image.path, base) for image in images]
    groups = [f"generated {number}" for number in range(len(images))]
    return Listed(
        "generated", f"all of {root}", base, relative, [image.sha256 for image in images],
        [image.label for image in images], groups,
    )  # fmt: skip


def _is_class(path: Path, data: DataConfig) -> bool:
    return path.is_dir() and (path.name.upper() in CLASSES or path.name in data.class_map)


def check_apart(train: Listed, test: Listed, setting: str) -> None:
    """A lesion seen in training is recognised, not diagnosed: a score on it says nothing about new patients."""
    for what, ours, theirs in (("lesion", train.groups, test.groups), ("image", train.sha256, test.sha256)):
        shared = sorted(set(ours) & set(theirs))
        if shared:
            names = ", ".join(text[:16] for text in shared[:NAMED]) + (", ..." if len(shared) > NAMED else "")
            raise DataError(
                f"{setting}: {len(shared):,} {what}{'s' if len(shared) > 1 else ''} of the test images ({test.source}) "
                f"{'are' if len(shared) > 1 else 'is'} among the training images ({train.source}) too: {names}; leave "
                "them out of one"
            )


def _size_of(generated: Listed, max_pixels: int) -> int:
    """The shorter side of the first image; a generator makes all of one size."""
    filesystem, root = open_storage(generated.root)
    with filesystem.open_input_file(posixpath.join(root, generated.paths[0])) as file:
        return min(probe_image(bytes(file.read()), max_pixels=max_pixels))


def _decode(side: Listed, size: int, cache_dir: str, max_pixels: int, notes: list[str]) -> ImageSet:
    """The images at size x size. What cannot be read any more is left out with the reason."""
    failures: dict[int, str] = {}

    def decode_all(out: np.ndarray) -> None:
        storage = open_storage(side.root)

        def decode(row: int) -> None:
            found = decode_unchanged(
                storage, side.paths[row], side.sha256[row], partial(decode_resized, size=size, max_pixels=max_pixels)
            )
            if isinstance(found, str):
                failures[row] = found
            else:
                out[row] = found

        with progress(f"reading {side.name} images", len(out)) as shown, ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(decode, range(len(out))):
                shown.advance(1)
        if failures:
            raise _Unreadable

    try:
        pixels = _stored(cache_dir, side.sha256, size, decode_all)
    except _Unreadable:
        kept = [row for row in range(len(side.paths)) if row not in failures]
        first = f"{side.paths[min(failures)]}: {failures[min(failures)]}"
        if not kept:
            raise DataError(f"{side.name}: no image of {side.source} can be read; the first: {first}") from None
        notes.append(f"{len(failures):,} {side.name} images cannot be read, the first: {first}")
        return _decode(taken(side, kept), size, cache_dir, max_pixels, notes)
    return ImageSet(
        name=side.name,
        source=side.source,
        sha256=tuple(side.sha256),
        paths=tuple(inside(side.root, path) for path in side.paths),
        labels=np.array([CLASSES.index(code) for code in side.labels], dtype=np.int64),
        groups=np.array(side.groups, dtype=object),
        pixels=pixels,
    )


class _Unreadable(Exception):
    """Some images could not be decoded; the rest is tried again."""


def taken(side: Listed, rows: Sequence[int]) -> Listed:
    """Some rows of a side."""
    columns = [[column[row] for row in rows] for column in (side.paths, side.sha256, side.labels, side.groups)]
    return Listed(side.name, side.source, side.root, *columns)


def _stored(cache_dir: str, sha256: Sequence[str], size: int, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """uint8 [N, S, S, 3] of these images, mapped from a file of the cache; `fill` writes it where it is not there."""
    digest = hashlib.sha256("\n".join(sha256).encode()).hexdigest()[:20]
    path = Path(cache_dir).expanduser().absolute() / PIXELS / f"{size}px_{digest}.npy"
    shape = (len(sha256), size, size, 3)
    if not path.is_file():
        with cache_file(path) as partial:
            out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            fill(out)
            out.flush()
            del out
    pixels: np.ndarray = np.load(path, mmap_mode="r")
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"cache: {path} is not what its name says; delete it, then run again")
    return pixels


def _same_place(one: str, other: str) -> bool:
    return one == other or (
        "://" not in one and "://" not in other and os.path.realpath(one) == os.path.realpath(other)
    )


def class_folder(folder: str | None, setting: str) -> str:
    """A place of class folders that a setting names. Raises ConfigError for none, or for a path that is no folder."""
    if folder is None:
        raise ConfigError(f"{setting} is not set; name the folder that holds the class folders by --{setting}")
    if "://" in folder:
        return folder
    if not Path(folder).expanduser().is_dir():
        raise ConfigError(f"{setting}: {folder} is not a folder; name the one that holds the class folders")
    return os.path.expanduser(folder)
