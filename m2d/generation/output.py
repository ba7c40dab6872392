"""The folder of a generation run: labelled images that say what they are, what is done, one manifest, and pictures.

    <output>/generation.json      the recipe, what shapes the images; written first, keeps other settings out
    <output>/plan.parquet         what the latest command asked for
    <output>/MEL/MEL_000003.png   or shards/<name>.tar, shards/<name>.parquet, one for each group of images
    <output>/parts/<name>.parquet one for each finished group: a row for each image tried, kept or rejected
    <output>/journal.parquet      the parts of runs that have ended, in one
    <output>/manifest.parquet     one row per image, rebuilt from the journal; of variations also their lesion_id
    <output>/lesions.csv          of variations the same by image, as m2d.data reads it
    <output>/certificates.pem     of signed images, whose key is in .signing_key.pem until the run is complete
    <output>/contact_sheet.png    and strip_<group>.png for each complete walk between two images
A row in a part or the journal is the only thing that counts as done, so a killed run loses the groups in the making and
repeats nothing. A part's and a shard's name comes from their rows, and no bytes from the time of day: whoever makes a
group again replaces the same files by the same bytes. Signed images alone differ then, for C2PA salts what it signs;
one that a writer taken for dead leaves behind another's row is found by its hash, when the folder is next opened, and
made again. A run that has ended leaves no folders but those of the classes, which ImageFolder and m2d.data read. Called
by the driver and by writing tasks, so it imports no torch.
"""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from m2d.classes import ISIC7
from m2d.errors import ConfigError
from m2d.files.atomic import PARTIAL, is_locked, try_lock, whole_file, write_whole
from m2d.generation.plan import PLAN_SCHEMA, PlanRow, with_seldom, without_seldom
from m2d.generation.provenance import Signing
from m2d.generation.settings import Feature, GenerateConfig

RECORD_NAME, PLAN_NAME, MANIFEST_NAME = "generation.json", "plan.parquet", "manifest.parquet"
PARTS, JOURNAL_NAME, SHARDS, LESIONS_NAME = "parts", "journal.parquet", "shards", "lesions.csv"
JOURNAL_SCHEMA = pa.schema(
    [
        *PLAN_SCHEMA,
        ("accepted", pa.bool_()),
        ("gates", pa.string()),  # on, recorded (looked at and kept anyway), or off
        ("reason", pa.string()),  # the gate that found fault with the image; null: none did
        ("nearest_id", pa.string()),  # the training image nearest to it, or that it copies; not of a variation's lesion
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
SHARD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("class", pa.string()),
        ("label", pa.int64()),  # index of the class
        ("png", pa.binary()),
        ("settings", pa.string()),  # what shaped the image, JSON
    ],
)
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
    classes: tuple[str, ...] = ISIC7.codes  # of the checkpoint; named in the record where they are others
    # Recorded where they are used, so that records of before there were any stay equal.
    time_shift: float = 1.0  # of the solver's times
    guide: str | None = None  # sha256 of the checkpoint that guidance leads away from
    sign: str | None = None  # self-made, or the sha256 of the certificate that images are signed by

    @classmethod
    def of(cls, config: GenerateConfig, *, feature: Feature, **decided: Any) -> Self:
        """What shapes images in a run's settings; feature (never None) and the other fields as decided."""
        low, high = config.guidance_interval
        return cls(
            **{name: getattr(config, name) for name in ("seed", "solver", "steps", "format")},
            guidance_scale=float(config.guidance_scale),  # 2 and 2.0 are one recipe
            guidance_interval=(float(low), float(high)),
            feature=feature,
            feature_temperature=float(config.feature_temperature) if feature == "prior" else None,
            mode="plan" if config.plan else config.mode,
            **decided,
        )

    @property
    def hash(self) -> str:
        """First ten hex digits of a SHA-256 over the fields."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    def to_json(self) -> str:
        """One line, keys sorted: equal recipes give equal text."""
        later = {"classes": ISIC7.codes, "time_shift": 1.0, "guide": None, "sign": None}
        fields = {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}
        return json.dumps(fields, sort_keys=True)

    def is_read_from(self, record: str) -> bool:
        """Whether a record is of this recipe; fields that it lacks, for M2D had none, have the default."""
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        try:
            return json.loads(json.dumps(asdict(self))) == json.loads(json.dumps(defaults)) | json.loads(record)
        except (ValueError, TypeError):
            return False


def in_experiment(checkpoint_path: str) -> bool:
    """Whether a checkpoint is in a checkpoints/ folder."""
    return any(parent.name == "checkpoints" for parent in Path(os.path.abspath(checkpoint_path)).parents)


def experiment_of(checkpoint_path: str) -> Path:
    """The folder that holds checkpoints/, or that of a checkpoint that is outside of one."""
    path = Path(os.path.abspath(checkpoint_path))
    return next((parent.parent for parent in path.parents if parent.name == "checkpoints"), path.parent)


def results_of(checkpoint_path: str) -> Path:
    """Where commands leave what they make of a checkpoint: its experiment, or without one the current directory."""
    return experiment_of(checkpoint_path) if in_experiment(checkpoint_path) else Path.cwd()


# --- images on the disk ---------------------------------------------------------------------------------------------


def encode_png(image: np.ndarray, row: PlanRow, recipe: Recipe, signing: Signing | None = None) -> bytes:
    """PNG of an image uint8 [H, W, 3] that says in its text chunks that it is synthetic, and from what.

    signing: who says the same in a C2PA manifest. Raises ConfigError as Signing.sign does.
    """
    text = PngImagePlugin.PngInfo()
    synthetic = str(row.view is None).lower()  # a view is a real image
    chunks = {"Software": "M2D", "synthetic": synthetic, "class": row.label, "index": row.index, "seed": row.seed}
    chunks |= {"attempt": row.attempt, "mode": row.mode, "checkpoint": recipe.checkpoint}
    chunks |= {"settings": recipe.to_json(), "image": _row_json(row)}
    facts = {key: str(value) for key, value in chunks.items()}
    for key, value in facts.items():
        text.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue() if signing is None else signing.sign(buffer.getvalue(), f"{row.id}.png", facts)


def _row_json(row: PlanRow) -> str:
    """What shaped the image, keys sorted; input images by their file's name alone: folders may name people."""
    values = {key: value for key, value in asdict(row).items() if value is not None}
    for key in {"reference", "reference_b", "mask", "mask_b"} & values.keys():
        values[key] = values[key].rpartition("/")[2]
    return json.dumps(values, sort_keys=True)


