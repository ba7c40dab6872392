"""The plan of a generation run: one table, one row per image, all that shapes it but the checkpoint.

Built here from counts, from input images or from the counts of a dataset, written as Parquet, read back after a person
has edited it. Knows neither networks nor pixels; writing tasks import it, so it imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from m2d.classes import CLASSES
from m2d.data.catalog import catalog_hash, class_counts, read_catalog, scan_dataset
from m2d.data.settings import DataConfig
from m2d.data.store import prepared_folder, reusable_catalog
from m2d.diffusion.settings import SOLVERS, SamplingSettings
from m2d.errors import ConfigError, DataError
from m2d.files.progress import progress, say
from m2d.files.storage import one_line
from m2d.generation.references import Reference, read_references, read_sha256
from m2d.generation.seeds import next_attempt_seed, reference_seed, sample_seed
from m2d.generation.settings import GenerateConfig, parse_target

if TYPE_CHECKING:
    from m2d.models.checkpoint import CheckpointInfo

Mode = Literal["standard", "image2image", "interpolate"]
GuidingFeature = Literal["prior", "none", "reference"]
_SHOWN_REJECTED = 10
_SAFE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One image asked for. Two rows that differ in id, index, attempt and group alone are the same image."""

    id: str  # MEL_000003, MEL_pair000_02: unique, the stem of the image's file
    label: str  # class code; the column is called `class`
    index: int  # number within the class
    attempt: int = 0  # rejected images that came before this one
    seed: int  # of the latent noise; a drawn feature has seeds.feature_seed(seed)
    seed_b: int | None = None  # interpolate: noise of the second reference
    mode: Mode = "standard"
    reference: str | None = None  # absolute path or URI of the input image
    reference_b: str | None = None  # interpolate: the second one
    position: float | None = None  # interpolate: 0 at reference, 1 at reference_b
    strength: float | None = None  # image2image: 0 is the reconstruction, 1 is all noise
    group: str | None = None  # interpolate: the strip that the image is part of, MEL_pair000
    feature: GuidingFeature = "none"  # drawn from the prior, none, or the reference's own
    feature_temperature: float | None = None  # with prior
    solver: str
    steps: int  # from all noise; image2image takes round(strength * steps) of them, at least one
    guidance_scale: float
    guidance_low: float
    guidance_high: float


def _arrow_type(hint: Any) -> pa.DataType:
    kinds = {int: pa.int64(), float: pa.float64()}
    return next((arrow for kind, arrow in kinds.items() if kind in (hint, *get_args(hint))), pa.string())


_HINTS = get_type_hints(PlanRow)
_COLUMN_OF = {name: "class" if name == "label" else name for name in _HINTS}
PLAN_SCHEMA = pa.schema([(_COLUMN_OF[name], _arrow_type(hint)) for name, hint in _HINTS.items()])


def rows_of(table: pa.Table) -> list[PlanRow]:
    """The rows of a plan, or of any table that has its columns; meant for batches, not for a million."""
    columns = [table[column].to_pylist() for column in _COLUMN_OF.values()]
    return [PlanRow(**dict(zip(_COLUMN_OF, values, strict=True))) for values in zip(*columns, strict=True)]


def table_of(rows: Iterable[PlanRow]) -> pa.Table:
    """The inverse of `rows_of`: PLAN_SCHEMA."""
    listed = list(rows)
    columns = {column: [getattr(row, name) for row in listed] for name, column in _COLUMN_OF.items()}
    return pa.table(columns, schema=PLAN_SCHEMA)


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
        return list(dict.fromkeys(self.table["class"].to_pylist()))

    @property
    def features(self) -> set[str]:
        """prior, none, reference: which of them rows are guided by."""
        return set(self.table["feature"].unique().to_pylist())


