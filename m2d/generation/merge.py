"""One training index over real and synthetic images: which files, of which class, in which split. Nothing is copied.

    index = pandas.read_parquet("merged_index.parquet")             # the CSV beside it says the same
    train = index[index["split"] == "train"]
    files = train["root"] + "/" + train["path"]                     # one image each; of a shard, its file
    labels = train["class"].map({code: i for i, code in enumerate(sorted(train["class"].unique()))})
    weights = train["source"].map({"real": 1.0, "flipped": 1.0, "synthetic": 0.5})  # if these count less
Evaluate on `val` and `test`: they hold real images alone. After moving a folder replace its name in `root`.
"""

import hashlib
import os
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from m2d.errors import DataError
from m2d.files.storage import one_line
from m2d.generation.output import whole_output
from m2d.generation.plan import without_seldom

INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("root", pa.string()),  # the folder or URI that `path` is relative to: data_root, or the manifest's folder
        ("path", pa.string()),  # with forward slashes
        ("class", pa.string()),
        ("split", pa.string()),  # real images keep theirs, synthetic ones are train
        ("lesion_id", pa.string()),  # of an image made from a real one: that one's, so that groups stay together
        ("skin_lesion_id", pa.string()),  # the lesion that an inpainted one covers: its group too; where there are some
        ("source", pa.string()),  # real, synthetic, or flipped: a real image again, flipped or turned
        ("sha256", pa.string()),  # of the file; in a shard, of the image within
    ]
)


def write_merged_index(data_root: str, catalog: pa.Table, manifest: Path, path: Path) -> list[str]:
    """Write `path` (Parquet) and the same as CSV beside it, each whole or not at all, and say what is in them.

    data_root, catalog: the real images (m2d.data.catalog.CATALOG_SCHEMA), all of them, each in its split. manifest: of
    a generation run; its rows become train, but for those made from a val or test image of the catalog (found by path
    or by content), as to train on them is a leak: their ids are returned. Raises DataError for a manifest that is not
    one or that holds an id twice, ConfigError where the index cannot be written.
    """
    root = data_root if "://" in data_root else os.path.abspath(data_root)
    rows = [
        {**row, "class": row["label"], "root": root, "source": "real"}
        for row in catalog.select(("image_id", "path", "label", "split", "lesion_id", "sha256")).to_pylist()
    ]
    by_path = {} if "://" in data_root else {os.path.join(root, row["path"]): row for row in rows}
    by_sha256 = {row["sha256"]: row for row in rows}

    @cache
    def origin(reference: str) -> dict[str, Any] | None:
        """The real image that a reference file is, by its path or, elsewhere on the disk, by its content."""
        with suppress(OSError):  # it is gone: whether it was one of the dataset's is not known any more
            if os.path.abspath(reference) not in by_path:
                with open(reference, "rb") as file:
                    return by_sha256.get(hashlib.file_digest(file, "sha256").hexdigest())
        return by_path.get(os.path.abspath(reference))

    left_out = []
    for made in _read_manifest(manifest):
        references = [made[name] for name in ("reference", "reference_b") if made[name]]
        sources = [source for reference in references if (source := origin(reference)) is not None]
        if any(source["split"] != "train" for source in sources):
            left_out.append(made["id"])
            continue
        lesion = sources[0]["lesion_id"] if sources else made.get("lesion_id") or f"synthetic/{made['id']}"
        shared = {"image_id": made["id"], "root": os.path.abspath(manifest.parent), "split": "train"}
        kind = "synthetic" if made.get("view") is None else "flipped"
        rows.append({**made, **shared, "lesion_id": lesion, "source": kind})
    table = without_seldom(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
    with whole_output(path.with_suffix(".csv")) as partial:
        pa_csv.write_csv(table, partial)
    with whole_output(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    without = f", {len(left_out)} made from val or test images left out" if left_out else ""
    kinds = " and ".join(f"{count:,} {kind}" for kind, count in Counter(row["source"] for row in rows).items())
    print(f"{kinds} images{without} in {path}")
    return left_out


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
        of_variations = {"lesion_id", "skin_lesion_id", "view"} & set(table.column_names)
        table = table.select(["id", "path", "class", "sha256", "reference", "reference_b", *of_variations])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"manifest: {path} cannot be read ({one_line(error)}); run generate again, which rebuilds it"
        ) from None
    twice = [image_id for image_id, count in Counter(table["id"].to_pylist()).items() if count > 1]
    if twice:
        raise DataError(f"manifest: {path} holds {twice[0]} twice; run generate again, which rebuilds it")
    return table.to_pylist()
