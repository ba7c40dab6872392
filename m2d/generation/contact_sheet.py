"""What a person looks at first: the contact sheet with a row for each class, strips of walks, and a table of counts."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from rich.table import Column, Table

from m2d.classes import ISIC7, ClassSet
from m2d.generation.output import OutputFolder, read_images, whole_output
from m2d.plots.style import FAINT
from m2d.plots.tiles import GAP, HEAD, MARGIN, TEXT_SIZE, class_stripe, font, titled_page

_COLUMNS = 8  # images of a class, at most
_TILE = 112  # pixels a side that small images are enlarged to, at least
_CODE_WIDTH = 60  # at least, for a class code


def contact_sheet(
    images_by_class: Mapping[str, np.ndarray],
    *,
    title: str,
    caption: str = "",
    totals: Mapping[str, int] | None = None,
    scale: int | None = None,
    classes: ClassSet = ISIC7,
) -> Image.Image:
    """Draw one row for each class code, in the mapping's order.

    images_by_class: code -> uint8 [N, H, W, 3]; N may differ, H and W may not. totals: how many images a class has in
    all, where the sheet shows the first few of them. scale: whole factor by which the images are enlarged; None picks
    one. Every pixel becomes a square of equal pixels: smoothing would show detail that the model did not draw.
    """
    height, width = next(iter(images_by_class.values())).shape[1:3]
    scale = scale or max(1, -(-_TILE // max(height, width)))
    step, row_height = width * scale + GAP, HEAD + height * scale + 2 * GAP
    body = max(step * max(map(len, images_by_class.values())) - GAP, 480)
    face = font(TEXT_SIZE, bold=True)
    code_width = max(_CODE_WIDTH, *(min(200, int(face.getlength(code)) + 14) for code in images_by_class))
    page, draw, top = titled_page(body, row_height * len(images_by_class) - 2 * GAP, title, caption)
    for row, (code, images) in enumerate(images_by_class.items()):
        y = top + row * row_height
        diagnosis = classes.diagnoses[classes.index(code)]
        class_stripe(draw, diagnosis, MARGIN, y, body, room=code_width - 4)
        total = (totals or {}).get(code, len(images))
        count = f"{total:,}" if total == len(images) else f"{len(images)} of {total:,}"
        text = f"{diagnosis.name}, {count} image{'' if total == 1 else 's'}"
        draw.text((MARGIN + code_width, y), text, fill=FAINT, font=font(TEXT_SIZE))
        for column, image in enumerate(images):
            enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
            page.paste(Image.fromarray(enlarged), (MARGIN + column * step, y + HEAD))
    return page


def write_pictures(folder: OutputFolder, plan: pa.Table, *, title: str, caption: str, classes: ClassSet = ISIC7) -> int:
    """contact_sheet.png: the first images of each class of the plan, read back from disk, as a user has them.

    And strip_<group>.png for each walk that is complete: its images from one end to the other. Returns how many.
    """
    paths = folder.paths
    of_class: dict[str, list[tuple[int, str]]] = {}
    walks: dict[str, list[tuple[float, str]]] = {}
    for image_id, label, index, group, position in zip(
        *(plan[column].to_pylist() for column in ("id", "class", "index", "group", "position")), strict=True
    ):
        if image_id in paths:
            of_class.setdefault(label, []).append((index, image_id))
        if group is not None and position is not None:
            walks.setdefault(group, []).append((position, image_id))
    if of_class:
        first = {label: [image_id for _, image_id in sorted(ids)[:_COLUMNS]] for label, ids in of_class.items()}
        images = read_images(folder.root, {one: paths[one] for ids in first.values() for one in ids})
        sheet = contact_sheet(
            {label: np.stack([images[image_id] for image_id in ids]) for label, ids in first.items()},
            title=title,
            caption=caption,
            totals={label: len(ids) for label, ids in of_class.items()},
            classes=classes,
        )
        with whole_output(folder.root / "contact_sheet.png") as partial:
            sheet.save(partial, format="PNG")
    complete = {group: sorted(walk) for group, walk in walks.items() if all(image_id in paths for _, image_id in walk)}
    for group, walk in complete.items():
        images = read_images(folder.root, {image_id: paths[image_id] for _, image_id in walk})
        shown = np.stack([images[image_id] for _, image_id in walk])
        scale = max(1, -(-_TILE // max(shown.shape[1:3])))
        enlarged = shown.repeat(scale, axis=1).repeat(scale, axis=2)
        strip = np.concatenate(np.pad(enlarged, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255), axis=1)
        with whole_output(folder.root / f"strip_{group}.png") as partial:
            Image.fromarray(strip[:, :-GAP]).save(partial, format="PNG")
    return len(complete)


def what_they_are(rows: pa.Table) -> str:
    """For a caption, of a plan or a manifest: images that began from real ones may look like a patient's."""
    begun = "mode" in rows.column_names and pc.any(pc.not_equal(rows["mode"], "standard")).as_py()
    return "Variations of real images" if begun else "Synthetic images, not patients"


def counts_and_rejections(
    before: Mapping[str, int] | None,
    made: Counter[str],
    rejections: Counter[tuple[str, str]],
    missing: Counter[str],
    classes: ClassSet = ISIC7,
    kind: str = "synthetic",
) -> Table:
    """One row per class and one for all. before: real images, in mode balance. missing: asked for and given up.

    kind: what made images are.
    """
    columns = {} if before is None else {"real": Counter(before)}
    columns[kind] = made
    for wanted in sorted({reason for _, reason in rejections}):
        columns[f"rejected: {wanted}"] = Counter({code: n for (code, why), n in rejections.items() if why == wanted})
    if missing:
        columns["missing"] = missing
    if before is not None:
        columns["together"] = made + Counter(before)
    table = Table("class", *(Column(name, justify="right") for name in columns))
    shown = [code for code in classes.codes if any(column[code] for column in columns.values())]
    for code in shown:
        table.add_row(code, *(f"{column[code]:,}" for column in columns.values()), end_section=code == shown[-1])
    table.add_row("all", *(f"{column.total():,}" for column in columns.values()))
    return table