def make_plan(config: GenerateConfig, feature: GuidingFeature, catalog: pa.Table | None) -> Planned:
    """The run's plan. feature: decided, never None. catalog: of the dataset that mode balance counts.

    Raises ConfigError or DataError, in one line, where there is nothing to make one from.
    """
    if config.plan is not None:
        table = read_plan(config.plan)
        paths = {path for name in ("reference", "reference_b") for path in table[name].to_pylist() if path is not None}
        return Planned(table, _digest(table, read_sha256(paths)))
    classes = config.class_codes if config.classes is not None else None

    def references(setting: str) -> dict[str, tuple[Reference, ...]]:
        found = read_references(getattr(config, setting), classes=classes, setting=setting)
        _say_rejected(setting, found.rejected[:_SHOWN_REJECTED], len(found.rejected))
        sums.update({image.path: image.sha256 for images in found.by_class.values() for image in images})
        return found.by_class

    sums: dict[str, str] = {}
    shared: dict[str, Any] = {"run_seed": config.seed, "sampling": config}
    drawn: dict[str, Any] = {**shared, "feature": feature, "feature_temperature": config.feature_temperature}
    if config.mode == "image2image":
        chosen = references("init_images")
        table = image2image_plan(chosen, num_samples=config.num_samples, strength=config.strength, **drawn)
        return Planned(table, _digest(table, sums))
    if config.mode == "interpolate":
        a, b = references("reference_images"), references("reference_images_b")
        table = interpolation_plan(a, b, steps_between=config.steps_between, **shared)
        return Planned(table, _digest(table, sums))
    if config.mode == "balance":
        before = class_counts(catalog, None if config.balance_split == "all" else config.balance_split)
        counted = {"to": config.to, "split": config.balance_split, "catalog": catalog_hash(catalog)[:12]}
        table = standard_plan(targets(before, config.to, classes), **drawn)
        return Planned(table, balance=counted, before=before)
    return Planned(standard_plan(dict.fromkeys(config.class_codes, config.num_samples), **drawn))


def targets(counts: Mapping[str, int], to: str, classes: Iterable[str] | None = None) -> dict[str, int]:
    """Images to make of each class, in the order of CLASSES; 0 where it has enough, for no class is made smaller.

    counts: real images by class code. to: see `parse_target`; the largest class is one of all, asked for or not.
    classes: those to fill up, the others are left out of the answer; None takes the classes that have a real image
    (nothing can be learnt of one that has none, but it can be named).
    Raises ConfigError for a wrong `to`, DataError where there is no image at all.
    """
    if not any(counts.values()):
        raise DataError("balance: the dataset holds no image of any class, so there is nothing to balance")
    asked = {code for code, count in counts.items() if count > 0} if classes is None else set(classes)
    wanted = parse_target(to).resolve(max(counts.values()))
    return {code: max(0, wanted - counts.get(code, 0)) for code in CLASSES if code in asked}


def dataset_catalog(config: GenerateConfig, info: CheckpointInfo) -> pa.Table | None:
    """The catalog that --catalog names, or of --data_root: setup_data's where it still holds, or a scan's.

    It is split as the checkpoint's run splits. None where neither is given. Raises DataError.
    """
    if config.catalog is not None:
        return read_catalog(config.catalog)
    if config.data_root is None:
        return None
    data_config, cache_dir = data_config_of(info), info.config.get("cache_dir")
    if cache_dir is not None and Path(cache_dir).is_dir():
        kept = reusable_catalog(prepared_folder(cache_dir, config.data_root), config.data_root, data_config)
        if kept is not None:
            return kept
    with progress("scan") as report:
        scan = scan_dataset(config.data_root, data_config, report.show)
    shown = [(row["path"], row["reason"]) for row in scan.rejected.slice(0, _SHOWN_REJECTED).to_pylist()]
    _say_rejected("data_root", shown, len(scan.rejected))
    return scan.catalog


def data_config_of(info: CheckpointInfo) -> DataConfig:
    """How the checkpoint's run found and split its images; the defaults where it does not say."""
    recorded = info.config.get("data")
    try:
        return DataConfig(**recorded) if isinstance(recorded, dict) else DataConfig()
    except (TypeError, ConfigError):  # of another version of M2D
        return DataConfig()


def standard_plan(
    counts: Mapping[str, int],
    *,
    run_seed: int,
    sampling: SamplingSettings,
    feature: GuidingFeature,
    feature_temperature: float = 1.0,
) -> pa.Table:
    """counts[code] images of each class.

    Image i of class c has sample_seed(run_seed, c, i), so a longer plan begins with the images of a shorter one.
    Classes take turns while they last, so that an interrupted run has as many of each.
    """
    shared = _shared("standard", sampling, feature, feature_temperature)
    return _by_class(counts, run_seed, shared, lambda label, index: None)


