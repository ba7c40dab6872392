"""Validation on fixed images, sharded over the workers, and samples of the run. No measure knows a loss weight."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from m2d.classes import CLASSES, class_index
from m2d.data.reader import ImageReader
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import M2DError
from m2d.generation.generator import Generator, pick_feature
from m2d.generation.plan import rows_of, standard_plan
from m2d.metrics.distances import kernel_distance
from m2d.metrics.neighbours import Standardizer, at_least_part_of_median
from m2d.models.autoencoder import from_uint8
from m2d.models.checkpoint import Checkpoint, CheckpointInfo
from m2d.models.extractors import FeatureExtractor
from m2d.models.unet import Denoiser
from m2d.training.features import FeatureSource
from m2d.training.losses import psnr
from m2d.training.networks import build_extractor
from m2d.training.run_plan import RunPlan
from m2d.training.step import Networks, extract
from m2d.training.update import all_reduce_sum

SEED = 20261122  # of the choice of images and of their noise


@torch.no_grad()
def validate(
    networks: Networks,
    averaged: Denoiser,
    perceptual: nn.Module,
    reader: ImageReader,
    source: FeatureSource,
    *,
    images: int,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Means over the validation images of all workers.

    val/psnr_db and val/perceptual: reconstructions from the posterior's mean. val/velocity_mse: the averaged denoiser
    at fixed times and noise, guided by class and feature. Every worker returns the same numbers; {} without images.
    """
    rows = np.sort(np.random.default_rng(SEED).permutation(len(reader))[:images])[rank::world_size]
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    autoencoder = networks.autoencoder
    for start in range(0, len(rows), batch_size):
        share = rows[start : start + batch_size]
        read = reader.read(share, np.zeros(len(share), dtype=np.int8))
        pixels = torch.from_numpy(read["images"]).to(device).permute(0, 3, 1, 2)
        labels = torch.from_numpy(read["labels"]).to(device)
        targets = from_uint8(pixels)
        latents = autoencoder.encode(targets).mean
        reconstructed = autoencoder.decode(latents).float().clamp(-1, 1)
        clean = averaged.normalize(latents)
        t, noise = fixed_noise(share, clean)
        cls = source.cls_of(pixels, read["catalog_rows"])
        velocity = averaged.velocity(interpolate(clean, noise, t), t, averaged.context(labels, cls))
        error = (velocity - velocity_target(clean, noise)).square().flatten(1).mean(dim=1)
        distance = perceptual(reconstructed, targets)
        sums += torch.stack(
            [psnr(reconstructed, targets).sum(), distance.sum(), error.sum(), error.new_tensor(float(len(share)))]
        ).double()
    total = all_reduce_sum(sums).tolist()
    if total[3] == 0:
        return {}
    names = ("val/psnr_db", "val/perceptual", "val/velocity_mse")
    return {name: value / total[3] for name, value in zip(names, total[:3], strict=True)}


def score(measures: dict[str, float], stage: str) -> float:
    """What `best` minimises: the perceptual distance of reconstructions where the VAE learns, or the velocity error.

    Neither knows the loss weights. The latents move in the joint stage, so velocity errors of two moments of it do not
    compare.
    """
    return measures.get("val/velocity_mse" if stage == "latent" else "val/perceptual", float("inf"))


def fixed_noise(rows: np.ndarray, clean: Tensor) -> tuple[Tensor, Tensor]:
    """A time and a noise for each image, by its row: the same whoever evaluates it, whenever."""
    generators = [torch.Generator().manual_seed(SEED + int(row)) for row in rows]
    t = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
    return t.to(clean.device), noise.to(clean.device)


