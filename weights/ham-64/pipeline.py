"""M2DPipeline of M2D 0.2.0, and what it needs of M2D's sources, word for word.

Made by `m2d export`. MIT licence.
"""

import hashlib
import numpy as np
import torch
from PIL import Image
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from itertools import pairwise
from math import expm1
from torch import Tensor
from typing import Any, Literal, NamedTuple, Protocol


# --- m2d/diffusion/solver.py ---
class VelocityModel(Protocol):
    """What guidance asks of a network; m2d.models' Denoiser is one."""

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x_t: [B, C, h, w]; t: [B] in [0, 1]; context: [B, L, D]. Returns [B, C, h, w]."""
        ...


def keep_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """[B, ...] to [len(rows), ...]. An index would be copied to a GPU, and the host would wait for it."""
    return torch.stack([x[row] for row in rows]) if rows else x[:0]


@dataclass
class GuidedVelocity:
    """v = v_null + scale (v_cond - v_null) where low <= t <= high, and v_cond elsewhere.

    conditional: contexts [B, L, D]; null: the same shape, or [1, L, D] for one that the batch shares. Where guidance
    acts, both halves go through the network in one pass of 2B samples; elsewhere, and at scale 1, where the formula is
    v_cond anyway, the null half is not computed at all.
    Sources: classifier-free guidance (arXiv 2207.12598), limited interval (arXiv 2404.07724).
    """

    model: VelocityModel
    conditional: Tensor
    null: Tensor
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._both = torch.cat([self.null.expand_as(self.conditional), self.conditional])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, h, w]; t: one time for the batch, a scalar tensor on the CPU (on a GPU, reading it would wait)."""
        time, (low, high) = float(t), self.interval
        if self.scale == 1 or not low <= time <= high:
            return self.model.velocity(x, x.new_full((len(x),), time), self.conditional)
        velocity = self.model.velocity(torch.cat([x, x]), x.new_full((2 * len(x),), time), self._both)
        # In the state's precision: the difference of two nearly equal bf16 velocities is what guidance lives on.
        null, conditional = velocity.to(x.dtype).chunk(2)
        return null + self.scale * (conditional - null)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch alone."""
        both = self._both.unflatten(0, (2, -1))
        self._both = torch.cat([keep_rows(half, rows) for half in both])
        self.conditional = keep_rows(self.conditional, rows)


# --- m2d/diffusion/settings.py ---
Solver = Literal["euler", "heun", "dpmpp", "unipc"]


# --- m2d/export/pipeline.py ---
OutputType = Literal["pil", "np", "pt", "latent"]


Picture = Image.Image | np.ndarray


# --- m2d/models/autoencoder.py ---
def from_uint8(pixels: Tensor) -> Tensor:
    """Images in [-1, 1], float32, of pixels from 0 to 255, in any shape."""
    return pixels.float() / 127.5 - 1


# --- m2d/export/pipeline.py ---
def _run_seed(generator: torch.Generator | None) -> int:
    """The seed of a run: a fresh generator's own, later one that it draws. The generator moves on."""
    if generator is None:
        return int(torch.randint(2**62, (1,)))
    new = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    is_fresh = torch.equal(new.get_state(), generator.get_state())
    drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return generator.initial_seed() if is_fresh else int(drawn)


# --- m2d/generation/plan.py ---
def seed_of(text: str) -> int:
    """The first 63 bits of the SHA-256 of a text: the same on every machine, batch size and Python version.

    RUN/CLASS/INDEX is an image's. RUN/CLASS/reference/SHA256 is that of an input image's own sample: neither its
    number, as another file would shift it, nor its name, as two folders often use the same. SEED/attempt/K replaces a
    rejected one. SEED/feature draws the feature: with numbers in common, latents and feature would be correlated as no
    model has seen them.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --- m2d/diffusion/solver.py ---
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t: float64 scalar tensor on the CPU) -> d x / d t, the shape of x."""


