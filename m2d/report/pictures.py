"""The pictures that a run left, and what fits into one page. Knows files and pixels, no HTML."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
from PIL import Image
from pyarrow import fs

from m2d.experiments.files import ExperimentFiles

PAGE_BYTES = 3_000_000  # of all pictures of a page; as base64 they take a third more, 4 MB
_STEP = re.compile(r"step_(\d{8,})\.png")
# (widest, lossy quality) of what is tried where a page would be too heavy, the gentlest first; None: every pixel kept.
_LIGHTER: tuple[tuple[int | None, int | None], ...] = ((None, None), (1600, 92), (1000, 85), (700, 75))


@dataclass(frozen=True)
class Picture:
    """An encoded image. width, height: pixels; step: of the training step it shows, where it shows one."""

    data: bytes
    width: int
    height: int
    format: str = "png"
    step: int | None = None

    @property
    def uri(self) -> str:
        """A data URI, which needs no other file and no network."""
        return f"data:image/{self.format};base64,{base64.b64encode(self.data).decode()}"


def newest_picture(files: ExperimentFiles, kind: str) -> Picture | None:
    """The picture of the latest step in visualizations/KIND; one that cannot be read gives way to the one before."""
    folder = f"visualizations/{kind}"
    steps = [int(matched[1]) for matched in map(_STEP.fullmatch, names_in(files, folder)) if matched]
    for step in sorted(steps, reverse=True):
        picture = read_picture(files, f"{folder}/step_{step:08d}.png")
        if picture is not None:
            return replace(picture, step=step)
    return None


def read_picture(files: ExperimentFiles, name: str) -> Picture | None:
    """A PNG of the experiment; None where there is none that can be read."""
    data = read_bytes(files, name)
    return None if data is None else png_picture(data)


def png_picture(data: bytes) -> Picture | None:
    """The PNG, looked at before it goes onto a page: None where it is none, or is cut."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            return Picture(data, image.width, image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def read_bytes(files: ExperimentFiles, name: str) -> bytes | None:
    """A file's content; None where there is none that can be read."""
    try:
        with files.filesystem.open_input_file(f"{files.root}/{name}") as file:
            content: bytes = file.read()
            return content
    except (OSError, pa.ArrowException):
        return None


def names_in(files: ExperimentFiles, folder: str) -> list[str]:
    """Names of what a folder holds; none where it is not there."""
    try:
        found = files.filesystem.get_file_info(fs.FileSelector(f"{files.root}/{folder}", allow_not_found=True))
    except (OSError, pa.ArrowException):
        return []
    return sorted(info.base_name for info in found)


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


def _lighter(now: Picture, original: Picture, widest: int | None, quality: int | None) -> Picture:
    """The original as WebP, where that is lighter than what there is now."""
    with Image.open(io.BytesIO(original.data), formats=["PNG"]) as opened:
        image = opened.convert("RGB")
    if widest is not None and image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=quality is None, quality=quality or 50, method=3)
    made = Picture(buffer.getvalue(), image.width, image.height, "webp", original.step)
    return made if len(made.data) < len(now.data) else now
