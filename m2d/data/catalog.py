"""From a folder of images to one Arrow table, the catalog; all that follows reads the table, not the folder.

Reads local disks, S3 and GCS alike (m2d.files.storage). Knows nothing of Ray, tensors or training.
"""

import hashlib
import json
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from m2d.classes import ISIC7, ClassSet
from m2d.data.decode import ImageRejected, decode_measured
from m2d.data.layouts import FACTS, Entry, read_layout, sources
from m2d.data.settings import DataConfig
from m2d.data.views import apply_view
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
    duplicates: pa.Table  # path, kept: the same bytes are in the catalog as `kept`


class _Facts(NamedTuple):
    width: int
    height: int
    bytes: int
    sha256: str
    cells: np.ndarray  # mean colours of an 8 x 8 grid, float32 [8, 8, 3]: what near-duplicates are found by


def scan_dataset(
    data_root: str,
    config: DataConfig,
    progress: Callable[[int, int], None] | None = None,
    classes: ClassSet | None = None,
) -> Scan:
    """Find the images below data_root and what its folders and tables say of them, check each, group and split them.

    data_root: local path or URI. classes: see `read_layout`. progress(done, total) is called from the caller's thread,
    once per file. A broken file is listed with its reason and the scan continues. Rows and their order depend on the
    content alone. Raises DataError where data_root, its folders, tables or labels cannot be used as they are.
    """
    # 1. Which files are images, of which class and lesion.
    storage = open_storage(data_root)
    layout = read_layout(*storage, data_root, config, classes)
    found, rejected, said = layout.entries, list(layout.rejected), list(layout.said)

    # 2. Those that can be read.
    images: list[tuple[Entry, str]] = []  # with the sha256
    facts_of: dict[str, _Facts] = {}
    for image, facts in zip(found, _check_all(storage, found, config.max_pixels, progress), strict=True):
        if isinstance(facts, str):
            rejected.append((image.path, facts))
        else:
            images.append((image, facts.sha256))
            facts_of[facts.sha256] = facts
    if not images:
        first = f"; the first of {len(rejected)} rejected: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise DataError(f"data_root: {data_root} holds no usable image{first}")

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
    chosen = [(image, sha256) for image, sha256 in images if kept[sha256] is image]
    alike = _near_duplicates([facts_of[sha256].cells for _, sha256 in chosen])
    same = [(chosen[a][1], chosen[b][1]) for a, b in alike] if config.group_near_duplicates else []
    lesions = _join_lesions([(sha256, image.lesions) for image, sha256 in images], ids, same)
    rows = [
        {"image_id": ids[sha256], "path": image.path, "label": image.label, "lesion_id": lesions[sha256], "split": ""}
        | {name: value for name, value in facts_of[sha256]._asdict().items() if name != "cells"}
        | image.facts
        | {"age": _years(image.facts.get("age", ""))}
        for image, sha256 in chosen
    ]
    catalog = _split(pa.Table.from_pylist(rows, CATALOG_SCHEMA), [image.split for image, _ in chosen], config, said)
    said += _tell_near_duplicates(catalog, alike)
    catalog = catalog.replace_schema_metadata({_SAID: json.dumps(said), _CLASSES: json.dumps(layout.classes.as_dict())})
    return Scan(catalog, _pairs(REJECTED_SCHEMA, sorted(rejected)), _pairs(DUPLICATES_SCHEMA, copies))


def dataset_fingerprint(data_root: str, config: DataConfig) -> str:
    """sha256 (hex) over path, size and time of change of every file that a scan reads; no file is opened.

    Raises DataError where data_root cannot be listed.
    """
    files = sources(*open_storage(data_root), data_root, config)
    lines = sorted(f"{file.path}\0{file.size}\0{file.mtime_ns}" for file in files)
    return hashlib.sha256("\0\0".join(lines).encode(errors="surrogateescape")).hexdigest()


def compare_catalogs(before: pa.Table, now: Scan) -> tuple[pa.Table, dict[str, list[str]]]:
    """What became of a catalog's images, which are known by their sha256: a file may be renamed or moved.

    Returns the catalog with today's paths, and the paths of those that are `gone`, `replaced` (other bytes at their
    path), `unreadable`, of another label or lesion (`relabelled`), and those of `now` that are `added`.
    """

    def said(row: dict[str, str]) -> tuple[str, str | None]:  # of an image that no table puts with others, its label
        return row["label"], None if row["lesion_id"] == row["image_id"] else row["lesion_id"]

    columns = ["sha256", "path", "image_id", "label", "lesion_id"]
    today = {row["sha256"]: row for row in now.catalog.select(columns).to_pylist()}
    present = {row["path"] for row in today.values()} | set(now.duplicates["path"].to_pylist())
    rejected = set(now.rejected["path"].to_pylist())
    found: dict[str, list[str]] = {"gone": [], "replaced": [], "unreadable": [], "relabelled": [], "added": []}
    paths = []
    for row in before.select(columns).to_pylist():
        path, same = row["path"], today.pop(row["sha256"], None)
        paths.append(path if same is None else same["path"])
        if same is None:
            found["replaced" if path in present else "unreadable" if path in rejected else "gone"].append(path)
        elif said(row) != said(same):
            found["relabelled"].append(path)
    replaced = set(found["replaced"])
    found["added"] = [row["path"] for row in today.values() if row["path"] not in replaced]
    place = before.column_names.index("path")
    return before.set_column(place, "path", pa.array(paths, pa.string())), found


