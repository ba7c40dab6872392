"""Which images an evaluation compares: real training images, unseen real ones, generated ones; decoded to one size.

Called by m2d.evaluation.evaluate. Knows nothing of features or scores.
"""

import hashlib
import os
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2d.classes import CLASSES
from m2d.data.catalog import read_catalog, scan_dataset
from m2d.data.decode import ImageRejected, decode_resized, probe_image
from m2d.data.prepared import prepared_folder, reusable_catalog
from m2d.data.settings import DataConfig
from m2d.data.shards import cache_file
from m2d.errors import ConfigError, DataError
from m2d.evaluation.evaluate_settings import EvaluateConfig
from m2d.evaluation.feature_set import ImageSet
from m2d.files.progress import progress
from m2d.files.storage import inside, one_line, open_storage
from m2d.generation.planning import data_config_of
from m2d.generation.recipe import experiment_of
from m2d.generation.references import read_references
from m2d.models.checkpoint import CheckpointInfo

NAMED = 3  # of shared lesions or unreadable files
PIXELS = "evaluation_v1/pixels"  # in the cache folder; the number goes up when the way from a file to pixels changes
CONTACT_SHEET = "contact_sheet.png"  # lies beside the class folders of m2d's own runs
_THREADS = 16


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
    real, generated_root = _folder(config.real, "real"), _folder(config.generated, "generated")
    data = config.data or (data_config_of(checkpoint[1]) if checkpoint else DataConfig())
    notes: list[str] = []
    train, test = _real_sides(config, real, data, checkpoint, notes)
    _check_apart(train, test)
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
        train_root = _folder(config.train, "train")
        train = _listed("train", train_root, _catalog(train_root, data, config.cache_dir, notes), "all of")
        return train, _listed("test", real, _catalog(real, data, config.cache_dir, notes), "all of")
    own = Path(experiment_of(checkpoint[0]), "cache", "catalog.parquet") if checkpoint else None
    recorded = checkpoint[1].config.get("data_root") if checkpoint else None
    same = bool(recorded) and _same_place(str(recorded), real)  # records hold no key of a URI
    if config.data is None and own is not None and own.is_file() and same:
        catalog = read_catalog(str(own))
        notes.append("split of the real images: the checkpoint's own")
    else:
        catalog = _catalog(real, data, config.cache_dir, notes)
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
        sides.append(_listed(split, real, rows, f"{split} split of"))
    return sides[0], sides[1]


def _catalog(root: str, data: DataConfig, cache_dir: str, notes: list[str]) -> pa.Table:
    prepared = reusable_catalog(prepared_folder(cache_dir, root), root, data)
    if prepared is not None:
        return prepared
    with progress(f"scanning {root}") as shown:
        scan = scan_dataset(root, data, shown.show)
    notes += [f"left out {row['path']}: {row['reason']}" for row in scan.rejected.slice(0, NAMED).to_pylist()]
    if scan.rejected.num_rows > NAMED:
        notes.append(f"left out {scan.rejected.num_rows:,} unusable files of {root} in all")
    return scan.catalog


def _listed(name: str, root: str, rows: pa.Table, which: str) -> Listed:
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


def _check_apart(train: Listed, test: Listed) -> None:
    """A lesion seen in training is recognised, not diagnosed: a score on it says nothing about new patients."""
    for what, ours, theirs in (("lesion", train.groups, test.groups), ("image", train.sha256, test.sha256)):
        shared = sorted(set(ours) & set(theirs))
        if shared:
            names = ", ".join(text[:16] for text in shared[:NAMED]) + (", ..." if len(shared) > NAMED else "")
            raise DataError(
                f"real: {len(shared):,} {what}{'s' if len(shared) > 1 else ''} of the test images ({test.source}) "
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
        filesystem, root = open_storage(side.root)

        def decode(row: int) -> None:
            try:
                with filesystem.open_input_file(posixpath.join(root, side.paths[row])) as file:
                    encoded = bytes(file.read())
                if hashlib.sha256(encoded).hexdigest() != side.sha256[row]:
                    failures[row] = "is another file than when it was catalogued"
                else:
                    out[row] = decode_resized(encoded, size, max_pixels=max_pixels)
            except ImageRejected as rejection:
                failures[row] = rejection.reason
            except FileNotFoundError:
                failures[row] = "is not there"
            except (pa.ArrowException, OSError) as error:
                failures[row] = f"cannot be read ({one_line(error)})"

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
        return _decode(_taken(side, kept), size, cache_dir, max_pixels, notes)
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


def _taken(side: Listed, rows: Sequence[int]) -> Listed:
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


def _folder(folder: str | None, setting: str) -> str:
    if folder is None:
        raise ConfigError(f"{setting} is not set; name the folder that holds the class folders by --{setting}")
    if "://" in folder:
        return folder
    if not Path(folder).expanduser().is_dir():
        raise ConfigError(f"{setting}: {folder} is not a folder; name the one that holds the class folders")
    return os.path.expanduser(folder)
