"""What a run tells at its end: a table of counts, the contact sheet, and a strip for each walk between two images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.table import Table

from m2d.classes import CLASSES
from m2d.files.atomic import whole_file
from m2d.generation.contact_sheet import contact_sheet, strip
from m2d.generation.formats import read_images
from m2d.generation.journal import cannot_write
from m2d.generation.outputs import OutputFolder

SHEET_COLUMNS = 8


def counts_and_rejections(
    before: Mapping[str, int] | None,
    made: Mapping[str, int],
    rejections: Mapping[str, Mapping[str, int]],
    missing: Mapping[str, int],
) -> Table:
    """A row a class and one for all. before: real images, in mode balance. missing: asked for and given up."""
    reasons = sorted({reason for of_class in rejections.values() for reason in of_class})
    columns: dict[str, Mapping[str, int]] = {} if before is None else {"real": before}
    columns["synthetic"] = made
    for reason in reasons:
        columns[f"rejected: {reason}"] = {code: of_class.get(reason, 0) for code, of_class in rejections.items()}
    if any(missing.values()):
        columns["missing"] = missing
    if before is not None:
        columns["together"] = {code: before.get(code, 0) + made.get(code, 0) for code in CLASSES}
    table = Table()
    table.add_column("class")
    for name in columns:
        table.add_column(name, justify="right")
    shown = [code for code in CLASSES if any(column.get(code, 0) for column in columns.values())]
    for code in shown:
        table.add_row(code, *(f"{column.get(code, 0):,}" for column in columns.values()), end_section=code == shown[-1])
    table.add_row("all", *(f"{sum(column.get(code, 0) for code in shown):,}" for column in columns.values()))
    return table


def write_sheet(folder: OutputFolder, plan: pa.Table, *, title: str, caption: str) -> Path | None:
    """contact_sheet.png: the first images of each class of the plan, read back from disk, as a user has them."""
    paths = _paths(folder)
    by_class: dict[str, list[str]] = {}
    for image_id, label in zip(plan["id"].to_pylist(), plan["class"].to_pylist(), strict=True):
        if image_id in paths:
            by_class.setdefault(label, []).append(image_id)
    if not by_class:
        return None
    first = {label: ids[:SHEET_COLUMNS] for label, ids in by_class.items()}
    images = read_images(
        folder.root, folder.recipe.format, {image_id: paths[image_id] for ids in first.values() for image_id in ids}
    )
    sheet = contact_sheet(
        {label: np.stack([images[image_id] for image_id in ids]) for label, ids in first.items()},
        title=title,
        caption=caption,
        totals={label: len(ids) for label, ids in by_class.items()},
    )
    return _save(sheet, folder.root / "contact_sheet.png")


def write_strips(folder: OutputFolder, plan: pa.Table) -> int:
    """strip_<group>.png for each walk that is complete: its images from one end to the other. Returns how many."""
    paths = _paths(folder)
    walks: dict[str, list[tuple[float, str]]] = {}
    for group, position, image_id in zip(
        *(plan[name].to_pylist() for name in ("group", "position", "id")), strict=True
    ):
        if group is not None and position is not None:
            walks.setdefault(group, []).append((position, image_id))
    written = 0
    for group, places in walks.items():
        ids = [image_id for _, image_id in sorted(places)]
        if not all(image_id in paths for image_id in ids):
            continue
        images = read_images(folder.root, folder.recipe.format, {image_id: paths[image_id] for image_id in ids})
        _save(strip([images[image_id] for image_id in ids]), folder.root / f"strip_{group}.png")
        written += 1
    return written


def missing_text(missing: Mapping[str, int], rejections: Mapping[str, Mapping[str, int]]) -> str:
    """`MEL 3 (near_copy 12, blank 3), NV 1 (...)`: what is missing, and how often attempts were rejected for what."""
    return ", ".join(
        f"{code} {count} ({', '.join(f'{reason} {n}' for reason, n in sorted(rejections.get(code, {}).items()))})"
        for code, count in missing.items()
        if count
    )


def missing_by_class(plan: pa.Table, there: Sequence[str]) -> dict[str, int]:
    """Images of the plan that are not there, by class."""
    known = set(there)
    absent = [label for image, label in zip(plan["id"].to_pylist(), plan["class"].to_pylist()) if image not in known]
    return {code: absent.count(code) for code in CLASSES if code in absent}


def _paths(folder: OutputFolder) -> dict[str, str]:
    accepted = folder.accepted
    return dict(zip(accepted["id"].to_pylist(), accepted["path"].to_pylist(), strict=True))


def _save(image: Image.Image, path: Path) -> Path:
    try:
        with whole_file(path) as partial:
            image.save(partial, format="PNG")
    except OSError as error:
        raise cannot_write(path, error) from None
    return path
