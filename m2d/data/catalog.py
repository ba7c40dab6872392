"""From a folder of class folders to one Arrow table, the catalog; all that follows reads the table, not the folder.

Reads local disks, S3 and GCS alike (m2d.files.storage). Knows nothing of Ray, tensors or training.
"""

import csv
import hashlib
import io
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs

from m2d.classes import CLASSES
from m2d.data.decode import ImageRejected, probe_image
from m2d.data.settings import DataConfig
from m2d.errors import DataError
from m2d.files.atomic import cache_file
from m2d.files.storage import Storage, one_line, open_storage, read_file

CATALOG_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),  # the file's stem; its path within data_root where two files share a stem
        ("path", pa.string()),  # relative to data_root, with forward slashes
        ("label", pa.string()),  # class code
        ("lesion_id", pa.string()),
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("split", pa.string()),  # train, val or test
    ]
)
REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string())])
DUPLICATES_SCHEMA = pa.schema([("path", pa.string()), ("kept", pa.string())])
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_SCAN_THREADS = 16  # decoding releases the GIL, and on remote storage most of them wait for bytes
_DEBRIS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # what Windows, macOS and Synology leave behind


@dataclass(frozen=True)
class Scan:
    """What a scan found. Every file of a class folder is in exactly one of the three tables."""

    catalog: pa.Table  # CATALOG_SCHEMA, ordered by class and path
    rejected: pa.Table  # path, reason
    duplicates: pa.Table  # path, kept: the same bytes are in the catalog as `kept`


class FoundImage(NamedTuple):
    """An image file of a dataset before it is opened."""

    path: str  # relative to data_root, with forward slashes
    label: str  # class code
    lesion: str | None  # None: nothing is recorded


class _Facts(NamedTuple):
    width: int
    height: int
    bytes: int
    sha256: str


