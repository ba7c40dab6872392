"""What m2d's own run says of its generated images beside the images: what they started from, what the gates refused."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m2d.files.storage import inside, open_storage, read_file
from m2d.generation.output import JOURNAL_NAME, MANIFEST_NAME


@dataclass(frozen=True)
class NearCopyGate:
    """How often the near-copy gate of the generation was at work."""

    tried: int  # images made, kept or refused
    refused: int  # as near-copies of training images
    kept: int  # as near-copies all the same, for the gate was recorded alone
    off: int  # images that it did not look at


def near_copy_gate(generated: str) -> NearCopyGate | None:
    """By the journal of the run that made the images; None: there is none."""
    journal = _table(generated, JOURNAL_NAME, ("accepted", "gates", "reason"))
    if journal is None:
        return None
    rows = journal.to_pylist()
    near = [row["accepted"] for row in rows if row["reason"] == "near_copy"]
    return NearCopyGate(len(rows), near.count(False), near.count(True), sum(row["gates"] == "off" for row in rows))


def made_from_others(generated: str, sha256: Sequence[str], trained: Collection[str]) -> np.ndarray:
    """Which of the generated images were made from a real one that is no training image of the generator, bool [N].

    sha256: of the generated images' files [N]; trained: of the training images. An input image that can no longer be
    read counts as no training image. False where the run's manifest is gone, or does not know the image.
    """
    manifest = _table(generated, MANIFEST_NAME, ("sha256", "reference", "reference_b"))
    rows = [] if manifest is None else manifest.to_pylist()
    places = {row["sha256"]: {row["reference"], row["reference_b"]} - {None} for row in rows}
    known = {place for place in set().union(*places.values()) if _sha256(place) in trained}
    return np.array([bool(places.get(digest, set()) - known) for digest in sha256], dtype=bool)


def _sha256(place: str) -> str | None:
    filesystem, path = open_storage(place)
    found = read_file((filesystem, ""), path)
    return hashlib.sha256(found).hexdigest() if isinstance(found, bytes) else None


def _table(root: str, name: str, columns: tuple[str, ...]) -> Any:
    """Columns of a Parquet file beside the images; None: there is no such file."""
    filesystem, place = open_storage(root)
    path = inside(place, name)
    try:
        return pq.read_table(path, columns=list(columns), filesystem=filesystem)
    except (OSError, pa.ArrowInvalid):  # another's images, or a table of other columns
        return None
