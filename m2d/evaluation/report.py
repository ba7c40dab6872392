"""Write an evaluation: evaluation.json for machines, evaluation.html for people, CSV tables, the pictures as files."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from m2d.classes import CLASSES, DIAGNOSES
from m2d.errors import DataError
from m2d.evaluation.evaluation import Evaluation
from m2d.evaluation.fidelity import GENERATED
from m2d.evaluation.images import ImageSet, ImageSets
from m2d.evaluation.memorization_pictures import worst_pairs_picture
from m2d.evaluation.report_plots import confusions, differences, kernel_distances, ratio_curve
from m2d.evaluation.report_readings import answers
from m2d.evaluation.report_tables import (
    Row,
    class_rows,
    downstream_rows,
    fidelity_rows,
    memorization_rows,
    recall_table,
    score_table,
)
from m2d.generation.contact_sheet import contact_sheet
from m2d.plots.style import class_colours

SHOWN = 10  # images of a class on a sheet


def write_report(
    result: Evaluation,
    output: Path,
    sets: ImageSets,
    redrawn: ImageSet | None,
    typicality: np.ndarray | None,
) -> Path:
    """Write everything into the folder; returns the page.

    typicality: float64 [N], of each generated image, small: typical. Raises DataError where the disk refuses.
    """
    pictures = _pictures(result, sets, redrawn, typicality)
    tables: dict[str, list[Row]] = {"classes": class_rows(result)}
    if result.fidelity:
        tables["fidelity"] = fidelity_rows(result.fidelity)
    if result.memorization is not None:
        tables["memorization"] = memorization_rows(result.memorization)
    if result.downstream:
        tables["downstream"] = downstream_rows(result.downstream)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            (output / f"{name}.csv").write_text(_csv(rows), encoding="utf-8")
        for name, png in pictures.items():
            (output / f"{name}.png").write_bytes(png)
        document = json.dumps(asdict(result), indent=1, allow_nan=False)
        (output / "evaluation.json").write_text(document, encoding="utf-8")
        page = output / "evaluation.html"
        page.write_text(_page(result, pictures), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"output: {error.filename or output} cannot be written ({error.strerror}); free some space or name another "
            "--output, then run again (nothing is computed twice)"
        ) from error
    return page


def print_evaluation(result: Evaluation) -> None:
    """The answers and the classes, on the terminal."""
    console = Console()
    rows = class_rows(result)
    shown = {name: short for name, short in _ON_TERMINAL.items() if any(name in row for row in rows)}
    table = Table(
        *shown.values(), title=f"at {result.image_size} px; recall by training data, all numbers in classes.csv"
    )
    for row in rows:
        table.add_row(*[_cell(row[name]) for name in shown])
    console.print(table)
    for one in answers(result):
        console.print(f"[bold]{one.question}[/bold] {one.answer}", highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


_ON_TERMINAL = {
    "class": "class", "train_images": "train", "test_images": "unseen", "generated_images": "made",
    "kernel_distance_generated": "kernel distance", "recall_b": "real, weighted", "recall_c": "oversampled",
    "recall_d": "+ synthetic", "class_agreement": "in class",
}  # fmt: skip


def _page(result: Evaluation, pictures: dict[str, bytes]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2d.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    classes = class_rows(result)
    fidelity = [
        {
            "result": one,
            "rows": [[_cell(row[name]) for name in _FIDELITY] for row in fidelity_rows([one])],
            "left_out": "; ".join(sorted({str(row["left_out"]) for row in fidelity_rows([one]) if row["left_out"]})),
        }
        for one in result.fidelity
    ]
    return environment.get_template("evaluation.html.jinja").render(
        result=result,
        answers=answers(result),
        images={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()},
        names={diagnosis.code: diagnosis.name for diagnosis in DIAGNOSES},
        colours=class_colours(),
        class_heads=[head.replace("_", " ") for head in _heads(classes)],
        class_rows=[[_cell(value) for value in row.values()] for row in classes],
        fidelity_heads=list(_FIDELITY.values()),
        fidelity=fidelity,
        memorization_rows=[[_cell(value) for value in row.values()] for row in memorization_rows(result.memorization)]
        if result.memorization
        else [],
        memorization_heads=[head.replace("_", " ") for head in _heads(memorization_rows(result.memorization))]
        if result.memorization
        else [],
        downstream=[(one, score_table(one), recall_table(one)) for one in result.downstream],
    )


_FIDELITY = {
    "class": "class", "comparison": "against training images", "n_other": "images",
    "kernel_distance": "kernel distance",
    "kernel_distance_se": "s.e.", "n_matched": "N of the rest", "frechet_distance": "Fréchet distance",
    "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage", "vendi_other": "Vendi",
    "vendi_reference": "Vendi of real",
}  # fmt: skip


def _pictures(
    result: Evaluation, sets: ImageSets, redrawn: ImageSet | None, typicality: np.ndarray | None
) -> dict[str, bytes]:
    """Name to PNG bytes."""
    generator = np.random.default_rng(result.seed)
    pictures = {
        "generated": _sheet(sets.generated, _some(sets.generated, generator), "Generated images, drawn at random")
    }
    codes = list(sets.generated.counts)
    unseen = _some(sets.test, generator, codes)
    pictures["unseen"] = _sheet(sets.test, unseen, "Unseen real images, drawn at random, at the same size")
    if redrawn is not None:
        title = "The same real images after the autoencoder: no generated image can be better"
        pictures["reconstructions"] = _sheet(redrawn, unseen, title)
    if typicality is not None:
        order = np.argsort(typicality, kind="stable")
        least = {code: rows[::-1] for code, rows in _ordered(sets.generated, order).items()}
        title = "Most typical generated images: nearest to real ones of their class"
        pictures["most_typical"] = _sheet(sets.generated, _ordered(sets.generated, order), title)
        pictures["least_typical"] = _sheet(sets.generated, least, "Least typical generated images: the worst first")
    for name, one in zip(("kernel_distance", "kernel_distance_guide"), result.fidelity):
        if one.row(GENERATED) is not None:
            pictures[name] = kernel_distances(one)
    if result.downstream:
        pictures["differences"] = differences(result.downstream)
    for name, found in zip(("ratios", "ratios_finetune"), result.downstream):
        if found.ratios:
            pictures[name] = ratio_curve(found)
    if result.consistency is not None:
        pictures["confusion"] = confusions(result.consistency)
    if result.memorization is not None and result.memorization.worst:
        pictures["nearest_pairs"] = _encoded(worst_pairs_picture(result.memorization.worst, sets.generated, sets.train))
    return pictures


def _some(
    images: ImageSet, generator: np.random.Generator, codes: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    rows = {code: generator.permutation(np.flatnonzero(images.labels == CLASSES.index(code))) for code in images.counts}
    return {code: rows[code] for code in (codes or rows) if code in rows}


def _ordered(images: ImageSet, order: np.ndarray) -> dict[str, np.ndarray]:
    return {code: order[images.labels[order] == CLASSES.index(code)] for code in images.counts}


def _sheet(images: ImageSet, rows: dict[str, np.ndarray], title: str) -> bytes:
    shown = {code: np.stack([images.pixels[row] for row in found[:SHOWN]]) for code, found in rows.items()}
    totals = {code: len(found) for code, found in rows.items()}
    return _encoded(contact_sheet(shown, title=title, totals=totals))


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=_heads(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _heads(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: str | float | None) -> str:
    match value:
        case None:
            return "–"
        case str():
            return value
        case int():
            return f"{value:,}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
