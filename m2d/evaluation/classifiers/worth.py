"""What synthetic images are worth to a classifier, by one rule for all that it is trained on.

Within a class they hold a share of the real images' weight, so that they cannot drown rare real ones. The share is
chosen by cross-validation on training lesions, and may be 0. Every classifier is then adjusted to equal priors, for at
argmax a balanced accuracy compares thresholds. Called for both classifiers; see compare.py for their protocol.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, Self

import numpy as np

from m2d.classes import ClassSet
from m2d.evaluation.classifiers.compare import (
    Classifier,
    Job,
    Resamples,
    Scored,
    TrainingRows,
    Trials,
    drawn_of_classes,
    run_jobs,
    training_rows,
)
from m2d.evaluation.images import ImageSet, Unanswerable, class_counts, lesion_counts
from m2d.metrics.bootstrap import Estimate, resampled_weights
from m2d.metrics.linear_probe import lesion_folds
from m2d.metrics.scores import LOWER_IS_BETTER

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)  # of a class's weight, on its synthetic images: those tried
FIXED_SHARE = 0.25  # where none can be chosen: too few lesions, or trainings that take minutes
MARGIN = 0.02  # of balanced accuracy: less is no difference that matters
INNER_FOLDS, INNER_RESAMPLES = 3, 200
LEAST_PROBABILITY = 1e-6  # in a loss: one image that is called wrongly must not decide alone
Word = Literal["helps", "harmless", "no use", "no difference shown", "hurts", "no verdict"]
Rules = dict[str, tuple[str, str, str]]  # how images are called, with what, and against what
RULES: Rules = {
    "primary": ("equal priors", "d", "c"),
    "less_real": ("equal priors", "d", "a"),
    "class_balanced": ("class-balanced loss", "d", "b"),
    "argmax": ("argmax", "d", "c"),
}
# What preprocessing the real images, training and test, changes: rule, arm with it, arm without. Rows of a report.
PREPROCESSED = (
    ("equal priors", "d", "c"),
    ("class-balanced loss", "d", "b"),
    ("equal priors", "c", "c"),
    ("class-balanced loss", "b", "b"),
)
GAINS = {  # offered to half of the training lesions
    "synthetic": "the synthetic images",
    "ceiling": "real images of the other half",
    "codec": "the same through the autoencoder",
}
WATCHED = {  # may fall while the balanced accuracy rises: the ranking within a class, and what a probability means
    "macro_auprc": "macro AUPRC",
    "melanoma_auprc": "melanoma AUPRC",
    "expected_calibration_error": "expected calibration error",
}
Sides = Mapping[str, ImageSet]  # "known", real images that are trained on alone, if there are any; then "tested"
Key = tuple[Any, ...]  # of a training: the number of the part, then which one


@dataclass(frozen=True)
class Pool:
    """Real images, some of which are tested, and the generated ones. Rows of the classifier's sets count in them."""

    labels: np.ndarray  # int64 [N]
    groups: np.ndarray  # object [N], equal values are one lesion; none has images on both sides of `tested`
    tested: np.ndarray  # bool [N]; the others are trained on alone
    generated: np.ndarray  # int64 [M], classes
    classes: ClassSet
    copies: int = 0  # of tested images among the generated ones
    redrawn: np.ndarray | None = None  # int64 [n], ascending: real rows that follow the generated ones, redrawn
    turned: int = 0  # further views of the tested images, which follow these, view after view
    # Real rows -> those of them that each generated image is from, see probe.origins; None: nothing is left out by it.
    nearest: Callable[[np.ndarray], np.ndarray] | None = None

    @classmethod
    def of(cls, sides: Sides, generated: ImageSet, **more: Any) -> Self:
        """The known images first."""
        every = sides.values()
        labels, groups = (np.concatenate([getattr(one, part) for one in every]) for part in ("labels", "groups"))
        of_test, classes = np.arange(len(labels)) >= len(labels) - len(sides["tested"]), sides["tested"].classes
        return cls(labels, groups, of_test, generated.labels, classes, len(generated.copies), **more)

    @cached_property
    def made(self) -> np.ndarray:
        """Classes of the classifier's generated set, int64: of the generated images and of what follows them."""
        redrawn = self.generated[:0] if self.redrawn is None else self.labels[self.redrawn]
        return np.concatenate([self.generated, redrawn, np.tile(self.labels[self.tested], self.turned)])


