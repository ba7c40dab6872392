"""What the gates hold new images against: the training images' features and thumbnails, and the thresholds from them.

Built once by the driver, saved as one safetensors file and loaded by whoever gates. Runs without Ray.
docs/results/gates.md has the measurements behind the choices here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from m2d.classes import CLASSES, NUM_CLASSES
from m2d.data.catalog import catalog_hash
from m2d.data.feature_store import FeatureTable
from m2d.data.views import apply_view
from m2d.errors import DataError
from m2d.files.atomic import write_whole
from m2d.files.storage import one_line
from m2d.generation.gate_settings import GateConfig
from m2d.generation.journal import cannot_write
from m2d.generation.neighbours import nearest, unit_rows
from m2d.models.extractors import FeatureExtractor

if TYPE_CHECKING:
    import pyarrow as pa

    from m2d.data.reader import ImageReader

FORMAT = 1
THUMBNAIL = 8  # pixels a side
WEAK_BELOW = 30  # images of a class whose distances are known; a 99 % quantile of fewer is their largest, or chance
DARK, BRIGHT = 5, 250  # grey levels; a pixel with all three channels beyond is saturated
FIXED_MIN_CONTRAST, FIXED_MAX_SATURATED, FIXED_MAX_ROUGHNESS = (
    3.0,
    0.5,
    36.0,
)  # where nothing is known of the training images
_COPY_FLOOR = 1e-4  # of both copy thresholds, so that an exact copy is one also where training images repeat
_CALIBRATION_IMAGES = 2048  # drawn for each threshold where there are more
_VIEWS = 8
_METADATA_KEY = "m2d_gate_reference"


@dataclass(frozen=True)
class ImageFacts:
    """What the gates read off pixels. thumbnails float32 [n, 8, 8, 3]; the others float32 [n]."""

    thumbnails: np.ndarray  # mean grey levels of the cells of an 8 x 8 grid
    contrast: np.ndarray  # standard deviation of luma, grey levels
    saturated: np.ndarray  # share of pixels whose channels are all <= 5 or all >= 250
    roughness: np.ndarray  # mean difference of luma between neighbouring pixels, grey levels

    @classmethod
    def of(cls, images: np.ndarray) -> Self:
        """images: uint8 [n, H, W, 3]."""
        pixels = images.astype(np.float32)
        cells = F.adaptive_avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2), THUMBNAIL).permute(0, 2, 3, 1)
        luma = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        extreme = (images <= DARK).all(axis=-1) | (images >= BRIGHT).all(axis=-1)
        steps = [np.abs(np.diff(luma, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
        return cls(
            thumbnails=cells.numpy(),
            contrast=luma.std(axis=(1, 2)),
            saturated=extreme.mean(axis=(1, 2), dtype=np.float32),
            roughness=(steps[0] + steps[1]) / 2,
        )

    @classmethod
    def joined(cls, parts: Sequence[ImageFacts]) -> Self:
        """One after another; at least one part."""
        return cls(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))


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
    ) -> Self:
        """Calibrate on training images; distances between images of one lesion are left out everywhere.

        features: cls float32 [n, D]; None turns the gates that read them off. labels: int64 [n]. lesions: [n]. facts:
        of the same images; None turns the comparison of thumbnails off. Near-copies: the quantile of each image's
        distance to the nearest image of another lesion. Class: the quantile, for each class, of the mean distance to
        the k nearest images of the class. A class of fewer than WEAK_BELOW such distances is weak: it gets the widest
        threshold of all classes, or its own largest distance if that is wider. Raises DataError where the parts do not
        fit one another or hold what is not finite.
        """
        count = len(labels)
        raw = np.zeros((count, 0), np.float32) if features is None else np.asarray(features, dtype=np.float32)
        _require_fit(raw, labels, lesions, ids, facts)
        # Class by class, so that the images of one are a slice, not a copy.
        order = np.argsort(labels, kind="stable")
        raw, labels = raw[order], labels[order]
        lesions, ids = np.asarray(lesions)[order].tolist(), np.asarray(ids or range(count))[order].tolist()
        facts = None if facts is None else ImageFacts(*(column[order] for column in vars(facts).values()))
        groups = torch.from_numpy(np.unique(np.asarray(lesions), return_inverse=True)[1].astype(np.int64)).to(device)
        deviation = raw.std(axis=0, dtype=np.float64)
        mean = torch.from_numpy(raw.mean(axis=0, dtype=np.float64).astype(np.float32))
        # Features that few training images show would make every new image a stranger: they count less, not more.
        floor = max(float(np.median(deviation)) if deviation.size else 0.0, 1e-6)
        scale = torch.from_numpy(np.maximum(deviation, floor).astype(np.float32))
        vectors = unit_rows((torch.from_numpy(raw) - mean) / scale).to(device)
        thumbnails = torch.zeros(count, 0) if facts is None else unit_thumbnails(facts.thumbnails)
        classes = torch.from_numpy(labels.astype(np.int64)).to(device)
        thresholds, weak = _class_thresholds(vectors, classes, groups, config)
        return cls(
            features=vectors.cpu(),
            thumbnails=thumbnails,
            labels=classes.cpu(),
            mean=mean,
            scale=scale,
            ids=tuple(map(str, ids)),
            copy_threshold=_copy_threshold(vectors, None, groups, config),
            pixel_threshold=_copy_threshold(thumbnails.to(device), facts, groups, config),
            class_thresholds=thresholds,
            weak=weak,
            neighbours=config.neighbours,
            min_contrast=_min_contrast(config, facts),
            max_saturated_share=_max_saturated(config, facts),
            max_roughness=_max_roughness(config, facts),
            extractor=extractor,
            catalog=catalog,
            settings=asdict(config),
        )

    def rows_of(self, label: int) -> slice:
        """Where the images of a class stand."""
        first, last = torch.searchsorted(self.labels, torch.tensor([label, label + 1])).tolist()
        return slice(first, last)

    @property
    def has_features(self) -> bool:
        """Whether features of new images can be compared."""
        return self.features.shape[1] > 0

    @property
    def has_thumbnails(self) -> bool:
        """Whether pixels of new images can be compared."""
        return self.thumbnails.shape[1] > 0

    def summary(self) -> dict[str, Any]:
        """For a manifest or the console: what it was made from and the thresholds."""
        thresholds = dict(zip(CLASSES, self.class_thresholds, strict=True))
        notes = {name: value for name, value in self._notes().items() if name not in ("format", "ids")}
        return {**notes, "images": len(self.ids), "class_thresholds": thresholds}

    def save(self, path: Path) -> None:
        """One file, whole or not at all. Raises ConfigError where it cannot be written."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(tensors, metadata={_METADATA_KEY: json.dumps(self._notes())}))
        except OSError as error:
            raise cannot_write(path, error) from None

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

    def _notes(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name not in _TENSORS}
        return {"format": FORMAT, **values}

    def _check(self) -> None:
        count, dim = len(self.ids), len(self.mean)
        shapes = {
            "features": (count, dim),
            "thumbnails": (count, self.thumbnails.shape[-1]),
            "labels": (count,),
            "mean": (dim,),
            "scale": (dim,),
        }
        for name, shape in shapes.items():
            tensor, dtype = getattr(self, name), torch.int64 if name == "labels" else torch.float32
            if tensor.shape != shape or tensor.dtype != dtype or not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, or not finite")
        if count == 0 or (self.labels.diff() < 0).any():
            raise ValueError("labels are not ascending")
        if self.thumbnails.shape[1] not in (0, 3 * THUMBNAIL**2) or len(self.class_thresholds) != NUM_CLASSES:
            raise ValueError("its parts have other sizes than this M2D's")


