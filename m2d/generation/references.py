"""Input images: found in a folder and checked as training data is, and the network that their features come from.

The driver reads folders, the generator single images. Nothing heavy is imported before an extractor is asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter
from pyarrow import fs

from m2d.classes import ISIC7, ClassSet
from m2d.data.decode import ImageRejected, decode_measured, decode_resized, probe_image
from m2d.data.layouts import IMAGE_SUFFIXES, REPORT, is_debris, without_image_suffix
from m2d.data.settings import DataConfig
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.files.paths import refuse_credentials
from m2d.files.progress import progress, say
from m2d.files.storage import inside, one_line, open_storage, read_file

if TYPE_CHECKING:
    from m2d.models.checkpoint import Checkpoint, CheckpointInfo
    from m2d.models.extractors import FeatureExtractor
    from m2d.models.settings import Crop

MAX_PIXELS = DataConfig().max_pixels
MASK_SUFFIX = "_segmentation.png"  # as HAM10000 and ISIC 2016 to 2018 have it
_THREADS = 16  # decoding releases the GIL, and on remote storage most of them wait for bytes
_MASK_PIXELS = 64  # a side, to tell how much of an image is lesion
_RING = 32  # of a side: how far a pasted lesion's own skin comes with it, and again as far it fades


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The lesion of an image: white in a file of its shape."""

    path: str  # absolute, or a URI
    sha256: str  # of the file
    share: float  # of the centre square


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One input image that proved readable to its last byte."""

    path: str  # absolute, or a URI
    label: str  # class code
    sha256: str  # of the file
    lesion_id: str | None = None  # where it is a training image
    mask: Mask | None = None  # where its lesion alone is to be redrawn
    skin: Reference | None = None  # the image, with its mask, over whose lesion it is pasted


@dataclass(frozen=True, kw_only=True)
class References:
    """What a folder of input images holds."""

    by_class: dict[str, tuple[Reference, ...]]  # in the order of the set, each by file name; none is empty
    rejected: tuple[tuple[str, str], ...]  # (path within the folder, reason): left out


def read_references(
    folder: str,
    *,
    classes: Sequence[str] | None = None,
    known: ClassSet = ISIC7,
    class_map: Mapping[str, str] | None = None,
    setting: str = "init_images",
    max_pixels: int = MAX_PIXELS,
) -> References:
    """Every usable image of `classes` (None: of those that are there) in a folder, a local path or a URI.

    known: the set that they are of; class_map: folder -> class code. The folder holds class folders (any letter case,
    images at any depth), and an image's class is its folder's name; or it holds images, all of the one class that
    `classes` then names. The checks are those of a dataset's scan: hidden files and reports of an evaluation are passed
    over, unreadable files are left out and listed with a reason. setting: the flag to name in errors. Raises DataError
    where the folder cannot be used, or a class of `classes` has no usable image in it.
    """
    refuse_credentials(setting, folder)  # each image's place goes into plan, manifest and image
    filesystem, root = open_storage(folder)
    try:
        listed, rejected = _listed(filesystem, root, classes, known, class_map, f"{setting}: {folder}")
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{setting}: {folder} cannot be listed ({one_line(error)}); give a folder of images, or of class folders"
        ) from None
    found: dict[str, list[Reference]] = {code: [] for code in known.codes}
    with ThreadPoolExecutor(_THREADS) as pool:
        probed = pool.map(lambda one: _probe(filesystem, f"{root}/{one[0]}", max_pixels), listed)
        for (path, label), (sha256, reason) in zip(listed, probed, strict=True):
            if reason:
                rejected.append((path, reason))
            else:
                place = inside(folder, path) if "://" in folder else f"{root}/{path}"
                found[label].append(Reference(path=place, label=label, sha256=sha256))
    first = f"; the first of {len(rejected)} left out: {': '.join(rejected[0])}" if rejected else ""
    present = [code for code in known.codes if found[code]]
    lacking = [code for code in classes or () if not found[code]]
    if lacking or not present:
        which = f" of {', '.join(lacking)}, but of {', '.join(present)}" if present else ""
        raise DataError(f"{setting}: {folder} holds no usable image{which}{first}; name other --classes, or add images")
    return References(by_class={code: tuple(found[code]) for code in present}, rejected=tuple(sorted(rejected)))


def read_reference(path: str, size: int, content: bytes | None = None) -> np.ndarray:
    """One input image as training sees images of `size` pixels: uint8 [size, size, 3] RGB, the centre square.

    content: of the file, where it is known. Raises DataError where it cannot be read.
    """
    encoded = _read(*open_storage(path)) if content is None else content
    try:
        if isinstance(encoded, str):
            raise ImageRejected(encoded)
        return decode_resized(encoded, size, max_pixels=MAX_PIXELS)
    except ImageRejected as rejection:
        raise DataError(
            f"reference: {path} cannot be used ({rejection.reason}); put it back, or take its rows out of the plan"
        ) from None


class Pasted(NamedTuple):
    """An input image that is made of two: paths of a lesion's image and mask, and of those whose skin it comes into."""

    lesion: str
    mask: str
    skin: str
    skin_mask: str


