"""From a folder of images to one Arrow table, the catalog; all that follows reads the table, not the folder.

Reads local disks, S3 and GCS alike (m2d.files.storage). Knows nothing of Ray, tensors or training.
"""

import hashlib
import json
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs

from m2d.classes import ISIC7, ClassSet
from m2d.data.decode import ImageRejected, decode_measured
from m2d.data.layouts import FACTS, Entry, read_layout, sources
from m2d.data.settings import DataConfig
from m2d.data.views import apply_view
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
        ("age", pa.float32()),  # years; this and the next are null where the dataset does not say
        ("sex", pa.string()),
        ("site", pa.string()),
        ("skin_tone", pa.string()),  # in the dataset's own scale
    ]
)
REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string())])
DUPLICATES_SCHEMA = pa.schema([("path", pa.string()), ("kept", pa.string())])

_SAID, _CLASSES = b"m2d.said", b"m2d.classes"  # keys of the schema's metadata
_SCAN_THREADS = 16  # decoding releases the GIL, and on remote storage most of them wait for bytes


@dataclass(frozen=True)
class Scan:
    """What a scan found. Every file of a class folder is in exactly one of the three tables."""

    catalog: pa.Table  # CATALOG_SCHEMA, ordered by class and path
    rejected: pa.Table  # path, reason
    duplicates: pa.Table  # path, kept: the same bytes stand in the catalog as `kept`


def scan_dataset(
    data_root: str,
    config: DataConfig,
    progress: Callable[[int, int], None] | None = None,
    classes: ClassSet | None = None,
) -> Scan:
    """Find the images below data_root and what its folders and tables say of them, check each, group and split them.

    data_root: local path or URI. classes: see `read_layout`. progress(done, total) is called from the caller's thread,
    once per file. A broken file is listed with its reason and the scan goes on. Rows and their order depend on the
    content alone.
    Raises DataError where data_root, its folders, its tables or its labels cannot be used as they are.
    """
    filesystem, root = open_storage(data_root)
    layout = read_layout(filesystem, root, data_root, config, classes)
    rejected = list(layout.rejected)
    entries = {entry.path: entry for entry in layout.entries}
    candidates = [(entry.path, str(entry.label)) for entry in layout.entries]
    images: list[_Image] = []
    for (path, _), found in zip(
        candidates, _probe_all(filesystem, root, candidates, config.max_pixels, progress), strict=True
    ):
        if isinstance(found, str):
            rejected.append((path, found))
        else:
            images.append(found)
    if not images:
        first = f"; the first of {len(rejected)} rejected: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise DataError(f"data_root: {data_root} holds no usable image{first}")

    kept, duplicates = _drop_duplicates(images, data_root)
    said = list(layout.said)
    pairs = _near_duplicates(kept)
    identities = _group_lesions(images, kept, entries, pairs if config.group_near_duplicates else [])
    rows = [
        (name, *image[:2], lesion, *image[2:-1], "", *_facts(entries[image.path]))
        for image, (name, lesion) in zip(kept, identities, strict=True)
    ]
    catalog = _split(_table(CATALOG_SCHEMA, rows), [entries[image.path].split for image in kept], config, said)
    said += _tell_near_duplicates(catalog, pairs)
    catalog = catalog.replace_schema_metadata({_SAID: json.dumps(said), _CLASSES: json.dumps(layout.classes.as_dict())})
    return Scan(catalog, _table(REJECTED_SCHEMA, sorted(rejected)), _table(DUPLICATES_SCHEMA, duplicates))


def said_of(catalog: pa.Table) -> list[str]:
    """What its scan took labels, lesions and splits from and what it left out, one fact a line, for the first lines."""
    return list(json.loads((catalog.schema.metadata or {}).get(_SAID, b"[]")))


def dataset_fingerprint(data_root: str, config: DataConfig) -> str:
    """sha256 (hex) over path, size and time of change of every file that a scan reads; no file is opened.

    Raises DataError where data_root cannot be listed.
    """
    files = sources(*open_storage(data_root), data_root, config)
    lines = (f"{file.path}\0{file.size}\0{file.mtime_ns}" for file in files)
    return hashlib.sha256("\0\0".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def classes_of(catalog: pa.Table) -> ClassSet:
    """The set that its labels are of. Raises DataError where the catalog's record of it is broken."""
    recorded = (catalog.schema.metadata or {}).get(_CLASSES)
    try:
        return ISIC7 if recorded is None else ClassSet.from_dict(json.loads(recorded))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"catalog: its set of classes cannot be read ({one_line(error)}); scan again") from error


