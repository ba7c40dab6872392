"""Vectors of images, extracted once for all parts of an evaluation, on Ray Data where that pays, and kept.

A vector is kept by extractor, image size, view and image, so that an interrupted extraction resumes. How it is made and
kept: m2d.data.features. Knows nothing of labels or scores.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from m2d.cluster.fan_out import JobResult, run_jobs
from m2d.cluster.nodes import cluster_total, node_resources
from m2d.cluster.start import ray_cluster
from m2d.data.decode import decode_image
from m2d.data.features import ExtractionJobs, read_cls, write_cls
from m2d.data.reader import decode_unchanged
from m2d.data.store import pieces
from m2d.errors import DataError
from m2d.evaluation.images import FeatureSet, ImageSet, Listed
from m2d.files.progress import progress
from m2d.files.storage import open_storage
from m2d.models.extractors import FeatureExtractor, Features, extractor_identity
from m2d.models.settings import FeatureExtractorConfig

# In the cache folder; the number goes up when the way from pixels, or from a file, to a vector changes.
FOLDER, PROBE_FOLDER = "evaluation_v1/features", "probe_v1"
SHARD_IMAGES = 256
RAY_PAYS_FROM = 2048  # images on a CPU; starting Ray and its actors costs about 15 s
DECODE_THREADS = min(16, cpu_count())


def ray_pays(num_actors: int | None, device: str, images: int) -> bool:
    """Whether to work on Ray. num_actors: as the settings have it."""
    if num_actors is not None:
        return num_actors > 0
    if os.environ.get("RAY_ADDRESS"):
        return True
    return images >= RAY_PAYS_FROM if device == "cpu" else torch.cuda.device_count() > 1


@dataclass(frozen=True)
class Extraction:
    """How features are made, the same for all sets."""

    cache_dir: str
    device: str
    batch_size: int | None = None  # None: as the device likes it
    num_actors: int | None = None  # 0: in this process; None: as many as pay
    verbose: bool = False
    _known: dict[tuple[int, FeatureExtractorConfig], FeatureSet] = field(default_factory=dict)  # by id() of the images

    def of(self, images: ImageSet, config: FeatureExtractorConfig) -> FeatureSet:
        """Their features as they are, see `features`. Held on to, for several parts ask for the same."""
        name = (id(images), config)
        if name not in self._known:
            key, _ = extractor_identity(config)
            self._known[name] = FeatureSet(**vars(images), extractor=key, cls=self.features(images, config)[0])
        return self._known[name]

    def features(
        self, images: ImageSet, config: FeatureExtractorConfig, views: Sequence[int] = (0,)
    ) -> list[np.ndarray]:
        """`cls` of every image in each view (m2d.data.views): float32 [N, D] a view.

        images: mapped from a file, for actors read them there. Raises CheckpointError for weights that cannot be loaded
        or features that are not finite, ConfigError for a batch that does not fit the device, DataError where the cache
        cannot be written.
        """
        key, _ = extractor_identity(config)
        cache = Path(self.cache_dir).expanduser().absolute() / FOLDER
        folders = {view: cache / f"{key}-{images.image_size}px-view{view}" for view in views}
        jobs = _missing(
            folders,
            images.sha256,
            SHARD_IMAGES,
            config=config,
            key=key,
            read=partial(_read_pixels, str(cast(np.memmap, images.pixels).filename)),
            batch_size=self.batch_size,
        )
        total = sum(len(rows) for _, rows in jobs.jobs)
        if total:
            on_ray = ray_pays(self.num_actors, self.device, total)
            with progress(f"features of {images.name}, {config.name}", total) as shown:
                for result in self._on_ray(jobs) if on_ray else jobs.here(self.device):
                    shown.advance(result.images)
        found = {view: read_cls(folder, images.sha256) for view, folder in folders.items()}
        return [np.stack([found[view][digest] for digest in images.sha256]) for view in views]

    def _on_ray(self, jobs: ExtractionJobs) -> Iterator[JobResult]:
        with ray_cluster(verbose=self.verbose):
            # Of a machine started here its cores, however many logical CPUs it was given.
            cores = min(int(cluster_total("CPU")), len(node_resources()) * cpu_count())
            gpus = 0 if self.device == "cpu" else int(cluster_total("GPU"))
            limit = gpus or max(1, cores)
            actors = min(self.num_actors or limit, limit, len(jobs.jobs))
            device, threads = "cuda" if gpus else "cpu", max(1, limit // actors)
            yield from run_jobs(jobs, actors=actors, device=device, threads=threads, bars=self.verbose)


class ClsFeatures(NamedTuple):
    """The vectors of the images asked for, as far as they can be read."""

    of_image: dict[str, np.ndarray]  # sha256 -> float32 [D]
    unreadable: list[str]  # `path: reason`
    extracted: int  # images that were not in the cache


def cls_features(
    sides: Sequence[Listed],
    config: FeatureExtractorConfig,
    *,
    key: str,
    cache_dir: str,
    device: str,
    batch_size: int,
    max_pixels: int,
) -> ClsFeatures:
    """`cls` of every readable image file at full size, by the extractor's official transform, for judging weights.

    key: of the extractor. Each batch is kept as it is done. A file that is gone, broken or changed is reported with its
    reason. Raises as Extraction.features does.
    """
    folder = Path(cache_dir).expanduser() / PROBE_FOLDER / key
    files = [(side.root, path, sha256) for side in sides for path, sha256 in zip(side["path"], side["sha256"])]
    sha256 = [digest for *_, digest in files]
    jobs = _missing(
        {0: folder},
        sha256,
        batch_size * max(1, (32 if device == "cpu" else SHARD_IMAGES) // batch_size),
        config=config,
        key=key,
        read=partial(_read_squares, files, max_pixels),
        batch_size=batch_size,
        keep_batches=True,
    )
    failures: list[str] = []
    extracted = 0
    with progress("extracting features", sum(len(rows) for _, rows in jobs.jobs)) as shown:
        for result in jobs.here(device) if jobs.jobs else ():
            failures += result.failures
            extracted += result.images
            shown.advance(result.images + len(result.failures))
    return ClsFeatures(read_cls(folder, sha256), sorted(failures), extracted)


def _missing(folders: dict[int, Path], sha256: Sequence[str], job_images: int, **how: Any) -> ExtractionJobs:
    """Jobs of the images whose vectors are not in the folder of their view; of repeated ones the first."""
    _, firsts = np.unique(sha256, return_index=True)
    jobs = []
    for view, folder in folders.items():
        there = read_cls(folder, sha256)
        rows = np.array(sorted(row for row in firsts if sha256[row] not in there), dtype=np.int64)
        jobs += [(view, some) for some in pieces(rows, job_images)]
    return ExtractionJobs(keep=partial(_keep, folders, sha256), jobs=jobs, patches=False, **how)


def official_square(image: np.ndarray, extractor: FeatureExtractor) -> np.ndarray:
    """The centre square of an image at the scale of the extractor's official transform: uint8 [side, side, 3].

    image: uint8 [H, W, 3]. The shorter side becomes S / crop_pct (256 for 224) as PIL, and so the authors, resize
    (antialiased bilinear); with crop "whole" it becomes S. Images of all shapes then fit one batch, and the transform
    has only its crop left to do.
    """
    side = math.floor(extractor.input_size / (extractor.crop_pct if extractor.crop == "official" else 1))
    size = [side, side] if extractor.squash else [side]  # some timm models squash: both sides to the same length
    return np.asarray(center_crop(resize(Image.fromarray(image), size), [side]))


def _read_squares(
    images: Sequence[tuple[str, str, str]], max_pixels: int, rows: np.ndarray, extractor: FeatureExtractor
) -> Iterator[np.ndarray | str]:
    """Decoded by threads ahead of the extractor. images: root, path in it and sha256 of each."""
    chosen = [images[row] for row in rows]
    storages = {root: open_storage(root) for root in {root for root, *_ in chosen}}

    def read(image: tuple[str, str, str]) -> np.ndarray | str:
        root, path, sha256 = image
        decode = lambda encoded: official_square(decode_image(encoded, max_pixels=max_pixels), extractor)  # noqa: E731
        found = decode_unchanged(storages[root], path, sha256, decode)
        return f"{path}: {found}" if isinstance(found, str) else found

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        yield from pool.map(read, chosen)


def _read_pixels(file: str, rows: np.ndarray, _: FeatureExtractor) -> Iterator[np.ndarray]:
    try:
        pixels = np.load(file, mmap_mode="r")
    except OSError as error:
        raise DataError(f"cache: {file} cannot be read ({error.strerror}); every node must see --cache_dir") from None
    return (np.array(pixels[row]) for row in rows)


def _keep(folders: dict[int, Path], sha256: Sequence[str], view: int, rows: np.ndarray, features: Features) -> None:
    write_cls(folders[view], folders[view].name, [sha256[row] for row in rows], features.cls.numpy())