def read_pasted(of: Pasted, size: int) -> np.ndarray:
    """One lesion pasted over another, at `size` pixels: uint8 [size, size, 3] RGB.

    The lesion stays where it is in its picture and brings the skin around it, which also covers what the other lesion
    takes beyond it; the edge is feathered, see read_region. Colours: each channel of the lesion's picture is scaled so
    that the medians of the skin outside of both lesions are equal (von Kries). Raises DataError where a file cannot be
    read.
    """
    lesion, skin = (read_reference(path, size).astype(np.float32) for path in (of.lesion, of.skin))
    weight = read_region((of.mask, of.skin_mask), size)
    outside = weight == weight.min()
    tone, own_tone = (np.median(image[outside], axis=0) for image in (skin, lesion))
    matched = lesion * (tone / np.maximum(own_tone, 1))
    pasted = skin + weight[..., None] * (matched - skin)
    return np.rint(pasted.clip(0, 255)).astype(np.uint8)


def read_region(masks: Sequence[str], size: int) -> np.ndarray:
    """How much of each pixel is redrawn, float32 [size, size]: 1 on the lesions of all masks, 0 beyond a ring of skin.

    Half way at size / 32 from the lesions. Raises DataError where a mask cannot be read.
    """
    ring = max(1, size // _RING)
    lesions = np.any([read_reference(mask, size)[..., 0] > 127 for mask in masks], axis=0)
    grown = Image.fromarray(lesions.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * ring + 1))
    return np.asarray(grown.filter(ImageFilter.GaussianBlur(ring / 2)), np.float32) / 255


def read_masks(
    folder: str, images: Collection[tuple[str, str, float | None]], *, what: str = "image", largest: float = 1.0
) -> dict[str, Mask]:
    """By an image's sha256 its mask, of those that have a usable one in a folder, at any depth.

    images: (path, sha256, width / height or None) of each; what they are. The mask of NAME.jpg is
    NAME_segmentation.png, of the shape of its image and with some lesion in the centre square, at most the share
    `largest` of it. Says how many there are, and what was left out. Raises DataError where the folder cannot be listed,
    or no image has one.
    """
    refuse_credentials("masks", folder)
    filesystem, root = open_storage(folder)
    try:
        listed = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"masks: {folder} cannot be listed ({one_line(error)}); give a folder of NAME{MASK_SUFFIX}"
        ) from None
    place_of = {info.base_name: info.path for info in listed if not is_debris(info.base_name)}

    def name_of(image: tuple[str, str, float | None]) -> str:
        return f"{without_image_suffix(image[0].rpartition('/')[2])}{MASK_SUFFIX}"

    def read(image: tuple[str, str, float | None]) -> Mask | str | None:
        """The mask, or why it cannot be used; None: there is none."""
        place = place_of.get(name_of(image))
        if place is None:
            return None
        encoded = _read(filesystem, place)
        if isinstance(encoded, str):
            return "unreadable"
        try:
            pixels, width, height = decode_measured(encoded, _MASK_PIXELS, max_pixels=MAX_PIXELS)
        except ImageRejected:
            return "unreadable"
        share = float((pixels[..., 0] > 127).mean())
        if abs(width / height / (image[2] or width / height) - 1) > 0.02:
            return f"of another shape than its {what}"
        if not share or share > largest:
            return f"over {largest:.0%} lesion" if share else "without a lesion"
        path = inside(folder, place[len(root) + 1 :]) if "://" in folder else place
        return Mask(path=path, sha256=hashlib.sha256(encoded).hexdigest(), share=share)

    masks: dict[str, Mask] = {}
    names = set(map(name_of, images))
    left_out = {name: f"of no {what}" for name in place_of if _is_image(name) and name not in names}
    with ThreadPoolExecutor(_THREADS) as pool, progress("masks", len(images)) as shown:
        for image, mask in zip(images, pool.map(read, images), strict=True):
            shown.advance(1)
            if isinstance(mask, Mask):
                masks[image[1]] = mask
            elif mask is not None:
                left_out[name_of(image)] = mask
    example = {reason: name for name, reason in left_out.items()}
    reasons = (f"{n:,} {reason}, such as {example[reason]}" for reason, n in Counter(left_out.values()).items())
    told = f"; left out: {'; '.join(reasons)}" if left_out else ""
    if images and not masks:
        raise DataError(
            f"masks: no {what} has a usable NAME{MASK_SUFFIX} in {folder}{told or ', which holds no image'}; "
            "it must be white on the lesion of NAME.jpg, in its shape"
        )
    say(f"masks: {len(masks):,} of {len(images):,} {what}s have a usable one in {folder}{told}")
    return masks


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


def _read(filesystem: fs.FileSystem, path: str) -> bytes | str:
    return read_file((filesystem, ""), path)