def image2image_plan(
    references: Mapping[str, Sequence[Reference]],
    *,
    num_samples: int,
    strength: float,
    run_seed: int,
    sampling: SamplingSettings,
    feature: GuidingFeature = "reference",
    feature_temperature: float = 1.0,
) -> pa.Table:
    """num_samples images for each class of `references` (see References.by_class), at one strength in [0, 1].

    Image i of a class starts from its reference i mod n, so beyond n the same references come again, with other noise.
    The seeds are those of standard_plan: at strength 1 with feature prior or none, the images are its images.
    """
    shared = {**_shared("image2image", sampling, feature, feature_temperature), "strength": float(strength)}
    counts = dict.fromkeys(references, num_samples)
    return _by_class(
        counts, run_seed, shared, lambda label, index: references[label][index % len(references[label])].path
    )


def interpolation_plan(
    references: Mapping[str, Sequence[Reference]],
    references_b: Mapping[str, Sequence[Reference]],
    *,
    steps_between: int,
    run_seed: int,
    sampling: SamplingSettings,
) -> pa.Table:
    """For each pair of references of one class, its two ends and steps_between images in between.

    Pair i is reference i of one folder with reference i of the other, each folder in the order of its file names; of
    two unequal numbers the smaller starts again, so one image may be paired with many. Ids are CLASS_pairIII_PP, PP
    from 00 (reference) to steps_between + 1 (reference_b), and `group` is CLASS_pairIII. Noise is that of
    seeds.reference_seed, so that a reference's own sample is the same in every pair. Whole pairs take turns over the
    classes. Raises ConfigError where a class has references in one folder alone.
    """
    lonely = [code for code in CLASSES if bool(references.get(code)) != bool(references_b.get(code))]
    if lonely:
        lacking = "reference_images_b" if references.get(lonely[0]) else "reference_images"
        raise ConfigError(
            f"{lacking} holds no usable image of {lonely[0]}, the other folder does; both ends of a pair are of one "
            "class, so add some, or leave the class out with --classes"
        )
    pairs = {code: max(len(found), len(references_b[code])) for code, found in references.items()}
    shared = _shared("interpolate", sampling, "reference")
    rows: list[dict[str, Any]] = []
    for label, pair in _turns(pairs):
        a, b = (found[label][pair % len(found[label])] for found in (references, references_b))
        strip = {
            **shared,
            "class": label,
            "attempt": 0,
            "seed": reference_seed(run_seed, label, a.sha256),
            "seed_b": reference_seed(run_seed, label, b.sha256),
            "reference": a.path,
            "reference_b": b.path,
            "group": f"{label}_pair{pair:03d}",
        }
        rows += (
            {
                **strip,
                "id": f"{strip['group']}_{number:02d}",
                "index": pair * (steps_between + 2) + number,
                "position": number / (steps_between + 1),
            }
            for number in range(steps_between + 2)
        )
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def retried(row: PlanRow) -> PlanRow:
    """The row that replaces a rejected one: the same id, the next attempt, other noise.

    Each seed follows from the one before (seeds.next_attempt_seed), so attempt k follows from the plan's seed and k.
    image2image at strength 0 has no noise and stays what it is.
    """
    attempt = row.attempt + 1
    seed_b = None if row.seed_b is None else next_attempt_seed(row.seed_b, attempt)
    return replace(row, attempt=attempt, seed=next_attempt_seed(row.seed, attempt), seed_b=seed_b)


