"""Does the evaluation say what it should of sets of known quality? Real images, copies, noise given as generated.

python bench/evaluation_controls.py --real /data/ISIC --output bench/out/evaluation_controls.json

| given as generated | must come out as |
|---|---|
| training images | near-copies flagged |
| images of other unseen lesions (the val split) | kernel distance at the real floor, no near-copies flagged |
| noise, to fill the imbalance | kernel distance far beyond the floor, few in their class, "hurts" |
| the training images once more | "no difference shown" against oversampling, which it equals |

Anything else ends with exit code 1. Features are kept in --cache_dir, so that a second run takes minutes less.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from PIL import Image

from m2d.classes import ISIC7
from m2d.data.catalog import scan_dataset
from m2d.data.settings import DataConfig
from m2d.evaluation.evaluate import evaluate
from m2d.evaluation.settings import EvaluateConfig
from m2d.models.settings import FeatureExtractorConfig


def main(
    real: str,
    image_size: int = 64,
    per_class: int = 60,
    fill: int = 300,
    input_size: int = 192,
    cache_dir: str = "./cache",
    output: str | None = None,
) -> None:
    """Make the four sets, evaluate each, hold the answers against what must come out.

    Args:
        real: class folders of real images.
        image_size: pixels a side of the comparison.
        per_class: images of a class in the first two sets, where it has as many.
        fill: noise images of each class but the largest, as if to fill the imbalance.
        input_size: of both extractors.
        cache_dir: of the evaluation.
        output: where the answers go as JSON.
    """
    catalog = scan_dataset(real, DataConfig()).catalog.to_pylist()
    labels = [row["label"] for row in catalog]
    largest = max(ISIC7.codes, key=labels.count)
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="m2d-controls-") as folder:
        for name, parts in SETS.items():
            root = Path(folder) / name
            if name == "noise":
                write_noise(root, {code: fill for code in ISIC7.codes if code != largest}, image_size)
            else:
                split = "val" if name == "unseen" else "train"
                link(root, real, picked(catalog, split, None if name == "duplicated" else per_class))
            config = EvaluateConfig(
                real=real,
                generated=str(root),
                image_size=image_size,
                parts=parts,
                feature_extractor=FeatureExtractorConfig(input_size=input_size),
                independent_extractor=FeatureExtractorConfig(name="efficientnet-lite1", input_size=input_size),
                cache_dir=cache_dir,
                num_actors=0,
                output=str(Path(folder) / f"{name}.report"),
            )
            found = json.loads((evaluate(config) / "evaluation.json").read_text(encoding="utf-8"))
            answers[name] = summary(found)
    wrong = list(mistakes(answers))
    for name, one in answers.items():
        print(name, json.dumps(one))
    print("\n".join(wrong) or "all as they should be")
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps({"answers": answers, "wrong": wrong}, indent=1), encoding="utf-8")
    if wrong:
        raise SystemExit(1)


SETS = {
    "training": "fidelity,memorization",
    "unseen": "fidelity,memorization,consistency",
    "noise": "fidelity,downstream,consistency",
    "duplicated": "downstream",
}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What the rules look at."""
    one: dict[str, Any] = {}
    if found["fidelity"]:
        rows = {row["comparison"]: row for row in found["fidelity"][0]["rows"] if row["label"] is None}
        for name, row in rows.items():
            one[f"kernel_distance_{name}"] = [row["kernel_distance"], row["kernel_distance_se"]]
    if found["memorization"]:
        one["near_copies"] = found["memorization"]["overall"]["generated"]["either"]["value"]
        one["flagged"] = found["memorization"]["flagged"]
    if found["downstream"]:
        one["verdict"] = found["downstream"][0]["verdict"]["word"]
        one["against_oversampling"] = found["downstream"][0]["minus_c"]["balanced_accuracy"]
    if found["consistency"]:
        one["agreement"] = found["consistency"]["mean_agreement"]["value"]
        one["recall_of_real"] = found["consistency"]["mean_recall_of_real"]["value"]
    return one


def mistakes(answers: dict[str, Any]) -> Iterator[str]:
    """A line for each answer that is not what it must be."""
    if not answers["training"]["flagged"]:
        yield "training images given as generated are not flagged as copies"
    if answers["unseen"]["flagged"]:
        yield "images of unseen lesions are flagged as copies"
    value, error = answers["unseen"]["kernel_distance_generated"]
    floor, floor_error = answers["unseen"]["kernel_distance_unseen"]
    if abs(value - floor) > 3 * np.hypot(error, floor_error):
        yield f"unseen images lie at {value:.3f} from the training images, the test images at {floor:.3f}"
    value, error = answers["noise"]["kernel_distance_generated"]
    floor, floor_error = answers["noise"]["kernel_distance_unseen"]
    if value - floor < 10 * np.hypot(error, floor_error):
        yield f"noise is {value:.3f} from the training images, the test images at {floor:.3f}"
    if answers["noise"]["verdict"] != "hurts":
        yield f"noise: {answers['noise']['verdict']}"
    if answers["noise"]["agreement"] > answers["noise"]["recall_of_real"]:
        yield "noise is seen in its class more often than real images are"
    duplicated = answers["duplicated"]
    against = duplicated["against_oversampling"]
    if duplicated["verdict"] != "no difference shown" or not against["low"] <= 0 <= against["high"]:
        yield f"the training set once more: {duplicated['verdict']}, {against}"


def picked(catalog: list[dict[str, Any]], split: str, per_class: int | None) -> list[dict[str, Any]]:
    """Rows of a split, so many a class (None: all), drawn with a fixed seed."""
    generator = np.random.default_rng(0)
    rows = []
    for code in ISIC7.codes:
        found = [row for row in catalog if row["label"] == code and row["split"] == split]
        rows += [found[k] for k in generator.permutation(len(found))[:per_class]]
    return rows


def link(root: Path, real: str, rows: list[dict[str, Any]]) -> None:
    """Class folders of the same files; links where the file system has them."""
    for row in rows:
        source = Path(real, row["path"]).absolute()
        target = root / row["label"] / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(source, target)
        except OSError:
            shutil.copyfile(source, target)


def write_noise(root: Path, counts: dict[str, int], image_size: int) -> None:
    """Uniform noise, no two alike."""
    generator = np.random.default_rng(0)
    for code, count in counts.items():
        (root / code).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / code / f"{number}.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
