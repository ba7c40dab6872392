"""The folder of a generation run: labelled images that say what they are, what is done, one manifest, and pictures.

    <output>/generation.json      the recipe, what shapes the images; written first, keeps other settings out
    <output>/plan.parquet         what is to be made
    <output>/MEL/MEL_000003.png   or shards/*.tar, shards/*.parquet (m2d.generation.formats)
    <output>/parts/<name>.parquet one for each finished group: a row for each image tried, kept or rejected
    <output>/journal.parquet      the parts of runs that have ended, in one
    <output>/manifest.parquet     one row per image, rebuilt from the journal
    <output>/contact_sheet.png    and strip_<group>.png for each complete walk between two images
A row in a part or the journal is the only thing that counts as done, so a killed run loses the groups in the making and
repeats nothing. A part's name comes from its rows: whoever makes a group again replaces its part. A run that has ended
leaves no folders but those of the classes, which ImageFolder and m2d.data read. Called by the driver and by writing
tasks, so it imports no torch.
"""

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from rich.table import Table

from m2d.classes import CLASSES
from m2d.errors import ConfigError
from m2d.files.atomic import PARTIAL, try_lock, whole_file, write_whole
from m2d.generation.contact_sheet import contact_sheet, strip
from m2d.generation.formats import FORMATS, SHARDS, read_images
from m2d.generation.plan import PLAN_SCHEMA, PlanRow
from m2d.generation.settings import Feature, GenerateConfig

