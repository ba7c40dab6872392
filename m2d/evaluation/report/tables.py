"""What an evaluation found, all parts together: the content of evaluation.json, its tables and its answers."""

from dataclasses import dataclass
from typing import Self

from m2d.classes import CLASSES
from m2d.evaluation.classifiers.compare import DownstreamResult
from m2d.evaluation.consistency import ConsistencyResult
from m2d.evaluation.fidelity import AUTOENCODER, FLOOR, GENERATED, UNSEEN, FidelityResult
from m2d.evaluation.images import ImageSet
from m2d.evaluation.memorization import MemorizationResult
from m2d.evaluation.report.plots import NAMES

Row = dict[str, str | int | float | None]
OVERALL = "all"


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """One of the sets that were compared."""

    name: str
    source: str
    images: dict[str, int]  # class code -> number, of the classes that have some
    lesions: dict[str, int]

    @classmethod
    def of(cls, images: ImageSet) -> Self:
        """Counted."""
        lesions = {
            code: len(set(images.groups[images.labels == CLASSES.index(code)].tolist())) for code in images.counts
        }
        return cls(name=images.name, source=images.source, images=images.counts, lesions=lesions)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A part that was not asked for is None or empty; for one that could not be computed the notes give the reason."""

    checkpoint: str | None
    image_size: int
    device: str
    images: list[ImageCounts]  # train, test, generated
    reconstruction_psnr_db: float | None  # of the unseen images by the checkpoint's VAE
    fidelity: list[FidelityResult]  # the independent extractor first, then the one that guided the training
    memorization: MemorizationResult | None
    downstream: list[DownstreamResult]  # a classifier each
    autoencoder_downstream: DownstreamResult | None  # with reconstructions of training images as the synthetic ones
    consistency: ConsistencyResult | None
    notes: list[str]
    seed: int
    seconds: float
    created: str
    version: str


def tables(result: Evaluation) -> dict[str, list[Row]]:
    """Name of the CSV file -> rows, all with the same columns; of the parts that were computed."""
    found = {"classes": class_rows(result)}
    if result.fidelity:
        found["fidelity"] = [row for one in result.fidelity for row in fidelity_rows(one)]
    if result.memorization is not None:
        found["memorization"] = _memorization_rows(result.memorization)
    if result.downstream:
        found["downstream"] = [row for one in result.downstream for row in _downstream_rows(one)]
    return {name: _even(rows) for name, rows in found.items()}


def class_rows(result: Evaluation) -> list[Row]:
    """A row for each class with the main numbers of every part: what a reader compares classes by."""
    counts = {side.name: side.images for side in result.images}
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
            "extractor": row.extractor, "class": row.label or OVERALL, "comparison": NAMES[row.comparison],
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


def _downstream_rows(result: DownstreamResult) -> list[Row]:
    """A row for each arm (or difference) and score."""
    sides = [(letter, arm.scores) for letter, arm in result.arms.items()]
    sides += [("d - b", result.minus_b), ("d - c", result.minus_c)]
    for one in result.ratios:
        sides += [(f"d at ratio {one.ratio:g}", one.synthetic), (f"c at ratio {one.ratio:g}", one.oversampled)]
        sides += [(f"d - c at ratio {one.ratio:g}", one.minus_c)]
    return [
        {"classifier": result.classifier, "arm": arm, "score": name, **vars(value)}
        for arm, scores in sides
        for name, value in scores.items()
    ]


def _even(rows: list[Row]) -> list[Row]:
    """Every row with every column that some row has, in order."""
    heads = dict.fromkeys(name for row in rows for name in row)
    return [{head: row.get(head) for head in heads} for row in rows]


@dataclass(frozen=True)
class Answer:
    """One of the questions, answered."""

    question: str
    answer: str  # one or two sentences with the numbers
    reading: str  # how to read them


def answers(result: Evaluation) -> list[Answer]:
    """Of the parts that were computed, the most important question first."""
    found = [
        Answer(
            f"Do they help? ({one.classifier})",
            " ".join([one.verdict.sentence[:1].upper() + one.verdict.sentence[1:], *one.verdict.warnings]),
            "The same classifier was trained with and without the synthetic images and tested on lesions that it has "
            "not seen. Oversampling gives it the same number of images of each class by repeating real ones: only what"
            " goes beyond that is due to new images. An interval that holds 0 shows nothing either way.",
        )
        for one in result.downstream
    ]
    if result.autoencoder_downstream is not None:
        floor = result.autoencoder_downstream
        found.append(
            Answer(
                "What does the autoencoder alone cost?",
                f"{sum(floor.generated.values()):,} real training images that only passed the model's autoencoder, "
                "added in place of the generated ones, change balanced accuracy by "
                f"{floor.minus_c['balanced_accuracy'].signed} against oversampling.",
                "These images show real lesions, each a training image over again, so this is what a generator with "
                "this autoencoder can hope for before its images bring anything new. Below 0, train the autoencoder "
                "first.",
            )
        )
    if result.fidelity:
        found += _fidelity_answers(result.fidelity[0])
    if result.memorization is not None:
        verdict = result.memorization.verdict
        found.append(
            Answer(
                "Are they private enough?",
                f"{verdict[:1].upper()}{verdict[1:]}.",
                "A generated image counts as a near-copy where it lies nearer to a training image than photographs of "
                "different lesions practically ever do, as it is or flipped or turned. Unseen real images, told by the"
                " same rule, show how often that is chance. Look at the nearest pairs before you share the images: no "
                "number proves that no patient can be recognised.",
            )
        )
    if result.consistency is not None and result.consistency.mean_agreement and result.consistency.mean_recall_of_real:
        agreement, real = result.consistency.mean_agreement, result.consistency.mean_recall_of_real
        found.append(
            Answer(
                "Do they show the class they are labelled with?",
                f"A classifier that saw real images alone finds the asked class in {agreement.value:.0%} "
                f"[{agreement.low:.0%}, {agreement.high:.0%}] of the generated images, and the diagnosis in "
                f"{real.value:.0%} [{real.low:.0%}, {real.high:.0%}] of unseen real images (means over the classes).",
                "The classifier is no expert: its share on real images is what can be expected. Far below it, the "
                "labels of generated images are doubtful; far above it, they are more textbook-like than real lesions "
                "are.",
            )
        )
    return found


def _fidelity_answers(result: FidelityResult) -> list[Answer]:
    one, unseen = result.row(GENERATED), result.row(UNSEEN)
    if one is None or one.kernel_distance is None:
        return []
    words = {AUTOENCODER: "reconstructions of real ones", UNSEEN: "unseen real images", FLOOR: "other training images"}
    beside = [
        f"{text} {row.kernel_distance:.3f}"
        for name, text in words.items()
        if (row := result.row(name)) and row.kernel_distance is not None
    ]
    found = [
        Answer(
            "Are they real enough?",
            f"Kernel distance to the real training images {one.kernel_distance:.3f} (standard error "
            f"{one.kernel_distance_se:.3f}){'; for comparison: ' if beside else ''}{', '.join(beside)}. Mean over the "
            f"classes, features of {result.extractor}.",
            "0 means that a neural network cannot tell the two sets apart as wholes. No generated image can be better "
            "than the reconstructions, for they pass the same decoder; where both lie far from the unseen real images, "
            "it is the autoencoder that needs training.",
        )
    ]
    if one.recall is not None:
        floor = ""
        if unseen is not None and unseen.recall is not None:
            floor = f" (unseen real images: {unseen.recall:.0%} and {unseen.coverage:.0%})"
        found.append(
            Answer(
                "Are they diverse enough?",
                f"Recall {one.recall:.0%}, coverage {one.coverage:.0%}{floor}; the effective number of different images"
                f" (Vendi score) is {one.vendi_other:.1f} against {one.vendi_reference:.1f} of as many real ones "
                f"({one.n_matched:,}).",
                "Recall: the share of real images that lie among the generated ones. Coverage: the share of real images"
                " with a generated one near. A low recall with a high precision means the same few pictures over and "
                "over.",
            )
        )
    return found
