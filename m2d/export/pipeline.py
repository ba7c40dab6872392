"""M2DPipeline: a checkpoint as diffusers users know one. Copied into each export by m2d.export.bundle.

Knows nothing of files; the sampling is the generator's, function by function, so that the same seed gives its pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image
from torch import Tensor

from m2d.diffusion.settings import Solver
from m2d.diffusion.solver import GuidedVelocity, solve, time_grid
from m2d.generation.generator import noise_for
from m2d.generation.plan import seed_of
from m2d.models.autoencoder import coded_at_once, from_uint8, to_uint8
from m2d.models.unet import TIME_SCALE

OutputType = Literal["pil", "np", "pt", "latent"]
Picture = Image.Image | np.ndarray


class M2DPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
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


def square(picture: Picture, size: int) -> np.ndarray:
    """The centre square of an image, PIL or uint8 [H, W, 3], as training sees it: uint8 [size, size, 3]."""
    image = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).convert("RGB")
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _run_seed(generator: torch.Generator | None) -> int:
    """The seed of a run: a fresh generator's own, later one that it draws. The generator moves on."""
    if generator is None:
        return int(torch.randint(2**62, (1,)))
    new = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    is_fresh = torch.equal(new.get_state(), generator.get_state())
    drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return generator.initial_seed() if is_fresh else int(drawn)
