"""The gates: what refuses a new image before it is kept. Runs without Ray; docs/results/gates.md has the measurements.

blank               too little contrast, mostly black or white, or noise
near_copy           nearer to a training image than images of different lesions are to each other: by the extractor's
                    features, or by an 8 x 8 thumbnail in any flip or turn (the VAE moves a copy's features further than
                    the step to many a neighbour is)
class_consistency   further from the training images of its class than those are from one another

New images are held against a GateReference: features, thumbnails and thresholds of the training images. The driver
builds it once, as <experiment>/gate_reference/<key>.safetensors; whoever checks images loads that file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from m2d.classes import ISIC7
from m2d.data.catalog import catalog_hash, classes_of, read_catalog
from m2d.data.features import FeatureStore, FeatureTable, extract_view
from m2d.data.reader import ImageReader
from m2d.data.store import prepared_folder
from m2d.data.views import apply_view
from m2d.errors import DataError, M2DError
from m2d.files.progress import progress, say
from m2d.files.storage import one_line
from m2d.generation.output import experiment_of, results_of, whole_output
from m2d.generation.plan import data_config_of, dataset_catalog
from m2d.generation.references import load_reference_extractor
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.metrics import neighbours
from m2d.metrics.neighbours import nearest, unit_thumbnails
from m2d.models.checkpoint import Checkpoint
from m2d.models.extractors import FeatureExtractor

FORMAT = 1
WEAK_BELOW = 30  # images of a class whose distances are known; a 99 % quantile of fewer is their largest, or chance
DARK, BRIGHT = 5, 250  # grey levels; a pixel with all three channels beyond is saturated
# Where nothing is known of the training images.
FIXED_LIMITS = {"min_contrast": 3.0, "max_saturated_share": 0.5, "max_roughness": 36.0}
_CALIBRATION_IMAGES = 2048  # drawn for each threshold where there are more
_METADATA_KEY = "m2d_gate_reference"
_TENSORS = ("features", "thumbnails", "labels", "mean", "scale")


# --- what runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatesAtWork:
    """The gates of a run: those asked for, less those that lack what they need."""

    config: GateConfig
    names: tuple[str, ...]  # see active_gates
    reference: Path | None = None  # its name's stem is a hash of all that the reference is made from
    extractor: FeatureExtractor | None = None  # loaded already; None: not needed so far
    build: Callable[[], None] | None = None  # makes the reference where it is missing; minutes on a CPU
    training: pa.Table | None = None  # catalog rows of the training images that the reference holds

    @property
    def need_features(self) -> bool:
        """Of the new images."""
        return bool({"near_copy:features", "class_consistency"} & set(self.names))

    @property
    def record(self) -> dict[str, Any] | None:
        """For the recipe: what decides which attempt is kept."""
        key = None if self.reference is None else self.reference.stem
        return {**_lasting(self.config), "at_work": list(self.names), "reference": key} if self.names else None

    def of_lesions(self, lesions: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The ids of the training images of each of these lesions that has some."""
        if self.training is None or not lesions:
            return {}
        found: dict[str, list[str]] = {}
        for lesion, image_id in zip(*(self.training[name].to_pylist() for name in ("lesion_id", "image_id"))):
            found.setdefault(lesion, []).append(image_id)
        return {lesion: tuple(found[lesion]) for lesion in lesions if lesion in found}


def prepare_gates(config: GenerateConfig, checkpoint: Checkpoint, catalog: pa.Table | None, device: str) -> GatesAtWork:
    """Which gates run. Where something is missing, the gates that need it are off, which is said once.

    The reference is not made here but by `build`, when there are images to hold against it. catalog: of
    config.data_root, where it has been read already.
    """
    gates = config.gates
    alone = GatesAtWork(gates, active_gates(gates, features=False, pixels=False))
    if not gates.enabled or not (gates.near_copy or gates.class_consistency):
        return alone
    try:
        images, data_root = training_images(config, checkpoint, catalog)
    except M2DError as error:
        off = "the gates near_copy and class_consistency are off, for they need the training images"
        say(f"warning: {off} ({error}); new images may repeat old ones")
        return alone
    extractor: FeatureExtractor | None = None
    try:
        extractor = load_reference_extractor(checkpoint, config.extractor_weights)
    except M2DError as error:
        off = "the gate class_consistency is off and near_copy compares pixels alone"
        say(f"warning: {off}, for the feature extractor is not here ({error})")
    lines = sorted(zip(*(images[name].to_pylist() for name in ("sha256", "label", "lesion_id")), strict=True))
    made_from = [lines, None if extractor is None else extractor.key, checkpoint.image_size, _lasting(gates)]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    path = results_of(str(checkpoint.path)) / "gate_reference" / f"{key}.safetensors"
    build = partial(_build, path, images, data_root, checkpoint, extractor, gates, device)
    names = active_gates(gates, features=extractor is not None, pixels=True)
    return GatesAtWork(gates, names, path, extractor, build, images)


