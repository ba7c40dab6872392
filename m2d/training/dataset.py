"""The driver's view of a run's data: its catalog, and what setup_data prepared of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from m2d.config import TrainConfig
from m2d.data.catalog import (
    Scan,
    catalog_hash,
    class_counts,
    read_catalog,
    scan_dataset,
    write_catalog,
    write_rejected,
)
from m2d.data.feature_store import FeatureStore
from m2d.data.prepared import PreparedImages, prepared_folder, reusable_catalog
from m2d.experiment import Experiment
from m2d.files.progress import progress
from m2d.models.extractors import extractor_identity
from m2d.training.console import Console
from m2d.training.plan import CATALOG


def run_catalog(config: TrainConfig, experiment: Experiment, data_root: str, console: Console) -> pa.Table:
    """The run's catalog: its own on resuming, setup_data's where that still holds, or a scan's. Raises DataError."""
    path = str(experiment.path / CATALOG)
    if Path(path).is_file():
        return read_catalog(path)
    folder = prepared_folder(config.cache_dir, data_root)
    prepared = reusable_catalog(folder, data_root, config.data)
    if prepared is not None:
        console.say(f"catalog: from {folder}, whose scan was of the same files")
        rejected, duplicates = (pa_csv.read_csv(folder / name) for name in ("rejected.csv", "duplicates.csv"))
        scan = Scan(prepared, rejected, duplicates)
    else:
        with progress("scan", stderr=False) as shown:
            scan = scan_dataset(data_root, config.data, shown.show)
    write_catalog(scan.catalog, path)
    if len(scan.rejected):
        listed = str(experiment.path / "cache" / "rejected.csv")
        write_rejected(scan.rejected, listed)
        for row in scan.rejected.slice(0, 10).to_pylist():
            console.say(f"rejected: {row['path']}: {row['reason']}")
        console.say(f"rejected {len(scan.rejected)} files; all of them with reasons: {listed}")
    if len(scan.duplicates):
        console.say(f"left out {len(scan.duplicates)} exact duplicates")
    counts = {split: class_counts(scan.catalog, split) for split in ("train", "val", "test")}
    experiment.update_info(
        dataset={
            "root": data_root,
            "images": len(scan.catalog),
            "rejected": len(scan.rejected),
            "duplicates": len(scan.duplicates),
            "sha256": catalog_hash(scan.catalog),
            "counts": counts,
        }
    )
    return scan.catalog


def prepared_parts(config: TrainConfig, experiment: Experiment, catalog: pa.Table, console: Console) -> dict[str, Any]:
    """The plan's entries for what setup_data made: used where it is complete, told where it is not."""
    folder, size = prepared_folder(config.cache_dir, config.checked_data_root), config.data.image_size
    key, sha256 = extractor_identity(config.feature_extractor)
    experiment.update_info(feature_extractor={"key": key, "weights_sha256": sha256})
    if not folder.is_dir():  # asking for a million images takes 160 MB
        return {"extractor_key": key}
    found: dict[str, Any] = {}
    images = PreparedImages.open(folder, size)
    if images is not None and images.covers(catalog["sha256"].to_pylist()):
        found["prepared"] = folder
    store = FeatureStore.open(folder, key, size)
    train, val = (catalog["sha256"].filter(pc.equal(catalog["split"], split)).to_pylist() for split in ("train", "val"))
    missing = np.concatenate([store.missing(train, config.data.views).ravel(), store.missing(val, 1).ravel()])
    if not missing.any():
        found["features"] = folder
    elif not missing.all():
        console.warn(
            f"the cache in {folder} lacks {missing.sum():,} of {len(missing):,} image views of {key}, so the extractor "
            "runs in every step; jobs/setup_data.py --features with this run's settings completes it"
        )
    if found:
        what = " and ".join({"prepared": "images", "features": f"features ({key})"}[name] for name in found)
        console.say(f"prepared {what}: from {folder}")
    return {**found, "extractor_key": key}
