"""The plan of a generation run: one table, one row per image, all that shapes it but the checkpoint.

Built here from counts, from input images or from the counts of a dataset, written as Parquet, read back after a person
has edited it. Knows neither networks nor pixels; writing tasks import it, so it imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from m2d.classes import ISIC7, NAMED, ClassSet
from m2d.data.catalog import catalog_hash, class_counts, classes_of, read_catalog, scan_dataset
from m2d.data.settings import DataConfig
from m2d.data.store import prepared_folder, reusable_catalog
from m2d.diffusion.settings import SOLVERS, SamplingSettings, Solver
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.files.paths import refuse_credentials
from m2d.files.progress import progress, say
from m2d.files.storage import inside, one_line
from m2d.generation.references import MASK_SUFFIX, Mask, Reference, read_masks, read_references, read_sha256
from m2d.generation.settings import Feature, GenerateConfig, parse_strength, parse_target

if TYPE_CHECKING:
    from m2d.models.checkpoint import CheckpointInfo

Mode = Literal["standard", "image2image", "interpolate"]
ByClass = Mapping[str, Sequence[Reference]]  # input images by class code, none without
_SHOWN_REJECTED = 10
_MOST_ROWS = 5_000_000  # of a plan, which takes about 1 KB of memory each
_STRENGTH_STEP = 0.05  # between strengths that are drawn, for images of one strength share batches
_FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
# Shares of the picture: a lesion that is pasted, and one that is covered, may have so much, so that skin is left.
_LARGEST_PASTED, _LARGEST_COVERED = 0.6, 0.3


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One image asked for. Two rows that differ in id, index, attempt and lesions alone are the same image."""

    id: str  # MEL_000003, MEL_pair000_02: unique, the stem of the image's file
    label: str  # class code; the column is called `class`
    index: int  # number within the class
    attempt: int = 0  # rejected images that came before this one
    seed: int  # of the latent noise
    seed_b: int | None = None  # interpolate: noise of the second reference
    mode: Mode = "standard"
    reference: str | None = None  # absolute path or URI of the input image
    reference_b: str | None = None  # interpolate: the second one; image2image: whose skin the lesion is pasted into
    position: float | None = None  # interpolate: 0 at reference, 1 at reference_b
    strength: float | None = None  # image2image: 0 is the reconstruction, 1 is all noise
    # interpolate: the strip that the image is part of, MEL_pair000; image2image: the training lesion that it varies
    group: str | None = None
    feature: Feature = "none"  # drawn from the prior, none, or the reference's own
    feature_temperature: float | None = None  # with prior
    solver: Solver
    steps: int  # from all noise; image2image takes round(strength * steps) of them, at least one
    guidance_scale: float
    guidance_low: float
    guidance_high: float
    # Left out of the files where no row has one, as by an earlier M2D. All of image2image.
    mask: str | None = None  # of the reference's lesion: the rest keeps its latents
    mask_b: str | None = None  # of reference_b's, which is covered
    skin_lesion_id: str | None = None  # reference_b's
    view: int | None = None  # strength 0: no model, the reference itself in this view of the square (m2d.data.views)


def _arrow_type(hint: Any) -> pa.DataType:
    kinds = {int: pa.int64(), float: pa.float64()}
    return next((arrow for kind, arrow in kinds.items() if kind in (hint, *get_args(hint))), pa.string())


_HINTS = get_type_hints(PlanRow)
_COLUMN_OF = {name: "class" if name == "label" else name for name in _HINTS}
PLAN_SCHEMA = pa.schema([(_COLUMN_OF[name], _arrow_type(hint)) for name, hint in _HINTS.items()])
_FILES = ("reference", "reference_b", "mask", "mask_b")
_SELDOM = ("mask", "mask_b", "skin_lesion_id", "view")


def without_seldom(table: pa.Table) -> pa.Table:
    """A table as it is written: without the columns of PlanRow that few plans have, where it has none of theirs."""
    empty = [name for name in _SELDOM if name in table.column_names and table[name].null_count == len(table)]
    return table.drop_columns(empty)


