"""The pictures of a run: reconstructions, samples, and what the feature extractor sees. The first worker makes them.

Every picture is of the same images and the same seeds each time, so that what changes is the model. Nothing here draws
from torch's global random state: a run with pictures takes the steps of a run without.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from m2d.classes import CLASSES, class_index
from m2d.data.reader import ImageReader
from m2d.diffusion.interpolant import interpolate
from m2d.generation.contact_sheet import contact_sheet
from m2d.models.autoencoder import from_uint8, to_uint8
from m2d.models.checkpoint import CheckpointInfo
from m2d.plots.charts import class_similarity, cls_projection, gradient_histogram
from m2d.plots.tiles import alignment_map, patch_pca, reconstruction_grid
from m2d.training.features import FeatureSource, spread_over_classes
from m2d.training.losses import psnr
from m2d.training.measure import GradientStatistics
from m2d.training.step import extract
from m2d.training.telemetry import Telemetry
from m2d.training.validation import SEED, RunState, fixed_noise

logger = logging.getLogger(__name__)

REAL_IMAGES = 512  # validation images among which generated ones are placed
ALIGNMENT_TIME = 0.5  # t at which tokens are compared, half noise


class Visuals:
    """Draws a run's networks as they are when it is asked."""

    def __init__(self, state: RunState, validation: tuple[ImageReader, FeatureSource] | None) -> None:
        """validation: None where the run has no validation images."""
        self.state, self.validation = state, validation
        self.plan, self.networks, self.device = state.plan, state.networks, state.device
        self._real: np.ndarray | None = None  # cls features of real images, the same each time

    def show(self, telemetry: Telemetry, info: CheckpointInfo, kinds: set[str]) -> None:
        """Make and keep the pictures asked for: of `reconstructions`, `samples`, `features`.

        A picture that cannot be made, as of a model that gives no numbers yet, is logged and left out.
        """

        def attempt(kind: str, make: Callable[[], None]) -> None:
            try:
                make()
            except Exception as error:  # hours of training are worth more than a picture
                logger.warning("the %s of step %d are left out: %s", kind, info.step, error, exc_info=True)

        if "reconstructions" in kinds and self.validation is not None:
            attempt("reconstructions", lambda: self._reconstructions(telemetry, info.step))
        if kinds & {"samples", "features"}:
            generated: list[tuple[np.ndarray, np.ndarray]] = []
            attempt("samples", lambda: generated.append(self._samples(telemetry, info)))
            if "features" in kinds and self.validation is not None and generated:
                attempt("feature pictures", lambda: self._features(telemetry, info.step, *generated[0]))

    @torch.no_grad()
    def _reconstructions(self, telemetry: Telemetry, step: int) -> None:
        pixels, labels, _ = self._shown()
        targets = from_uint8(pixels)
        decode = self.networks.autoencoder.decode
        size = self.plan.config.batch_size
        parts = [decode(latents).float().clamp(-1, 1) for latents in self._latents(targets).split(size)]
        reconstructed = torch.cat(parts)
        decibels = psnr(reconstructed, targets).cpu().numpy()
        grid = reconstruction_grid(_arrays(pixels), to_uint8(reconstructed), labels, decibels, step=step)
        telemetry.picture(step, "reconstructions", grid, f"mean PSNR {decibels.mean():.2f} dB")

    def _samples(self, telemetry: Telemetry, info: CheckpointInfo) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [M, H, W, 3] and labels [M], those that jobs/generate.py would make with these settings."""
        counts = self.plan.class_counts("train")
        wanted = {code: self.plan.config.telemetry.samples_per_class for code in CLASSES if counts[code]}
        images, labels = self.state.samples(info, wanted)
        sampling = self.state.sampling
        sheet = contact_sheet(
            {code: images[labels == class_index(code)] for code in wanted},
            title=f"Samples at step {info.step:,}",
            caption=f"Averaged U-Net, {sampling.solver}, {sampling.steps} steps, guidance {sampling.guidance_scale:g}; "
            "the same seeds each time.",
        )
        telemetry.picture(info.step, "samples", sheet, f"step {info.step}")
        return images, labels

    @torch.no_grad()
    def _features(self, telemetry: Telemetry, step: int, generated: np.ndarray, generated_labels: np.ndarray) -> None:
        extractor = self.state.extractor()
        pixels, labels, shown = self._shown()
        images, features = _arrays(pixels), extract(extractor, pixels)
        patches = features.patches.cpu().numpy()
        grid = round(patches.shape[1] ** 0.5)
        if grid**2 == patches.shape[1]:  # a network with register tokens, say, has no such picture
            telemetry.picture(step, "patch_features", patch_pca(images, patches, labels))
            cosine = self._cosine(pixels, labels, shown, features.cls, features.patches)
            maps = cosine.reshape(len(images), grid, grid)
            telemetry.picture(step, "alignment", alignment_map(images, maps, labels), f"mean {cosine.mean():.3f}")
        reader, source = self._required_validation()
        rows = spread_over_classes(reader.labels, REAL_IMAGES, SEED)
        if self._real is None:
            self._real = self.state.real_cls(extractor, reader, source, rows)
        real, real_labels = self._real, reader.labels[rows]
        cls = self.state.cls(extractor, generated)
        telemetry.picture(step, "feature_projection", cls_projection(real, real_labels, cls, generated_labels))
        picture, numbers = class_similarity(real, real_labels, cls, generated_labels)
        telemetry.picture(step, "class_similarity", picture)
        flat = {f"features/{code}/{name}": value for code, row in numbers.items() for name, value in row.items()}
        telemetry.scalars("features", step, flat)

    def _cosine(self, pixels: Tensor, labels: np.ndarray, rows: np.ndarray, cls: Tensor, patches: Tensor) -> np.ndarray:
        """[N, P]: cosine of every token of the tapped block, projected, with the extractor's patch."""
        averaged, networks = self.state.averaged, self.networks
        clean = averaged.normalize(self._latents(from_uint8(pixels)))
        _, noise = fixed_noise(rows, clean)
        t = torch.full((len(clean),), ALIGNMENT_TIME, device=self.device)
        context = averaged.context(torch.from_numpy(labels).to(self.device), cls)
        tapped = averaged.tapped(interpolate(clean, noise, t), t, context, self.plan.config.alignment.tap)
        predicted = networks.projector(tapped, patches.shape[1])
        return F.cosine_similarity(predicted.float(), patches, dim=-1).cpu().numpy()

    def _latents(self, images: Tensor) -> Tensor:
        """The posterior means [N, C, h, w] of images [N, 3, H, W] in [-1, 1], in the run's batches."""
        encode = self.networks.autoencoder.encode
        return torch.cat([encode(part).mean for part in images.split(self.plan.config.batch_size)])

    def _shown(self) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """The validation images that every picture shows: uint8 [N, 3, H, W] on the device, labels, rows."""
        reader, _ = self._required_validation()
        rows = spread_over_classes(reader.labels, self.plan.config.telemetry.images, SEED)
        read = reader.read(rows, np.zeros(len(rows), dtype=np.int8))
        return torch.from_numpy(read["images"]).to(self.device).permute(0, 3, 1, 2), read["labels"], rows

    def _required_validation(self) -> tuple[ImageReader, FeatureSource]:
        assert self.validation is not None, "the run has no validation images"
        return self.validation


def show_gradients(telemetry: Telemetry, step: int, found: GradientStatistics, picture: bool) -> None:
    """Norms as scalars, histograms to the sinks, and both in metrics/gradients.jsonl."""
    record = {f"gradient_norm/{name}": norm for name, norm in found.norms.items()}
    record |= {f"gradient_zeros/{name}": share for name, share in found.zeros.items()}
    telemetry.scalars("gradients", step, record)
    for name, counts in found.histograms.items():
        telemetry.histogram(step, f"gradient_histogram/{name}", counts, found.edges)
    if picture:
        counted = {name: (counts, found.edges) for name, counts in found.histograms.items()}
        telemetry.picture(step, "gradients", gradient_histogram(counted, step=step))


def _arrays(pixels: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] of uint8 [N, 3, H, W]."""
    array: np.ndarray = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array