def active_gates(config: GateConfig, *, features: bool, pixels: bool) -> tuple[str, ...]:
    """The gates that really run, for the console and the manifest; empty: none.

    features: those of the new images and of the training images are known. pixels: the training images' thumbnails are.
    """
    wanted = {
        "blank": config.blank,
        "near_copy:features": config.near_copy and features,
        "near_copy:pixels": config.near_copy and pixels,
        "class_consistency": config.class_consistency and features,
    }
    return tuple(name for name, active in wanted.items() if active and config.enabled)


def _lasting(gates: GateConfig) -> dict[str, Any]:
    """The settings that shape the images that are kept: how long to try is none of them."""
    return {name: value for name, value in asdict(gates).items() if name != "max_attempts"}


def training_images(config: GenerateConfig, checkpoint: Checkpoint, catalog: pa.Table | None) -> tuple[pa.Table, str]:
    """Catalog rows and root of what the checkpoint was trained on: its experiment's catalog, or data_root's split.

    catalog: of config.data_root, where it has been read already. Raises DataError where they are not to be found.
    """
    own = experiment_of(str(checkpoint.path)) / "cache/catalog.parquet"
    places: list[Any] = [config.data_root]
    if own.is_file():
        rows = read_catalog(str(own))
        places.append(checkpoint.info.config.get("data_root"))
    else:
        rows = catalog if catalog is not None else dataset_catalog(config, checkpoint.info)
        if rows is None:
            raise DataError(f"no catalog is at {own}; name the training images by --data_root")
    rows = rows.filter(pc.equal(rows["split"], "train"))
    if not len(rows):
        raise DataError("the catalog has no training image")
    places = [place for place in places if place and "***" not in place]  # a recorded URI lacks the key that it had
    for place in places:
        if "://" in place or (Path(place) / rows["path"][0].as_py()).is_file():
            return rows, str(place)
    known = " or ".join(map(str, places)) or "any known place"
    raise DataError(f"the training images are not in {known}; name their folder by --data_root")


# --- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gates found on one image. An unknown number is NaN."""

    reason: str | None  # blank, saturated, noise, near_copy, outside_class: the first, in this order; None: accepted
    nearest_id: str | None = None  # the training image nearest by features, or the one that it copies by pixels
    nearest_distance: float = math.nan  # to the nearest training image of any class, by features
    class_distance: float = math.nan  # mean of the same to the nearest training images of its class
    pixel_distance: float = math.nan  # to the nearest training image by thumbnails, any flip or turn
    saturated_share: float = math.nan  # of its pixels, black or white
    contrast: float = math.nan  # deviation of luma, grey levels
    roughness: float = math.nan  # mean difference of luma between neighbouring pixels, grey levels

    @property
    def accepted(self) -> bool:
        """No gate refuses it."""
        return self.reason is None