def with_seldom(table: pa.Table) -> pa.Table:
    """The inverse, empty columns at the end."""
    for name in _SELDOM:
        if name not in table.column_names:
            field = PLAN_SCHEMA.field(name)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def rows_of(table: pa.Table) -> list[PlanRow]:
    """The rows of a plan, or of any table that has its columns; meant for batches, not for a million."""
    columns = [table[column].to_pylist() for column in _COLUMN_OF.values()]
    return [PlanRow(**dict(zip(_COLUMN_OF, values, strict=True))) for values in zip(*columns, strict=True)]


def table_of(rows: Sequence[PlanRow]) -> pa.Table:
    """The inverse of `rows_of`: PLAN_SCHEMA."""
    columns = {column: [getattr(row, name) for row in rows] for name, column in _COLUMN_OF.items()}
    return pa.table(columns, schema=PLAN_SCHEMA)


def seed_of(text: str) -> int:
    """The first 63 bits of the SHA-256 of a text: the same on every machine, batch size and Python version.

    RUN/CLASS/INDEX is an image's. RUN/CLASS/reference/SHA256 is that of an input image's own sample: neither its
    number, as another file would shift it, nor its name, as two folders often use the same. SEED/attempt/K replaces a
    rejected one. SEED/feature draws the feature: with numbers in common, latents and feature would be correlated as no
    model has seen them.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def retried(row: PlanRow) -> PlanRow:
    """The row that replaces a rejected one: the same id, the next attempt, other noise."""
    attempt = row.attempt + 1
    seed_b = None if row.seed_b is None else seed_of(f"{row.seed_b}/attempt/{attempt}")
    return replace(row, attempt=attempt, seed=seed_of(f"{row.seed}/attempt/{attempt}"), seed_b=seed_b)


@dataclass(frozen=True)
class Planned:
    """A plan, and what of it the recipe must hold besides the settings."""

    table: pa.Table
    digest: str | None = None  # of the rows, where they come from input images or a file
    balance: dict[str, Any] | None = None
    before: dict[str, int] | None = None  # real images by class, where a dataset is balanced

    @property
    def classes(self) -> list[str]:
        """Codes of the classes that have rows, in the order of the plan."""
        return self.table["class"].unique().to_pylist()

    @property
    def lesions(self) -> set[str]:
        """Training lesions that rows vary, and those whose skin they take."""
        varied = self.table.filter(pc.equal(self.table["mode"], "image2image"))
        return {
            lesion for name in ("group", "skin_lesion_id") for lesion in varied[name].unique().to_pylist() if lesion
        }

    @property
    def features(self) -> set[str]:
        """prior, none, reference: which of them rows are guided by."""
        return set(self.table["feature"].unique().to_pylist())


def make_plan(
    config: GenerateConfig,
    feature: Feature,
    catalog: pa.Table | None,
    known: ClassSet,
    training: tuple[pa.Table, str] | None = None,
) -> Planned:
    """The run's plan. feature: decided, never None. catalog: of the dataset that mode balance counts. known: classes.

    training: catalog rows and root of the training images, for balance_from real. Raises ConfigError or DataError, in
    one line, where there is nothing to make one from.
    """
    if config.plan is not None:
        table = read_plan(config.plan, known)
        paths = {path for name in _FILES for path in table[name].to_pylist() if path is not None}
        return Planned(table, digest_of(table, read_sha256(paths)))
    classes = config.class_codes(known) if config.classes is not None else None

    def references(setting: str) -> ByClass:
        found = read_references(getattr(config, setting), classes=classes, known=known, setting=setting)
        _say_rejected(setting, found.rejected)
        return found.by_class

    starts: list[ByClass] = []
    counts: Mapping[str, int] = {}  # walks count for themselves
    before = counted = None
    if config.mode == "image2image":
        starts = [references("init_images")]
        if config.masks is not None:
            starts = [masked_references(config.masks, *starts)]
        counts = dict.fromkeys(starts[0], config.num_samples)
    elif config.mode == "interpolate":
        starts = [references("reference_images"), references("reference_images_b")]
    elif config.mode == "balance":
        before = class_counts(catalog, None if config.balance_split == "all" else config.balance_split)
        counted = {"to": config.to, "split": config.balance_split, "catalog": catalog_hash(catalog)[:12]}
        counts = targets(before, config.to, classes)
        _require_rows("to", sum(counts.values()))  # each needs an input image first
        if training is not None:
            counted["from"] = config.balance_from
            if config.masks is None:
                starts = [training_references(*training, counts, run_seed=config.seed)]
            else:
                alone = config.balance_from == "flips"
                starts = [pasted_references(*training, config.masks, counts, run_seed=config.seed, alone=alone)]
    else:
        counts = dict.fromkeys(config.class_codes(known), config.num_samples)
    table = plan_of(config, feature, counts, starts)
    sums = sums_of(starts)
    return Planned(table, digest_of(table, sums) if sums else None, counted, before)


def plan_of(config: GenerateConfig, feature: Feature, counts: Mapping[str, int], starts: Sequence[ByClass]) -> pa.Table:
    """The rows that a mode has.

    feature: decided, never None. counts: images of each class. starts: the images that others start from, both ends of
    walks, or none.
    """
    shared: dict[str, Any] = {"run_seed": config.seed, "sampling": config}
    if config.mode == "interpolate":
        return interpolation_plan(*starts, steps_between=config.steps_between, **shared)
    shared |= {"feature": feature, "feature_temperature": config.feature_temperature}
    if not starts:
        return standard_plan(counts, **shared)
    flips = config.balance_from == "flips"
    table = image2image_plan(*starts, num_samples=counts, strength=0 if flips else config.strength, **shared)
    return _in_views(table) if flips else table


def targets(counts: Mapping[str, int], to: str, classes: Iterable[str] | None = None) -> dict[str, int]:
    """Images to make of each class, in the order of counts; 0 where it has enough, for no class is made smaller.

    counts: real images by class code. to: see `parse_target`; the largest class is one of all, asked for or not, and a
    share of it is rounded to the nearest image. classes: those to fill up; None: those that have a real image (nothing
    can be learnt of one that has none, but it can be named). Raises ConfigError for a wrong `to`, DataError where there
    is no image at all.
    """
    if not any(counts.values()):
        raise DataError("balance: the dataset holds no image of any class, so there is nothing to balance")
    asked = [code for code, count in counts.items() if count > 0] if classes is None else classes
    target = parse_target(to)
    wanted = target if isinstance(target, int) else int(target * max(counts.values()) + 0.5)
    return {code: max(0, wanted - counts.get(code, 0)) for code in counts if code in asked}


def dataset_catalog(config: GenerateConfig, info: CheckpointInfo) -> pa.Table | None:
    """The catalog that --catalog names, or of --data_root: setup_data's where it still holds, or a scan's.

    It is split as the checkpoint's run splits. None where neither is given. Raises DataError.
    """
    if config.catalog is not None:
        catalog = read_catalog(config.catalog)
        if (found := classes_of(catalog).codes) != info.classes.codes:
            raise DataError(
                f"catalog: {config.catalog} is of the classes {' '.join(found)}, the checkpoint of "
                f"{' '.join(info.classes.codes)}; name a catalog of the same classes"
            )
        return catalog
    if config.data_root is None:
        return None
    data_config, cache_dir = data_config_of(info), info.config.get("cache_dir")
    if cache_dir is not None and Path(cache_dir).is_dir():
        kept = reusable_catalog(prepared_folder(cache_dir, config.data_root), config.data_root, data_config)
        if kept is not None and classes_of(kept) == info.classes:
            return kept
    with progress("scan") as report:
        scan = scan_dataset(config.data_root, data_config, report.show, info.classes)
    _say_rejected("data_root", [(row["path"], row["reason"]) for row in scan.rejected.to_pylist()])
    return scan.catalog


def data_config_of(info: CheckpointInfo) -> DataConfig:
    """How the checkpoint's run found and split its images; the default for a setting that it does not say.

    Raises CheckpointError where this M2D cannot do so: another split would pass training images off as unseen.
    """
    known = {field.name for field in fields(DataConfig)}  # of another version of M2D there may be others
    recorded = {name: value for name, value in (info.config.get("data") or {}).items() if name in known}
    if recorded.get("classes") not in (None, "folders", *NAMED):
        recorded["classes"] = None  # a file of another machine; the checkpoint has its classes
    try:
        return DataConfig(**recorded)
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint: it was trained with settings that this M2D does not take ({error}); use the version that "
            "wrote it"
        ) from None


def standard_plan(
    counts: Mapping[str, int],
    *,
    run_seed: int,
    sampling: SamplingSettings,
    feature: Feature,
    feature_temperature: float = 1.0,
) -> pa.Table:
    """counts[code] images of each class.

    An image's seed is that of its run, class and index, so a longer plan begins with the images of a shorter one.
    Classes take turns while they last, so that an interrupted run has as many of each.
    """
    if feature != "prior" and feature_temperature != 1:
        raise ConfigError(
            f"feature_temperature is {feature_temperature}, but no feature is drawn (feature {feature}); leave it out"
        )
    _require_rows("num_samples", sum(counts.values()))
    turns = _turns(counts)
    shared = {
        **_shared(sampling),
        "mode": "standard",
        "feature": feature,
        "feature_temperature": float(feature_temperature) if feature == "prior" else None,
        "attempt": 0,
    }
    columns = {
        **{name: [shared.get(name)] * len(turns) for name in PLAN_SCHEMA.names},
        "id": [f"{code}_{index:06d}" for code, index in turns],
        "class": [code for code, _ in turns],
        "index": [index for _, index in turns],
        "seed": [seed_of(f"{run_seed}/{code}/{index}") for code, index in turns],
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


def image2image_plan(
    references: ByClass,
    *,
    num_samples: int | Mapping[str, int],
    strength: float | str,
    feature: Feature = "reference",
    **drawn: Any,
) -> pa.Table:
    """num_samples images for each class of `references` (see References.by_class), or so many of each class.

    Image i of a class starts from its reference i mod n, so beyond n the same references come again, with other noise.
    Seeds and the arguments `drawn` are standard_plan's: at strength 1 with feature prior or none, so are the images.
    strength: see `parse_strength`. Of a range each image's seed draws a multiple of _STRENGTH_STEP above its low end,
    and rows of one strength follow each other, for a batch has one.
    """
    counts = num_samples if isinstance(num_samples, Mapping) else dict.fromkeys(references, num_samples)
    plan = standard_plan(counts, feature=feature, **drawn)
    places = zip(plan["class"].to_pylist(), plan["index"].to_pylist(), strict=True)
    parents = [references[code][index % len(references[code])] for code, index in places]
    low, high = parse_strength(strength)
    steps = int((high - low) / _STRENGTH_STEP + 1e-6)
    strengths = [low, *(round(low + _STRENGTH_STEP * step, 6) for step in range(1, steps + 1))]
    masks, skins = [parent.mask for parent in parents], [parent.skin for parent in parents]
    columns = {
        **dict(zip(plan.column_names, plan.columns, strict=True)),
        "mode": ["image2image"] * len(plan),
        "reference": [parent.path for parent in parents],
        "reference_b": [skin and skin.path for skin in skins],
        "mask": [mask and mask.path for mask in masks],
        "mask_b": [skin and skin.mask and skin.mask.path for skin in skins],
        "skin_lesion_id": [skin and skin.lesion_id for skin in skins],
        "strength": [strengths[seed_of(f"{seed}/strength") % len(strengths)] for seed in plan["seed"].to_pylist()],
        "group": [parent.lesion_id for parent in parents],
    }
    return pa.table(columns, schema=PLAN_SCHEMA).sort_by("strength")


def _in_views(plan: pa.Table) -> pa.Table:
    """Each use of an image in another of the seven flips and turns, as long as there are some; its seed draws which."""
    first, uses = dict[str, int](), Counter[str]()
    views = []
    for path, seed in zip(plan["reference"].to_pylist(), plan["seed"].to_pylist(), strict=True):
        views.append(1 + (first.setdefault(path, seed) + uses[path]) % 7)
        uses[path] += 1
    return plan.set_column(plan.schema.get_field_index("view"), PLAN_SCHEMA.field("view"), pa.array(views, pa.int64()))


def training_references(
    images: pa.Table, root: str, counts: Mapping[str, int], *, run_seed: int, what: str = "training image"
) -> dict[str, tuple[Reference, ...]]:
    """The training image that each of counts[code] variations starts from, spread evenly over lesions.

    images: catalog rows, all of the training split; root: the folder or URI that they are in. Lesions come in an order
    that the seed shuffles, and again in the same order; a lesion's images take turns likewise. Raises DataError where
    a class has no training image, ConfigError for a URI with a key in it.
    """
    refuse_credentials("data_root", root)  # each image's place goes into plan, manifest and image
    of_class: dict[str, dict[str, list[Reference]]] = {code: {} for code, count in counts.items() if count}
    columns = (images[name].to_pylist() for name in ("path", "label", "lesion_id", "sha256"))

    def shuffled(row: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(seed_of(f"{run_seed}/parent/{name}") for name in row[2:])

    for path, code, lesion, sha256 in sorted(zip(*columns, strict=True), key=shuffled):
        if code in of_class:
            parent = Reference(path=_place(root, path), label=code, sha256=sha256, lesion_id=lesion)
            of_class[code].setdefault(lesion, []).append(parent)
    if lacking := [code for code, lesions in of_class.items() if not lesions]:
        raise DataError(
            f"balance_from: no {what} of {' '.join(lacking)} in {root}, so there is nothing to vary; leave "
            "them out with --classes"
        )
    chosen: dict[str, tuple[Reference, ...]] = {}
    for code, by_lesion in of_class.items():
        lesions = list(by_lesion.values())
        turns = (divmod(number, len(lesions)) for number in range(counts[code]))
        chosen[code] = tuple(lesions[place][turn % len(lesions[place])] for turn, place in turns)
    return chosen


def masked_references(folder: str, references: ByClass) -> dict[str, tuple[Reference, ...]]:
    """Those that have a mask in a folder, with it. Raises DataError where a class has none."""
    masks = read_masks(folder, [(one.path, one.sha256, None) for found in references.values() for one in found])
    masked = {
        code: tuple(replace(one, mask=masks[one.sha256]) for one in found if one.sha256 in masks)
        for code, found in references.items()
    }
    if lacking := [code for code, found in masked.items() if not found]:
        raise DataError(
            f"masks: {folder} has no usable NAME{MASK_SUFFIX} of any image of {' '.join(lacking)}; leave them out with "
            "--classes"
        )
    return masked


def pasted_references(
    images: pa.Table, root: str, folder: str, counts: Mapping[str, int], *, run_seed: int, alone: bool = False
) -> dict[str, tuple[Reference, ...]]:
    """As training_references, of lesions with a mask in a folder, each with the skin that it is pasted into.

    Skins are training images of lesions that are not varied themselves. Each goes to one varied lesion alone, so that a
    split by varied lesions divides no skin; variations take turns to get one while there are some, and then the skins
    of their lesion again. alone: without skins. Raises DataError also where there are fewer than varied lesions.
    """
    rows = images.select(("path", "label", "lesion_id", "sha256", "width", "height")).to_pylist()
    measured = [(row["path"], row["sha256"], row["width"] / row["height"]) for row in rows]
    masks = read_masks(folder, measured, what="training image", largest=_LARGEST_PASTED)
    fits = [row["sha256"] in masks for row in rows]
    what = f"training image with a mask of at most {_LARGEST_PASTED:.0%} of the picture"
    parents = training_references(images.filter(pa.array(fits, pa.bool_())), root, counts, run_seed=run_seed, what=what)
    if alone:
        return parents
    uses = Counter[str | None]()
    turns: list[tuple[int, Reference]] = []
    for parent in (one for found in parents.values() for one in found):
        turns.append((uses[parent.lesion_id], replace(parent, mask=masks[parent.sha256])))
        uses[parent.lesion_id] += 1
    skins = _skins([row for row in rows if row["lesion_id"] not in uses], root, masks, run_seed)
    if len(skins) < len(uses):
        raise DataError(
            f"masks: {len(uses):,} lesions are varied and only {len(skins):,} others have a mask of at most "
            f"{_LARGEST_COVERED:.0%} of the picture, so there is too little skin; ask for fewer images or --classes"
        )
    dealt: dict[str | None, list[Reference]] = {}
    for (_, parent), skin in zip(sorted(turns, key=itemgetter(0)), skins, strict=False):
        dealt.setdefault(parent.lesion_id, []).append(skin)
    pasted: dict[str, tuple[Reference, ...]] = {}
    for use, parent in turns:
        own = dealt[parent.lesion_id]
        pasted[parent.label] = (*pasted.get(parent.label, ()), replace(parent, skin=own[use % len(own)]))
    return pasted


def _skins(rows: Sequence[dict[str, Any]], root: str, masks: Mapping[str, Mask], run_seed: int) -> list[Reference]:
    """One image of each of these lesions that leaves skin around it, in an order that the seed shuffles."""
    found: dict[str, Reference] = {}
    for row in sorted(rows, key=lambda row: seed_of(f"{run_seed}/skin/{row['lesion_id']}/{row['sha256']}")):
        mask = masks.get(row["sha256"])
        if mask is not None and mask.share <= _LARGEST_COVERED:
            own = {name: row[name] for name in ("label", "sha256", "lesion_id")}
            found.setdefault(row["lesion_id"], Reference(path=_place(root, row["path"]), mask=mask, **own))
    return list(found.values())


def _place(root: str, path: str) -> str:
    return inside(root, path) if "://" in root else os.path.join(root, path)


def interpolation_plan(
    references: ByClass,
    references_b: ByClass,
    *,
    steps_between: int,
    run_seed: int,
    sampling: SamplingSettings,
) -> pa.Table:
    """For each pair of references of one class, its two ends and steps_between images in between.

    Pair i is reference i of one folder with reference i of the other, by file names; of two unequal numbers the smaller
    starts again, so one image may be paired with many, in each with the same sample of its own. Ids are
    CLASS_pairIII_PP, PP from 00 (reference) to steps_between + 1 (reference_b). Whole pairs take turns over the
    classes. Raises ConfigError where a class has references in one folder alone.
    """
    for code in dict.fromkeys([*references, *references_b]):
        if bool(references.get(code)) != bool(references_b.get(code)):
            lacking = "reference_images_b" if references.get(code) else "reference_images"
            raise ConfigError(
                f"{lacking} holds no usable image of {code}, the other folder does; both ends of a pair are of one "
                "class, so add some, or leave the class out with --classes"
            )
    rows: list[dict[str, Any]] = []
    pairs = {code: max(len(found), len(references_b[code])) for code, found in references.items()}
    _require_rows("steps_between", sum(pairs.values()) * (steps_between + 2))
    for label, pair in _turns(pairs):
        a, b = (found[label][pair % len(found[label])] for found in (references, references_b))
        walk = {
            **_shared(sampling),
            "class": label,
            "attempt": 0,
            "seed": seed_of(f"{run_seed}/{label}/reference/{a.sha256}"),
            "seed_b": seed_of(f"{run_seed}/{label}/reference/{b.sha256}"),
            "mode": "interpolate",
            "reference": a.path,
            "reference_b": b.path,
            "group": f"{label}_pair{pair:03d}",
            "feature": "reference",
        }
        for number in range(steps_between + 2):
            index, position = pair * (steps_between + 2) + number, number / (steps_between + 1)
            rows.append({**walk, "id": f"{walk['group']}_{number:02d}", "index": index, "position": position})
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def _require_rows(setting: str, rows: int) -> None:
    """Raise ConfigError for a plan of more than would fit into memory. setting: what asks for them."""
    if rows > _MOST_ROWS:
        raise ConfigError(
            f"{setting}: a plan of {rows:,} images is more than the {_MOST_ROWS:,} that one may have; make fewer, or "
            "several runs, each with its own --seed"
        )


def _shared(sampling: SamplingSettings) -> dict[str, Any]:
    """The columns of the solver."""
    return {
        "solver": sampling.solver,
        "steps": sampling.steps,
        "guidance_scale": float(sampling.guidance_scale),
        "guidance_low": float(sampling.guidance_interval[0]),
        "guidance_high": float(sampling.guidance_interval[1]),
    }


def _turns(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """(class, number), the classes in turns while they last."""
    return [(code, turn) for turn in range(max(counts.values(), default=0)) for code in counts if turn < counts[code]]


def read_plan(path: str | Path, class_set: ClassSet = ISIC7) -> pa.Table:
    """Read a plan that may have been edited; PLAN_SCHEMA, every row checked, at least one.

    Column order, an index that pandas added and narrower or wider types do not matter. Raises ConfigError, in one line,
    for a file that is no plan, and for the first row that cannot be generated.
    """
    try:
        _require_rows("plan", pq.read_metadata(str(path)).num_rows)
        table = pq.read_table(str(path), partitioning=None)
    except FileNotFoundError:
        raise ConfigError(f"plan: {path} does not exist; write one with --plan_only") from None
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"plan: {path} is no Parquet file ({one_line(error)}); write one with --plan_only") from None
    names, known = [name for name in table.column_names if not name.startswith("__index_level_")], PLAN_SCHEMA.names
    for what, one, other in (("lacks", known, [*names, *_SELDOM]), ("has unknown", names, known)):
        if set(one) - set(other):
            listed = " ".join(sorted(set(one) - set(other)))
            raise ConfigError(f"plan: {path} {what} columns {listed}; a plan has {' '.join(known)}")
    table = with_seldom(table)
    plan = pa.table([_typed(table[field.name].combine_chunks(), field, path) for field in PLAN_SCHEMA], PLAN_SCHEMA)
    check_plan(plan, f"plan: {path}", class_set.codes)
    return plan


def _typed(column: pa.Array, field: pa.Field, path: str | Path) -> pa.Array:
    """A column in its plan's type, where no value is lost by that."""
    kind = column.type
    if field.name in ("seed", "seed_b") and pa.types.is_floating(kind) and column.null_count < len(column):
        keep = 'keep whole numbers (in pandas: read_parquet(..., dtype_backend="pyarrow"))'
        raise ConfigError(f"plan: {path} has {field.name} as {kind}, which has rounded the seeds; {keep}")
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    try:
        if not pa.types.is_null(kind) and number == pa.types.is_string(field.type):  # a cast would parse, or print
            raise pa.ArrowInvalid("numbers and text do not stand for each other")
        return column.cast(field.type)
    except pa.ArrowException as error:
        reason = one_line(error, 100)
        raise ConfigError(f"plan: {path} has {field.name} as {kind}; it must be {field.type} ({reason})") from None


