"""Images a second of M2D's generator beside a plain diffusers loop, and what fewer steps cost in quality, by solver.

python bench/sampling.py --checkpoint experiments/NAME/checkpoints/best --output bench/out/sampling.json

Speed: the same U-Net, VAE, solver (UniPC), steps, batch, guidance and device for all, no Ray; an actor holds just such
a generator. The plain loop is written as tutorials do, with diffusers' own scheduler, once with two U-Net calls a step
and once with both guidance halves in one doubled batch; on a GPU its weights are bf16. Repetitions are interleaved,
so that a busy machine hurts all alike: read the ratios. On a CPU there is one thread, since threads that wait for each
other on a busy machine measure the machine, and the ratio of CPU seconds is printed beside that of wall time. Without
--checkpoint the networks are random ones of a preset.

Quality (needs --checkpoint): the same noise followed by each solver in 10, 20 and 50 steps, held against 250 Euler
steps: the mean absolute difference of the pixels in grey levels, and the Frechet distance between the two sets in
the features of EfficientNet-Lite0. With fewer images than features that distance ranks sets of the same noise and is
not to be compared with published ones; a row of other noise says how far apart two good sets of this size are.
"""

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from jsonargparse import auto_cli
from torch import nn

from m2d.classes import ISIC7
from m2d.cli import parse
from m2d.diffusion.settings import SOLVERS, SamplingSettings
from m2d.generation.generator import Generator, noise_for
from m2d.generation.plan import PlanRow, rows_of, standard_plan
from m2d.metrics.distances import frechet_distance
from m2d.models.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint
from m2d.models.extractors import LITE0, load_feature_extractor
from m2d.training.networks import build_networks
from m2d.training.settings import TrainConfig

REFERENCE = ("euler", 250)
STEPS = (10, 20, 50)
FEATURE_DIM = 1280


@dataclass(frozen=True)
class Speed:
    """All repetitions of one contender."""

    contender: str
    images_per_s: float  # median
    lowest: float
    highest: float
    ratio: float  # how many times as fast M2D's generator is: median of the repetitions' own ratios
    cpu_ratio: float  # the same of the CPU seconds of this process; means something where a CPU computes
    grey_levels: float  # mean absolute difference to M2D's images of the same noise


@dataclass(frozen=True)
class Quality:
    """One solver at one number of steps, against REFERENCE from the same noise."""

    solver: str
    steps: int
    passes: int  # of the U-Net, the guided ones with a doubled batch
    grey_levels: float  # mean over the images
    worst_image: float  # the largest image's mean
    frechet: float


