"""The one-time work on a dataset, `setup_data`: scan it, decode its images, extract its features, on Ray Data or here.

Everything is kept file by file in the cache folder (m2d.data.prepared), so that a run that was killed is finished by
the same command: what is there is not made again. The driver sees file names and counts only.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from m2d.cluster.fan_out import JobResult, as_block, fan_out, numbered, on_tasks, run_jobs
from m2d.cluster.nodes import cluster_total, node_resources, require_shared
from m2d.cluster.start import ray_cluster
from m2d.data.catalog import class_counts, dataset_fingerprint, scan_dataset
from m2d.data.image_jobs import ImageJobs
from m2d.data.prepared import PreparedImages, prepared_folder, reusable_catalog, write_scan
from m2d.data.reader import ImageReader
from m2d.data.settings import SetupConfig
from m2d.data.setup_report import StageReport, print_table, say, size_text, write_record
from m2d.errors import ConfigError, DataError
from m2d.files.atomic import clear_leftovers, try_lock
from m2d.files.paths import absolute, input_path, result_path
from m2d.files.progress import progress

if TYPE_CHECKING:  # image tasks import this file and need no torch: seconds and 200 MB each
    from m2d.data.feature_jobs import FeatureJobs
    from m2d.data.feature_store import FeatureStore

ACTORS_PER_CPU_NODE = 8  # each holds the network; more cores than that become threads of the actors
SHOWN_FAILURES = 10


def setup_data(config: SetupConfig) -> list[StageReport]:
    """Do the stages that the config asks for, each as far as it is not done yet. Prints what it found and made.

    Raises an M2DError for what a user can mend; whatever was finished stays.
    """
    stages = config.stages
    config = _absolute(config)
    data_root = _checked_data_root(config)
    folder = prepared_folder(config.cache_dir, data_root)
    if config.download.enabled:
        from m2d.data.isic import download_isic

        download_isic(config.download, data_root)
    if not stages:
        return []
    say(f"cache: {folder}")
    reports: list[StageReport] = []
    with _alone(folder), ExitStack() as cluster:

        def need_ray() -> None:
            cluster.enter_context(ray_cluster(verbose=config.verbose, min_cpus=max(1.0, config.data.read_cpus)))
            require_shared(written={"cache_dir": config.cache_dir}, read={"data_root": data_root})

        catalog = reusable_catalog(folder, data_root, config.data)
        if "scan" in stages:
            catalog, report = _scan(config, data_root, folder, catalog)
            reports.append(report)
        elif catalog is None:
            raise ConfigError(f"{data_root} was not scanned with these settings, or has changed since; add --scan")
        if "images" in stages:
            reports.append(_images(config, data_root, folder, catalog, need_ray))
        if "features" in stages:
            reports += _features(config, folder, catalog, need_ray)
    write_record(folder / "setup.jsonl", reports)
    print_table(reports)
    return reports


def _absolute(config: SetupConfig) -> SetupConfig:
    """Ray's processes may start in another directory, so local paths become absolute here."""
    extractor = config.feature_extractor
    weights = input_path("feature_extractor.weights", extractor.weights)
    place = result_path if config.download.enabled else input_path
    return dataclasses.replace(
        config,
        data_root=absolute(place("data_root", config.data_root)),
        cache_dir=absolute(result_path("cache_dir", config.cache_dir)),
        feature_extractor=dataclasses.replace(extractor, weights=absolute(weights)),
    )


def _checked_data_root(config: SetupConfig) -> str:
    if config.data_root is None:
        raise ConfigError("data_root is not set; name the folder that holds the class folders by --data_root")
    if "://" not in config.data_root and not Path(config.data_root).is_dir() and not config.download.enabled:
        raise ConfigError(f"data_root: {config.data_root} is not a folder; name the one that holds the class folders")
    return config.data_root


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder, then removes what a killed one left. A killed process loses the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / "setup.lock")
    except OSError as error:
        raise ConfigError(
            f"cache_dir: {folder} cannot be made ({error.strerror}); choose another --cache_dir"
        ) from None
    if lock is None:
        raise ConfigError(f"cache_dir: another setup_data is running in {folder}; wait for it to end")
    with lock:
        leftovers = clear_leftovers(folder)
        if leftovers:
            say(f"removed {leftovers} half-written files of a run that was killed")
        yield


