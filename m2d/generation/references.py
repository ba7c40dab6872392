"""Input images: found in a folder and checked as training data is, and the network that their features come from.

The driver reads folders, the generator single images. Nothing heavy is imported before an extractor is asked for.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import fs

from m2d.classes import CLASSES
from m2d.data.decode import ImageRejected, decode_resized, probe_image
from m2d.data.layouts import IMAGE_SUFFIXES, is_debris
from m2d.data.settings import DataConfig
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.files.paths import refuse_credentials
from m2d.files.storage import inside, one_line, open_storage

if TYPE_CHECKING:
    import numpy as np

    from m2d.models.checkpoint import Checkpoint
    from m2d.models.extractors import FeatureExtractor

MAX_PIXELS = DataConfig().max_pixels
_THREADS = 16  # decoding releases the GIL, and on remote storage most of them wait for bytes


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One input image that proved readable to its last byte."""

    path: str  # absolute, or a URI
    label: str  # class code
    sha256: str  # of the file


@dataclass(frozen=True, kw_only=True)
class References:
    """What a folder of input images holds."""

    by_class: dict[str, tuple[Reference, ...]]  # in the order of CLASSES, each by file name; none is empty
    rejected: tuple[tuple[str, str], ...]  # (path within the folder, reason): left out


def read_references(
    folder: str,
    *,
    classes: Sequence[str] | None = None,
    setting: str = "init_images",
    max_pixels: int = MAX_PIXELS,
) -> References:
    """Every usable image of `classes` (None: of those that are there) in a folder, a local path or a URI.

    The folder holds class folders (any letter case, images at any depth), and an image's class is its folder's name;
    or it holds images, all of the one class that `classes` then names. The checks are those of a dataset's scan: hidden
    files are passed over, unreadable ones are left out and listed with a reason. setting: the flag to name in errors.
    Raises DataError where the folder cannot be used, or a class of `classes` has no usable image in it.
    """
    refuse_credentials(setting, folder)  # each image's place goes into plan, manifest and image
    filesystem, root = open_storage(folder)
    candidates, rejected = _candidates(filesystem, root, classes, f"{setting}: {folder}")
    found: dict[str, list[Reference]] = {code: [] for code in CLASSES}
    with ThreadPoolExecutor(_THREADS) as pool:
        probed = pool.map(
            lambda one: _probe(filesystem, posixpath.join(root, one[0]), max_pixels=max_pixels), candidates
        )
        for (path, label), (sha256, reason) in zip(candidates, probed, strict=True):
            if reason:
                rejected.append((path, reason))
            else:
                place = inside(folder, path) if "://" in folder else posixpath.join(root, path)
                found[label].append(Reference(path=place, label=label, sha256=sha256))
    first = f"; the first of {len(rejected)} left out: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
    present = [code for code in CLASSES if found[code]]
    if not present:
        raise DataError(f"{setting}: {folder} holds no usable image{first}")
    lacking = [code for code in classes or () if not found[code]]
    if lacking:
        raise DataError(
            f"{setting}: {folder} holds no usable image of {', '.join(lacking)}, but of {', '.join(present)}{first}; "
            "name other --classes, or add images"
        )
    return References(by_class={code: tuple(found[code]) for code in present}, rejected=tuple(sorted(rejected)))


def read_reference(path: str, size: int) -> np.ndarray:
    """One input image as training sees images of `size` pixels: uint8 [size, size, 3] RGB, the centre square.

    Raises DataError where it cannot be read.
    """
    try:
        return decode_resized(_read(*open_storage(path)), size, max_pixels=MAX_PIXELS)
    except (ImageRejected, pa.ArrowException, OSError) as error:
        raise DataError(
            f"reference: {path} cannot be used ({one_line(error)}); put the image back, or take its "
            "rows out of the plan"
        ) from None


def read_sha256(paths: Collection[str]) -> dict[str, str]:
    """Of the input images of a plan that came from a file. Raises DataError for the first that cannot be used."""
    with ThreadPoolExecutor(_THREADS) as pool:
        probed = dict(zip(paths, pool.map(lambda path: _probe(*open_storage(path)), paths), strict=True))
    broken = sorted(path for path, (_, reason) in probed.items() if reason)
    if broken:
        raise DataError(
            f"plan: {len(broken)} of {len(paths)} input images cannot be used, the first is "
            f"{broken[0]} ({probed[broken[0]][1]}); fix the paths in the plan, or take the rows out"
        )
    return {path: sha256 for path, (sha256, _) in probed.items()}


