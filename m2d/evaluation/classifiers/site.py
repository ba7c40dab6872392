"""What a site with few lesions gains from images of a generator that learned on the lesions of others.

Three parts without a common lesion: those that the generator learned on, those of the site, those that are tested. All
classifiers are judged by the rule of worth.py, with a choice of the share that is made for few lesions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from m2d.evaluation.classifiers.compare import (
    Classifier,
    Resamples,
    TrainingRows,
    Trials,
    drawn_of_classes,
)
from m2d.evaluation.classifiers.worth import (
    FIXED_SHARE,
    INNER_RESAMPLES,
    LEAST_PROBABILITY,
    SHARES,
    WATCHED,
    Offer,
    Part,
    Pool,
    Verdict,
    Word,
    equal_priors,
    partition,
    real_arm,
    scores_of_parts,
    share_of_gain,
    train_parts,
    word,
)
from m2d.evaluation.images import Unanswerable, class_counts, lesion_counts
from m2d.metrics.bootstrap import Estimate, resampled_weights
from m2d.metrics.scores import LOWER_IS_BETTER

# Added to a site's seed for the partitions by which a share is chosen: with few lesions a single one decides by chance.
INNER_PARTITIONS = (1000, 2000)
TEMPERATURES = np.geomspace(0.25, 32, 43)  # by which log-probabilities are divided
ENOUGH = 0.95  # of a site's lesions: folds are not of equal size
ARMS = {
    "a": "the site's real images",
    "b": "the same with class weights",
    "c": "the same, oversampled to the counts of d",
    "t": "the same, each in all eight flips and quarter turns",
    "d": "the site's and the synthetic images",
    "f": "the site's and as many of the generator's own real images",
}
DIFFERENCES = {  # how images are called, with what, and against what; the first three decide
    "primary": ("equal priors", "d", "c"),
    "less_real": ("equal priors", "d", "a"),
    "class_balanced": ("class-balanced loss", "d", "b"),
    "augmented": ("equal priors", "d", "t"),
    "shared": ("equal priors", "f", "a"),
    "not_shared": ("equal priors", "d", "f"),
}


@dataclass(frozen=True)
class SiteResult:
    """All of it for one classifier and one size of the site. Counts of the site are means over its draws."""

    classifier: str
    share: float  # of all lesions, those that the generator has seen too
    lesions: dict[str, float]  # of the site, of each class
    images: dict[str, float]
    offered: dict[str, int]  # synthetic images
    offered_real: dict[str, int]  # of the generator's own real images, at most as many; empty: it is not known which
    folds: int  # of the lesions that the generator has not seen; a site of its own for each
    seeds: list[int]  # each with folds and sites of its own
    resamples: int
    test: dict[str, int]  # scored images of each class
    test_lesions: dict[str, int]
    shares: list[float]  # of a class's weight, on synthetic images, for each site
    shares_of_real: list[float]  # the same for the generator's own real images
    inner: dict[str, float]  # share -> loss on held-out lesions of the site, mean over the sites
    arms: dict[str, dict[str, Estimate]]  # `rule: arm`
    differences: dict[str, dict[str, Estimate]]  # by key of DIFFERENCES
    of_shared: Estimate | None  # d - a over f - a; None: f - a may be 0
    verdict: Verdict
    notes: list[str]


def measure_site(
    classifier: Classifier,
    name: str,
    pool: Pool,
    trials: Trials,
    *,
    share: float,
    folds: int,
    choose: bool = True,
    fixed: float = FIXED_SHARE,
    turned: int = 0,
    copies: int = 0,
    notes: Sequence[str] = (),
) -> SiteResult:
    """Train a classifier for each site, score what is tested, and say what the synthetic images bring.

    pool: rows that are not `tested` are real images that the generator learned on; the others it has not seen, and each
    of their folds is tested once, by a site whose lesions are drawn from the other folds. classifier: its train and its
    test set are the pool's images; behind the generated ones come `turned` further views of the tested images, view
    after view. share: of all lesions of the pool, class by class. choose: False: their share is `fixed`, as it is
    where the lesions are too few to choose by. copies: of tested images among the generated ones. Raises
    Unanswerable where the site cannot have so many lesions, or fewer than two classes can be scored.
    """
    tested, own = np.flatnonzero(pool.tested), np.flatnonzero(~pool.tested)
    made = np.concatenate([pool.generated, np.tile(pool.labels[tested], turned)])
    counts = np.bincount(pool.generated, minlength=len(pool.classes))
    counts = np.minimum(counts, np.bincount(pool.labels[own], minlength=len(pool.classes)))
    sites, every, notes = list[Part](), np.arange(len(pool.generated)), list(notes)
    for seed in trials.seeds:
        lent = np.sort(own[drawn_of_classes(pool.labels[own], counts, [seed, 3])])
        for number, held in enumerate(partition(pool, tested, folds, seed)):
            fit = site_rows(pool, np.setdiff1d(tested, held), share, [seed, number])
            offers = {"d": Offer(fit, fit[:0], every)} | ({"f": Offer(fit, lent, every[:0])} if len(lent) else {})
            sites.append(Part(seed, held, offers))
    classes = [k for k in np.unique(pool.labels[tested]) if all((pool.labels[one.fit] == k).any() for one in sites)]
    if not sites or len(classes) < 2:
        raise Unanswerable(f"the lesions are too few, or share too few classes, for {folds} folds and a site")

    for site in sites:
        site.arms = {letter: real_arm(pool, site, letter, site.fit) for letter in "abc"}
        site.arms |= {"t": _turned(pool, site, turned)} if turned else {}
    choice = chosen_of_few if choose else None
    answers, tried = train_parts(
        classifier, pool, made, sites, trials, share=fixed, choose=choice, partitions=INNER_PARTITIONS
    )
    if choose and not tried:
        notes.append(f"The site's lesions are too few to choose a share by; {fixed:g} is taken.")

    scored = np.isin(pool.labels[tested], classes)
    truth, groups = pool.labels[tested][scored], pool.groups[tested][scored]
    resamples = Resamples.of(truth, groups, trials, pool.classes)
    scores_of = partial(scores_of_parts, pool, made, sites, resamples, answers)
    letters = [letter for letter in ARMS if letter in sites[0].arms and letter != "b"]
    arms = {f"equal priors: {letter}": scores_of(letter) for letter in letters}
    arms["class-balanced loss: b"] = scores_of("b", adjusted=False)
    arms["class-balanced loss: d"] = scores_of("balanced", adjusted=False)
    sides = {
        rule: (arms[f"{how}: {one}"], arms[f"{how}: {other}"])
        for rule, (how, one, other) in DIFFERENCES.items()
        if {one, other} <= sites[0].arms.keys()
    }
    drawn = {rule: resamples.means(one, "balanced_accuracy", other) for rule, (one, other) in sides.items()}
    differences = {rule: resamples.estimates(one, other) for rule, (one, other) in sides.items()}
    shares = {letter: [site.shares[letter] for site in sites] for letter in sites[0].offers}
    fits = [site.fit for site in sites]
    lesions = _mean([lesion_counts(pool.labels[fit], pool.groups[fit], pool.classes) for fit in fits])
    offered = class_counts(pool.generated, pool.classes)
    said = word([drawn[rule] for rule in ("primary", "less_real", "class_balanced")], shares["d"])
    return SiteResult(
        classifier=name,
        share=share,
        lesions=lesions,
        images=_mean([class_counts(pool.labels[fit], pool.classes) for fit in fits]),
        offered=offered,
        offered_real={pool.classes.codes[k]: int(n) for k, n in enumerate(counts) if n},
        folds=folds,
        seeds=list(trials.seeds),
        resamples=trials.resamples,
        test=class_counts(truth, pool.classes),
        test_lesions=lesion_counts(truth, groups, pool.classes),
        shares=shares["d"],
        shares_of_real=shares.get("f", []),
        inner={f"{one:g}": float(np.mean([lost[one] for lost in tried])) for one in (SHARES if tried else ())},
        arms={arm: resamples.estimates(one) for arm, one in arms.items()},
        differences=differences,
        of_shared=share_of_gain({"d": [drawn["less_real"]] * 2, "ceiling": [drawn["shared"]] * 2}, "d")
        if "shared" in drawn
        else None,
        verdict=_verdict(
            "no verdict" if copies else said,
            differences,
            (copies, len(pool.generated)),
            _in_words(lesions, offered, pool),
        ),
        notes=notes,
    )


def site_rows(pool: Pool, rest: np.ndarray, share: float, seed: list[int]) -> np.ndarray:
    """Ascending rows of a site, drawn from `rest`: of each class this share of all lesions of the pool, at least one.

    Raises Unanswerable where the rest has too few lesions for it.
    """
    names, first = np.unique(pool.groups.astype(str), return_index=True)
    every = np.bincount(pool.labels[first], minlength=len(pool.classes))
    wanted = np.where(every > 0, np.maximum(1, np.rint(share * every)), 0).astype(np.int64)
    here = np.isin(names, pool.groups[rest].astype(str))
    there, labels = names[here], pool.labels[first[here]]
    counts = np.minimum(wanted, np.bincount(labels, minlength=len(pool.classes)))
    if counts.sum() < ENOUGH * wanted.sum():
        unseen = np.isin(names, pool.groups[pool.tested].astype(str)).sum()
        raise Unanswerable(
            f"site_share {share:g} is {wanted.sum():,} of all {len(names):,} lesions, but the generator has not seen "
            f"{unseen:,} of them, and a fold of these is tested: {counts.sum():,} are left; ask for a share of up to "
            f"{int(1000 * counts.sum() / len(names)) / 1000:g}, or use a generator that learned on fewer lesions"
        )
    drawn = there[drawn_of_classes(labels, counts, seed)]
    return rest[np.isin(pool.groups[rest].astype(str), drawn)]


def chosen_of_few(
    pool: Pool, generated: np.ndarray, folds: Sequence[dict[float, tuple[TrainingRows, np.ndarray]]], seed: int
) -> tuple[float, dict[float, float]]:
    """The smallest share that is within a standard error over lesions of the best one; and what each lost.

    folds: of all repeats. The loss is that of worth.py, a class-balanced cross-entropy at equal priors on held-out
    lesions of the site, but of probabilities at the temperature that suits each share best (Guo et al., arXiv
    1706.04599): a classifier of few lesions is too sure of itself, noise makes it less so, and that alone would pass
    for a gain. Temperatures change no call. The smallest share: Breiman et al., "Classification and Regression Trees",
    1984, section 3.4.3, where the plainest tree within a standard error is taken.
    """
    held = np.concatenate([fold[0.0][0].asked for fold in folds if fold[0.0][0].asked is not None])
    order = np.argsort(held, kind="stable")
    lesions, times = np.unique(held, return_counts=True)
    truth, size = pool.labels[lesions], len(pool.classes)
    weights = resampled_weights(truth, pool.groups[lesions], resamples=INNER_RESAMPLES, seed=seed)
    weights = np.concatenate([np.ones((1, len(lesions)), weights.dtype), weights]).astype(np.float64)
    of_class = np.eye(size)[:, np.unique(truth)][truth]  # [N, C]
    first = np.concatenate([[0], np.cumsum(times)[:-1]])
    lost = {}
    for share in SHARES:
        called = np.concatenate(
            [equal_priors(fold[share][1], fold[share][0], pool.labels, generated) for fold in folds]
        )[order]
        called /= called.sum(axis=1, keepdims=True)
        logits = np.where(called > 0, np.log(called.clip(LEAST_PROBABILITY)), -np.inf)  # 0: a class without images
        right, tempered = logits[np.arange(len(held)), np.repeat(truth, times)], list[np.ndarray]()
        for temperature in TEMPERATURES:
            losses = np.log(np.exp(logits / temperature).sum(axis=1)) - right / temperature
            losses = losses.clip(max=-np.log(LEAST_PROBABILITY))
            losses = (np.add.reduceat(losses, first) / times)[:, None] * of_class  # mean over the repeats
            tempered.append(((weights @ losses) / (weights @ of_class)).mean(axis=1))
        lost[share] = min(tempered, key=lambda one: one[0])
    best = min(SHARES, key=lambda share: lost[share][0])
    within = [share for share in SHARES if _within(lost[share] - lost[best])]
    return within[0], {share: float(one[0]) for share, one in lost.items()}


def _within(worse: np.ndarray) -> bool:
    """Whether a difference, value and resamples [1 + R], is at most its standard error."""
    return bool(worse[0] <= max(worse[1:].std(), 1e-6))


def _turned(pool: Pool, site: Part, turned: int) -> TrainingRows:
    """The site's images and these further views of them, which lie behind the generated ones."""
    fit, tested = site.fit, np.flatnonzero(pool.tested)
    views = len(pool.generated) + np.arange(turned)[:, None] * len(tested) + np.searchsorted(tested, fit)
    return TrainingRows(fit, views.ravel(), np.full(len(fit) * (1 + turned), 1 / (1 + turned)), fit, site.held)


