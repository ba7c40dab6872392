"""The arithmetic and the data of a run, worked out once by the driver and handed to every worker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from m2d.data.catalog import (
    Scan,
    catalog_hash,
    class_counts,
    read_catalog,
    scan_dataset,
    write_catalog,
    write_csv,
)
from m2d.data.features import FeatureStore, FeatureTable
from m2d.data.order import StreamOrder
from m2d.data.reader import ImageReader
from m2d.data.store import PreparedImages, prepared_folder, reusable_catalog
from m2d.experiment import Experiment
from m2d.files.progress import progress
from m2d.models.extractors import extractor_identity
from m2d.models.settings import PerceptualKind, Precision
from m2d.training.console import Console
from m2d.training.settings import TrainConfig

CATALOG = "cache/catalog.parquet"


@dataclass(frozen=True, kw_only=True, repr=False)  # Ray shows the text of what a trainer is given
class RunPlan:
    """What a worker needs to know. Small: it is sent to each."""

    config: TrainConfig
    experiment: Experiment
    world_size: int  # workers that the run was planned for; an elastic one may have fewer for a time
    train_images: int
    precision: Precision
    perceptual: PerceptualKind
    prepared: Path | None = None  # the folder where setup_data put decoded images, where it holds all of them
    features: Path | None = None  # the same for features
    extractor_key: str = ""

    @property
    def step_micro_batches(self) -> int:
        """Micro-batches an optimiser step, of all workers together and however many there are."""
        return self.config.gradient_accumulation_steps * self.world_size

    @property
    def global_batch(self) -> int:
        """Images an optimiser step."""
        return self.config.batch_size * self.step_micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training image has been seen once (under `natural`); the last one may straddle."""
        return -(-self.train_images // self.global_batch)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.config.epochs * self.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    @property
    def vae_warmup_steps(self) -> int:
        """Steps in which the VAE learns alone."""
        return round(self.config.schedule.vae_warmup_fraction * self.total_steps)

    @property
    def save_every(self) -> int:
        """Steps from checkpoint to checkpoint."""
        return self.config.saving.every_steps or self.steps_per_epoch

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` workers takes a step: more of them where workers are missing."""
        return -(-self.step_micro_batches // world_size)

    def micro_batches_from(self, step: int, world_size: int) -> tuple[int, int]:
        """(first micro-batch, number of micro-batches) of one of `world_size` workers from `step` to the end."""
        k = self.accumulation(world_size)
        return step * k, (self.total_steps - step) * k

    def reader(self, split: str) -> ImageReader:
        """Reads the images of a split."""
        config = self.config
        return ImageReader(
            self.catalog(split),
            config.checked_data_root,
            image_size=config.data.image_size,
            max_pixels=config.data.max_pixels,
            prepared=None if self.prepared is None else PreparedImages(self.prepared, config.data.image_size),
        )

    def feature_table(self, split: str) -> FeatureTable | None:
        """Cached features of a split: every view in which its images are shown."""
        if self.features is None:
            return None
        store = FeatureStore(self.features, self.extractor_key, self.config.data.image_size)
        return store.table(self.catalog(split)["sha256"].to_pylist(), self.views(split))

    def views(self, split: str) -> int:
        """How many views of an image of a split are shown: one of validation images."""
        return self.config.data.views if split == "train" else 1

    def order(self, reader: ImageReader) -> StreamOrder:
        """The order of the training stream."""
        data = self.config.data
        return StreamOrder(reader.labels, balance=data.balance, views=data.views, seed=self.config.seed)

    def class_counts(self, split: str) -> dict[str, int]:
        """Images of each class code in a split."""
        return class_counts(self.catalog(split))

    def pictures_due(self, step: int) -> set[str]:
        """Of `reconstructions`, `samples`, `features`, what is drawn after `step` steps: by epochs, and at the end."""
        telemetry = self.config.telemetry
        if not telemetry.pictures:
            return set()
        every = {
            "reconstructions": telemetry.reconstructions_every_epochs,
            "samples": telemetry.samples_every_epochs,
            "features": telemetry.features_every_epochs,
        }
        due = {
            kind
            for kind, epochs in every.items()
            if step == self.total_steps or (epochs and step % (epochs * self.steps_per_epoch) == 0)
        }
        # Before the U-Net has learnt anything its samples are noise.
        return due if step > self.vae_warmup_steps or self.config.stage != "joint" else due & {"reconstructions"}

    def catalog(self, split: str) -> pa.Table:
        """The experiment's catalog rows of a split."""
        catalog = read_catalog(str(Path(self.experiment.path) / CATALOG))
        return catalog.filter(pc.equal(catalog["split"], split))


def run_catalog(config: TrainConfig, experiment: Experiment, data_root: str, console: Console) -> pa.Table:
    """The run's catalog: its own on resuming, setup_data's where that still holds, or a scan's. Raises DataError."""
    path = str(experiment.path / CATALOG)
    if Path(path).is_file():
        return read_catalog(path)
    folder = prepared_folder(config.cache_dir, data_root)
    prepared = reusable_catalog(folder, data_root, config.data)
    if prepared is not None:
        console.say(f"catalog: from {folder}, whose scan was of the same files")
        rejected, duplicates = (pa_csv.read_csv(folder / name) for name in ("rejected.csv", "duplicates.csv"))
        scan = Scan(prepared, rejected, duplicates)
    else:
        with progress("scan", stderr=False) as shown:
            scan = scan_dataset(data_root, config.data, shown.show)
    write_catalog(scan.catalog, path)
    if len(scan.rejected):
        listed = str(experiment.path / "cache" / "rejected.csv")
        write_csv(scan.rejected, listed)
        for row in scan.rejected.slice(0, 10).to_pylist():
            console.say(f"rejected: {row['path']}: {row['reason']}")
        console.say(f"rejected {len(scan.rejected)} files; all of them with reasons: {listed}")
    if len(scan.duplicates):
        console.say(f"left out {len(scan.duplicates)} exact duplicates")
    counts = {split: class_counts(scan.catalog, split) for split in ("train", "val", "test")}
    experiment.update_info(
        dataset={
            "root": data_root,
            "images": len(scan.catalog),
            "rejected": len(scan.rejected),
            "duplicates": len(scan.duplicates),
            "sha256": catalog_hash(scan.catalog),
            "counts": counts,
        }
    )
    return scan.catalog


def prepared_parts(config: TrainConfig, experiment: Experiment, catalog: pa.Table, console: Console) -> dict[str, Any]:
    """The plan's entries for what setup_data made: used where it is complete, reported where it is not."""
    folder, size = prepared_folder(config.cache_dir, config.checked_data_root), config.data.image_size
    key, sha256 = extractor_identity(config.feature_extractor)
    experiment.update_info(feature_extractor={"key": key, "weights_sha256": sha256})
    if not folder.is_dir():  # asking for a million images takes 160 MB
        return {"extractor_key": key}
    found: dict[str, Any] = {}
    if not PreparedImages(folder, size).missing(catalog["sha256"].to_pylist()).any():
        found["prepared"] = folder
    store = FeatureStore(folder, key, size)
    train, val = (catalog["sha256"].filter(pc.equal(catalog["split"], split)).to_pylist() for split in ("train", "val"))
    missing = np.concatenate([store.missing(train, config.data.views).ravel(), store.missing(val, 1).ravel()])
    if not missing.any():
        found["features"] = folder
    elif not missing.all():
        console.warn(
            f"the cache in {folder} lacks {missing.sum():,} of {len(missing):,} image views of {key}, so the extractor "
            "runs in every step; jobs/setup_data.py --features with this run's settings completes it"
        )
    if found:
        what = " and ".join({"prepared": "images", "features": f"features ({key})"}[name] for name in found)
        console.say(f"prepared {what}: from {folder}")
    return {**found, "extractor_key": key}