@dataclass(frozen=True)
class RunState:
    """A run's networks as they are at the moment, on their device."""

    plan: RunPlan
    networks: Networks
    averaged: Denoiser  # the U-Net that generates
    prior: FeaturePrior
    device: torch.device

    @property
    def sampling(self) -> SamplingSettings:
        """How samples are drawn during a run."""
        settings = self.plan.config.telemetry
        return SamplingSettings(steps=settings.sample_steps, guidance_scale=settings.guidance_scale)

    def samples(self, info: CheckpointInfo, counts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """counts[code] images of each class: uint8 [M, H, W, 3] and labels [M], from the same seeds each time.

        Raises an M2DError where the model gives no numbers, or the prior knows no image of a class, and torch's
        OutOfMemoryError where the run's batch size fits its step but not its samples.
        """
        # A copy: the generator lays weights out in memory as it likes, and the optimiser's moments would not follow.
        autoencoder = copy.deepcopy(self.networks.autoencoder)
        checkpoint = Checkpoint("this run", "", info, autoencoder, self.averaged, self.prior)
        table = standard_plan(
            counts, run_seed=self.plan.config.seed, sampling=self.sampling, feature=pick_feature(None, checkpoint)
        )
        rows = rows_of(table)
        generator = Generator(
            checkpoint,
            batch_size=self.plan.config.batch_size,
            device=str(self.device),
            mixed_precision=self.plan.precision,
        )
        return generator.generate(rows), np.array([class_index(row.label) for row in rows])

    def cls(self, extractor: FeatureExtractor, images: np.ndarray) -> np.ndarray:
        """cls features float32 [N, D] of images uint8 [N, H, W, 3]."""
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(self.plan.config.batch_size)
        return torch.cat([extract(extractor, part.to(self.device)).cls.cpu() for part in parts]).numpy()

    def real_cls(
        self, extractor: FeatureExtractor, reader: ImageReader, source: FeatureSource, rows: np.ndarray
    ) -> np.ndarray:
        """The same of a split's rows, from the cache where it holds them."""
        if source.table is not None:
            return source.cls(reader, rows).cpu().numpy()
        return self.cls(extractor, reader.read(rows, np.zeros(len(rows), dtype=np.int8))["images"])

    def extractor(self) -> FeatureExtractor:
        """The run's, or where all its features are cached, one for the moment: generated images are in no cache."""
        if self.networks.extractor is not None:
            return self.networks.extractor
        state = torch.get_rng_state()  # building a network draws from it
        try:
            return build_extractor(self.plan.config.feature_extractor).to(self.device)
        finally:
            torch.set_rng_state(state)


logger = logging.getLogger(__name__)
LEAST = 3  # images on a side, below which no unbiased kernel distance exists


class SampleQuality:
    """Kernel distance between as many generated as validation images of each class."""

    def __init__(self, state: RunState, reader: ImageReader, source: FeatureSource, images: int) -> None:
        """images: generated ones at most, shared evenly by the classes that validation images are of."""
        self.state, self.reader, self.source = state, reader, source
        self.rows = rows_of_each_class(reader.labels, images)
        self._real: np.ndarray | None = None

    def measure(self, info: CheckpointInfo) -> dict[str, float]:
        """`val/kernel_distance` and its standard error; {} where images are too few or none can be made."""
        if len(self.rows) < LEAST:
            return {}
        try:
            return self._measured(info)
        except M2DError as error:
            logger.warning("no kernel distance at step %d: %s", info.step, error)
        except torch.OutOfMemoryError:  # no reason to end the run
            size, device = self.state.plan.config.batch_size, self.state.device
            logger.warning(
                "no kernel distance at step %d: samples in batches of %d do not fit the memory of %s beside the run; "
                "lower batch_size", info.step, size, device,
            )  # fmt: skip
        return {}

    def _measured(self, info: CheckpointInfo) -> dict[str, float]:
        labels = self.reader.labels[self.rows]
        counts = {CLASSES[label]: int((labels == label).sum()) for label in np.unique(labels)}
        images, _ = self.state.samples(info, counts)
        extractor = self.state.extractor()
        if self._real is None:
            self._real = self.state.real_cls(extractor, self.reader, self.source, self.rows).astype(np.float64)
        real, generated = self._real, self.state.cls(extractor, images).astype(np.float64)
        standard = Standardizer.of(real, at_least_part_of_median)
        distance = kernel_distance(standard(generated), standard(real))
        return {"val/kernel_distance": distance.value, "val/kernel_distance_se": distance.standard_error}


def rows_of_each_class(labels: np.ndarray, images: int) -> np.ndarray:
    """Rows int64, ascending: of every class there the same number, or all it has; at most `images`."""
    present = np.unique(labels)
    share = images // max(len(present), 1)
    order = np.random.default_rng(SEED).permutation(len(labels))
    chosen = [order[labels[order] == label][:share] for label in present]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
