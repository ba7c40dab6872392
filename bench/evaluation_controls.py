"""Does the evaluation say what it should of sets of known quality? Real images, copies, noise given as generated.

python bench/evaluation_controls.py --real /data/ISIC --output bench/out/evaluation_controls.json

| given as generated | must come out as |
|---|---|
| training images | near-copies flagged |
| images of other unseen lesions (the val split) | kernel distance at the real floor, no near-copies flagged |
| noise, to fill the imbalance | distance far beyond the floor, few in their class, below 0 by argmax, not "helps" |
| the training images once more | "no use"; 0 against oversampling by argmax, which they equal |

With --samples DIR the verdict alone, in folds: of these images, of noise, and with half of the training lesions of real
images of the other half (the ceiling), of these blurred to 36 dB, and of the training images once more.

With --recipes mix,replace,two_phase,auxiliary_bn besides the fine-tuned judge, in folds. Half of the lesions of every
class but the largest are withheld from training and given as generated (ceiling), or blurred (blur), or noise in their
place, or as many of --samples (samples). A fold takes two trainings of real images and one for each recipe and set, of
two minutes each on a free core at --finetune.input_size 64. Run the same command again to resume.

Anything else ends with exit code 1. Features are kept in --cache_dir, so that a second run takes minutes less.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from scipy.fft import dctn, idctn

from m2d.classes import ISIC7
from m2d.data.catalog import scan_dataset
from m2d.data.settings import DataConfig
from m2d.evaluation.classifiers.compare import Job, Resamples, Scored, Trials, drawn_of_classes, run_jobs, training_rows
from m2d.evaluation.classifiers.finetune import FinetuneClassifier, share_of
from m2d.evaluation.classifiers.probe import probe_worth
from m2d.evaluation.classifiers.worth import (
    Offer,
    Pool,
    WorthResult,
    equal_priors,
    mixed,
    on_half,
    partition,
    word,
)
from m2d.evaluation.evaluate import KEPT, evaluate
from m2d.evaluation.features import Extraction
from m2d.evaluation.images import ImageSet, pixels_sha256, read_image_sets, stored_pixels
from m2d.evaluation.settings import EvaluateConfig, FinetuneConfig
from m2d.models.settings import FeatureExtractorConfig


def main(
    real: str,
    image_size: int = 64,
    per_class: int = 60,
    fill: int = 300,
    input_size: int = 192,
    cache_dir: str = "./cache",
    output: str | None = None,
    samples: str | None = None,
    folds: int = 5,
    repeats: int = 2,
    largest: int | None = None,
    recipes: str | None = None,
    given: str = "ceiling,blur,noise,samples",
    finetune: FinetuneConfig = FinetuneConfig(),  # noqa: B008 - frozen
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
        samples: class folders of generated images: measures the verdict's controls in folds instead.
        folds: of all lesions.
        repeats: of the folds.
        largest: images of the largest class, drawn; all where it is not given.
        recipes: with samples, measures the fine-tuned judge by these.
        given: as generated, to each recipe.
        finetune: the judge's settings.
    """
    if samples is not None and recipes is not None:
        config = EvaluateConfig(real=real, generated=samples, image_size=image_size, folds=folds, cache_dir=cache_dir)
        by_recipe(config, finetune, recipes.split(","), given.split(","), repeats, largest, output)
        return
    if samples is not None:
        found = by_one_rule(real, samples, image_size, input_size, fill, folds, repeats, largest, cache_dir)
        if output:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            Path(output).write_text(json.dumps(found, indent=1, default=asdict), encoding="utf-8")
        return
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