def said_of(catalog: pa.Table) -> list[str]:
    """What its scan took labels, lesions and splits from and what it left out, one fact a line, for the first lines."""
    return list(json.loads((catalog.schema.metadata or {}).get(_SAID, b"[]")))


def classes_of(catalog: pa.Table) -> ClassSet:
    """The set that its labels are of. Raises DataError where the catalog's record of it is broken."""
    recorded = (catalog.schema.metadata or {}).get(_CLASSES)
    try:
        return ISIC7 if recorded is None else ClassSet.from_dict(json.loads(recorded))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"catalog: its set of classes cannot be read ({one_line(error)}); scan again") from error


def write_catalog(catalog: pa.Table, path: str | Path) -> None:
    """Write a catalog as Parquet; a reader never meets half a file. Makes missing folders. Raises DataError."""
    with cache_file(Path(path)) as partial:
        pq.write_table(_in_schema(catalog), partial)


def read_catalog(path: str) -> pa.Table:
    """Read what write_catalog wrote, from a local path or URI. Raises DataError where it is missing or no catalog."""
    filesystem, inner = open_storage(path)
    try:
        with filesystem.open_input_file(inner) as stream:
            catalog = pq.read_table(stream)
        for name in FACTS:  # a catalog of an earlier M2D has none of them
            if name not in catalog.column_names:
                catalog = catalog.append_column(name, pa.nulls(len(catalog), CATALOG_SCHEMA.field(name).type))
        missing = [name for name in CATALOG_SCHEMA.names if name not in catalog.column_names]
        if missing:
            raise DataError(f"catalog: {path} lacks the columns {' '.join(missing)}; scan the dataset again")
        return _in_schema(catalog)
    except FileNotFoundError:
        raise DataError(f"catalog: {path} does not exist; scan the dataset first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"catalog: {path} cannot be read ({one_line(error)}); scan the dataset again") from error


def write_csv(table: pa.Table, path: str | Path) -> None:
    """Write the rejected files or the duplicates of a scan as CSV."""
    with cache_file(Path(path)) as partial:
        pa_csv.write_csv(table, partial)


def class_counts(catalog: pa.Table, split: str | None = None) -> dict[str, int]:
    """Images per class code, all of the set in its order, 0 where none; of one split or of the whole catalog."""
    labels = catalog["label"] if split is None else catalog["label"].filter(pc.equal(catalog["split"], split))
    counts = Counter(labels.to_pylist())
    return {code: counts[code] for code in classes_of(catalog).codes}


def catalog_hash(catalog: pa.Table) -> str:
    """sha256 (hex) over image_id, label, sha256 and split of all rows, whatever their order or place on disk."""
    columns = (catalog[name].to_pylist() for name in ("image_id", "label", "sha256", "split"))
    # A file name cannot hold a NUL, so no two tables can write the same lines.
    lines = sorted("\0".join(row) for row in zip(*columns, strict=True))
    return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()


def _in_schema(catalog: pa.Table) -> pa.Table:
    return catalog.select(CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA.with_metadata(catalog.schema.metadata))


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _years(age: str) -> float | None:
    try:
        return float(age) if math.isfinite(float(age)) else None
    except ValueError:
        return None


def _check_all(
    storage: Storage, found: list[Entry], max_pixels: int, progress: Callable[[int, int], None] | None
) -> Iterator[_Facts | str]:
    """The facts of each file, or in one line why it cannot be used."""

    def check(image: Entry) -> _Facts | str:
        encoded = read_file(storage, image.path)
        if isinstance(encoded, str):
            return encoded
        try:
            pixels, width, height = decode_measured(encoded, 64, max_pixels=max_pixels)
        except ImageRejected as rejection:
            return rejection.reason
        cells = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3), dtype=np.float32)
        return _Facts(width, height, len(encoded), hashlib.sha256(encoded).hexdigest(), cells)

    pool = ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="m2d-scan")
    try:
        for done, result in enumerate(pool.map(check, found), 1):
            yield result
            if progress is not None:
                progress(done, len(found))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the scan now, not thousands of files later


def _near_duplicates(cells: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of rows that look the same in one of the eight views."""
    from m2d.metrics.neighbours import near_duplicates, unit_thumbnails  # torch, which those who import this may lack

    views = (unit_thumbnails(np.stack([apply_view(one, view) for one in cells])) for view in range(8))
    return near_duplicates(views, unit_thumbnails(np.stack(cells)))


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
            example = " and ".join(apart[0])
            said.append(f"WARNING: {len(apart):,} pairs of near-duplicates {what}, {example} for one; {advice}")
    return said


def _join_lesions(
    recorded: list[tuple[str, set[str]]], image_ids: dict[str, str], same: list[tuple[str, str]]
) -> dict[str, str]:
    """The lesion of each content (sha256): as recorded, or the image itself.

    recorded: sha256 and names of the lesion, of every file. Lesions that share an image, an exact duplicate or a pair
    of contents in `same` are one: apart they could be on both sides of a split.
    """
    of_kept = {sha256: min(names, default=image_ids[sha256]) for sha256, names in reversed(recorded)}
    joined: dict[str, str] = {}  # lesion -> another name of the same lesion, a forest

    def representative(lesion: str) -> str:
        while lesion in joined:
            lesion = joined[lesion]
        return lesion

    links = [(lesion, of_kept[sha256]) for sha256, names in recorded for lesion in names]
    for one, other in [*links, *((of_kept[a], of_kept[b]) for a, b in same)]:
        a, b = sorted((representative(one), representative(other)))
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