def write_catalog(catalog: pa.Table, path: str) -> None:
    """Write a catalog as Parquet to a local path or URI; a reader never meets half a file. Makes missing folders."""
    encoded = pa.BufferOutputStream()
    pq.write_table(_in_schema(catalog), encoded)
    _write_whole(path, encoded.getvalue())


def read_catalog(path: str) -> pa.Table:
    """Read what write_catalog wrote. Raises DataError where it is missing, broken or not a catalog."""
    filesystem, inner = open_storage(path)
    shown = path
    try:
        with filesystem.open_input_file(inner) as stream:
            catalog = pq.read_table(stream)
        for name in FACTS:  # a catalog of an earlier M2D has none of them
            if name not in catalog.column_names:
                catalog = catalog.append_column(name, pa.nulls(len(catalog), CATALOG_SCHEMA.field(name).type))
        missing = [name for name in CATALOG_SCHEMA.names if name not in catalog.column_names]
        if missing:
            raise DataError(f"catalog: {shown} lacks the columns {' '.join(missing)}; scan the dataset again")
        return _in_schema(catalog)
    except FileNotFoundError:
        raise DataError(f"catalog: {shown} does not exist; scan the dataset first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"catalog: {shown} cannot be read ({one_line(error)}); scan the dataset again") from error


def write_csv(table: pa.Table, path: str) -> None:
    """Write the rejected files or the duplicates of a scan as CSV to a local path or URI."""
    encoded = pa.BufferOutputStream()
    pa_csv.write_csv(table, encoded)
    _write_whole(path, encoded.getvalue())


def class_counts(catalog: pa.Table, split: str | None = None) -> dict[str, int]:
    """Images per class code, all of the set in its order, 0 where none; of one split or of the whole catalog."""
    labels = catalog["label"]
    if split is not None:
        labels = labels.filter(pc.equal(catalog["split"], split))
    counts = {entry["values"]: entry["counts"] for entry in labels.value_counts().to_pylist()}
    return {code: counts.get(code, 0) for code in classes_of(catalog).codes}


def catalog_hash(catalog: pa.Table) -> str:
    """sha256 (hex) over image_id, label, sha256 and split of all rows, whatever their order or place on disk."""
    columns = (catalog[name].to_pylist() for name in ("image_id", "label", "sha256", "split"))
    # A file name cannot hold a NUL, so no two tables can write the same lines.
    lines = sorted("\0".join(row) for row in zip(*columns, strict=True))
    return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()


def _in_schema(catalog: pa.Table) -> pa.Table:
    return catalog.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA.with_metadata(catalog.schema.metadata))


class _Image(NamedTuple):
    path: str
    label: str
    width: int
    height: int
    bytes: int
    sha256: str
    cells: np.ndarray  # mean colours of an 8 x 8 grid: float32 [8, 8, 3]


def _probe_all(
    filesystem: fs.FileSystem,
    root: str,
    candidates: list[tuple[str, str]],
    max_pixels: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[_Image | str]:
    """What each file (path, label) holds, or in one line why it cannot be used."""

    def probe(candidate: tuple[str, str]) -> _Image | str:
        try:
            with filesystem.open_input_stream(posixpath.join(root, candidate[0]), compression=None) as stream:
                encoded = stream.read()
            pixels, width, height = decode_measured(encoded, 64, max_pixels=max_pixels)
        except ImageRejected as rejection:
            return rejection.reason
        except (pa.ArrowException, OSError) as error:
            return f"cannot be read: {one_line(error)}"
        cells = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3), dtype=np.float32)
        return _Image(*candidate, width, height, len(encoded), hashlib.sha256(encoded).hexdigest(), cells)

    pool = ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="m2d-scan")
    try:
        for done, result in enumerate(pool.map(probe, candidates), 1):
            yield result
            if progress is not None:
                progress(done, len(candidates))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the scan now, not thousands of files later


def _drop_duplicates(images: list[_Image], shown: str) -> tuple[list[_Image], list[tuple[str, str]]]:
    """The first image of each content, and (path, kept path) of the others; two labels on one content are an error."""
    first: dict[str, _Image] = {}
    duplicates: list[tuple[str, str]] = []
    conflicts: list[tuple[str, str]] = []
    for image in images:
        kept = first.setdefault(image.sha256, image)
        if kept.label != image.label:
            conflicts.append((kept.path, image.path))
        elif kept.path != image.path:
            duplicates.append((image.path, kept.path))
    if conflicts:
        more = f" (and {len(conflicts) - 1} more such pairs)" if len(conflicts) > 1 else ""
        raise DataError(
            f"data_root: {shown} has one image under two labels: {conflicts[0][0]} and {conflicts[0][1]}{more}; "
            "remove the wrong one"
        )
    return list(first.values()), sorted(duplicates)