RECORD_NAME, PLAN_NAME, MANIFEST_NAME = "generation.json", "plan.parquet", "manifest.parquet"
PARTS, JOURNAL_NAME = "parts", "journal.parquet"
JOURNAL_SCHEMA = pa.schema(
    [
        *PLAN_SCHEMA,
        ("accepted", pa.bool_()),
        ("gates", pa.string()),  # on, recorded (looked at and kept anyway), or off
        ("reason", pa.string()),  # the gate that found fault with the image; null: none did
        ("nearest_id", pa.string()),  # the training image nearest to it, or that it copies
        ("nearest_distance", pa.float64()),  # to that one, in the extractor's feature space
        ("class_distance", pa.float64()),  # mean, to the class's nearest training images
        ("pixel_distance", pa.float64()),  # to the training image nearest by thumbnails
        ("saturated_share", pa.float64()),  # of the pixels
        ("contrast", pa.float64()),
        ("path", pa.string()),  # of the file that holds the image, relative to the output; null where rejected
        ("sha256", pa.string()),  # of the PNG
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("feature_weak", pa.bool_()),  # the prior knows few images of the class
        ("precision", pa.string()),
        ("checkpoint", pa.string()),  # sha256
        ("created", pa.timestamp("ms", tz="UTC")),  # Parquet has no coarser one
    ]
)
MANIFEST_SCHEMA = pa.schema([field for field in JOURNAL_SCHEMA if field.name != "accepted"])
SHEET_COLUMNS = 8
_THREADS = 8
_LOCK = ".running.lock"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that shapes a run's images, and nothing else: two runs share a folder only if these are equal.

    How many images there are and how they are batched is not in it, so that a run can ask for more. Where the input
    images or a plan that somebody edited decide, `plan` holds the digest of all rows, and more rows go elsewhere.
    """

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
    format: str = "folder"
    gates: dict[str, Any] | None = None  # what is checked, with which reference; None: every image is kept
    balance: dict[str, Any] | None = None  # the target and the hash of the catalog whose images it counts
    plan: str | None = None  # sha256 over the rows, input images by their content

    @classmethod
    def of(cls, config: GenerateConfig, *, feature: Feature, **decided: Any) -> Self:
        """What shapes images in a run's settings; feature (never None) and the other fields as decided."""
        low, high = config.guidance_interval
        return cls(
            seed=config.seed,
            solver=config.solver,
            steps=config.steps,
            guidance_scale=float(config.guidance_scale),  # 2 and 2.0 are one recipe
            guidance_interval=(float(low), float(high)),
            feature=feature,
            feature_temperature=float(config.feature_temperature) if feature == "prior" else None,
            mode="plan" if config.plan else config.mode,
            format=config.format,
            **decided,
        )

    @property
    def hash(self) -> str:
        """First ten hex digits of a SHA-256 over the fields."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    def to_json(self) -> str:
        """One line, keys sorted: equal recipes give equal text."""
        return json.dumps(asdict(self), sort_keys=True)


def default_output(checkpoint_path: str, recipe: Recipe) -> Path:
    """<experiment>/generated_images/<hash>."""
    return experiment_of(checkpoint_path) / "generated_images" / recipe.hash


def experiment_of(checkpoint_path: str) -> Path:
    """The folder that holds checkpoints/, or that of a checkpoint that is outside of one."""
    path = Path(os.path.abspath(checkpoint_path))
    return next((parent.parent for parent in path.parents if parent.name == "checkpoints"), path.parent)


class OutputFolder:
    """The images of one recipe on the disk. `journal` holds what was done when the folder was opened or settled."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root = root
        self.recipe = recipe
        self.journal: pa.Table = JOURNAL_SCHEMA.empty_table()
        self.mended: list[str] = []  # what was found damaged when the folder was opened, a line each
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, root: Path, recipe: Recipe) -> Self:
        """Create the folder, or continue it: whole images of this recipe are kept, broken and lost ones made again.

        What a killed run left half done is removed. Until it is closed no other process can open it; a killed one
        loses it. Raises ConfigError where the folder holds another run's images, is in use, or cannot be read or
        written.
        """
        folder = cls(root, recipe)
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder._claim()
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
        """Put all parts into journal.parquet and write the manifest of it. Raises ConfigError.

        A part goes once the journal has its rows, so that nothing is lost in between.
        """
        parts, _ = read_parts(self.root)
        self.journal = joined(parts.values())
        loose = [path for path in parts if path.name != JOURNAL_NAME]
        if loose:
            write_rows(self.root / JOURNAL_NAME, self.journal)
        for path in loose:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or one came in from a writer that ended late
            (self.root / PARTS).rmdir()
        self.write_manifest()

    @property
    def accepted(self) -> pa.Table:
        """Rows of the images that are there, JOURNAL_SCHEMA, sorted by id."""
        return self.journal.filter(self.journal["accepted"]).sort_by("id")

    @property
    def paths(self) -> dict[str, str]:
        """Id -> path of the file that holds it, of the images that are there."""
        return dict(zip(*(self.accepted[name].to_pylist() for name in ("id", "path")), strict=True))

    def rejections(self) -> Counter[tuple[str, str]]:
        """(class, reason) -> how many attempts were rejected."""
        rejected = self.journal.filter(pc.invert(self.journal["accepted"]))
        return Counter(zip(*(rejected[name].to_pylist() for name in ("class", "reason")), strict=True))

    def write_manifest(self) -> Path:
        """One row for every image of the folder, sorted by id. Returns the manifest's path."""
        table = self.accepted.select(MANIFEST_SCHEMA.names).replace_schema_metadata({"m2d": self.recipe.to_json()})
        write_rows(self.root / MANIFEST_NAME, table)
        return self.root / MANIFEST_NAME

    def _claim(self) -> None:
        """Write the record, or find it equal to ours; then take the lock."""
        path = self.root / RECORD_NAME
        if path.exists():
            if path.read_text(encoding="utf-8").strip() != self.recipe.to_json():
                raise ConfigError(
                    f"output: {self.root} holds images of other settings ({_difference(path, self.recipe)}); "
                    "name another --output, or leave it out"
                )
        else:
            ours = (*CLASSES, SHARDS, PARTS, JOURNAL_NAME, MANIFEST_NAME)
            taken = [name for name in ours if (self.root / name).exists()]
            if taken:
                raise ConfigError(
                    f"output: {self.root} holds {taken[0]} but no {RECORD_NAME}, so M2D did not start it; "
                    "name an empty folder, or leave --output out"
                )
            write_whole(path, f"{self.recipe.to_json()}\n")
        self._lock = try_lock(self.root / _LOCK)
        if self._lock is None:
            raise ConfigError(
                f"output: another run is working in {self.root}; wait for it to end, or name another --output"
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
        rows = {
            part: list(zip(*(table[name].to_pylist() for name in ("path", "id", "sha256")), strict=True))
            for part, table in parts.items()
        }
        listed = {row for of_part in rows.values() for row in of_part if row[0] is not None}
        files = sorted({file for file, _, _ in listed})
        with ThreadPoolExecutor(_THREADS) as pool:
            there = dict(zip(files, pool.map(self._whole_images, files), strict=True))
        whole = {(file, image_id) for file, image_id, sha256 in listed if there[file].get(image_id) == sha256}
        broken = {file for file, image_id, _ in listed if (file, image_id) not in whole}  # a shard is whole or nothing
        for file in sorted(broken):
            self.mended.append(f"{file} is lost or damaged")
            (self.root / file).unlink(missing_ok=True)
        for part, table in parts.items():
            # A row that another one of the same image has replaced is struck too.
            good = [
                file is None or (file not in broken and there[file][image_id] == sha256)
                for file, image_id, sha256 in rows[part]
            ]
            if all(good):
                continue
            parts[part] = table.filter(pa.array(good, pa.bool_()))
            if any(good):
                write_rows(part, parts[part])
            else:
                part.unlink()
        self.journal = joined(parts.values())

    def _whole_images(self, file: str) -> dict[str, str]:
        """Id -> sha256 of the PNGs in a file; empty where it is gone or damaged, ConfigError where the disk fails."""
        try:
            found = FORMATS[self.recipe.format].read(self.root, file)
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


def group_name(rows: Iterable[PlanRow]) -> str:
    """The name of the part, and of the shard, of these rows."""
    lines = "\n".join(f"{row.id}/{row.attempt}" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def write_rows(path: Path, rows: pa.Table) -> None:
    """A table of the folder, whole or not at all. Raises ConfigError where it cannot be written."""
    with whole_output(path, durable=path.name == JOURNAL_NAME) as partial:  # its parts are removed afterwards
        pq.write_table(rows, partial)


@contextmanager
def whole_output(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """As whole_file, in a folder that is made if need be. Raises ConfigError for an OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, durable=durable) as partial:
            yield partial
    except OSError as error:
        raise cannot_write(path, error) from None


def read_parts(root: Path) -> tuple[dict[Path, pa.Table], list[Path]]:
    """The rows of each part, and the parts that are damaged (after a power cut, say): theirs count as not done.

    Raises ConfigError for a part of another version of M2D, or that the disk does not give, which is no reason to throw
    its images away.
    """

    def read(path: Path) -> pa.Table | None:
        try:
            with path.open("rb") as stream:
                table = pq.read_table(stream)
        except (pa.ArrowException, OSError) as error:
            require_damage(path, error)
            return None
        if not table.schema.equals(JOURNAL_SCHEMA):
            raise ConfigError(
                f"output: {path} was written by another version of M2D; name another --output, or use that version"
            )
        return table

    paths = [*root.glob(JOURNAL_NAME), *sorted((root / PARTS).glob("*.parquet"))]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(paths, pool.map(read, paths), strict=True))
    return (
        {path: table for path, table in found.items() if table is not None},
        [path for path, table in found.items() if table is None],
    )


def joined(parts: Iterable[pa.Table]) -> pa.Table:
    """The journal: every kept image once, and every rejected attempt once, whoever wrote it how often."""
    rows = pa.concat_tables([JOURNAL_SCHEMA.empty_table(), *parts])
    columns = (rows[name].to_pylist() for name in ("id", "attempt", "accepted"))
    first: dict[tuple[str, int | None], int] = {}
    for row, (image_id, attempt, accepted) in enumerate(zip(*columns, strict=True)):
        first.setdefault((image_id, None if accepted else attempt), row)
    return rows if len(first) == len(rows) else rows.take(pa.array(first.values(), pa.int64()))


def attempts_left(plan: pa.Table, journal: pa.Table, max_attempts: int) -> list[pa.Table]:
    """The plan's rows that are not done, by round: entry k holds those with k rejected attempts, in the plan's order.

    Rows with max_attempts rejected ones are in no entry.
    """
    accepted = journal.filter(journal["accepted"])["id"]
    open_rows = plan.filter(pc.invert(pc.is_in(plan["id"], accepted.combine_chunks())))
    rejected = journal.filter(pc.invert(journal["accepted"]))
    tried = Counter(image_id for image_id, _ in set(zip(*(rejected[name].to_pylist() for name in ("id", "attempt")))))
    counts = pa.array([tried[image_id] for image_id in open_rows["id"].to_pylist()], pa.int64())
    return [open_rows.filter(pc.equal(counts, attempts)) for attempts in range(max_attempts)]


def cannot_write(path: Path, error: OSError) -> ConfigError:
    """What to raise for an OSError: a full disk, a folder without permission, a file where a folder should be."""
    return ConfigError(
        f"output: {path} cannot be written ({error.strerror or error}); make room or name another --output, "
        "then run the same command again"
    )


def require_damage(path: Path, error: Exception) -> None:
    """Return where the error says that the file is gone or its content damaged, so that it may be made again.

    Raises ConfigError where the system refused to read it: it may be whole, and is not to be removed.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        raise ConfigError(
            f"output: {path} cannot be read ({error.strerror}), so nothing was removed; check disk and permissions, "
            "then run the same command again"
        ) from error


def counts_and_rejections(
    before: Mapping[str, int] | None,
    made: Mapping[str, int],
    rejections: Mapping[tuple[str, str], int],
    missing: Mapping[str, int],
) -> Table:
    """One row per class and one for all. before: real images, in mode balance. missing: asked for and given up."""
    columns: dict[str, Mapping[str, int]] = {} if before is None else {"real": before}
    columns["synthetic"] = made
    for reason in sorted({reason for _, reason in rejections}):
        columns[f"rejected: {reason}"] = {code: rejections.get((code, reason), 0) for code in CLASSES}
    if any(missing.values()):
        columns["missing"] = missing
    if before is not None:
        columns["together"] = {code: before.get(code, 0) + made.get(code, 0) for code in CLASSES}
    table = Table("class")
    for name in columns:
        table.add_column(name, justify="right")
    shown = [code for code in CLASSES if any(column.get(code, 0) for column in columns.values())]
    for code in shown:
        table.add_row(code, *(f"{column.get(code, 0):,}" for column in columns.values()), end_section=code == shown[-1])
    table.add_row("all", *(f"{sum(column.get(code, 0) for code in shown):,}" for column in columns.values()))
    return table


def write_pictures(folder: OutputFolder, plan: pa.Table, *, title: str, caption: str) -> int:
    """contact_sheet.png: the first images of each class of the plan, read back from disk, as a user has them.

    And strip_<group>.png for each walk that is complete: its images from one end to the other. Returns how many.
    """
    paths, name = folder.paths, folder.recipe.format
    of_class: dict[str, list[str]] = {}
    walks: dict[str, list[tuple[float, str]]] = {}
    for image_id, label, group, position in zip(
        *(plan[column].to_pylist() for column in ("id", "class", "group", "position")), strict=True
    ):
        if image_id in paths:
            of_class.setdefault(label, []).append(image_id)
        if group is not None and position is not None:
            walks.setdefault(group, []).append((position, image_id))
    if of_class:
        first = {label: ids[:SHEET_COLUMNS] for label, ids in of_class.items()}
        images = read_images(folder.root, name, {one: paths[one] for ids in first.values() for one in ids})
        sheet = contact_sheet(
            {label: np.stack([images[image_id] for image_id in ids]) for label, ids in first.items()},
            title=title,
            caption=caption,
            totals={label: len(ids) for label, ids in of_class.items()},
        )
        with whole_output(folder.root / "contact_sheet.png") as partial:
            sheet.save(partial, format="PNG")
    complete = {group: sorted(walk) for group, walk in walks.items() if all(image_id in paths for _, image_id in walk)}
    for group, walk in complete.items():
        images = read_images(folder.root, name, {image_id: paths[image_id] for _, image_id in walk})
        with whole_output(folder.root / f"strip_{group}.png") as partial:
            strip([images[image_id] for _, image_id in walk]).save(partial, format="PNG")
    return len(complete)


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
