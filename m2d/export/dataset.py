"""Generated images as an image folder of Hugging Face `datasets`, with a data sheet.

CLASS/ID.png  metadata.csv     one row an image: file_name, label, and what shaped it
certificates.pem               of images that are signed by a self-made one
README.md  complete.json       the data sheet; all files with their sizes
"""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2d import __version__
from m2d.errors import ConfigError, first_line
from m2d.evaluation.provenance import METADATA_NAME
from m2d.export.card import CARD, TEMPLATES, read_evaluation
from m2d.export.settings import ExportConfig
from m2d.files.atomic import mark_complete
from m2d.generation.output import JOURNAL_NAME, MANIFEST_NAME, RECORD_NAME, read_pngs
from m2d.generation.provenance import CERTIFICATES_NAME

_COLUMNS = (
    "seed", "mode", "feature", "solver", "steps", "guidance_scale", "strength", "gates", "nearest_distance",
    "class_distance", "feature_weak", "pick_rule", "pick_probability", "lesion_id", "skin_lesion_id", "sha256",
)  # fmt: skip


def is_generated(place: str) -> bool:
    """Whether a folder is what `m2d generate` leaves."""
    return Path(place, RECORD_NAME).is_file()


def write_dataset(folder: Path, config: ExportConfig, generated: Path, title: str, repository: str) -> None:
    """All files into an empty folder. Raises ConfigError for images that are not whole, and no finished run's."""
    try:
        record = json.loads((generated / RECORD_NAME).read_text(encoding="utf-8"))
        rows = [row for row in pq.read_table(generated / MANIFEST_NAME).to_pylist() if row["path"]]
        if any(row.get("view") is not None for row in rows):
            raise ConfigError(f"checkpoint: {generated} holds real images, flipped and turned; export synthetic ones")
        if any(row["mode"] == "image2image" and row.get("strength") == 0 for row in rows):
            raise ConfigError(
                f"checkpoint: {generated} holds real images, passed through the autoencoder (strength 0); export "
                "synthetic ones"
            )
        _write_images(folder, generated, rows)
        if (generated / CERTIFICATES_NAME).exists():
            shutil.copyfile(generated / CERTIFICATES_NAME, folder / CERTIFICATES_NAME)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ConfigError(
            f"checkpoint: the images in {generated} cannot be read ({first_line(error)}); run generate again to finish "
            "them"
        ) from None
    with (folder / METADATA_NAME).open("w", encoding="utf-8", newline="") as file:
        columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "label", "synthetic", *columns])
        writer.writerows([_name(row), row["class"], "true", *(row.get(name) for name in columns)] for row in rows)
    places = [config.evaluation] if config.evaluation else [str(generated / "evaluation" / "evaluation.json")]
    evaluated = read_evaluation(Path(places[0])) if config.evaluation or Path(places[0]).is_file() else None
    facts: dict[str, Any] = {
        "title": title,
        "repository": repository,
        "recipe": record.get("recipe", record),
        "counts": Counter(row["class"] for row in rows),
        "ways": _ways(rows),
        "begun": sum(row["mode"] != "standard" for row in rows),  # from real images
        "inpainted": sum(bool(row.get("skin_lesion_id")) for row in rows),
        "lesions": any(row.get("lesion_id") for row in rows),
        "features": sorted({row["feature"] for row in rows} - {"none"}),
        "rejected": _rejections(generated),
        "picks": record.get("pick", []),
        "size": (rows[0]["width"], rows[0]["height"]) if rows else (0, 0),
        "licence": config.data_license,
        "evaluated": evaluated,
        "version": __version__,
    }
    sheet = TEMPLATES.get_template("datasheet.md.jinja").render(facts)
    (folder / CARD).write_text(sheet, encoding="utf-8")
    mark_complete(folder)


def _name(row: dict[str, Any]) -> str:
    return f"{row['class']}/{row['id']}.png"


def _ways(rows: list[dict[str, Any]]) -> list[str]:
    """How many images began from what, a line each; those that began from real ones first."""
    found = []
    for mode, what in (
        ("image2image", "a real image, noised"),
        ("interpolate", "two real images"),
        ("standard", "noise"),
    ):
        if of := [row for row in rows if row["mode"] == mode]:
            strengths = {row["strength"] for row in of} - {None}
            how = f" to strength {min(strengths):g}..{max(strengths):g}" if strengths else ""
            found.append(f"{len(of):,} from {what}{how}")
    return found


def _write_images(folder: Path, generated: Path, rows: list[dict[str, Any]]) -> None:
    """Each file, of one image or of a shard, is read once."""
    of_file: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_file.setdefault(row["path"], []).append(row)
    for path, inside in of_file.items():
        pngs = read_pngs(generated / path)
        for row in inside:
            (folder / row["class"]).mkdir(exist_ok=True)
            (folder / _name(row)).write_bytes(pngs[row["id"]])


def _rejections(generated: Path) -> Counter[str]:
    """Attempts by the reason of their rejection; empty where the journal is gone."""
    try:
        journal = pq.read_table(generated / JOURNAL_NAME, columns=["accepted", "reason"]).to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return Counter()
    return Counter(row["reason"] for row in journal if not row["accepted"])
