"""A probe's result: on the terminal, and as probe.json, probe.csv and probe.png."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from m2d.classes import CLASSES
from m2d.errors import DataError

FEW_LESIONS = 10  # of a class in the test images: its interval is then a rough one
SHOWN_UNREADABLE = 5
# Other people's images and splits: a yardstick, no check.
REFERENCES = (
    "EfficientNet-Lite0 (ImageNet): balanced accuracy 0.58 on unseen lesions of HAM10000 at 200 x 150 px, classes "
    "weighted alike (M2D's issue 3)",
    "PanDerm-Large: balanced accuracy 0.797, accuracy 0.924, authors' linear probe on their own HAM_clean split of "
    "8,207/575/1,232 images (SiyuanYan1/PanDerm, HAM_clean_evaluation.ipynb)",
)


@dataclass(frozen=True)
class Estimate:
    """A score in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class Side:
    """The images that the probe was fitted on, or tested on; what could not be read is left out."""

    source: str
    images: dict[str, int]  # class code -> number; a class without images is left out
    lesions: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Everything that a probe found. Plain values, in the order of probe.json."""

    extractor: str  # its key: name, weights, input size, crop
    device: str
    accuracy: Estimate
    balanced_accuracy: Estimate  # the mean recall of the classes in the test images
    macro_f1: Estimate
    recall: dict[str, Estimate]
    train: Side
    test: Side
    classes: tuple[str, ...]  # of the confusion matrix
    confusion: list[list[int]]  # rows: true class, columns: called class
    c: float
    c_tried: dict[str, float]  # c -> balanced accuracy on held-out training lesions; empty: c was not chosen by these
    converged: bool
    iterations: int
    resamples: int
    seed: int
    extracted: int  # images whose features were not in the cache
    unreadable: list[str]  # `path: reason`
    seconds: float
    created: str
    version: str

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the numbers, one line each."""
        notes = []
        if self.unreadable:
            more = ["..."] if len(self.unreadable) > SHOWN_UNREADABLE else []
            shown = "; ".join(self.unreadable[:SHOWN_UNREADABLE] + more)
            many = "images could not be read and are" if len(self.unreadable) > 1 else "image could not be read and is"
            notes.append(f"{len(self.unreadable):,} {many} left out: {shown}")
        untaught = [code for code in self.test.images if code not in self.train.images]
        if untaught:
            notes.append(f"no training images of {' '.join(untaught)}: never called, recall 0")
        untested = [code for code in CLASSES if code not in self.test.images]
        if untested:
            notes.append(f"no test images of {' '.join(untested)}: left out of every mean")
        if not self.converged:
            notes.append(
                f"the fit did not converge in {self.iterations} iterations, so the scores are not final; lower --c"
            )
        few = [f"{code} {count}" for code, count in self.test.lesions.items() if count < FEW_LESIONS]
        if few:
            notes.append(f"few test lesions ({', '.join(few)}): a recall and its interval are rough there")
        return notes

    @property
    def reading(self) -> str:
        """The result in one plain sentence or two."""
        chance = 1 / len(self.train.images)
        balanced = self.balanced_accuracy
        if balanced.low <= chance:
            return (
                f"Balanced accuracy {balanced.value:.2f} cannot be told from guessing ({chance:.2f}): the features say "
                "little of the diagnosis. Are the weights the right ones?"
            )
        codes = sorted(self.recall, key=lambda code: self.recall[code].value)
        return (
            f"On average {balanced.value:.0%} of a class's images are recognised (guessing: {chance:.0%}); best "
            f"{codes[-1]} with {self.recall[codes[-1]].value:.0%}, worst {codes[0]} with "
            f"{self.recall[codes[0]].value:.0%}."
        )


def print_result(result: ProbeResult, console: Console | None = None) -> None:
    """The table, then what it was made with, notes, references and a plain reading."""
    console = console or Console(highlight=False, soft_wrap=True)
    table = Table("score", *_columns("value", "95 % interval", "images", "lesions"))
    for name, code, estimate, images, lesions in _rows(result):
        table.add_row(
            f"{name} {code}".strip(),
            f"{estimate.value:.3f}",
            f"{estimate.low:.3f} to {estimate.high:.3f}",
            f"{images:,}",
            f"{lesions:,}",
            end_section=name == "macro-F1",
        )
    console.print(table)
    chosen = f", the best of {' '.join(result.c_tried)} on held-out training lesions" if result.c_tried else ""
    lines = [
        f"logistic regression on standardised cls features, classes weighted alike, c {result.c:g}{chosen}",
        f"intervals: {result.resamples:,} resamples of the test lesions within each class; the fitted probe stays as "
        "it is",
        *(f"note: {note}" for note in result.notes),
        *(f"for comparison, not a check: {reference}" for reference in REFERENCES),
        result.reading,
    ]
    for line in lines:
        console.print(line, markup=False)


def write_result(result: ProbeResult, folder: Path) -> None:
    """probe.json, probe.csv and probe.png. Raises DataError where they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("probe.json", json.dumps(asdict(result) | {"reading": result.reading}, indent=1).encode() + b"\n"),
            ("probe.csv", _csv(result).encode()),
            ("probe.png", _picture(result)),
        ):
            (folder / name).write_bytes(content)
    except OSError as error:
        raise DataError(
            f"output: {folder} cannot be written ({error.strerror or error}); name another --output"
        ) from None


def _rows(result: ProbeResult) -> list[tuple[str, str, Estimate, int, int]]:
    """Score, class code, estimate, test images, test lesions."""
    images, lesions = sum(result.test.images.values()), sum(result.test.lesions.values())
    overall = [
        (name, "", estimate, images, lesions)
        for name, estimate in (
            ("accuracy", result.accuracy),
            ("balanced accuracy", result.balanced_accuracy),
            ("macro-F1", result.macro_f1),
        )
    ]
    of_class = [
        ("recall", code, estimate, result.test.images[code], result.test.lesions[code])
        for code, estimate in result.recall.items()
    ]
    return overall + of_class


def _columns(*names: str) -> list[Any]:
    return [Column(name, justify="right") for name in names]


def _csv(result: ProbeResult) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["score", "class", "value", "low", "high", "images", "lesions"])
    for name, code, estimate, images, lesions in _rows(result):
        writer.writerow([name, code, estimate.value, estimate.low, estimate.high, images, lesions])
    return text.getvalue()


def _picture(result: ProbeResult) -> bytes:
    """The confusion matrix as a PNG: colours are shares of the true class, numbers are images."""
    confusion = np.array(result.confusion)
    of_class = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, of_class, out=np.full(confusion.shape, np.nan), where=of_class > 0)
    figure = Figure(figsize=(6.4, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*confusion.shape):
        if of_class[row, 0]:
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center", color=colour)
    ticks = range(len(result.classes))
    axes.set_xticks(ticks, result.classes)
    axes.set_yticks(ticks, [f"{code}  n = {count:,}" for code, count in zip(result.classes, of_class[:, 0])])
    axes.set_xlabel("called")
    axes.set_ylabel("true")
    axes.set_title(f"{result.extractor}\nbalanced accuracy {result.balanced_accuracy}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()
