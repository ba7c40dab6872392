"""What a run is to make: from its settings, its input images, or the counts of a dataset, to a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from m2d.data.catalog import catalog_hash, read_catalog, scan_dataset
from m2d.data.prepared import prepared_folder, reusable_catalog
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError, DataError
from m2d.files.progress import progress, say
from m2d.files.storage import one_line, open_storage
from m2d.generation.balance import real_counts, targets
from m2d.generation.plan import (
    PLAN_SCHEMA,
    GuidingFeature,
    image2image_plan,
    interpolation_plan,
    read_plan,
    standard_plan,
)
from m2d.generation.references import References, read_references, require_references
from m2d.generation.settings import GenerateConfig

if TYPE_CHECKING:
    from m2d.models.checkpoint import CheckpointInfo

_SHOWN_REJECTED = 10


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
        require_references(paths)
        sums = {path: _file_sha256(path) for path in paths}
        return Planned(table, _digest(table, sums))
    drawn: dict[str, Any] = {
        "feature": feature,
        # The plan's functions refuse a temperature where nothing is drawn; what was asked for is told as it is.
        "feature_temperature": config.feature_temperature,
    }
    shared: dict[str, Any] = {"run_seed": config.seed, "sampling": config}
    if config.mode == "image2image":
        references = _references(config, "init_images")
        table = image2image_plan(
            references.by_class, num_samples=config.num_samples, strength=config.strength, **shared, **drawn
        )
        return Planned(table, _digest(table, _sums(references)))
    if config.mode == "interpolate":
        a, b = (_references(config, name) for name in ("reference_images", "reference_images_b"))
        table = interpolation_plan(a.by_class, b.by_class, steps_between=config.steps_between, **shared)
        return Planned(table, _digest(table, {**_sums(a), **_sums(b)}))
    if config.mode == "balance":
        assert catalog is not None, "mode balance was given no catalog"
        before = real_counts(catalog, config.balance_split)
        asked = config.class_codes if config.classes is not None else None
        wanted = targets(before, config.to, asked)
        table = standard_plan(wanted, **shared, **drawn)
        counted = {"to": config.to, "split": config.balance_split, "catalog": catalog_hash(catalog)[:12]}
        return Planned(table, balance=counted, before=before)
    table = standard_plan(dict.fromkeys(config.class_codes, config.num_samples), **shared, **drawn)
    return Planned(table)


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


def _references(config: GenerateConfig, setting: str) -> References:
    classes = config.class_codes if config.classes is not None else None
    references = read_references(getattr(config, setting), classes=classes, setting=setting)
    _say_rejected(setting, list(references.rejected[:_SHOWN_REJECTED]), len(references.rejected))
    return references


def _say_rejected(setting: str, shown: list[tuple[str, str]], count: int) -> None:
    for path, reason in shown:
        say(f"{setting}: left out {path}: {reason}")
    if count > len(shown):
        say(f"{setting}: left out {count:,} files in all")


def _sums(references: References) -> dict[str, str]:
    return {image.path: image.sha256 for found in references.by_class.values() for image in found}


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


def _file_sha256(path: str) -> str:
    filesystem, inner = open_storage(path)
    try:
        with filesystem.open_input_stream(inner, compression=None) as stream:
            return hashlib.sha256(stream.read()).hexdigest()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"plan: {path} cannot be read ({one_line(error)}); put it back") from None
