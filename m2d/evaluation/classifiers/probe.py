"""Logistic regression on an extractor's features: classifier 1 of the comparison, and `python jobs/evaluate.py probe`.

The probe asks whether weights are good features for dermoscopy: fitted on real images, tested on unseen lesions.
"""

import csv
import hashlib
import io
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Column, Table

from m2d import __version__
from m2d.classes import CLASSES, NUM_CLASSES
from m2d.data.catalog import read_catalog
from m2d.errors import DataError
from m2d.evaluation.classifiers.arms import TrainingRows
from m2d.evaluation.classifiers.compare import FEW_LESIONS, DownstreamResult, Settings, Trials, compare_arms
from m2d.evaluation.features import ClsFeatures, ImageFile, cls_features
from m2d.evaluation.images import FeatureSet, Listed, catalog_of, check_apart, class_folder, listed, taken
from m2d.evaluation.settings import ProbeConfig
from m2d.files.paths import result_path
from m2d.generation.generator import pick_device
from m2d.metrics.bootstrap import Estimate, resampled_confusions
from m2d.metrics.linear_probe import LinearProbe, choose_c
from m2d.metrics.scores import confusion_matrix, scores
from m2d.models.extractors import extractor_key
from m2d.plots.charts import confusion_matrix_picture

C_WITHOUT_CHOICE = 1e-3  # where the training lesions are too few to choose by
SHOWN_UNREADABLE = 5
# Other people's images and splits: a yardstick, no check.
REFERENCES = (
    "EfficientNet-Lite0 (ImageNet): balanced accuracy 0.58 on unseen lesions of HAM10000 at 200 x 150 px, classes "
    "weighted alike (M2D's issue 3)",
    "PanDerm-Large: balanced accuracy 0.797, accuracy 0.924, authors' linear probe on their own HAM_clean split of "
    "8,207/575/1,232 images (SiyuanYan1/PanDerm, HAM_clean_evaluation.ipynb)",
)


def measure_downstream(
    *, train: FeatureSet, test: FeatureSet, generated: FeatureSet, c: float | None, trials: Trials
) -> DownstreamResult:
    """The comparison for classifier 1; see compare.compare_arms.

    train, test: real images, no lesion in both; generated: the images to judge. This classifier has no chance of its
    own, so seeds change only what an arm draws. c: inverse strength of the L2 penalty, the same for all arms; None:
    chosen once by lesion-grouped cross-validation on the real training images.
    Raises DataError for image sets that cannot be compared (see arms.check_sides), or lesions too few to choose c.
    """
    picked, tried = (c, {}) if c is not None else chosen_c(train, seed=trials.seed)
    settings: Settings = {"extractor": train.extractor, "c": picked}
    settings |= {f"cross-validated balanced accuracy at c = {one:g}": score for one, score in tried.items()}
    return compare_arms(
        ProbeClassifier(train, test, generated, picked),
        "logistic regression on extractor features",
        settings,
        trials,
        images=(train.images, test.images, generated.images),
        notes=[
            "Features are standardised by the real training images, and c is the same, in every arm.",
            "This classifier has no chance of its own: a seed changes what arm c repeats, and in the ratio sweep which "
            "synthetic images are taken.",
        ],
    )