def _probe(filesystem: fs.FileSystem, path: str, max_pixels: int = MAX_PIXELS) -> tuple[str, str]:
    """The file's sha256, and why it cannot be used: empty where it can."""
    encoded = _read(filesystem, path)
    if isinstance(encoded, str):
        return "", encoded
    try:
        probe_image(encoded, max_pixels=max_pixels)
    except ImageRejected as rejection:
        return "", rejection.reason
    return hashlib.sha256(encoded).hexdigest(), ""


def _listed(
    filesystem: fs.FileSystem,
    root: str,
    classes: Sequence[str] | None,
    class_set: ClassSet,
    class_map: Mapping[str, str] | None,
    where: str,
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(path within root, class) of every file that may be an image, in order; (path, reason) of the others."""
    kind = filesystem.get_file_info(root).type
    if kind != fs.FileType.Directory:
        what = "does not exist" if kind == fs.FileType.NotFound else "is a file"
        raise DataError(f"{where} {what}; give a folder of images, or of class folders")
    find = partial(class_set.find, own=class_map)
    entries = [info for info in filesystem.get_file_info(fs.FileSelector(root)) if not is_debris(info.base_name)]
    inner = [info for info in entries if info.type == fs.FileType.Directory]
    reports = filesystem.get_file_info([f"{info.path}/{REPORT}" for info in inner])
    folders = sorted(one.base_name for one, report in zip(inner, reports) if report.type == fs.FileType.NotFound)
    files = sorted(info.base_name for info in entries if info.type == fs.FileType.File)
    unknown, known = [name for name in folders if find(name) is None], " ".join(class_set.codes)
    if not set(folders) - set(unknown):  # one flat folder
        if not any(map(_is_image, files)):
            found = f"found: {', '.join([*folders, *files][:8])}" if folders or files else "it is empty"
            raise DataError(f"{where} holds no image and no class folder ({known}); {found}")
        if classes is None or len(classes) != 1:
            raise DataError(
                f"{where} has no class folder, so its images' class must be said: name exactly one with --classes, or "
                f"sort them into folders called {known}"
            )
        paths = [(name, classes[0]) for name in files]
        rejected = [(name, "is a folder that is no class") for name in folders]
    elif unknown:
        raise DataError(f"{where} has a folder that is no class: {unknown[0]}; expected some of {known}. Move it out")
    else:
        below = [
            info.path[len(root) + 1 :]
            for name in folders
            for info in filesystem.get_file_info(fs.FileSelector(f"{root}/{name}", recursive=True))
            if info.type == fs.FileType.File
        ]
        paths = [
            (path, str(find(path.partition("/")[0]))) for path in below if not any(map(is_debris, path.split("/")))
        ]
        rejected = [(name, "lies beside the class folders") for name in files if _is_image(name)]
    wanted = sorted(pair for pair in paths if classes is None or pair[1] in classes)
    suffixes = " ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
    rejected += [(path, f"its suffix is not one of {suffixes}") for path, _ in wanted if not _is_image(path)]
    return [pair for pair in wanted if _is_image(pair[0])], rejected


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def load_reference_extractor(checkpoint: Checkpoint, weights: str | None = None) -> FeatureExtractor:
    """The extractor that guided the checkpoint's training, as that run had it set, on the CPU.

    weights: its file here; None takes the place that the run had, or the extractor's own. Raises CheckpointError or
    ConfigError where it cannot be had, or gives features of another length than the checkpoint's.
    """
    from m2d.models.extractors import load_feature_extractor

    extractor = load_feature_extractor(*extractor_settings(checkpoint.info, checkpoint.path, weights))
    require_dim(extractor, checkpoint)
    return extractor


def extractor_settings(
    info: CheckpointInfo, path: str, weights: str | None = None
) -> tuple[str, str | None, int | None, Crop]:
    """Name, file of the weights, input size and crop of the extractor that guided the training of the checkpoint.

    weights: as of load_reference_extractor. Raises CheckpointError or ConfigError where it cannot be had, as far as
    that is known without loading it.
    """
    recorded: Any = info.config.get("feature_extractor")
    if not isinstance(recorded, dict) or "name" not in recorded:
        raise CheckpointError(
            f"checkpoint: {path} does not say which feature extractor guided it; guide by --feature prior "
            "or none, or take a checkpoint that was trained with this M2D"
        )
    name, place = str(recorded["name"]), weights or recorded.get("weights")
    if place is not None and not Path(place).is_file():
        raise ConfigError(f"extractor_weights: {place} is not a file; give the weights of {name}, which guided {path}")
    return name, place, recorded.get("input_size"), recorded.get("crop", "whole")


def require_dim(extractor: FeatureExtractor, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the extractor's features are not of the length that the checkpoint was trained with."""
    if extractor.dim != checkpoint.info.feature_dim:
        raise ConfigError(
            f"the features of {extractor.name} have {extractor.dim} dimensions, those that guided {checkpoint.path} "
            f"have {checkpoint.info.feature_dim}; give the extractor of its run ({checkpoint.info.feature_extractor})"
        )
