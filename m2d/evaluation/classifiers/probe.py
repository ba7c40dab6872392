"""Logistic regression on an extractor's features: classifier 1, class consistency, and the command `evaluate probe`.

The evaluation gives features of an extractor that did not guide the training: in those of the one that did, agreement
proves little. The command asks whether weights are good features for dermoscopy.
"""

import csv
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from m2d import __version__
from m2d.data.catalog import classes_of, read_catalog
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import (
    FEW_LESIONS,
    DownstreamResult,
    Settings,
    TrainingRows,
    Trials,
    compare_arms,
    scored_classes,
    unscored,
)
from m2d.evaluation.classifiers.site import SiteResult, measure_site, site_rows
from m2d.evaluation.classifiers.worth import Pool, WorthResult, equal_priors, measure_worth
from m2d.evaluation.features import ClsFeatures, cls_features
from m2d.evaluation.images import (
    ALL_ROWS,
    FeatureSet,
    Listed,
    Unanswerable,
    catalog_of,
    check_apart,
    class_folder,
    require_same,
    together,
    unknown_lesions,
)
from m2d.evaluation.settings import ProbeConfig
from m2d.files.paths import require_outside, result_path
from m2d.files.progress import say
from m2d.generation.generator import pick_device
from m2d.metrics.bootstrap import Estimate, resampled_confusions
from m2d.metrics.linear_probe import C_GRID, LinearProbe, choose_c, told_apart
from m2d.metrics.neighbours import Standardizer, nearest, one_where_constant
from m2d.metrics.scores import confusion_matrix, scores
from m2d.models.extractors import extractor_key
from m2d.plots.charts import confusion_matrix_picture

C_WITHOUT_CHOICE = 1e-3  # where the training lesions are too few to choose by
SITES_OF_CHOICE = 5  # that c is chosen by
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

    train, test: real images, no lesion in both; generated: the images to judge. c: inverse strength of the L2 penalty,
    the same for all arms; None: see `chosen_c`. Raises Unanswerable for lesions too few to choose c by, or classes too
    few.
    """
    scored_classes(train, test)
    picked, tried = (c, {}) if c is not None else chosen_c(train, seed=trials.seed)
    settings: Settings = {"extractor": train.extractor, "c": picked}
    settings |= {f"cross-validated balanced accuracy at c = {one:g}": score for one, score in tried.items()}
    return compare_arms(
        ProbeClassifier(train, test, generated, picked),
        settings,
        trials,
        images=(train, test, generated),
        notes=[
            "Features are standardised by the real training images, and c is the same, in every arm.",
            "This classifier has no chance of its own: a seed changes what arm c repeats, and in the ratio sweep which "
            "synthetic images are taken.",
        ],
    )


def chosen_c(train: FeatureSet, *, seed: int) -> tuple[float, dict[float, float]]:
    """The c that lesion-grouped cross-validation on these images prefers, and the score of each that was tried.

    Raises Unanswerable where the lesions are too few for it.
    """
    best, tried = choose_c(train.cls, train.labels, train.groups, num_classes=len(train.classes), seed=seed)
    if best is None:
        raise Unanswerable(
            f"{len(train)} training images of {len(set(train.groups.tolist()))} lesions are too few to "
            "choose c by cross-validation; give more images, or a value of c"
        )
    return best, tried


@dataclass(frozen=True)
class ProbeClassifier:
    """Logistic regression; every arm is standardised by the real training images. See compare.Classifier."""

    train: FeatureSet
    test: FeatureSet
    generated: FeatureSet
    c: float
    name = "logistic regression on extractor features"
    fixed_share = None
    seeded = False
    wants_gpu = False

    @cached_property
    def identity(self) -> str:
        """Hex digest of c, features and labels."""
        digest = hashlib.sha256(f"probe {self.c!r} of {len(self.train.classes)} classes\n".encode())
        for part in (self.train, self.test, self.generated):
            digest.update(f"{part.extractor} {part.cls.shape}\n".encode())
            digest.update(np.ascontiguousarray(part.cls).data)
            digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()

    def identity_of(self, rows: TrainingRows) -> str:
        """The same for all rows."""
        return self.identity

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Class probabilities of the test images. An image that stands twice is one of twice the weight: same loss."""
        real, count = np.unique(rows.real), len(rows.real)
        weights = np.concatenate([np.bincount(rows.real, rows.weights[:count])[real], rows.weights[count:]])
        probe = LinearProbe.fit(
            np.concatenate([self.train.cls[real], self.generated.cls[rows.generated]]),
            np.concatenate([self.train.labels[real], self.generated.labels[rows.generated]]),
            c=self.c,
            weights=weights,
            standardised_by=self.train.cls if rows.reference is None else self.train.cls[rows.reference],
        )
        asked = self.test.cls if rows.asked is None else self.test.cls[rows.asked]
        return probe.probabilities(asked, len(self.train.classes))


