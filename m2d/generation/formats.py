"""How images lie on the disk: class folders of PNGs, webdataset tar shards, or Parquet shards of PNG bytes.

The PNG of an image is the same in all of them, and so are the bytes of a shard whenever it is made: no time of day is
in them. A shard holds one group of images, is written whole, and is named after the group's rows.
"""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from m2d.classes import CLASSES, class_index
from m2d.files.atomic import whole_file, write_whole
from m2d.generation.plan import PlanRow

SHARDS = "shards"


@dataclass(frozen=True)
class EncodedImage:
    """A PNG and the row that it was made from."""

    row: PlanRow
    png: bytes


def encode_png(image: np.ndarray, row: PlanRow, *, checkpoint: str, settings: str) -> bytes:
    """PNG of an image uint8 [H, W, 3] that says in its text chunks that it is synthetic, and from what.

    checkpoint: sha256. settings: of the run, as JSON.
    """
    text = PngImagePlugin.PngInfo()
    for key, value in {
        "Software": "M2D",
        "synthetic": "true",
        "class": row.label,
        "index": str(row.index),
        "seed": str(row.seed),
        "attempt": str(row.attempt),
        "mode": row.mode,
        "checkpoint": checkpoint,
        "settings": settings,
        "image": row_json(row),
    }.items():
        text.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def decode_png(png: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return np.array(image.convert("RGB"))


def row_json(row: PlanRow) -> str:
    """What shaped the image, keys sorted; input images by their file's name alone, for folders tell of people."""
    values = {key: value for key, value in asdict(row).items() if value is not None}
    for key in ("reference", "reference_b"):
        if key in values:
            values[key] = values[key].rpartition("/")[2]
    return json.dumps(values, sort_keys=True)


class Format(Protocol):
    """A form of output. Paths are relative to the output folder, with forward slashes."""

    sharded: bool

    def write(self, root: Path, group: str, images: Sequence[EncodedImage]) -> list[str]:
        """Write a group's images; returns the path of the file that holds each. Raises OSError."""
        ...

    def read(self, root: Path, path: str) -> Mapping[str, bytes]:
        """Id -> PNG of everything in one file. Raises OSError or ValueError where it is gone or damaged."""
        ...


class FolderFormat:
    """CLASS/<id>.png: what torchvision's ImageFolder and m2d.data read."""

    sharded = False

    def write(self, root: Path, group: str, images: Sequence[EncodedImage]) -> list[str]:
        """See Format."""
        paths = [f"{image.row.label}/{image.row.id}.png" for image in images]
        for image, path in zip(images, paths, strict=True):
            (root / path).parent.mkdir(exist_ok=True)
            write_whole(root / path, image.png)
        return paths

    def read(self, root: Path, path: str) -> Mapping[str, bytes]:
        """See Format."""
        return {Path(path).stem if path.endswith(".png") else path: (root / path).read_bytes()}


class WebdatasetFormat:
    """shards/<group>.tar with <id>.png, <id>.cls (class index) and <id>.json (what shaped the image)."""

    sharded = True

    def write(self, root: Path, group: str, images: Sequence[EncodedImage]) -> list[str]:
        """See Format."""
        path = f"{SHARDS}/{group}.tar"
        (root / SHARDS).mkdir(exist_ok=True)
        with (
            whole_file(root / path) as partial,
            tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for image in images:
                row = image.row
                for suffix, content in (
                    ("png", image.png),
                    ("cls", str(class_index(row.label)).encode()),
                    ("json", row_json(row).encode()),
                ):
                    member = tarfile.TarInfo(f"{row.id}.{suffix}")  # owner, time and mode are the same for ever
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return [path] * len(images)

    def read(self, root: Path, path: str) -> Mapping[str, bytes]:
        """See Format."""
        try:
            with tarfile.open(root / path) as tar:
                found: dict[str, bytes] = {}
                for member in tar:
                    content = tar.extractfile(member)
                    if member.name.endswith(".png") and content is not None:
                        found[member.name.removesuffix(".png")] = content.read()
                return found
        except tarfile.TarError as error:
            raise ValueError(f"{path} is damaged ({error})") from error


SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("class", pa.string()),
        ("label", pa.int64()),  # index of the class
        ("png", pa.binary()),
        ("settings", pa.string()),  # what shaped the image, JSON
    ]
)


class ParquetFormat:
    """shards/<group>.parquet with the columns of SHARD_SCHEMA."""

    sharded = True

    def write(self, root: Path, group: str, images: Sequence[EncodedImage]) -> list[str]:
        """See Format."""
        path = f"{SHARDS}/{group}.parquet"
        (root / SHARDS).mkdir(exist_ok=True)
        rows = [
            {
                "id": image.row.id,
                "class": image.row.label,
                "label": class_index(image.row.label),
                "png": image.png,
                "settings": row_json(image.row),
            }
            for image in images
        ]
        table = pa.Table.from_pylist(rows, SHARD_SCHEMA.with_metadata({"classes": " ".join(CLASSES)}))
        with whole_file(root / path) as partial:
            pq.write_table(table, partial, compression="none", row_group_size=64)  # PNGs are compressed already
        return [path] * len(images)

    def read(self, root: Path, path: str) -> Mapping[str, bytes]:
        """See Format."""
        try:
            with (root / path).open("rb") as stream:
                table = pq.read_table(stream, columns=["id", "png"])
        except pa.ArrowException as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        return dict(zip(table["id"].to_pylist(), table["png"].to_pylist(), strict=True))


FORMATS: dict[str, Format] = {
    "folder": FolderFormat(),
    "webdataset": WebdatasetFormat(),
    "parquet": ParquetFormat(),
}


def read_images(root: Path, format_name: str, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Pixels uint8 [H, W, 3] by id. wanted: id -> path; each file is read once."""
    by_path: dict[str, list[str]] = {}
    for image_id, path in wanted.items():
        by_path.setdefault(path, []).append(image_id)
    images: dict[str, Any] = {}
    for path, ids in by_path.items():
        content = FORMATS[format_name].read(root, path)
        images |= {image_id: decode_png(content[image_id]) for image_id in ids}
    return images
