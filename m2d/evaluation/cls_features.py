"""`cls` features of image files, extracted once and kept on disk by extractor and image.

The official view of an image alone, for judging weights; the features that training is guided by, in every view and
with their patches, are m2d.data's. Knows nothing of labels, splits or scores.
"""

import hashlib
import logging
import math
import os
import posixpath
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from m2d.data.decode import ImageRejected, decode_image
from m2d.data.shards import cache_file
from m2d.errors import CheckpointError, ConfigError
from m2d.files.progress import progress
from m2d.files.storage import one_line, open_storage
from m2d.models.extractors import load_feature_extractor

if TYPE_CHECKING:
    from m2d.models.extractors import FeatureExtractor
    from m2d.models.settings import FeatureExtractorConfig

logger = logging.getLogger(__name__)

FOLDER = "probe_v1"  # the number goes up when the way from a file to the extractor's input changes
CHUNK_IMAGES = 256  # a file of the cache holds so many,
CHUNK_SECONDS = 30.0  # or what was done in this time: a kill loses no more
DECODE_THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageFile:
    """One image: where it lies, and what it held when it was catalogued."""

    data_root: str
    path: str  # relative to data_root
    sha256: str


@dataclass(frozen=True)
class ClsFeatures:
    """What could be had of the images asked for."""

    of_image: dict[str, np.ndarray]  # sha256 -> float32 [D]
    unreadable: dict[str, str]  # sha256 -> `path: reason`
    extracted: int  # images that were not in the cache


def cls_features(
    images: Iterable[ImageFile],
    config: "FeatureExtractorConfig",
    *,
    key: str,
    cache_dir: str,
    device: torch.device,
    batch_size: int,
    max_pixels: int,
) -> ClsFeatures:
    """Features of every readable image, from the cache where they are there; the rest is extracted and added to it.

    key: m2d.models.extractors.extractor_key(config), which names the cache's folder. A file that is gone, broken
    or no longer what it was when it was catalogued is reported with its reason. Killed and run again, it goes on with
    the images that are missing.
    Raises DataError where the cache cannot be written, CheckpointError for features that are not finite, ConfigError
    for a batch that does not fit the device.
    """
    folder = Path(cache_dir).expanduser() / FOLDER / key
    wanted = {image.sha256: image for image in images}
    found = _read_cache(folder, wanted.keys())
    missing = [image for sha256, image in wanted.items() if sha256 not in found]
    unreadable: dict[str, str] = {}
    if missing:
        extractor = load_feature_extractor(
            config.name, weights=config.weights, input_size=config.input_size, crop=config.crop
        )
        # On a CPU convolutions take half the time so.
        extractor = extractor.to(device).to(memory_format=torch.channels_last)
        with _CacheWriter(folder) as writer, progress("extracting features", len(missing)) as shown:
            for batch in _decoded_batches(missing, extractor, batch_size, max_pixels):
                good = [(image.sha256, pixels) for image, pixels in batch if isinstance(pixels, np.ndarray)]
                for image, pixels in batch:
                    if isinstance(pixels, str):
                        unreadable[image.sha256] = f"{image.path}: {pixels}"
                if good:
                    cls = _extract(extractor, np.stack([pixels for _, pixels in good]), device)
                    for (sha256, _), vector in zip(good, cls, strict=True):
                        found[sha256] = vector
                        writer.add(sha256, vector)
                shown.advance(len(batch))
    return ClsFeatures(found, unreadable, extracted=len(missing) - len(unreadable))