def check(
    images: np.ndarray,
    features: np.ndarray | None,
    labels: Sequence[str],
    reference: GateReference | None,
    config: GateConfig,
    own: Sequence[Collection[str]] = (),
) -> list[Verdict]:
    """One verdict per image, in order, each independent of the others; measurements also for disabled gates.

    images: uint8 [N, H, W, 3]. features: their cls float32 [N, D], of the reference's extractor at its image size, or
    None. labels: class codes. own: ids of the training images of the lesions that each is made from, to which it may be
    as near as it is: distances to the nearest image leave them out. An image with features that are not finite is
    outside its class.
    """
    facts = ImageFacts.of(images)
    near, in_class, class_limits, pixel = (np.full(len(images), np.nan) for _ in range(4))
    near_rows, pixel_rows = (np.full(len(images), -1) for _ in range(2))
    copy_threshold = pixel_threshold = -math.inf
    limits, by_features, by_pixels = FIXED_LIMITS, False, False
    if reference is not None:
        copy_threshold, pixel_threshold = reference.copy_threshold, reference.pixel_threshold
        limits = {name: getattr(reference, name) for name in FIXED_LIMITS}
        by_features, by_pixels = reference.features.shape[1] > 0, reference.thumbnails.shape[1] > 0
        groups = _groups(own, reference.ids)
        if by_features and features is not None:
            near, near_rows, in_class, class_limits = _feature_distances(features, labels, reference, groups)
        if by_pixels:
            by_view, rows = neighbours.nearest_in_views(
                _turned(facts.thumbnails), reference.thumbnails, query_groups=groups[0], bank_groups=groups[1]
            )
            best = by_view.argmin(dim=1, keepdim=True)
            pixel, pixel_rows = (part.gather(1, best)[:, 0].numpy() for part in (by_view, rows))
    limits = _set_or(config, limits)
    active = active_gates(config, features=by_features and features is not None, pixels=by_pixels)
    reasons: list[str | None] = [None] * len(images)
    for gate, reason, refused in (  # of the numbers that are unknown only that of the class refuses
        ("blank", "blank", facts.contrast < limits["min_contrast"]),
        ("blank", "saturated", facts.saturated_share > limits["max_saturated_share"]),
        ("blank", "noise", facts.roughness > limits["max_roughness"]),
        ("near_copy:pixels", "near_copy", pixel <= pixel_threshold),
        ("near_copy:features", "near_copy", near <= copy_threshold),
        ("class_consistency", "outside_class", ~np.isnan(class_limits) & ~(in_class <= class_limits)),
    ):
        for row in np.flatnonzero(refused) if gate in active else ():
            if reasons[row] is None:
                reasons[row] = reason
                near_rows[row] = pixel_rows[row] if gate == "near_copy:pixels" else near_rows[row]
    measured = {"nearest_distance": near, "class_distance": in_class, "pixel_distance": pixel, **vars(facts)}
    del measured["thumbnails"]
    ids = [None if reference is None or row < 0 else reference.ids[row] for row in near_rows]
    numbers = ({name: float(values[row]) for name, values in measured.items()} for row in range(len(images)))
    return [Verdict(reason=reason, nearest_id=one, **of) for reason, one, of in zip(reasons, ids, numbers, strict=True)]