def scan_dataset(data_root: str, config: DataConfig, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Read and check every image under the class folders of data_root, group them by lesion and split them.

    data_root: local path or URI. progress(done, total) is called from the caller's thread, once per file.
    A broken file is listed with its reason, and the scan continues. Rows and their order depend on the content alone.
    Raises DataError where data_root, its folder names, its metadata.csv or its labels cannot be used as they are.
    """
    # 1. Which files are images, of which class and lesion.
    storage = open_storage(data_root)
    found, rejected = find_images(storage, data_root, config.class_map)

    # 2. Those that can be read.
    images: list[tuple[FoundImage, str]] = []  # with the sha256
    facts_of: dict[str, _Facts] = {}
    for image, facts in zip(found, _check_all(storage, found, config.max_pixels, progress), strict=True):
        if isinstance(facts, str):
            rejected.append((image.path, facts))
        else:
            images.append((image, facts.sha256))
            facts_of[facts.sha256] = facts
    if not images:
        first = f"; the first of {len(rejected)} rejected: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise DataError(f"data_root: {data_root} holds no usable image in its class folders{first}")

    # 3. Each content once.
    kept = {sha256: image for image, sha256 in reversed(images)}  # the first of each
    conflicts = [(kept[sha256].path, image.path) for image, sha256 in images if kept[sha256].label != image.label]
    if conflicts:
        raise DataError(
            f"data_root: {data_root} has one image under two labels, {len(conflicts)} times: {conflicts[0][0]} and "
            f"{conflicts[0][1]}; remove the wrong one"
        )
    copies = sorted((image.path, kept[sha256].path) for image, sha256 in images if kept[sha256] is not image)

    # 4. Lesions, and the split by them.
    stems = Counter(_stem(image.path) for image in kept.values())
    ids = {sha256: image.path if stems[_stem(image.path)] > 1 else _stem(image.path) for sha256, image in kept.items()}
    lesions = _join_lesions([(sha256, image.lesion) for image, sha256 in images], ids)
    rows = [
        {"image_id": ids[sha256], "path": image.path, "label": image.label, "lesion_id": lesions[sha256], "split": ""}
        | facts_of[sha256]._asdict()
        for image, sha256 in images
        if kept[sha256] is image
    ]
    catalog = assign_splits(
        pa.Table.from_pylist(rows, CATALOG_SCHEMA),
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )
    return Scan(catalog, _pairs(REJECTED_SCHEMA, sorted(rejected)), _pairs(DUPLICATES_SCHEMA, copies))


def dataset_fingerprint(data_root: str, config: DataConfig) -> str:
    """sha256 (hex) over path, size and time of change of every file that a scan reads; no file is opened.

    Raises DataError where data_root or its folder names cannot be used as they are.
    """
    filesystem, root = open_storage(data_root)
    entries = [(path, info) for path, _, info in _files((filesystem, root), data_root, config.class_map)]
    entries.append(("metadata.csv", filesystem.get_file_info(posixpath.join(root, "metadata.csv"))))
    lines = sorted(f"{path}\0{info.size}\0{info.mtime_ns}" for path, info in entries)
    return hashlib.sha256("\0\0".join(lines).encode(errors="surrogateescape")).hexdigest()


def write_catalog(catalog: pa.Table, path: str | Path) -> None:
    """Write a catalog as Parquet; a reader never meets half a file. Makes missing folders. Raises DataError."""
    with cache_file(Path(path)) as partial:
        pq.write_table(catalog.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA), partial)


def read_catalog(path: str) -> pa.Table:
    """Read what write_catalog wrote, from a local path or URI. Raises DataError where it is missing or no catalog."""
    filesystem, inner = open_storage(path)
    try:
        with filesystem.open_input_file(inner) as stream:
            catalog = pq.read_table(stream)
        missing = [name for name in CATALOG_SCHEMA.names if name not in catalog.column_names]
        if missing:
            raise DataError(f"catalog: {path} lacks the columns {' '.join(missing)}; scan the dataset again")
        return catalog.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"catalog: {path} cannot be read ({one_line(error)}); scan the dataset again") from error


def write_csv(table: pa.Table, path: str | Path) -> None:
    """Write the rejected files or the duplicates of a scan as CSV."""
    with cache_file(Path(path)) as partial:
        pa_csv.write_csv(table, partial)


def class_counts(catalog: pa.Table, split: str | None = None) -> dict[str, int]:
    """Images per class code, all seven in the order of CLASSES, 0 where none; of one split or of the whole catalog."""
    labels = catalog["label"] if split is None else catalog["label"].filter(pc.equal(catalog["split"], split))
    counts = Counter(labels.to_pylist())
    return {code: counts[code] for code in CLASSES}


def catalog_hash(catalog: pa.Table) -> str:
    """sha256 (hex) over image_id, label, sha256 and split of all rows, whatever their order or place on disk."""
    columns = (catalog[name].to_pylist() for name in ("image_id", "label", "sha256", "split"))
    # A file name cannot hold a NUL, so no two tables can write the same lines.
    lines = sorted("\0".join(row) for row in zip(*columns, strict=True))
    return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()


def find_images(
    storage: Storage, data_root: str, class_map: dict[str, str]
) -> tuple[list[FoundImage], list[tuple[str, str]]]:
    """The images of the class folders by class and path, their lesions from metadata.csv; and (path, reason) of others.

    Raises DataError as scan_dataset does.
    """
    files = _files(storage, data_root, class_map)
    lesion_of = _read_lesions(storage, data_root)
    found, rejected = [], []
    for path, label, _ in files:
        suffix = posixpath.splitext(path)[1]
        if suffix.lower() in IMAGE_SUFFIXES:
            # A table names images by stem, or by path where stems collide.
            lesion = lesion_of.get(without_image_suffix(path)) or lesion_of.get(_stem(path))
            found.append(FoundImage(path, label, lesion))
        else:
            known = " ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
            rejected.append((path, f"the suffix {suffix or '(none)'} is not one of {known}"))
    return found, rejected


def _files(storage: Storage, shown: str, class_map: dict[str, str]) -> list[tuple[str, str, fs.FileInfo]]:
    """Path, class and listing of all files at any depth of the class folders, by class and path.

    Hidden files and debris are passed over. Raises DataError unless each folder is a class or mapped to one.
    """
    filesystem, root = storage
    try:
        kind = filesystem.get_file_info(root).type
        if kind in (fs.FileType.NotFound, fs.FileType.File):
            wrong = "is a file" if kind == fs.FileType.File else "does not exist"
            raise DataError(f"data_root: {shown} {wrong}; give the folder that holds the class folders")
        entries = filesystem.get_file_info(fs.FileSelector(root))
        names = sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
        names = [name for name in names if not is_debris(name)]
        codes = {name.casefold(): code for name, code in [*zip(CLASSES, CLASSES, strict=True), *class_map.items()]}
        label_of = {name: class_map.get(name) or codes.get(name.casefold()) for name in names}
        unknown = [name for name in names if label_of[name] is None]
        if unknown or not names:
            wrong = "has no class folder" if len(unknown) == len(names) else "has folders that are no class"
            listed = ", ".join([*unknown[:8], "..."] if len(unknown) > 8 else unknown) or "no folder"
            raise DataError(
                f"data_root: {shown} {wrong}; expected some of {' '.join(CLASSES)}, found: {listed}. Map yours with "
                "--data.class_map, or move them out of data_root."
            )
        files = []
        for name, label in label_of.items():
            for entry in filesystem.get_file_info(fs.FileSelector(posixpath.join(root, name), recursive=True)):
                path = posixpath.relpath(entry.path, root)
                if entry.type == fs.FileType.File and not any(map(is_debris, path.split("/"))):
                    files.append((path, str(label), entry))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data_root: {shown} cannot be listed ({one_line(error)}); check access to it") from error
    return sorted(files, key=lambda file: (CLASSES.index(file[1]), file[0]))


def is_debris(name: str) -> bool:
    """Whether a file or folder of this name is hidden or left behind by an operating system."""
    return name.startswith(".") or name.casefold() in _DEBRIS


def without_image_suffix(name: str) -> str:
    """ISIC_1 for ISIC_1.jpg: tables name images either way."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _read_lesions(storage: Storage, shown: str) -> dict[str, str]:
    """image_id -> lesion_id from metadata.csv at the root, empty without one. A blank lesion_id is left out."""
    where, (filesystem, root) = f"metadata.csv in {shown}", storage
    try:
        with filesystem.open_input_stream(posixpath.join(root, "metadata.csv"), compression=None) as stream:
            reader = csv.DictReader(io.StringIO(stream.read().decode("utf-8-sig"), newline=""))
        reader.fieldnames = columns = [column.strip() for column in reader.fieldnames or ()]
        rows = list(reader)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} cannot be read as CSV in UTF-8 ({one_line(error)}); fix or remove it") from error
    missing = [column for column in ("image_id", "lesion_id") if column not in columns]
    if missing:
        raise DataError(
            f"{where} lacks the column {' and '.join(missing)} (found: {', '.join(columns[:8]) or 'an empty file'}); "
            "add it, or remove the file to count each image as a lesion of its own"
        )
    lesion_of: dict[str, str] = {}
    for row in rows:
        image_id, lesion_id = without_image_suffix((row["image_id"] or "").strip()), (row["lesion_id"] or "").strip()
        if image_id and lesion_id and lesion_of.setdefault(image_id, lesion_id) != lesion_id:
            raise DataError(f"{where} gives {image_id} two lesions, {lesion_of[image_id]} and {lesion_id}; keep one")
    return lesion_of


