"""What a download writes beside the images: the ledger of fetched files, metadata.csv and DOWNLOAD.md.

m2d.data.download calls it. It knows archive records and files, nothing of HTTP.
"""

import csv
import hashlib
import io
import os
import posixpath
import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from m2d.classes import CLASSES
from m2d.data.catalog import IMAGE_SUFFIXES
from m2d.data.isic_archive import ArchiveImage
from m2d.errors import DataError

_LEDGER_COLUMNS = ("image_id", "path", "bytes", "sha256")
_OWN_PATH = re.compile(rf"(?:{'|'.join(CLASSES)}|\.m2d-download/unmapped)/ISIC_[0-9]+\.[a-z]+")
_LICENSES = {
    "CC-0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-NC": "https://creativecommons.org/licenses/by-nc/4.0/",
}
_HAM10000_PAPER = (
    "Tschandl, Rosendahl, Kittler: The HAM10000 dataset, a large collection of multi-source dermatoscopic images of "
    "common pigmented skin lesions. Scientific Data 5:180161 (2018)."
)


@dataclass(frozen=True)
class LedgerEntry:
    """One file that a download put in place."""

    path: str  # relative to data_root
    bytes: int
    sha256: str


class Ledger:
    """downloaded.csv: which file was put where, and its sha256. A line is added before its file gets its name.

    So a file without a line was put there by somebody else, and a line without its file is harmless.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a torn last line (a run was killed) is dropped."""
        self.entries: dict[str, LedgerEntry] = {}
        self._lock = threading.Lock()
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for row in csv.reader(text.splitlines()):
            entry = _ledger_entry(row)
            if entry is not None:
                self.entries[row[0]] = entry
        self._stream = path.open("a", encoding="utf-8", newline="")
        if not text:
            self._stream.write(",".join(_LEDGER_COLUMNS) + "\n")
        elif not text.endswith("\n"):
            self._stream.write("\n")
        self._stream.flush()

    def add(self, image_id: str, entry: LedgerEntry) -> None:
        """Write one line, at once. Safe in several threads."""
        with self._lock:
            self.entries[image_id] = entry
            self._stream.write(f"{image_id},{entry.path},{entry.bytes},{entry.sha256}\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def write_metadata(path: Path, images: Iterable[tuple[ArchiveImage, str]]) -> None:
    """Write metadata.csv, one row an image with its class code: what m2d.data.catalog reads, licence and attribution.

    Rows and columns of a table that is there already stay, unless they are of these images. Appears whole or not at
    all. Raises DataError where what is there is no table with a column image_id.
    """
    rows, columns = _read_table(path)
    for image, code in images:
        known = {
            "image_id": image.isic_id,
            "lesion_id": image.lesion_id,
            "class": code,
            "diagnosis": ": ".join(image.diagnosis),
            **image.details,
            "license": image.license,
            "attribution": image.attribution,
        }
        old = rows.get(image.isic_id, {})
        rows[image.isic_id] = old | {name: value for name, value in known.items() if value or name not in old}
        columns |= dict.fromkeys(known)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_whole(path, table.getvalue().encode())


def write_provenance(path: Path, images: list[tuple[ArchiveImage, str]], source: str, collection: int) -> str:
    """Write DOWNLOAD.md: where the images come from, under which licences, whom to name. Returns it as one line."""
    licenses = Counter(image.license for image, _ in images)
    attributions = Counter(image.attribution for image, _ in images)
    lines = [
        "# Where these images come from",
        "",
        f"Fetched by `m2d` from the ISIC archive, collection {collection} of <{source}>, "
        f"on {datetime.now(UTC):%Y-%m-%d}. `metadata.csv` names licence and attribution of each image.",
        "",
        "| licence | images | text |",
        "|---|---|---|",
        *(f"| {_cell(name)} | {count:,} | {_LICENSES.get(name, '')} |" for name, count in licenses.most_common()),
        "",
        "Attribution, which the licences ask for:",
        "",
        *(f"- {_cell(name)} ({count:,} images)" for name, count in attributions.most_common()),
        "",
        "CC-BY-NC allows no commercial use.",
    ]
    if collection in (66, 212):
        lines += ["", f"Cite: {_HAM10000_PAPER}"]
    write_whole(path, ("\n".join(lines) + "\n").encode())
    names = ", ".join(name for name, _ in attributions.most_common(3))
    more = f" and {len(attributions) - 3} more" if len(attributions) > 3 else ""
    counts = ", ".join(f"{name} ({count:,} images)" for name, count in licenses.most_common(4))
    return f"licence: {counts}; attribution: {names}{more}; all of it in {path}"


def write_whole(path: Path, content: bytes) -> None:
    """Write through a hidden neighbour, so that nobody meets half a file; the same content keeps its date."""
    if path.is_file() and path.read_bytes() == content:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path: Path) -> str | None:
    """sha256 (hex) of a file, None where there is none."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        return None


def _ledger_entry(row: list[str]) -> LedgerEntry | None:
    """A line that names a place this command writes to; None for the header, a torn line or another's."""
    if len(row) != len(_LEDGER_COLUMNS) or not _OWN_PATH.fullmatch(row[1]) or f"/{row[0]}." not in row[1]:
        return None
    if not row[2].isdecimal() or not re.fullmatch(r"[0-9a-f]{64}", row[3]):
        return None
    return LedgerEntry(row[1], int(row[2]), row[3])


def _read_table(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, None]]:
    """Rows by image_id and the columns in order, of a metadata.csv that may not be there."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return {}, {}
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; move it away before the download writes its own") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    columns = [column.strip() for column in reader.fieldnames or ()]
    if "image_id" not in columns:
        raise DataError(f"{path} has no column image_id; move it away before the download writes its own")
    reader.fieldnames = columns
    try:
        table = [{name: row[name] or "" for name in columns} for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{path} is not a CSV file ({error}); move it away before the download writes its own"
        ) from None
    rows: dict[str, dict[str, str]] = {}
    for row in table:
        stem, suffix = posixpath.splitext(row["image_id"].strip())
        rows[stem if suffix.lower() in IMAGE_SUFFIXES else row["image_id"].strip()] = row
    return rows, dict.fromkeys(columns)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")
