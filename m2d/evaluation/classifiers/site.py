"""What a site with few lesions gains from images of a generator that learned on the lesions of others.

Three parts without a common lesion: those that the generator learned on, those of the site, those that are tested. All
classifiers are judged by the rule of worth.py, with a choice of the share that is made for few lesions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m2d.evaluation.classifiers.compare import Classifier, TrainingRows, Trials, drawn_of_classes
from m2d.evaluation.classifiers.worth import (
    LEAST_PROBABILITY,
    SHARES,
    Folds,
    Judged,
    JudgedResult,
    Offer,
    Part,
    Pool,
    Rules,
    Verdict,
    Word,
    class_mean,
    held_out,
    partition,
    real_arm,
    share_of_gain,
    word,
)
from m2d.evaluation.images import Unanswerable, class_counts, lesion_counts
from m2d.metrics.bootstrap import Estimate

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
DIFFERENCES: Rules = {  # the first three decide
    "primary": ("equal priors", "d", "c"),
    "less_real": ("equal priors", "d", "a"),
    "class_balanced": ("class-balanced loss", "d", "b"),
    "augmented": ("equal priors", "d", "t"),
    "shared": ("equal priors", "f", "a"),
    "not_shared": ("equal priors", "d", "f"),
}


@dataclass(frozen=True)
class SiteResult(JudgedResult):
    """All of it for one classifier and one size of the site, each fold of the lesions that the generator has not seen
    with a site of its own. Counts of the site are means over its draws. Differences: by key of DIFFERENCES.
    """

    share: float  # of all lesions, those that the generator has seen too
    lesions: dict[str, float]  # of the site, of each class
    images: dict[str, float]
    offered: dict[str, int]  # synthetic images
    offered_real: dict[str, int]  # of the generator's own real images, at most as many; empty: it is not known which
    shares_of_real: list[float]  # of a class's weight, on the generator's own real images, for each site
    of_shared: Estimate | None  # d - a over f - a; None: f - a may be 0
    verdict: Verdict
    notes: list[str]


def measure_site(
    classifier: Classifier, pool: Pool, trials: Trials, *, share: float, folds: int, notes: Sequence[str] = ()
) -> SiteResult:
    """Train a classifier for each site, score what is tested, and say what the synthetic images bring.

    pool: rows that are not `tested` are real images that the generator learned on; the others it has not seen, and each
    of their folds is tested once, by a site whose lesions are drawn from the other folds. classifier: its train and its
    test set are the pool's images, its generated set the pool's `made`. share: of all lesions of the pool, class by
    class. Raises Unanswerable where the site cannot have so many lesions, or fewer than two classes can be scored.
    """
    tested, own, size = np.flatnonzero(pool.tested), np.flatnonzero(~pool.tested), len(pool.classes)
    counts = np.minimum(*(np.bincount(one, minlength=size) for one in (pool.generated, pool.labels[own])))
    sites, every = list[Part](), np.arange(len(pool.generated))
    for seed in trials.seeds:
        lent = np.sort(own[drawn_of_classes(pool.labels[own], counts, [seed, 3])])
        for number, held in enumerate(partition(pool, tested, folds, seed)):
            fit = site_rows(pool, np.setdiff1d(tested, held), share, [seed, number])
            offers = {"d": Offer(fit, fit[:0], every)} | ({"f": Offer(fit, lent, every[:0])} if len(lent) else {})
            site = Part(seed, held, offers)
            site.arms = {letter: real_arm(pool, site, letter, fit) for letter in "abc"}
            site.arms |= {"t": _turned(pool, site)} if pool.turned else {}
            sites.append(site)
    too_few = f"the lesions are too few, or share too few classes, for {folds} folds and a site"
    judged = Judged.of(classifier, pool, sites, trials, chosen_of_few, partitions=INNER_PARTITIONS, too_few=too_few)
    arms = {
        f"equal priors: {letter}": judged.scores(letter) for letter in ARMS if letter in sites[0].arms and letter != "b"
    }
    arms["class-balanced loss: b"] = judged.scores("b", adjusted=False)
    arms["class-balanced loss: d"] = judged.scores("balanced", adjusted=False)
    told, drawn = judged.told(trials, folds, arms, DIFFERENCES)
    lesions = _mean([lesion_counts(pool.labels[one.fit], pool.groups[one.fit], pool.classes) for one in sites])
    offered = class_counts(pool.generated, pool.classes)
    said = word([drawn[rule] for rule in ("primary", "less_real", "class_balanced")], judged.shares("d"))
    return SiteResult(
        **told,
        share=share,
        lesions=lesions,
        images=_mean([class_counts(pool.labels[one.fit], pool.classes) for one in sites]),
        offered=offered,
        offered_real={pool.classes.codes[k]: int(n) for k, n in enumerate(counts) if n},
        shares_of_real=judged.shares("f") if "f" in sites[0].offers else [],
        of_shared=share_of_gain(drawn["less_real"], drawn.get("shared")),
        verdict=_verdict(
            "no verdict" if pool.copies else said, told["differences"], pool, _in_words(lesions, offered, pool)
        ),
        notes=[*notes, *judged.notes("The site's lesions")],
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


def chosen_of_few(pool: Pool, folds: Folds, seed: int) -> tuple[float, dict[float, float]]:
    """The smallest share that is within a standard error over lesions of the best one; and what each lost.

    folds: of all repeats. The loss is that of worth.py, a class-balanced cross-entropy at equal priors on held-out
    lesions of the site, but of probabilities at the temperature that suits each share best (Guo et al., arXiv
    1706.04599): a classifier of few lesions is too sure of itself, noise makes it less so, and that alone would pass
    for a gain. Temperatures change no call. The smallest share: Breiman et al., "Classification and Regression Trees",
    1984, section 3.4.3, where the plainest tree within a standard error is taken.
    """
    held, calls = held_out(pool, folds)
    rows, place, times = np.unique(held, return_inverse=True, return_counts=True)
    mean, truth, lost = class_mean(pool, rows, seed), pool.labels[held], {}
    for share, called in calls.items():
        called /= called.sum(axis=1, keepdims=True)
        logits = np.where(called > 0, np.log(called.clip(LEAST_PROBABILITY)), -np.inf)  # 0: a class without images
        right, tempered = logits[np.arange(len(held)), truth], list[np.ndarray]()
        for temperature in TEMPERATURES:
            losses = np.log(np.exp(logits / temperature).sum(axis=1)) - right / temperature
            losses = losses.clip(max=-np.log(LEAST_PROBABILITY))
            tempered.append(mean(np.bincount(place, losses) / times))  # over the repeats, then over the rows
        lost[share] = min(tempered, key=lambda one: one[0])
    best = min(SHARES, key=lambda share: lost[share][0])
    worse = {share: lost[share] - lost[best] for share in SHARES}
    within = [share for share, one in worse.items() if one[0] <= max(one[1:].std(), 1e-6)]
    return within[0], {share: float(one[0]) for share, one in lost.items()}


def _turned(pool: Pool, site: Part) -> TrainingRows:
    """The site's images and their further views, all alike."""
    fit, tested = site.fit, np.flatnonzero(pool.tested)
    views = len(pool.generated) + np.arange(pool.turned)[:, None] * len(tested) + np.searchsorted(tested, fit)
    weights = np.full(len(fit) * (1 + pool.turned), 1 / (1 + pool.turned))
    return TrainingRows(fit, views.ravel(), weights, fit, site.held)


# --- in words -------------------------------------------------------------------------------------------------------


def _in_words(lesions: Mapping[str, float], offered: Mapping[str, int], pool: Pool) -> str:
    """`a site with 634 lesions, 7 of them of the class dermatofibroma`: the rarest class that was generated."""
    rare = min((code for code in lesions if code in offered), key=lambda code: lesions[code], default=None)
    of_class = f", {lesions[rare]:,.0f} of them of the class {pool.classes.names[rare]}," if rare else ""
    return f"a site with {sum(lesions.values()):,.0f} lesions{of_class}"


def _verdict(said: Word, differences: Mapping[str, Mapping[str, Estimate]], pool: Pool, site: str) -> Verdict:
    """The word in a sentence."""
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
        "no verdict": f"{pool.copies:,} of {len(pool.generated):,} generated images are copies of real images that the "
        "generator must not have seen; take them out (copies.csv) and evaluate again.",
    }
    return Verdict.of(said, reasons.get(said, changed), differences["primary"])


def _mean(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Of each class over the sites."""
    codes = dict.fromkeys(code for one in counts for code in one)
    return {code: float(np.mean([one.get(code, 0) for one in counts])) for code in codes}
