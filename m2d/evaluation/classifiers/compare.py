"""Does the synthetic set help a classifier? Every arm trained, scored on the unseen lesions and compared.

The arms differ in training data alone. Arm c is the control that settles whether synthetic images help: it repeats
real images until every class has as many as in arm d, so that what d has more is new images, not other class counts.
Called for both classifiers (probe.py, finetune.py), of which it knows no more than the protocol.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Self

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
from m2d.metrics.scores import weighted_scores

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
Scored = dict[str, np.ndarray]  # of one training: a score to [1 + R], of the test set and of its resamples
_INTERVALS = (
    "Intervals cover the choice of test lesions and what a seed decides, not what other real training images or "
    "another synthetic set would change."
)


@dataclass(frozen=True)
class TrainingRows:
    """Images to train on, those of `real` before those of `generated`; a row that stands twice counts twice."""

    # int64 [n], rows of the real training images, with repeats in arm c; any beyond `reference` come behind these
    real: np.ndarray
    generated: np.ndarray  # int64 [m], rows of the generated images, each once at most
    weights: np.ndarray  # float64 [n + m], of the images in the loss
    reference: np.ndarray | None = None  # int64, real rows that features are standardised by; None: all
    asked: np.ndarray | None = None  # int64, rows of the test images to call; None: all

    def labels(self, real: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """Classes of the images, int64 [n + m], from those of all real [N] and all generated ones [M]."""
        return np.concatenate([real[self.real], generated[self.generated]])

    @property
    def own(self) -> int:
        """How many images come before those that are offered: the generated ones, and real ones beyond `reference`."""
        return len(self.real) if self.reference is None else int(np.isin(self.real, self.reference).sum())

    @property
    def share(self) -> float:
        """Of all weight, on the images that are offered."""
        return float(self.weights[self.own :].sum() / self.weights.sum())


class Classifier(Protocol):
    """Trains on rows of its real and generated images and calls its test images. It is pickled."""

    @property
    def name(self) -> str:
        """As reports call it."""

    @property
    def fixed_share(self) -> float | None:
        """Of a class's weight on synthetic images, where trainings take too long to choose it; None: it is chosen."""

    @property
    def seeded(self) -> bool:
        """Whether it learns from batches that are drawn: the seed counts, and how often a class is met."""

    def identity_of(self, rows: TrainingRows) -> str:
        """Everything that shapes the answer to these rows but them and the seed: settings, weights, images."""

    @property
    def wants_gpu(self) -> bool:
        """Whether a GPU would make it faster."""

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Train, then the class probabilities of the test images that are asked for, float [N, K]."""


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
    left_out: dict[str, str]  # class code, or `arm e`: why
    notes: list[str]


def compare_arms(
    classifier: Classifier,
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

    resamples = Resamples.of(truth, groups, trials, train.classes)
    of_job = {digest: resamples.scores(answer[rows]) for digest, answer in answers.items()}
    scores = {arm: [of_job[job.digest] for job in of_arm] for arm, of_arm in jobs.items()}
    estimates = resamples.estimates
    d, (b, c) = scores["d", None], (scores[control, None] for control in "bc")
    return DownstreamResult(
        classifier=classifier.name,
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
                scores=estimates(scores[arm, None]),
            )
            for arm in letters
        },
        minus_b=estimates(d, b),
        minus_c=estimates(d, c),
        ratios=[
            RatioResult(
                ratio=ratio,
                added=counted(generated.labels[arms["d", ratio][0].generated]),
                limited=limits(train.labels, generated.labels, ratio, train.classes),
                oversampled=estimates(scores["c", ratio]),
                synthetic=estimates(scores["d", ratio]),
                minus_b=estimates(scores["d", ratio], b),
                minus_c=estimates(scores["d", ratio], scores["c", ratio]),
            )
            for ratio in trials.ratios
        ],
        left_out=left_out,
        notes=notes,
    )


@dataclass(frozen=True)
class Resamples:
    """Scores of trainings on one test set as it is and on its resamples, and what they estimate."""

    truth: np.ndarray  # int64 [N]
    weights: np.ndarray  # int32 [1 + R, N]: ones, then those of the bootstrap
    picked: np.ndarray  # int64 [R, ...], the seeds that a resample averages over
    classes: ClassSet

    @classmethod
    def of(cls, truth: np.ndarray, groups: np.ndarray, trials: Trials, classes: ClassSet) -> Self:
        """truth [N], groups [N]: of the scored test images; both kinds of draws are the trials'."""
        weights = resampled_weights(truth, groups, resamples=trials.resamples, seed=trials.seed)
        picked = resampled_seeds(len(trials.seeds), resamples=trials.resamples, seed=trials.seed)
        return cls(truth, weights, picked, classes)

    def scores(self, probabilities: np.ndarray, decided: np.ndarray | None = None) -> Scored:
        """Of one training, name to [1 + R]; see metrics.scores.weighted_scores."""
        return weighted_scores(probabilities, self.truth, self.weights, self.classes, decided)

    def estimates(self, seeds: Sequence[Scored], minus: Sequence[Scored] | None = None) -> dict[str, Estimate]:
        """Each score averaged over the trainings of all seeds, or its difference to another's of the same seeds."""
        return {name: Estimate.of(self.means(seeds, name, minus)) for name in seeds[0]}

    def means(self, seeds: Sequence[Scored], name: str, minus: Sequence[Scored] | None = None) -> np.ndarray:
        """A score averaged over the seeds, then over those of each resample: float64 [1 + R]."""
        values = np.stack([one[name] for one in seeds])
        if minus is not None:
            values = values - np.stack([one[name] for one in minus])
        resampled = values[self.picked, 1 + np.arange(len(self.picked))[:, None]].mean(axis=1)
        return np.concatenate([[values[:, 0].mean()], resampled])


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
        repeated = np.where(counts > 0, added, 0)  # a site may lack a class that was generated
        every = np.sort(np.concatenate([every, drawn_of_classes(real, repeated, [seed, 0])]))
    of_generated = np.sort(drawn_of_classes(generated, added, [seed, 1])) if arm in "de" else none
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


def drawn_of_classes(labels: np.ndarray, counts: np.ndarray, seed: list[int]) -> np.ndarray:
    """counts[k] rows of each class k, in shuffled passes over its images; none again before all were drawn."""
    parts = [np.empty(0, dtype=np.int64)]
    for label in np.flatnonzero(counts):
        rows, generator = np.flatnonzero(labels == label), np.random.default_rng([*seed, int(label)])
        passes = [generator.permutation(rows) for _ in range(-(-counts[label] // len(rows)))]
        parts.append(np.concatenate(passes)[: counts[label]])
    return np.concatenate(parts)


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
        digest = hashlib.sha256(f"downstream 1\n{classifier.identity_of(rows)}\n".encode())
        parts = [(rows.real, "<i8"), (rows.generated, "<i8"), (rows.weights, "<f8")]
        parts += [(one, "<i8") for one in (rows.reference, rows.asked) if one is not None]
        for values, kind in parts:
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
            yield jobs[row["job"]], np.load(io.BytesIO(row["answer"]), allow_pickle=False)


def _predict(held: tuple[Classifier, list[Job]], block: pa.Table) -> pa.Table:
    classifier, jobs = held
    number = block["job"][0].as_py()
    np.save(answer := io.BytesIO(), classifier.predict(jobs[number].rows, jobs[number].seed), allow_pickle=False)
    return pa.table({"job": [number], "answer": [answer.getvalue()]})
