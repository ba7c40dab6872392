"""What the gates hold new images against: the features of the training images, found, extracted once and kept.

    <experiment>/gate_reference/<key>.*     named after the images, the extractor and the settings it is made from
Called by the driver; the actors and writing tasks only read the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import torch

from m2d.data.catalog import read_catalog
from m2d.data.feature_store import FeatureStore, FeatureTable
from m2d.data.prepared import prepared_folder
from m2d.data.reader import ImageReader
from m2d.errors import DataError, M2DError
from m2d.files.progress import progress, say
from m2d.generation.gate_reference import GateReference, build_gate_reference
from m2d.generation.gate_settings import GateConfig
from m2d.generation.gates import active_gates as at_work
from m2d.generation.planning import data_config_of, dataset_catalog
from m2d.generation.recipe import experiment_of
from m2d.generation.references import load_reference_extractor
from m2d.generation.settings import GenerateConfig
from m2d.models.checkpoint import Checkpoint
from m2d.models.extractors import FeatureExtractor

_CATALOG = "cache/catalog.parquet"  # in an experiment: what it was trained on
_FOLDER = "gate_reference"
_BY_FEATURES = ("near_copy:features", "class_consistency")
_NOT_IN_RECIPE = ("max_attempts",)  # how long to go on trying shapes no image that is kept


@dataclass(frozen=True)
class GatesAtWork:
    """The gates of a run: those asked for, less those that nothing is there to hold an image against."""

    config: GateConfig
    names: tuple[str, ...]  # see m2d.generation.gates.active_gates
    reference: Path | None = None
    key: str | None = None  # of the reference
    need_features: bool = False  # of the new images
    extractor: FeatureExtractor | None = None  # loaded already; None: nobody asked for it yet
    build: Callable[[], None] | None = None  # makes the reference where it is not there; minutes on a CPU

    @property
    def record(self) -> dict[str, Any] | None:
        """For the recipe: what decides which attempt is kept."""
        if not self.names:
            return None
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _NOT_IN_RECIPE}
        return {**settings, "at_work": list(self.names), "reference": self.key}

    @property
    def text(self) -> str:
        """`blank, near_copy:pixels`, or `off`."""
        return ", ".join(self.names) or "off"


def prepare_gates(config: GenerateConfig, checkpoint: Checkpoint, catalog: pa.Table | None, device: str) -> GatesAtWork:
    """Which gates run. Where something lacks, those that need it are off, which is said once.

    The training images' features are not made here but by `build`, when there is something to hold against them.
    catalog: of config.data_root, where somebody read it already.
    """
    gates = config.gates
    if not gates.enabled or not (gates.near_copy or gates.class_consistency):
        return GatesAtWork(gates, at_work(gates, None))
    try:
        images = _training_images(config, checkpoint, catalog)
    except M2DError as error:
        say(
            "warning: the gates near_copy and class_consistency are off, for they need the training images "
            f"({error}); new images may repeat old ones"
        )
        return GatesAtWork(gates, at_work(gates, None))
    extractor: FeatureExtractor | None = None
    try:
        extractor = load_reference_extractor(checkpoint, config.extractor_weights)
    except M2DError as error:
        say(
            "warning: the gate class_consistency is off and near_copy compares pixels alone, for the feature extractor "
            f"is not here ({error})"
        )
    key = _key(images.catalog, extractor, checkpoint.image_size, gates)
    path = experiment_of(str(checkpoint.path)) / _FOLDER / f"{key}{GateReference.SUFFIX}"
    prospect = _Prospect(has_features=extractor is not None, has_thumbnails=True)
    names = at_work(gates, cast(GateReference, prospect))

    def build() -> None:
        if _loaded(path) is None:
            _built(images, checkpoint, extractor, gates, device).save(path)

    return GatesAtWork(gates, names, path, key, bool(set(names) & set(_BY_FEATURES)), extractor, build)


@dataclass(frozen=True)
class _Prospect:
    """What is known of a reference before it is made: all that decides which gates will run."""

    has_features: bool
    has_thumbnails: bool


@dataclass(frozen=True)
class _TrainingImages:
    catalog: pa.Table  # rows of the training split
    data_root: str
    cache_dir: str | None


def _training_images(config: GenerateConfig, checkpoint: Checkpoint, catalog: pa.Table | None) -> _TrainingImages:
    """Those that the checkpoint was trained on, by its experiment's catalog; else the training split of data_root."""
    recorded = checkpoint.info.config
    own = experiment_of(str(checkpoint.path)) / _CATALOG
    cache_dir = recorded.get("cache_dir")
    if own.is_file():
        rows = read_catalog(str(own))
        given = (config.data_root, recorded.get("data_root"))  # a recorded URI lacks the key that it had
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
            return _TrainingImages(rows, str(place), cache_dir)
    raise DataError(f"the training images are not in {' or '.join(map(str, places)) or 'any known place'}; "
                    "name their folder by --data_root")  # fmt: skip


def _built(
    images: _TrainingImages,
    checkpoint: Checkpoint,
    extractor: FeatureExtractor | None,
    gates: GateConfig,
    device: str,
) -> GateReference:
    """With the features that setup_data cached, if it has them all; otherwise they are extracted here."""
    here = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    source: FeatureTable | FeatureExtractor | None = None
    if extractor is not None:
        source = _cached(images, extractor, checkpoint.image_size)
        if source is None:
            extractor.to(here)
            source = extractor
    data = data_config_of(checkpoint.info)
    reader = ImageReader(images.catalog, images.data_root, image_size=checkpoint.image_size, max_pixels=data.max_pixels)
    say(f"gates: looking at {len(images.catalog):,} training images, once for this checkpoint and these settings")
    with progress("gates", len(images.catalog)) as shown:
        return build_gate_reference(
            images.catalog, reader, source, gates,
            extractor=None if extractor is None else extractor.key, device=here, progress=shown.show,
        )  # fmt: skip


def _cached(images: _TrainingImages, extractor: FeatureExtractor, image_size: int) -> FeatureTable | None:
    if images.cache_dir is None or not Path(images.cache_dir).is_dir():
        return None
    sha256 = images.catalog["sha256"].to_pylist()
    store = FeatureStore.open(prepared_folder(images.cache_dir, images.data_root), extractor.key, image_size)
    return None if store.missing(sha256, 1).any() else store.table(sha256, 1)


def _key(catalog: pa.Table, extractor: FeatureExtractor | None, image_size: int, gates: GateConfig) -> str:
    """16 hex digits of all that the reference is made from."""
    lines = sorted(zip(*(catalog[name].to_pylist() for name in ("sha256", "label", "lesion_id")), strict=True))
    settings = {k: v for k, v in dataclasses.asdict(gates).items() if k not in _NOT_IN_RECIPE}
    text = json.dumps([lines, None if extractor is None else extractor.key, image_size, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loaded(path: Path) -> GateReference | None:
    """None where it has not been made yet, or is damaged: then it is made anew."""
    try:
        return GateReference.load(path)
    except M2DError:
        return None
