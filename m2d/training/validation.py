"""A run looked at between its steps: validation on fixed images, samples and what measures them, and pictures.

Everything is of the same images and the same seeds each time, so that what changes is the model. Nothing here knows a
loss weight or draws from torch's global random state: a run with pictures takes the steps of a run without.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2d.data.catalog import class_counts
from m2d.data.reader import ImageReader
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import M2DError
from m2d.generation.contact_sheet import contact_sheet
from m2d.generation.generator import Generator, pick_feature
from m2d.generation.plan import rows_of, standard_plan
from m2d.metrics.distances import kernel_distance
from m2d.metrics.neighbours import Standardizer, at_least_part_of_median
from m2d.models.autoencoder import from_uint8, to_uint8
from m2d.models.checkpoint import Checkpoint, CheckpointInfo
from m2d.models.extractors import FeatureExtractor
from m2d.models.unet import Denoiser
from m2d.plots.charts import class_similarity, cls_projection, gradient_histogram
from m2d.plots.tiles import alignment_map, patch_pca, reconstruction_grid
from m2d.training.batch import extract
from m2d.training.features import FeatureSource, read_pixels, spread_over_classes
from m2d.training.losses import psnr
from m2d.training.measure import EDGES, GradientStatistics
from m2d.training.networks import Networks, all_reduce_sum, build_extractor
from m2d.training.run import RunPlan
from m2d.training.telemetry import Telemetry

logger = logging.getLogger(__name__)
SEED = 20261122  # of the choice of images and of their noise
LEAST = 3  # images on a side, below which no unbiased kernel distance exists
REAL_IMAGES = 512  # validation images among which generated ones are placed
ALIGNMENT_TIME = 0.5  # t at which tokens are compared, half noise


@dataclass
class RunView:
    """A run's networks as they are at the moment, looked at on its validation images."""

    plan: RunPlan
    networks: Networks
    averaged: Denoiser  # the U-Net that generates
    prior: FeaturePrior
    perceptual: nn.Module
    reader: ImageReader | None  # of the validation images; None: the run has none
    source: FeatureSource  # of their features
    _real: dict[bytes, np.ndarray] = field(default_factory=dict)  # their cls features by rows, the same each time

    def __post_init__(self) -> None:
        config = self.plan.config
        self.device, self.batch_size = self.source.device, config.batch_size
        steps, scale = config.telemetry.sample_steps, config.telemetry.guidance_scale
        self.sampling = SamplingSettings(steps=steps, guidance_scale=scale)

    @torch.no_grad()
    def validate(self, rank: int, world_size: int) -> dict[str, float]:
        """Means over the validation images of all workers; equal on every worker, {} without images.

        val/psnr_db and val/perceptual: reconstructions from the posterior's mean. val/velocity_mse: the averaged
        denoiser at fixed times and noise, guided by class and feature.
        """
        averaged, autoencoder, device = self.averaged, self.networks.autoencoder, self.device
        if self.reader is None:
            return {}
        chosen = np.random.default_rng(SEED).permutation(len(self.reader))[: self.plan.config.saving.validation_images]
        rows = np.sort(chosen)[rank::world_size]
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for start in range(0, len(rows), self.batch_size):
            share = rows[start : start + self.batch_size]
            pixels, shown = read_pixels(self.reader, share, device)
            labels = torch.from_numpy(self.reader.labels[share]).to(device)
            targets = from_uint8(pixels)
            latents = autoencoder.encode(targets).mean
            reconstructed = autoencoder.decode(latents).float().clamp(-1, 1)
            clean = averaged.normalize(latents)
            t, noise = fixed_noise(share, clean)
            context = averaged.context(labels, self.source.cls_of(pixels, shown))
            velocity = averaged.velocity(interpolate(clean, noise, t), t, context)
            error = (velocity - velocity_target(clean, noise)).square().flatten(1).mean(dim=1)
            distance = self.perceptual(reconstructed, targets)
            sums += torch.stack(
                [psnr(reconstructed, targets).sum(), distance.sum(), error.sum(), error.new_tensor(float(len(share)))]
            ).double()
        *totals, count = all_reduce_sum(sums).tolist()
        names = ("val/psnr_db", "val/perceptual", "val/velocity_mse")
        return {name: total / count for name, total in zip(names, totals, strict=True)} if count else {}

    def sample_quality(self, info: CheckpointInfo) -> dict[str, float]:
        """Kernel distance between as many generated as validation images of each class, and its standard error.

        {} where images are too few or none can be made.
        """
        wanted = self.plan.config.saving.validation_samples
        if self.reader is None or len(rows := rows_of_each_class(self.reader.labels, wanted)) < LEAST:
            return {}
        found, counts = np.unique(self.reader.labels[rows], return_counts=True)
        try:
            images, _ = self.samples(
                info, {self.plan.classes.codes[label]: int(n) for label, n in zip(found, counts, strict=True)}
            )
            extractor = self.extractor()
            real, generated = self.real_cls(extractor, rows).astype(np.float64), self.cls(extractor, images)
        except M2DError as error:
            logger.warning("no kernel distance at step %d: %s", info.step, error)
            return {}
        except torch.OutOfMemoryError:  # no reason to end the run
            message = "no kernel distance at step %d: samples in batches of %d do not fit into memory beside the run"
            logger.warning(f"{message}; lower batch_size", info.step, self.batch_size)
            return {}
        standard = Standardizer.of(real, at_least_part_of_median)
        distance = kernel_distance(standard(generated), standard(real))
        return {"val/kernel_distance": distance.value, "val/kernel_distance_se": distance.standard_error}

    def samples(self, info: CheckpointInfo, counts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """counts[code] images of each class: uint8 [M, H, W, 3] and labels [M], from the same seeds each time.

        Raises an M2DError where the model gives no numbers, or the prior knows no image of a class, and torch's
        OutOfMemoryError where the run's batch size fits its step but not its samples.
        """
        # A copy: the generator lays weights out in memory as it likes, and the optimiser's moments would not follow.
        autoencoder = copy.deepcopy(self.networks.autoencoder)
        checkpoint = Checkpoint("this run", "", info, autoencoder, self.averaged, self.prior)
        seed, feature = self.plan.config.seed, pick_feature(None, checkpoint)
        rows = rows_of(standard_plan(counts, run_seed=seed, sampling=self.sampling, feature=feature))
        device, precision = str(self.device), self.plan.precision
        generator = Generator(checkpoint, batch_size=self.batch_size, device=device, mixed_precision=precision)
        return generator.generate(rows), np.array([self.plan.classes.index(row.label) for row in rows])

    def cls(self, extractor: FeatureExtractor, images: np.ndarray) -> np.ndarray:
        """cls features float32 [N, D] of images uint8 [N, H, W, 3]."""
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(self.batch_size)
        return torch.cat([extract(extractor, part.to(self.device)).cls.cpu() for part in parts]).numpy()

    def real_cls(self, extractor: FeatureExtractor, rows: np.ndarray) -> np.ndarray:
        """The same of validation images, from the cache where it holds them; computed once."""
        assert self.reader is not None
        key = rows.tobytes()
        if key not in self._real:
            if self.source.table is not None:
                self._real[key] = self.source.cls(self.reader, rows).cpu().numpy()
            else:
                read = self.reader.read(rows, np.zeros(len(rows), dtype=np.int8))
                self._real[key] = self.cls(extractor, read["images"])
        return self._real[key]

    def extractor(self) -> FeatureExtractor:
        """The run's, or where all its features are cached, one for the moment: generated images are in no cache."""
        if self.networks.extractor is not None:
            return self.networks.extractor
        state = torch.get_rng_state()  # building a network draws from it
        try:
            return build_extractor(self.plan.config.feature_extractor).to(self.device)
        finally:
            torch.set_rng_state(state)

    def show(self, telemetry: Telemetry, info: CheckpointInfo, kinds: set[str]) -> None:
        """Make and keep the pictures asked for: of `reconstructions`, `samples`, `features`.

        A picture that cannot be made, as of a model that gives no numbers yet, is logged and left out.
        """

        def attempt(kind: str, make: Callable[[], None]) -> None:
            try:
                make()
            except Exception as error:  # hours of training are worth more than a picture
                logger.warning("the %s of step %d are left out: %s", kind, info.step, error, exc_info=True)

        if "reconstructions" in kinds and self.reader is not None:
            attempt("reconstructions", lambda: self._reconstructions(telemetry, info.step))
        if kinds & {"samples", "features"}:
            generated: list[tuple[np.ndarray, np.ndarray]] = []
            attempt("samples", lambda: generated.append(self._samples(telemetry, info)))
            if "features" in kinds and self.reader is not None and generated:
                attempt("feature pictures", lambda: self._features(telemetry, info.step, *generated[0]))

    @torch.no_grad()
    def _reconstructions(self, telemetry: Telemetry, step: int) -> None:
        images, pixels, labels, _ = self._shown
        targets = from_uint8(pixels)
        parts = self._latents(targets).split(self.batch_size)
        reconstructed = torch.cat([self.networks.autoencoder.decode(part).float().clamp(-1, 1) for part in parts])
        decibels = psnr(reconstructed, targets).cpu().numpy()
        grid = reconstruction_grid(
            images, to_uint8(reconstructed), labels, decibels, step=step, classes=self.plan.classes
        )
        telemetry.picture(step, "reconstructions", grid, f"mean PSNR {decibels.mean():.2f} dB")

    def _samples(self, telemetry: Telemetry, info: CheckpointInfo) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [M, H, W, 3] and labels [M], those that jobs/generate.py would make with these settings."""
        counts = class_counts(self.plan.catalog("train"))
        wanted = {code: self.plan.config.telemetry.samples_per_class for code in counts if counts[code]}
        images, labels = self.samples(info, wanted)
        sampling = self.sampling
        sheet = contact_sheet(
            {code: images[labels == self.plan.classes.index(code)] for code in wanted},
            title=f"Samples at step {info.step:,}",
            caption=f"Averaged U-Net, {sampling.solver}, {sampling.steps} steps, guidance {sampling.guidance_scale:g}; "
            "the same seeds each time.",
            classes=self.plan.classes,
        )
        telemetry.picture(info.step, "samples", sheet, f"step {info.step}")
        return images, labels

    @torch.no_grad()
    def _features(self, telemetry: Telemetry, step: int, generated: np.ndarray, generated_labels: np.ndarray) -> None:
        picture, extractor, classes = telemetry.picture, self.extractor(), self.plan.classes
        images, pixels, labels, _ = self._shown
        features = extract(extractor, pixels)
        grid = round(features.patches.shape[1] ** 0.5)
        if grid**2 == features.patches.shape[1]:  # a network with register tokens, say, has no such picture
            picture(step, "patch_features", patch_pca(images, features.patches.cpu().numpy(), labels, classes))
            cosine = self._cosine(features.cls, features.patches)
            maps = cosine.reshape(len(images), grid, grid)
            picture(step, "alignment", alignment_map(images, maps, labels, classes), f"mean {cosine.mean():.3f}")
        assert self.reader is not None
        rows = spread_over_classes(self.reader.labels, REAL_IMAGES, SEED)
        real = self.real_cls(extractor, rows)
        compared = (real, self.reader.labels[rows], self.cls(extractor, generated), generated_labels)
        picture(step, "feature_projection", cls_projection(*compared, classes))
        similarity, numbers = class_similarity(*compared, classes)
        picture(step, "class_similarity", similarity)
        flat = {f"features/{code}/{name}": value for code, row in numbers.items() for name, value in row.items()}
        telemetry.scalars("features", step, flat)

    def _cosine(self, cls: Tensor, patches: Tensor) -> np.ndarray:
        """[N, P]: cosine of every token of the tapped block, projected, with the extractor's patch."""
        averaged, (_, pixels, labels, rows) = self.averaged, self._shown
        clean = averaged.normalize(self._latents(from_uint8(pixels)))
        _, noise = fixed_noise(rows, clean)
        t = torch.full((len(clean),), ALIGNMENT_TIME, device=self.device)
        context = averaged.context(torch.from_numpy(labels).to(self.device), cls)
        tapped = averaged.tapped(interpolate(clean, noise, t), t, context, self.plan.config.alignment.tap)
        predicted = self.networks.projector(tapped, patches.shape[1])
        return F.cosine_similarity(predicted.float(), patches, dim=-1).cpu().numpy()

    def _latents(self, images: Tensor) -> Tensor:
        """The posterior means [N, C, h, w] of images [N, 3, H, W] in [-1, 1], in the run's batches."""
        encode = self.networks.autoencoder.encode
        return torch.cat([encode(part).mean for part in images.split(self.batch_size)])

    @cached_property
    def _shown(self) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
        """The validation images that every picture shows, uint8 [N, H, W, 3] and [N, 3, H, W] there; labels, rows."""
        assert self.reader is not None
        rows = spread_over_classes(self.reader.labels, self.plan.config.telemetry.images, SEED)
        pixels, _ = read_pixels(self.reader, rows, self.device)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), pixels, self.reader.labels[rows], rows


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


def rows_of_each_class(labels: np.ndarray, images: int) -> np.ndarray:
    """Rows int64, ascending: of every class there the same number, or all it has; at most `images`."""
    present = np.unique(labels)
    share = images // max(len(present), 1)
    order = np.random.default_rng(SEED).permutation(len(labels))
    chosen = [order[labels[order] == label][:share] for label in present]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def show_gradients(telemetry: Telemetry, step: int, found: GradientStatistics, picture: bool) -> None:
    """Norms as scalars, histograms to the sinks, and both in metrics/gradients.jsonl."""
    record = {f"gradient_norm/{name}": norm for name, norm in found.norms.items()}
    record |= {f"gradient_zeros/{name}": share for name, share in found.zeros.items()}
    telemetry.scalars("gradients", step, record)
    for name, counts in found.histograms.items():
        telemetry.histogram(step, f"gradient_histogram/{name}", counts, EDGES)
    if picture:
        counted = {name: (counts, EDGES) for name, counts in found.histograms.items()}
        telemetry.picture(step, "gradients", gradient_histogram(counted, step=step))