def by_one_rule(
    real: str,
    samples: str,
    image_size: int,
    input_size: int,
    fill: int,
    folds: int,
    repeats: int,
    largest: int | None,
    cache_dir: str,
) -> dict[str, WorthResult]:
    """Measure and print a row for each control."""
    extractor = FeatureExtractorConfig(name="efficientnet-lite1", input_size=input_size)
    config = EvaluateConfig(real=real, generated=samples, image_size=image_size, folds=folds, cache_dir=cache_dir)
    sets = read_image_sets(config, None, [])
    extraction = Extraction(cache_dir=cache_dir, device="cpu", num_actors=0)
    tested, made = thinned(sets["tested"], largest, cache_dir), extraction.of(sets["generated"], extractor)
    rows = np.flatnonzero(np.isin(tested.labels, made.labels))
    pixels = blurred(tested.pixels[rows])
    codec = with_pixels(
        taken(tested, rows, cache_dir), name="blurred", source="36 dB", pixels=pixels, cache_dir=cache_dir
    )
    labels = np.repeat(np.unique(made.labels), fill)
    blank = replace(sets["generated"], labels=labels, groups=np.arange(len(labels)).astype(object), copies=())
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), image_size, image_size, 3), dtype=np.uint8)
    noise = with_pixels(blank, name="noise", source="noise", pixels=pixels, cache_dir=cache_dir)
    of = partial(extraction.of, config=extractor)
    trials = Trials(seeds=range(repeats), resamples=1000, kept=Path(cache_dir) / KEPT)
    judged = partial(probe_worth, {"tested": of(tested)}, c=1e-3, trials=trials, folds=folds)
    found = {
        "samples": judged(
            generated=made,
            redrawn=(rows, of(codec)),
            controls={"training images again": lambda half: half[np.isin(tested.labels[half], made.labels)]},
        ),
        "noise": judged(generated=of(noise)),
    }
    print("| given as generated | share | d - c | d - a | argmax, d - c | melanoma AUPRC, d - c | verdict |")
    for name, one in found.items():
        of_rule = [one.differences[rule]["balanced_accuracy"] for rule in ("primary", "less_real", "argmax")]
        cells = [f"{np.mean(one.shares):.2f}", *(each.signed for each in of_rule)]
        print(
            "|", " | ".join([name, *cells, one.differences["primary"]["melanoma_auprc"].signed, one.verdict.word]), "|"
        )
        for offered, gain in one.gains.items():
            cells = [
                f"{gain.mean_share:.2f}",
                *(each["balanced_accuracy"].signed for each in (gain.minus_c, gain.minus_a)),
            ]
            cells += ["", gain.minus_c["melanoma_auprc"].signed, gain.word]
            print("|", " | ".join([f"half of the lesions: {offered}, beside {name}", *cells]), "|")
        print(f"of the ceiling {one.of_ceiling}, kept by the blur {one.codec_retention}, detector {one.told_apart}")
    return found


def by_recipe(
    config: EvaluateConfig,
    finetune: FinetuneConfig,
    recipes: list[str],
    given: list[str],
    repeats: int,
    largest: int | None,
    output: str | None,
) -> None:
    """Print a row for each recipe and set, and write them all after each.

    Every lesion is tested once a repeat. Calls are at equal priors by worth.py's rule; control c repeats real images to
    the counts of the ceiling.
    """
    sets = read_image_sets(config, None, [])
    tested, made = thinned(sets["tested"], largest, config.cache_dir), sets["generated"]
    rare = np.flatnonzero(tested.labels != np.bincount(tested.labels).argmax())
    pixels = {"ceiling": tested.pixels[rare], "blur": blurred(tested.pixels[rare])}
    pixels["noise"] = np.random.default_rng(0).integers(0, 256, pixels["blur"].shape, dtype=np.uint8)
    first = {name: number * len(rare) for number, name in enumerate(pixels)}  # row of each set in the classifier's
    pixels["samples"] = made.pixels
    labels = np.concatenate([tested.labels[rare]] * len(first) + [made.labels])
    blank = replace(made, labels=labels, groups=np.arange(len(labels)).astype(object), copies=())
    all_given = with_pixels(
        blank, name="given", source="", pixels=np.concatenate(list(pixels.values())), cache_dir=config.cache_dir
    )
    pool = Pool.of({"tested": tested}, replace(tested, labels=tested.labels[rare]))
    trials = Trials(
        seeds=range(repeats), resamples=1000, kept=Path(config.cache_dir) / KEPT, what="networks fine-tuned"
    )
    parts = []
    for seed in trials.seeds:
        for held in partition(pool, np.arange(len(tested)), config.folds, seed):
            fit = np.setdiff1d(np.arange(len(tested)), held)
            ceiling = on_half(pool, fit, seed, {})["ceiling"]
            places, counts = np.searchsorted(rare, ceiling.real), np.bincount(tested.labels[ceiling.real])
            rows = {name: at + places for name, at in first.items()}
            there = np.minimum(counts, np.bincount(made.labels, minlength=len(counts))[: len(counts)])
            rows["samples"] = len(first) * len(rare) + np.sort(drawn_of_classes(made.labels, there, [seed, 4]))
            parts.append((seed, held, ceiling.fit, rows))
    resamples = Resamples.of(tested.labels, tested.groups, trials, tested.classes)

    def scores_of(judge: FinetuneClassifier, name: str) -> list[Scored]:
        asked = []
        for seed, held, half, rows in parts:
            if name in "ac":
                one = training_rows(name, tested.labels[half], labels[rows["ceiling"]], seed=seed)
                one = replace(one, real=half[one.real], reference=half, asked=held)
            else:
                offer = Offer(half, half[:0], rows[name])
                one = mixed(tested.labels, labels, offer, share_of(judge.config), classes="summed", asked=held)
            asked.append(Job.of(judge, one, seed))
        answers, scored = run_jobs(judge, asked, trials), []
        for seed in trials.seeds:
            called, ranked = np.empty((2, len(tested), len(tested.classes)))
            for job, (own, held, half, _) in zip(asked, parts, strict=True):
                if own == seed:
                    called[held] = equal_priors(answers[job.digest], job.rows, tested.labels, labels)
                    ranked[held] = called[held] * np.bincount(tested.labels[half], minlength=len(tested.classes))
            scored.append(resamples.scores(ranked / ranked.sum(axis=1, keepdims=True), called))
        return scored

    found: dict[str, Any] = {
        "finetune": asdict(finetune),
        "folds": config.folds,
        "repeats": repeats,
        "test": tested.counts,
    }
    found["given"] = {name: np.bincount(labels[rows]).tolist() for name, rows in parts[0][3].items()}  # in one fold
    print("| recipe | given as generated | share | d - c | d - a | melanoma AUPRC, d - c | verdict |", flush=True)
    for recipe in recipes:
        judge = FinetuneClassifier.of(tested, tested, all_given, replace(finetune, recipe=recipe))
        a, c = (scores_of(judge, arm) for arm in "ac")  # the same trainings for every recipe
        found |= {arm: resamples.estimates(one)["balanced_accuracy"] for arm, one in (("a", a), ("c", c))}
        for name in given:
            d = scores_of(judge, name)
            minus = {"c": resamples.estimates(d, c), "a": resamples.estimates(d, a)}
            drawn = [resamples.means(d, "balanced_accuracy", control) for control in (c, a)]
            said = word(drawn, [share_of(judge.config)])
            found[f"{recipe}, {name}"] = {"minus": minus, "word": said}
            gains = [minus[one]["balanced_accuracy"].signed for one in "ca"]
            cells = [recipe, name, f"{share_of(judge.config):g}", *gains, minus["c"]["melanoma_auprc"].signed, said]
            print("|", " | ".join(cells), "|", flush=True)
            if output:
                Path(output).parent.mkdir(parents=True, exist_ok=True)
                Path(output).write_text(json.dumps(found, indent=1, default=asdict), encoding="utf-8")


