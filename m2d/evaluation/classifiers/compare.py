"""Does the synthetic set help a classifier? Every arm trained, scored on the unseen lesions and compared.

The arms differ in training data alone. Arm c is the control that settles whether synthetic images help: it repeats
real images until every class has as many as in arm d, so that what d has more is new images, not other class counts.
Called for both classifiers (probe.py, finetune.py), of which it knows no more than the protocol.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from m2d.classes import ISIC7, ClassSet
from m2d.cluster.fan_out import fan_out, numbered, on_tasks
from m2d.cluster.nodes import cluster_total
from m2d.cluster.start import ray_cluster
from m2d.evaluation.images import ImageSet, Unanswerable, class_counts, lesion_counts
from m2d.files.atomic import cache_file
from m2d.files.progress import progress
from m2d.metrics.bootstrap import Estimate, resampled_seeds, resampled_weights
from m2d.metrics.scores import LOWER_IS_BETTER, weighted_scores

ARMS = {
    "a": "real",
    "b": "real, class weights",
    "c": "real, oversampled to the counts of d",
    "d": "real + synthetic",
    "e": "synthetic alone",
}
FEW_LESIONS = 10  # of a class in the test images: its interval is then a rough one
GPU_SHARE = 0.25  # of a task: small networks on small images leave most of a GPU idle
Settings = dict[str, str | int | float | bool | None]
Word = Literal["helps", "no difference shown", "hurts", "no verdict"]
_INTERVALS = (
    "Intervals cover the choice of test lesions and what a seed decides, not what other real training images or "
    "another synthetic set would change."
)
_WATCHED = {  # may fall while the balanced accuracy rises: the ranking within a class, and what a probability means
    "macro_auprc": "macro AUPRC",
    "melanoma_auprc": "melanoma AUPRC",
    "expected_calibration_error": "expected calibration error",
}
_CONTROLS = {"c": "real images oversampled to the same counts", "b": "class weights on real images alone"}


@dataclass(frozen=True)
class TrainingRows:
    """Images to train on, those of `real` before those of `generated`; a row that stands twice counts twice."""

    real: np.ndarray  # int64 [n], ascending rows of the real training images, with repeats in arm c
    generated: np.ndarray  # int64 [m], ascending rows of the generated images, each once at most
    weights: np.ndarray  # float64 [n + m], of the images in the loss; their mean is 1

    def labels(self, real: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """Classes of the images, int64 [n + m], from those of all real [N] and all generated ones [M]."""
        return np.concatenate([real[self.real], generated[self.generated]])


class Classifier(Protocol):
    """Trains on rows of its real and generated images and calls its test images. It is pickled."""

    @property
    def seeded(self) -> bool:
        """Whether the seed changes the answer."""

    @property
    def identity(self) -> str:
        """Everything that shapes the answer but the rows and the seed: settings, weights, images."""

    @property
    def wants_gpu(self) -> bool:
        """Whether a GPU would make it faster."""

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Train, then the class probabilities of the test images, float [N, K]."""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """How arms are trained and compared."""

    seeds: Sequence[int]  # a training of each arm for each
    resamples: int  # of the test lesions
    ratios: Sequence[float] = ()  # synthetic : real, tried as well
    seed: int = 0  # of the resamples
    kept: Path | None = None  # a folder for finished trainings, so that a killed run resumes
    on_ray: bool = False
    what: str = "classifiers"  # for the progress bar


@dataclass(frozen=True)
class ArmResult:
    """One arm: what it trained on and how it did, averaged over the seeds."""

    description: str
    images: dict[str, int]  # trained on, of each class, repeats counted
    trainings: int  # different ones among the seeds: 1 where no seed changes anything
    scores: dict[str, Estimate]  # see metrics.scores.weighted_scores


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
    arms: dict[str, ArmResult]  # by letter of ARMS
    minus_b: dict[str, Estimate]
    minus_c: dict[str, Estimate]
    ratios: list[RatioResult]
    verdict: Verdict
    left_out: dict[str, str]  # class code, or `arm e`: why
    notes: list[str]