Folds = Sequence[dict[float, tuple[TrainingRows, np.ndarray]]]  # for each inner fold share -> rows and answers
Choice = Callable[[Pool, Folds, int], tuple[float, dict[float, float]]]  # by a seed; the share, and what each lost


@dataclass(frozen=True)
class Verdict:
    """Whether synthetic images help: see `word`."""

    word: Word
    sentence: str
    warnings: list[str]

    @classmethod
    def of(cls, said: Word, text: str, primary: Mapping[str, Estimate]) -> Self:
        """The word and what explains it, and a warning of what got worse by the interval while the accuracy rose.

        primary: what the synthetic images change, by score.
        """
        worse = [
            f"{name} by {one.signed}"
            for score, name in WATCHED.items()
            if (one := primary.get(score)) and (one.above if score in LOWER_IS_BETTER else one.below)
        ]
        rose = bool(worse) and said not in ("no use", "no verdict") and primary["balanced_accuracy"].value > 0
        warned = f"Balanced accuracy rose, yet this got worse: {'; '.join(worse)}."
        return cls(said, f"{said}: {text}", [warned] if rose else [])


@dataclass(frozen=True)
class Gain:
    """What images add to half of the training lesions, at equal priors."""

    word: Word
    mean_share: float
    minus_c: dict[str, Estimate]
    minus_a: dict[str, Estimate]


@dataclass(frozen=True)
class JudgedResult:
    """What is told of one classifier here and for a site."""

    classifier: str
    folds: int  # 1: one test part
    seeds: list[int]  # each with folds of its own
    resamples: int
    test: dict[str, int]  # scored images of each class
    test_lesions: dict[str, int]
    shares: list[float]  # of a class's weight, on synthetic images, for each seed and fold
    inner: dict[str, float]  # share -> class-balanced loss on held-out training lesions, mean over seeds and folds
    arms: dict[str, dict[str, Estimate]]  # `rule: arm`
    differences: dict[str, dict[str, Estimate]]  # by key of the rules


@dataclass(frozen=True)
class WorthResult(JudgedResult):
    """All of it for one classifier. Differences: by key of RULES."""

    margin: float
    within: dict[str, Estimate]  # the first two of them with 90 % intervals, those of two one-sided tests at 5 %
    gains: dict[str, Gain]  # by key of GAINS, and controls
    of_ceiling: Estimate | None  # what the synthetic images gain, over what real images of new lesions do
    codec_retention: Estimate | None  # what these gain through the autoencoder, over what they do without
    told_apart: dict[str, float]  # class code -> AUC of a detector of its generated images
    verdict: Verdict
    notes: list[str]
    # Where the real images were preprocessed, to arms on the images as they are: `rule: arm - arm on original images`.
    minus_original: dict[str, dict[str, Estimate]] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """Images offered to real ones that are trained on."""

    fit: np.ndarray  # int64, real rows to train on
    real: np.ndarray  # real rows, offered as if they were generated
    generated: np.ndarray  # generated rows


@dataclass
class Part:
    """One test part, and what is trained to call it."""

    seed: int
    held: np.ndarray  # int64, ascending real rows to call
    offers: dict[str, Offer]  # the first one: all synthetic images, to all real ones that are trained on
    pooled: bool = True  # whether the classifier knows other real images than these
    arms: dict[str, TrainingRows] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # by offer

    @property
    def fit(self) -> np.ndarray:
        """Real rows to train on."""
        return next(iter(self.offers.values())).fit


