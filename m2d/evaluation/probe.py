"""A linear probe: are these weights good features for dermoscopy? What `python jobs/evaluate.py probe` does."""

import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from m2d import __version__
from m2d.classes import CLASSES, NUM_CLASSES
from m2d.errors import DataError
from m2d.evaluation.bootstrap import interval, resampled_confusions
from m2d.evaluation.classification_scores import confusion_matrix, scores
from m2d.evaluation.cls_features import ClsFeatures, cls_features
from m2d.evaluation.linear_probe import LinearProbe, choose_c
from m2d.evaluation.probe_images import ProbeImages, check_classes, train_and_test
from m2d.evaluation.probe_report import Estimate, ProbeResult, Side, print_result, write_result
from m2d.evaluation.settings import ProbeConfig
from m2d.files.paths import result_path
from m2d.generation.generator import pick_device
from m2d.models.extractors import extractor_key

C_WITHOUT_CHOICE = 1e-3  # where the training lesions are too few to choose by


def probe(config: ProbeConfig) -> ProbeResult:
    """Extract, fit, test, print, and write the result into the output folder.

    Raises ConfigError, DataError or CheckpointError for what a user can mend.
    """
    began = time.monotonic()
    device = pick_device(config.device)
    config = config.in_this_place()
    key = extractor_key(config.feature_extractor)
    folder = Path(result_path("output", config.output or f"probe/{key}")).expanduser()
    train, test = train_and_test(config)
    print(
        f"linear probe of {key} on {device}: fits on {len(train):,} images ({train.source}), tests on {len(test):,} "
        f"({test.source})",
        file=sys.stderr,
        flush=True,
    )
    features = cls_features(
        [*train.files, *test.files],
        config.feature_extractor,
        key=key,
        cache_dir=config.cache_dir,
        device=device,
        batch_size=config.batch_size or (8 if device.type == "cpu" else 64),  # small ones stay in a CPU's caches
        max_pixels=config.data.max_pixels,
    )
    train, test = _readable(train, test, features)
    train_cls, test_cls = _matrix(train, features), _matrix(test, features)

    tried: dict[float, float] = {}
    if config.c is None:
        tried = choose_c(train_cls, train.labels, train.lesions, num_classes=NUM_CLASSES, seed=config.seed)
    best = [c for c in tried if tried[c] == max(tried.values())] or [C_WITHOUT_CHOICE]
    c = config.c or best[len(best) // 2]  # of equals the middle one: easy classes leave the whole grid equal
    fitted = LinearProbe.fit(train_cls, train.labels, c=c)
    truth, predicted = test.labels, fitted.predict(test_cls)
    confusion = confusion_matrix(truth, predicted, NUM_CLASSES)

    shape = {"num_classes": NUM_CLASSES, "resamples": config.bootstrap, "seed": config.seed}
    measured, resampled = scores(confusion), scores(resampled_confusions(truth, predicted, test.lesions, **shape))
    present = [CLASSES[index] for index in np.unique(truth)]

    def estimate(value: np.ndarray, values: np.ndarray) -> Estimate:
        return Estimate(float(value), *interval(values))

    result = ProbeResult(
        extractor=key,
        device=str(device),
        accuracy=estimate(measured.accuracy, resampled.accuracy),
        balanced_accuracy=estimate(measured.balanced_accuracy, resampled.balanced_accuracy),
        macro_f1=estimate(measured.macro_f1, resampled.macro_f1),
        recall={code: estimate(measured.recall[k], resampled.recall[:, k]) for k, code in enumerate(present)},
        train=_side(train),
        test=_side(test),
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
    print_result(result)
    write_result(result, folder)
    print(f"probe.json, probe.csv and probe.png in {folder} ({result.seconds:.0f} s)")
    return result


def _readable(train: ProbeImages, test: ProbeImages, features: ClsFeatures) -> tuple[ProbeImages, ProbeImages]:
    """Both sides without the images that could not be read. DataError where too little is left."""
    if not features.unreadable:
        return train, test
    if not features.of_image:
        first = sorted(features.unreadable.values())[0]
        raise DataError(
            f"probe: none of {len(features.unreadable):,} images in {train.data_root} can be read, the first: {first}; "
            "is it the data_root of these catalogs?"
        )
    left = train.without(features.unreadable), test.without(features.unreadable)
    for name, side in zip(("train", "test"), left):
        check_classes(name, side)
    return left


def _matrix(side: ProbeImages, features: ClsFeatures) -> np.ndarray:
    """float32 [N, D], a row for each of the catalog's."""
    return np.stack([features.of_image[image.sha256] for image in side.files])


def _side(side: ProbeImages) -> Side:
    lesions = Counter(
        code for code, _ in set(zip(side.catalog["label"].to_pylist(), side.catalog["lesion_id"].to_pylist()))
    )
    images = Counter(side.catalog["label"].to_pylist())
    return Side(
        source=side.source,
        images={code: images[code] for code in CLASSES if images[code]},
        lesions={code: lesions[code] for code in CLASSES if lesions[code]},
    )