def _near_duplicates(images: list[_Image]) -> list[tuple[int, int]]:
    """Pairs of rows that look the same in one of the eight views."""
    from m2d.metrics.neighbours import near_duplicates, unit_thumbnails  # torch, which those who import this may lack

    cells = np.stack([image.cells for image in images])
    views = (unit_thumbnails(np.stack([apply_view(one, view) for one in cells])) for view in range(8))
    return near_duplicates(views, unit_thumbnails(cells))


def _tell_near_duplicates(catalog: pa.Table, pairs: list[tuple[int, int]]) -> list[str]:
    """Those that the split tore apart, and those whose labels disagree."""
    names, labels, splits = (catalog[name].to_pylist() for name in ("path", "label", "split"))
    said = []
    for column, what, advice in (
        (splits, "are in different splits", "--data.group_near_duplicates true keeps them in one"),
        (labels, "have different labels", "look at them, and remove the wrong one"),
    ):
        apart = [(names[a], names[b]) for a, b in pairs if column[a] != column[b]]
        if apart:
            said.append(
                f"WARNING: {len(apart):,} pairs of near-duplicates {what}, {' and '.join(apart[0])} for one; {advice}"
            )
    return said


def _group_lesions(
    images: list[_Image], kept: list[_Image], entries: dict[str, Entry], alike: list[tuple[int, int]]
) -> list[tuple[str, str]]:
    """(image_id, lesion_id) of each kept image.

    Two lesions that share an image, an exact duplicate or one of the pairs `alike` of kept images are one: apart they
    could be on both sides of a split.
    """
    stems = Counter(_stem(image.path) for image in kept)
    image_id_of = {image.path: _stem(image.path) if stems[_stem(image.path)] == 1 else image.path for image in kept}
    lesion_of_content = {
        image.sha256: min(entries[image.path].lesions, default=image_id_of[image.path]) for image in kept
    }
    joined: dict[str, str] = {}  # lesion -> another name of the same lesion, a forest

    def representative(lesion: str) -> str:
        while lesion in joined:
            lesion = joined[lesion]
        return lesion

    links = [(lesion, lesion_of_content[image.sha256]) for image in images for lesion in entries[image.path].lesions]
    links += [(lesion_of_content[kept[a].sha256], lesion_of_content[kept[b].sha256]) for a, b in alike]
    for one, other in links:
        a, b = representative(one), representative(other)
        if a != b:
            joined[max(a, b)] = min(a, b)
    return [(image_id_of[image.path], representative(lesion_of_content[image.sha256])) for image in kept]


def _facts(entry: Entry) -> tuple[object, ...]:
    try:
        age: float | None = float(entry.facts.get("age", ""))
    except ValueError:
        age = None
    return (age if age is None or math.isfinite(age) else None, *(entry.facts.get(name) for name in FACTS[1:]))


def _table(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


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
    if "split" not in catalog.column_names:
        return catalog.append_column("split", splits)
    return catalog.set_column(catalog.column_names.index("split"), "split", splits)


def _split(catalog: pa.Table, published: list[str | None], config: DataConfig, said: list[str]) -> pa.Table:
    """The published split where there is one and data.split keeps it; what it lacks is drawn from its training part."""
    own = set(published) - {None} if config.split == "published" else set()
    drawn = assign_splits(
        catalog.filter(pa.array([split in (None, "train") or not own for split in published])),
        val_fraction=0.0 if "val" in own else config.val_fraction,
        test_fraction=0.0 if "test" in own else config.test_fraction,
        seed=config.split_seed,
    )
    if not own:
        return drawn
    remaining = iter(drawn["split"].to_pylist())
    splits = [next(remaining) if split in (None, "train") else split for split in published]
    said.append(f"split: {' '.join(sorted(map(str, own)))} as published (--data.split seeded draws all of it)")
    sides: dict[str, set[str]] = defaultdict(set)
    for lesion, split in zip(catalog["lesion_id"].to_pylist(), splits, strict=True):
        sides[lesion].add(str(split))
    torn = sum(len(of_lesion) > 1 for of_lesion in sides.values())
    if torn:
        said.append(
            f"WARNING: {torn:,} lesions are in more than one published split; --data.split seeded keeps each in one"
        )
    return catalog.set_column(catalog.column_names.index("split"), "split", pa.array(splits, pa.string()))


def _allocate(lesions: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    """Lesions of one class for val and test: the nearest whole number, at least one, while one is left to train."""
    counts = {}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        # Halves go up, also where the product falls just short of one.
        counts[split] = max(int(lesions * fraction + 0.5 + 1e-9), 1 if fraction > 0 else 0)
    while sum(counts.values()) > max(lesions - 1, 0):
        counts["val" if counts["val"] > counts["test"] else "test"] -= 1
    return counts
