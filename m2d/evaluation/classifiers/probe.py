"""`evaluate probe`: are an extractor's weights good features for dermoscopy?

A logistic regression on its features, fitted on real images, tested on unseen lesions.
"""

import csv
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Column, Table

from m2d import __version__
from m2d.classes import CLASSES, NUM_CLASSES
from m2d.data.catalog import read_catalog
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import FEW_LESIONS
from m2d.evaluation.features import ClsFeatures, cls_features
from m2d.evaluation.images import Listed, catalog_of, check_apart, class_counts, class_folder, lesion_counts
from m2d.evaluation.settings import ProbeConfig
from m2d.files.paths import result_path
from m2d.files.progress import say
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


def probe(config: ProbeConfig) -> Path:
    """Extract, fit, test, print, and write probe.json, probe.csv and probe.png. Returns their folder.

    Raises ConfigError, DataError or CheckpointError, in one line, for what a user can fix.
    """
    began = time.monotonic()
    device = str(pick_device(config.device))
    config = config.in_this_place()
    key = extractor_key(config.feature_extractor)
    folder = Path(result_path("output", config.output or f"probe/{key}")).expanduser()
    listed = _listed(config)
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
    (train_cls, labels, lesions), (cls, truth, test_lesions) = (_read(side, features) for side in listed)
    train, test = (
        {"source": side.source, "images": class_counts(of_side), "lesions": lesion_counts(of_side, groups)}
        for side, of_side, groups in zip(listed, (labels, truth), (lesions, test_lesions))
    )
    c, tried = config.c, dict[float, float]()
    if c is None:
        c, tried = choose_c(train_cls, labels, lesions, num_classes=NUM_CLASSES, seed=config.seed)
    c = c or C_WITHOUT_CHOICE
    fitted = LinearProbe.fit(train_cls, labels, c=c)
    predicted = fitted.predict(cls)
    confusion = confusion_matrix(truth, predicted, NUM_CLASSES)
    shape = {"num_classes": NUM_CLASSES, "resamples": config.bootstrap, "seed": config.seed}
    measured, resampled = scores(confusion), scores(resampled_confusions(truth, predicted, test_lesions, **shape))
    means = ("accuracy", "balanced_accuracy", "macro_f1")  # over the classes in the test images
    recall = {code: Estimate.of(measured.recall[k], resampled.recall[:, k]) for k, code in enumerate(test["images"])}
    result: dict[str, Any] = {  # of probe.json
        "extractor": key,
        "device": device,
        **{name: Estimate.of(getattr(measured, name), getattr(resampled, name)) for name in means},
        "recall": recall,
        "train": train,  # what could not be read is left out
        "test": test,
        "classes": CLASSES,
        "confusion": confusion.tolist(),  # rows: true class, columns: called class
        "c": c,
        "c_tried": {f"{c:g}": score for c, score in tried.items()},  # balanced accuracy on held-out training lesions
        "converged": fitted.converged,
        "iterations": fitted.iterations,
        "resamples": config.bootstrap,
        "seed": config.seed,
        "extracted": features.extracted,  # images whose features were not in the cache
        "unreadable": features.unreadable,
        "seconds": round(time.monotonic() - began, 1),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
    }
    result["reading"] = _reading(result["balanced_accuracy"], recall, 1 / len(train["images"]))
    _show(result, folder)
    print(f"probe.json, probe.csv and probe.png in {folder} ({result['seconds']:.0f} s)")
    return folder


def _listed(config: ProbeConfig) -> list[Listed]:
    """What to fit on and what to test on, with no lesion or image in both."""
    root = test_root = class_folder(config.data_root, "data_root")
    if config.test_data_root is not None:
        test_root = class_folder(config.test_data_root, "test_data_root")
    if config.train_catalog is not None and config.test_catalog is not None:
        places = (("train", root, config.train_catalog), ("test", test_root, config.test_catalog))
        sides = [Listed(name, f"all of {file}", place, read_catalog(file)) for name, place, file in places]
    else:
        notes: list[str] = []
        if config.train_catalog is None:
            whole = catalog_of(root, config.data, config.cache_dir, notes)
        else:
            whole = read_catalog(config.train_catalog)
        for note in notes:
            say(note)
        sides = [
            Listed(split, f"{split} split of {config.train_catalog or root}", root, rows)
            for split in ("train", "test")
            for rows in [whole.filter(pc.equal(whole["split"], split))]
        ]
    for side in sides:
        _check_classes(side)
    check_apart(sides[0], sides[1], "probe")
    return sides


def _check_classes(side: Listed) -> None:
    classes = sorted(set(side["label"]))
    if len(classes) < 2:
        found = f"only images of {classes[0]}" if classes else "no image"
        raise DataError(
            f"probe: the {side.name} side ({side.source}) holds {found}; it needs two classes at least. "
            "Give more images, or another split by --data.test_fraction and --data.split_seed."
        )


def _read(side: Listed, features: ClsFeatures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the readable images: cls float32 [N, D], class indices int64 [N], lesions [N]."""
    if not features.of_image:
        raise DataError(
            f"probe: none of {len(features.unreadable):,} images in {side.root} can be read, the first: "
            f"{features.unreadable[0]}; is it the data_root of these catalogs?"
        )
    left = replace(side, rows=side.rows.filter([sha256 in features.of_image for sha256 in side["sha256"]]))
    _check_classes(left)
    cls = np.stack([features.of_image[sha256] for sha256 in left["sha256"]])
    return cls, np.array([CLASSES.index(code) for code in left["label"]]), np.array(left["lesion_id"], object)


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
    if untested := [code for code in CLASSES if code not in tested]:
        yield f"no test images of {' '.join(untested)}: left out of every mean"
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