def _groups(own: Sequence[Collection[str]], ids: Sequence[str]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """For `nearest`: of each new image the rows of the images that it was made from, and of the reference's its row.

    None where there is no variation.
    """
    if not any(own):
        return None, None
    place = {image_id: row for row, image_id in enumerate(ids)}
    rows = [[place[image_id] for image_id in images if image_id in place] for images in own]
    of_new = torch.full((len(own), max(1, *map(len, rows))), -1)
    for number, found in enumerate(rows):
        of_new[number, : len(found)] = torch.tensor(found)
    return of_new, torch.arange(len(ids))


def _feature_distances(
    features: np.ndarray,
    labels: Sequence[str],
    reference: GateReference,
    groups: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the nearest training image, its row, mean distance in the class, and what that may be; [N] each.

    NaN, -1, NaN where features are not finite; the last two are NaN where the reference has no image of the class.
    groups: see `_groups`.
    """
    near, in_class, limits = (np.full(len(labels), np.nan) for _ in range(3))
    rows = np.full(len(labels), -1)
    usable = np.flatnonzero(np.isfinite(features).all(axis=1))
    queries = _unit_features(features[usable], reference.mean, reference.scale)
    own = None if groups[0] is None else groups[0][torch.from_numpy(usable)]
    distances, found = nearest(queries, reference.features, query_groups=own, bank_groups=groups[1])
    near[usable], rows[usable] = distances[:, 0].numpy(), found[:, 0].numpy()
    classes = np.array([reference.classes.index(label) for label in labels], dtype=np.int64)
    for index, threshold in enumerate(reference.class_thresholds):
        if threshold is not None:
            limits[classes == index] = threshold
            mine = np.flatnonzero(classes[usable] == index)
            first, last = torch.searchsorted(reference.labels, torch.tensor([index, index + 1])).tolist()
            bank = reference.features[first:last]  # a slice, not a copy
            in_class[usable[mine]] = _mean_distance(nearest(queries[mine], bank, reference.neighbours)[0]).numpy()
    return near, rows, in_class, limits


@dataclass(frozen=True)
class ImageFacts:
    """What the gates read off pixels, see Verdict. thumbnails float32 [n, 8, 8, 3]; the others float32 [n]."""

    thumbnails: np.ndarray
    contrast: np.ndarray
    saturated_share: np.ndarray
    roughness: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> Self:
        """images: uint8 [n, H, W, 3]."""
        luma = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        extreme = (images <= DARK).all(axis=-1) | (images >= BRIGHT).all(axis=-1)
        down, right = (np.abs(np.diff(luma, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2))
        saturated_share = extreme.mean(axis=(1, 2), dtype=np.float32)
        return cls(neighbours.thumbnails(images), luma.std(axis=(1, 2)), saturated_share, (down + right) / 2)


def unit_view(cells: np.ndarray, view: int) -> Tensor:
    """Unit vectors of thumbnails [n, 8, 8, 3] in one of the eight views (m2d.data.views)."""
    return unit_thumbnails(np.moveaxis(apply_view(np.moveaxis(cells, 0, -1), view), -1, 0))


def _turned(cells: np.ndarray) -> Iterator[Tensor]:
    return (unit_view(cells, view) for view in range(8))


def _unit_features(features: np.ndarray, mean: Tensor, scale: Tensor) -> Tensor:
    return neighbours.unit_rows((torch.from_numpy(features.astype(np.float32)) - mean) / scale)


def _set_or(config: GateConfig, limits: dict[str, float]) -> dict[str, float]:
    return {name: limit if getattr(config, name) is None else getattr(config, name) for name, limit in limits.items()}


def _mean_distance(distances: Tensor) -> Tensor:
    """Mean of the finite ones of each row, [B, k] to [B]; inf where there is none."""
    finite = distances.isfinite()
    mean = distances.masked_fill(~finite, 0).sum(dim=1) / finite.sum(dim=1)
    return mean.nan_to_num(nan=torch.inf)


# --- the reference --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateReference:
    """Training images as unit vectors, and the distances at which a new image counts as a copy or as a stranger.

    A distance is 1 - cosine: of features standardised by the training images' mean and deviation (at least the median
    one of all features), or of thumbnails less their mean. features [n, D] (D = 0: unknown) and thumbnails [n, 192] (or
    0), float32; labels int64 [n], ascending.
    """

    features: Tensor
    thumbnails: Tensor
    labels: Tensor
    mean: Tensor  # [D]
    scale: Tensor  # [D]
    ids: list[str]  # of the images
    copy_threshold: float  # a feature distance up to this is a near-copy
    pixel_threshold: float  # the same of thumbnails
    class_thresholds: list[float | None]  # a mean distance above is outside the class; None: no image of it
    weak: list[str]  # classes with too few images for a threshold of their own
    neighbours: int
    min_contrast: float
    max_saturated_share: float
    max_roughness: float
    extractor: str  # FeatureExtractor.key, empty: unknown
    catalog: str  # m2d.data.catalog.catalog_hash, empty: unknown
    settings: dict[str, Any]  # the GateConfig it was built by
    classes: tuple[str, ...] = ISIC7.codes  # whose places are the labels

    @classmethod
    def build(
        cls,
        features: np.ndarray | None,
        labels: np.ndarray,
        lesions: Sequence[str],
        config: GateConfig,
        *,
        ids: Sequence[str] | None = None,
        facts: ImageFacts | None = None,
        extractor: str = "",
        catalog: str = "",
        classes: Sequence[str] = ISIC7.codes,
        weak_below: int = WEAK_BELOW,
        calibration_images: int = _CALIBRATION_IMAGES,
    ) -> Self:
        """Calibrate on training images; distances between images of one lesion are left out everywhere.

        features: cls float32 [n, D], or None. labels: int64 [n]. lesions: [n]. facts: of the same images, or None.
        Near-copies: the quantile of each image's distance to the nearest image of another lesion. Class: the quantile,
        for each class, of the mean distance to the k nearest images of the class. A class of fewer than weak_below such
        distances is weak: it gets the widest threshold of all classes, or its own largest distance if that is wider.
        Raises DataError for features that are not finite.
        """
        count = len(labels)
        raw = np.zeros((count, 0), np.float32) if features is None else np.asarray(features, dtype=np.float32)
        ids = [str(row) for row in range(count)] if ids is None else ids
        if not np.isfinite(raw).all():
            raise DataError("gate reference: features of the training images are not finite; compute them again")
        order = np.argsort(labels, kind="stable")
        raw, label = raw[order], torch.from_numpy(labels[order].astype(np.int64))
        groups = torch.from_numpy(np.unique(np.asarray(lesions)[order], return_inverse=True)[1].astype(np.int64))
        standard = neighbours.Standardizer.of(raw, neighbours.at_least_median)
        mean, scale = (torch.from_numpy(part.astype(np.float32)) for part in (standard.mean, standard.scale))
        vectors = _unit_features(raw, mean, scale)
        cells, shown, limits = np.zeros((count, 0)), torch.zeros(count, 0), dict(FIXED_LIMITS)
        if facts is not None:
            cells, shown = facts.thumbnails[order], unit_thumbnails(facts.thumbnails[order])
            limits = {  # well beyond the training images' own
                "min_contrast": float(np.quantile(facts.contrast, 0.001)) / 2,
                # Halfway to all of the image; never below the fixed share, then.
                "max_saturated_share": (1 + float(np.quantile(facts.saturated_share, 0.999))) / 2,
                "max_roughness": 2 * float(np.quantile(facts.roughness, 0.999)),
            }

        def copies(bank: Tensor, views: Callable[[np.ndarray], Any]) -> float:
            if not bank.shape[1]:
                return 0.0
            distances = neighbours.calibration_distances(views, bank, groups, most=calibration_images)
            known = distances[np.isfinite(distances)]
            return (
                max(neighbours.COPY_FLOOR, float(np.quantile(known, config.near_copy_quantile)))
                if len(known)
                else neighbours.COPY_FLOOR
            )

        thresholds, weak = _class_thresholds(vectors, label, groups, config, weak_below, calibration_images, classes)
        return cls(
            features=vectors,
            thumbnails=shown,
            labels=label,
            mean=mean,
            scale=scale,
            ids=[str(ids[row]) for row in order],
            copy_threshold=copies(vectors, lambda rows: [vectors[rows]]),
            pixel_threshold=copies(shown, lambda rows: _turned(cells[rows])),
            class_thresholds=thresholds,
            weak=weak,
            neighbours=config.neighbours,
            **_set_or(config, limits),
            extractor=extractor,
            catalog=catalog,
            settings=asdict(config),
            classes=tuple(classes),
        )

    def save(self, path: Path) -> None:
        """One file, whole or not at all. Raises ConfigError where it cannot be written."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        notes = {"format": FORMAT, **{name: value for name, value in vars(self).items() if name not in _TENSORS}}
        if tuple(self.classes) == ISIC7.codes:  # as an earlier M2D wrote it
            del notes["classes"]
        with whole_output(path) as unfinished:
            unfinished.write_bytes(save(tensors, metadata={_METADATA_KEY: json.dumps(notes)}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """What save wrote. Raises DataError where it is missing or damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                notes = dict(json.loads((file.metadata() or {})[_METADATA_KEY]))
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            if notes.pop("format") != FORMAT:
                raise ValueError("made by another version of M2D")
            notes["classes"] = tuple(notes.get("classes", ISIC7.codes))
            reference = cls(**tensors, **notes)
            count, dim = len(reference.ids), len(reference.mean)
            shapes = [(count, dim), (count, reference.thumbnails.shape[-1]), (count,), (dim,), (dim,)]
            for (name, tensor), shape in zip(tensors.items(), shapes, strict=True):
                if tensor.shape != shape or not torch.isfinite(tensor).all():
                    raise ValueError(f"{name} is {list(tensor.shape)}, or not finite")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"gate reference: {path} cannot be used ({one_line(error)}); delete it and run again"
            ) from None
        return reference


load_once = lru_cache(maxsize=2)(GateReference.load)  # for writers, which ask for each group


def _class_thresholds(
    vectors: Tensor,
    labels: Tensor,
    groups: Tensor,
    config: GateConfig,
    weak_below: int,
    calibration_images: int,
    classes: Sequence[str],
) -> tuple[list[float | None], list[str]]:
    """One for each class, None where it has no image or features are unknown; and the weak classes."""
    known: dict[int, np.ndarray] = {}
    for label in labels.unique().tolist() if vectors.shape[1] else ():
        rows = (labels == label).nonzero()[:, 0]
        drawn = rows[neighbours.drawn_rows(len(rows), calibration_images)]
        distances, _ = nearest(
            vectors[drawn], vectors[rows], config.neighbours, query_groups=groups[drawn], bank_groups=groups[rows]
        )
        means = _mean_distance(distances)
        known[label] = means[means.isfinite()].numpy()
    strong = {label: float(np.quantile(d, config.class_quantile)) for label, d in known.items() if len(d) >= weak_below}
    everything = np.concatenate([*known.values(), np.zeros(0)])
    # Where every class is weak, what any image of any class reaches; without a single distance, what is opposite.
    widest = max(strong.values(), default=float(everything.max()) if len(everything) else 2.0)
    thresholds = {label: strong.get(label, max([widest, *distances.tolist()])) for label, distances in known.items()}
    weak = [classes[label] for label in known if label not in strong]
    return [thresholds.get(label) for label in range(len(classes))], weak


def _build(
    path: Path,
    images: pa.Table,
    data_root: str,
    checkpoint: Checkpoint,
    extractor: FeatureExtractor | None,
    gates: GateConfig,
    device: str,
) -> None:
    """Write the reference where it is not made yet, or damaged: with the features that setup_data cached, if any."""
    with suppress(M2DError):
        GateReference.load(path)
        return
    size, cache_dir, cached = checkpoint.image_size, checkpoint.info.config.get("cache_dir"), None
    if extractor is not None and cache_dir is not None and Path(cache_dir).is_dir():
        sha256 = images["sha256"].to_pylist()
        store = FeatureStore(prepared_folder(cache_dir, data_root), extractor.key, size)
        cached = None if store.missing(sha256, 1).any() else store.table(sha256, 1)
    reader = ImageReader(images, data_root, image_size=size, max_pixels=data_config_of(checkpoint.info).max_pixels)
    here = device if torch.cuda.is_available() else "cpu"
    say(f"gates: looking at {len(images):,} training images, once for this checkpoint and these settings")
    build_gate_reference(images, reader, extractor, gates, cached=cached, device=here).save(path)


def build_gate_reference(
    catalog: pa.Table,
    reader: ImageReader,
    extractor: FeatureExtractor | None,
    config: GateConfig,
    *,
    cached: FeatureTable | None = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> GateReference:
    """The reference of a training split: read its images, extract or look up their features, calibrate.

    catalog: rows of the training split; reader: of the same rows, at the checkpoint's image size. extractor: that of
    new images, moved to `device`; None: thumbnails alone. cached: its features, in the catalog's order. A file that
    went bad is left out. Raises DataError where none is left.
    """
    extractor = None if extractor is None else extractor.to(device)
    parts: list[tuple[np.ndarray, ...]] = []  # rows, the facts, features
    with progress("gates", len(reader)) as shown:
        for wanted in np.split(np.arange(len(reader)), range(batch_size, len(reader), batch_size)):
            batch = reader.read(wanted, np.zeros(len(wanted), dtype=np.int8))
            rows, images = wanted[~batch["substituted"]], batch["images"][~batch["substituted"]]
            if len(rows):
                cls = np.zeros((len(rows), 0), np.float32)
                if cached is not None:
                    cls = cached.cls(rows, np.zeros(len(rows), dtype=np.int8)).float().numpy()
                elif extractor is not None:
                    cls = extract_view(extractor, images, 0, device).cls.numpy()
                parts.append((rows, *vars(ImageFacts.of(images)).values(), cls))
            shown.advance(len(wanted))
    if not parts:
        raise DataError("gate reference: no training image can be read; check data_root, or turn the gates off")
    kept, *facts, features = (np.concatenate(column) for column in zip(*parts, strict=True))
    return GateReference.build(
        None if extractor is None else features,
        reader.labels[kept],
        catalog["lesion_id"].take(kept).to_pylist(),
        config,
        ids=catalog["image_id"].take(kept).to_pylist(),
        facts=ImageFacts(*facts),
        extractor="" if extractor is None else extractor.key,
        catalog=catalog_hash(catalog),
        classes=classes_of(catalog).codes,
    )
