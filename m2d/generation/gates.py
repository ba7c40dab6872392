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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from m2d.classes import CLASSES, NUM_CLASSES, class_index
from m2d.data.catalog import catalog_hash, read_catalog
from m2d.data.features import FeatureStore, FeatureTable
from m2d.data.reader import ImageReader
from m2d.data.store import prepared_folder
from m2d.data.views import apply_view
from m2d.errors import DataError, M2DError
from m2d.files.progress import progress, say
from m2d.files.storage import one_line
from m2d.generation.output import experiment_of, whole_output
from m2d.generation.plan import data_config_of, dataset_catalog
from m2d.generation.references import load_reference_extractor
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.metrics.neighbours import (
    COPY_FLOOR,
    THUMBNAIL,
    Standardizer,
    at_least_median,
    calibration_distances,
    drawn_rows,
    nearest,
    nearest_in_views,
    thumbnails,
    unit_rows,
    unit_thumbnails,
)
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
_NOT_IN_RECIPE = ("max_attempts",)  # how long to go on trying shapes no image that is kept


# --- what runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatesAtWork:
    """The gates of a run: those asked for, less those that lack what they need."""

    config: GateConfig
    names: tuple[str, ...]  # see active_gates
    reference: Path | None = None  # its name's stem is a hash of all that the reference is made from
    extractor: FeatureExtractor | None = None  # loaded already; None: not needed so far
    build: Callable[[], None] | None = None  # makes the reference where it is missing; minutes on a CPU

    @property
    def need_features(self) -> bool:
        """Of the new images."""
        return bool({"near_copy:features", "class_consistency"} & set(self.names))

    @property
    def record(self) -> dict[str, Any] | None:
        """For the recipe: what decides which attempt is kept."""
        if not self.names:
            return None
        key = None if self.reference is None else self.reference.stem
        return {**_lasting(self.config), "at_work": list(self.names), "reference": key}


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
        images, data_root = _training_images(config, checkpoint, catalog)
    except M2DError as error:
        say(
            "warning: the gates near_copy and class_consistency are off, for they need the training images "
            f"({error}); new images may repeat old ones"
        )
        return alone
    extractor: FeatureExtractor | None = None
    try:
        extractor = load_reference_extractor(checkpoint, config.extractor_weights)
    except M2DError as error:
        say(
            "warning: the gate class_consistency is off and near_copy compares pixels alone, for the feature extractor "
            f"is not here ({error})"
        )
    lines = sorted(zip(*(images[name].to_pylist() for name in ("sha256", "label", "lesion_id")), strict=True))
    made_from = [lines, None if extractor is None else extractor.key, checkpoint.image_size, _lasting(gates)]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    path = experiment_of(str(checkpoint.path)) / "gate_reference" / f"{key}{GateReference.SUFFIX}"

    def build() -> None:
        try:
            GateReference.load(path)
        except M2DError:  # not made yet, or damaged
            _built(images, data_root, checkpoint, extractor, gates, device).save(path)

    names = active_gates(gates, features=extractor is not None, pixels=True)
    return GatesAtWork(gates, names, path, extractor, build)


def active_gates(config: GateConfig, *, features: bool, pixels: bool) -> tuple[str, ...]:
    """The gates that really run, for the console and the manifest; empty: none.

    features: those of the new images and of the training images are known. pixels: the training images' thumbnails are.
    """
    wanted = (
        ("blank", config.blank),
        ("near_copy:features", config.near_copy and features),
        ("near_copy:pixels", config.near_copy and pixels),
        ("class_consistency", config.class_consistency and features),
    )
    return tuple(name for name, active in wanted if active and config.enabled)


# --- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the gates found on one image. An unknown number is NaN."""

    accepted: bool
    reason: str | None  # blank, saturated, noise, near_copy, outside_class: the first, in this order; None: accepted
    nearest_distance: float  # to the nearest training image of any class, 1 - cosine of standardised features
    class_distance: float  # mean of the same to the nearest training images of its class
    nearest_id: str | None  # the training image nearest by features, or the one that it copies by pixels
    saturated_share: float  # of its pixels, black or white
    contrast: float  # deviation of luma, grey levels
    pixel_distance: float = math.nan  # to the nearest training image, 1 - cosine of thumbnails, any flip or turn
    roughness: float = math.nan  # mean difference of luma between neighbouring pixels, grey levels