def compare_arms(
    classifier: Classifier,
    name: str,
    settings: Settings,
    trials: Trials,
    *,
    images: tuple[ImageSet, ImageSet, ImageSet],
    notes: Sequence[str],
) -> DownstreamResult:
    """Train every arm with every seed, score the test images, and take the differences.

    images: train, test and generated, in the order of the classifier's rows. Scores are averaged over the seeds. A
    bootstrap sample draws whole test lesions within their class, and training seeds (see metrics.bootstrap), and is the
    same one for all arms, so that differences are paired and what makes a lesion hard cancels. Raises Unanswerable
    where fewer than two classes are both in train and test.
    """
    train, test, generated = images
    counted = partial(class_counts, classes=train.classes)
    scored = scored_classes(train, test)
    rows = np.flatnonzero(np.isin(test.labels, scored))
    truth, groups = test.labels[rows], test.groups[rows]
    lesions, left_out, notes = lesion_counts(truth, groups, train.classes), unscored(train, test), [*notes, _INTERVALS]
    few = [f"{code} {count}" for code, count in lesions.items() if count < FEW_LESIONS]
    if few:
        notes.append(f"Fewer than {FEW_LESIONS} test lesions, so a rough interval: {', '.join(few)}.")
    lacking = [code for code in train.counts if code not in generated.counts]
    if lacking:
        notes.append(f"No synthetic image of {' '.join(lacking)}: d adds none there, and e cannot recognise it.")
    letters = list(ARMS)
    if len(generated.counts) < 2:
        letters.remove("e")
        left_out["arm e"] = (
            f"the generated images are of {' '.join(generated.counts)} alone; a classifier needs two classes"
        )
    asked = [(arm, None) for arm in letters] + [(arm, ratio) for ratio in trials.ratios for arm in "cd"]
    arms = {
        (arm, ratio): [training_rows(arm, train.labels, generated.labels, ratio=ratio, seed=s) for s in trials.seeds]
        for arm, ratio in asked
    }
    jobs = {arm: [Job.of(classifier, *one) for one in zip(drawn, trials.seeds)] for arm, drawn in arms.items()}
    answers = run_jobs(classifier, [job for of_arm in jobs.values() for job in of_arm], trials)

    # Scores of each training: of the test set as it is (row 0), then of its resamples.
    drawn = resampled_weights(truth, groups, resamples=trials.resamples, seed=trials.seed)
    weights = np.concatenate([np.ones((1, len(rows)), dtype=drawn.dtype), drawn])
    scores = {
        digest: weighted_scores(answer[rows], truth, weights, train.classes) for digest, answer in answers.items()
    }
    picked = resampled_seeds(len(trials.seeds), resamples=trials.resamples, seed=trials.seed)

    def table(name: str, arm: str, ratio: float | None) -> np.ndarray:
        return np.stack([scores[job.digest][name] for job in jobs[arm, ratio]])

    def estimates(
        arm: str, ratio: float | None = None, minus: tuple[str, float | None] | None = None
    ) -> dict[str, Estimate]:
        """Each score of an arm, or of an arm less another."""
        found = {}
        for name in next(iter(scores.values())):
            values = table(name, arm, ratio) - (table(name, *minus) if minus else 0)
            resampled = values[picked, 1 + np.arange(len(picked))[:, None]].mean(axis=1)
            found[name] = Estimate.of(values[:, 0].mean(), resampled)
        return found

    minus_b, minus_c = (estimates("d", minus=(control, None)) for control in "bc")
    return DownstreamResult(
        classifier=name,
        settings=settings,
        seeds=list(trials.seeds),
        resamples=trials.resamples,
        train=train.counts,
        generated=generated.counts,
        test=counted(truth),
        test_lesions=lesions,
        arms={
            arm: ArmResult(
                description=ARMS[arm],
                images=counted(arms[arm, None][0].labels(train.labels, generated.labels)),
                trainings=len({job.digest for job in jobs[arm, None]}),
                scores=estimates(arm),
            )
            for arm in letters
        },
        minus_b=minus_b,
        minus_c=minus_c,
        ratios=[
            RatioResult(
                ratio=ratio,
                added=counted(generated.labels[arms["d", ratio][0].generated]),
                limited=limits(train.labels, generated.labels, ratio, train.classes),
                oversampled=estimates("c", ratio),
                synthetic=estimates("d", ratio),
                minus_b=estimates("d", ratio, minus=("b", None)),
                minus_c=estimates("d", ratio, minus=("c", ratio)),
            )
            for ratio in trials.ratios
        ],
        verdict=_no_verdict(generated) if generated.copies else verdict(minus_b, minus_c),
        left_out=left_out,
        notes=notes,
    )