def probe_worth(
    sides: Mapping[str, FeatureSet],
    generated: FeatureSet,
    c: float,
    trials: Trials,
    *,
    folds: int = 1,
    redrawn: tuple[np.ndarray, FeatureSet] | None = None,
    controls: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    original: Mapping[str, FeatureSet] | None = None,
) -> WorthResult:
    """What generated images are worth to classifier 1; see worth.measure_worth.

    sides: see worth.Sides; with folds, those of `tested` are trained on too. c: as in measure_downstream. redrawn: rows
    of both sides together, ascending, and the features of those images after the autoencoder. original: the sides as
    they are, where those given were preprocessed.
    """
    pooled, pool = together(*sides.values()), Pool.of(sides, generated, redrawn=redrawn[0] if redrawn else None)
    cls, labels, groups = pooled.cls, pool.labels, pool.groups
    pool = replace(pool, nearest=partial(origins, cls, groups, generated))
    rest, apart = np.flatnonzero(~pool.tested) if folds == 1 else np.arange(len(labels)), dict[str, float]()
    for label in np.unique(generated.labels):
        real, own = rest[labels[rest] == label], generated.cls[generated.rows(label)]
        if len(real):
            both = np.concatenate([groups[real], groups[_nearest(cls, own, real)]])
            made = np.arange(len(both)) >= len(real)
            auc = told_apart(np.concatenate([cls[real], own]), made, both, c=c, seed=trials.seed)
            apart |= {pool.classes.codes[label]: auc} if auc is not None else {}
    every = together(generated, redrawn[1]) if redrawn else generated
    before = together(*original.values()) if original else None
    return measure_worth(
        ProbeClassifier(pooled, pooled, every, c),
        pool,
        trials,
        folds=folds,
        told_apart=apart,
        controls=controls,
        original=ProbeClassifier(before, before, every, c) if before else None,
    )


def probe_site(
    sides: Mapping[str, FeatureSet],
    generated: FeatureSet,
    c: float | None,
    trials: Trials,
    *,
    turned: Sequence[np.ndarray] = (),
    share: float,
    folds: int,
) -> SiteResult:
    """What a site gains, for classifier 1; see site.measure_site.

    known images: those that the generator learned on. turned: features of the tested images, one array for each further
    view. c: None: chosen by sites drawn from the known lesions, for the best one depends on the number of lesions.
    """
    pooled, pool = together(*sides.values()), Pool.of(sides, generated, turned=len(turned))
    offered = together(generated, *(replace(sides["tested"], cls=view) for view in turned))
    probe, how = ProbeClassifier(pooled, pooled, offered, c or C_WITHOUT_CHOICE), "as asked for"
    if c is None:
        c, how = _c_of_sites(probe, pool, share, trials.seed), "for there is too little to choose it by"
        if c is not None:
            how = "chosen by sites drawn from the lesions that the generator learned on, tested on the rest of these"
            probe = replace(probe, c=c)
    notes = [f"c is {probe.c:g} in every arm, {how}."]
    return measure_site(probe, pool, trials, share=share, folds=folds, notes=notes)


