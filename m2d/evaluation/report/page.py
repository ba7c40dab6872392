"""What an evaluation found, all parts together: evaluation.json, evaluation.html, CSV tables, the terminal."""

import base64
import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from m2d.classes import ISIC7, ClassSet
from m2d.data.layouts import REPORT, REPORT_FILES
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import DownstreamResult
from m2d.evaluation.classifiers.probe import ConsistencyResult
from m2d.evaluation.classifiers.site import ARMS as SITE_ARMS
from m2d.evaluation.classifiers.site import DIFFERENCES, SiteResult
from m2d.evaluation.classifiers.worth import GAINS, RULES, WorthResult
from m2d.evaluation.fidelity import FidelityResult
from m2d.evaluation.images import FeatureSet, ImageSet
from m2d.evaluation.memorization import MemorizationResult
from m2d.evaluation.privacy import PrivacyResult
from m2d.evaluation.provenance import NearCopyGate
from m2d.evaluation.report import plots
from m2d.files.progress import say
from m2d.generation.contact_sheet import contact_sheet
from m2d.metrics.bootstrap import Estimate
from m2d.metrics.neighbours import Standardizer, nearest, one_where_constant

Row = dict[str, str | int | float | None]
OVERALL = "all"
SHOWN = 10  # images of a class on a sheet
TYPICAL_OF = 5  # neighbours
_ON_TERMINAL = {
    "class": "class", "train_images": "train", "test_images": "unseen", "generated_images": "made",
    "kernel_distance_generated": "kernel distance", "recall_b": "real, weighted", "recall_c": "oversampled",
    "recall_d": "+ synthetic", "class_agreement": "in class",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A part that was not asked for is None or empty; for one that could not be computed the notes give the reason."""

    checkpoint: str | None
    image_size: int
    device: str
    images: list[dict[str, Any]]  # train, test, generated: name, source; images and lesions by class code
    reconstruction_psnr_db: float | None  # of the unseen images by the checkpoint's VAE
    fidelity: list[FidelityResult]  # the independent extractor first, then the one that guided the training
    memorization: MemorizationResult | None
    downstream: list[DownstreamResult]  # a classifier each
    worth: list[WorthResult]  # of each classifier, by one rule for all arms
    sites: list[SiteResult]  # of each size of a site, with setting site
    near_copy_gate: NearCopyGate | None  # of the run that made the images, where they lie beside its journal
    autoencoder_downstream: DownstreamResult | None  # with reconstructions of training images as the synthetic ones
    consistency: ConsistencyResult | None
    privacy: PrivacyResult | None
    notes: list[str]
    seed: int
    seconds: float
    created: str
    version: str


def _cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("m2d.evaluation.report", "."),
    autoescape=jinja2.select_autoescape(["html.jinja"]),
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["cell"] = _cell


def write_report(
    result: Evaluation, output: Path, sets: dict[str, ImageSet], redrawn: ImageSet | None, typicality: np.ndarray
) -> None:
    """Write everything into the folder; what is left there of an earlier report is removed.

    redrawn: reconstructions of the unseen images. typicality: float64 [N], of each generated image, small: typical.
    Raises DataError where the disk refuses.
    """
    pictures, classes = _pictures(result, sets, redrawn, typicality), sets["train"].classes
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / REPORT).exists():
            say(f"the earlier report in {output} is replaced")
            for name in REPORT_FILES:
                (output / name).unlink(missing_ok=True)
        of_set = {} if classes == ISIC7 else {"class_set": classes.as_dict()}
        document = json.dumps(asdict(result) | of_set, indent=1, allow_nan=False)
        (output / REPORT).write_text(document, encoding="utf-8")  # first, as it marks the folder as a report
        copies = [vars(one) for one in sets["generated"].copies]
        for name, rows in (tables(result) | ({"copies": copies} if copies else {})).items():
            with (output / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        for name, png in pictures.items():
            (output / f"{name}.png").write_bytes(png)
        (output / "evaluation.html").write_text(_page(result, pictures, classes), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"output: {error.filename or output} cannot be written ({error.strerror}); free some space or name another "
            "--output, then run again (nothing is computed twice)"
        ) from error


def print_evaluation(result: Evaluation) -> None:
    """The answers and the classes, on the terminal."""
    console = Console(highlight=False)
    rows = class_rows(result)
    shown = {name: short for name, short in _ON_TERMINAL.items() if name in rows[0]}
    rule = "recall by training data, at argmax with all images mixed in, which is not the verdict's rule; "
    title = f"at {result.image_size} px; {rule if 'recall_d' in shown else ''}all numbers in classes.csv"
    table = Table(*shown.values(), title=title)
    for row in rows:
        table.add_row(*[_cell(row[name]) for name in shown])
    console.print(table)
    for question, answer, _ in answers(result):
        console.print(f"[bold]{question}[/bold] {answer}")
    for note in result.notes:
        console.print(f"note: {note}", markup=False)


def answers(result: Evaluation) -> list[list[str]]:
    """Of the parts that were computed: the question, the answer, how to read it."""
    text = _TEMPLATES.get_template("answers.jinja").render(result=result)
    return [block.splitlines() for block in text.strip().split("\n\n") if block]


def _page(result: Evaluation, pictures: dict[str, bytes], classes: ClassSet) -> str:
    return _TEMPLATES.get_template("evaluation.html.jinja").render(
        result=result,
        answers=answers(result),
        tables=tables(result),
        fidelity_tables=[fidelity_rows(one) for one in result.fidelity],
        scores=plots.SCORES,
        named=named,
        site_counts=_site_counts,
        site_arms=SITE_ARMS,
        gains=lambda found: {f"{GAINS.get(name, name)}: {one.word}": one.minus_a for name, one in found.items()},
        classes=classes.codes,
        images={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()},
        names=classes.names,
        colours=classes.colours,
    )


def _pictures(
    result: Evaluation, sets: dict[str, ImageSet], redrawn: ImageSet | None, typicality: np.ndarray
) -> dict[str, bytes]:
    """Name to PNG bytes."""
    generator = np.random.default_rng(result.seed)
    generated, test = sets["generated"], sets["test"]
    rows_of = (_of_class(images).items() for images in (generated, test))
    drawn, unseen = ({code: generator.permutation(rows) for code, rows in one} for one in rows_of)
    unseen = {code: unseen[code] for code in drawn if code in unseen}
    typical = _of_class(generated, np.argsort(typicality, kind="stable"))
    least = {code: rows[::-1] for code, rows in typical.items()}
    sheets = {
        "generated": (generated, drawn, "Generated images, drawn at random"),
        "unseen": (test, unseen, "Unseen real images, drawn at random, at the same size"),
        "most_typical": (generated, typical, "Most typical generated images: nearest to real ones of their class"),
        "least_typical": (generated, least, "Least typical generated images: the worst first"),
    }
    if redrawn is not None:
        title = "The same real images after the autoencoder: no generated image can be better"
        sheets["reconstructions"] = (redrawn, unseen, title)
    pictures = {name: _sheet(*sheet) for name, sheet in sheets.items()}
    for name, one in zip(("kernel_distance", "kernel_distance_guide"), result.fidelity):
        pictures[name] = plots.kernel_distances(one)
    if result.worth:
        pictures["differences"] = plots.differences(result.worth)
    for name, found in zip(("ratios", "ratios_finetune"), result.downstream):
        if found.ratios:
            pictures[name] = plots.ratio_curve(found)
    if result.consistency is not None:
        pictures["confusion"] = plots.confusions(result.consistency)
    if result.memorization is not None:
        pictures["nearest_pairs"] = _encoded(plots.nearest_pairs(result.memorization.worst, generated, sets["train"]))
    return pictures


def _of_class(images: ImageSet, order: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Code -> rows of each class that has some; in this order, if given."""
    order = np.arange(len(images)) if order is None else order
    return {code: order[images.labels[order] == images.classes.index(code)] for code in images.counts}


def _sheet(images: ImageSet, rows: dict[str, np.ndarray], title: str) -> bytes:
    shown = {code: np.stack([images.pixels[row] for row in found[:SHOWN]]) for code, found in rows.items()}
    totals = {code: len(found) for code, found in rows.items()}
    return _encoded(contact_sheet(shown, title=title, totals=totals, classes=images.classes))


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def typicality(train: FeatureSet, generated: FeatureSet) -> np.ndarray:
    """Of each generated image the mean distance to the nearest training images of its class: float64 [N].

    Distance: 1 - cosine of features standardised by the training images; up to five neighbours. Small: typical. No
    score of the set: it chooses which pictures a person sees.
    """
    standard = Standardizer.of(train.cls, one_where_constant)
    distances = np.empty(len(generated))
    for label in np.unique(generated.labels):
        rows, bank = generated.rows(label), train.rows(label)
        made, real = (standard.unit(cls) for cls in (generated.cls[rows], train.cls[bank]))
        distances[rows] = nearest(made, real, min(TYPICAL_OF, len(bank)))[0].mean(dim=1).numpy()
    return distances


def tables(result: Evaluation) -> dict[str, list[Row]]:
    """Name of the CSV file -> rows, all with the same columns; of the parts that were computed."""
    found = {
        "classes": class_rows(result),
        "fidelity": [row for one in result.fidelity for row in fidelity_rows(one)],
        "memorization": _memorization_rows(result.memorization) if result.memorization else [],
        "privacy": _privacy_rows(result.privacy) if result.privacy else [],
        "worth": [row for one in result.worth for row in _worth_rows(one)],
        "sites": [row for one in result.sites for row in _site_rows(one)],
        # the same for all classifiers
        "site_counts": [row for one in {one.share: one for one in result.sites}.values() for row in _site_counts(one)],
        "downstream": [row for one in result.downstream for row in _downstream_rows(one)],
    }
    return {name: _even(rows) for name, rows in found.items() if rows}


def class_rows(result: Evaluation) -> list[Row]:
    """A row for each class with the main numbers of every part: what a reader compares classes by."""
    counts = {side["name"]: side["images"] for side in result.images}
    rows: list[Row] = []
    for code in counts["train"]:
        row: Row = {"class": code, **{f"{name}_images": images.get(code, 0) for name, images in counts.items()}}
        for fidelity in result.fidelity[:1]:
            of_class = [one for one in fidelity.rows if one.label == code]
            row |= {f"kernel_distance_{one.comparison}": one.kernel_distance for one in of_class}
        if result.memorization is not None and code in result.memorization.classes:
            row["near_copy_share"] = result.memorization.classes[code].generated["either"].value
        for downstream in result.downstream[:1]:
            recalls = {letter: arm.scores.get(f"recall_{code}") for letter, arm in downstream.arms.items()}
            row |= {f"recall_{letter}": one.value if one else None for letter, one in recalls.items()}
        if result.consistency is not None and code in result.consistency.agreement:
            row["class_agreement"] = result.consistency.agreement[code].value
        rows.append(row)
    return _even(rows)


def fidelity_rows(result: FidelityResult) -> list[Row]:
    """A row for each class and comparison; overall first."""
    return [
        {
            "extractor": row.extractor, "class": row.label or OVERALL, "comparison": plots.COMPARISONS[row.comparison],
            **{name: value for name, value in vars(row).items() if name not in ("comparison", "label", "draws")},
            "left_out": "; ".join(sorted(set(row.left_out.values()))),
        }
        for label in dict.fromkeys(row.label for row in result.rows)
        for row in result.rows
        if row.label == label
    ]  # fmt: skip


def _memorization_rows(result: MemorizationResult) -> list[Row]:
    """A row for each class, overall first."""
    return [
        {
            "class": code, "images": made.images, "share": made.value,
            "share_low": made.low, "share_high": made.high,
            "share_of_unseen_real": unseen.value if unseen else None,
            "unseen_low": unseen.low if unseen else None,
            "unseen_high": unseen.high if unseen else None,
            **{f"nearness_{space}": value for space, value in one.nearness.items()},
            "flagged": "yes" if one.flagged else "no",
        }
        for code, one in [(OVERALL, result.overall), *result.classes.items()]
        for made, unseen in [(one.generated["either"], one.test["either"] if one.test else None)]
    ]  # fmt: skip


def _privacy_rows(result: PrivacyResult) -> list[Row]:
    """A row for each attack and class, overall first; then one for each space in which generated images are near."""
    told = result.membership
    attacks = [
        (name, code, one)
        for name, whole in (told.attacks if told else {}).items()
        for code, one in [(OVERALL, whole), *(told.classes[name] if told else {}).items()]
    ]
    found = [
        (name, code, one.lesions, measure, value, chance)
        for name, code, one in attacks
        for measure, value, chance in (("AUC", one.auc, 0.5), ("found at 1 % false alarms", one.found, 0.01))
        if value is not None
    ]
    nearer, lesions = "generated images nearer to training", sum(result.lesions.values())
    found += [(space, OVERALL, lesions, nearer, share, 0.5) for space, share in result.nearer.items()]
    return [
        {"told by": by, "class": code, "lesions": lesions, "measure": measure, **vars(value), "chance": chance}
        for by, code, lesions, measure, value, chance in found
    ]


def named(differences: dict[str, dict[str, Estimate]]) -> dict[str, dict[str, Estimate]]:
    """By what was done instead of by key: `equal priors: d - c`."""
    rules = RULES | DIFFERENCES
    return {"{}: {} - {}".format(*rules[rule]): found for rule, found in differences.items()}


def _score_rows(sides: dict[str, dict[str, Estimate]], **head: str | int | float | None) -> list[Row]:
    """A row for each arm, difference or gain, and score."""
    return [
        {**head, "arm": arm, "score": name, **vars(value)}
        for arm, scores in sides.items()
        for name, value in scores.items()
    ]


def _worth_rows(result: WorthResult) -> list[Row]:
    sides = result.arms | named(result.differences) | result.minus_original
    for name, gain in result.gains.items():
        sides |= {f"half of the lesions: {name} - c": gain.minus_c, f"half of the lesions: {name} - a": gain.minus_a}
    return _score_rows(sides, classifier=result.classifier)


def _site_rows(result: SiteResult) -> list[Row]:
    sides = result.arms | named(result.differences)
    return _score_rows(sides, classifier=result.classifier, site_share=result.share)


def _site_counts(result: SiteResult) -> list[Row]:
    """A row for each class: lesions and images of the site, what it is given, and what is tested."""
    return [
        {
            "site_share": result.share,
            "class": code,
            "lesions_of_the_site": count,
            "images_of_the_site": result.images[code],
            "synthetic_images": result.offered.get(code, 0),
            "of_the_generators_real_images": result.offered_real.get(code, 0),
            "tested_lesions": result.test_lesions.get(code, 0),
            "tested_images": result.test.get(code, 0),
        }
        for code, count in result.lesions.items()
    ]


def _downstream_rows(result: DownstreamResult) -> list[Row]:
    sides = {letter: arm.scores for letter, arm in result.arms.items()}
    sides |= {"d - b": result.minus_b, "d - c": result.minus_c}
    for one in result.ratios:
        sides |= {f"d at ratio {one.ratio:g}": one.synthetic, f"c at ratio {one.ratio:g}": one.oversampled}
        sides |= {f"d - c at ratio {one.ratio:g}": one.minus_c}
    return _score_rows(sides, classifier=result.classifier)


def _even(rows: list[Row]) -> list[Row]:
    """Every row with every column that some row has, in order."""
    heads = dict.fromkeys(name for row in rows for name in row)
    return [{head: row.get(head) for head in heads} for row in rows]