def main(
    checkpoint: str | None = None,
    preset: str = "ham-64",
    batch_size: int = 8,
    steps: int = 10,
    repetitions: int = 3,
    guidance_scale: float = 1.5,
    device: str | None = None,
    threads: int = 1,
    quality_images: int = 64,
    output: str | None = None,
) -> None:
    """Measure and print.

    Args:
        checkpoint: a checkpoint directory; none: random networks of the preset, speed alone
        preset: whose network sizes are taken without a checkpoint
        batch_size: images in a batch
        steps: of UniPC, in the speed part
        repetitions: batches of each contender
        guidance_scale: of both parts
        device: none takes a GPU where there is one
        threads: of torch on the CPU
        quality_images: in each set of the quality part (0: speed alone)
        output: a JSON file
    """
    torch.set_num_threads(threads)
    loaded = random_checkpoint(preset) if checkpoint is None else load_checkpoint(checkpoint)
    generator = Generator(loaded, batch_size=batch_size, device=device)
    where = torch.cuda.get_device_name() if generator.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{loaded.image_size} px, {where}, torch threads: {threads}, precision {generator.precision}", flush=True)
    speed = measure_speed(generator, steps, guidance_scale, repetitions)
    report_speed(speed, batch_size, steps, repetitions)
    quality: list[Quality] = []
    other_noise = None
    if checkpoint is not None and quality_images:
        quality, other_noise = measure_quality(generator, quality_images, guidance_scale)
        report_quality(quality, other_noise, quality_images)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        document = {
            "device": f"{where}, {platform.machine()}",
            "torch": torch.__version__,
            "threads": threads,
            "precision": generator.precision,
            "networks": f"random, {preset}" if checkpoint is None else loaded.sha256,
            "image_size": loaded.image_size,
            "batch_size": batch_size,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "repetitions": repetitions,
            "speed": [asdict(row) for row in speed],
            "quality_images": quality_images,
            "quality": [asdict(row) for row in quality],
            "frechet_of_other_noise": other_noise,
        }
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure_speed(generator: Generator, steps: int, scale: float, repetitions: int) -> list[Speed]:
    """Each contender makes one batch a repetition, in turns; one batch before that is not timed."""
    everywhere = SamplingSettings(steps=steps, guidance_scale=scale, guidance_interval=(0.0, 1.0))
    default = SamplingSettings(steps=steps, guidance_scale=scale)
    rows, rows_default = (plan(generator, generator.batch_size, settings) for settings in (everywhere, default))
    loop = PlainLoop(generator, steps, scale)
    contenders: dict[str, Callable[[], np.ndarray]] = {
        "M2D generator": lambda: generator.generate(rows),
        "M2D generator, guided for t in [0, 0.8], as by default": lambda: generator.generate(rows_default),
        "plain diffusers, two U-Net calls a step": lambda: loop.images(rows, doubled=False),
        "plain diffusers, one doubled batch": lambda: loop.images(rows, doubled=True),
    }
    images = {name: contender() for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, contender in contenders.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            contender()  # its images are on the CPU when it returns, so a GPU has ended too
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu_began)

    def ratio(of: dict[str, list[float]], name: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(of[name], of["M2D generator"], strict=True))

    count = len(rows)
    return [
        Speed(
            contender=name,
            images_per_s=count / statistics.median(times),
            lowest=count / max(times),
            highest=count / min(times),
            ratio=ratio(seconds, name),
            cpu_ratio=ratio(cpu_seconds, name),
            grey_levels=difference(images[name], images["M2D generator"]).mean(),
        )
        for name, times in seconds.items()
    ]


class PlainLoop:
    """What one writes with diffusers alone, in full precision on a CPU and with bf16 weights on a GPU."""

    def __init__(self, generator: Generator, steps: int, scale: float) -> None:
        self.generator = generator
        self.dtype = torch.bfloat16 if generator.precision == "bf16" else torch.float32
        own = self.dtype != torch.float32
        unet, vae = generator.denoiser.unet, generator.autoencoder.vae
        self.unet = copy.deepcopy(unet).to(self.dtype) if own else unet
        self.vae = copy.deepcopy(vae).to(self.dtype) if own else vae
        self.scheduler = UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, final_sigmas_type="zero"
        )
        self.steps = steps
        self.scale = scale

    @torch.inference_mode()
    def images(self, rows: Sequence[PlanRow], *, doubled: bool) -> np.ndarray:
        """uint8 [N, H, W, 3] of the rows of one batch."""
        generator, device = self.generator, self.generator.device
        shape = generator.checkpoint.latent_shape
        latents = torch.stack([noise_for(row.seed, shape) for row in rows]).to(device, self.dtype)
        labels = torch.tensor([ISIC7.index(row.label) for row in rows], device=device)
        conditional, null = (
            generator.denoiser.context(which).to(self.dtype) for which in (labels, torch.full_like(labels, len(ISIC7)))
        )
        both = torch.cat([null, conditional])
        self.scheduler.set_timesteps(self.steps, device=device)
        for t in self.scheduler.timesteps:
            if doubled:
                without, with_class = self.unet(torch.cat([latents, latents]), t, both).sample.chunk(2)
            else:
                without = self.unet(latents, t, null).sample
                with_class = self.unet(latents, t, conditional).sample
            velocity = without + self.scale * (with_class - without)
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        pixels = self.vae.decode(generator.denoiser.denormalize(latents).to(self.dtype)).sample
        scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return (255 * scaled).round().astype(np.uint8)


