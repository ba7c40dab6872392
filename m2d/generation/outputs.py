"""The folder of a generation run: labelled images that say what they are, what is done, and one manifest.

    <output>/generation.json      what shapes the images; written first, guards the folder against other settings
    <output>/plan.parquet         what is to be made
    <output>/MEL/MEL_000003.png   or shards/*.tar, shards/*.parquet (m2d.generation.formats)
    <output>/parts/*.parquet      what a run has done so far, afterwards journal.parquet (m2d.generation.journal)
    <output>/manifest.parquet     one row an image, rebuilt from what is done
A run that has ended leaves no folder but those of the classes, so its output is what ImageFolder and m2d.data read.
"""

import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from m2d.classes import CLASSES
from m2d.errors import ConfigError
from m2d.files.atomic import PARTIAL, try_lock, whole_file, write_whole
from m2d.generation.formats import FORMATS, SHARDS, Format
from m2d.generation.journal import (
    JOURNAL_NAME,
    JOURNAL_SCHEMA,
    PARTS,
    cannot_write,
    gather_parts,
    joined,
    read_parts,
    require_damage,
    write_rows,
)
from m2d.generation.recipe import Recipe

RECORD_NAME, PLAN_NAME, MANIFEST_NAME = "generation.json", "plan.parquet", "manifest.parquet"
MANIFEST_SCHEMA = pa.schema([field for field in JOURNAL_SCHEMA if field.name != "accepted"])
_CHECK_THREADS = 8
_LOCK = ".running.lock"