def check(
    images: np.ndarray,
    features: np.ndarray | None,
    labels: Sequence[str],
    reference: GateReference | None,
    config: GateConfig,
    *,
    device: str | torch.device = "cpu",
) -> list[Verdict]:
    """One verdict per image, in order, each independent of the others.

    images: uint8 [N, H, W, 3]. features: their cls float32 [N, D], of the reference's extractor at its image size, or
    None. labels: class codes. Measurements are reported even for disabled gates. Without a reference or features the
    gates that need them refuse nothing, see `active_gates`. An image with features that are not finite is outside its
    class. Raises ValueError where the shapes do not fit.
    """
    if len(images) != len(labels) or (features is not None and len(features) != len(images)):
        raise ValueError(f"{len(images)} images, {len(labels)} labels, {None if features is None else len(features)}")
    if not len(images):
        return []
    facts = ImageFacts.of(images)
    near, near_rows, in_class = _feature_distances(features, labels, reference, device)
    pixel, pixel_rows = np.full(len(images), np.nan), np.full(len(images), -1)
    if reference is not None and reference.has_thumbnails:
        by_view, rows = nearest_in_views(_turned(facts.thumbnails, device), reference.thumbnails.to(device))
        best = by_view.argmin(dim=1, keepdim=True)
        pixel, pixel_rows = (part.gather(1, best)[:, 0].cpu().numpy() for part in (by_view, rows))
    active = active_gates(
        config,
        features=features is not None and reference is not None and reference.has_features,
        pixels=reference is not None and reference.has_thumbnails,
    )
    known = FIXED_LIMITS if reference is None else vars(reference)
    limits = {name: known[name] if getattr(config, name) is None else getattr(config, name) for name in FIXED_LIMITS}
    verdicts = []
    for row, label in enumerate(labels):
        reason, culprit = None, int(near_rows[row])
        limit = None if reference is None else reference.class_thresholds[class_index(label)]
        if "blank" in active and facts.contrast[row] < limits["min_contrast"]:
            reason = "blank"
        elif "blank" in active and facts.saturated[row] > limits["max_saturated_share"]:
            reason = "saturated"
        elif "blank" in active and facts.roughness[row] > limits["max_roughness"]:
            reason = "noise"
        elif reference is not None and "near_copy:pixels" in active and pixel[row] <= reference.pixel_threshold:
            reason, culprit = "near_copy", int(pixel_rows[row])
        elif reference is not None and "near_copy:features" in active and near[row] <= reference.copy_threshold:
            reason = "near_copy"
        elif "class_consistency" in active and limit is not None and not in_class[row] <= limit:  # NaN is outside
            reason = "outside_class"
        verdicts.append(
            Verdict(
                accepted=reason is None,
                reason=reason,
                nearest_distance=float(near[row]),
                class_distance=float(in_class[row]),
                nearest_id=None if reference is None or culprit < 0 else reference.ids[culprit],
                saturated_share=float(facts.saturated[row]),
                contrast=float(facts.contrast[row]),
                pixel_distance=float(pixel[row]),
                roughness=float(facts.roughness[row]),
            )
        )
    return verdicts