# --- what an arm trains on, and which classes are scored ------------------------------------------------------------


def training_rows(
    arm: str, real: np.ndarray, generated: np.ndarray, *, ratio: float | None = None, seed: int
) -> TrainingRows:
    """The training images of an arm.

    arm: a key of ARMS. real, generated: int64 [N], [M], the classes of all images. ratio: synthetic images that a class
    gains for each of its real ones, as far as there are so many; None: all. seed: of what is drawn. A smaller ratio
    takes a part of what a larger one takes; the images of a class are repeated equally often, give or take one.
    """
    counts, there = _counts(real, generated)
    added = there if ratio is None else np.minimum(np.rint(ratio * counts).astype(np.int64), there)
    every, none = np.arange(len(real)), np.empty(0, dtype=np.int64)
    if arm == "b":
        return TrainingRows(every, none, len(real) / (np.count_nonzero(counts) * counts[real]))
    if arm == "c":
        every = np.sort(np.concatenate([every, _drawn(real, added, [seed, 0])]))
    of_generated = np.sort(_drawn(generated, added, [seed, 1])) if arm in "de" else none
    of_real = none if arm == "e" else every
    return TrainingRows(of_real, of_generated, np.ones(len(of_real) + len(of_generated)))


def limits(real: np.ndarray, generated: np.ndarray, ratio: float, classes: ClassSet = ISIC7) -> str | None:
    """Where a ratio asks for more generated images than there are, in words: `MEL 300 of 550, NV 0 of 4,000`."""
    counts, there = _counts(real, generated)
    wanted, codes = np.rint(ratio * counts).astype(np.int64), classes.codes
    return ", ".join(f"{codes[k]} {there[k]:,} of {wanted[k]:,}" for k in np.flatnonzero(there < wanted)) or None


def scored_classes(train: ImageSet, test: ImageSet) -> list[int]:
    """Those in both, ascending. Raises Unanswerable for fewer than two."""
    scored = np.intersect1d(train.labels, test.labels).tolist()
    if len(scored) < 2:
        raise Unanswerable(
            "training and test images share too few classes "
            f"({' '.join(train.classes.codes[k] for k in scored) or 'none'}); a classifier needs two at least, so "
            "give images of more classes"
        )
    return scored


def unscored(train: ImageSet, test: ImageSet) -> dict[str, str]:
    """Class code to the reason why it is not scored, of the classes that only one side has."""
    trained, tested = train.counts, test.counts
    return {
        code: "no test image, so nothing to score; it is trained on"
        if code in trained
        else "no real training image; its test images are left out"
        for code in train.classes.codes
        if (code in trained) != (code in tested)
    }


