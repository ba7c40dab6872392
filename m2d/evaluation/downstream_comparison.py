"""Every arm trained, scored on the unseen lesions and compared, for a classifier and a way of running that are given.

Called for both classifiers. It knows neither of them, and no Ray.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2d.classes import CLASSES
from m2d.errors import ConfigError
from m2d.evaluation.arms import ARMS, TrainingRows, check_sides, class_counts, limits, training_rows, unscored
from m2d.evaluation.bootstrap import interval, resampled_seeds, resampled_weights
from m2d.evaluation.downstream_jobs import Classifier, Job, Runner
from m2d.evaluation.downstream_result import ArmResult, DownstreamResult, Estimate, RatioResult, Settings, verdict
from m2d.evaluation.downstream_scores import weighted_scores
from m2d.evaluation.images import ImageSet

FEW_LESIONS = 10  # of a class in the test images: its interval is then a rough one
_INTERVALS = (
    "Intervals cover the choice of test lesions and what a seed decides, not what other real training images or "
    "another synthetic set would change."
)


def compare_arms(
    classifier: Classifier,
    name: str,
    settings: Settings,
    *,
    images: tuple[ImageSet, ImageSet, ImageSet],
    seeds: Sequence[int],
    resamples: int,
    ratios: Sequence[float],
    seed: int,
    run: Runner,
    notes: Sequence[str],
) -> DownstreamResult:
    """Train every arm with every seed, score the test images, and take the differences.

    images: train, test and generated, in the order of the classifier's rows. Scores are averaged over the seeds. A
    bootstrap sample draws whole test lesions within their class, and training seeds (bootstrap.resampled_weights,
    resampled_seeds), and is the same one for all arms, so that differences are paired and what makes a lesion hard
    cancels. The intervals hold for these real training images and these synthetic ones: other draws of either are not
    in them. Raises DataError (arms.check_sides) and ConfigError for seeds or ratios that cannot be.
    """
    _check_settings(seeds, ratios, resamples)
    train, test, generated = images
    scored = check_sides(train, test, generated)
    arms: dict[str, list[TrainingRows]] = {}
    for arm, ratio in [*((letter, None) for letter in ARMS), *((letter, r) for r in ratios for letter in "cd")]:
        drawn = [training_rows(arm, train.labels, generated.labels, ratio=ratio, seed=one) for one in seeds]
        arms[_key(arm, ratio)] = drawn
    left_out = unscored(train, test)
    reason = _untrainable(generated)
    if reason:
        del arms["e"]
        left_out["arm e"] = reason
    comparison = _Comparison.of(classifier, arms, seeds, test, scored, resamples=resamples, seed=seed, run=run)
    minus = {control: comparison.estimates("d", control) for control in "bc"}
    lesions = {CLASSES[k]: len(set(test.groups[test.labels == k].tolist())) for k in scored}
    return DownstreamResult(
        classifier=name,
        settings=settings,
        seeds=list(seeds),
        resamples=resamples,
        train=class_counts(train.labels),
        generated=class_counts(generated.labels),
        test=class_counts(test.labels[np.isin(test.labels, scored)]),
        test_lesions=lesions,
        arms={
            arm: ArmResult(
                ARMS[arm],
                class_counts(arms[arm][0].labels(train.labels, generated.labels)),
                comparison.trainings[arm],
                comparison.estimates(arm),
            )
            for arm in ARMS
            if arm in arms
        },
        minus_b=minus["b"],
        minus_c=minus["c"],
        ratios=[
            RatioResult(
                ratio=ratio,
                added=class_counts(generated.labels[arms[_key("d", ratio)][0].generated]),
                limited=limits(train.labels, generated.labels, ratio),
                oversampled=comparison.estimates(_key("c", ratio)),
                synthetic=comparison.estimates(_key("d", ratio)),
                minus_b=comparison.estimates(_key("d", ratio), "b"),
                minus_c=comparison.estimates(_key("d", ratio), _key("c", ratio)),
            )
            for ratio in ratios
        ],
        verdict=verdict(minus["b"], minus["c"]),
        left_out=left_out,
        notes=[*notes, _INTERVALS, *_few(lesions), *_lacking(train, generated)],
    )


@dataclass(frozen=True)
class _Comparison:
    """Scores of each arm for each seed: of the test set as it is (row 0), then of its resamples."""

    tables: dict[str, dict[str, np.ndarray]]  # arm, score: float64 [S, 1 + R]
    trainings: dict[str, int]
    picked: np.ndarray  # int64 [R, draws]: the seeds that a resample averages over

    @classmethod
    def of(
        cls,
        classifier: Classifier,
        arms: dict[str, list[TrainingRows]],
        seeds: Sequence[int],
        test: ImageSet,
        scored: Sequence[int],
        *,
        resamples: int,
        seed: int,
        run: Runner,
    ) -> "_Comparison":
        jobs = {arm: [Job.of(classifier, rows, one) for rows, one in zip(drawn, seeds)] for arm, drawn in arms.items()}
        answers = run(classifier, [job for of_arm in jobs.values() for job in of_arm])
        of_job = {job.digest: answer for job, answer in zip((job for one in jobs.values() for job in one), answers)}
        rows = np.flatnonzero(np.isin(test.labels, scored))
        truth = test.labels[rows]
        drawn = resampled_weights(truth, test.groups[rows], resamples=resamples, seed=seed)
        weights = np.concatenate([np.ones((1, len(rows)), dtype=drawn.dtype), drawn])
        scores = {digest: weighted_scores(answer[rows], truth, weights) for digest, answer in of_job.items()}
        tables = {
            arm: {name: np.stack([scores[job.digest][name] for job in of_arm]) for name in scores[of_arm[0].digest]}
            for arm, of_arm in jobs.items()
        }
        trainings = {arm: len({job.digest for job in of_arm}) for arm, of_arm in jobs.items()}
        return cls(tables, trainings, resampled_seeds(len(seeds), resamples=resamples, seed=seed))

    def estimates(self, arm: str, minus: str | None = None) -> dict[str, Estimate]:
        """Each score of an arm, or of an arm less another, with its interval."""
        estimates = {}
        for name, table in self.tables[arm].items():
            values = table if minus is None else table - self.tables[minus][name]
            resampled = values[self.picked, 1 + np.arange(len(self.picked))[:, None]].mean(axis=1)
            estimates[name] = Estimate(float(values[:, 0].mean()), *interval(resampled))
        return estimates


def _check_settings(seeds: Sequence[int], ratios: Sequence[float], resamples: int) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds are {list(seeds)}; give one at least, none twice, none below 0")
    if len(set(ratios)) < len(ratios) or not all(0 < ratio < float("inf") for ratio in ratios):
        raise ConfigError(f"ratios are {list(ratios)}; each must be a number above 0, and none may stand twice")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; it must be at least 1")


def _key(arm: str, ratio: float | None) -> str:
    return arm if ratio is None else f"{arm} at {ratio!r}"


def _untrainable(generated: ImageSet) -> str | None:
    """Why nothing can be trained on the generated images alone."""
    classes = list(class_counts(generated.labels))
    if len(classes) >= 2:
        return None
    return f"the generated images are of {' '.join(classes) or 'no class'} alone; a classifier needs two classes"


def _few(lesions: dict[str, int]) -> list[str]:
    few = [f"{code} {count}" for code, count in lesions.items() if count < FEW_LESIONS]
    return [f"Fewer than {FEW_LESIONS} test lesions, so a rough interval: {', '.join(few)}."] if few else []


def _lacking(train: ImageSet, generated: ImageSet) -> list[str]:
    lacking = [CLASSES[k] for k in sorted(set(train.labels.tolist()) - set(generated.labels.tolist()))]
    if not lacking:
        return []
    return [f"No synthetic image of {' '.join(lacking)}: d adds none there, and e cannot recognise it."]
