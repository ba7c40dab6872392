"""Rows of a plan in, uint8 images out, on one device. Runs without Ray: a driver, an actor or a notebook holds one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from joblib import cpu_count
from torch import Tensor, nn

from m2d.data.views import apply_view
from m2d.diffusion.solver import AutoguidedVelocity, GuidedVelocity, HeldVelocity, Watch, solve
from m2d.errors import CheckpointError, ConfigError
from m2d.generation.plan import PlanRow, seed_of
from m2d.generation.references import Pasted, read_pasted, read_reference, read_region, require_dim
from m2d.generation.settings import CompileMode, Feature
from m2d.models.autoencoder import coded_at_once, from_uint8, to_uint8
from m2d.models.precision import DTYPES, pick_precision
from m2d.models.unet import Denoiser

if TYPE_CHECKING:
    from m2d.diffusion.feature_prior import FeaturePrior
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
        time_shift: float | None = None,
        guide: Checkpoint | None = None,
    ) -> None:
        """Moves the checkpoint's networks, and the extractor, to the device; of the U-Net, in bf16 or fp16, a copy.

        None decides, see `pick_device` and `pick_precision`. extractor: for rows that a reference's feature guides, and
        for `features`; ConfigError where it is not the checkpoint's. compile: torch.compile the U-Net, for runs of many
        batches; a batch that is not full is then filled up, so that no shape is compiled for it. time_shift: of the
        solver's times; None: the checkpoint's. guide: what guidance leads away from, see `require_guide`.
        """
        self.guide: Generator | None = None
        if guide is not None:
            require_guide(guide, checkpoint)
            self.guide = Generator(
                replace(guide, autoencoder=checkpoint.autoencoder),
                device=device,
                mixed_precision=mixed_precision,
                compile=compile,
                compile_mode=compile_mode,
            )
        self.time_shift = checkpoint.info.time_shift if time_shift is None else time_shift
        self.checkpoint, self.classes = checkpoint, checkpoint.info.classes
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.precision = pick_precision(mixed_precision, self.device)
        self._dtype = DTYPES[self.precision]
        self.denoiser = _placed(_with_unet_in(self._dtype, checkpoint.denoiser, self.device), self.device)
        self.autoencoder = _placed(checkpoint.autoencoder, self.device)
        self.extractor: FeatureExtractor | None = None
        if extractor is not None:
            self.take_extractor(extractor)
        self._compiled = compile
        if compile:
            self.denoiser.unet.compile(mode=compile_mode, dynamic=False)  # two shapes: guided, which is twice, and not
        self.uploads: Mapping[str, bytes] = {}  # name -> file of a reference; of any other the name is its place
        self._latents: dict[str | Pasted, Tensor] = {}
        self._features: dict[str | Pasted, Tensor] = {}

    def take_extractor(self, extractor: FeatureExtractor) -> None:
        """For rows that a reference's feature guides, and for `features`. Raises ConfigError for another run's."""
        require_dim(extractor, self.checkpoint)
        self.extractor = _placed(extractor, self.device)

    def generate(self, rows: Sequence[PlanRow]) -> np.ndarray:
        """Images of the rows, uint8 [N, H, W, 3] RGB, in their order.

        Raises CheckpointError where the model gives no numbers, DataError for a class that the feature prior does not
        know or an unreadable reference, ConfigError for a row that needs a prior or an extractor that is not there.
        """
        size = self.checkpoint.image_size
        images = np.empty((len(rows), size, size, 3), np.uint8)
        for batch in self.batches(rows):
            some = [rows[place] for place in batch]
            images[batch] = self.decode(self.denoise(some)) if some[0].view is None else self._views(some)
        return images

    def _views(self, rows: Sequence[PlanRow]) -> np.ndarray:
        """Of rows with a view: their references, flipped or turned. No network sees them."""
        read = partial(read_reference, size=self.checkpoint.image_size)
        return np.stack([apply_view(read(str(row.reference)), row.view or 0) for row in rows])

    def batches(self, rows: Sequence[PlanRow]) -> list[list[int]]:
        """Places in `rows` of each batch: at most `batch_size`, all of one `batch_key`, in their order."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(batch_key(row), []).append(place)
        return [
            places[first : first + self.batch_size]
            for places in alike.values()
            for first in range(0, len(places), self.batch_size)
        ]

    @torch.inference_mode()
    def denoise(self, rows: Sequence[PlanRow], watch: Watch | None = None) -> Tensor:
        """Normalised latents at t = 0, float32 [B, C, h, w] on the device, of one of the `batches`.

        watch: as of `solve`, where nothing is compiled, whose shapes must not change; the latents are then of the rows
        that stayed. At strength 0 there is no step to watch.
        """
        row, wanted = rows[0], len(rows)
        start_time, steps = start_of(row)
        if start_time == 0:
            return self.encode([_input_of(row) for row in rows])
        if self._compiled:
            rows = [*rows, *[rows[-1]] * (self.batch_size - wanted)]
        # x_t at t = start_time: (1 - t) z + t eps, with z the reference's latents.
        noise = torch.stack([_noise_of(row, self.checkpoint.latent_shape) for row in rows]).to(self.device)
        latents, clean = noise, None
        if start_time < 1 or row.mask is not None:
            clean = self.encode([_input_of(row) for row in rows])
            latents = (1 - start_time) * clean + start_time * noise
        labels = torch.tensor([self.classes.index(row.label) for row in rows])
        cls, scale, interval = self._guiding(rows, labels), row.guidance_scale, (row.guidance_low, row.guidance_high)
        context = self._context(rows, labels, cls)
        velocity: GuidedVelocity | AutoguidedVelocity | HeldVelocity
        if self.guide is None:
            no_class = torch.full_like(labels, len(self.classes), device=self.device)
            null = self.denoiser.context(no_class).to(self._dtype)
            velocity = GuidedVelocity(self, context, null, scale, interval)
        else:
            of_guide = self.guide._context(rows, labels, cls)
            velocity = AutoguidedVelocity(self, self.guide, context, of_guide, scale, interval)
        if row.mask is not None and clean is not None:
            velocity = HeldVelocity(velocity, self._region(rows), noise - clean)
        narrow = None if watch is None else partial(_narrow, watch, velocity)
        grid: dict[str, Any] = {"steps": steps, "shift": self.time_shift, "start_time": start_time}
        return solve(velocity, latents, solver=row.solver, watch=narrow, **grid)[:wanted]

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """d x_t / d t, [B, C, h, w] in x_t's type, by the U-Net in its own. context: [B, L, Dc], in the U-Net's type.

        t: float32 [B], as bf16 has no 999.3; the U-Net takes the sines of it in float32 before it converts them.
        """
        velocity = self.denoiser.velocity(x_t.to(self._dtype), t, context)
        # CUDA graphs, of two of the compile modes, write the next result to the same place.
        return velocity.to(x_t.dtype, copy=self._compiled)

    @torch.inference_mode()
    def encode(self, inputs: Sequence[str | Pasted]) -> Tensor:
        """Normalised latents, float32 [B, C, h, w] on the device: the posterior means of input images.

        In full precision: one pass for each image costs little beside the steps. Kept for the next call.
        """

        def means(pixels: Tensor) -> Tensor:
            parts = pixels.split(coded_at_once(self.checkpoint.image_size))
            latents = torch.cat([self.autoencoder.encode(from_uint8(part)).mode() for part in parts])
            return self.denoiser.normalize(latents)

        return self._of_each(inputs, self._latents, means)

    def _region(self, rows: Sequence[PlanRow]) -> Tensor:
        """The cells that hold a pixel to be redrawn, of rows with masks: bool [B, 1, h, w] on the device."""
        masks = [[mask for mask in (row.mask, row.mask_b) if mask is not None] for row in rows]
        pixels = torch.from_numpy(np.stack([read_region(paths, self.checkpoint.image_size) for paths in masks]))
        return (F.adaptive_max_pool2d(pixels[:, None], self.checkpoint.latent_shape[1:]) > 0).to(self.device)

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
        found = [np.empty((0, self.checkpoint.info.feature_dim), np.float32)]
        for first in range(0, len(images), self.batch_size):
            pixels = torch.from_numpy(images[first : first + self.batch_size]).to(self.device).permute(0, 3, 1, 2)
            found.append(self._cls(pixels).cpu().numpy())
        return np.concatenate(found)

    def _context(self, rows: Sequence[PlanRow], labels: Tensor, cls: Tensor | None) -> Tensor:
        """Context tokens [B, L, Dc] in the U-Net's type. labels: on the CPU. cls: see `_guiding`."""
        labels = labels.to(self.device)
        if cls is None:
            return self.denoiser.context(labels).to(self._dtype)
        alone = torch.tensor([row.feature == "none" for row in rows], device=self.device)
        return self.denoiser.conditioning(labels, cls, drop_feature=alone).to(self._dtype)

    def _guiding(self, rows: Sequence[PlanRow], labels: Tensor) -> Tensor | None:
        """Features float32 [B, D], zeros for a row that its class alone guides; None where that is every row."""
        of_kind = {kind: [n for n, row in enumerate(rows) if row.feature == kind] for kind in ("prior", "reference")}
        drawn, own = of_kind["prior"], of_kind["reference"]
        if not drawn and not own:
            return None
        cls = torch.zeros(len(rows), self.checkpoint.info.feature_dim, device=self.device)
        if drawn:
            prior = require_prior(self.checkpoint)
            # On the CPU, so that every device gets the same.
            noise = torch.stack([noise_for(seed_of(f"{rows[n].seed}/feature"), (prior.noise_dim,)) for n in drawn])
            warmth = [rows[n].feature_temperature for n in drawn]
            temperature = torch.tensor([1.0 if one is None else one for one in warmth])
            cls[drawn] = prior.sample(labels[drawn], temperature[:, None] * noise).to(self.device)
        if own:
            starts = [_input_of(rows[n]) for n in own]
            ends = [
                start if rows[n].position is None else rows[n].reference_b or start for n, start in zip(own, starts)
            ]
            a, b = self._of_each([*starts, *ends], self._features, self._cls).split(len(own))
            cls[own] = torch.stack([slerp(a[k], b[k], rows[n].position or 0) for k, n in enumerate(own)])
        return cls

    def _cls(self, pixels: Tensor) -> Tensor:
        """float32 [B, D] of uint8 [B, 3, H, W], in full precision, as training extracts them."""
        # Matrix products stay in true float32 here, in setup_data and in evaluation, though TF32 is a few times faster
        # on a GPU: thresholds, stored features and results were measured so. cuDNN's convolutions are TF32 by default.
        if self.extractor is None:
            raise ConfigError("features of images are asked for, but the generator was given no extractor to make them")
        return self.extractor(self.extractor.preprocess(pixels)).cls.float()

    def _of_each(
        self, inputs: Sequence[str | Pasted], kept: dict[str | Pasted, Tensor], compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """compute(uint8 [n, 3, H, W]) -> [n, ...] for each input image, each computed once while it is kept."""
        missing = [one for one in dict.fromkeys(inputs) if one not in kept]
        for first in range(0, len(missing), self.batch_size):
            part = missing[first : first + self.batch_size]
            pixels = np.stack([self._read(one) for one in part])
            kept.update(zip(part, compute(torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)), strict=True))
        values = torch.stack([kept[one] for one in inputs])
        for one in dict.fromkeys(inputs):
            kept[one] = kept.pop(one)  # those used last are at the end
        for one in list(kept)[:-_REFERENCES_KEPT]:
            del kept[one]
        return values

    def _read(self, one: str | Pasted) -> np.ndarray:
        size = self.checkpoint.image_size
        return read_pasted(one, size) if isinstance(one, Pasted) else read_reference(one, size, self.uploads.get(one))


