"""From a folder of class folders to one Arrow table, the catalog; all that follows reads the table, not the folder.

Reads local disks, S3 and GCS alike (m2d.files.storage). Knows nothing of Ray, tensors or training.
"""

import csv
import hashlib
import io
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs

from m2d.classes import CLASSES
from m2d.data.decode import ImageRejected, probe_image
from m2d.data.settings import DataConfig
from m2d.data.split import assign_splits
from m2d.errors import DataError
from m2d.files.atomic import write_whole
from m2d.files.storage import one_line, open_storage

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
    duplicates: pa.Table  # path, kept: the same bytes stand in the catalog as `kept`


def scan_dataset(data_root: str, config: DataConfig, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Read and check every image under the class folders of data_root, group them by lesion and split them.

    data_root: local path or URI. progress(done, total) is called from the caller's thread, once per file.
    A broken file is listed with its reason and the scan goes on. The rows and their order depend on the content alone.
    Raises DataError where data_root, its folder names, its metadata.csv or its labels cannot be used as they are.
    """
    shown = data_root
    filesystem, root = open_storage(data_root)
    folders = _class_folders(filesystem, root, shown, config.class_map)
    lesion_of = _read_lesions(filesystem, root, shown)

    candidates: list[tuple[str, str]] = []  # (path, label), in the catalog's order
    rejected: list[tuple[str, str]] = []
    for label in CLASSES:
        names = (name for name, folder_label in folders.items() if folder_label == label)
        for path in sorted(path for name in names for path in _files_below(filesystem, root, name)):
            suffix = posixpath.splitext(path)[1]
            if suffix.lower() in IMAGE_SUFFIXES:
                candidates.append((path, label))
            else:
                known = " ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
                rejected.append((path, f"the suffix {suffix or '(none)'} is not one of {known}"))

    probes = _probe_all(filesystem, root, [path for path, _ in candidates], config.max_pixels, progress)
    images: list[tuple[str, str, _Probe]] = []
    for (path, label), probe in zip(candidates, probes, strict=True):
        if isinstance(probe, str):
            rejected.append((path, probe))
        else:
            images.append((path, label, probe))
    if not images:
        first = f"; the first of {len(rejected)} rejected: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise DataError(f"data_root: {shown} holds no usable image in {' '.join(sorted(folders))}{first}")

    kept, duplicates = _drop_duplicates(images, shown)
    catalog = _build_catalog(kept, _group_lesions(images, kept, lesion_of))
    catalog = assign_splits(
        catalog, val_fraction=config.val_fraction, test_fraction=config.test_fraction, seed=config.split_seed
    )
    return Scan(catalog, _table(REJECTED_SCHEMA, sorted(rejected)), _table(DUPLICATES_SCHEMA, duplicates))


def dataset_fingerprint(data_root: str, config: DataConfig) -> str:
    """sha256 (hex) over path, size and time of change of every file that a scan reads; no file is opened.

    Raises DataError where data_root or its folder names cannot be used as they are.
    """
    filesystem, root = open_storage(data_root)
    folders = _class_folders(filesystem, root, data_root, config.class_map)
    entries = [pair for name in folders for pair in _entries_below(filesystem, root, name)]
    metadata = filesystem.get_file_info(posixpath.join(root, "metadata.csv"))
    lines = (f"{path}\0{info.size}\0{info.mtime_ns}" for path, info in [*entries, ("metadata.csv", metadata)])
    return hashlib.sha256("\0\0".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def write_catalog(catalog: pa.Table, path: str) -> None:
    """Write a catalog as Parquet to a local path or URI; a reader never meets half a file. Makes missing folders."""
    encoded = pa.BufferOutputStream()
    pq.write_table(catalog.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA), encoded)
    _write_whole(path, encoded.getvalue())


def read_catalog(path: str) -> pa.Table:
    """Read what write_catalog wrote. Raises DataError where it is missing, broken or not a catalog."""
    filesystem, inner = open_storage(path)
    shown = path
    try:
        with filesystem.open_input_file(inner) as stream:
            catalog = pq.read_table(stream)
        missing = [name for name in CATALOG_SCHEMA.names if name not in catalog.column_names]
        if missing:
            raise DataError(f"catalog: {shown} lacks the columns {' '.join(missing)}; scan the dataset again")
        return catalog.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA)
    except FileNotFoundError:
        raise DataError(f"catalog: {shown} does not exist; scan the dataset first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"catalog: {shown} cannot be read ({one_line(error)}); scan the dataset again") from error


def write_rejected(rejected: pa.Table, path: str) -> None:
    """Write the rejected files as CSV with the columns path, reason to a local path or URI."""
    _write_csv(rejected, path)


def write_duplicates(duplicates: pa.Table, path: str) -> None:
    """Write the exact duplicates as CSV with the columns path, kept to a local path or URI."""
    _write_csv(duplicates, path)


def class_counts(catalog: pa.Table, split: str | None = None) -> dict[str, int]:
    """Images per class code, all seven in the order of CLASSES, 0 where none; of one split or of the whole catalog."""
    labels = catalog["label"]
    if split is not None:
        labels = labels.filter(pc.equal(catalog["split"], split))
    counts = {entry["values"]: entry["counts"] for entry in labels.value_counts().to_pylist()}
    return {code: counts.get(code, 0) for code in CLASSES}


def catalog_hash(catalog: pa.Table) -> str:
    """sha256 (hex) over image_id, label, sha256 and split of all rows, whatever their order or place on disk."""
    columns = (catalog[name].to_pylist() for name in ("image_id", "label", "sha256", "split"))
    # A file name cannot hold a NUL, so no two tables can write the same lines.
    lines = sorted("\0".join(row) for row in zip(*columns, strict=True))
    return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class _Probe:
    width: int
    height: int
    bytes: int
    sha256: str


def _class_folders(filesystem: fs.FileSystem, root: str, shown: str, class_map: dict[str, str]) -> dict[str, str]:
    """Folder name -> class code for the folders of root; DataError unless each is a class or mapped to one."""
    try:
        kind = filesystem.get_file_info(root).type
        if kind == fs.FileType.NotFound:
            raise DataError(f"data_root: {shown} does not exist; give the folder that holds the class folders")
        if kind == fs.FileType.File:
            raise DataError(f"data_root: {shown} is a file; give the folder that holds the class folders")
        entries = filesystem.get_file_info(fs.FileSelector(root))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data_root: {shown} cannot be listed ({one_line(error)}); check access to it") from error
    names = sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
    names = [name for name in names if not is_debris(name)]

    known = {code.casefold(): code for code in CLASSES}
    known |= {folder.casefold(): code for folder, code in class_map.items()}
    folders = {name: class_map.get(name, known[name.casefold()]) for name in names if name.casefold() in known}
    unknown = [name for name in names if name not in folders]
    expected = f"expected some of {' '.join(CLASSES)}"
    if not folders:
        found = f"found: {_abbreviated(unknown)}" if unknown else "found no folder"
        raise DataError(
            f"data_root: {shown} has no class folder; {expected}, {found}. Map yours with --data.class_map."
        )
    if unknown:
        folder = "folders that are no class" if len(unknown) > 1 else "a folder that is no class"
        raise DataError(
            f"data_root: {shown} has {folder}: {_abbreviated(unknown)}; {expected}. "
            "Map it with --data.class_map, or move it out of data_root."
        )
    return folders


def _files_below(filesystem: fs.FileSystem, root: str, folder: str) -> Iterator[str]:
    """Paths relative to root of all files at any depth of a class folder, hidden ones and debris left out."""
    return (path for path, _ in _entries_below(filesystem, root, folder))


def _entries_below(filesystem: fs.FileSystem, root: str, folder: str) -> Iterator[tuple[str, fs.FileInfo]]:
    """The same with what the listing says of each file."""
    for entry in filesystem.get_file_info(fs.FileSelector(posixpath.join(root, folder), recursive=True)):
        path = posixpath.relpath(entry.path, root)
        if entry.type == fs.FileType.File and not any(is_debris(part) for part in path.split("/")):
            yield path, entry


def is_debris(name: str) -> bool:
    """Whether a file or folder of this name is hidden or left behind by an operating system."""
    return name.startswith(".") or name.casefold() in _DEBRIS


def _read_lesions(filesystem: fs.FileSystem, root: str, shown: str) -> dict[str, str]:
    """image_id -> lesion_id from metadata.csv at the root, empty without one. A blank lesion_id is left out."""
    where = f"metadata.csv in {shown}"
    try:
        with filesystem.open_input_stream(posixpath.join(root, "metadata.csv"), compression=None) as stream:
            text = stream.read().decode("utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read ({one_line(error)}); save it as UTF-8 or remove it") from error
    lesion_of: dict[str, str] = {}
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns = [column.strip() for column in reader.fieldnames or ()]
        missing = [column for column in ("image_id", "lesion_id") if column not in columns]
        if missing:
            found = _abbreviated(columns) or "an empty file"
            raise DataError(
                f"{where} lacks the column {' and '.join(missing)} (found: {found}); add it, or remove the file to "
                "count each image as a lesion of its own"
            )
        reader.fieldnames = columns
        for row in reader:
            image_id = without_image_suffix((row["image_id"] or "").strip())
            lesion_id = (row["lesion_id"] or "").strip()
            if not image_id or not lesion_id:
                continue
            if lesion_of.setdefault(image_id, lesion_id) != lesion_id:
                raise DataError(
                    f"{where} gives {image_id} two lesions, {lesion_of[image_id]} and {lesion_id} "
                    f"(line {reader.line_num}); keep one"
                )
    except csv.Error as error:
        raise DataError(f"{where} is not a CSV file ({one_line(error)}); mend it or remove it") from error
    return lesion_of


def _probe_all(
    filesystem: fs.FileSystem,
    root: str,
    paths: list[str],
    max_pixels: int,
    progress: Callable[[int, int], None] | None,
) -> list[_Probe | str]:
    """For each path what it holds, or in one line why it cannot be used."""

    def probe(path: str) -> _Probe | str:
        try:
            with filesystem.open_input_stream(posixpath.join(root, path), compression=None) as stream:
                encoded = stream.read()
            width, height = probe_image(encoded, max_pixels=max_pixels)
        except ImageRejected as rejection:
            return rejection.reason
        except (pa.ArrowException, OSError) as error:
            return f"cannot be read: {one_line(error)}"
        return _Probe(width, height, len(encoded), hashlib.sha256(encoded).hexdigest())

    probes: list[_Probe | str] = []
    pool = ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="m2d-scan")
    try:
        for result in pool.map(probe, paths):
            probes.append(result)
            if progress is not None:
                progress(len(probes), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the scan now, not thousands of files later
    return probes


_Image = tuple[str, str, _Probe]  # path, label, probe


def _drop_duplicates(images: list[_Image], shown: str) -> tuple[list[_Image], list[tuple[str, str]]]:
    """The first image of each content, and (path, kept path) of the others; two labels on one content are an error."""
    first: dict[str, _Image] = {}
    duplicates: list[tuple[str, str]] = []
    conflicts: list[tuple[str, str]] = []
    for image in images:
        path, label, probe = image
        kept_path, kept_label, _ = first.setdefault(probe.sha256, image)
        if kept_label != label:
            conflicts.append((kept_path, path))
        elif kept_path != path:
            duplicates.append((path, kept_path))
    if conflicts:
        more = f" (and {len(conflicts) - 1} more such pairs)" if len(conflicts) > 1 else ""
        raise DataError(
            f"data_root: {shown} has one image under two labels: {conflicts[0][0]} and {conflicts[0][1]}{more}; "
            "remove the wrong one"
        )
    return list(first.values()), sorted(duplicates)


def _group_lesions(images: list[_Image], kept: list[_Image], lesion_of: dict[str, str]) -> list[tuple[str, str]]:
    """(image_id, lesion_id) of each kept image.

    Two lesions that share an exact duplicate are one lesion: the dropped copy ties its siblings to the kept one, and
    apart they could stand on both sides of a split.
    """
    stems = Counter(_stem(path) for path, _, _ in kept)
    image_id_of = {path: _stem(path) if stems[_stem(path)] == 1 else path for path, _, _ in kept}

    def recorded(path: str) -> str | None:
        return lesion_of.get(without_image_suffix(path)) or lesion_of.get(_stem(path))

    kept_path = {probe.sha256: path for path, _, probe in kept}
    lesion_at = {path: recorded(path) or image_id_of[path] for path, _, _ in kept}
    joined: dict[str, str] = {}  # lesion -> another name of the same lesion, a forest

    def representative(lesion: str) -> str:
        while lesion in joined:
            lesion = joined[lesion]
        return lesion

    for path, _, probe in images:
        lesion = recorded(path)
        if lesion is not None:
            a, b = representative(lesion), representative(lesion_at[kept_path[probe.sha256]])
            if a != b:
                joined[max(a, b)] = min(a, b)
    return [(image_id_of[path], representative(lesion_at[path])) for path, _, _ in kept]


def _build_catalog(kept: list[_Image], identities: list[tuple[str, str]]) -> pa.Table:
    rows = [
        (image_id, path, label, lesion_id, probe.width, probe.height, probe.bytes, probe.sha256, "")
        for (path, label, probe), (image_id, lesion_id) in zip(kept, identities, strict=True)
    ]
    return _table(CATALOG_SCHEMA, rows)


def _table(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _write_csv(table: pa.Table, path: str) -> None:
    encoded = pa.BufferOutputStream()
    pa_csv.write_csv(table, encoded)
    _write_whole(path, encoded.getvalue())


def _write_whole(path: str, encoded: pa.Buffer) -> None:
    """All or nothing, which object stores do of themselves."""
    filesystem, inner = open_storage(path)
    try:
        filesystem.create_dir(posixpath.dirname(inner), recursive=True)
        if isinstance(filesystem, fs.LocalFileSystem):
            write_whole(Path(inner), encoded.to_pybytes())
        else:
            with filesystem.open_output_stream(inner, compression=None) as stream:
                stream.write(encoded)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be written ({one_line(error)}); check the path, its rights and free space"
        ) from error


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def without_image_suffix(name: str) -> str:
    """ISIC_1 for ISIC_1.jpg: tables name images either way."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _abbreviated(names: list[str]) -> str:
    shown = [*names[:8], "..."] if len(names) > 8 else names
    return ", ".join(shown)
