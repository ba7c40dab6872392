"""What the ISIC archive's public API (v2) says, in M2D's words: collections, image records, diagnoses as class codes.

m2d.data.isic asks it; nothing here opens a connection, so that the settings may read it. Not seen live: taken from
the archive's own published sources (the server ImageMarkup/isic, the clients isic-cli and isic-metadata 4.12).

- `collections/ID/` describes a collection; an unknown one is a 404.
- `images/search/?collections=ID&limit=100` is a page {results, next, previous, count}; `next` is a whole URL with a
  cursor, null on the last page; `count` stands on the first page only; 100 is the most a page holds.
- `images/ISIC_ID/` is one record. URLs of files may be signed, and then expire within a week.
- `files.full.size` was counted before the archive wrote licence and attribution into the file's IPTC and XMP fields
  (server: accession.blob_size and embed_iptc_metadata), so a whole file may well have another size.
- A diagnosis is `metadata.clinical.diagnosis_1` .. `diagnosis_5`, general to specific; before 2024 one `diagnosis`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from m2d.classes import ISIC7

PUBLIC_API = "https://api.isic-archive.com/api/v2"
COLLECTIONS = {  # numbers as `isic collection list` prints them
    "ham10000": 212,  # 11,720 images: training, validation and test images of ISIC 2018 task 3 together
    "isic2018-task3": 66,  # its 10,015 training images, which are what the HAM10000 paper counts
}
SKIP = "skip"  # in place of a class code: leave such images out

# The archive files HAM10000's intraepithelial carcinomas (Bowen's disease) under squamous cell carcinoma: in collection
# 212, 149 solar or actinic keratoses and 229 carcinomas make the 378 AKIEC of task 3 (327 training, 8 validation, 43
# test). Elsewhere the same words mean an invasive carcinoma, which is none of the seven classes.
_TASK_3_COLLECTIONS = {66, 67, 73, 212}
_TASK_3_BRANCHES = {"squamous cell carcinoma": "AKIEC", "squamous cell carcinoma, nos": "AKIEC"}

_ISIC_ID = re.compile(r"ISIC_[0-9]{1,12}")
_METADATA_COLUMNS = ("patient_id", "diagnosis_confirm_type", "sex", "age_approx", "anatom_site_general")


@dataclass(frozen=True)
class ArchiveImage:
    """One image record, checked: its id is fit for a file's name, its URL is http or https."""

    isic_id: str
    url: str
    size: int | None  # bytes, by the record; the file's own may differ (see above)
    pixels: tuple[int, int] | None  # width, height by the record
    lesion_id: str  # "" where the archive gives none
    diagnosis: tuple[str, ...]  # general to specific, () where there is none
    image_type: str  # dermoscopic, clinical: close-up, ...; "" where there is none
    license: str
    attribution: str
    details: Mapping[str, str]  # further columns for metadata.csv


def collection_number(collection: int | str) -> int | None:
    """The collection's number in the archive: of a known name, or the number itself; None for anything else."""
    if str(collection) in COLLECTIONS:
        return COLLECTIONS[str(collection)]
    return int(collection) if re.fullmatch(r"[0-9]{1,9}", str(collection)) else None


def read_record(record: Any) -> ArchiveImage | str:
    """One entry of a page's results; or, in a few words, why it is of no use. Never raises, whatever the API sent."""
    if not isinstance(record, dict):
        return "record that is not an object"
    isic_id = record.get("isic_id")
    if not isinstance(isic_id, str) or not _ISIC_ID.fullmatch(isic_id):
        return "record whose id is not ISIC_ and a number"  # an id becomes a file name
    full = _object(_object(record, "files"), "full")
    url = full.get("url")
    if not isinstance(url, str) or not is_web_address(url):
        return "record without an http(s) address of its file"
    metadata = _object(record, "metadata")
    clinical, acquisition = _object(metadata, "clinical"), _object(metadata, "acquisition")
    size, pixels = full.get("size"), (acquisition.get("pixels_x"), acquisition.get("pixels_y"))
    return ArchiveImage(
        isic_id=isic_id,
        url=url,
        size=size if isinstance(size, int) and size > 0 else None,
        pixels=(pixels[0], pixels[1]) if isinstance(pixels[0], int) and isinstance(pixels[1], int) else None,
        lesion_id=_text(clinical.get("lesion_id")),
        diagnosis=_diagnosis(clinical),
        image_type=_text(acquisition.get("image_type")),
        license=_text(record.get("copyright_license")) or "not stated",
        attribution=_text(record.get("attribution")) or "not stated",
        details={name: _text(clinical.get(name)) for name in _METADATA_COLUMNS},
    )


def class_of(diagnosis: tuple[str, ...], collection: int, own_classes: Mapping[str, str]) -> str | None:
    """The class code of a diagnosis (general to specific), None where the tables name none: it is never guessed.

    collection: its number, because HAM10000 uses one term in a way of its own. own_classes: the user's diagnosis name
    -> class code or SKIP, any letter case; covers what is below it and goes before the tables.
    The most specific term that is known decides.
    """
    task_3 = _TASK_3_BRANCHES if collection in _TASK_3_COLLECTIONS else {}
    code = ISIC7.find(*diagnosis, own={**task_3, **own_classes})
    return None if code == SKIP else code


def is_web_address(url: str) -> bool:
    """Whether this is an http or https URL with a host and without a name or password in it."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return False


def _diagnosis(clinical: dict[str, Any]) -> tuple[str, ...]:
    levels = [_text(clinical.get(f"diagnosis_{level}")) for level in range(1, 6)]
    if not any(levels):
        levels = [part.strip() for part in _text(clinical.get("diagnosis")).split(":")]
    return tuple(level for level in levels if level)


def _object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A scalar as one line; lists, objects, null and booleans' absence as nothing."""
    return " ".join(str(value).split())[:500] if isinstance(value, (str, int, float)) else ""