@dataclass(frozen=True)
class ProbeClassifier:
    """Logistic regression; every arm is standardised by the real training images. See compare.Classifier."""

    train: FeatureSet
    test: FeatureSet
    generated: FeatureSet
    c: float
    seeded = False
    wants_gpu = False

    @property
    def identity(self) -> str:
        """Hex digest of c, features and labels."""
        digest = hashlib.sha256(f"probe {self.c!r}\n".encode())
        for part in (self.train, self.test, self.generated):
            digest.update(f"{part.extractor} {part.cls.shape}\n".encode())
            digest.update(np.ascontiguousarray(part.cls).data)
            digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Class probabilities of the test images. An image that stands twice is one of twice the weight: same loss."""
        real = np.unique(rows.real)
        weights = np.concatenate(
            [np.bincount(rows.real, rows.weights[: len(rows.real)])[real], rows.weights[len(rows.real) :]]
        )
        probe = LinearProbe.fit(
            np.concatenate([self.train.cls[real], self.generated.cls[rows.generated]]),
            np.concatenate([self.train.labels[real], self.generated.labels[rows.generated]]),
            c=self.c,
            weights=weights,
            standardised_by=self.train.cls,
        )
        return probe.probabilities(self.test.cls, NUM_CLASSES)


def chosen_c(train: FeatureSet, *, seed: int) -> tuple[float, dict[float, float]]:
    """The c that lesion-grouped cross-validation on these images prefers, and the score of each that was tried.

    Raises DataError where the lesions are too few for it.
    """
    best, tried = choose_c(train.cls, train.labels, train.groups, num_classes=NUM_CLASSES, seed=seed)
    if best is None:
        raise DataError(
            f"downstream: {len(train)} training images of {len(set(train.groups.tolist()))} lesions are too few to "
            "choose c by cross-validation; give more images, or a value of c"
        )
    return best, tried


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


def probe(config: ProbeConfig) -> ProbeResult:
    """Extract, fit, test, print, and write the result into the output folder.

    Raises ConfigError, DataError or CheckpointError, in one line, for what a user can fix.
    """
    began = time.monotonic()
    device = pick_device(config.device)
    config = config.in_this_place()
    key = extractor_key(config.feature_extractor)
    folder = Path(result_path("output", config.output or f"probe/{key}")).expanduser()
    train, test = _sides(config)
    print(
        f"linear probe of {key} on {device}: fits on {len(train.paths):,} images ({train.source}), tests on "
        f"{len(test.paths):,} ({test.source})",
        file=sys.stderr,
        flush=True,
    )
    features = cls_features(
        [ImageFile(side.root, path, sha) for side in (train, test) for path, sha in zip(side.paths, side.sha256)],
        config.feature_extractor,
        key=key,
        cache_dir=config.cache_dir,
        device=device,
        batch_size=config.batch_size or (8 if device.type == "cpu" else 64),  # small ones stay in a CPU's caches
        max_pixels=config.data.max_pixels,
    )
    train, test = (_readable(side, features) for side in (train, test))
    train_cls, test_cls = (np.stack([features.of_image[sha] for sha in side.sha256]) for side in (train, test))
    labels, truth = (np.array([CLASSES.index(code) for code in side.labels]) for side in (train, test))
    lesions, test_lesions = (np.array(side.groups, dtype=object) for side in (train, test))

    c, tried = config.c, dict[float, float]()
    if c is None:
        c, tried = choose_c(train_cls, labels, lesions, num_classes=NUM_CLASSES, seed=config.seed)
    c = c or C_WITHOUT_CHOICE
    fitted = LinearProbe.fit(train_cls, labels, c=c)
    predicted = fitted.predict(test_cls)
    confusion = confusion_matrix(truth, predicted, NUM_CLASSES)
    shape = {"num_classes": NUM_CLASSES, "resamples": config.bootstrap, "seed": config.seed}
    measured, resampled = scores(confusion), scores(resampled_confusions(truth, predicted, test_lesions, **shape))
    result = ProbeResult(
        extractor=key,
        device=str(device),
        accuracy=Estimate.of(measured.accuracy, resampled.accuracy),
        balanced_accuracy=Estimate.of(measured.balanced_accuracy, resampled.balanced_accuracy),
        macro_f1=Estimate.of(measured.macro_f1, resampled.macro_f1),
        recall={
            CLASSES[label]: Estimate.of(measured.recall[k], resampled.recall[:, k])
            for k, label in enumerate(np.unique(truth))
        },
        train=_counted(train),
        test=_counted(test),
        classes=CLASSES,
        confusion=confusion.tolist(),
        c=c,
        c_tried={f"{c:g}": score for c, score in tried.items()},
        converged=fitted.converged,
        iterations=fitted.iterations,
        resamples=config.bootstrap,
        seed=config.seed,
        extracted=features.extracted,
        unreadable=sorted(features.unreadable.values()),
        seconds=round(time.monotonic() - began, 1),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
    )
    _show(result, folder)
    print(f"probe.json, probe.csv and probe.png in {folder} ({result.seconds:.0f} s)")
    return result


def _sides(config: ProbeConfig) -> tuple[Listed, Listed]:
    """What to fit on and what to test on, with no lesion or image in both."""
    root = test_root = class_folder(config.data_root, "data_root")
    if config.test_data_root is not None:
        test_root = class_folder(config.test_data_root, "test_data_root")
    if config.train_catalog is not None and config.test_catalog is not None:
        places = (("train", root, config.train_catalog), ("test", test_root, config.test_catalog))
        train, test = (
            replace(listed(name, place, read_catalog(file), "all of"), source=f"all of {file}")
            for name, place, file in places
        )
    else:
        notes: list[str] = []
        if config.train_catalog is None:
            whole = catalog_of(root, config.data, config.cache_dir, notes)
        else:
            whole = read_catalog(config.train_catalog)
        for note in notes:
            print(note, file=sys.stderr)
        train, test = (
            replace(
                listed(split, root, whole.filter(pc.equal(whole["split"], split)), ""),
                source=f"{split} split of {config.train_catalog or root}",
            )
            for split in ("train", "test")
        )
    _check_classes(train)
    _check_classes(test)
    check_apart(train, test, "probe")
    return train, test


def _check_classes(side: Listed) -> None:
    classes = sorted(set(side.labels))
    if len(classes) < 2:
        found = f"only images of {classes[0]}" if classes else "no image"
        raise DataError(
            f"probe: the {side.name} side ({side.source}) holds {found}; it needs two classes at least. "
            "Give more images, or another split by --data.test_fraction and --data.split_seed."
        )


def _readable(side: Listed, features: ClsFeatures) -> Listed:
    if not features.of_image:
        first = sorted(features.unreadable.values())[0]
        raise DataError(
            f"probe: none of {len(features.unreadable):,} images in {side.root} can be read, the first: {first}; "
            "is it the data_root of these catalogs?"
        )
    left = taken(side, [row for row, sha256 in enumerate(side.sha256) if sha256 not in features.unreadable])
    _check_classes(left)
    return left


def _counted(side: Listed) -> Side:
    images = Counter(side.labels)
    lesions = Counter(label for label, _ in set(zip(side.labels, side.groups)))
    codes = [code for code in CLASSES if code in images]
    return Side(source=side.source, images={c: images[c] for c in codes}, lesions={c: lesions[c] for c in codes})


def _show(result: ProbeResult, folder: Path) -> None:
    """The table and how to read it, on the terminal and as probe.json, probe.csv and probe.png."""
    images, lesions = sum(result.test.images.values()), sum(result.test.lesions.values())
    rows = [
        ("accuracy", "", result.accuracy, images, lesions),
        ("balanced accuracy", "", result.balanced_accuracy, images, lesions),
        ("macro-F1", "", result.macro_f1, images, lesions),
        *(
            ("recall", code, estimate, result.test.images[code], result.test.lesions[code])
            for code, estimate in result.recall.items()
        ),
    ]
    table = Table("score", *(Column(name, justify="right") for name in ("value", "95 % interval", "images", "lesions")))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["score", "class", "value", "low", "high", "images", "lesions"])
    for name, code, one, images, lesions in rows:
        writer.writerow([name, code, one.value, one.low, one.high, images, lesions])
        cells = f"{name} {code}".strip(), f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}"
        table.add_row(*cells, f"{images:,}", f"{lesions:,}", end_section=name == "macro-F1")

    reading = _reading(result)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    chosen = f", the best of {' '.join(result.c_tried)} on held-out training lesions" if result.c_tried else ""
    console.print(
        f"logistic regression on standardised cls features, classes weighted alike, c {result.c:g}{chosen}",
        f"intervals: {result.resamples:,} resamples of the test lesions within each class; the fitted probe stays as "
        "it is",
        *(f"note: {note}" for note in _notes(result)),
        *(f"for comparison, not a check: {reference}" for reference in REFERENCES),
        reading,
        sep="\n",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = json.dumps(asdict(result) | {"reading": reading}, indent=1)
        (folder / "probe.json").write_text(document + "\n", encoding="utf-8")
        (folder / "probe.csv").write_text(text.getvalue(), encoding="utf-8")
        title = f"{result.extractor}\nbalanced accuracy {result.balanced_accuracy}"
        (folder / "probe.png").write_bytes(confusion_matrix_picture(result.confusion, title))
    except OSError as error:
        raise DataError(
            f"output: {folder} cannot be written ({error.strerror or error}); name another --output"
        ) from None


def _notes(result: ProbeResult) -> list[str]:
    """What a reader must know beside the numbers, one line each."""
    notes = []
    if result.unreadable:
        more = ["..."] if len(result.unreadable) > SHOWN_UNREADABLE else []
        shown = "; ".join(result.unreadable[:SHOWN_UNREADABLE] + more)
        notes.append(f"images that could not be read and are left out: {len(result.unreadable):,}: {shown}")
    untaught = [code for code in result.test.images if code not in result.train.images]
    if untaught:
        notes.append(f"no training images of {' '.join(untaught)}: never called, recall 0")
    untested = [code for code in CLASSES if code not in result.test.images]
    if untested:
        notes.append(f"no test images of {' '.join(untested)}: left out of every mean")
    if not result.converged:
        notes.append(
            f"the fit did not converge in {result.iterations} iterations, so the scores are not final; lower --c"
        )
    few = [f"{code} {count}" for code, count in result.test.lesions.items() if count < FEW_LESIONS]
    if few:
        notes.append(f"few test lesions ({', '.join(few)}): a recall and its interval are rough there")
    return notes


def _reading(result: ProbeResult) -> str:
    """The result in one plain sentence or two."""
    chance, balanced = 1 / len(result.train.images), result.balanced_accuracy
    if balanced.low <= chance:
        return (
            f"Balanced accuracy {balanced.value:.2f} cannot be told from guessing ({chance:.2f}): the features say "
            "little of the diagnosis. Are the weights the right ones?"
        )
    worst, *_, best = sorted(result.recall, key=lambda code: result.recall[code].value)
    return (
        f"On average {balanced.value:.0%} of a class's images are recognised (guessing: {chance:.0%}); best {best} "
        f"with {result.recall[best].value:.0%}, worst {worst} with {result.recall[worst].value:.0%}."
    )
