"""Parquet files with an image column and WebDataset shards, unpacked once into image files and one table.

Called by setup_data. The images' bytes do not change; the folder is then a dataset like any other (m2d.data.layouts).
"""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2d.errors import DataError
from m2d.files.atomic import csv_text, write_whole
from m2d.files.progress import progress
from m2d.files.storage import one_line

IMAGES, TABLE = "images", "metadata.csv"
_SUFFIXES = {  # signature -> suffix
    b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif", b"RIFF": ".webp",
}  # fmt: skip
_IMAGE_COLUMNS = ("image", "img", "png", "jpg", "jpeg")
_LONGEST = 200  # characters of a cell; longer ones are documents, not facts

Sample = tuple[str, bytes, dict[str, Any]]  # name without suffix, encoded image, what is said of it


def import_shards(source: str, data_root: str) -> int:
    """Unpack every .parquet and .tar file below `source` into data_root; returns the number of images there.

    source: a folder or one file. An image that is there already is not written again, and the table comes last, so the
    same command resumes. Raises DataError where source holds no such file, a file is damaged or has no image column.
    """
    place, target = Path(source).expanduser(), Path(data_root)
    shards = [place] if place.is_file() else sorted([*place.rglob("*.parquet"), *place.rglob("*.tar")])
    shards = [shard for shard in shards if shard.suffix in (".parquet", ".tar")]
    if not shards:
        raise DataError(f"import_from: {source} holds no .parquet and no .tar file")
    rows: dict[str, dict[str, Any]] = {}  # file name -> its line of the table
    try:
        (target / IMAGES).mkdir(parents=True, exist_ok=True)
        with progress("import", unit="shards", stderr=False) as shown:
            for done, shard in enumerate(shards, 1):
                for name, image, facts in (_parquet if shard.suffix == ".parquet" else _tar)(shard):
                    suffix = next(
                        (suffix for start, suffix in _SUFFIXES.items() if image.startswith(start)), ".png"
                    )  # the scan rejects it
                    fit = re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "image"
                    file = next(
                        file
                        for file in (f"{fit}{suffix}", f"{shard.stem}_{fit}{suffix}", f"{len(rows)}_{fit}{suffix}")
                        if file not in rows
                    )
                    path = target / IMAGES / file
                    if not path.is_file() or path.stat().st_size != len(image):
                        write_whole(path, image, durable=False)
                    rows[file] = facts
                shown.show(done, len(shards))
        columns = ["file_name", *dict.fromkeys(name for facts in rows.values() for name in facts)]
        table = [{"file_name": f"{IMAGES}/{file}", **facts} for file, facts in rows.items()]
        write_whole(target / TABLE, csv_text(table, columns))
    except (OSError, pa.ArrowException, tarfile.TarError) as error:
        raise DataError(f"import_from: {source} cannot be unpacked into {data_root} ({one_line(error)})") from error
    return len(rows)


def _parquet(path: Path) -> Iterator[Sample]:
    """Of a column of images as Hugging Face writes them (bytes and path), or of plain bytes."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        binary = [field.name for field in schema if _is_image(field.type)]
        columns = [name for name in _IMAGE_COLUMNS if name in binary] or binary
        if not columns:
            raise DataError(f"import_from: {path} has no column of images; found: {', '.join(schema.names)}")
        names = _class_names(schema)
        number = -1
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                image = row.pop(columns[0])
                content = image if isinstance(image, bytes) else (image or {}).get("bytes")
                if content is None:
                    continue
                facts = _facts({name: names.get(name, {}).get(value, value) for name, value in row.items()})
                given = None if isinstance(image, bytes) else image.get("path")
                given = given or next((facts[name] for name in ("image_id", "isic_id", "id") if name in facts), None)
                name = posixpath.splitext(posixpath.basename(str(given or f"{path.stem}_{number:06d}")))[0]
                yield name, content, facts


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema) -> dict[str, dict[int, str]]:
    """column -> its numbers' names, of Hugging Face's ClassLabel features."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: dict(enumerate(feature["names"]))
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _tar(path: Path) -> Iterator[Sample]:
    """Of a WebDataset shard: files of one name and other suffixes belong together and follow one another."""
    with tarfile.open(path) as tar:
        key = ""
        parts: dict[str, bytes] = {}
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            folder, name = posixpath.split(member.name)
            stem, _, suffix = name.partition(".")
            if posixpath.join(folder, stem) != key:
                yield from _sample(key, parts)
                key, parts = posixpath.join(folder, stem), {}
            parts[suffix.lower()] = content.read()
        yield from _sample(key, parts)


def _sample(key: str, parts: dict[str, bytes]) -> Iterator[Sample]:
    image = next((parts[suffix] for suffix in parts if f".{suffix}" in (*_SUFFIXES.values(), ".jpeg", ".tiff")), None)
    if image is None:
        return
    label = parts.get("cls", parts.get("txt"))
    said = {} if label is None else {"label": label.decode(errors="replace").strip()}
    recorded = json.loads(parts["json"]) if "json" in parts else {}
    yield posixpath.basename(key), image, _facts(said | (recorded if isinstance(recorded, dict) else {}))


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """Cells for a table: what is short and no list."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (str, int, float)) and len(str(value)) <= _LONGEST and name != "file_name"
    }