def load_reference_extractor(checkpoint: Checkpoint, weights: str | None = None) -> FeatureExtractor:
    """The extractor that guided the checkpoint's training, as that run had it set, on the CPU.

    weights: its file here; None takes the place that the run had, or the extractor's own. Raises CheckpointError or
    ConfigError where it cannot be had, or gives features of another length than the checkpoint's.
    """
    from m2d.models.extractors import load_feature_extractor

    recorded: Any = checkpoint.info.config.get("feature_extractor")
    if not isinstance(recorded, dict) or "name" not in recorded:
        raise CheckpointError(
            f"checkpoint: {checkpoint.path} does not say which feature extractor guided it; guide by --feature prior "
            "or none, or take a checkpoint that was trained with this M2D"
        )
    name, place = str(recorded["name"]), weights or recorded.get("weights")
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(f"extractor_weights: {weights} is not a file; give the weights of {name}")
    if place is not None and not Path(place).is_file():
        raise ConfigError(
            f"extractor_weights is not set, and the weights of {name}, which guided {checkpoint.path}, are not at "
            f"{place} any more; give their file"
        )
    extractor = load_feature_extractor(name, place, recorded.get("input_size"), recorded.get("crop", "whole"))
    require_dim(extractor, checkpoint)
    return extractor


def require_dim(extractor: FeatureExtractor, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the extractor's features are not of the length that the checkpoint was trained with."""
    if extractor.dim != checkpoint.info.feature_dim:
        raise ConfigError(
            f"the features of {extractor.name} have {extractor.dim} dimensions, those that guided {checkpoint.path} "
            f"have {checkpoint.info.feature_dim}; give the extractor of its run ({checkpoint.info.feature_extractor})"
        )


def _candidates(
    filesystem: fs.FileSystem, root: str, classes: Sequence[str] | None, where: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(path within root, class) of every file that may be an image, in order; (path, reason) of the others."""
    try:
        kind = filesystem.get_file_info(root).type
        if kind != fs.FileType.Directory:
            what = "does not exist" if kind == fs.FileType.NotFound else "is a file"
            raise DataError(f"{where} {what}; give a folder of images, or of class folders")
        entries = [info for info in filesystem.get_file_info(fs.FileSelector(root)) if not is_debris(info.base_name)]
        names = sorted(info.base_name for info in entries if info.type == fs.FileType.Directory)
        files = sorted(info.base_name for info in entries if info.type == fs.FileType.File)
        unknown = [name for name in names if name.upper() not in CLASSES]
        if len(unknown) == len(names):
            label = _flat_label(classes, names, files, where)
            listed = [(name, label) for name in files]
            loose = [(name, "is a folder that is no class") for name in names]
        elif unknown:
            raise DataError(
                f"{where} has a folder that is no class: {unknown[0]}; expected some of {' '.join(CLASSES)}. Rename it "
                "or move it out"
            )
        else:
            below = [
                posixpath.relpath(info.path, root)
                for name in names
                for info in filesystem.get_file_info(fs.FileSelector(posixpath.join(root, name), recursive=True))
                if info.type == fs.FileType.File
            ]
            listed = [
                (path, path.partition("/")[0].upper())
                for path in below
                if not any(is_debris(part) for part in path.split("/"))
            ]
            loose = [(name, "lies beside the class folders") for name in files if _is_image(name)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} cannot be listed ({one_line(error)}); check access to it") from None
    wanted = sorted(pair for pair in listed if classes is None or pair[1] in classes)
    known = " ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
    other = [(path, f"its suffix is not one of {known}") for path, _ in wanted if not _is_image(path)]
    return [pair for pair in wanted if _is_image(pair[0])], [*other, *loose]


def _flat_label(classes: Sequence[str] | None, names: Sequence[str], files: Sequence[str], where: str) -> str:
    """The class of the images of a folder without class folders."""
    if not any(map(_is_image, files)):
        found = f"found: {', '.join([*names, *files][:8])}" if names or files else "it is empty"
        raise DataError(f"{where} holds no image and no class folder ({' '.join(CLASSES)}); {found}")
    if classes is None or len(classes) != 1:
        raise DataError(
            f"{where} has no class folder, so its images' class must be said: name exactly one with --classes, or sort "
            f"them into folders called {' '.join(CLASSES)}"
        )
    return classes[0]


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _probe(filesystem: fs.FileSystem, path: str, max_pixels: int = MAX_PIXELS) -> tuple[str, str]:
    """The file's sha256, and why it cannot be used: empty where it can."""
    try:
        encoded = _read(filesystem, path)
        probe_image(encoded, max_pixels=max_pixels)
        return hashlib.sha256(encoded).hexdigest(), ""
    except ImageRejected as rejection:
        return "", rejection.reason
    except (pa.ArrowException, OSError) as error:
        return "", f"cannot be read: {one_line(error)}"


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()