# --- m2d/diffusion/interpolant.py ---
def shifted(times: Tensor, shift: float) -> Tensor:
    """t -> shift t / (1 + (shift - 1) t): above 1 nearer to the noise, and log(t / (1 - t)) grows by log(shift).

    Source: Stable Diffusion 3 (arXiv 2403.03206), eq. 23; there shift is sqrt(m / n) for latents of m and n positions.
    """
    return shift * times / (1 + (shift - 1) * times)


# --- m2d/diffusion/solver.py ---
def time_grid(steps: int, shift: float = 1.0, start_time: float = 1.0) -> Tensor:
    """Times from start_time to 0, float64 [steps + 1] on the CPU: uniform, then `shifted`.

    The uniform times begin at the u that the shift leads to start_time, so u n steps from there are the last ones of n
    steps from 1.
    """
    if not 0 <= start_time <= 1:
        raise ValueError(f"start_time is {start_time}; it must be in [0, 1]")
    first = start_time / (start_time + shift * (1 - start_time))  # 1 at 1, exactly
    times = torch.linspace(first, 0, steps + 1, dtype=torch.float64)
    return shifted(times, shift)


# The multistep solvers work in log((1 - t) / t), infinite at t = 1: the first step starts this much later, where the
# noise is the same to seven digits. So near t = 0 the path has arrived.
_EDGE = 1e-6


Watch = Callable[[int, Tensor], Sequence[int] | None]
"""(steps taken, the estimate of x_0 [B, ...]) -> the rows to go on with, or None for all of them."""


def _one_step(velocity: Velocity, x: Tensor, times: Tensor, watch: Watch | None, *, corrected: bool) -> Tensor:
    """Euler; corrected: Heun, the trapezoid rule, also in the last step: this path's velocity is finite at t = 0."""
    for step, (t, t_next) in enumerate(pairwise(times), 1):
        slope = end = velocity(x, t).to(x.dtype)
        if corrected:
            end = velocity(x + (t_next - t) * slope, t_next).to(x.dtype)
            slope = (slope + end) / 2
        x = x + (t_next - t) * slope
        if watch is not None and (rows := watch(step, x - t_next * end)) is not None:
            x = keep_rows(x, rows)
            if not rows:
                break
    return x


class _Step(NamedTuple):
    """Coefficients of a step of `_multistep`: Python numbers, so that the host never waits for a GPU."""

    time: float
    decay: float
    gain: float
    ratio: float | None  # length of the step before, negative, in lengths of this one; None: a step of order 1
    by_slope: float  # what UniPC corrects with, rho_0 and rho_1
    by_end: float


def _steps(times: Tensor) -> list[_Step]:
    """Between each two of `times`, float64 [n + 1] below 1; the first and the last are of order 1."""
    t = times.float().double()  # float32's times, as in diffusers: next to t = 1 they move 1 - t by percents
    noise, log_snr = t.tolist(), (torch.log1p(-t) - t.log()).tolist()
    steps = []
    for i in range(len(noise) - 1):
        h = log_snr[i + 1] - log_snr[i]
        growth = expm1(-h)  # B(h), and phi_1
        ratio, by_slope, by_end = None, 0.0, 0.5
        if 0 < i < len(noise) - 2:
            ratio = (log_snr[i - 1] - log_snr[i]) / h
            # Eq. 9 of UniPC: rho_0 + rho_1 = b_1 and ratio rho_0 + rho_1 = b_2.
            phi_2 = -growth / h - 1
            b_1, b_2 = phi_2 / growth, -(2 * phi_2 / h + 1) / growth
            by_slope = (b_2 - b_1) / (ratio - 1)
            by_end = b_1 - by_slope
        steps.append(_Step(noise[i], noise[i + 1] / noise[i], (noise[i + 1] - 1) * growth, ratio, by_slope, by_end))
    return steps