def measure_quality(generator: Generator, count: int, scale: float) -> tuple[list[Quality], float]:
    """Every solver and number of steps, and the Frechet distance of a reference-like set of other noise."""
    extractor = load_feature_extractor(LITE0, crop="whole").to(generator.device)

    def features(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).to(generator.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            cls = [extractor(extractor.preprocess(part)).cls for part in pixels.split(32)]
        return torch.cat(cls).cpu().numpy()

    def sampled(solver: str, steps: int, seed: int = 0) -> np.ndarray:
        began = time.perf_counter()
        settings = SamplingSettings(solver=solver, steps=steps, guidance_scale=scale)  # type: ignore[arg-type]
        images = generator.generate(plan(generator, count, settings, seed=seed))
        print(f"{count} images, {solver}, {steps} steps: {time.perf_counter() - began:.0f} s", flush=True)
        return images

    reference = sampled(*REFERENCE)
    of_reference = features(reference)
    found = []
    for solver in SOLVERS:
        for steps in STEPS:
            images = sampled(solver, steps)
            of_image = difference(images, reference)
            found.append(
                Quality(
                    solver=solver,
                    steps=steps,
                    passes=steps * (2 if solver == "heun" else 1),
                    grey_levels=float(of_image.mean()),
                    worst_image=float(of_image.max()),
                    frechet=frechet_distance(features(images), of_reference),
                )
            )
            print(f"  {found[-1].grey_levels:.2f} grey levels, Frechet distance {found[-1].frechet:.3f}", flush=True)
    return found, frechet_distance(features(sampled("unipc", max(STEPS), seed=1)), of_reference)


def plan(generator: Generator, count: int, settings: SamplingSettings, *, seed: int = 0) -> list[PlanRow]:
    """`count` rows, the classes in turns, guided by the class alone: the plain loop knows no feature prior."""
    each = -(-count // len(ISIC7))
    table = standard_plan(dict.fromkeys(ISIC7.codes, each), run_seed=seed, sampling=settings, feature="none")
    return rows_of(table)[:count]


def difference(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each image, in grey levels: [N]."""
    return np.abs(images.astype(np.float64) - reference).mean(axis=(1, 2, 3))


def random_checkpoint(preset: str) -> Checkpoint:
    """Networks of a preset's sizes; what they draw means nothing, how long it takes does."""
    flags = ["--preset", preset, "--init_checkpoint", "random", "--autoencoder.pretrained", "null"]
    config: TrainConfig = replace(parse("train", flags), stage="joint", init_checkpoint=None)
    torch.manual_seed(0)
    networks = build_networks(config, torch.device("cpu"), FEATURE_DIM)
    nn.init.normal_(networks.denoiser.unet.conv_out.weight, std=0.1)  # starts at zero
    info = CheckpointInfo(
        step=0, stage="joint", image_size=config.data.image_size, feature_extractor=LITE0, feature_dim=FEATURE_DIM,
        num_patches=16, conditioning=vars(config.conditioning), config={},
    )  # fmt: skip
    frozen = [network.eval().requires_grad_(False) for network in (networks.autoencoder, networks.denoiser)]
    return Checkpoint(f"random {preset}", "0" * 64, info, *frozen)


def report_speed(speed: list[Speed], batch_size: int, steps: int, repetitions: int) -> None:
    print(f"\nUniPC, {steps} steps, batches of {batch_size}, median of {repetitions} interleaved repetitions")
    print("\n| | images/s | lowest to highest | M2D is faster | in CPU time | grey levels from M2D's |")
    print("|---|---|---|---|---|---|")
    for row in speed:
        print(
            f"| {row.contender} | {row.images_per_s:.2f} | {row.lowest:.2f} to {row.highest:.2f} | {row.ratio:.2f} x | "
            f"{row.cpu_ratio:.2f} x | {row.grey_levels:.2f} |"
        )


def report_quality(quality: list[Quality], other_noise: float, count: int) -> None:
    print(f"\n{count} images a set, against {REFERENCE[1]} {REFERENCE[0]} steps from the same noise")
    print("\n| solver | steps | U-Net passes | grey levels, mean | worst image | Frechet distance |")
    print("|---|---|---|---|---|---|")
    for row in quality:
        print(
            f"| {row.solver} | {row.steps} | {row.passes} | {row.grey_levels:.2f} | {row.worst_image:.2f} | "
            f"{row.frechet:.2f} |"
        )
    print(f"| unipc, other noise | {max(STEPS)} | {max(STEPS)} | | | {other_noise:.2f} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
