"""The one-time work on a dataset, `setup_data`: scan it, decode its images, extract its features, on Ray Data or here.

Everything is kept file by file in the cache folder (m2d.data.store), so the same command finishes a run that was
killed: what is there is not made again. The driver sees file names and counts only.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from m2d.cluster.fan_out import JobResult, as_block, fan_out, numbered, on_tasks, run_jobs
from m2d.cluster.nodes import cluster_total, node_resources, require_shared
from m2d.cluster.start import ray_cluster
from m2d.data.catalog import class_counts, dataset_fingerprint, scan_dataset
from m2d.data.decode import decode_resized
from m2d.data.reader import READ_THREADS, decode_unchanged
from m2d.data.settings import SetupConfig
from m2d.data.store import CATALOG, PreparedImages, pieces, prepared_folder, reusable_catalog, write_images, write_scan
from m2d.errors import ConfigError, DataError
from m2d.files.atomic import clear_leftovers, try_lock
from m2d.files.paths import absolute, input_path, result_path
from m2d.files.progress import progress
from m2d.files.storage import open_storage

if TYPE_CHECKING:  # image tasks import this file and need no torch: seconds and 200 MB each
    from m2d.data.features import ExtractionJobs, FeatureStore

ACTORS_PER_CPU_NODE = 8  # each holds the network; more cores than that become threads of the actors
SHOWN_FAILURES = 10


@dataclass(frozen=True)
class StageReport:
    """What is in the cache after a stage, and how much of it this run made."""

    name: str
    found: int  # images, or views of images, that were there before
    made: int
    failed: int
    files: int  # found and made
    bytes: int  # of those files
    seconds: float | None = None  # None: a part of a stage, whose time is that of the whole


def setup_data(config: SetupConfig) -> list[StageReport]:
    """Do the stages that the config asks for, each as far as it is not done yet. Prints what it found and made.

    Raises an M2DError for what a user can fix; whatever was finished stays.
    """
    stages = config.stages
    config = _absolute(config)
    data_root = config.data_root
    if data_root is None:
        raise ConfigError("data_root is not set; name the folder that holds the class folders by --data_root")
    if "://" not in data_root and not Path(data_root).is_dir() and not config.download.enabled:
        raise ConfigError(f"data_root: {data_root} is not a folder; name the one that holds the class folders")
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
    with (folder / "setup.jsonl").open("a", encoding="utf-8") as record:  # behind those of earlier runs
        for report in reports:
            record.write(json.dumps({"time": round(time.time(), 3), **dataclasses.asdict(report)}) + "\n")
    say(f"{'':16} {'found':>9} {'made now':>9} {'left out':>9} {'files':>6} {'size':>10} {'seconds':>8}")
    for report in reports:
        seconds = "" if report.seconds is None else f"{report.seconds:.1f}"
        say(
            f"{report.name:16} {report.found:9,} {report.made:9,} {report.failed:9,} {report.files:6,} "
            f"{_size_text(report.bytes):>10} {seconds:>8}"
        )
    return reports


def say(line: str) -> None:
    """One fact, one line; seen at once where the output is a file."""
    print(line, flush=True)


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
        return catalog, StageReport("catalog", len(catalog), 0, 0, 1, _size(folder / CATALOG))
    fingerprint = dataset_fingerprint(data_root, config.data)  # from before, so that a change during the scan shows
    with progress("scan", stderr=False) as shown:
        scan = scan_dataset(data_root, config.data, shown.show)
    write_scan(folder, scan, data_root, config.data, fingerprint)
    _say_failures("scan", [f"{row['path']}: {row['reason']}" for row in scan.rejected.to_pylist()])
    counts = " ".join(f"{code} {count}" for code, count in class_counts(scan.catalog).items())
    say(f"scan: {len(scan.catalog):,} images ({counts}), {len(scan.duplicates):,} exact duplicates left out")
    seconds = time.monotonic() - began
    size = _size(folder / CATALOG)
    return scan.catalog, StageReport("catalog", 0, len(scan.catalog), len(scan.rejected), 1, size, seconds)


@dataclass(frozen=True)
class ImageJobs:
    """Job j: decode the images `rows[j]` and write them as one file. Cheap to pickle; runs without torch."""

    data_root: str
    image_size: int
    max_pixels: int
    folder: Path  # of the dataset, in the cache
    paths: Sequence[str]  # of all rows
    sha256: Sequence[str]
    rows: Sequence[np.ndarray]

    def run(self, job: int) -> JobResult:
        """Write the file of job j, without the images that cannot be had."""
        rows, storage = self.rows[job].tolist(), open_storage(self.data_root)
        decode = partial(decode_resized, size=self.image_size, max_pixels=self.max_pixels)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            read = lambda row: decode_unchanged(storage, self.paths[row], self.sha256[row], decode)  # noqa: E731
            found = dict(zip(rows, pool.map(read, rows), strict=True))
        good = {row: pixels for row, pixels in found.items() if isinstance(pixels, np.ndarray)}
        if good:
            write_images(self.folder, self.image_size, [self.sha256[row] for row in good], np.stack([*good.values()]))
        return JobResult(len(good), [f"{self.paths[row]}: {found[row]}" for row in rows if row not in good])


def _images(
    config: SetupConfig, data_root: str, folder: Path, catalog: pa.Table, need_ray: Callable[[], None]
) -> StageReport:
    began = time.monotonic()
    size, sha256 = config.data.image_size, catalog["sha256"].to_pylist()
    before = PreparedImages(folder, size)
    _remove_unreadable("images", before.unreadable)
    missing = np.flatnonzero(before.missing(sha256))
    found = len(sha256) - len(missing)
    say(f"images: {found:,} of {len(sha256):,} found at {size} px, {len(missing):,} to decode")
    failures: list[str] = []
    made = 0
    if len(missing):
        _require_space("images", folder, len(missing) * (3 * size**2 + 256))
        rows = pieces(missing, config.shard_images)
        paths = catalog["path"].to_pylist()
        jobs = ImageJobs(data_root, size, config.data.max_pixels, folder, paths, sha256, rows)
        results: Iterator[JobResult]
        if config.num_actors == 0:
            results = map(jobs.run, range(len(rows)))
        else:  # as tasks, of which as many run as the cluster has CPUs
            need_ray()
            tasks = on_tasks(jobs, _decode, cpus=config.data.read_cpus)
            results = (JobResult(**row) for row in fan_out(numbered(len(rows)), tasks))
        with progress("images", stderr=False) as shown:
            for result in results:
                made += result.images
                failures += result.failures
                shown.show(made + len(failures), len(missing))
    _say_failures("images", failures)
    files = PreparedImages(folder, size).files
    return StageReport(
        f"images {size}px", found, made, len(failures), len(files), _size(*files), time.monotonic() - began
    )


def _decode(jobs: ImageJobs, block: pa.Table) -> pa.Table:
    return as_block(jobs.run(block["job"][0].as_py()))


def _features(config: SetupConfig, folder: Path, catalog: pa.Table, need_ray: Callable[[], None]) -> list[StageReport]:
    from m2d.data.features import ExtractionJobs, FeatureStore, feature_bytes, keep_features, read_prepared
    from m2d.models.extractors import extractor_key, load_feature_extractor

    began = time.monotonic()
    size, views, settings = config.data.image_size, config.data.views, config.feature_extractor
    key = extractor_key(settings)
    images = PreparedImages.open(folder, size)
    if images is None:
        raise ConfigError(f"features are made from prepared images, and {folder} has none of {size} px; add --images")
    unprepared = images.missing(catalog["sha256"].to_pylist())
    if unprepared.any():
        count = unprepared.sum()
        say(f"features: WARNING: {count:,} images are not prepared at {size} px and left out; --images says why")
        catalog = catalog.filter(pa.array(~unprepared))
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
        say(f"features: {shape} in fp16; {_size_text(needed)} to write")
        _require_space("features", folder, needed)
        del extractor  # it was loaded to learn its shape and that its weights are good; the actors load their own
        jobs = ExtractionJobs(
            settings,
            key,
            read=partial(read_prepared, images.rows(sha256)),
            keep=partial(keep_features, folder, key, size, sha256, catalog["path"].to_pylist()),
            jobs=[
                (view, rows)
                for view in range(views)
                for rows in pieces(np.flatnonzero(missing[:, view]), config.shard_images)
            ],
            batch_size=config.extract_batch_size,
            batch_setting="extract_batch_size",
        )
        made = 0
        with progress("features", unit="views", stderr=False) as shown:
            for result in _extracted(config, jobs, need_ray):
                made += result.images
                shown.show(made, left)
    return _feature_reports(FeatureStore.open(folder, key, size), sha256, missing, time.monotonic() - began)


def _extracted(config: SetupConfig, jobs: "ExtractionJobs", need_ray: Callable[[], None]) -> Iterator[JobResult]:
    """In this process, on its GPU where it has one; or on actors, one for each GPU, or as many as share the cores."""
    import torch

    if config.num_actors == 0:
        say(f"features: {len(jobs.jobs):,} files to make, in this process")
        return jobs.here("cuda" if torch.cuda.is_available() else "cpu")
    need_ray()
    gpus, cpus = int(cluster_total("GPU")), int(cluster_total("CPU")) or 1
    asked = config.num_actors
    if asked is not None and asked > (gpus or cpus):
        what = "GPUs" if gpus else "CPUs"
        raise ConfigError(f"num_actors is {asked} and the cluster has {gpus or cpus} {what}; lower --num_actors")
    node_cpus = min((int(node.get("CPU", 0)) or cpus for node in node_resources()), default=1)
    actors = min(asked or gpus or max(1, cpus // max(1, node_cpus // ACTORS_PER_CPU_NODE)), len(jobs.jobs))
    # An actor reserves one CPU and computes on its node's share of the cores: one that reserved them all would wait for
    # whatever else holds a part of one.
    threads = max(1, node_cpus // math.ceil(actors / max(1, cpus // node_cpus)))
    where = f"{actors} GPU{'s' if actors > 1 else ''}" if gpus else f"{actors} x {threads} CPU threads"
    say(f"features: {len(jobs.jobs):,} files to make, on {where}")
    return run_jobs(jobs, actors=actors, device="cuda" if gpus else "cpu", threads=threads)


def _remove_unreadable(stage: str, unreadable: dict[Path, str]) -> None:
    for path, reason in unreadable.items():
        say(f"{stage}: {path} cannot be read ({reason}); it is made again")
        path.unlink(missing_ok=True)


def _require_space(stage: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{stage}: {_size_text(needed)} are to be written to {folder}, where {_size_text(free)} are free; free "
            "some space, or choose another --cache_dir"
        )


def _feature_reports(
    store: "FeatureStore", sha256: list[str], missing_before: np.ndarray, seconds: float
) -> list[StageReport]:
    """One of each view, then their sum."""
    missing_now = store.missing(sha256, missing_before.shape[1])
    reports = []
    for view in range(missing_before.shape[1]):
        before, now, files = missing_before[:, view], missing_now[:, view], store.files(view)
        counts = int((~before).sum()), int((before & ~now).sum()), int(now.sum()), len(files), _size(*files)
        reports.append(StageReport(f"features view {view}", *counts))
    found, made, failed, file_count, size = (
        sum(column) for column in zip(*(dataclasses.astuple(report)[1:-1] for report in reports), strict=True)
    )
    return [*reports, StageReport("features", found, made, failed, file_count, size, seconds)]


def _say_failures(stage: str, failures: list[str]) -> None:
    for line in failures[:SHOWN_FAILURES]:
        say(f"{stage}: left out {line}")
    if len(failures) > SHOWN_FAILURES:
        say(f"{stage}: left out {len(failures):,} files in all")


def _size(*files: Path) -> int:
    return sum(path.stat().st_size for path in files)


def _size_text(count: int) -> str:
    """Bytes in a readable unit: 1.48 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