def _multistep(velocity: Velocity, x: Tensor, times: Tensor, watch: Watch | None, *, corrected: bool) -> Tensor:
    """DPM-Solver++(2M); corrected: UniPC of order 2 with B(h) = e^h - 1, whose prediction is the same.

    Both integrate x_0 = x - t v over the log of the signal-to-noise ratio, along a line through its last two values.
    UniPC repeats a step, without another pass of the network, once it knows the value at the step's end.
    Sources: DPM-Solver++ (arXiv 2211.01095), algorithm 2; UniPC (arXiv 2302.04867), algorithms 1 and 2.
    """
    times = times.clamp(max=1 - _EDGE)
    steps = _steps(times)
    begin, before = x, x  # of the step before: where it began, and the x_0 that was seen there
    slope: Tensor | float = 0.0
    for i, step in enumerate(steps):
        clean = x - step.time * velocity(x, times[i]).to(x.dtype)
        if corrected and i > 0:
            past = steps[i - 1]
            x = past.decay * begin + past.gain * (before + past.by_slope * slope + past.by_end * (clean - before))
        slope = 0.0 if step.ratio is None else (before - clean) / step.ratio
        begin, before = x, clean
        x = step.decay * x + step.gain * (clean + slope / 2)
        if watch is not None and (rows := watch(i + 1, clean)) is not None:
            x, begin, before = (keep_rows(state, rows) for state in (x, begin, before))
            slope = keep_rows(slope, rows) if isinstance(slope, Tensor) else slope
            if not rows:
                break
    return x


@torch.no_grad()
def solve(
    velocity: Velocity,
    start: Tensor,
    *,
    steps: int,
    solver: Solver = "unipc",
    shift: float = 1.0,
    start_time: float = 1.0,
    watch: Watch | None = None,
) -> Tensor:
    """Follow the flow from `start` at t = start_time, noise at t = 1, to data at t = 0.

    start: [B, ...] with at least two dimensions, a point x_t of the path at t = start_time in [0, 1]. Below 1e-6 it is
    data already, to six digits, and is returned without a call of the network. Returns the same shape, in float32
    whatever the network's type, or in float64 if start is float64.
    The network runs `steps` times, or 2 `steps` times with heun.
    watch: called after each step. The rows that it returns are all that goes on, in their order, and all that is
    returned; a velocity that knows of rows is for the caller to narrow. Where none is left, the rest is not computed.
    shift > 1 spends more of the steps near the noise, see `time_grid`.
    """
    start = start.to(torch.float64 if start.dtype == torch.float64 else torch.float32)
    times = time_grid(steps, shift, start_time)
    if start_time < _EDGE:
        return start
    if solver in ("dpmpp", "unipc"):
        return _multistep(velocity, start, times, watch, corrected=solver == "unipc")
    return _one_step(velocity, start, times, watch, corrected=solver == "heun")


# --- m2d/models/autoencoder.py ---
_CODED_PIXELS = 32 * 128**2  # through a VAE at once; its activations at 256 px: 1.3 GiB in bf16, 1.6 in float32


def coded_at_once(image_size: int) -> int:
    """Images that a VAE encodes or decodes at once, so that its memory has a bound whatever the batch size."""
    return max(1, _CODED_PIXELS // image_size**2)


# --- m2d/export/pipeline.py ---
def square(picture: Picture, size: int) -> np.ndarray:
    """The centre square of an image, PIL or uint8 [H, W, 3], as training sees it: uint8 [size, size, 3]."""
    image = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).convert("RGB")
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