def read_plan(path: str | Path) -> pa.Table:
    """Read a plan that may have been edited; PLAN_SCHEMA, every row checked, at least one.

    Column order, an index that pandas added and narrower or wider types do not matter. Raises ConfigError, in one line,
    for a file that is no plan, and for the first row that cannot be generated.
    """
    try:
        table = pq.read_table(str(path), partitioning=None)
    except FileNotFoundError:
        raise ConfigError(f"plan: {path} does not exist; write one with --plan_only") from None
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"plan: {path} is no Parquet file ({one_line(error)}); write one with --plan_only") from None
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    missing = [name for name in PLAN_SCHEMA.names if name not in names]
    unknown = [name for name in names if name not in PLAN_SCHEMA.names]
    doubled = [name for name in PLAN_SCHEMA.names if names.count(name) > 1]
    for what, listed in (("lacks", missing), ("has unknown", unknown), ("has two or more of the", doubled)):
        if listed:
            raise ConfigError(
                f"plan: {path} {what} columns {' '.join(listed)}; a plan has {' '.join(PLAN_SCHEMA.names)}"
            )
    columns = [_typed(table[field.name].combine_chunks(), field, path) for field in PLAN_SCHEMA]
    plan = pa.table(columns, schema=PLAN_SCHEMA)
    check_plan(plan, f"plan: {path}")
    return plan


def check_plan(plan: pa.Table, where: str = "plan") -> None:
    """Raise ConfigError, in one line, for a plan without rows or the first row with a value that cannot work."""
    if plan.num_rows == 0:
        raise ConfigError(f"{where} has no rows; there is nothing to generate")
    columns = {name: plan[name].combine_chunks() for name in PLAN_SCHEMA.names}

    def require(column: str, ok: pa.Array, must: str) -> None:
        row = pc.index(pc.fill_null(ok, False), False).as_py()
        if row >= 0:
            value = columns[column][row].as_py()
            image = columns["id"][row].as_py()
            found = "nothing" if value is None else str(value)[:100]
            raise ConfigError(f"{where}: row {row} ({image}) has {column} {found!r}; it must {must}")

    def one_of(column: str, known: Sequence[str]) -> None:
        require(column, pc.is_in(columns[column], pa.array(known)), f"be one of {' '.join(known)}")

    def between(column: str, low: float, high: float) -> pa.Array:  # NaN is not
        return pc.and_(pc.greater_equal(columns[column], low), pc.less_equal(columns[column], high))

    def only_with(column: str, wanted: pa.Array, ok: pa.Array, must: str, where_wanted: str) -> None:
        """`ok` in the rows that take the column, nothing in the others."""
        require(column, pc.if_else(wanted, pc.fill_null(ok, False), True), f"{must} {where_wanted}")
        require(column, pc.or_(wanted, pc.is_null(columns[column])), f"be empty but {where_wanted}")

    file_name = "be a file name of letters, digits and . _ -"
    require("id", pc.match_substring_regex(columns["id"], _SAFE_ID), file_name)
    one_of("class", CLASSES)
    one_of("mode", get_args(Mode))
    one_of("feature", get_args(GuidingFeature))
    one_of("solver", SOLVERS)
    for name, least in {"index": 0, "attempt": 0, "seed": 0, "steps": 1}.items():
        require(name, pc.greater_equal(columns[name], least), f"be a whole number of at least {least}")
    image2image, interpolate = (pc.equal(columns["mode"], mode) for mode in ("image2image", "interpolate"))
    by_reference, by_prior = (pc.equal(columns["feature"], feature) for feature in ("reference", "prior"))
    require("feature", pc.or_(pc.invert(interpolate), by_reference), "be reference with mode interpolate")
    located = r"^(/|[a-zA-Z][a-zA-Z0-9+.-]+://)."
    path_a, path_b = (pc.match_substring_regex(columns[name], located) for name in ("reference", "reference_b"))
    with_input = pc.or_(pc.or_(image2image, interpolate), by_reference)
    only_with("reference", with_input, path_a, "be an absolute path", "with an input image (mode or feature)")
    only_with("reference_b", interpolate, path_b, "be an absolute path", "with mode interpolate")
    only_with("seed_b", interpolate, pc.greater_equal(columns["seed_b"], 0), "be at least 0", "with mode interpolate")
    only_with("position", interpolate, between("position", 0, 1), "be in [0, 1]", "with mode interpolate")
    only_with("strength", image2image, between("strength", 0, 1), "be in [0, 1]", "with mode image2image")
    finite = float(np.finfo(np.float64).max)
    warm = between("feature_temperature", 0, finite)
    only_with("feature_temperature", by_prior, warm, "be a number of at least 0", "with feature prior")
    require("guidance_scale", between("guidance_scale", 0, finite), "be a number of at least 0 (1: off)")
    require("guidance_low", between("guidance_low", 0, 1), "be in [0, 1]")
    require("guidance_high", between("guidance_high", 0, 1), "be in [0, 1]")
    ordered = pc.less_equal(columns["guidance_low"], columns["guidance_high"])
    require("guidance_low", ordered, "be at most guidance_high")
    group = columns["group"]
    safe = pc.or_(pc.is_null(group), pc.fill_null(pc.match_substring_regex(group, _SAFE_ID), False))
    require("group", safe, f"{file_name}, or be empty")
    if pc.count_distinct(columns["id"]).as_py() < plan.num_rows:
        counted = pc.value_counts(columns["id"])
        twice = counted.filter(pc.greater(counted.field("counts"), 1))[0].as_py()
        raise ConfigError(f"{where} has {twice['counts']} rows with id {twice['values']}; every id must be its own")


