"""Rows of a plan in, uint8 images out, on one device. Runs without Ray: a driver, an actor or a notebook holds one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from m2d.classes import NUM_CLASSES, class_index
from m2d.diffusion.settings import Solver
from m2d.diffusion.solver import GuidedVelocity, solve
from m2d.errors import CheckpointError, ConfigError
from m2d.generation.plan import GuidingFeature, PlanRow
from m2d.generation.references import read_reference, require_dim
from m2d.generation.seeds import feature_seed, noise_for, slerp
from m2d.generation.settings import CompileMode
from m2d.models.autoencoder import coded_at_once, from_uint8, to_uint8
from m2d.models.precision import DTYPES, pick_precision
from m2d.models.unet import Denoiser

if TYPE_CHECKING:
    from m2d.models.checkpoint import Checkpoint
    from m2d.models.extractors import FeatureExtractor
    from m2d.models.settings import Precision

NetworkT = TypeVar("NetworkT", bound=nn.Module)
_REFERENCES_KEPT = 4096  # latents and features of so many input images; about 100 MB at 256 pixels


class Generator:
    """A checkpoint on a device, ready to draw. Loading happens once; `generate` may be called any number of times.

    `generate` is `batches`, then `denoise` and `decode` for each batch; call those to overlap them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batch_size: int = 32,
        device: str | None = None,
        mixed_precision: Precision | None = None,
        extractor: FeatureExtractor | None = None,
        compile: bool = False,  # noqa: A002 - the flag is called so
        compile_mode: CompileMode = "default",
    ) -> None:
        """Moves the checkpoint's networks, and the extractor, to the device; of the U-Net, in bf16 or fp16, a copy.

        None decides, see `pick_device` and `pick_precision`. extractor: for rows that a reference's feature guides, and
        for `features`; see load_reference_extractor. compile: torch.compile the U-Net, in torch's mode of that name,
        for runs of many batches; a batch that is not full is then filled up, so that no shape is compiled for it.
        Raises ConfigError for an extractor that is not the checkpoint's.
        """
        self.checkpoint = checkpoint
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.precision = pick_precision(mixed_precision, self.device)
        self._dtype = DTYPES[self.precision]
        self.denoiser = _placed(_with_unet_in(self._dtype, checkpoint.denoiser, self.device), self.device)
        self.autoencoder = _placed(checkpoint.autoencoder, self.device)
        if extractor is not None:
            require_dim(extractor, checkpoint)
        self.extractor = None if extractor is None else _placed(extractor, self.device)
        self._compiled = compile
        if compile:
            self.denoiser.unet.compile(mode=compile_mode, dynamic=False)  # two shapes: guided, which is twice, and not
        self._latents: OrderedDict[str, Tensor] = OrderedDict()
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def generate(self, rows: Sequence[PlanRow]) -> np.ndarray:
        """Images of the rows, uint8 [N, H, W, 3] RGB, in their order.

        Raises CheckpointError where the model gives something that is not a number, DataError for a class that the
        feature prior has no image of and for a reference that cannot be read, and ConfigError for a row that needs a
        prior or an extractor that is not there.
        """
        size = self.checkpoint.image_size
        images = np.empty((len(rows), size, size, 3), np.uint8)
        for batch in self.batches(rows):
            images[batch] = self.decode(self.denoise([rows[place] for place in batch]))
        return images

    def batches(self, rows: Sequence[PlanRow]) -> list[list[int]]:
        """Places in `rows` of each batch: at most `batch_size`, all of the same solver settings, in their order.

        Only settings that every sample of a batch must share divide: classes, modes, features and positions may mix.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(rows):
            start_time, steps = start_of(row)
            solver = (row.solver, steps, row.guidance_scale, row.guidance_low, row.guidance_high)
            alike.setdefault((start_time, *(solver if start_time else ())), []).append(place)  # at 0 no solver runs
        return [
            places[first : first + self.batch_size]
            for places in alike.values()
            for first in range(0, len(places), self.batch_size)
        ]

    @torch.inference_mode()
    def denoise(self, rows: Sequence[PlanRow]) -> Tensor:
        """Normalised latents at t = 0, float32 [B, C, h, w] on the device, of one of the `batches`."""
        row, wanted = rows[0], len(rows)
        start_time, steps = start_of(row)
        if start_time == 0:
            return self._start(rows, start_time)
        if self._compiled:
            rows = [*rows, *[rows[-1]] * (self.batch_size - wanted)]
        latents = self._start(rows, start_time)
        labels = torch.tensor([class_index(row.label) for row in rows])
        features = self._guiding_features(rows, labels)
        labels = labels.to(self.device)
        velocity = GuidedVelocity(
            self,
            self._context(labels, features).to(self._dtype),
            self.denoiser.context(torch.full_like(labels, NUM_CLASSES)).to(self._dtype),
            scale=row.guidance_scale,
            interval=(row.guidance_low, row.guidance_high),
        )
        end = solve(velocity, latents, steps=steps, solver=cast(Solver, row.solver), start_time=start_time)
        return end[:wanted]

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """d x_t / d t, [B, C, h, w] in x_t's type, by the U-Net in its own. context: [B, L, Dc], in the U-Net's type.

        t: float32 [B], as bf16 has no 999.3; the U-Net takes the sines of it in float32 before it converts them.
        """
        velocity = self.denoiser.velocity(x_t.to(self._dtype), t, context)
        # CUDA graphs, of two of the compile modes, write the next result to the same place.
        return velocity.to(x_t.dtype, copy=self._compiled)

    @torch.inference_mode()
    def encode(self, paths: Sequence[str]) -> Tensor:
        """Normalised latents, float32 [B, C, h, w] on the device: the posterior means of the images at `paths`.

        In full precision: one pass for each image costs little beside the steps. Kept for the next call.
        """

        def means(pixels: Tensor) -> Tensor:
            parts = pixels.split(coded_at_once(self.checkpoint.image_size))
            latents = torch.cat([self.autoencoder.encode(from_uint8(part)).mode() for part in parts])
            return self.denoiser.normalize(latents)

        return self._of_each(paths, self._latents, means)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 [B, H, W, 3] RGB of normalised latents [B, C, h, w], of a few at once: see coded_at_once.

        Raises CheckpointError where they are no image.
        """
        images = []
        for part in self.denoiser.denormalize(latents).split(coded_at_once(self.checkpoint.image_size)):
            # fp16 overflows in VAE decoders; one pass in full precision costs little beside the steps. bf16 by
            # autocast: its casts are made once, not in each step, and `encode` needs the same weights in float32.
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                decoded = self.autoencoder.decode(part).float()
            if not torch.isfinite(decoded).all():
                raise CheckpointError(
                    f"{self.checkpoint.path}: the model's images are not finite numbers (precision {self.precision}); "
                    "try --mixed_precision no, or an earlier checkpoint"
                )
            images.append(to_uint8(decoded))
        return np.concatenate(images)

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """The extractor's cls features, float32 [N, D], of images uint8 [N, H, W, 3], in batches of `batch_size`."""
        extractor = self._required_extractor()
        parts = [
            self._cls(torch.from_numpy(images[first : first + self.batch_size]).to(self.device).permute(0, 3, 1, 2))
            for first in range(0, len(images), self.batch_size)
        ]
        return torch.cat(parts).cpu().numpy() if parts else np.empty((0, extractor.dim), np.float32)

    def _start(self, rows: Sequence[PlanRow], start_time: float) -> Tensor:
        """x_t at t = start_time: (1 - t) z + t eps, with z the reference's latents."""
        noise = torch.empty(0)
        if start_time > 0:
            shape, each = self.checkpoint.latent_shape, []
            for row in rows:
                each.append(noise_for(row.seed, shape))
                if row.seed_b is not None and row.position is not None:  # mode interpolate
                    each[-1] = slerp(each[-1], noise_for(row.seed_b, shape), row.position)
            noise = torch.stack(each).to(self.device)
        if start_time == 1:
            return noise
        clean = self.encode([_reference(row) for row in rows])
        return clean if start_time == 0 else (1 - start_time) * clean + start_time * noise

    def _context(self, labels: Tensor, features: Sequence[Tensor | None]) -> Tensor:
        """Context tokens [B, L, Dc]; a sample without a feature gets the null tokens in its place."""
        with_feature = [feature is not None for feature in features]
        cls = torch.stack([feature for feature in features if feature is not None]) if any(with_feature) else None
        if cls is None or all(with_feature):
            return self.denoiser.context(labels, cls)
        chosen = torch.tensor(with_feature, device=self.device)
        guided, alone = self.denoiser.context(labels[chosen], cls), self.denoiser.context(labels[~chosen])
        context = guided.new_empty(len(labels), *guided.shape[1:])
        context[chosen], context[~chosen] = guided, alone
        return context

    def _guiding_features(self, rows: Sequence[PlanRow], labels: Tensor) -> list[Tensor | None]:
        """One feature [D] an image on the device, None where the class alone guides. labels: on the CPU."""
        features: list[Tensor | None] = [None] * len(rows)
        drawn = [place for place, row in enumerate(rows) if row.feature == "prior"]
        if drawn:
            prior = self.checkpoint.prior
            if prior is None:
                raise ConfigError(_no_prior(self.checkpoint))
            # On the CPU, so that every device gets the same.
            noise = torch.stack([noise_for(feature_seed(rows[place].seed), (prior.noise_dim,)) for place in drawn])
            warmth = [rows[place].feature_temperature for place in drawn]
            temperature = torch.tensor([1.0 if one is None else one for one in warmth])
            cls = prior.sample(labels[drawn], temperature[:, None] * noise).to(self.device)
            for place, feature in zip(drawn, cls, strict=True):
                features[place] = feature
        own = [place for place, row in enumerate(rows) if row.feature == "reference"]
        if own:
            paths = [_reference(rows[place]) for place in own]
            others = [rows[place].reference_b or path for place, path in zip(own, paths, strict=True)]
            of_path = self._of_each([*paths, *others], self._features, self._cls)
            for place, a, b in zip(own, of_path[: len(own)], of_path[len(own) :], strict=True):
                position = rows[place].position
                features[place] = a if position is None else slerp(a, b, position)
        return features

    def _cls(self, pixels: Tensor) -> Tensor:
        """float32 [B, D] of uint8 [B, 3, H, W], in full precision, as training extracts them."""
        # Matrix products stay in true float32 here, in setup_data and in evaluation, though TF32 is a few times faster
        # on a GPU: thresholds, stored features and results were measured so. cuDNN's convolutions are TF32 by default.
        extractor = self._required_extractor()
        cls: Tensor = extractor(extractor.preprocess(pixels)).cls
        return cls.float()

    def _required_extractor(self) -> FeatureExtractor:
        if self.extractor is None:
            raise ConfigError(
                "features of images are asked for, but the generator was given no extractor; see "
                "m2d.generation.references.load_reference_extractor"
            )
        return self.extractor

    def _of_each(
        self, paths: Sequence[str], kept: OrderedDict[str, Tensor], compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """compute(uint8 [n, 3, H, W]) -> [n, ...] for the image at each path, each computed once while it is kept."""
        found = {path: kept[path] for path in paths if path in kept}
        missing = list(dict.fromkeys(path for path in paths if path not in found))
        for first in range(0, len(missing), self.batch_size):
            part = missing[first : first + self.batch_size]
            pixels = np.stack([read_reference(path, self.checkpoint.image_size) for path in part])
            values = compute(torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2))
            found.update(zip(part, values, strict=True))
        for path, value in found.items():
            kept[path] = value
            kept.move_to_end(path)
        while len(kept) > _REFERENCES_KEPT:
            kept.popitem(last=False)
        return torch.stack([found[path] for path in paths])