def _c_of_sites(probe: ProbeClassifier, pool: Pool, share: float, seed: int) -> float | None:
    """The c by which sites drawn from the known lesions call the other known ones best: balanced accuracy of arm a.

    Trained and called as arm a is: cross-validation of a class-weighted probe prefers the strongest penalty, which
    leaves arm a, that has no class weights, next to nothing. None: too few known lesions for a site and others.
    """
    known, tried = np.flatnonzero(~pool.tested), np.zeros(len(C_GRID))
    for draw in range(SITES_OF_CHOICE):
        try:
            rows = site_rows(pool, known, share, [seed, draw])
        except Unanswerable:
            return None
        held = np.setdiff1d(known, rows)
        if not len(held) or len(np.unique(pool.labels[rows])) < 2:
            return None
        alone = TrainingRows(rows, rows[:0], np.ones(len(rows)), rows, held)
        for number, c in enumerate(C_GRID):
            answer = equal_priors(replace(probe, c=c).predict(alone, seed), alone, pool.labels, pool.generated)
            called = confusion_matrix(pool.labels[held], answer.argmax(axis=1), len(pool.classes))
            tried[number] += scores(called).balanced_accuracy
    best = np.flatnonzero(tried == tried.max())
    return C_GRID[best[len(best) // 2]]


def origins(real: np.ndarray, groups: np.ndarray, generated: FeatureSet, rows: np.ndarray) -> np.ndarray:
    """For each generated image the nearest of these real ones; of a variation, one of its lesion's where there is one.

    groups: of all real ones. int64 [M], or [M, 2] with one of the lesion whose skin it took, if any, or the same again.
    """
    place = dict(zip(groups[rows].tolist(), rows.tolist(), strict=True))
    found = zip(generated.groups.tolist(), _nearest(real, generated.cls, rows).tolist(), strict=True)
    own = [place.get(lesion, row) for lesion, row in found]
    skins = generated.skins
    return np.array(own if skins is None else [(row, place.get(of, row)) for row, of in zip(own, skins)], np.int64)


def _nearest(real: np.ndarray, generated: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each generated image the nearest of these real ones, by cosine of standardised features."""
    standard = Standardizer.of(real[rows], one_where_constant)
    return rows[nearest(standard.unit(generated), standard.unit(real[rows]))[1][:, 0].numpy()]


# --- class consistency ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConsistencyResult:
    """Rows of the confusions: the class that was asked for (generated) or diagnosed (real); columns: as classified."""

    extractor: str
    c: float  # of the logistic regression
    resamples: int
    classes: list[str]  # of rows and columns
    confusion: list[list[int]]  # [K, K], of the generated images
    confusion_of_real: list[list[int]]  # [K, K], of unseen real images
    images: dict[str, int]  # generated, of each class that has some
    agreement: dict[str, Estimate]  # share of a class's generated images that are classified as it
    recall_of_real: dict[str, Estimate]  # the same of unseen real images: the ceiling
    mean_agreement: Estimate | None  # over the classes that were generated and have test images; None: no such class
    mean_recall_of_real: Estimate | None  # over the same classes
    left_out: dict[str, str]  # class code: why it has no ceiling, or no agreement


def measure_consistency(
    *, train: FeatureSet, test: FeatureSet, generated: FeatureSet, c: float, resamples: int, seed: int
) -> ConsistencyResult:
    """Does a classifier that saw real images alone see in a generated image the class it was made for?

    A linear probe is fitted on the real training images, every class weighing the same, and classifies both other sets.
    Intervals: of a class's agreement Wilson's, for generated images are independent and a share of 1 is no certainty;
    of the real recall and of both means a bootstrap over lesions, or generated images, within each class.
    Raises Unanswerable where fewer than two classes are both in train and test.
    """
    scored_classes(train, test)
    probe = LinearProbe.fit(train.cls, train.labels, c=c)
    known = np.isin(test.labels, np.unique(train.labels))
    codes = train.classes.codes
    single = replace(generated, groups=np.arange(len(generated)))
    drawn = _confusions(probe, single, resamples, seed)
    drawn_real = _confusions(probe, test, resamples, seed, known)
    confusion, real = drawn[0], drawn_real[0]
    made, tested = (np.flatnonzero(one.sum(axis=1)) for one in (confusion, real))
    recalls, both = scores(drawn_real).recall, np.intersect1d(made, tested)
    agreement = {k: Estimate.of_share(float(confusion[k, k] / confusion[k].sum()), confusion[k].sum()) for k in made}
    return ConsistencyResult(
        extractor=train.extractor,
        c=c,
        resamples=resamples,
        classes=list(codes),
        confusion=confusion.tolist(),
        confusion_of_real=real.tolist(),
        images=generated.counts,
        agreement={codes[k]: one for k, one in agreement.items()},
        recall_of_real={codes[k]: Estimate.of(recalls[:, place]) for place, k in enumerate(tested)},
        mean_agreement=_mean(drawn, both),
        mean_recall_of_real=_mean(drawn_real, both),
        left_out={
            **unscored(train, test),
            **{codes[k]: "no generated image, so no agreement" for k in np.setdiff1d(tested, made)},
        },
    )


def _confusions(
    probe: LinearProbe, of: FeatureSet, resamples: int, seed: int, rows: slice | np.ndarray = ALL_ROWS
) -> np.ndarray:
    """int64 [1 + R, K, K]: of these images, and of their resamples by lesion."""
    called, size = probe.predict(of.cls[rows]), len(of.classes)
    return resampled_confusions(
        of.labels[rows], called, of.groups[rows], num_classes=size, resamples=resamples, seed=seed
    )


def _mean(confusions: np.ndarray, classes: np.ndarray) -> Estimate | None:
    """The mean share on the diagonal of these rows of confusions [1 + R, K, K]. None: no row."""
    shares = np.diagonal(confusions, axis1=1, axis2=2)[:, classes] / confusions.sum(axis=2)[:, classes]
    return Estimate.of(shares.mean(axis=1)) if len(classes) else None


# --- the command ----------------------------------------------------------------------------------------------------


def probe(config: ProbeConfig) -> Path:
    """Extract, fit, test, print, and write probe.json, probe.csv and probe.png. Returns their folder.

    Raises ConfigError, DataError or CheckpointError, in one line, for what a user can fix.
    """
    began = time.monotonic()
    device = str(pick_device(config.device))
    config = config.in_this_place()
    key = extractor_key(config.feature_extractor)
    folder = Path(result_path("output", config.output or f"probe/{key}")).expanduser()
    require_outside(config.data_root, output=str(folder))
    listed, lesion_notes = _listed(config)
    classes = listed[0].classes
    fits, tests = (f"{len(side.rows):,} images ({side.source})" for side in listed)
    say(f"linear probe of {key} on {device}: fits on {fits}, tests on {tests}")
    features = cls_features(
        listed,
        config.feature_extractor,
        key=key,
        cache_dir=config.cache_dir,
        device=device,
        batch_size=config.batch_size or (8 if device == "cpu" else 64),  # small ones stay in a CPU's caches
        max_pixels=config.data.max_pixels,
    )
    train, test = (_read(side, features, key) for side in listed)
    c, tried = config.c, dict[float, float]()
    if c is None:
        c, tried = choose_c(train.cls, train.labels, train.groups, num_classes=len(classes), seed=config.seed)
    c = c or C_WITHOUT_CHOICE
    fitted = LinearProbe.fit(train.cls, train.labels, c=c)
    confusions = _confusions(fitted, test, config.bootstrap, config.seed)
    measured = scores(confusions)
    means = ("accuracy", "balanced_accuracy", "macro_f1")  # over the classes in the test images
    recall = {code: Estimate.of(measured.recall[:, k]) for k, code in enumerate(test.counts)}
    read = [{name: one.summary[name] for name in ("source", "images", "lesions")} for one in (train, test)]
    result: dict[str, Any] = {  # of probe.json
        "extractor": key,
        "device": device,
        **{name: Estimate.of(getattr(measured, name)) for name in means},
        "recall": recall,
        "train": read[0],  # what could not be read is left out
        "test": read[1],
        "classes": classes.codes,
        "confusion": confusions[0].tolist(),  # rows: true class, columns: called class
        "c": c,
        "c_tried": {f"{c:g}": score for c, score in tried.items()},  # balanced accuracy on held-out training lesions
        "converged": fitted.converged,
        "iterations": fitted.iterations,
        "resamples": config.bootstrap,
        "seed": config.seed,
        "extracted": features.extracted,  # images whose features were not in the cache
        "unreadable": features.unreadable,
        "notes": lesion_notes,
        "seconds": round(time.monotonic() - began, 1),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
    }
    result["reading"] = _reading(result["balanced_accuracy"], recall, 1 / len(train.counts))
    _show(result, folder)
    print(f"probe.json, probe.csv and probe.png in {folder} ({result['seconds']:.0f} s)")
    return folder


def _listed(config: ProbeConfig) -> tuple[list[Listed], list[str]]:
    """What to fit on and what to test on, with no lesion or image in both; and what the report must say of lesions."""
    root = test_root = class_folder(config.data_root, "data_root")
    if config.test_data_root is not None:
        test_root = class_folder(config.test_data_root, "test_data_root")
    notes = list[str]()
    files = [file for file in (config.train_catalog, config.test_catalog) if file is not None]
    catalogs = [read_catalog(file) for file in files] or [catalog_of(root, config.data, config.cache_dir, notes)]
    for note in notes:
        say(note)
    classes, tested = classes_of(catalogs[0]), classes_of(catalogs[-1])
    if len(catalogs) > 1:
        require_same(tested, files[1], classes, files[0])
        places = zip(("train", "test"), files, (root, test_root), catalogs, strict=True)
        sides = [Listed(name, f"all of {file}", place, rows, classes) for name, file, place, rows in places]
    else:
        whole, splits = Listed("", "", root, catalogs[0], classes), np.array(catalogs[0]["split"])
        sides = [
            replace(whole, name=split, source=f"{split} split of {config.train_catalog or root}").where(splits == split)
            for split in ("train", "test")
        ]
    for side in sides:
        _check_classes(side)
    check_apart(sides[0], sides[1], "probe")
    return sides, unknown_lesions(*catalogs)


def _check_classes(side: Listed) -> None:
    classes = sorted(set(side["label"]))
    if len(classes) < 2:
        found = f"only images of {classes[0]}" if classes else "no image"
        raise DataError(
            f"probe: the {side.name} side ({side.source}) holds {found}; it needs two classes at least. "
            "Give more images, or another split by --data.test_fraction and --data.split_seed."
        )


def _read(side: Listed, features: ClsFeatures, key: str) -> FeatureSet:
    """The readable images, by their features alone."""
    if not features.of_image:
        raise DataError(
            f"probe: none of {len(features.unreadable):,} images in {side.root} can be read, the first: "
            f"{features.unreadable[0]}; is it the data_root of these catalogs?"
        )
    left = side.where(np.array([sha256 in features.of_image for sha256 in side["sha256"]], bool))
    _check_classes(left)
    cls = np.stack([features.of_image[sha256] for sha256 in left["sha256"]])
    return FeatureSet(**left.fields, pixels=np.empty((len(cls), 0, 0, 3), np.uint8), extractor=key, cls=cls)


def _show(result: dict[str, Any], folder: Path) -> None:
    """The table and how to read it, on the terminal and as probe.json, probe.csv and probe.png."""
    images, lesions = result["test"]["images"], result["test"]["lesions"]
    whole = sum(images.values()), sum(lesions.values())
    rows = [
        ("accuracy", "", result["accuracy"], *whole),
        ("balanced accuracy", "", result["balanced_accuracy"], *whole),
        ("macro-F1", "", result["macro_f1"], *whole),
        *(("recall", code, one, images[code], lesions[code]) for code, one in result["recall"].items()),
    ]
    table = Table("score", *(Column(name, justify="right") for name in ("value", "95 % interval", "images", "lesions")))
    for name, code, one, *counts in rows:
        cells = f"{name} {code}".strip(), f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}"
        table.add_row(*cells, *(f"{count:,}" for count in counts), end_section=name == "macro-F1")
    tried = " ".join(result["c_tried"])
    chosen = f", the best of {tried} on held-out training lesions" if tried else ""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    console.print(
        f"logistic regression on standardised cls features, classes weighted alike, c {result['c']:g}{chosen}",
        f"intervals: {result['resamples']:,} resamples of the test lesions within each class; the fitted probe stays "
        "as it is",
        *(f"note: {note}" for note in _notes(result)),
        *(f"for comparison, not a check: {reference}" for reference in REFERENCES),
        result["reading"],
        sep="\n",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = json.dumps(result, indent=1, default=asdict)
        (folder / "probe.json").write_text(document + "\n", encoding="utf-8")
        with (folder / "probe.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["score", "class", "value", "low", "high", "images", "lesions"])
            writer.writerows([name, code, *vars(one).values(), *counts] for name, code, one, *counts in rows)
        title = f"{result['extractor']}\nbalanced accuracy {result['balanced_accuracy']}"
        (folder / "probe.png").write_bytes(confusion_matrix_picture(result["confusion"], title, result["classes"]))
    except OSError as error:
        raise DataError(
            f"output: {folder} cannot be written ({error.strerror or error}); name another --output"
        ) from None


def _notes(result: dict[str, Any]) -> Iterator[str]:
    """What a reader must know beside the numbers, one line each."""
    unreadable, taught, tested = result["unreadable"], result["train"]["images"], result["test"]["images"]
    if unreadable:
        shown = "; ".join(unreadable[:SHOWN_UNREADABLE] + ["..."] * (len(unreadable) > SHOWN_UNREADABLE))
        yield f"images that could not be read and are left out: {len(unreadable):,}: {shown}"
    if untaught := [code for code in tested if code not in taught]:
        yield f"no training images of {' '.join(untaught)}: never called, recall 0"
    if untested := [code for code in result["classes"] if code not in tested]:
        yield f"no test images of {' '.join(untested)}: left out of every mean"
    yield from result["notes"]
    if not result["converged"]:
        yield (f"the fit did not converge in {result['iterations']} iterations, so the scores are not final; lower --c")
    if few := [f"{code} {count}" for code, count in result["test"]["lesions"].items() if count < FEW_LESIONS]:
        yield f"few test lesions ({', '.join(few)}): a recall and its interval are rough there"


def _reading(balanced: Estimate, recall: dict[str, Estimate], chance: float) -> str:
    """The result in one plain sentence or two."""
    if balanced.low <= chance:
        return (
            f"Balanced accuracy {balanced.value:.2f} cannot be told from guessing ({chance:.2f}): the features say "
            "little of the diagnosis. Are the weights the right ones?"
        )
    worst, *_, best = sorted(recall, key=lambda code: recall[code].value)
    return (
        f"On average {balanced.value:.0%} of a class's images are recognised (guessing: {chance:.0%}); best {best} "
        f"with {recall[best].value:.0%}, worst {worst} with {recall[worst].value:.0%}."
    )