def _shared(
    mode: Mode, sampling: SamplingSettings, feature: GuidingFeature, feature_temperature: float = 1.0
) -> dict[str, Any]:
    """The columns that are the same in every row."""
    if feature != "prior" and feature_temperature != 1:
        raise ConfigError(
            f"feature_temperature is {feature_temperature}, but no feature is drawn (feature {feature}); leave it out"
        )
    low, high = sampling.guidance_interval
    return {
        "mode": mode,
        "feature": feature,
        "feature_temperature": float(feature_temperature) if feature == "prior" else None,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "guidance_scale": float(sampling.guidance_scale),
        "guidance_low": float(low),
        "guidance_high": float(high),
    }


def _by_class(
    counts: Mapping[str, int],
    run_seed: int,
    shared: Mapping[str, Any],
    reference: Callable[[str, int], str | None],
) -> pa.Table:
    """counts[code] rows of each class, in turns."""
    turns = _turns(counts)
    columns = {
        **{name: [shared.get(name)] * len(turns) for name in PLAN_SCHEMA.names},
        "id": [f"{code}_{index:06d}" for code, index in turns],
        "class": [code for code, _ in turns],
        "index": [index for _, index in turns],
        "attempt": [0] * len(turns),
        "seed": [sample_seed(run_seed, code, index) for code, index in turns],
        "reference": [reference(code, index) for code, index in turns],
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


def _turns(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """(class, number), the classes in turns while they last."""
    return [(code, turn) for turn in range(max(counts.values(), default=0)) for code in counts if turn < counts[code]]


def _typed(column: pa.Array, field: pa.Field, path: str | Path) -> pa.Array:
    """A column in its plan's type, where no value is lost by that."""
    kind = column.type
    if field.name in ("seed", "seed_b") and pa.types.is_floating(kind) and column.null_count < len(column):
        raise ConfigError(
            f"plan: {path} has {field.name} as {kind}, which has rounded the seeds; keep whole numbers (in pandas: "
            'read_parquet(..., dtype_backend="pyarrow"))'
        )
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    fits = text or pa.types.is_dictionary(kind) if pa.types.is_string(field.type) else number
    try:
        if not fits and not pa.types.is_null(kind):
            raise ConfigError(f"plan: {path} has {field.name} as {kind}; it must be {field.type}")
        return column.cast(field.type)
    except pa.ArrowException as error:
        reason = one_line(error, 100)
        raise ConfigError(f"plan: {path} has {field.name} as {kind}; it must be {field.type} ({reason})") from None


def _say_rejected(setting: str, shown: Iterable[tuple[str, str]], count: int) -> None:
    for path, reason in shown:
        say(f"{setting}: left out {path}: {reason}")
    if count > _SHOWN_REJECTED:
        say(f"{setting}: left out {count:,} files in all")


def _digest(table: pa.Table, sums: Mapping[str, str]) -> str:
    """SHA-256 over all rows, in any order, input images by their content and not by their place."""
    columns = [
        [None if value is None else sums[value] for value in table[name].to_pylist()]
        if name in ("reference", "reference_b")
        else table[name].to_pylist()
        for name in PLAN_SCHEMA.names
    ]
    lines = sorted(repr(row) for row in zip(*columns, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