def _feature_distances(
    features: np.ndarray | None, labels: Sequence[str], reference: GateReference | None, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the nearest training image, its row, mean distance in the class; NaN, -1, NaN where unknown."""
    count = len(labels)
    near, rows, in_class = np.full(count, np.nan), np.full(count, -1), np.full(count, np.nan)
    if features is None or reference is None or not reference.has_features:
        return near, rows, in_class
    if features.shape[1] != len(reference.mean):
        raise ValueError(f"features of {features.shape[1]} dimensions, the reference's have {len(reference.mean)}")
    usable = np.flatnonzero(np.isfinite(features).all(axis=1))
    standardised = (torch.from_numpy(features[usable].astype(np.float32)) - reference.mean) / reference.scale
    queries, bank = unit_rows(standardised).to(device), reference.features.to(device)
    distances, found = nearest(queries, bank)
    near[usable], rows[usable] = distances[:, 0].cpu().numpy(), found[:, 0].cpu().numpy()
    classes = torch.tensor([class_index(labels[int(row)]) for row in usable], dtype=torch.int64)
    for index in range(NUM_CLASSES):
        mine = (classes == index).nonzero()[:, 0]
        if len(mine) and reference.class_thresholds[index] is not None:
            first, last = torch.searchsorted(reference.labels, torch.tensor([index, index + 1])).tolist()
            means = _mean_distance(nearest(queries[mine.to(device)], bank[first:last], reference.neighbours)[0])
            in_class[usable[mine.numpy()]] = means.cpu().numpy()
    return near, rows, in_class


@dataclass(frozen=True)
class ImageFacts:
    """What the gates read off pixels. thumbnails float32 [n, 8, 8, 3]; the others float32 [n]."""

    thumbnails: np.ndarray  # see m2d.metrics.neighbours
    contrast: np.ndarray  # standard deviation of luma, grey levels
    saturated: np.ndarray  # share of pixels whose channels are all <= 5 or all >= 250
    roughness: np.ndarray  # mean difference of luma between neighbouring pixels, grey levels

    @classmethod
    def of(cls, images: np.ndarray) -> Self:
        """images: uint8 [n, H, W, 3]."""
        luma = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        extreme = (images <= DARK).all(axis=-1) | (images >= BRIGHT).all(axis=-1)
        steps = [np.abs(np.diff(luma, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
        return cls(
            thumbnails=thumbnails(images),
            contrast=luma.std(axis=(1, 2)),
            saturated=extreme.mean(axis=(1, 2), dtype=np.float32),
            roughness=(steps[0] + steps[1]) / 2,
        )


def unit_view(cells: np.ndarray, view: int) -> Tensor:
    """Unit vectors of thumbnails [n, 8, 8, 3] in one of the eight views (m2d.data.views)."""
    return unit_thumbnails(np.moveaxis(apply_view(np.moveaxis(cells, 0, -1), view), -1, 0))


def _turned(cells: np.ndarray, device: str | torch.device) -> Iterator[Tensor]:
    return (unit_view(cells, view).to(device) for view in range(8))


# --- the reference --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateReference:
    """Training images as unit vectors, and the distances at which a new image counts as a copy or as a stranger.

    A distance is 1 - cosine: of features standardised by the training images' mean and deviation (at least the median
    one of all features), or of thumbnails less their mean. features [n, D] (D = 0: unknown) and thumbnails [n, 192] (or
    0), float32; labels int64 [n], ascending.
    """

    SUFFIX: ClassVar[str] = ".safetensors"

    features: Tensor
    thumbnails: Tensor
    labels: Tensor
    mean: Tensor  # [D]
    scale: Tensor  # [D]
    ids: tuple[str, ...]  # of the images
    copy_threshold: float  # a feature distance up to this is a near-copy
    pixel_threshold: float  # the same of thumbnails
    class_thresholds: tuple[float | None, ...]  # a mean distance above is outside the class; None: no image of it
    weak: tuple[str, ...]  # classes with too few images for a threshold of their own
    neighbours: int
    min_contrast: float
    max_saturated_share: float
    max_roughness: float
    extractor: str  # FeatureExtractor.key, empty: unknown
    catalog: str  # m2d.data.catalog.catalog_hash, empty: unknown
    settings: dict[str, Any]  # the GateConfig it was built by

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
        device: str | torch.device = "cpu",
        weak_below: int = WEAK_BELOW,
        calibration_images: int = _CALIBRATION_IMAGES,
    ) -> Self:
        """Calibrate on training images; distances between images of one lesion are left out everywhere.

        features: cls float32 [n, D]; None turns the gates that read them off. labels: int64 [n]. lesions: [n]. facts:
        of the same images; None turns the comparison of thumbnails off. Near-copies: the quantile of each image's
        distance to the nearest image of another lesion. Class: the quantile, for each class, of the mean distance to
        the k nearest images of the class. A class of fewer than weak_below such distances is weak: it gets the widest
        threshold of all classes, or its own largest distance if that is wider. Raises DataError where the parts do not
        fit one another or hold what is not finite.
        """
        count = len(labels)
        raw = np.zeros((count, 0), np.float32) if features is None else np.asarray(features, dtype=np.float32)
        ids = [str(row) for row in range(count)] if ids is None else ids
        lengths = [len(raw), len(lesions), len(ids), count if facts is None else len(facts.thumbnails)]
        if set(lengths) != {count} or count == 0:
            raise DataError(f"gate reference: {count} labels beside {lengths} features, lesions, ids and thumbnails")
        if not np.isfinite(raw).all():
            raise DataError("gate reference: features of the training images are not finite; compute them again")
        # Class by class, so that the images of one are a slice, not a copy.
        order = np.argsort(labels, kind="stable")
        raw, classes = raw[order], torch.from_numpy(labels[order].astype(np.int64)).to(device)
        groups = torch.from_numpy(np.unique(np.asarray(lesions)[order], return_inverse=True)[1].astype(np.int64))
        groups = groups.to(device)
        standard = Standardizer.of(raw, at_least_median)
        mean, scale = (torch.from_numpy(part.astype(np.float32)) for part in (standard.mean, standard.scale))
        vectors = unit_rows((torch.from_numpy(raw) - mean) / scale).to(device)
        cells = np.zeros((count, 0)) if facts is None else facts.thumbnails[order]
        shown = torch.zeros(count, 0) if facts is None else unit_thumbnails(cells)

        def copies(bank: Tensor, views: Callable[[np.ndarray], Any]) -> float:
            if not bank.shape[1]:
                return 0.0
            distances = calibration_distances(views, bank, groups, most=calibration_images)
            known = distances[np.isfinite(distances)]
            return max(COPY_FLOOR, float(np.quantile(known, config.near_copy_quantile))) if len(known) else COPY_FLOOR

        thresholds, weak = _class_thresholds(vectors, classes, groups, config, weak_below, calibration_images)
        return cls(
            features=vectors.cpu(),
            thumbnails=shown,
            labels=classes.cpu(),
            mean=mean,
            scale=scale,
            ids=tuple(str(ids[row]) for row in order),
            copy_threshold=copies(vectors, lambda rows: [vectors[torch.from_numpy(rows).to(device)]]),
            pixel_threshold=copies(shown.to(device), lambda rows: _turned(cells[rows], device)),
            class_thresholds=thresholds,
            weak=weak,
            neighbours=config.neighbours,
            **_blank_limits(config, facts),
            extractor=extractor,
            catalog=catalog,
            settings=asdict(config),
        )

    @property
    def has_features(self) -> bool:
        """Whether features of new images can be compared."""
        return self.features.shape[1] > 0

    @property
    def has_thumbnails(self) -> bool:
        """Whether pixels of new images can be compared."""
        return self.thumbnails.shape[1] > 0

    def save(self, path: Path) -> None:
        """One file, whole or not at all. Raises ConfigError where it cannot be written."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        notes = {"format": FORMAT, **{name: value for name, value in vars(self).items() if name not in _TENSORS}}
        with whole_output(path) as partial:
            partial.write_bytes(save(tensors, metadata={_METADATA_KEY: json.dumps(notes)}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """What save wrote. Raises DataError where it is missing or damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                notes = dict(json.loads((file.metadata() or {})[_METADATA_KEY]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            if notes.pop("format") != FORMAT:
                raise ValueError("made by another version of M2D")
            for name in ("ids", "class_thresholds", "weak"):
                notes[name] = tuple(notes[name])
            reference = cls(**tensors, **notes)
            reference._check()
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"gate reference: {path} cannot be used ({one_line(error)}); delete it and run again"
            ) from None
        return reference

    def _check(self) -> None:
        count, dim, cells = len(self.ids), len(self.mean), self.thumbnails.shape[-1]
        shapes = {"features": (count, dim), "thumbnails": (count, cells), "labels": (count,), "mean": (dim,)}
        for name, shape in (shapes | {"scale": (dim,)}).items():
            tensor, dtype = getattr(self, name), torch.int64 if name == "labels" else torch.float32
            if tensor.shape != shape or tensor.dtype != dtype or not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, or not finite")
        if count == 0 or (self.labels.diff() < 0).any():
            raise ValueError("labels are not ascending")
        if cells not in (0, 3 * THUMBNAIL**2) or len(self.class_thresholds) != NUM_CLASSES:
            raise ValueError("its parts have other sizes than this M2D's")


def build_gate_reference(
    catalog: pa.Table,
    reader: ImageReader,
    source: FeatureExtractor | FeatureTable | None,
    config: GateConfig,
    *,
    extractor: str = "",
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> GateReference:
    """The reference of a training split: read its images, extract or look up their features, calibrate.

    catalog: rows of the training split; reader: of the same rows, at the checkpoint's image size. source: the extractor
    that new images will be given to, on `device`; or its cached features, in the catalog's order; None: thumbnails
    alone. extractor: the key of cached features. progress(done, total): images. A file that went bad is left out.
    Raises DataError where none is left.
    """
    parts: list[tuple[np.ndarray, ...]] = []  # rows, the facts, features
    for first in range(0, len(reader), batch_size):
        wanted = np.arange(first, min(first + batch_size, len(reader)))
        as_they_are = np.zeros(len(wanted), dtype=np.int8)
        batch = reader.read(wanted, as_they_are)
        good = ~batch["substituted"]
        if good.any():
            images = batch["images"][good]
            cls = np.zeros((len(images), 0), np.float32)
            if isinstance(source, FeatureTable):
                cls = source.cls(wanted[good], as_they_are[good]).float().numpy()
            elif source is not None:
                with torch.inference_mode():
                    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
                    cls = source(source.preprocess(pixels)).cls.float().cpu().numpy()
            parts.append((wanted[good], *vars(ImageFacts.of(images)).values(), cls))
        if progress is not None:
            progress(int(wanted[-1]) + 1, len(reader))
    if not parts:
        raise DataError("gate reference: no training image can be read; check data_root, or turn the gates off")
    kept, *facts, features = (np.concatenate(column) for column in zip(*parts, strict=True))
    return GateReference.build(
        None if source is None else features,
        reader.labels[kept],
        catalog["lesion_id"].take(kept).to_pylist(),
        config,
        ids=catalog["image_id"].take(kept).to_pylist(),
        facts=ImageFacts(*facts),
        extractor=source.key if isinstance(source, FeatureExtractor) else extractor,
        catalog=catalog_hash(catalog),
        device=device,
    )


def _class_thresholds(
    vectors: Tensor, labels: Tensor, groups: Tensor, config: GateConfig, weak_below: int, calibration_images: int
) -> tuple[tuple[float | None, ...], tuple[str, ...]]:
    """One for each class, None where it has no image or features are unknown; and the weak classes."""
    known: dict[int, np.ndarray] = {}
    for label in labels.unique().tolist() if vectors.shape[1] else ():
        rows = (labels == label).nonzero()[:, 0]
        drawn = rows[torch.from_numpy(drawn_rows(len(rows), calibration_images)).to(rows.device)]
        distances, _ = nearest(
            vectors[drawn],
            vectors[rows],
            config.neighbours,
            query_groups=groups[drawn],
            bank_groups=groups[rows],
        )
        means = _mean_distance(distances)
        known[label] = means[means.isfinite()].cpu().numpy()
    strong = {label: float(np.quantile(d, config.class_quantile)) for label, d in known.items() if len(d) >= weak_below}
    everything = np.concatenate([*known.values(), np.zeros(0)])
    # Where every class is weak, what any image of any class reaches; without a single distance, what is opposite.
    widest = max(strong.values(), default=float(everything.max()) if len(everything) else 2.0)
    thresholds = {label: strong.get(label, max([widest, *distances.tolist()])) for label, distances in known.items()}
    weak = tuple(CLASSES[label] for label in known if label not in strong)
    return tuple(thresholds.get(label) for label in range(NUM_CLASSES)), weak


def _mean_distance(distances: Tensor) -> Tensor:
    """Mean of the finite ones of each row, [B, k] to [B]; inf where there is none."""
    finite = distances.isfinite()
    mean = distances.masked_fill(~finite, 0).sum(dim=1) / finite.sum(dim=1)
    return mean.nan_to_num(nan=torch.inf)


def _blank_limits(config: GateConfig, facts: ImageFacts | None) -> dict[str, float]:
    """As set, else well beyond the training images' own, else fixed."""
    limits = dict(FIXED_LIMITS)
    if facts is not None:
        limits = {
            "min_contrast": float(np.quantile(facts.contrast, 0.001)) / 2,
            # Halfway to all of the image; never below the fixed share, then.
            "max_saturated_share": (1 + float(np.quantile(facts.saturated, 0.999))) / 2,
            "max_roughness": 2 * float(np.quantile(facts.roughness, 0.999)),
        }
    return {name: value if getattr(config, name) is None else getattr(config, name) for name, value in limits.items()}


# --- the training images --------------------------------------------------------------------------------------------


def _training_images(config: GenerateConfig, checkpoint: Checkpoint, catalog: pa.Table | None) -> tuple[pa.Table, str]:
    """Catalog rows and root of the images that the checkpoint was trained on, by its experiment's catalog; otherwise
    of the training split of data_root.
    """
    own = experiment_of(str(checkpoint.path)) / "cache/catalog.parquet"
    if own.is_file():
        rows = read_catalog(str(own))
        given = (config.data_root, checkpoint.info.config.get("data_root"))  # a recorded URI lacks the key that it had
        places = [place for place in given if place and "***" not in place]
    else:
        rows = catalog if catalog is not None else dataset_catalog(config, checkpoint.info)
        if rows is None:
            raise DataError(f"no catalog is at {own}; name the training images by --data_root")
        places = [config.data_root] if config.data_root else []
    rows = rows.filter(pc.equal(rows["split"], "train"))
    if not len(rows):
        raise DataError("the catalog has no training image")
    for place in places:
        if "://" in place or (Path(place) / rows["path"][0].as_py()).is_file():
            return rows, str(place)
    raise DataError(
        f"the training images are not in {' or '.join(map(str, places)) or 'any known place'}; "
        "name their folder by --data_root"
    )


def _built(
    images: pa.Table,
    data_root: str,
    checkpoint: Checkpoint,
    extractor: FeatureExtractor | None,
    gates: GateConfig,
    device: str,
) -> GateReference:
    """With the features that setup_data cached, if it has them all; otherwise they are extracted here."""
    here = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    size, cache_dir = checkpoint.image_size, checkpoint.info.config.get("cache_dir")
    source: FeatureTable | FeatureExtractor | None = None
    if extractor is not None:
        source = extractor.to(here)
        if cache_dir is not None and Path(cache_dir).is_dir():
            sha256 = images["sha256"].to_pylist()
            store = FeatureStore(prepared_folder(cache_dir, data_root), extractor.key, size)
            if not store.missing(sha256, 1).any():
                source = store.table(sha256, 1)
    max_pixels = data_config_of(checkpoint.info).max_pixels
    reader = ImageReader(images, data_root, image_size=size, max_pixels=max_pixels)
    say(f"gates: looking at {len(images):,} training images, once for this checkpoint and these settings")
    with progress("gates", len(images)) as shown:
        return build_gate_reference(
            images,
            reader,
            source,
            gates,
            extractor="" if extractor is None else extractor.key,
            device=here,
            progress=shown.show,
        )


def _lasting(gates: GateConfig) -> dict[str, Any]:
    """The settings that shape the images that are kept."""
    return {name: value for name, value in asdict(gates).items() if name not in _NOT_IN_RECIPE}