def official_square(image: np.ndarray, extractor: "FeatureExtractor") -> np.ndarray:
    """The centre square of an image at the scale of the extractor's official transform: uint8 [side, side, 3].

    image: uint8 [H, W, 3]. The shorter side becomes S / crop_pct (256 for 224) as PIL, and so the authors, resize
    (antialiased bilinear). Images of all shapes then fit one batch, and the transform has only its crop left to do:
    what the square lacks of the longer side is cropped away anyway. With crop "whole" the shorter side becomes S.
    """
    side = math.floor(extractor.input_size / (extractor.crop_pct if extractor.crop == "official" else 1))
    height, width = image.shape[:2]
    shorter = min(height, width)
    # As torchvision's Resize rounds. Some timm models squash: both sides to the same length.
    size = (side, side) if extractor.squash else (int(side * width / shorter), int(side * height / shorter))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    left, top = (round((length - side) / 2) for length in resized.size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def _extract(extractor: "FeatureExtractor", images: np.ndarray, device: torch.device) -> np.ndarray:
    """images: uint8 [B, side, side, 3]. Returns float32 [B, D]."""
    try:
        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
            inputs = extractor.preprocess(pixels).contiguous(memory_format=torch.channels_last)
            cls: np.ndarray = extractor(inputs).cls.float().cpu().numpy()
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"batch_size {len(images)} does not fit the memory of {device}; try --batch_size {max(1, len(images) // 2)}"
            " (the result stays the same)"
        ) from None
    if not np.isfinite(cls).all():
        raise CheckpointError(
            f"feature extractor {extractor.name} gives features that are not finite; its weights are broken, get the "
            "file again"
        )
    return cls


_Decoded = tuple[ImageFile, np.ndarray | str]  # uint8 [side, side, 3], or why there is none


def _decoded_batches(
    images: list[ImageFile], extractor: "FeatureExtractor", batch_size: int, max_pixels: int
) -> Iterator[list[_Decoded]]:
    """The images in order, decoded by threads some batches ahead: memory holds those alone."""
    storages = {root: open_storage(root) for root in {image.data_root for image in images}}

    def decode(image: ImageFile) -> _Decoded:
        filesystem, root = storages[image.data_root]
        try:
            with filesystem.open_input_file(posixpath.join(root, image.path)) as file:
                encoded = bytes(file.read())
        except FileNotFoundError:
            return image, "is not there"
        except (pa.ArrowException, OSError) as error:
            return image, f"cannot be read ({one_line(error)})"
        if hashlib.sha256(encoded).hexdigest() != image.sha256:
            return image, "is another file than when it was catalogued"
        try:
            return image, official_square(decode_image(encoded, max_pixels=max_pixels), extractor)
        except ImageRejected as rejection:
            return image, rejection.reason

    waiting: deque[Future[_Decoded]] = deque()
    batch: list[_Decoded] = []
    pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="m2d-probe")
    try:
        for image in images:
            waiting.append(pool.submit(decode, image))
            if len(waiting) > 3 * batch_size:
                batch.append(waiting.popleft().result())
            if len(batch) == batch_size:
                yield batch
                batch = []
        batch += [future.result() for future in waiting]
        for first in range(0, len(batch), batch_size):
            yield batch[first : first + batch_size]
    finally:
        pool.shutdown(cancel_futures=True)


class _CacheWriter:
    """Adds vectors to a folder of the cache, some hundred a file; each file appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, np.ndarray] = {}
        self.since = time.monotonic()

    def __enter__(self) -> "_CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # also after Ctrl-C: what is done is kept

    def add(self, sha256: str, cls: np.ndarray) -> None:
        self.pending[sha256] = cls
        if len(self.pending) >= CHUNK_IMAGES or time.monotonic() - self.since > CHUNK_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            ids = np.stack([np.frombuffer(bytes.fromhex(sha256), dtype=np.uint8) for sha256 in self.pending])
            # Named by content, so that two probes at once never write different things to one name.
            name = f"cls_{hashlib.sha256(ids.tobytes()).hexdigest()[:16]}.safetensors"
            with cache_file(self.folder / name) as partial:
                partial.write_bytes(save({"sha256": ids, "cls": np.stack(list(self.pending.values()))}))
        self.pending = {}
        self.since = time.monotonic()


def _read_cache(folder: Path, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """sha256 -> float32 [D] of the wanted images that the folder holds."""
    wanted = set(wanted)
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("cls_*.safetensors")):
        try:
            tensors = load_file(path)
            ids, cls = tensors["sha256"], tensors["cls"]
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s cannot be read (%s); its images are extracted again", path, one_line(error))
            continue
        for row, sha256 in enumerate(bytes(digest).hex() for digest in ids):
            if sha256 in wanted:
                found[sha256] = cls[row]
    return found
