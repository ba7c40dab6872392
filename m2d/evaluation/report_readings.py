"""What the numbers of an evaluation mean, in plain sentences for a dermatologist. Knows results, no HTML."""

from dataclasses import dataclass

from m2d.evaluation.consistency import ConsistencyResult
from m2d.evaluation.downstream_result import DownstreamResult
from m2d.evaluation.evaluation import Evaluation
from m2d.evaluation.fidelity import AUTOENCODER, FLOOR, GENERATED, UNSEEN, FidelityResult
from m2d.evaluation.fidelity_rows import FidelityRow


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
        found.append(_floor(result.autoencoder_downstream))
    if result.fidelity:
        found += _fidelity(result.fidelity[0])
    if result.memorization is not None:
        found.append(
            Answer(
                "Are they private enough?",
                f"{result.memorization.verdict[:1].upper()}{result.memorization.verdict[1:]}.",
                "A generated image counts as a near-copy where it lies nearer to a training image than photographs of "
                "different lesions practically ever do, as it is or flipped or turned. Unseen real images, told by the"
                " same rule, show how often that is chance. Look at the nearest pairs before you share the images: no "
                "number proves that nobody can be recognised.",
            )
        )
    if result.consistency is not None:
        found += _consistency(result.consistency)
    return found


def _consistency(result: ConsistencyResult) -> list[Answer]:
    agreement, real = result.mean_agreement, result.mean_recall_of_real
    if agreement is None or real is None:
        return []
    return [
        Answer(
            "Do they show the class they are labelled with?",
            f"A classifier that saw real images alone finds the asked class in {agreement.value:.0%} "
            f"[{agreement.low:.0%}, {agreement.high:.0%}] of the generated images, and the diagnosis in "
            f"{real.value:.0%} [{real.low:.0%}, {real.high:.0%}] of unseen real images (means over the classes).",
            "The classifier is no expert: its share on real images is what can be expected. Far below it, the labels "
            "of generated images are doubtful; far above it, they are more textbook-like than real lesions are.",
        )
    ]


def _floor(result: DownstreamResult) -> Answer:
    against = result.minus_c["balanced_accuracy"]
    return Answer(
        "What does the autoencoder alone cost?",
        f"{sum(result.generated.values()):,} real training images that only passed the model's autoencoder, added in "
        f"place of the generated ones, change balanced accuracy by {against.signed} against oversampling.",
        "These images show real lesions, each a training image over again, so this is what a generator with this "
        "autoencoder can hope for before its images bring anything new. Below 0, train the autoencoder first.",
    )


def _fidelity(result: FidelityResult) -> list[Answer]:
    generated = result.row(GENERATED)
    if generated is None or generated.kernel_distance is None:
        return []
    others = {name: result.row(name) for name in (AUTOENCODER, UNSEEN, FLOOR)}
    known = {name: row.kernel_distance for name, row in others.items() if row and row.kernel_distance is not None}
    words = {AUTOENCODER: "reconstructions of real ones", UNSEEN: "unseen real images", FLOOR: "other training images"}
    beside = ", ".join(f"{words[name]} {value:.3f}" for name, value in known.items())
    real = Answer(
        "Are they real enough?",
        f"Kernel distance to the real training images {generated.kernel_distance:.3f}"
        + (f" (standard error {generated.kernel_distance_se:.3f})" if generated.kernel_distance_se is not None else "")
        + (f"; for comparison: {beside}" if beside else "")
        + f". Mean over the classes, features of {result.extractor}.",
        "0 means that a neural network cannot tell the two sets apart as wholes. No generated image can be better than"
        " the reconstructions, for they pass the same decoder; where both lie far from the unseen real images, it is "
        "the autoencoder that needs training.",
    )
    return [real, *_diversity(generated, others.get(UNSEEN))]


def _diversity(generated: FidelityRow, unseen: FidelityRow | None) -> list[Answer]:
    if generated.recall is None or generated.coverage is None or generated.vendi_other is None:
        return []
    beside = ""
    if unseen is not None and unseen.recall is not None and unseen.coverage is not None:
        beside = f" (unseen real images: {unseen.recall:.0%} and {unseen.coverage:.0%})"
    return [
        Answer(
            "Are they diverse enough?",
            f"Recall {generated.recall:.0%}, coverage {generated.coverage:.0%}{beside}; the effective number of "
            f"different images (Vendi score) is {generated.vendi_other:.1f} against {generated.vendi_reference:.1f} of "
            f"as many real ones ({generated.n_matched:,}).",
            "Recall: the share of real images that lie among the generated ones. Coverage: the share of real images "
            "with a generated one near. A low recall with a high precision means the same few pictures over and over.",
        )
    ]
