"""The command `evaluate pick`: a smaller set out of a finished run's images, and the random subset that is its control.

Kept is what a classifier of real training images gives its class as probably as it gives it to real images of the
class, and of that the images that lie farthest from one another. By another extractor than those that judge: what was
picked by a judge pleases it. Nothing is drawn and nothing overwritten.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from torch import Tensor

from m2d.errors import ConfigError, DataError
from m2d.evaluation.classifiers.probe import chosen_c
from m2d.evaluation.evaluate import find_checkpoint, picked_by, record_of
from m2d.evaluation.features import Extraction
from m2d.evaluation.images import CONTACT_SHEET, FeatureSet, ImageSet, Unanswerable, read_image_sets
from m2d.evaluation.settings import EvaluateConfig, PickConfig
from m2d.files.atomic import PARTIAL
from m2d.files.paths import result_path
from m2d.files.progress import say
from m2d.files.storage import one_line
from m2d.generation.contact_sheet import contact_sheet, what_they_are
from m2d.generation.generator import pick_device
from m2d.generation.output import LESIONS_NAME, MANIFEST_NAME, RECORD_NAME, cannot_write
from m2d.generation.provenance import CERTIFICATES_NAME
from m2d.metrics.linear_probe import FOLDS, LinearProbe, lesion_folds
from m2d.metrics.neighbours import Standardizer, one_where_constant
from m2d.models.checkpoint import load_checkpoint
from m2d.models.extractors import extractor_identity

_SHOWN = 8  # images of a class on the contact sheet


def pick(config: PickConfig) -> Path:
    """Write a folder of the picked images with their rows of the manifest. Returns it.

    Run again it resumes, for features are kept, and what was picked is not picked again. Raises ConfigError, DataError
    or CheckpointError, in one line, for what a user can fix.
    """
    device = str(pick_device(config.device))
    config = config.in_this_place()
    source = Path(config.generated or ".").expanduser().absolute()
    found, notes = find_checkpoint(str(source), config.checkpoint)
    checkpoint = load_checkpoint(found, "cpu") if found else None
    places: dict[str, Any] = {name: getattr(config, name) for name in ("real", "train", "cache_dir", "data")}
    sets = read_image_sets(EvaluateConfig(generated=str(source), **places), checkpoint, notes)
    for note in notes:
        say(note)
    manifest = _manifest(source, sets["generated"])
    key, weights_sha256 = extractor_identity(config.feature_extractor)
    record: dict[str, Any] = {
        "rule": config.rule,
        "count": config.count,
        "seed": config.seed,
        "c": config.c,
        "extractor": key,
        "weights_sha256": weights_sha256,
        "train": _digest(sets["train"].sha256),
        "generated": _digest(sets["generated"].sha256),
    }
    name = f"{source.name}-{config.rule}-{_digest([json.dumps(record, sort_keys=True)])[:8]}"
    output = Path(result_path("output", config.output or str(source.with_name(name)))).expanduser().absolute()
    if _is_done(output, record):
        print(f"already picked: {output}")
        return output
    extraction = Extraction(config.cache_dir, device, config.batch_size, config.num_actors, config.verbose)
    train, made = (extraction.of(sets[name], config.feature_extractor) for name in ("train", "generated"))
    c = config.c if config.c is not None else chosen_c(train, seed=config.seed)[0]
    real, of_made = class_probabilities(train, made, c=c, seed=config.seed)
    standard = Standardizer.of(train.cls, one_where_constant)
    picked: dict[str, list[int]] = {}  # rows of the generated images in the order of the pick, by class code
    found_of = {}
    for label in np.unique(made.labels).tolist():
        rows, threshold = made.rows(label), float(np.median(real[train.rows(label)]))
        through = rows[of_made[rows] >= threshold]
        wanted = len(through) if config.count is None else min(config.count, len(through))
        if config.rule == "random":
            kept = np.random.default_rng([config.seed, label]).permutation(rows)[:wanted]
        else:
            first = int(of_made[through].argmax()) if wanted else 0
            kept = through[farthest_points(standard.unit(made.cls[through]), first, wanted)]
        code = made.classes.codes[label]
        picked[code] = kept.tolist()
        found_of[code] = {"threshold": round(threshold, 6), "passed": len(through), "kept": len(kept)}
        print(
            f"{code}: {len(through):,} of {len(rows):,} images have p({code}) of at least {threshold:.3f}, the median "
            f"of real ones; {len(kept):,} kept{' (fewer than asked for)' if len(kept) < (config.count or 0) else ''}"
        )
    if not any(picked.values()):
        raise DataError(f"generated: no image of {source} is as much of its class as half of the real images are")
    record |= {"classes": found_of}
    _write(output, source, record, manifest.append_column("pick_probability", pa.array(of_made)), made, picked)
    print(f"{sum(map(len, picked.values())):,} images picked ({config.rule}) in {output}")
    return output


def class_probabilities(
    train: FeatureSet, generated: FeatureSet, *, c: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The probability of its own class for each real image and for each generated one: float64 [N], [M].

    Probes of three lesion-grouped folds, every class weighing the same. A real image is asked of the probe that has not
    seen its lesion, a variation of a training lesion likewise, any other generated image of all three: their mean.
    Raises Unanswerable where the lesions are too few for it.
    """
    folds = lesion_folds(train.labels, train.groups, FOLDS, seed)
    if not folds:
        raise Unanswerable(f"{len(train)} training images are too few for {FOLDS} folds of lesions; give more")
    size = len(train.classes)
    real, summed, asked = np.zeros(len(train)), np.zeros(len(generated)), np.zeros(len(generated))
    for fitted, held in folds:
        probe = LinearProbe.fit(train.cls[fitted], train.labels[fitted], c=c)
        real[held] = probe.probabilities(train.cls[held], size)[np.arange(len(held)), train.labels[held]]
        unseen = np.flatnonzero(~np.isin(generated.groups, train.groups[fitted]))
        if len(unseen):
            summed[unseen] += probe.probabilities(generated.cls[unseen], size)[
                np.arange(len(unseen)), generated.labels[unseen]
            ]
            asked[unseen] += 1
    return real, summed / asked


