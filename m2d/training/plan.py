"""The arithmetic of a run, worked out once by the driver and handed to every worker."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from m2d.config import TrainConfig
from m2d.data.catalog import class_counts, read_catalog
from m2d.data.features import FeatureStore, FeatureTable
from m2d.data.order import StreamOrder
from m2d.data.reader import ImageReader
from m2d.data.store import PreparedImages
from m2d.experiment import Experiment
from m2d.models.settings import PerceptualKind, Precision

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
    def steps_without_features(self) -> int:
        """Steps at the start that need no features of their images."""
        return self.total_steps if self.config.stage == "decoder" else self.vae_warmup_steps

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
            prepared=None if self.prepared is None else PreparedImages.open(self.prepared, config.data.image_size),
        )

    def feature_table(self, split: str) -> FeatureTable | None:
        """Cached features of a split: every view in which its images are shown."""
        if self.features is None:
            return None
        store = FeatureStore.open(self.features, self.extractor_key, self.config.data.image_size)
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