def _scan(config: SetupConfig, data_root: str, folder: Path, catalog: pa.Table | None) -> tuple[pa.Table, StageReport]:
    began = time.monotonic()
    if catalog is not None:
        say(f"scan: {len(catalog):,} images found in the catalog; no file and no setting has changed since")
        return catalog, StageReport("catalog", len(catalog), 0, 0, 1, _size(folder / "catalog.parquet"))
    fingerprint = dataset_fingerprint(data_root, config.data)  # from before, so that a change during the scan shows
    with progress("scan", stderr=False) as shown:
        scan = scan_dataset(data_root, config.data, shown.show)
    write_scan(folder, scan, data_root, config.data, fingerprint)
    _say_failures("scan", [f"{row['path']}: {row['reason']}" for row in scan.rejected.to_pylist()])
    counts = " ".join(f"{code} {count}" for code, count in class_counts(scan.catalog).items())
    say(f"scan: {len(scan.catalog):,} images ({counts}), {len(scan.duplicates):,} exact duplicates left out")
    report = StageReport(
        "catalog", 0, len(scan.catalog), len(scan.rejected), 1, _size(folder / "catalog.parquet"),
        time.monotonic() - began,
    )  # fmt: skip
    return scan.catalog, report


def _images(
    config: SetupConfig, data_root: str, folder: Path, catalog: pa.Table, need_ray: Callable[[], None]
) -> StageReport:
    began = time.monotonic()
    size, sha256 = config.data.image_size, catalog["sha256"].to_pylist()
    before = PreparedImages.look(folder, size)
    _remove_unreadable("images", before.unreadable)
    missing = np.flatnonzero(before.missing(sha256))
    found = len(sha256) - len(missing)
    say(f"images: {found:,} of {len(sha256):,} found at {size} px, {len(missing):,} to decode")
    failures: list[str] = []
    made = 0
    if len(missing):
        _require_space("images", folder, len(missing) * (3 * size**2 + 256))
        reader = ImageReader(catalog, data_root, image_size=size, max_pixels=config.data.max_pixels)
        rows = _pieces(missing, config.shard_images)
        jobs = ImageJobs(reader, folder, catalog["path"].to_pylist(), sha256, rows)
        results: Iterator[JobResult]
        if config.num_actors == 0:
            results = map(jobs.run, range(len(rows)))
        else:
            need_ray()
            results = _decoded(config, jobs)
        with progress("images", stderr=False) as shown:
            for result in results:
                made += result.images
                failures += result.failures
                shown.show(made + len(failures), len(missing))
    _say_failures("images", failures)
    files = PreparedImages.look(folder, size).files
    return StageReport(
        f"images {size}px", found, made, len(failures), len(files), _size(*files), time.monotonic() - began
    )


def _features(config: SetupConfig, folder: Path, catalog: pa.Table, need_ray: Callable[[], None]) -> list[StageReport]:
    from m2d.data.feature_store import FeatureStore, feature_bytes
    from m2d.models.extractors import extractor_key, load_feature_extractor

    began = time.monotonic()
    size, views, settings = config.data.image_size, config.data.views, config.feature_extractor
    key = extractor_key(settings)
    images = PreparedImages.open(folder, size)
    if images is None:
        raise ConfigError(f"features are made from prepared images, and {folder} has none of {size} px; add --images")
    absent = int(images.missing(catalog["sha256"].to_pylist()).sum())
    if absent:
        say(f"features: WARNING: {absent:,} images are not prepared at {size} px and left out; --images tells why")
        catalog = catalog.filter(pa.array(~images.missing(catalog["sha256"].to_pylist())))
    sha256 = catalog["sha256"].to_pylist()
    before = FeatureStore.open(folder, key, size)
    missing = before.missing(sha256, views)
    _remove_unreadable("features", before.unreadable)
    total, left = missing.size, int(missing.sum())
    say(f"features: extractor {key}, images of {size} px in {views} view{'s' if views > 1 else ''}")
    say(f"features: {total - left:,} of {total:,} image views found, {left:,} to extract")
    if left:
        extractor = load_feature_extractor(settings.name, settings.weights, settings.input_size, settings.crop)
        needed = left * feature_bytes(extractor.dim, extractor.num_patches)
        shape = f"cls {extractor.dim}, patches {extractor.num_patches} x {extractor.dim}"
        say(f"features: {shape} in fp16; {size_text(needed)} to write")
        _require_space("features", folder, needed)
        del extractor  # it was loaded to learn its shape and that its weights are good; the actors load their own
        jobs = _feature_jobs(config, folder, catalog, images, key, missing)
        if config.num_actors == 0:
            results = _extracted_here(jobs)
        else:
            need_ray()
            results = _extracted(config, jobs)
        made = 0
        with progress("features", unit="views", stderr=False) as shown:
            for result in results:
                made += result.images
                shown.show(made, left)
    return _feature_reports(FeatureStore.open(folder, key, size), sha256, missing, time.monotonic() - began)