def check_plan(plan: pa.Table, where: str = "plan", classes: Sequence[str] = ISIC7.codes) -> None:
    """Raise ConfigError, in one line, for a plan without rows or the first row with a value that cannot work."""
    if plan.num_rows == 0:
        raise ConfigError(f"{where} has no rows; there is nothing to generate")
    columns = {name: plan[name].combine_chunks() for name in PLAN_SCHEMA.names}

    def at_least(name: str, least: int) -> pa.Array:
        return pc.and_(pc.greater_equal(columns[name], least), pc.is_finite(columns[name]))

    def from_0_to_1(name: str) -> pa.Array:
        return pc.and_(pc.greater_equal(columns[name], 0), pc.less_equal(columns[name], 1))

    def matches(name: str, pattern: str) -> pa.Array:
        return pc.match_substring_regex(columns[name], pattern)

    image2image, walks = (pc.equal(columns["mode"], mode) for mode in ("image2image", "interpolate"))
    by_reference, by_prior = (pc.equal(columns["feature"], feature) for feature in ("reference", "prior"))
    known = {"class": classes, "mode": get_args(Mode), "feature": get_args(Feature), "solver": SOLVERS}
    ordered = pc.less_equal(columns["guidance_low"], columns["guidance_high"])
    safe_or_null = pc.or_kleene(matches("group", _FILE_NAME), pc.is_null(columns["group"]))
    rules: list[tuple[str, pa.Array, str]] = [
        ("id", matches("id", _FILE_NAME), "be a file name of letters, digits and . _ -"),
        ("group", pc.or_(safe_or_null, image2image), "be a file name of letters, digits and . _ -, or be empty"),
        *(
            (name, pc.is_in(columns[name], pa.array(ones)), f"be one of {' '.join(ones)}")
            for name, ones in known.items()
        ),
        *((name, at_least(name, 0), "be a whole number of at least 0") for name in ("index", "attempt", "seed")),
        ("steps", at_least("steps", 1), "be a whole number of at least 1"),
        ("feature", pc.or_(pc.invert(walks), by_reference), "be reference with mode interpolate"),
        ("guidance_scale", at_least("guidance_scale", 0), "be a number of at least 0 (1: off)"),
        *((name, from_0_to_1(name), "be in [0, 1]") for name in ("guidance_low", "guidance_high")),
        ("guidance_low", ordered, "be at most guidance_high"),
    ]
    walk, place = (walks, "with mode interpolate"), r"^(/|[a-zA-Z][a-zA-Z0-9+.-]+://)."
    image = (pc.or_(pc.or_(image2image, walks), by_reference), "with an input image (mode or feature)")
    prior = (by_prior, "with feature prior")
    pasted = pc.and_(image2image, pc.is_valid(columns["mask_b"]))
    masked = pc.and_(image2image, pc.or_(pasted, pc.is_valid(columns["mask"])))
    turned = pc.and_kleene(pc.invert(masked), pc.fill_null(pc.equal(columns["strength"], 0), False))
    turned = pc.and_(pc.and_(image2image, turned), pc.is_valid(columns["view"]))
    for name, ok, must, (wanted, when) in (
        ("reference", matches("reference", place), "be an absolute path", image),
        (
            "reference_b",
            matches("reference_b", place),
            "be an absolute path",
            (pc.or_(walks, pasted), f"{walk[1]} or a mask_b"),
        ),
        ("mask", matches("mask", place), "be an absolute path", (masked, "with mode image2image")),
        ("mask_b", matches("mask_b", place), "be an absolute path", (pasted, "with mode image2image")),
        ("skin_lesion_id", pc.is_valid(columns["skin_lesion_id"]), "be there", (pasted, "with a mask_b")),
        ("view", pc.less(pc.abs(columns["view"]), 8), "be from 0 to 7", (turned, "with strength 0 and no mask")),
        ("seed_b", at_least("seed_b", 0), "be at least 0", walk),
        ("position", from_0_to_1("position"), "be in [0, 1]", walk),
        ("strength", from_0_to_1("strength"), "be in [0, 1]", (image2image, "with mode image2image")),
        ("feature_temperature", at_least("feature_temperature", 0), "be a number of at least 0", prior),
    ):
        rules.append((name, pc.or_(pc.fill_null(ok, False), pc.invert(wanted)), f"{must} {when}"))
        rules.append((name, pc.or_(wanted, pc.is_null(columns[name])), f"be empty but {when}"))
    for name, ok, must in rules:
        row = pc.index(pc.fill_null(ok, False), False).as_py()
        if row >= 0:
            value, image = columns[name][row].as_py(), columns["id"][row].as_py()
            found = "nothing" if value is None else str(value)[:100]
            raise ConfigError(f"{where}: row {row} ({image}) has {name} {found!r}; it must {must}")
    counted = pc.value_counts(columns["id"])
    twice = counted.filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        raise ConfigError(
            f"{where} has {twice[0]['counts']} rows with id {twice[0]['values']}; every id must be its own"
        )


def sums_of(starts: Sequence[ByClass]) -> dict[str, str]:
    """The sha256 of every file that input images are made of, by its path."""
    images = [image for by_class in starts for images in by_class.values() for image in images]
    images += [image.skin for image in images if image.skin is not None]
    return {file.path: file.sha256 for image in images for file in (image, image.mask) if file is not None}


def _say_rejected(setting: str, rejected: Sequence[tuple[str, str]]) -> None:
    for path, reason in rejected[:_SHOWN_REJECTED]:
        say(f"{setting}: left out {path}: {reason}")
    if len(rejected) > _SHOWN_REJECTED:
        say(f"{setting}: left out {len(rejected):,} files in all")


def digest_of(table: pa.Table, sums: Mapping[str, str]) -> str:
    """SHA-256 over all rows, in any order, input images by their content and not by their place."""
    columns = without_seldom(table.select(PLAN_SCHEMA.names)).to_pydict()
    for name in [name for name in _FILES if name in columns]:
        columns[name] = [None if place is None else sums[place] for place in columns[name]]
    lines = sorted(repr(row) for row in zip(*columns.values(), strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