def farthest_points(points: Tensor, first: int, count: int) -> list[int]:
    """`count` rows, each the farthest from those before it; of equals the first.

    points: float32 [n, D], at length 1; distance: 1 - cosine. Within a factor of 2 of the widest spread (Gonzalez,
    Theoretical Computer Science 38, 1985).
    """
    chosen = [first] * min(count, 1)
    nearest = 1 - points @ points[first] if chosen else points[:0, 0]
    while len(chosen) < count:
        nearest[chosen[-1]] = -1  # an image that stands twice is as near as itself
        chosen.append(int(nearest.argmax()))
        nearest = nearest.minimum(1 - points @ points[chosen[-1]])
    return chosen


def _manifest(source: Path, generated: ImageSet) -> pa.Table:
    """Its row of each image, in their order."""
    try:
        manifest = pq.read_table(source / MANIFEST_NAME)
        own = dict(zip(zip(manifest["path"].to_pylist(), manifest["sha256"].to_pylist()), range(len(manifest))))
        manifest.select(["id"])
    except FileNotFoundError:
        raise DataError(
            f"generated: {source} has no {MANIFEST_NAME}, so it is no set of generate's; name the folder of a finished "
            "run of generate"
        ) from None
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            f"generated: {source / MANIFEST_NAME} cannot be read ({one_line(error)}); name the folder of a "
            "finished run of generate"
        ) from None
    paths = [Path(path).relative_to(source).as_posix() for path in generated.paths]
    rows = [own.get(image) for image in zip(paths, generated.sha256, strict=True)]
    if None in rows:
        wrong = source / paths[rows.index(None)]
        raise DataError(f"generated: {wrong} is not what {MANIFEST_NAME} says; run generate again")
    earlier = [name for name in manifest.column_names if name.startswith("pick_")]  # of a pick that is picked from
    return manifest.drop_columns(earlier).take(rows)


def _digest(lines: tuple[str, ...] | list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_done(output: Path, record: Mapping[str, Any]) -> bool:
    """Whether this pick is there; raises ConfigError for anything else that is."""
    if not output.exists():
        return False
    by = picked_by(str(output))
    if not by or any(by[-1].get(name) != value for name, value in record.items()):
        raise ConfigError(f"output: {output} is there already and holds other images; name another --output")
    return True


def _write(
    output: Path,
    source: Path,
    record: dict[str, Any],
    manifest: pa.Table,
    made: FeatureSet,
    picked: Mapping[str, list[int]],
) -> None:
    """The whole folder or nothing: images, their rows of the manifest, contact sheet, record."""
    kept = [(row, order) for rows in picked.values() for order, row in enumerate(rows)]
    rows = manifest.take([row for row, _ in kept])
    rows = rows.append_column("pick_order", pa.array([order for _, order in kept]))
    rows = rows.append_column("pick_rule", pa.array([record["rule"]] * len(kept))).sort_by("id")
    sheet = contact_sheet(
        {code: made.pixels[rows[:_SHOWN]] for code, rows in picked.items() if rows},
        title=f"Picked synthetic images ({record['rule']})",
        caption=f"Of {source.name}, by {record['extractor']}. {what_they_are(manifest)}.",
        totals={code: len(rows) for code, rows in picked.items()},
        classes=made.classes,
    )
    before = record_of(str(source))
    document = {"recipe": before.get("recipe", before), "pick": [*before.get("pick", []), record]}
    partial = output.with_name(f".{output.name}{PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for path in rows["path"].to_pylist():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, partial / path)
        if (source / CERTIFICATES_NAME).exists():
            shutil.copyfile(source / CERTIFICATES_NAME, partial / CERTIFICATES_NAME)
        if "lesion_id" in rows.column_names:
            lesions = rows.select(["id", "lesion_id"]).rename_columns(["image", "lesion_id"])
            pa_csv.write_csv(lesions, partial / LESIONS_NAME)
        pq.write_table(rows, partial / MANIFEST_NAME)
        sheet.save(partial / CONTACT_SHEET)
        (partial / RECORD_NAME).write_text(json.dumps(document, sort_keys=True) + "\n", encoding="utf-8")
        partial.rename(output)
    except OSError as error:
        raise cannot_write(output, error) from None