def measure_worth(
    classifier: Classifier,
    pool: Pool,
    trials: Trials,
    *,
    folds: int = 1,
    told_apart: Mapping[str, float] | None = None,
    controls: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    notes: Sequence[str] = (),
    original: Classifier | None = None,
) -> WorthResult:
    """Train, choose the shares, score what is tested, and say whether the synthetic images help.

    classifier: its train and its test set are the pool's images, its generated set the pool's `made`; one with a fixed
    share has, without folds, the two sides of `tested` instead. folds: of the tested lesions, each with all else to
    train on; their answers are scored together. controls: by name, half of the lesions' rows -> real rows that these
    are offered as if generated. original: the classifier of the same rows, its real images as they are, where the
    other's were preprocessed. Raises Unanswerable where fewer than two classes can be scored.
    """
    tested, choose = np.flatnonzero(pool.tested), classifier.fixed_share is None
    parts = list[Part]()
    for seed in trials.seeds:
        for held in partition(pool, tested, folds, seed) if folds > 1 else [tested]:
            fit = np.setdiff1d(np.arange(len(pool.labels)), held)
            offers = {"all": Offer(fit, held[:0], np.arange(len(pool.generated)))}
            offers |= on_half(pool, fit, seed, controls or {}) if choose else {}
            part = Part(seed, held, offers, pooled=choose or folds > 1)
            part.arms = {letter: real_arm(pool, part, letter, part.fit) for letter in "abcd"}
            if "synthetic" in offers:
                half = offers["synthetic"].fit
                part.arms |= {f"half {letter}": real_arm(pool, part, letter, half) for letter in "ac"}
            parts.append(part)
    too_few = f"tested and training lesions are too few, or share too few classes, for {folds} folds"
    judged = Judged.of(classifier, pool, parts, trials, chosen, too_few=too_few)

    resamples, scores = judged.resamples, judged.scores
    arms = {
        "equal priors: a": scores("a"),
        "equal priors: c": scores("c"),
        "equal priors: d": scores("all"),
        "class-balanced loss: b": scores("b", adjusted=False),
        "class-balanced loss: d": scores("balanced", adjusted=False),
        "argmax: c": scores("c", adjusted=False),
        "argmax: d": scores("d", adjusted=False),
    }
    told, drawn = judged.told(trials, folds, arms, RULES)
    told["classifier"] += ", real images through the autoencoder" if original is not None else ""
    minus_original = {}
    if original is not None:
        asked = {(number, arm): part.arms[arm] for number, part in enumerate(parts) for arm in "bc"}
        plain = replace(judged, answers=train(original, parts, asked, trials))
        before = {arm: plain.scores(arm, adjusted=arm == "c") for arm in "bc"}
        minus_original = {
            f"{how}: {one} - {other} on original images": resamples.estimates(arms[f"{how}: {one}"], before[other])
            for how, one, other in PREPROCESSED
        }
    gains, gained = dict[str, Gain](), dict[str, np.ndarray]()
    offered = [one for one in parts[0].offers if one != "all" and all(one in part.offers for part in parts)]
    of_half = [scores(f"half {letter}") for letter in "ca"] if offered else []
    for offer in offered:
        shares, with_it = judged.shares(offer), scores(offer)
        of_both = [resamples.means(with_it, "balanced_accuracy", control) for control in of_half]
        minus = (resamples.estimates(with_it, control) for control in of_half)
        gains[offer], gained[offer] = Gain(word(of_both, shares), float(np.mean(shares)), *minus), of_both[1]
    deciding, shares = [drawn["primary"], drawn["less_real"]], judged.shares("all")
    said: Word = "no verdict" if pool.copies else word(deciding, shares)
    return WorthResult(
        **told,
        margin=MARGIN,
        within={rule: Estimate.of(drawn[rule], 90) for rule in ("primary", "less_real")},
        gains=gains,
        of_ceiling=share_of_gain(gained.get("synthetic"), gained.get("ceiling")),
        codec_retention=share_of_gain(gained.get("codec"), gained.get("ceiling")),
        told_apart=dict(told_apart or {}),
        verdict=verdict(said, told["differences"], shares, (pool.copies, len(pool.generated))),
        notes=[*notes, *judged.notes("The training lesions")],
        minus_original=minus_original,
    )


# --- trainings ------------------------------------------------------------------------------------------------------


def train(
    classifier: Classifier, parts: Sequence[Part], asked: Mapping[Key, TrainingRows], trials: Trials
) -> dict[Key, np.ndarray]:
    """What is answered, each with the seed of its part."""
    jobs = {key: Job.of(classifier, rows, parts[key[0]].seed) for key, rows in asked.items()}
    answered = run_jobs(classifier, list(jobs.values()), trials)
    return {key: answered[job.digest] for key, job in jobs.items()}