def start_of(row: PlanRow) -> tuple[float, int]:
    """(t where a row's path begins, steps from there). Halves round to the even number of steps."""
    if row.mode != "image2image":
        return 1.0, row.steps
    strength = cast(float, row.strength)  # a checked plan has it
    return strength, max(1, round(strength * row.steps))


def pick_device(device: str | None) -> torch.device:
    """None: cuda where there is one, otherwise cpu. Raises ConfigError for a device that this machine lacks."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    # Without CUDA support compiled in, torch raises an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {device}, which cannot be used here ({reason}); try cpu") from None
    return picked


def pick_feature(feature: GuidingFeature | None, checkpoint: Checkpoint) -> GuidingFeature:
    """None: prior where the checkpoint has one, otherwise none. Raises ConfigError for a prior that is not there."""
    if feature == "prior" and checkpoint.prior is None:
        raise ConfigError(_no_prior(checkpoint))
    if feature is not None:
        return feature
    return "none" if checkpoint.prior is None else "prior"


def _no_prior(checkpoint: Checkpoint) -> str:
    return (
        f"feature is prior, but the checkpoint {checkpoint.path} holds no feature prior; leave --feature out, or "
        "take a checkpoint that was trained with this M2D"
    )


def _with_unet_in(dtype: torch.dtype, denoiser: Denoiser, device: torch.device) -> Denoiser:
    """In another type than float32 a copy of the U-Net on the device, which may be a run's own; the rest is shared.

    Autocast would cast every weight in every step: it keeps the casts of weights that require a gradient alone.
    """
    if dtype == torch.float32:
        return denoiser
    # What deepcopy finds in its memo it takes as copied, so there is never a second U-Net in float32.
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to(device, dtype), requires_grad=False)
        for weight in denoiser.unet.parameters()
    }
    converted = Denoiser(copy.deepcopy(denoiser.unet, memo), denoiser.conditioning, denoiser.unet.config.in_channels)
    converted.latent_norm = denoiser.latent_norm
    return converted


def _placed(network: NetworkT, device: torch.device) -> NetworkT:
    """On the device, to draw with. Convolutions on a GPU want their channels last; a CPU gains nothing by it."""
    network = network.to(device).eval()
    if device.type == "cuda":
        anything: Any = network  # torch's stubs know this form of `to` for tensors alone
        anything.to(memory_format=torch.channels_last)
    return network


def _reference(row: PlanRow) -> str:
    return cast(str, row.reference)  # a checked plan has it