def thinned(images: ImageSet, largest: int | None, cache_dir: str) -> ImageSet:
    """With so many images of the largest class, drawn; None: all."""
    counts = np.bincount(images.labels)
    common = np.flatnonzero(images.labels == counts.argmax())
    drawn = np.random.default_rng(1).choice(common, min(largest or len(common), len(common)), replace=False)
    return taken(images, np.sort(np.concatenate([np.flatnonzero(images.labels != counts.argmax()), drawn])), cache_dir)


def with_pixels(like: ImageSet, *, name: str, source: str, pixels: np.ndarray, cache_dir: str) -> ImageSet:
    """The images of another set, redrawn: pixels uint8 [N, S, S, 3] take the place of its own, kept as a file."""
    sha256 = pixels_sha256(pixels)
    stored = stored_pixels(cache_dir, sha256, pixels.shape, lambda out: out.__setitem__(slice(None), pixels))
    return replace(like, name=name, source=source, sha256=sha256, pixels=stored)


def taken(images: ImageSet, rows: np.ndarray, cache_dir: str) -> ImageSet:
    """Some of the images, their pixels in a file of their own."""
    files = {part: tuple(getattr(images, part)[row] for row in rows) for part in ("sha256", "paths")}
    some = replace(images, labels=images.labels[rows], groups=images.groups[rows])
    some = with_pixels(some, name="tested", source=images.source, pixels=images.pixels[rows], cache_dir=cache_dir)
    return replace(some, **files)


def blurred(pixels: np.ndarray, decibels: float = 36) -> np.ndarray:
    """A soft low-pass of the cosine transform, of the strength that gives this mean PSNR."""
    frequency = np.hypot(*np.meshgrid(*2 * [np.arange(pixels.shape[1])]))
    spectrum = dctn(pixels.astype(np.float32), axes=(1, 2), norm="ortho")

    def passed(cut: float, step: int = 1) -> np.ndarray:
        kept = spectrum[::step] / (1 + (frequency / cut) ** 4)[..., None]
        return idctn(kept, axes=(1, 2), norm="ortho").round().clip(0, 255).astype(np.uint8)

    low, high = 1.0, 2.0 * pixels.shape[1]
    for _ in range(12):
        cut = (low * high) ** 0.5
        error = np.square(passed(cut, 10).astype(np.float32) - pixels[::10]).mean(axis=(1, 2, 3))
        enough = np.mean(10 * np.log10(255**2 / error.clip(1e-8))) > decibels
        low, high = (low, cut) if enough else (cut, high)
    return passed(high)


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
        one["verdict"] = found["worth"][0]["verdict"]["word"]
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
    if answers["noise"]["verdict"] == "helps" or answers["noise"]["against_oversampling"]["high"] >= 0:
        yield f"noise: {answers['noise']['verdict']}, by argmax {answers['noise']['against_oversampling']}"
    if answers["noise"]["agreement"] > answers["noise"]["recall_of_real"]:
        yield "noise is seen in its class more often than real images are"
    duplicated = answers["duplicated"]
    against = duplicated["against_oversampling"]
    if duplicated["verdict"] != "no use" or not against["low"] <= 0 <= against["high"]:
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