@dataclass(frozen=True)
class Judged:
    """Trained parts of a pool, and the scores of their answers to the tested images of classes that all parts know."""

    classifier: Classifier
    pool: Pool
    parts: Sequence[Part]
    answers: dict[Key, np.ndarray]  # by number of the part and arm
    tried: list[dict[float, float]]  # what each share of the first offer lost, for each part where one was chosen
    scored: np.ndarray  # bool, of the tested images
    resamples: Resamples

    @classmethod
    def of(
        cls,
        classifier: Classifier,
        pool: Pool,
        parts: Sequence[Part],
        trials: Trials,
        choose: Choice,
        *,
        partitions: Sequence[int] = (0,),
        too_few: str,
    ) -> Self:
        """Train the arms that the parts have; choose the shares of what they are offered; train with these.

        Every part gains its shares, an arm for each offer, and `balanced`, class-balanced, for the first. choose: from
        the answers on inner folds, unless the classifier has a fixed share. partitions: added to a part's seed, for
        each partition into inner folds. Raises Unanswerable, as `too_few`, where fewer than two classes can be scored.
        """
        tested = np.flatnonzero(pool.tested)
        taught = [np.unique(pool.labels[one.fit]) for part in parts for one in part.offers.values()]
        classes = [k for k in np.unique(pool.labels[tested]) if all(k in known for known in taught)]
        if not parts or len(classes) < 2:
            raise Unanswerable(too_few)
        asked, inner = dict[Key, TrainingRows](), dict[Key, list[dict[float, TrainingRows]]]()
        for number, part in enumerate(parts):
            asked |= {(number, arm): rows for arm, rows in part.arms.items()}
            for name, offer in part.offers.items() if classifier.fixed_share is None else ():
                folds = [one for more in partitions for one in inner_trainings(pool, offer, part.seed + more)]
                inner[number, name] = folds
                for fold, of_share in enumerate(folds):
                    asked |= {(number, name, fold, one): rows for one, rows in of_share.items()}
        answers, tried = train(classifier, parts, asked, trials), list[dict[float, float]]()
        for number, part in enumerate(parts):
            for name, offer in part.offers.items():
                found = [
                    {one: (rows, answers[number, name, fold, one]) for one, rows in of_share.items()}
                    for fold, of_share in enumerate(inner.get((number, name), ()))
                ]
                part.shares[name], lost = (
                    choose(pool, found, part.seed) if found else (classifier.fixed_share or FIXED_SHARE, None)
                )
                known = part.held if part.pooled else None
                mix = partial(mixed, pool.labels, pool.made, offer, part.shares[name], asked=known)
                part.arms[name] = mix(classes="summed" if classifier.seeded else "real")
                if name == next(iter(part.offers)):
                    part.arms["balanced"] = mix(classes="alike")
                    tried += [lost] if lost else []
        rest = {(number, arm): rows for number, part in enumerate(parts) for arm, rows in part.arms.items()}
        answers |= train(classifier, parts, {key: rows for key, rows in rest.items() if key not in answers}, trials)
        scored = np.isin(pool.labels[tested], classes)
        truth, groups = pool.labels[tested][scored], pool.groups[tested][scored]
        resamples = Resamples.of(truth, groups, trials, pool.classes)
        return cls(classifier, pool, parts, answers, tried, scored, resamples)

    def scores(self, arm: str, *, adjusted: bool = True) -> list[Scored]:
        """For each seed, of the answers on all of its parts. adjusted: calls at equal priors, ranks at real ones."""
        pool, tested, found = self.pool, np.flatnonzero(self.pool.tested), []
        for seed in dict.fromkeys(part.seed for part in self.parts):
            called, ranked = np.empty((2, len(tested), len(pool.classes)))
            for number, part in enumerate(self.parts):
                if part.seed == seed:
                    places, answer = np.searchsorted(tested, part.held), self.answers[number, arm]
                    called[places] = ranked[places] = answer
                    if adjusted:
                        called[places] = equal_priors(answer, part.arms[arm], pool.labels, pool.made)
                        real_priors = np.bincount(pool.labels[part.fit], minlength=len(pool.classes))
                        ranked[places] = called[places] * real_priors
            ranked /= ranked.sum(axis=1, keepdims=True)
            found.append(self.resamples.scores(ranked[self.scored], called[self.scored]))
        return found

    def shares(self, offer: str) -> list[float]:
        """Of each part."""
        return [part.shares[offer] for part in self.parts]

    def told(
        self, trials: Trials, folds: int, arms: Mapping[str, list[Scored]], rules: Rules
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The fields of JudgedResult, and by rule the difference in balanced accuracy [1 + R].

        Differences are of the rules whose arms there are.
        """
        truth, classes, tried = self.resamples.truth, self.pool.classes, SHARES if self.tried else ()
        groups = self.pool.groups[self.pool.tested][self.scored]
        named = {rule: (f"{how}: {one}", f"{how}: {other}") for rule, (how, one, other) in rules.items()}
        sides = {rule: [arms[one] for one in both] for rule, both in named.items() if arms.keys() >= set(both)}
        drawn = {rule: self.resamples.means(one, "balanced_accuracy", other) for rule, (one, other) in sides.items()}
        return {
            "classifier": self.classifier.name,
            "folds": folds,
            "seeds": list(trials.seeds),
            "resamples": trials.resamples,
            "test": class_counts(truth, classes),
            "test_lesions": lesion_counts(truth, groups, classes),
            "shares": self.shares(next(iter(self.parts[0].offers))),
            "inner": {f"{share:g}": float(np.mean([lost[share] for lost in self.tried])) for share in tried},
            "arms": {arm: self.resamples.estimates(one) for arm, one in arms.items()},
            "differences": {rule: self.resamples.estimates(*both) for rule, both in sides.items()},
        }, drawn

    def notes(self, whose: str) -> list[str]:
        """The line that says so where a share should have been chosen and could not be."""
        if self.classifier.fixed_share is not None or self.tried:
            return []
        return [f"{whose} are too few to choose a share by; {FIXED_SHARE:g} is taken."]


# --- the rule -------------------------------------------------------------------------------------------------------


def equal_priors(answer: np.ndarray, rows: TrainingRows, real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Probabilities [N, K] over the share of each class in what was trained on, up to a factor for each image.

    Logit adjustment after training: log p - log prior (Menon et al., arXiv 2007.07314, eq. 8). 0 stays 0.
    real, generated: classes of the rows.
    """
    prior = np.bincount(rows.labels(real, generated), rows.weights, minlength=answer.shape[1])
    return np.divide(answer, prior, out=np.zeros_like(answer, dtype=np.float64), where=prior > 0)


def mixed(
    real: np.ndarray,
    generated: np.ndarray,
    offer: Offer,
    share: float,
    *,
    classes: Literal["real", "summed", "alike"] = "real",
    asked: np.ndarray | None,
) -> TrainingRows:
    """Within each class what is offered holds the share of the class's weight.

    classes: what they weigh: as many as the real images are; as these and what is offered are together, which is what
    real images weigh in arm c; all the same. asked: None: the classifier knows no others than these.
    """
    new = np.concatenate([real[offer.real], generated[offer.generated]])
    own = real[offer.fit]
    size = 1 + max(real.max(), generated.max(initial=0))
    counts, offered = np.bincount(own, minlength=size), np.bincount(new, minlength=size)
    even = np.full(size, len(own) / np.count_nonzero(counts))
    of_class = np.divide(
        {"real": counts, "summed": counts + offered, "alike": even}[classes],
        counts,
        out=np.zeros(size),
        where=counts > 0,
    )
    kept = np.where((offered > 0) & (counts > 0), 1 - share, 1) * of_class
    given = share * of_class * np.divide(counts, offered, out=np.zeros(size), where=offered > 0)
    used = given[new] > 0
    in_real = used[: len(offer.real)]
    return TrainingRows(
        real=np.concatenate([offer.fit, offer.real[in_real]]),
        generated=offer.generated[used[len(offer.real) :]],
        weights=np.concatenate([kept[own], given[new][used]]),
        reference=None if asked is None else offer.fit,
        asked=asked,
    )


def real_arm(pool: Pool, part: Part, letter: str, fit: np.ndarray) -> TrainingRows:
    """An arm of compare.py, of these real rows."""
    rows = training_rows(letter, pool.labels[fit], pool.generated, seed=part.seed)
    return TrainingRows(fit[rows.real], rows.generated, rows.weights, *((fit, part.held) if part.pooled else ()))


def partition(pool: Pool, rows: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Rows in as many parts, stratified by class, no lesion in two of them; none where they are too few."""
    return [rows[held] for _, held in lesion_folds(pool.labels[rows], pool.groups[rows], folds, seed)]


def on_half(
    pool: Pool, fit: np.ndarray, seed: int, controls: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> dict[str, Offer]:
    """Half of the lesions of each generated class are withheld; what the rest is offered. Empty for too few lesions.

    Of the withheld images as many as were generated, redrawn ones where there are such.
    """
    generator = np.random.default_rng([seed, 2])
    withheld = []
    for label in np.unique(pool.generated):
        lesions = np.unique(pool.groups[fit[pool.labels[fit] == label]].astype(str))
        withheld += generator.permutation(lesions)[: len(lesions) // 2].tolist()
    away = np.isin(pool.groups[fit].astype(str), withheld)
    there = fit[away] if pool.redrawn is None else np.intersect1d(fit[away], pool.redrawn)
    if not len(there):
        return {}
    counts = np.minimum(
        *(np.bincount(one, minlength=len(pool.classes)) for one in (pool.labels[there], pool.generated))
    )
    new, half, none = np.sort(there[drawn_of_classes(pool.labels[there], counts, [seed, 3])]), fit[~away], fit[:0]
    offers = {
        "synthetic": Offer(half, none, np.arange(len(pool.generated))),
        "ceiling": Offer(half, new, none),
    }
    if pool.redrawn is not None:
        offers["codec"] = Offer(half, none, len(pool.generated) + np.searchsorted(pool.redrawn, new))
    return offers | {name: Offer(half, control(half), none) for name, control in controls.items()}


# --- the choice of a share ------------------------------------------------------------------------------------------


def inner_trainings(pool: Pool, offer: Offer, seed: int) -> list[dict[float, TrainingRows]]:
    """For each fold of the training lesions, what is trained for each share. Empty where they are too few.

    What is offered stays away from lesions that it was learned from: a generated image is left out where its nearest
    training image is of a held-out lesion. Otherwise copies would be chosen for what they repeat.
    """
    folds = partition(pool, offer.fit, INNER_FOLDS, seed)
    rest = [np.setdiff1d(offer.fit, held) for held in folds]
    if any(len(np.unique(pool.labels[fit])) < 2 for fit in rest):
        return []
    made = offer.generated < len(pool.generated)
    nearest = pool.nearest(offer.fit)[offer.generated[made]] if pool.nearest is not None and made.any() else None
    found = []
    for held, fit in zip(folds, rest, strict=True):
        near = np.zeros(len(made), dtype=bool)
        if nearest is not None:
            near[made] = np.isin(pool.groups[nearest], pool.groups[held]).reshape(len(nearest), -1).any(axis=1)
        own = np.isin(pool.groups[offer.real], pool.groups[held])
        without = Offer(fit, offer.real[~own], offer.generated[~near])
        found.append({share: mixed(pool.labels, pool.made, without, share, asked=held) for share in SHARES})
    return found


def chosen(pool: Pool, folds: Folds, seed: int) -> tuple[float, dict[float, float]]:
    """The share of least loss, or 0 where that is less by under a standard error over lesions; and what each lost.

    The loss: cross-entropy at equal priors on held-out training lesions, every class weighing the same. In accuracy few
    lesions of a class would drown in their own noise.
    """
    held, called = held_out(pool, folds)
    mean, truth, lost = class_mean(pool, held, seed), pool.labels[held], {}
    for share, answer in called.items():
        right = answer[np.arange(len(held)), truth] / answer.sum(axis=1)
        lost[share] = mean(-np.log(right.clip(LEAST_PROBABILITY)))
    best = min(SHARES, key=lambda share: lost[share][0])
    gain = lost[0.0] - lost[best]
    return best if gain[0] > max(gain[1:].std(), 1e-6) else 0.0, {share: float(one[0]) for share, one in lost.items()}


def held_out(pool: Pool, folds: Folds) -> tuple[np.ndarray, dict[float, np.ndarray]]:
    """The real rows that all folds hold out, int64 [N], and for each share their calls at equal priors, [N, K]."""
    held = np.concatenate([fold[0.0][0].asked for fold in folds if fold[0.0][0].asked is not None])
    return held, {
        share: np.concatenate([equal_priors(answer, rows, pool.labels, pool.made) for rows, answer in of_folds])
        for share in SHARES
        for of_folds in [[fold[share] for fold in folds]]
    }


def class_mean(pool: Pool, rows: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """From losses [N] of real rows to their mean, every class weighing the same, and its resamples: [1 + R]."""
    truth = pool.labels[rows]
    weights = resampled_weights(truth, pool.groups[rows], resamples=INNER_RESAMPLES, seed=seed).astype(np.float64)
    of_class = np.eye(len(pool.classes))[:, np.unique(truth)][truth]  # [N, C]
    return lambda losses: ((weights @ (losses[:, None] * of_class)) / (weights @ of_class)).mean(axis=1)


# --- the verdict ----------------------------------------------------------------------------------------------------


def word(drawn: Sequence[np.ndarray], shares: Sequence[float]) -> Word:
    """Whether synthetic images help, by the balanced accuracy at equal priors.

    drawn: its differences to c and to a, value and resamples [1 + R] each. Which of the two controls is the better one
    differs by chance, so helps and hurts are said where the 95 % intervals of both lie above 0, or below. no use:
    cross-validation gave the images no weight anywhere. harmless: both 90 % intervals lie within MARGIN, that is, two
    one-sided tests at 5 % each reject a larger difference. Otherwise no difference is shown, nor by an interval that is
    a point.
    """
    wide, narrow = ([Estimate.of(one, level) for one in drawn] for level in (95, 90))
    if not any(shares):
        return "no use"
    if any(map(_is_point, wide)):
        return "no difference shown"
    if all(one.above for one in wide):
        return "helps"
    if all(one.below for one in wide):
        return "hurts"
    return "harmless" if all(one.low > -MARGIN and one.high < MARGIN for one in narrow) else "no difference shown"


def verdict(
    said: Word, differences: Mapping[str, Mapping[str, Estimate]], shares: Sequence[float], copies: tuple[int, int]
) -> Verdict:
    """The word in a sentence.

    differences: by key of RULES. copies: of test images among the generated ones, and how many these are.
    """
    against_c, against_a = (differences[rule]["balanced_accuracy"] for rule in ("primary", "less_real"))
    sees = (
        "An interval that is a point shows that too few lesions are tested, not that nothing differs"
        if _is_point(against_c) or _is_point(against_a)
        else f"This test sees differences from about {(against_c.high - against_c.low) / 2:.2g} on"
    )
    held = " to ".join(f"{share:g}" for share in sorted({min(shares), max(shares)}))
    changed = (
        f"with {held} of a class's weight on them the synthetic images change balanced accuracy at equal priors on "
        f"unseen lesions by {against_c.signed} against real images oversampled to the same counts, and by "
        f"{against_a.signed} against real images alone (95 % intervals)."
    )
    reasons: dict[Word, str] = {
        "no verdict": f"{copies[0]:,} of {copies[1]:,} generated images are copies of unseen real images, which would "
        "help any classifier; take them out (copies.csv) and evaluate again.",
        "no use": "cross-validation on training lesions gives the synthetic images no weight, so they change nothing.",
        "harmless": f"{changed} Two one-sided tests at 5 % rule out {MARGIN:g} or more either way.",
        "no difference shown": f"{changed} {sees}; --folds 5 --repeats 2 tests more lesions.",
    }
    return Verdict.of(said, reasons.get(said, changed), differences["primary"])


def _is_point(one: Estimate) -> bool:
    """Every resample says the same: few lesions, all called alike with and without, or one of each class."""
    return one.high - one.low < 1e-9  # sums in another order


def share_of_gain(gained: np.ndarray | None, ceiling: np.ndarray | None) -> Estimate | None:
    """Of what images add to real ones alone, over what better ones do, with its interval; both [1 + R].

    None where either is missing, or what the better ones add may be 0.
    """
    if gained is None or ceiling is None or Estimate.of(ceiling).low <= 0:
        return None
    ratios = gained / np.where(ceiling > 0, ceiling, np.nan)
    return Estimate(float(ratios[0]), *(float(end) for end in np.nanpercentile(ratios[1:], [2.5, 97.5])))
