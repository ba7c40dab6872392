"""Write an evaluation: evaluation.json for machines, evaluation.html for people, CSV tables, the pictures as files."""

import base64
import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from m2d.classes import CLASSES, DIAGNOSES
from m2d.errors import DataError
from m2d.evaluation.fidelity import GENERATED
from m2d.evaluation.images import FeatureSet, ImageSet, ImageSets
from m2d.evaluation.memorization_pictures import worst_pairs_picture
from m2d.evaluation.report import plots
from m2d.evaluation.report.tables import Evaluation, answers, class_rows, fidelity_rows, tables
from m2d.generation.contact_sheet import contact_sheet
from m2d.metrics.neighbours import Standardizer, nearest, one_where_constant
from m2d.plots.style import class_colours

SHOWN = 10  # images of a class on a sheet
TYPICAL_OF = 5  # neighbours
_ON_TERMINAL = {
    "class": "class", "train_images": "train", "test_images": "unseen", "generated_images": "made",
    "kernel_distance_generated": "kernel distance", "recall_b": "real, weighted", "recall_c": "oversampled",
    "recall_d": "+ synthetic", "class_agreement": "in class",
}  # fmt: skip
_FIDELITY = {
    "class": "class", "comparison": "against training images", "n_other": "images",
    "kernel_distance": "kernel distance",
    "kernel_distance_se": "s.e.", "n_matched": "N of the rest", "frechet_distance": "Fréchet distance",
    "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage", "vendi_other": "Vendi",
    "vendi_reference": "Vendi of real",
}  # fmt: skip


def write_report(
    result: Evaluation,
    output: Path,
    sets: ImageSets,
    redrawn: ImageSet | None,
    typicality: np.ndarray,
) -> Path:
    """Write everything into the folder; returns the page.

    redrawn: reconstructions of the unseen images. typicality: float64 [N], of each generated image, small: typical.
    Raises DataError where the disk refuses.
    """
    pictures = _pictures(result, sets, redrawn, typicality)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in tables(result).items():
            with (output / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
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
    console = Console(highlight=False)
    rows = class_rows(result)
    shown = {name: short for name, short in _ON_TERMINAL.items() if name in rows[0]}
    table = Table(
        *shown.values(), title=f"at {result.image_size} px; recall by training data, all numbers in classes.csv"
    )
    for row in rows:
        table.add_row(*[_cell(row[name]) for name in shown])
    console.print(table)
    for one in answers(result):
        console.print(f"[bold]{one.question}[/bold] {one.answer}")
    for note in result.notes:
        console.print(f"note: {note}", markup=False)


def _page(result: Evaluation, pictures: dict[str, bytes]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2d.evaluation.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("evaluation.html.jinja").render(
        result=result,
        answers=answers(result),
        tables=tables(result),
        columns_of=lambda rows: {name: name.replace("_", " ") for name in rows[0]},
        fidelity_columns=_FIDELITY,
        fidelity_tables=[fidelity_rows(one) for one in result.fidelity],
        scores=plots.SCORES,
        classes=CLASSES,
        images={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()},
        names={diagnosis.code: diagnosis.name for diagnosis in DIAGNOSES},
        colours=class_colours(),
    )


def _pictures(
    result: Evaluation, sets: ImageSets, redrawn: ImageSet | None, typicality: np.ndarray
) -> dict[str, bytes]:
    """Name to PNG bytes."""
    generator = np.random.default_rng(result.seed)
    drawn, unseen = (
        {code: generator.permutation(rows) for code, rows in _of_class(images).items()}
        for images in (sets.generated, sets.test)
    )
    unseen = {code: unseen[code] for code in drawn if code in unseen}
    typical = _of_class(sets.generated, np.argsort(typicality, kind="stable"))
    least = {code: rows[::-1] for code, rows in typical.items()}
    pictures = {
        "generated": _sheet(sets.generated, drawn, "Generated images, drawn at random"),
        "unseen": _sheet(sets.test, unseen, "Unseen real images, drawn at random, at the same size"),
        "most_typical": _sheet(
            sets.generated, typical, "Most typical generated images: nearest to real ones of their class"
        ),
        "least_typical": _sheet(sets.generated, least, "Least typical generated images: the worst first"),
    }
    if redrawn is not None:
        title = "The same real images after the autoencoder: no generated image can be better"
        pictures["reconstructions"] = _sheet(redrawn, unseen, title)
    for name, one in zip(("kernel_distance", "kernel_distance_guide"), result.fidelity):
        if one.row(GENERATED) is not None:
            pictures[name] = plots.kernel_distances(one)
    if result.downstream:
        pictures["differences"] = plots.differences(result.downstream)
    for name, found in zip(("ratios", "ratios_finetune"), result.downstream):
        if found.ratios:
            pictures[name] = plots.ratio_curve(found)
    if result.consistency is not None:
        pictures["confusion"] = plots.confusions(result.consistency)
    if result.memorization is not None and result.memorization.worst:
        pictures["nearest_pairs"] = _encoded(worst_pairs_picture(result.memorization.worst, sets.generated, sets.train))
    return pictures


def _of_class(images: ImageSet, order: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Code -> rows of each class that has some; in this order, if given."""
    order = np.arange(len(images)) if order is None else order
    return {code: order[images.labels[order] == CLASSES.index(code)] for code in images.counts}


def _sheet(images: ImageSet, rows: dict[str, np.ndarray], title: str) -> bytes:
    shown = {code: np.stack([images.pixels[row] for row in found[:SHOWN]]) for code, found in rows.items()}
    totals = {code: len(found) for code, found in rows.items()}
    return _encoded(contact_sheet(shown, title=title, totals=totals))


def typicality(train: FeatureSet, generated: FeatureSet) -> np.ndarray:
    """Of each generated image the mean distance to the nearest training images of its class: float64 [N].

    Distance: 1 - cosine of features standardised by the training images; up to five neighbours. Small: typical. No
    score of the set: it chooses which pictures a person sees.
    """
    scale = Standardizer.of(train.cls, one_where_constant)
    distances = np.empty(len(generated))
    for label in np.unique(generated.labels):
        rows, bank = generated.rows(int(label)), train.rows(int(label))
        found, _ = nearest(scale.unit(generated.cls[rows]), scale.unit(train.cls[bank]), min(TYPICAL_OF, len(bank)))
        distances[rows] = found.mean(dim=1).numpy()
    return distances


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _cell(value: str | float | None) -> str:
    match value:
        case None:
            return "–"
        case str():
            return value
        case int():
            return f"{value:,}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
