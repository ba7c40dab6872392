"""What m2d's own run says of its generated images beside the images: what they started from, what the gates refused."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from m2d.files.storage import inside, open_storage, read_file
from m2d.generation.output import JOURNAL_NAME, MANIFEST_NAME

METADATA_NAME = "metadata.csv"  # of an exported set, in place of the manifest


@dataclass(frozen=True)
class NearCopyGate:
    """How often the near-copy gate of the generation was at work."""

    tried: int  # images made, kept or refused
    refused: int  # as near-copies of training images
    kept: int  # as near-copies all the same, for the gate was recorded alone
    off: int  # images that it did not look at


def near_copy_gate(generated: str) -> NearCopyGate | None:
    """By the journal of the run that made the images; None: there is none."""
    rows = rows_beside(generated, JOURNAL_NAME, "accepted", "gates", "reason")
    near = [row["accepted"] for row in rows if row["reason"] == "near_copy"]
    gate = NearCopyGate(len(rows), near.count(False), near.count(True), sum(row["gates"] == "off" for row in rows))
    return gate if rows else None


def made_from_others(generated: str, sha256: Sequence[str], trained: Collection[str]) -> np.ndarray:
    """Which of the generated images were made from a real one that is no training image of the generator, bool [N].

    sha256: of the generated images' files [N]; trained: of the training images. An input image that can no longer be
    read counts as no training image. False where the run's manifest is gone, or does not know the image.
    """
    rows = rows_beside(generated, MANIFEST_NAME, "sha256", "reference", "reference_b")
    places = {row["sha256"]: {row["reference"], row["reference_b"]} - {None} for row in rows}
    known = {place for place in set().union(*places.values()) if _sha256(place) in trained}
    return np.array([bool(places.get(digest, set()) - known) for digest in sha256], dtype=bool)


def _sha256(place: str) -> str | None:
    filesystem, path = open_storage(place)
    found = read_file((filesystem, ""), path)
    return hashlib.sha256(found).hexdigest() if isinstance(found, bytes) else None


def rows_beside(root: str, name: str, key: str, *more: str) -> list[dict[str, Any]]:
    """Columns of a Parquet or CSV file (texts) beside the images, None for those that it lacks; []: no file, or no key.

    Images of another generator may lie beside a table of other columns.
    """
    filesystem, place = open_storage(root)
    try:
        with filesystem.open_input_file(inside(place, name)) as file:
            as_text = pa_csv.ConvertOptions(column_types=dict.fromkeys((key, *more), pa.string()))
            table = pa_csv.read_csv(file, convert_options=as_text) if name.endswith(".csv") else pq.read_table(file)
    except (OSError, pa.ArrowException):
        return []
    there = [column for column in (key, *more) if column in table.column_names]
    return [dict.fromkeys(more) | row for row in table.select(there).to_pylist() if key in there]