def _check_all(
    storage: Storage, found: list[FoundImage], max_pixels: int, progress: Callable[[int, int], None] | None
) -> Iterator[_Facts | str]:
    """The facts of each file, or in one line why it cannot be used."""

    def check(image: FoundImage) -> _Facts | str:
        encoded = read_file(storage, image.path)
        if isinstance(encoded, str):
            return encoded
        try:
            size = probe_image(encoded, max_pixels=max_pixels)
        except ImageRejected as rejection:
            return rejection.reason
        return _Facts(*size, len(encoded), hashlib.sha256(encoded).hexdigest())

    pool = ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="m2d-scan")
    try:
        for done, result in enumerate(pool.map(check, found), 1):
            yield result
            if progress is not None:
                progress(done, len(found))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the scan now, not thousands of files later


def _join_lesions(recorded: list[tuple[str, str | None]], image_ids: dict[str, str]) -> dict[str, str]:
    """The lesion of each content (sha256): as recorded, or the image itself.

    recorded: sha256 and lesion of every file. Two lesions that share an exact duplicate are one lesion: the dropped
    copy ties its siblings to the kept one, and apart they could be on both sides of a split.
    """
    of_kept = {sha256: lesion or image_ids[sha256] for sha256, lesion in reversed(recorded)}
    joined: dict[str, str] = {}  # lesion -> another name of the same lesion, a forest

    def representative(lesion: str) -> str:
        while lesion in joined:
            lesion = joined[lesion]
        return lesion

    for sha256, lesion in recorded:
        if lesion is not None:
            a, b = sorted((representative(lesion), representative(of_kept[sha256])))
            if a != b:
                joined[b] = a
    return {sha256: representative(lesion) for sha256, lesion in of_kept.items()}