def batch_key(row: PlanRow) -> tuple[Any, ...]:
    """What all samples of a batch must share: the solver's settings, and whether they have a mask.

    Classes, modes, features, positions may mix.
    """
    start_time, steps = start_of(row)
    solver = (row.solver, steps, row.guidance_scale, row.guidance_low, row.guidance_high, row.mask is not None)
    return (start_time, *(solver if start_time else (row.view is not None,)))  # at 0 no solver runs


def start_of(row: PlanRow) -> tuple[float, int]:
    """(t where a row's path begins, steps from there). Halves round to the even number of steps."""
    if row.mode != "image2image":
        return 1.0, row.steps
    strength = row.strength or 0.0
    return strength, max(1, round(strength * row.steps))


def noise_for(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [*shape] on the CPU.

    From NumPy's Mersenne Twister, not torch's: torch's CPU generator looks at the low 32 bits of a seed alone, so
    among 65,000 images some two would likely be the same one. RandomState's stream is frozen for good (NEP 19).
    """
    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return torch.from_numpy(stream.standard_normal(shape).astype(np.float32))


def slerp(a: Tensor, b: Tensor, position: float) -> Tensor:
    """Spherical interpolation from a (position 0) to b (position 1), any equal shape, as one long vector; float32.

    sin((1 - p) w) / sin(w) a + sin(p w) / sin(w) b with w the angle between a and b. Noise stays noise: two independent
    draws are at nearly right angles, so the weights' squares sum to 1. Both ends are returned as they are, to the bit;
    where a and b are parallel, so that sin(w) is 0, the weights are 1 - p and p. Source: Shoemake, SIGGRAPH 1985.
    """
    if position in (0, 1):
        return a if position == 0 else b
    wide_a, wide_b = a.double(), b.double()
    lengths = (wide_a.norm() * wide_b.norm()).item()
    cosine = (wide_a * wide_b).sum().item() / lengths if lengths > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    weights = (1 - position, position)
    if math.sin(angle) > 1e-6:
        weights = (math.sin((1 - position) * angle) / math.sin(angle), math.sin(position * angle) / math.sin(angle))
    return (weights[0] * wide_a + weights[1] * wide_b).float()


def pick_device(device: str | None) -> torch.device:
    """None: cuda where there is one, otherwise cpu. Raises ConfigError for a device that this machine lacks."""
    # A container's limit in time (docker --cpus), which OpenMP does not see: a thread a core would mostly wait.
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
        return picked
    # Without CUDA support compiled in, torch raises an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device is {device}, which cannot be used here ({reason}); try cpu") from None


def pick_feature(feature: Feature | None, checkpoint: Checkpoint) -> Feature:
    """None: prior where the checkpoint has one, otherwise none. Raises ConfigError for a prior that is not there."""
    if feature == "prior":
        require_prior(checkpoint)
    return feature or ("none" if checkpoint.prior is None else "prior")


def require_prior(checkpoint: Checkpoint) -> FeaturePrior:
    """The checkpoint's. Raises ConfigError where it has none."""
    if checkpoint.prior is None:
        raise ConfigError(
            f"feature is prior, but the checkpoint {checkpoint.path} holds no feature prior; leave --feature out, or "
            "take a checkpoint that was trained with this M2D"
        )
    return checkpoint.prior


def require_guide(guide: Checkpoint, checkpoint: Checkpoint) -> None:
    """Raises ConfigError where guidance cannot lead from one checkpoint's velocities to another's.

    Both must be of the same latents, bit by bit: joint training moves them at each step, and a difference of velocities
    would then be mostly that of the spaces.
    """

    def conditions(one: Checkpoint) -> tuple[Any, ...]:
        info = one.info
        return info.classes.codes, info.feature_extractor, info.extractor_key, info.feature_dim, one.latent_shape

    def space(one: Checkpoint) -> dict[str, Tensor]:
        norm = one.denoiser.latent_norm.state_dict()
        return {**one.autoencoder.state_dict(), **{f"norm.{name}": tensor for name, tensor in norm.items()}}

    if guide.sha256 == checkpoint.sha256:
        raise ConfigError(f"guide_checkpoint: {guide.path} is the checkpoint itself; name an earlier one of its run")
    ours, theirs = space(checkpoint), space(guide)
    if conditions(guide) != conditions(checkpoint) or ours.keys() != theirs.keys():
        raise ConfigError(
            f"guide_checkpoint: {guide.path} is of other classes, features or latents than {checkpoint.path}; name an "
            "earlier checkpoint of its run"
        )
    if not all(torch.equal(tensor.cpu(), theirs[name].cpu()) for name, tensor in ours.items()):
        raise ConfigError(
            f"guide_checkpoint: {guide.path} has another autoencoder than {checkpoint.path}, so their latents differ; "
            "name an earlier checkpoint of stage latent, which keeps the autoencoder as it is"
        )


def _input_of(row: PlanRow) -> str | Pasted:
    """What a row starts from."""
    if row.mask is None or row.reference_b is None or row.mask_b is None:
        return str(row.reference)
    return Pasted(str(row.reference), row.mask, row.reference_b, row.mask_b)


def _noise_of(row: PlanRow, shape: tuple[int, int, int]) -> Tensor:
    noise = noise_for(row.seed, shape)
    return noise if row.seed_b is None else slerp(noise, noise_for(row.seed_b, shape), row.position or 0)


def _narrow(
    watch: Watch, velocity: GuidedVelocity | AutoguidedVelocity | HeldVelocity, step: int, clean: Tensor
) -> Sequence[int] | None:
    """What the watch returns, once the velocity knows it too."""
    kept = watch(step, clean)
    if kept is not None:
        velocity.keep(kept)
    return kept


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
