"""One training index over real and synthetic images: which files, of which class, in which split. Nothing is copied.

    index = pandas.read_parquet("merged_index.parquet")             # the CSV beside it says the same
    train = index[index["split"] == "train"]
    files = train["root"] + "/" + train["path"]                     # one image each; of a shard, its file
    labels = train["class"].map({code: i for i, code in enumerate(sorted(train["class"].unique()))})
    weights = train["source"].map({"real": 1.0, "synthetic": 0.5})  # if synthetic images shall count less
Evaluate on `val` and `test`: they hold real images alone. After moving a folder replace its name in `root`.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from m2d.classes import CLASSES
from m2d.errors import DataError
from m2d.files.atomic import whole_file
from m2d.files.storage import one_line
from m2d.generation.journal import cannot_write

INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("root", pa.string()),  # the folder or URI that `path` is relative to: data_root, or the manifest's folder
        ("path", pa.string()),  # with forward slashes
        ("class", pa.string()),
        ("split", pa.string()),  # real images keep theirs, synthetic ones are train
        ("lesion_id", pa.string()),  # of an image made from a real one: that one's, so that groups stay together
        ("source", pa.string()),  # real or synthetic
        ("sha256", pa.string()),  # of the file; in a shard, of the image within
    ]
)
_NEEDED = ("id", "path", "class", "sha256")
_REFERENCES = ("reference", "reference_b")  # columns of a manifest that name input images


@dataclass(frozen=True)
class MergedIndex:
    """What was written. left_out: ids of synthetic images made from a val or test image: to train on them is a leak."""

    parquet: Path
    csv: Path
    real: dict[str, int]  # by class, of all splits
    synthetic: dict[str, int]
    left_out: tuple[str, ...]


def write_merged_index(data_root: str, catalog: pa.Table, manifest: Path, path: Path) -> MergedIndex:
    """Write `path` (Parquet) and the same as CSV beside it, each whole or not at all.

    data_root, catalog: the real images (m2d.data.catalog.CATALOG_SCHEMA), all of them, each in its split. manifest: of
    a generation run; its rows become train, but for those whose reference is a val or test image of the catalog (found
    by path or by content): they are left out. Raises DataError for a manifest that is not one or for an id that stands
    twice, ConfigError where the index cannot be written.
    """
    rows = list(_real_rows(data_root, catalog))
    origins = _Origins(data_root, rows)
    left_out: list[str] = []
    real, synthetic = Counter(row["class"] for row in rows), Counter[str]()
    home = os.path.abspath(manifest.parent)
    for entry in _read_manifest(manifest):
        sources = [origins.find(entry[name]) for name in _REFERENCES if entry.get(name)]
        if any(source is not None and source["split"] != "train" for source in sources):
            left_out.append(entry["id"])
            continue
        lesions = [source["lesion_id"] for source in sources if source is not None]
        synthetic[entry["class"]] += 1
        rows.append(
            {
                "image_id": entry["id"],
                "root": home,
                "path": entry["path"],
                "class": entry["class"],
                "split": "train",
                "lesion_id": lesions[0] if lesions else f"synthetic/{entry['id']}",
                "source": "synthetic",
                "sha256": entry["sha256"],
            }
        )
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    require_real_evaluation(table)
    csv_path = path.with_suffix(".csv")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(csv_path) as partial:
            pa_csv.write_csv(table, partial)
        with whole_file(path) as partial:
            pq.write_table(table, partial, compression="zstd")
    except OSError as error:
        raise cannot_write(path, error) from None
    return MergedIndex(path, csv_path, _by_class(real), _by_class(synthetic), tuple(left_out))


def require_real_evaluation(index: pa.Table) -> None:
    """Raise DataError where val or test of a merged index holds a synthetic image. INDEX_SCHEMA's columns are read."""
    wrong = index.filter(pc.and_(pc.not_equal(index["source"], "real"), pc.not_equal(index["split"], "train")))
    if len(wrong):
        raise DataError(
            f"merged index: {len(wrong):,} synthetic images stand in val or test (the first: "
            f"{wrong['image_id'][0].as_py()}); a model is judged on real images alone, so make them train"
        )


def _real_rows(data_root: str, catalog: pa.Table) -> Iterator[dict[str, Any]]:
    root = data_root if "://" in data_root else os.path.abspath(data_root)
    columns = ("image_id", "path", "label", "split", "lesion_id", "sha256")
    for row in catalog.select(columns).to_pylist():
        row["class"] = row.pop("label")
        yield {**row, "root": root, "source": "real"}


class _Origins:
    """Finds the real image that a reference file is, by its path or, elsewhere on the disk, by its content."""

    def __init__(self, data_root: str, rows: list[dict[str, Any]]) -> None:
        self._by_path = {} if "://" in data_root else {os.path.join(row["root"], row["path"]): row for row in rows}
        self._by_sha256 = {row["sha256"]: row for row in rows}
        self._known: dict[str, dict[str, Any] | None] = {}

    def find(self, reference: str) -> dict[str, Any] | None:
        """The catalog's row, None for a file that is none of its images."""
        if reference not in self._known:
            row = self._by_path.get(os.path.abspath(reference))
            if row is None:
                try:
                    with open(reference, "rb") as file:
                        row = self._by_sha256.get(hashlib.file_digest(file, "sha256").hexdigest())
                except OSError:  # it is gone; that it was one of the dataset's cannot be told any more
                    row = None
            self._known[reference] = row
        return self._known[reference]


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    try:
        names = pq.read_schema(path).names
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise DataError(f"manifest: {path} lacks the columns {' '.join(missing)}; name one that generate wrote")
        wanted = [*_NEEDED, *(name for name in _REFERENCES if name in names)]
        rows: list[dict[str, Any]] = pq.read_table(path, columns=wanted).to_pylist()
    except FileNotFoundError:
        raise DataError(f"manifest: {path} does not exist; generate the images first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"manifest: {path} cannot be read ({one_line(error)}); run generate again, which rebuilds it"
        ) from None
    twice = [image_id for image_id, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"manifest: {path} holds {twice[0]} twice; run generate again, which rebuilds it")
    return rows


def _by_class(counts: Mapping[str, int]) -> dict[str, int]:
    return {code: counts.get(code, 0) for code in CLASSES}
