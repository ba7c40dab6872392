"""The folder of a generation run: labelled PNGs that say what they are, and one manifest.

    <output>/generation.json      what shapes the pixels; written first, guards the folder against other settings
    <output>/MEL/MEL_000003.png   provenance in its text chunks
    <output>/manifest.parquet     one row an image, rebuilt from the images
The class folders are what m2d.data reads, so a run's output is also a dataset.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from m2d.classes import CLASSES
from m2d.errors import ConfigError
from m2d.generation.request import SampleRequest
from m2d.generation.settings import Feature, GenerateConfig, Precision

RECORD_NAME = "generation.json"
MANIFEST_NAME = "manifest.parquet"
MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),  # relative to the manifest
        ("class", pa.string()),
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("mode", pa.string()),
        ("guidance_scale", pa.float64()),
        ("guidance_low", pa.float64()),
        ("guidance_high", pa.float64()),
        ("solver", pa.string()),
        ("steps", pa.int64()),
        ("precision", pa.string()),
        ("feature", pa.string()),  # prior or none
        ("feature_temperature", pa.float64()),  # null without a prior
        ("feature_weak", pa.bool_()),  # the prior knows few images of the class
        ("checkpoint", pa.string()),  # sha256
        ("sha256", pa.string()),  # of the PNG file
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("created", pa.timestamp("s", tz="UTC")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that shapes a run's pixels, and nothing else: two runs share a folder only if these are equal."""

    checkpoint: str  # sha256
    seed: int
    solver: str
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    precision: str
    feature: str
    feature_temperature: float | None  # None where no feature is drawn
    mode: str = "standard"

    @classmethod
    def of(cls, config: GenerateConfig, *, checkpoint_sha256: str, precision: Precision, feature: Feature) -> Self:
        """The part of a run's settings that shapes pixels; `precision` and `feature` are those decided, never None."""
        low, high = config.guidance_interval
        return cls(
            checkpoint=checkpoint_sha256,
            seed=config.seed,
            solver=config.solver,
            steps=config.steps,
            guidance_scale=float(config.guidance_scale),  # 2 and 2.0 are one recipe
            guidance_interval=(float(low), float(high)),
            precision=precision,
            feature=feature,
            feature_temperature=float(config.feature_temperature) if feature == "prior" else None,
        )

    @property
    def hash(self) -> str:
        """First ten hex digits of a SHA-256 over the fields."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    def to_json(self) -> str:
        """One line, keys sorted: equal recipes give equal text."""
        return json.dumps(asdict(self), sort_keys=True)


class ImageFolder:
    """The images of one recipe on disk. `images` maps the id of each complete one to its manifest row."""

    def __init__(self, root: Path, recipe: Recipe, weak_classes: Iterable[str] = ()) -> None:
        self.root = root
        self.recipe = recipe
        self.weak_classes = frozenset(weak_classes)
        self.images: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, root: Path, recipe: Recipe, weak_classes: Iterable[str] = ()) -> Self:
        """Create the folder, or continue it: complete images of this recipe are kept, broken ones made again.

        weak_classes: those of the checkpoint whose feature prior is weak; the manifest marks their images.
        Raises ConfigError where the folder holds another run's images, or cannot be written.
        """
        folder = cls(root, recipe, weak_classes)
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder._claim()
            for path in sorted(path for label in CLASSES for path in (root / label).glob("*.png")):
                row = folder._read_row(path)
                if row is not None:
                    folder.images[row["id"]] = row
        except OSError as error:
            raise _cannot_write(root, error) from None
        return folder

    def path_of(self, request: SampleRequest) -> Path:
        """Where the image of a request lies."""
        return self.root / request.label / f"{request.image_id}.png"

    def write_image(self, request: SampleRequest, image: np.ndarray) -> None:
        """image: uint8 [H, W, 3]. The file appears whole or not at all. Raises ConfigError where it cannot."""
        path = self.path_of(request)
        text = PngImagePlugin.PngInfo()
        for key, value in {
            "Software": "M2D",
            "synthetic": "true",
            "class": request.label,
            "index": str(request.index),
            "seed": str(request.seed),
            "checkpoint": self.recipe.checkpoint,
            "settings": self.recipe.to_json(),
        }.items():
            text.add_text(key, value)
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as stream:
                Image.fromarray(image).save(stream, format="PNG", pnginfo=text)
            row = self._read_row(path)
        except OSError as error:
            raise _cannot_write(path, error) from None
        assert row is not None, f"{path} was written and cannot be read"
        self.images[request.image_id] = row

    def write_manifest(self) -> Path:
        """One row for every complete image of the folder, sorted by id. Returns the manifest's path."""
        rows = [self.images[image_id] for image_id in sorted(self.images)]
        table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA.with_metadata({"m2d": self.recipe.to_json()}))
        path = self.root / MANIFEST_NAME
        try:
            with replacing(path) as stream:
                pq.write_table(table, stream)
        except OSError as error:
            raise _cannot_write(path, error) from None
        return path

    def _claim(self) -> None:
        """Write the record, or find it equal to ours."""
        path = self.root / RECORD_NAME
        if path.exists():
            if path.read_text(encoding="utf-8").strip() != self.recipe.to_json():
                raise ConfigError(
                    f"output: {self.root} holds images of other settings ({_difference(path, self.recipe)}); "
                    "name another --output, or leave it out"
                )
            return
        taken = [name for name in (*CLASSES, MANIFEST_NAME) if (self.root / name).exists()]
        if taken:
            raise ConfigError(
                f"output: {self.root} holds {taken[0]} but no {RECORD_NAME}, so M2D did not start it; "
                "name an empty folder, or leave --output out"
            )
        with replacing(path) as stream:
            stream.write(self.recipe.to_json().encode() + b"\n")

    def _read_row(self, path: Path) -> dict[str, Any] | None:
        """Manifest row of an image file; None where the file is broken or not of this recipe."""
        encoded = path.read_bytes()
        try:
            with Image.open(BytesIO(encoded), formats=["PNG"]) as image:
                text, (width, height) = dict(image.info), image.size
                image.verify()  # every chunk's checksum, to the end of the file
            label, index, seed = text["class"], int(text["index"]), int(text["seed"])
        except (OSError, SyntaxError, KeyError, ValueError):
            return None
        request = SampleRequest(label=label, index=index, seed=seed)
        if text.get("settings") != self.recipe.to_json() or path != self.path_of(request):
            return None
        recipe = self.recipe
        return {
            "id": request.image_id,
            "path": path.relative_to(self.root).as_posix(),
            "class": label,
            "index": index,
            "seed": seed,
            "mode": recipe.mode,
            "guidance_scale": recipe.guidance_scale,
            "guidance_low": recipe.guidance_interval[0],
            "guidance_high": recipe.guidance_interval[1],
            "solver": recipe.solver,
            "steps": recipe.steps,
            "precision": recipe.precision,
            "feature": recipe.feature,
            "feature_temperature": recipe.feature_temperature,
            "feature_weak": label in self.weak_classes,
            "checkpoint": recipe.checkpoint,
            "sha256": hashlib.sha256(encoded).hexdigest(),
            "width": width,
            "height": height,
            "created": datetime.fromtimestamp(int(path.stat().st_mtime), UTC),
        }


def default_output(checkpoint_path: str, recipe: Recipe) -> Path:
    """<experiment>/generated_images/<hash>; the experiment is what holds checkpoints/, or the checkpoint."""
    path = Path(os.path.abspath(checkpoint_path))
    above = next((parent.parent for parent in path.parents if parent.name == "checkpoints"), path.parent)
    return above / "generated_images" / recipe.hash


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream whose content becomes `path` in one step at the end, or is thrown away on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _difference(record: Path, recipe: Recipe) -> str:
    """`steps 10 there, 25 here`: the first field in which a record differs."""
    try:
        there = json.loads(record.read_text(encoding="utf-8"))
        here = json.loads(recipe.to_json())
        name = next(name for name in here if there.get(name) != here[name])
    except (ValueError, AttributeError, StopIteration):
        return f"{RECORD_NAME} cannot be read"
    values = [str(value)[:12] if name == "checkpoint" else value for value in (there.get(name), here[name])]
    return f"{name} {values[0]} there, {values[1]} here"


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"output: {path} cannot be written ({error.strerror or error}); make room or name another --output, "
        "then run the same command again"
    )
