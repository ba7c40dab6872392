"""What the downstream comparison found, as plain numbers, and the sentence that it comes to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from m2d.evaluation.downstream_scores import LOWER_IS_BETTER

Word = Literal["helps", "no difference shown", "hurts"]
Settings = dict[str, str | int | float | bool | None]

_WATCHED = {  # may fall while the balanced accuracy rises: the ranking within a class, and what a probability means
    "macro_auprc": "macro AUPRC",
    "melanoma_auprc": "melanoma AUPRC",
    "expected_calibration_error": "expected calibration error",
}
_CONTROLS = {"c": "real images oversampled to the same counts", "b": "class weights on real images alone"}


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """The interval lies above 0."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """The interval lies below 0."""
        return self.high < 0

    @property
    def signed(self) -> str:
        """`+0.012 [-0.003, +0.027]`."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class ArmResult:
    """One arm: what it trained on and how it did, averaged over the seeds."""

    description: str
    images: dict[str, int]  # trained on, of each class, repeats counted
    trainings: int  # different ones among the seeds: 1 where no seed changes anything
    scores: dict[str, Estimate]  # by the names of downstream_scores.score_names


@dataclass(frozen=True)
class RatioResult:
    """A step of the ratio sweep: d with so many synthetic images for each real one, and its own control."""

    ratio: float
    added: dict[str, int]  # synthetic images that each class gained
    limited: str | None  # where there were too few, in words
    oversampled: dict[str, Estimate]  # scores of c
    synthetic: dict[str, Estimate]  # scores of d
    minus_b: dict[str, Estimate]
    minus_c: dict[str, Estimate]


@dataclass(frozen=True)
class Verdict:
    """See `verdict`."""

    word: Word
    sentence: str
    warnings: list[str]


@dataclass(frozen=True)
class DownstreamResult:
    """All of it for one classifier. Differences are d minus b and d minus c, paired by resample and seed."""

    classifier: str
    settings: Settings
    seeds: list[int]
    resamples: int
    train: dict[str, int]  # real images of each class
    generated: dict[str, int]
    test: dict[str, int]  # scored test images of each class
    test_lesions: dict[str, int]
    arms: dict[str, ArmResult]  # by letter: see m2d.evaluation.arms.ARMS
    minus_b: dict[str, Estimate]
    minus_c: dict[str, Estimate]
    ratios: list[RatioResult]
    verdict: Verdict
    left_out: dict[str, str]  # class code, or `arm e`: why
    notes: list[str]


def verdict(minus_b: Mapping[str, Estimate], minus_c: Mapping[str, Estimate]) -> Verdict:
    """Whether synthetic images help this classifier, by the balanced accuracy of d (real + synthetic).

    hurts: the interval of d - c lies below 0. helps: it lies above 0, and d is not below b either (the value of d - b
    is at least 0): what class weights give for nothing is no merit of the images. Otherwise no difference is shown.
    c settles it, for it has the same class counts as d; b is named beside it. A warning is a sentence for each control
    that d beats in balanced accuracy while its ranking or calibration got worse by the interval.
    """
    against_c, against_b = minus_c["balanced_accuracy"], minus_b["balanced_accuracy"]
    word: Word = "no difference shown"
    if against_c.below:
        word = "hurts"
    elif against_c.above and against_b.value >= 0:
        word = "helps"
    reason = ""
    if against_c.above and word != "helps":
        reason = ", so it beats oversampling but not class weights, which cost nothing"
    sentence = (
        f"{word}: adding the synthetic images changes balanced accuracy on unseen lesions by {against_c.signed} "
        f"against {_CONTROLS['c']}, and by {against_b.signed} against {_CONTROLS['b']}{reason} (95 % intervals)."
    )
    warnings = [_warning(letter, minus) for letter, minus in (("c", minus_c), ("b", minus_b))]
    return Verdict(word, sentence, [warning for warning in warnings if warning])


def _warning(control: str, minus: Mapping[str, Estimate]) -> str:
    """Empty where there is nothing to warn of."""
    if minus["balanced_accuracy"].value <= 0:
        return ""
    worse = [
        f"{text} by {minus[name].signed}"
        for name, text in _WATCHED.items()
        if name in minus and (minus[name].above if name in LOWER_IS_BETTER else minus[name].below)
    ]
    if not worse:
        return ""
    return f"Balanced accuracy rose against {_CONTROLS[control]}, yet this got worse: {'; '.join(worse)}."