# --- in words -------------------------------------------------------------------------------------------------------


def _in_words(lesions: Mapping[str, float], offered: Mapping[str, int], pool: Pool) -> str:
    """`a site with 634 lesions, 7 of them of the class dermatofibroma`: the rarest class that was generated."""
    rare = min((code for code in lesions if code in offered), key=lambda code: lesions[code], default=None)
    of_class = f", {lesions[rare]:,.0f} of them of the class {pool.classes.names[rare]}," if rare else ""
    return f"a site with {sum(lesions.values()):,.0f} lesions{of_class}"


def _verdict(
    said: Word, differences: Mapping[str, Mapping[str, Estimate]], copies: tuple[int, int], site: str
) -> Verdict:
    """The word in a sentence, and a warning of what got worse by the interval while the balanced accuracy rose."""
    of = {rule: found["balanced_accuracy"].signed for rule, found in differences.items()}
    lent = f" As many of the generator's own real images would bring {of['shared']}." if "shared" in of else ""
    turned = f", {of['augmented']} over flips and quarter turns" if "augmented" in of else ""
    melanoma = differences["less_real"].get("melanoma_auprc")
    changed = (
        f"{site} {'gains' if said == 'helps' else 'gets'} {of['less_real']} in balanced accuracy at equal priors from "
        "another's generator, without receiving one patient's image. That is over its own images alone; it is "
        f"{of['primary']} over these oversampled, {of['class_balanced']} over class weights{turned} (95 % intervals)."
        + (f" Melanoma AUPRC changes by {melanoma.signed}." if melanoma else "")
        + lent
    )
    reasons: dict[Word, str] = {
        "no use": f"{site} gains nothing from another's generator: cross-validation on its lesions gives the synthetic "
        f"images no weight.{lent}",
        "no verdict": f"{copies[0]:,} of {copies[1]:,} generated images are copies of real images that the generator "
        "must not have seen; take them out (copies.csv) and evaluate again.",
    }
    primary = differences["primary"]
    worse = [
        f"{text} by {one.signed}"
        for name, text in WATCHED.items()
        if (one := primary.get(name)) and (one.above if name in LOWER_IS_BETTER else one.below)
    ]
    rose = bool(worse) and said not in ("no use", "no verdict") and primary["balanced_accuracy"].value > 0
    warned = f"Balanced accuracy rose, yet this got worse: {'; '.join(worse)}."
    return Verdict(said, f"{said}: {reasons.get(said, changed)}", [warned] if rose else [])


def _mean(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Of each class over the sites."""
    codes = dict.fromkeys(code for one in counts for code in one)
    return {code: float(np.mean([one.get(code, 0) for one in counts])) for code in codes}