def write_images(
    root: Path,
    output_format: str,
    group: str,
    images: Sequence[tuple[PlanRow, bytes]],
    classes: Sequence[str] = ISIC7.codes,
) -> list[str]:
    """Write PNGs, as files or as one shard. Returns the path below root of the file that holds each. Raises OSError.

    group: see `group_name`. classes: all codes, whose places are the labels. webdataset: <id>.png, <id>.cls (class
    index), <id>.json. parquet: SHARD_SCHEMA.
    """
    if output_format == "folder":
        paths = [f"{row.label}/{row.id}.png" for row, _ in images]
        for path, (_, png) in zip(paths, images, strict=True):
            (root / path).parent.mkdir(exist_ok=True)
            write_whole(root / path, png, durable=False)  # a resumed run checks each by its hash
        return paths
    shard = root / SHARDS / f"{group}.{'tar' if output_format == 'webdataset' else 'parquet'}"
    shard.parent.mkdir(exist_ok=True)
    with whole_file(shard, durable=False) as partial:
        if output_format == "webdataset":
            with tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for row, png in images:
                    _add_to_tar(tar, row, png, classes)
        else:
            rows = [(row.id, row.label, classes.index(row.label), png, _row_json(row)) for row, png in images]
            schema = SHARD_SCHEMA.with_metadata({"classes": " ".join(classes)})
            table = pa.table(dict(zip(schema.names, zip(*rows), strict=True)), schema=schema)
            pq.write_table(table, partial, compression="none", row_group_size=64)  # PNGs are compressed already
    return [f"{SHARDS}/{shard.name}"] * len(images)