def _feature_jobs(
    config: SetupConfig, folder: Path, catalog: pa.Table, images: PreparedImages, key: str, missing: np.ndarray
) -> "FeatureJobs":
    """A job for each file to make. missing: bool [n, views]."""
    from m2d.data.feature_jobs import FeatureJobs

    sha256 = catalog["sha256"].to_pylist()
    pieces = [
        (view, rows)
        for view in range(missing.shape[1])
        for rows in _pieces(np.flatnonzero(missing[:, view]), config.shard_images)
    ]
    return FeatureJobs(
        config=config.feature_extractor,
        key=key,
        pixels=images.rows(sha256),
        folder=folder,
        paths=catalog["path"].to_pylist(),
        sha256=sha256,
        views=[view for view, _ in pieces],
        rows=[rows for _, rows in pieces],
        batch_size=config.extract_batch_size,
    )


def _extracted_here(jobs: "FeatureJobs") -> Iterator[JobResult]:
    """All jobs one after the other in this process, on its GPU where it has one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = jobs.load(device, torch.get_num_threads())
    say(f"features: {len(jobs.rows):,} files to make, in this process")
    for number in range(len(jobs.rows)):
        yield jobs.run(number, extractor, device)


def _decoded(config: SetupConfig, jobs: ImageJobs) -> Iterator[JobResult]:
    """The results of all jobs as tasks, of which as many run as the cluster has CPUs."""
    tasks = on_tasks(jobs, _decode, cpus=config.data.read_cpus)
    for row in fan_out(numbered(len(jobs.rows)), tasks):
        yield JobResult(**row)


def _decode(jobs: ImageJobs, block: pa.Table) -> pa.Table:
    return as_block(jobs.run(block["job"][0].as_py()))


def _extracted(config: SetupConfig, jobs: "FeatureJobs") -> Iterator[JobResult]:
    """The results of all jobs on actors: one a GPU, or as many as share the cores without waiting."""
    gpus, cpus = int(cluster_total("GPU")), int(cluster_total("CPU")) or 1
    limit = gpus or cpus
    asked = config.num_actors
    if asked is not None and asked > limit:
        what = "GPUs" if gpus else "CPUs"
        raise ConfigError(f"num_actors is {asked} and the cluster has {limit} {what}; lower --num_actors")
    node_cpus = min((int(node.get("CPU", 0)) or cpus for node in node_resources()), default=1)
    if asked is None:
        asked = gpus or max(1, cpus // max(1, node_cpus // ACTORS_PER_CPU_NODE))
    actors = min(asked, len(jobs.rows))
    # An actor reserves one CPU and computes on its node's share of the cores: one that reserved them all would wait for
    # whatever else holds a part of one.
    threads = max(1, node_cpus // math.ceil(actors / max(1, cpus // node_cpus)))
    where = f"{actors} GPU{'s' if actors > 1 else ''}" if gpus else f"{actors} x {threads} CPU threads"
    say(f"features: {len(jobs.rows):,} files to make, on {where}")
    return run_jobs(jobs, len(jobs.rows), actors=actors, device="cuda" if gpus else "cpu", threads=threads)


def _pieces(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _remove_unreadable(stage: str, unreadable: dict[Path, str]) -> None:
    for path, reason in unreadable.items():
        say(f"{stage}: {path} cannot be read ({reason}); it is made again")
        path.unlink(missing_ok=True)


def _require_space(stage: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{stage}: {size_text(needed)} are to be written to {folder}, where {size_text(free)} are free; free some, "
            "or choose another --cache_dir"
        )


def _feature_reports(
    store: "FeatureStore", sha256: list[str], missing_before: np.ndarray, seconds: float
) -> list[StageReport]:
    """One of each view, then their sum."""
    missing_now = store.missing(sha256, missing_before.shape[1])
    reports = []
    for view in range(missing_before.shape[1]):
        before, now, files = missing_before[:, view], missing_now[:, view], store.files(view)
        made = int((before & ~now).sum())
        reports.append(
            StageReport(f"features view {view}", int((~before).sum()), made, int(now.sum()), len(files), _size(*files))
        )
    columns = ("found", "made", "failed", "files", "bytes")
    sums: dict[str, int] = {column: sum(getattr(report, column) for report in reports) for column in columns}
    return [*reports, StageReport("features", **sums, seconds=seconds)]


def _say_failures(stage: str, failures: list[str]) -> None:
    for line in failures[:SHOWN_FAILURES]:
        say(f"{stage}: left out {line}")
    if len(failures) > SHOWN_FAILURES:
        say(f"{stage}: left out {len(failures):,} files in all")


def _size(*files: Path) -> int:
    return sum(path.stat().st_size for path in files)