def _counts(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, int64 of one length."""
    length = 1 + max(int(labels.max(initial=0)) for labels in (real, generated))
    return np.bincount(real, minlength=length), np.bincount(generated, minlength=length)


def _drawn(labels: np.ndarray, counts: np.ndarray, seed: list[int]) -> np.ndarray:
    """counts[k] rows of each class k, in shuffled passes over its images; none again before all were drawn."""
    parts = [np.empty(0, dtype=np.int64)]
    for label in np.flatnonzero(counts):
        rows, generator = np.flatnonzero(labels == label), np.random.default_rng([*seed, int(label)])
        passes = [generator.permutation(rows) for _ in range(-(-counts[label] // len(rows)))]
        parts.append(np.concatenate(passes)[: counts[label]])
    return np.concatenate(parts)


# --- the verdict ----------------------------------------------------------------------------------------------------


def verdict(minus_b: Mapping[str, Estimate], minus_c: Mapping[str, Estimate]) -> Verdict:
    """Whether synthetic images help this classifier, by the balanced accuracy of d (real + synthetic).

    hurts: the interval of d - c lies below 0. helps: it lies above 0, and the value of d - b is at least 0: what class
    weights give for nothing is no merit of the images. Otherwise no difference is shown. A warning for each control
    that d beats in balanced accuracy while its ranking or calibration got worse by the interval.
    """
    against_c, against_b = minus_c["balanced_accuracy"], minus_b["balanced_accuracy"]
    word: Word = "hurts" if against_c.below else "no difference shown"
    reason = ""
    if against_c.above and against_b.value >= 0:
        word = "helps"
    elif against_c.above:
        reason = ", so it beats oversampling but not class weights, which cost nothing"
    sentence = (
        f"{word}: adding the synthetic images changes balanced accuracy on unseen lesions by {against_c.signed} "
        f"against {_CONTROLS['c']}, and by {against_b.signed} against {_CONTROLS['b']}{reason} (95 % intervals)."
    )
    warnings = []
    for control, minus in (("c", minus_c), ("b", minus_b)):
        worse = [
            f"{text} by {minus[name].signed}"
            for name, text in _WATCHED.items()
            if name in minus and (minus[name].above if name in LOWER_IS_BETTER else minus[name].below)
        ]
        if worse and minus["balanced_accuracy"].value > 0:
            beaten = _CONTROLS[control]
            warnings.append(f"Balanced accuracy rose against {beaten}, yet this got worse: {'; '.join(worse)}.")
    return Verdict(word, sentence, warnings)


def _no_verdict(generated: ImageSet) -> Verdict:
    sentence = (
        f"no verdict: {len(generated.copies):,} of {len(generated):,} generated images are copies of unseen real "
        "images, which would help any classifier; take them out (copies.csv) and evaluate again."
    )
    return Verdict("no verdict", sentence, [])


# --- the trainings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training. Jobs of one digest give one answer."""

    rows: TrainingRows
    seed: int
    digest: str

    @classmethod
    def of(cls, classifier: Classifier, rows: TrainingRows, seed: int) -> "Job":
        """The job, with its digest: hex, stable between runs and machines."""
        digest = hashlib.sha256(f"downstream 1\n{classifier.identity}\n".encode())
        for values, kind in ((rows.real, "<i8"), (rows.generated, "<i8"), (rows.weights, "<f8")):
            digest.update(f"{len(values)}\n".encode())
            digest.update(np.ascontiguousarray(values, dtype=kind).tobytes())
        digest.update(str(seed if classifier.seeded else 0).encode())
        return cls(rows, seed, digest.hexdigest())


def run_jobs(classifier: Classifier, jobs: Sequence[Job], trials: Trials) -> dict[str, np.ndarray]:
    """Digest -> probabilities; of each digest once, and of none that `trials.kept` has from an earlier run.

    One after the other in this process, or each as a task on Ray. Raises the M2DError that a task raised.
    """
    single = {job.digest: job for job in jobs}
    done = {digest: answer for digest in single if (answer := _kept(trials.kept, digest)) is not None}
    left = [job for digest, job in single.items() if digest not in done]
    with progress(trials.what, len(single), unit="trainings") as shown:
        shown.show(len(done), len(single))
        here = ((job, classifier.predict(job.rows, job.seed)) for job in left)
        for job, answer in _on_ray(classifier, left) if trials.on_ray and left else here:
            if trials.kept is not None:
                with cache_file(trials.kept / f"{job.digest}.npy") as partial, partial.open("wb") as stream:
                    np.save(stream, answer, allow_pickle=False)
            done[job.digest] = answer
            shown.show(len(done), len(single))
    return done


def _kept(folder: Path | None, digest: str) -> np.ndarray | None:
    try:
        return None if folder is None else np.load(folder / f"{digest}.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or broken; the job is done again
        return None


def _on_ray(classifier: Classifier, jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
    """A task reserves one CPU, so it runs on the smallest cluster; where the classifier gains by a GPU, a share of one.

    The classifier, and with it the images, goes to the object store once.
    """
    with ray_cluster():
        share = GPU_SHARE if classifier.wants_gpu and cluster_total("GPU") else 0.0
        tasks = on_tasks((classifier, jobs), _predict, cpus=1, gpus=share)
        for row in fan_out(numbered(len(jobs)), tasks):
            answer = np.frombuffer(row["answer"], row["dtype"]).reshape(row["shape"])
            yield jobs[row["job"]], answer.copy()


def _predict(held: tuple[Classifier, list[Job]], block: pa.Table) -> pa.Table:
    classifier, jobs = held
    number = block["job"][0].as_py()
    answer = classifier.predict(jobs[number].rows, jobs[number].seed)
    return pa.table(
        {"job": [number], "answer": [answer.tobytes()], "dtype": [answer.dtype.str], "shape": [list(answer.shape)]}
    )