# --- m2d/generation/generator.py ---
def noise_for(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32 [*shape] on the CPU.

    From NumPy's Mersenne Twister, not torch's: torch's CPU generator looks at the low 32 bits of a seed alone, so
    among 65,000 images some two would likely be the same one. RandomState's stream is frozen for good (NEP 19).
    """
    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return torch.from_numpy(stream.standard_normal(shape).astype(np.float32))


# --- m2d/models/autoencoder.py ---
def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded to the nearest; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# --- m2d/models/unet.py ---
TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding was made for steps 0..1000; t is in [0, 1]


# --- m2d/export/pipeline.py ---
class M2DPipeline(DiffusionPipeline):
    """Synthetic dermoscopy images of classes of lesions: `pipe(["MEL", "DF"], num_images_per_class=8).images`.

    Research only: the images show no patient and are no basis for a diagnosis.
    """

    def __init__(self, unet: ModelMixin, vae: ModelMixin, conditioning: ModelMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, conditioning=conditioning)
        self._interrupt = False

    @property
    def classes(self) -> list[str]:
        """Codes of the classes that it draws."""
        return list(self.conditioning.config.classes)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return int(self.conditioning.config.image_size)

    @torch.no_grad()
    def __call__(
        self,
        classes: str | Sequence[str] | None = None,
        num_images_per_class: int = 1,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 0.8),
        solver: Solver = "unipc",
        feature: Literal["prior", "none"] | None = None,
        feature_temperature: float = 1.0,
        generator: torch.Generator | None = None,
        image: Picture | Sequence[Picture] | None = None,
        strength: float = 0.75,
        batch_size: int = 32,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of each class, all of the first class first.

        classes: one or more codes; None: all. guidance_scale: 1 is none; guidance_interval: it acts where t, 1 at the
        noise, is within. solver: euler, heun, dpmpp or unipc. feature: what guides beside the class, drawn from the
        prior or none; None: the prior where there is one; feature_temperature: its spread, 0 is the class mean.
        generator: fresh from `manual_seed(S)` it gives what `m2d generate --seed S` gives; later calls with it give
        others; None: torch's own. image: where the path begins at `strength` (0: the image as the autoencoder sees it,
        1: nothing of it), image i of a class from the i-th picture, in turn. output_type: pil; np or pt, in [0, 1];
        latent, normalised. callback_on_step_end(pipe, step, t, {"latents": estimate of the clean latents}) may set
        pipe._interrupt: the estimate is then what is decoded.
        Raises ValueError for arguments that cannot work.
        """
        labels, indices = self._asked(classes, num_images_per_class)
        drawn = self._feature(feature, labels)
        if not 0 <= strength <= 1 or batch_size < 1 or num_inference_steps < 1:
            raise ValueError("strength must be from 0 to 1, batch_size and num_inference_steps at least 1")
        self.vae.float()  # fp16 overflows in VAE decoders; full precision costs little beside the steps
        run, self._interrupt = _run_seed(generator), False
        seeds = [seed_of(f"{run}/{self.classes[label]}/{index}") for label, index in zip(labels, indices)]
        pictures: list[Picture] = []
        if image is not None:
            pictures = [image] if isinstance(image, (Image.Image, np.ndarray)) else list(image)
        start_time, steps = 1.0, num_inference_steps
        if pictures:
            start_time, steps = strength, max(1, round(strength * num_inference_steps))
        found: list[Tensor] = []
        for first in range(0, len(labels), batch_size):
            batch = slice(first, first + batch_size)
            state = torch.stack([noise_for(seed, self._latent_shape) for seed in seeds[batch]])
            state = state.to(self._execution_device)
            if pictures:
                clean = self._encode([pictures[index % len(pictures)] for index in indices[batch]])
                state = (1 - start_time) * clean + start_time * state
            noise = None
            if drawn:
                shape = (self.conditioning.noise_dim,)
                noise = torch.stack([noise_for(seed_of(f"{seed}/feature"), shape) for seed in seeds[batch]])
                noise = torch.full((len(noise), 1), feature_temperature) * noise
            velocity = self._guided(labels[batch], noise, guidance_scale, guidance_interval)
            found.append(self._solve(velocity, state, steps, solver, start_time, callback_on_step_end))
            if self._interrupt:
                break
        images = self._output(torch.cat(found), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """d x_t / d t, [B, C, h, w] in x_t's type, by the U-Net in its own; t: [B] in [0, 1]; context: [B, L, Dc]."""
        return self.unet(x_t.to(self.unet.dtype), t * TIME_SCALE, context, return_dict=False)[0].to(x_t.dtype)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), side, side

    def _asked(self, classes: str | Sequence[str] | None, each: int) -> tuple[list[int], list[int]]:
        """Index of the class, and number within it, of each image."""
        known = {code.casefold(): index for index, code in enumerate(self.classes)}
        codes = [classes] if isinstance(classes, str) else self.classes if classes is None else list(classes)
        unknown = [code for code in codes if code.casefold() not in known]
        if unknown or not codes or each < 1:
            raise ValueError(f"ask for at least one image of some of {' '.join(self.classes)}; not for {unknown}")
        places = dict.fromkeys(known[code.casefold()] for code in codes)
        return [label for label in places for _ in range(each)], [*range(each)] * len(places)

    def _feature(self, feature: str | None, labels: Sequence[int]) -> bool:
        """Whether features are drawn."""
        drawable = self.conditioning.drawable
        absent = {self.classes[label] for label in labels} - set(drawable)
        if feature not in (None, "none", "prior") or (feature == "prior" and not drawable):
            raise ValueError(f"feature is {feature}; this model knows {'prior and ' if drawable else ''}none")
        if feature == "none" or not drawable:
            return False
        if absent:
            raise ValueError(f"no training image was of {sorted(absent)}; leave it out, or take feature='none'")
        return True

    def _guided(
        self, labels: Sequence[int], noise: Tensor | None, scale: float, interval: tuple[float, float]
    ) -> GuidedVelocity:
        of_class = torch.tensor(labels, device=self._execution_device)
        dtype, null = self.unet.dtype, torch.full_like(of_class, len(self.classes))
        context = self.conditioning(of_class, noise).to(dtype)
        return GuidedVelocity(self, context, self.conditioning(null).to(dtype), scale=scale, interval=interval)

    def _solve(
        self,
        velocity: GuidedVelocity,
        state: Tensor,
        steps: int,
        solver: Solver,
        start_time: float,
        callback: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None,
    ) -> Tensor:
        estimate, shift = state, float(self.conditioning.config.time_shift)
        times = time_grid(steps, shift, start_time).float()
        with self.progress_bar(total=steps) as bar:

            def watch(step: int, clean: Tensor) -> Sequence[int] | None:
                nonlocal estimate
                estimate = clean
                bar.update()
                if callback is not None:
                    callback(self, step - 1, times[step], {"latents": clean})
                return [] if self._interrupt else None

            grid: dict[str, Any] = {"steps": steps, "shift": shift, "start_time": start_time}
            end = solve(velocity, state, solver=solver, watch=watch, **grid)
        return estimate if self._interrupt else end

    def _encode(self, pictures: Sequence[Picture]) -> Tensor:
        """Normalised latents [B, C, h, w] of the centre squares."""
        pixels = np.stack([square(picture, self.image_size) for picture in pictures])
        images = from_uint8(torch.from_numpy(pixels).to(self._execution_device).permute(0, 3, 1, 2))
        parts = [self.vae.encode(part).latent_dist.mode() for part in images.split(coded_at_once(self.image_size))]
        return self.conditioning.latent_norm.normalize(torch.cat(parts))

    def _output(self, latents: Tensor, output_type: OutputType) -> Any:
        if output_type == "latent":
            return latents
        clean = self.conditioning.latent_norm.denormalize(latents).split(coded_at_once(self.image_size))
        images = torch.cat([self.vae.decode(part).sample.float() for part in clean])
        if not torch.isfinite(images).all():
            raise ValueError(f"the images are not finite numbers in {self.unet.dtype}; load with torch.float32")
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in to_uint8(images)]
        images = images.clamp(-1, 1) / 2 + 0.5
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