def tar_pieces(images: Iterable[tuple[PlanRow, bytes]], classes: Sequence[str]) -> Iterator[bytes]:
    """The webdataset shard that write_images would write, a piece for each image and one for the end."""
    pieces = io.BytesIO()
    with tarfile.open(fileobj=pieces, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, png in images:
            _add_to_tar(tar, row, png, classes)
            yield pieces.getvalue()
            pieces.seek(0)
            pieces.truncate()
    yield pieces.getvalue()


def _add_to_tar(tar: tarfile.TarFile, row: PlanRow, png: bytes, classes: Sequence[str]) -> None:
    label = str(classes.index(row.label)).encode()
    for suffix, content in (("png", png), ("cls", label), ("json", _row_json(row).encode())):
        member = tarfile.TarInfo(f"{row.id}.{suffix}")  # owner, time and mode are always the same
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def read_pngs(file: Path) -> dict[str, bytes]:
    """Id -> PNG of everything in a file that write_images made. Raises OSError or ValueError: gone or damaged."""
    if file.suffix == ".png":
        return {file.stem: file.read_bytes()}
    try:
        with file.open("rb") as stream:
            if file.suffix == ".parquet":
                table = pq.read_table(stream, columns=["id", "png"])
                return dict(zip(table["id"].to_pylist(), table["png"].to_pylist(), strict=True))
            with tarfile.open(fileobj=stream) as tar:
                pngs = [(member.name[:-4], tar.extractfile(member)) for member in tar if member.name.endswith(".png")]
                return {name: content.read() for name, content in pngs if content is not None}
    except (pa.ArrowException, tarfile.TarError) as error:
        raise ValueError(f"{file.name} is damaged ({error})") from error


def read_images(root: Path, wanted: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Pixels uint8 [H, W, 3] by id. wanted: id -> path; each file is read once."""
    content = {path: read_pngs(root / path) for path in set(wanted.values())}
    images = {}
    for image_id, path in wanted.items():
        with Image.open(io.BytesIO(content[path][image_id]), formats=["PNG"]) as image:
            images[image_id] = np.array(image.convert("RGB"))
    return images


# --- the folder -----------------------------------------------------------------------------------------------------


class OutputFolder:
    """The images of one recipe on the disk. `journal` holds what was done when the folder was opened or settled."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        """Create the folder, or continue it: whole images of this recipe are kept, broken and lost ones made again.

        What a killed run left half done is removed. Until it is closed no other process can open it. Raises ConfigError
        where the folder holds another run's images, is in use, or cannot be read or written.
        """
        self.root = root
        self.recipe = recipe
        self.mended: list[str] = []  # what was found damaged, a line each
        self._lock: IO[str] | None = None
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._claim()
            for name in (".", *recipe.classes, SHARDS, PARTS):
                for suffix in (PARTIAL, ".tmp"):  # the second of older versions
                    for path in (root / name).glob(f".*{suffix}"):
                        path.unlink(missing_ok=True)
            parts, rows = self._read()
            whole = self._without_lost(rows)
            self._write_journal(whole, parts, changed=whole.num_rows < rows.num_rows)
            self._remove_unlisted()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise cannot_write(root, error) from None
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()

    def settle(self, plan: pa.Table) -> Counter[str]:
        """Put all parts into journal.parquet and write the manifest of it. Raises ConfigError.

        Returns how many images of the plan are missing, by class, which the manifest's metadata has too.
        """
        parts, rows = self._read()
        self._write_journal(rows, parts, changed=False)
        lost = plan.filter(pc.invert(pc.is_in(plan["id"], pa.array(self.paths, pa.string()))))
        missing = Counter(lost["class"].to_pylist())
        record = {"m2d": self.recipe.to_json(), "asked": str(plan.num_rows), "missing": json.dumps(missing)}
        manifest = self.accepted.drop_columns("accepted").replace_schema_metadata(record)
        varied = pc.and_(pc.equal(manifest["mode"], "image2image"), pc.is_valid(manifest["group"]))
        if pc.any(varied).as_py():  # an image stays on the side of every split that its lesion is on
            lesions = pc.if_else(varied, manifest["group"], pa.scalar(None, pa.string()))
            manifest = manifest.append_column("lesion_id", lesions)
            with whole_output(self.root / LESIONS_NAME) as partial:
                pa_csv.write_csv(manifest.select(["id", "lesion_id"]).rename_columns(["image", "lesion_id"]), partial)
        write_rows(self.root / MANIFEST_NAME, manifest)
        return missing

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

    def _claim(self) -> None:
        """Write the record, or find it equal to ours; then take the lock."""
        path = self.root / RECORD_NAME
        if path.exists():
            if not self.recipe.is_read_from(path.read_text(encoding="utf-8")):
                raise ConfigError(
                    f"output: {self.root} holds images of other settings ({_difference(path, self.recipe)}); "
                    "name another --output, or leave it out"
                )
        else:
            for name in (*self.recipe.classes, SHARDS, PARTS, JOURNAL_NAME, MANIFEST_NAME):
                if (self.root / name).exists():
                    raise ConfigError(
                        f"output: {self.root} holds {name} but no {RECORD_NAME}, so M2D did not start it; "
                        "name an empty folder, or leave --output out"
                    )
            write_whole(path, f"{self.recipe.to_json()}\n")
        self._lock = try_lock(self.root / _LOCK)
        if self._lock is None:
            raise ConfigError(
                f"output: another run is working in {self.root}; wait for it to end, or name another --output"
            )

    def _read(self) -> tuple[list[Path], pa.Table]:
        """The parts, and the rows of them and of the journal.

        One that is damaged (after a power cut, say) is removed: its images count as not done. Raises ConfigError for
        one of another version of M2D, or that the disk does not give, which is no reason to throw its images away.
        """

        def read(path: Path) -> pa.Table:
            try:
                with path.open("rb") as stream:
                    table = pq.read_table(stream)
            except (pa.ArrowException, OSError) as error:
                require_damage(path, error)
                path.unlink(missing_ok=True)
                self.mended.append(f"{path.relative_to(self.root)} cannot be read")
                return JOURNAL_SCHEMA.empty_table()
            table = with_seldom(table)
            if set(table.column_names) == set(JOURNAL_SCHEMA.names):
                table = table.select(JOURNAL_SCHEMA.names)
            if not table.schema.equals(JOURNAL_SCHEMA):
                raise ConfigError(
                    f"output: {path} was written by another version of M2D; name another --output, or use that version"
                )
            return table

        parts = sorted((self.root / PARTS).glob("*.parquet"))
        with ThreadPoolExecutor(_THREADS) as pool:
            tables = list(pool.map(read, [*self.root.glob(JOURNAL_NAME), *parts]))
        return parts, pa.concat_tables([JOURNAL_SCHEMA.empty_table(), *tables])

    def _write_journal(self, rows: pa.Table, parts: list[Path], *, changed: bool) -> None:
        """A part goes once the journal has its rows, so that nothing is lost in between."""
        self.journal = _once(rows)
        if parts or changed:
            write_rows(self.root / JOURNAL_NAME, self.journal)
        for path in parts:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or one came in from a writer that ended late
            (self.root / PARTS).rmdir()

    def _without_lost(self, rows: pa.Table) -> pa.Table:
        """The rows but those whose file is gone or not what it was; every file is read and hashed."""

        def sums(file: str) -> dict[str, str]:
            """Id -> sha256 of the PNGs in a file; empty where it is gone or damaged."""
            try:
                pngs = read_pngs(self.root / file)
            except (OSError, ValueError) as error:
                require_damage(self.root / file, error)
                return {}
            return {image_id: hashlib.sha256(png).hexdigest() for image_id, png in pngs.items()}

        listed = list(zip(*(rows[name].to_pylist() for name in ("path", "id", "sha256")), strict=True))
        files = sorted({file for file, _, _ in listed if file is not None})
        with ThreadPoolExecutor(_THREADS) as pool:
            there = dict(zip(files, pool.map(sums, files), strict=True))
        whole = {(file, one) for file, one, sha256 in listed if file is not None and there[file].get(one) == sha256}
        broken = {file for file, one, _ in listed if file is not None and (file, one) not in whole}
        for file in sorted(broken):  # a shard is whole or nothing
            self.mended.append(f"{file} is lost or damaged")
            (self.root / file).unlink(missing_ok=True)
        # A row that another one of the same image has replaced is struck too.
        good = [file is None or (file not in broken and there[file][one] == sha256) for file, one, sha256 in listed]
        return rows.filter(pa.array(good, pa.bool_()))

    def _remove_unlisted(self) -> None:
        """Images of this recipe that a killed run wrote and did not list: they will be made again."""
        listed = set(self.journal["path"].to_pylist())
        shards = [path for path in (self.root / SHARDS).glob("*") if re.fullmatch(r"[0-9a-f]{16}\.\w+", path.name)]
        for path in (*shards, *(path for name in self.recipe.classes for path in (self.root / name).glob("*.png"))):
            if path.relative_to(self.root).as_posix() not in listed and (path in shards or self._is_ours(path)):
                path.unlink(missing_ok=True)

    def _is_ours(self, path: Path) -> bool:
        """Whether a PNG says that this recipe made it; a user's own stays."""
        try:
            with Image.open(path, formats=["PNG"]) as image:
                return self.recipe.is_read_from(image.info.get("settings", ""))
        except (OSError, SyntaxError, ValueError):
            return False


class FolderSoFar:
    """The images of a folder, while another process may be writing it. Each part is read once. For any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._journal: tuple[int, ...] | None = None  # which one was read
        self._tables: dict[str, pa.Table] = {}  # images of the journal ("") and of parts, by name
        self._ids: set[str] = set()
        self._sorted: pa.Table | None = None

    def count(self) -> int:
        """Images that are done."""
        with self._lock:
            self._read_new()
            return len(self._ids)

    def rows(self) -> pa.Table:
        """Rows of the images that are done, JOURNAL_SCHEMA, sorted by id."""
        with self._lock:
            self._read_new()
            if self._sorted is None:
                rows = pa.concat_tables([JOURNAL_SCHEMA.empty_table(), *self._tables.values()])
                once = rows if rows.num_rows == len(self._ids) else _once(rows)
                self._sorted = once.sort_by("id").combine_chunks()
            return self._sorted

    def _read_new(self) -> None:
        """A part goes once a new journal has its rows, so if the journal stayed the same, no part was missed."""
        while (journal := self._find_journal()) != self._journal or self._read_parts():
            if journal != self._journal:
                self._journal, self._tables, self._ids = journal, {}, set()
                self._read("", self.root / JOURNAL_NAME)

    def _find_journal(self) -> tuple[int, ...] | None:
        try:
            found = (self.root / JOURNAL_NAME).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read_parts(self) -> bool:
        """Whether there were new ones."""
        new = [path for path in (self.root / PARTS).glob("*.parquet") if path.name not in self._tables]
        for path in new:
            self._read(path.name, path)
        return bool(new)

    def _read(self, name: str, path: Path) -> None:
        table = JOURNAL_SCHEMA.empty_table()
        with suppress(pa.ArrowException, OSError), path.open("rb") as stream:  # gone meanwhile, or damaged: not done
            table = pq.read_table(stream, schema=JOURNAL_SCHEMA)
        self._tables[name] = table.filter(table["accepted"])
        self._ids.update(self._tables[name]["id"].to_pylist())
        self._sorted = None


def is_in_use(root: Path) -> bool:
    """Whether a run is working in a folder, or whether that cannot be found out."""
    return is_locked(root / _LOCK)


def group_name(rows: Iterable[PlanRow]) -> str:
    """The name of the part, and of the shard, of these rows."""
    lines = "\n".join(f"{row.id}/{row.attempt}" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


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


def write_rows(path: Path, rows: pa.Table) -> None:
    """A table of the folder, whole or not at all. Raises ConfigError where it cannot be written."""
    with whole_output(path) as partial:
        pq.write_table(without_seldom(rows), partial)


@contextmanager
def whole_output(path: Path) -> Iterator[Path]:
    """As whole_file, in a folder that is made if need be. Raises ConfigError for an OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        raise cannot_write(path, error) from None


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


def _once(rows: pa.Table) -> pa.Table:
    """Every kept image once, and every rejected attempt once, whoever wrote it how often."""
    first: dict[tuple[str, int | None], int] = {}
    columns = (rows[name].to_pylist() for name in ("id", "attempt", "accepted"))
    for number, (image_id, attempt, accepted) in enumerate(zip(*columns, strict=True)):
        first.setdefault((image_id, None if accepted else attempt), number)
    return rows if len(first) == len(rows) else rows.take(pa.array(first.values(), pa.int64()))


def _difference(record: Path, recipe: Recipe) -> str:
    """`steps 10 there, 25 here`: the first field in which a record differs."""
    here = json.loads(recipe.to_json())
    try:
        there = json.loads(record.read_text(encoding="utf-8"))
        name = next(name for name in (*here, *there) if there.get(name) != here.get(name))
    except (ValueError, AttributeError, TypeError, StopIteration):
        return f"{RECORD_NAME} cannot be read"
    one, other = there.get(name), here.get(name)
    if isinstance(one, dict) and isinstance(other, dict):  # gates and balance: the setting within
        inner = next(key for key in {**one, **other} if one.get(key) != other.get(key))
        name, one, other = f"{name}.{inner}", one.get(inner), other.get(inner)
    short = 12 if name in ("checkpoint", "guide", "plan", "sign") else None
    return f"{name} {str(one)[:short]} there, {str(other)[:short]} here"