_TENSORS = ("features", "thumbnails", "labels", "mean", "scale")


def build_gate_reference(
    catalog: pa.Table,
    reader: ImageReader,
    source: FeatureExtractor | FeatureTable | None,
    config: GateConfig,
    *,
    extractor: str | None = None,
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
    facts: list[ImageFacts] = []
    features: list[Tensor] = []
    rows: list[np.ndarray] = []
    for first in range(0, len(reader), batch_size):
        wanted = np.arange(first, min(first + batch_size, len(reader)))
        batch = reader.read(wanted, np.zeros(len(wanted), dtype=np.int8))
        good = ~batch["substituted"]
        if good.any():
            images = batch["images"][good]
            facts.append(ImageFacts.of(images))
            rows.append(wanted[good])
            if isinstance(source, FeatureTable):
                features.append(source.cls(wanted[good], np.zeros(good.sum(), dtype=np.int8)).float())
            elif source is not None:
                features.append(_extract(source, images, device))
        if progress is not None:
            progress(int(wanted[-1]) + 1, len(reader))
    if not rows:
        raise DataError("gate reference: no training image can be read; check data_root, or turn the gates off")
    kept = np.concatenate(rows)
    known = source.key if isinstance(source, FeatureExtractor) else extractor
    return GateReference.build(
        torch.cat(features).numpy() if features else None,
        reader.labels[kept],
        catalog["lesion_id"].take(kept).to_pylist(),
        config,
        ids=catalog["image_id"].take(kept).to_pylist(),
        facts=ImageFacts.joined(facts),
        extractor=known or "",
        catalog=catalog_hash(catalog),
        device=device,
    )


def unit_thumbnails(thumbnails: np.ndarray) -> Tensor:
    """float32 [n, 8, 8, 3] to [n, 192]: less the image's mean over all values, at length 1."""
    flat = torch.from_numpy(np.ascontiguousarray(thumbnails.reshape(len(thumbnails), -1)))
    return unit_rows(flat - flat.mean(dim=1, keepdim=True))


def nearest_thumbnails(
    thumbnails: np.ndarray,
    bank: Tensor,
    *,
    query_groups: Tensor | None = None,
    bank_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each image in its nearest flip or turn: distance float64 [B] and row int64 [B] of the nearest in the bank."""
    found = []
    for view in range(_VIEWS):
        turned = np.stack([apply_view(thumbnail, view) for thumbnail in thumbnails])
        queries = unit_thumbnails(turned).to(bank.device)
        found.append(nearest(queries, bank, query_groups=query_groups, bank_groups=bank_groups))
    distances = torch.cat([distance for distance, _ in found], dim=1)
    rows = torch.cat([row for _, row in found], dim=1)
    best = distances.argmin(dim=1, keepdim=True)
    return distances.gather(1, best)[:, 0], rows.gather(1, best)[:, 0]


def mean_distance(distances: Tensor) -> Tensor:
    """Mean of the finite ones of each row, [B, k] to [B]; inf where there is none."""
    finite = distances.isfinite()
    mean = distances.masked_fill(~finite, 0).sum(dim=1) / finite.sum(dim=1)
    return mean.nan_to_num(nan=torch.inf)


@torch.inference_mode()
def _extract(extractor: FeatureExtractor, images: np.ndarray, device: str | torch.device) -> Tensor:
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    cls: Tensor = extractor(extractor.preprocess(pixels)).cls
    return cls.float().cpu()


def _copy_threshold(vectors: Tensor, facts: ImageFacts | None, groups: Tensor, config: GateConfig) -> float:
    """facts: those of the vectors, where they are thumbnails."""
    drawn = _drawn(len(vectors)).to(vectors.device)
    if not vectors.shape[1]:
        return 0.0
    if facts is None:
        distances = nearest(vectors[drawn], vectors, query_groups=groups[drawn], bank_groups=groups)[0][:, 0]
    else:
        shown = facts.thumbnails[drawn.cpu().numpy()]
        distances = nearest_thumbnails(shown, vectors, query_groups=groups[drawn], bank_groups=groups)[0]
    known = distances[distances.isfinite()].cpu().numpy()
    return max(_COPY_FLOOR, float(np.quantile(known, config.near_copy_quantile))) if len(known) else _COPY_FLOOR


def _class_thresholds(
    vectors: Tensor, labels: Tensor, groups: Tensor, config: GateConfig
) -> tuple[tuple[float | None, ...], tuple[str, ...]]:
    """One for each class, None where it has no image or features are unknown; and the weak classes."""
    known: dict[int, np.ndarray] = {}
    for label in range(NUM_CLASSES) if vectors.shape[1] else ():
        rows = (labels == label).nonzero()[:, 0]
        if len(rows):
            drawn = rows[_drawn(len(rows)).to(rows.device)]
            found = nearest(
                vectors[drawn], vectors[rows], config.neighbours,
                query_groups=groups[drawn], bank_groups=groups[rows],
            )[0]  # fmt: skip
            means = mean_distance(found)
            known[label] = means[means.isfinite()].cpu().numpy()
    strong = {label: float(np.quantile(d, config.class_quantile)) for label, d in known.items() if len(d) >= WEAK_BELOW}
    everything = np.concatenate([*known.values(), np.zeros(0)])
    # Where every class is weak, what any image of any class reaches; without a single distance, what is opposite.
    widest = max(strong.values(), default=float(everything.max()) if len(everything) else 2.0)
    thresholds = {label: strong.get(label, max([widest, *distances.tolist()])) for label, distances in known.items()}
    weak = tuple(CLASSES[label] for label in known if label not in strong)
    return tuple(thresholds.get(label) for label in range(NUM_CLASSES)), weak


def _min_contrast(config: GateConfig, facts: ImageFacts | None) -> float:
    if config.min_contrast is not None:
        return config.min_contrast
    return FIXED_MIN_CONTRAST if facts is None else float(np.quantile(facts.contrast, 0.001)) / 2


def _max_saturated(config: GateConfig, facts: ImageFacts | None) -> float:
    """Halfway from the most saturated training images to all of the image; never below the fixed share, then."""
    if config.max_saturated_share is not None:
        return config.max_saturated_share
    return FIXED_MAX_SATURATED if facts is None else (1 + float(np.quantile(facts.saturated, 0.999))) / 2


def _max_roughness(config: GateConfig, facts: ImageFacts | None) -> float:
    if config.max_roughness is not None:
        return config.max_roughness
    return FIXED_MAX_ROUGHNESS if facts is None else 2 * float(np.quantile(facts.roughness, 0.999))


def _drawn(count: int) -> Tensor:
    """All rows, or _CALIBRATION_IMAGES of them, always the same."""
    if count <= _CALIBRATION_IMAGES:
        return torch.arange(count)
    chosen = np.random.default_rng(0).choice(count, _CALIBRATION_IMAGES, replace=False)
    return torch.from_numpy(np.sort(chosen))


def _require_fit(
    features: np.ndarray,
    labels: np.ndarray,
    lesions: Sequence[str],
    ids: Sequence[str] | None,
    facts: ImageFacts | None,
) -> None:
    count = len(labels)
    lengths = [len(features), len(lesions), count if ids is None else len(ids)]
    lengths.append(count if facts is None else len(facts.thumbnails))
    if features.ndim != 2 or set(lengths) != {count} or count == 0:
        raise DataError(f"gate reference: {count} labels beside {lengths} features, lesions, ids and thumbnails")
    if not np.isfinite(features).all():
        raise DataError("gate reference: features of the training images are not finite; compute them anew")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise DataError(f"gate reference: labels must be whole numbers from 0 to {NUM_CLASSES - 1}")