class OutputFolder:
    """The images of one recipe on the disk. `journal` holds what was done when the folder was opened, or read anew."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root = root
        self.recipe = recipe
        self.format: Format = FORMATS[recipe.format]
        self.journal: pa.Table = JOURNAL_SCHEMA.empty_table()
        self.mended: list[str] = []  # what was found damaged when the folder was opened, a line each
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, root: Path, recipe: Recipe) -> Self:
        """Create the folder, or continue it: whole images of this recipe are kept, broken and lost ones made again.

        What a killed run left half done is removed. Until it is closed no other process can open it; a killed one
        loses it. Raises ConfigError where the folder holds another run's images, is at work, or cannot be read or
        written.
        """
        folder = cls(root, recipe)
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder._claim()
            folder._hold()
            folder._remove_leftovers()
            folder._forget_what_is_lost()
            folder._remove_unlisted()
        except OSError as error:
            folder.close()
            raise cannot_write(root, error) from None
        return folder

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def settle(self) -> None:
        """Read what has been done since the folder was opened, and write the manifest of it. Raises ConfigError."""
        self.journal = gather_parts(self.root)
        self.write_manifest()

    @property
    def accepted(self) -> pa.Table:
        """Rows of the images that are there, JOURNAL_SCHEMA, sorted by id."""
        return self.journal.filter(self.journal["accepted"]).sort_by("id")

    def made(self) -> dict[str, int]:
        """Images that are there, by class."""
        counts = Counter(self.accepted["class"].to_pylist())
        return {code: counts[code] for code in CLASSES if counts[code]}

    def rejections(self) -> dict[str, dict[str, int]]:
        """Class -> reason -> how many images were rejected for it."""
        rejected = self.journal.filter(pc.invert(self.journal["accepted"]))
        found: dict[str, dict[str, int]] = {}
        for label, reason in zip(rejected["class"].to_pylist(), rejected["reason"].to_pylist(), strict=True):
            of_class = found.setdefault(label, {})
            of_class[reason] = of_class.get(reason, 0) + 1
        return found

    def write_manifest(self) -> Path:
        """One row for every image of the folder, sorted by id. Returns the manifest's path."""
        table = self.accepted.select(MANIFEST_SCHEMA.names)
        table = table.replace_schema_metadata({"m2d": self.recipe.to_json()})
        path = self.root / MANIFEST_NAME
        try:
            with whole_file(path) as partial:
                pq.write_table(table, partial)
        except OSError as error:
            raise cannot_write(path, error) from None
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
        taken = [name for name in (*CLASSES, SHARDS, PARTS, JOURNAL_NAME, MANIFEST_NAME) if (self.root / name).exists()]
        if taken:
            raise ConfigError(
                f"output: {self.root} holds {taken[0]} but no {RECORD_NAME}, so M2D did not start it; "
                "name an empty folder, or leave --output out"
            )
        write_whole(path, f"{self.recipe.to_json()}\n")

    def _hold(self) -> None:
        self._lock = try_lock(self.root / _LOCK)
        if self._lock is None:
            raise ConfigError(
                f"output: another run is at work in {self.root}; wait for it to end, or name another --output"
            )

    def _remove_leftovers(self) -> None:
        for name in (".", *CLASSES, SHARDS, PARTS):
            for suffix in (PARTIAL, ".tmp"):  # the second of older versions
                for path in (self.root / name).glob(f".*{suffix}"):
                    path.unlink(missing_ok=True)

    def _forget_what_is_lost(self) -> None:
        """Strike the images from the journal whose file is gone or not what it was; every file is read and hashed."""
        parts, torn = read_parts(self.root)
        for path in torn:
            path.unlink(missing_ok=True)
            self.mended.append(f"{path.relative_to(self.root)} cannot be read")
        listed: dict[str, list[tuple[Path, int, str, str]]] = {}  # file -> part, row, id, sha256 of its images
        for part, table in parts.items():
            columns = (table[name].to_pylist() for name in ("accepted", "path", "id", "sha256"))
            for row, (accepted, file, image_id, sha256) in enumerate(zip(*columns, strict=True)):
                if accepted:
                    listed.setdefault(file, []).append((part, row, image_id, sha256))
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            whole = list(pool.map(self._whole_images, listed))
        lost: dict[Path, set[int]] = {}
        for (file, rows), there in zip(listed.items(), whole, strict=True):
            fits = {image_id for _, _, image_id, sha256 in rows if there.get(image_id) == sha256}
            broken = {image_id for _, _, image_id, _ in rows} - fits
            if broken:
                self.mended.append(f"{file} is lost or damaged")
                (self.root / file).unlink(missing_ok=True)
            for part, row, image_id, sha256 in rows:
                # A shard is whole or nothing; a row that another one of the same image has replaced is struck too.
                if broken or there[image_id] != sha256:
                    lost.setdefault(part, set()).add(row)
        for part, numbers in lost.items():
            kept = parts[part].take(
                pa.array([row for row in range(len(parts[part])) if row not in numbers], pa.int64())
            )
            parts[part] = kept
            if len(kept):
                write_rows(part, kept)
            else:
                part.unlink()
        self.journal = joined(parts.values())

    def _whole_images(self, file: str) -> dict[str, str]:
        """Id -> sha256 of the PNGs in a file; empty where it is gone or damaged, ConfigError where the disk fails."""
        try:
            found = self.format.read(self.root, file)
        except (OSError, ValueError) as error:
            require_damage(self.root / file, error)
            return {}
        return {image_id: hashlib.sha256(png).hexdigest() for image_id, png in found.items()}

    def _remove_unlisted(self) -> None:
        """Images of this recipe that a killed run wrote and did not list: they will be made again."""
        listed = set(self.journal["path"].to_pylist())
        shards = [path for path in (self.root / SHARDS).glob("*") if re.fullmatch(r"[0-9a-f]{16}\.\w+", path.name)]
        for path in (*shards, *(path for name in CLASSES for path in (self.root / name).glob("*.png"))):
            if path.relative_to(self.root).as_posix() not in listed and (path in shards or self._is_ours(path)):
                path.unlink(missing_ok=True)

    def _is_ours(self, path: Path) -> bool:
        """Whether a PNG says that this recipe made it; a user's own stays."""
        try:
            with Image.open(path, formats=["PNG"]) as image:
                return image.info.get("settings") == self.recipe.to_json()
        except (OSError, SyntaxError, ValueError):
            return False


def _difference(record: Path, recipe: Recipe) -> str:
    """`steps 10 there, 25 here`: the first field in which a record differs."""
    try:
        there = json.loads(record.read_text(encoding="utf-8"))
        here = json.loads(recipe.to_json())
        name = next(name for name in here if there.get(name) != here[name])
    except (ValueError, AttributeError, StopIteration):
        return f"{RECORD_NAME} cannot be read"
    values = [there.get(name), here[name]]
    if name in ("checkpoint", "plan"):
        values = [str(value)[:12] for value in values]
    elif all(isinstance(value, dict) for value in values):  # gates and balance: the setting within
        inner = next(key for key in {**values[0], **values[1]} if values[0].get(key) != values[1].get(key))
        name, values = f"{name}.{inner}", [value.get(inner) for value in values]
    return f"{name} {values[0]} there, {values[1]} here"
