"""One generation run on one device: what `python -m m2d generate` does, without Ray."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from m2d.diffusion.feature_prior import WEAK_BELOW
from m2d.errors import ConfigError
from m2d.generation.contact_sheet import contact_sheet
from m2d.generation.generator import Generator, pick_device
from m2d.generation.outputs import ImageFolder, Recipe, default_output, replacing
from m2d.generation.request import SampleRequest, class_requests
from m2d.generation.settings import GenerateConfig
from m2d.models.checkpoint import load_checkpoint

_SHEET_COLUMNS = 8
_PLAIN_LINE_EVERY_S = 10.0


def generate(config: GenerateConfig) -> Path:
    """Make the images that are missing, then the manifest and the contact sheet. Returns the output folder.

    Raises CheckpointError, DataError for a class that the feature prior has no image of, or ConfigError for an output
    folder of other settings, a device or a prior that is not there, or a batch that does not fit.
    """
    device = pick_device(config.device)
    checkpoint = load_checkpoint(config.checkpoint, str(device))
    generator = Generator(
        checkpoint,
        config,
        batch_size=config.batch_size,
        device=str(device),
        mixed_precision=config.mixed_precision,
        feature=config.feature,
        feature_temperature=config.feature_temperature,
    )
    prior = checkpoint.prior if generator.feature == "prior" else None
    weak = prior.weak if prior else []
    if prior:
        prior.require(config.class_codes)
    recipe = Recipe.of(
        config, checkpoint_sha256=checkpoint.sha256, precision=generator.precision, feature=generator.feature
    )
    root = Path(config.output) if config.output else default_output(str(checkpoint.path), recipe)
    folder = ImageFolder.open(root, recipe, weak)
    requests = class_requests(config.class_codes, num_samples=config.num_samples, run_seed=config.seed)
    missing = [request for request in requests if request.image_id not in folder.images]
    _say(
        f"generating {len(missing):,} of {len(requests):,} images on {device} (precision {generator.precision}, "
        f"feature {generator.feature})"
    )
    weak_here = [code for code in config.class_codes if code in weak]
    if weak_here:
        _say(
            f"warning: fewer than {WEAK_BELOW} training images stand behind the features of {', '.join(weak_here)}; "
            "look at these images before you use them (the manifest marks them feature_weak)"
        )

    began = time.monotonic()
    try:
        _generate_missing(generator, folder, missing)
    finally:
        folder.write_manifest()
    seconds = time.monotonic() - began

    caption = (
        f"Synthetic images, not patients. Checkpoint {checkpoint.sha256[:12]}, step {checkpoint.step:,}; "
        f"{config.solver}, {config.steps} steps; guidance {config.guidance_scale:g} at t in "
        f"[{config.guidance_interval[0]:g}, {config.guidance_interval[1]:g}]; "
        f"{_feature_text(recipe, weak_here)}; seed {config.seed}; "
        f"{checkpoint.image_size} x {checkpoint.image_size} px."
    )
    _write_sheet(folder, requests, caption)
    speed = f", {len(missing) / seconds:.1f} images/s" if missing else ""
    print(f"{len(requests):,} images ({len(missing):,} new{speed}), manifest.parquet and contact_sheet.png in {root}")
    return root


def _generate_missing(generator: Generator, folder: ImageFolder, missing: list[SampleRequest]) -> None:
    with _progress(len(missing)) as progress:
        for first in range(0, len(missing), generator.batch_size):
            batch = missing[first : first + generator.batch_size]
            try:
                images = generator.generate(batch)
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"batch_size {generator.batch_size} does not fit the memory of {generator.device}; "
                    f"try --batch_size {max(1, generator.batch_size // 2)} (the images stay the same)"
                ) from None
            for request, image in zip(batch, images, strict=True):
                folder.write_image(request, image)
            progress.advance(len(batch))


def _feature_text(recipe: Recipe, weak: list[str]) -> str:
    if recipe.feature == "none":
        return "the class alone, no feature"
    rough = f" (few images of {', '.join(weak)})" if weak else ""
    return f"features drawn from the class prior at temperature {recipe.feature_temperature:g}{rough}"


def _write_sheet(folder: ImageFolder, requests: list[SampleRequest], caption: str) -> None:
    """The first images of each class, read back from disk, so that the sheet shows what a user has."""
    by_class: dict[str, list[SampleRequest]] = {}
    for request in requests:
        by_class.setdefault(request.label, []).append(request)
    sheet = contact_sheet(
        {
            label: np.stack([_read(folder.path_of(request)) for request in of_class[:_SHEET_COLUMNS]])
            for label, of_class in by_class.items()
        },
        title="M2D synthetic dermoscopy",
        caption=caption,
        totals={label: len(of_class) for label, of_class in by_class.items()},
    )
    with replacing(folder.root / "contact_sheet.png") as stream:
        sheet.save(stream, format="PNG")


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class _ProgressReport(Protocol):
    def advance(self, images: int) -> None: ...


@contextmanager
def _progress(total: int) -> Iterator[_ProgressReport]:
    """A bar on a terminal, a plain line every few seconds elsewhere; nothing where there is nothing to do."""
    console = Console(stderr=True)
    if not total or not console.is_terminal:
        yield _PlainLines(total)
        return
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), _ImagesPerSecond(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield _Bar(bar, total)


class _Bar:
    def __init__(self, bar: Progress, total: int) -> None:
        self.bar = bar
        self.task = bar.add_task("generating", total=total)

    def advance(self, images: int) -> None:
        self.bar.advance(self.task, images)


class _PlainLines:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.began = self.last_line = time.monotonic()

    def advance(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if now - self.last_line < _PLAIN_LINE_EVERY_S and self.done < self.total:
            return
        self.last_line = now
        per_second = self.done / max(now - self.began, 1e-9)
        left = (self.total - self.done) / per_second
        _say(f"{self.done:,}/{self.total:,} images, {per_second:.1f} images/s, {left:.0f} s left")


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