def _pairs(schema: pa.Schema, rows: list[tuple[str, str]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)


# --- the split --------------------------------------------------------------------------------------------------------


def assign_splits(catalog: pa.Table, *, val_fraction: float, test_fraction: float, seed: int) -> pa.Table:
    """The catalog with its `split` column set to train, val or test: by lesion, stratified by class, seeded.

    Fractions are of the lesions of each class; val and test meet them to within one lesion. All images of a lesion
    share its split, also where they carry different labels. A class of few lesions fills train first, then val, then
    test, one lesion each; a split whose fraction is 0 stays empty. Every lesion has a seeded rank of its own and test
    takes the first ones: so the order of the rows has no influence, and the test lesions of a class stay the same under
    another val_fraction, as long as both leave it a lesion to train on.
    Not scikit-learn's StratifiedGroupKFold: its fractions are multiples of 1/k, it balances images instead of lesions,
    and its answer depends on the order of the rows.
    """
    lesion_ids = catalog["lesion_id"].to_pylist()
    lesions_of: dict[str, set[str]] = defaultdict(set)  # label -> its lesions
    for label, lesion in zip(catalog["label"].to_pylist(), lesion_ids, strict=True):
        lesions_of[label].add(lesion)
    split_of: dict[str, str] = {}
    # Rare classes first: they can least afford that another class has placed the lesions that both share.
    for label in sorted(lesions_of, key=lambda label: (len(lesions_of[label]), label)):
        lesions = lesions_of[label]
        wanted = _allocate(len(lesions), val_fraction, test_fraction)
        placed = Counter(split_of[lesion] for lesion in lesions if lesion in split_of)
        free = sorted(
            (lesion for lesion in lesions if lesion not in split_of),
            key=lambda lesion: (hashlib.sha256(f"{seed}:{lesion}".encode()).digest(), lesion),
        )
        kept_for_train = 0 if placed["train"] else 1
        for split in ("test", "val"):
            count = min(max(0, wanted[split] - placed[split]), max(0, len(free) - kept_for_train))
            split_of.update(dict.fromkeys(free[:count], split))
            free = free[count:]
        split_of.update(dict.fromkeys(free, "train"))
    splits = pa.array([split_of[lesion] for lesion in lesion_ids], pa.string())
    return catalog.set_column(catalog.column_names.index("split"), "split", splits)


def _allocate(lesions: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    """Lesions of one class for val and test: the nearest whole number, at least one, while one is left to train."""
    counts = {}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        # Halves go up, also where the product falls just short of one.
        counts[split] = max(int(lesions * fraction + 0.5 + 1e-9), 1 if fraction > 0 else 0)
    while sum(counts.values()) > max(lesions - 1, 0):
        counts["val" if counts["val"] > counts["test"] else "test"] -= 1
    return counts
