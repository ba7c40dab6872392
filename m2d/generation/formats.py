"""How images lie on the disk: class folders of PNGs, webdataset tar shards, or Parquet shards of PNG bytes.

The PNG of an image is the same in all of them, and so are the bytes of a shard whenever it is made: no time of day is
in them. A shard holds one group of images, is written whole, and is named after the group's rows.
"""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
    chunks = {"Software": "M2D", "synthetic": "true", "class": row.label, "index": row.index, "seed": row.seed}
    chunks |= {"attempt": row.attempt, "mode": row.mode, "checkpoint": checkpoint, "settings": settings}
    for key, value in {**chunks, "image": row_json(row)}.items():
        text.add_text(key, str(value))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def row_json(row: PlanRow) -> str:
    """What shaped the image, keys sorted; input images by their file's name alone: folders may name people."""
    values = {key: value for key, value in asdict(row).items() if value is not None}
    for key in ("reference", "reference_b"):
        if key in values:
            values[key] = values[key].rpartition("/")[2]
    return json.dumps(values, sort_keys=True)


@dataclass(frozen=True)
class Format:
    """A form of output. Paths are relative to the output folder, with forward slashes."""

    # (root, group's name, its images) -> the path of the file that holds each. Raises OSError.
    write: Callable[[Path, str, Sequence[EncodedImage]], list[str]]
    # (root, path) -> id -> PNG of everything in one file. Raises OSError or ValueError where it is gone or damaged.
    read: Callable[[Path, str], Mapping[str, bytes]]
    sharded: bool


def _write_folder(root: Path, _: str, images: Sequence[EncodedImage]) -> list[str]:
    paths = [f"{image.row.label}/{image.row.id}.png" for image in images]
    for image, path in zip(images, paths, strict=True):
        (root / path).parent.mkdir(exist_ok=True)
        write_whole(root / path, image.png)
    return paths


def _read_folder(root: Path, path: str) -> Mapping[str, bytes]:
    return {Path(path).stem: (root / path).read_bytes()}


def _write_tar(root: Path, group: str, images: Sequence[EncodedImage]) -> list[str]:
    path = f"{SHARDS}/{group}.tar"
    (root / SHARDS).mkdir(exist_ok=True)
    with whole_file(root / path) as partial, tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            label, settings = str(class_index(image.row.label)).encode(), row_json(image.row).encode()
            for suffix, content in (("png", image.png), ("cls", label), ("json", settings)):
                member = tarfile.TarInfo(f"{image.row.id}.{suffix}")  # owner, time and mode are always the same
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return [path] * len(images)


def _read_tar(root: Path, path: str) -> Mapping[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(root / path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if member.name.endswith(".png") and content is not None:
                    found[member.name.removesuffix(".png")] = content.read()
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return found


SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("class", pa.string()),
        ("label", pa.int64()),  # index of the class
        ("png", pa.binary()),
        ("settings", pa.string()),  # what shaped the image, JSON
    ],
    metadata={"classes": " ".join(CLASSES)},
)


def _write_parquet(root: Path, group: str, images: Sequence[EncodedImage]) -> list[str]:
    path = f"{SHARDS}/{group}.parquet"
    (root / SHARDS).mkdir(exist_ok=True)
    rows = [(one.row.id, one.row.label, class_index(one.row.label), one.png, row_json(one.row)) for one in images]
    table = pa.table(dict(zip(SHARD_SCHEMA.names, zip(*rows, strict=True), strict=True)), schema=SHARD_SCHEMA)
    with whole_file(root / path) as partial:
        pq.write_table(table, partial, compression="none", row_group_size=64)  # PNGs are compressed already
    return [path] * len(images)


def _read_parquet(root: Path, path: str) -> Mapping[str, bytes]:
    try:
        with (root / path).open("rb") as stream:
            table = pq.read_table(stream, columns=["id", "png"])
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return dict(zip(table["id"].to_pylist(), table["png"].to_pylist(), strict=True))


FORMATS = {
    "folder": Format(_write_folder, _read_folder, sharded=False),  # what torchvision's ImageFolder and m2d.data read
    "webdataset": Format(_write_tar, _read_tar, sharded=True),  # <id>.png, <id>.cls (class index), <id>.json
    "parquet": Format(_write_parquet, _read_parquet, sharded=True),  # columns of SHARD_SCHEMA
}


def read_images(root: Path, format_name: str, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Pixels uint8 [H, W, 3] by id. wanted: id -> path; each file is read once."""
    images: dict[str, np.ndarray] = {}
    for path in dict.fromkeys(wanted.values()):
        content = FORMATS[format_name].read(root, path)
        for image_id in (image_id for image_id in content if wanted.get(image_id) == path):
            with Image.open(io.BytesIO(content[image_id]), formats=["PNG"]) as image:
                images[image_id] = np.array(image.convert("RGB"))
    return images
