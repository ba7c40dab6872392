"""The pictures of a report: those that a run left, which samples are shown, and what fits into one page. No HTML."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from pyarrow import fs

from m2d.experiments.files import ExperimentFiles
from m2d.experiments.wording import number_text

PAGE_BYTES = 3_000_000  # of all pictures of a page; as base64 they take a third more, 4 MB
RUNS, SHEET = "generated_images", "contact_sheet.png"
_STEP = re.compile(r"step_(\d{8,})\.png")
# (widest, lossy quality) of what is tried where a page would be too heavy, the gentlest first; None: every pixel kept.
_LIGHTER: tuple[tuple[int | None, int | None], ...] = ((None, None), (1600, 92), (1000, 85), (700, 75))


@dataclass(frozen=True)
class Picture:
    """An encoded image. width, height: pixels; step: of training, where it shows one; caption: of samples."""

    data: bytes
    width: int
    height: int
    format: str = "png"
    step: int | None = None
    caption: str = ""

    @property
    def uri(self) -> str:
        """A data URI, which needs no other file and no network."""
        return f"data:image/{self.format};base64,{base64.b64encode(self.data).decode()}"


def newest_picture(files: ExperimentFiles, kind: str) -> Picture | None:
    """The picture of the latest step in visualizations/KIND; one that cannot be read gives way to the one before."""
    folder = f"visualizations/{kind}"
    steps = [int(matched[1]) for matched in map(_STEP.fullmatch, files.names(folder)) if matched]
    for step in sorted(steps, reverse=True):
        picture = png_picture(files.content(f"{folder}/step_{step:08d}.png"))
        if picture is not None:
            return replace(picture, step=step)
    return None


def png_picture(data: bytes | None) -> Picture | None:
    """The PNG, looked at before it goes onto a page: None where it is none, or is cut."""
    try:
        with Image.open(io.BytesIO(data or b""), formats=["PNG"]) as image:
            image.load()
            return Picture(data or b"", image.width, image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def find_samples(files: ExperimentFiles, given: Path | None) -> Picture | None:
    """A grid of generated images with its caption.

    given: the folder of a generation run. Otherwise the latest picture of training, or a contact sheet.
    """
    if given is not None:
        folder = given.absolute()
        found = _contact_sheet(ExperimentFiles(fs.LocalFileSystem(), str(folder.parent)), folder.name)
        if found is not None:
            return found
    picture = newest_picture(files, "samples")
    if picture is not None:
        text = f"Drawn by the averaged U-Net after {picture.step:,} steps, from the same seeds each time."
        return replace(picture, caption=text)
    # A run that asked for every class shows more than one that filled up some.
    folders = [f"{RUNS}/{name}" for name in files.names(RUNS)]
    whole = {folder: files.json(f"{folder}/generation.json").get("mode") == "standard" for folder in folders}
    folders.sort(key=lambda folder: (whole[folder], files.modified(f"{folder}/{SHEET}"), folder), reverse=True)
    sheets = (_contact_sheet(files, folder) for folder in folders)
    return next((sheet for sheet in sheets if sheet is not None), None)


def fitted(pictures: Mapping[str, Picture], most: int = PAGE_BYTES) -> dict[str, Picture]:
    """The pictures in at most about `most` bytes: as they are where they fit, otherwise the largest made lighter first.

    First without a loss, then no wider than a page shows them, and only then with one that is hard to see.
    """
    fitting = dict(pictures)
    for widest, quality in _LIGHTER:
        for name in sorted(fitting, key=lambda name: -len(fitting[name].data)):
            if sum(len(picture.data) for picture in fitting.values()) <= most:
                return fitting
            fitting[name] = _lighter(fitting[name], pictures[name], widest, quality)
    return fitting


def _contact_sheet(files: ExperimentFiles, folder: str) -> Picture | None:
    picture = png_picture(files.content(f"{folder}/{SHEET}"))
    if picture is None:
        return None
    known = files.json(f"{folder}/generation.json")
    parts = [str(known["solver"])] if known.get("solver") else []
    parts += [f"{number_text(known['steps'])} steps"] if known.get("steps") else []
    parts += [f"guidance {number_text(known['guidance_scale'])}"] if known.get("guidance_scale") else []
    parts += [f"seed {known['seed']}"] if known.get("seed") is not None else []
    return replace(picture, caption=f"Contact sheet of {folder}{': ' if parts else ''}{', '.join(parts)}.")


def _lighter(now: Picture, original: Picture, widest: int | None, quality: int | None) -> Picture:
    """The original as WebP, where that is lighter than what there is now."""
    with Image.open(io.BytesIO(original.data), formats=["PNG"]) as opened:
        image = opened.convert("RGB")
    if widest is not None and image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=quality is None, quality=quality or 50, method=3)
    made = replace(original, data=buffer.getvalue(), width=image.width, height=image.height, format="webp")
    return made if len(made.data) < len(now.data) else now
