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
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich import filesize

from m2d.cluster.fan_out import JobResult, as_block, fan_out, numbered, on_tasks, run_jobs
from m2d.cluster.nodes import cluster_total, node_resources, require_shared
from m2d.cluster.start import ray_cluster
from m2d.data.catalog import class_counts, dataset_fingerprint, said_of, scan_dataset
from m2d.data.decode import decode_resized
from m2d.data.reader import READ_THREADS, decode_unchanged
from m2d.data.settings import DataConfig, SetupConfig
from m2d.data.store import CATALOG, PreparedImages, pieces, prepared_folder, reusable_catalog, write_images, write_scan
from m2d.errors import ConfigError, DataError, Incomplete
from m2d.files.atomic import clear_leftovers, try_lock
from m2d.files.paths import absolute, input_path, require_outside, result_path
from m2d.files.progress import progress
from m2d.files.storage import open_storage

if TYPE_CHECKING:  # image tasks import this file and need no torch: seconds and 200 MB each
    from m2d.data.features import ExtractionJobs
    from m2d.models.extractors import Features

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

    Raises an M2DError for what a user can fix; whatever was finished stays. Incomplete: an image was left out.
    """
    stages = config.stages
    # Ray's processes may start in another directory, so local paths become absolute here.
    makes_data_root = config.download.enabled or config.import_from is not None
    place = result_path if makes_data_root else input_path
    data_root = absolute(place("data_root", config.data_root))
    extractor = config.feature_extractor
    weights = absolute(input_path("feature_extractor.weights", extractor.weights))
    config = dataclasses.replace(
        config,
        data_root=data_root,
        cache_dir=absolute(result_path("cache_dir", config.cache_dir)),
        feature_extractor=dataclasses.replace(extractor, weights=weights),
        data=config.data.in_this_place(),
        import_from=input_path("import_from", config.import_from),
    )
    if data_root is None:
        raise ConfigError("data_root is not set; name the folder that holds the images by --data_root")
    require_outside(data_root, cache_dir=config.cache_dir)
    if "://" not in data_root and not Path(data_root).is_dir() and not makes_data_root:
        raise ConfigError(f"data_root: {data_root} is not a folder; name the one that holds the images")
    folder = prepared_folder(config.cache_dir, data_root)
    if config.download.enabled:
        from m2d.data.isic import download_isic

        download_isic(config.download, data_root)
    if config.import_from is not None:
        from m2d.data.importing import import_shards

        say(f"import: {import_shards(config.import_from, data_root):,} images of {config.import_from} in {data_root}")
    if not stages:
        return []
    say(f"cache: {folder}")
    reports: list[StageReport] = []
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_lock(folder / "setup.lock")
        except OSError as error:
            raise ConfigError(f"cache_dir: {folder} cannot be made ({error.strerror}); choose another one") from None
        if lock is None:
            raise ConfigError(f"cache_dir: another setup_data is running in {folder}; wait for it to end")
        held.enter_context(lock)
        leftovers = clear_leftovers(folder)
        if leftovers:
            say(f"removed {leftovers} half-written files of a run that was killed")

        def need_ray() -> None:
            held.enter_context(ray_cluster(verbose=config.verbose, min_cpus=max(1.0, config.data.read_cpus)))
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
            f"{filesize.decimal(report.bytes):>10} {seconds:>8}"
        )
    parts = [report for report in reports if report.name != "catalog" and report.seconds is not None]
    if lack := sum(report.failed for report in parts):
        raise Incomplete(
            f"incomplete: {lack:,} images or views of images could not be prepared; were they changed since the scan? "
            "The same command tries again"
        )
    return reports


def say(line: str) -> None:
    """One fact, one line; seen at once where the output is a file."""
    print(line, flush=True)


def _scan(config: SetupConfig, data_root: str, folder: Path, catalog: pa.Table | None) -> tuple[pa.Table, StageReport]:
    began = time.monotonic()
    if catalog is not None:
        for line in said_of(catalog):
            say(f"scan: {line}")
        say(f"scan: {len(catalog):,} images found in the catalog; no file and no setting has changed since")
        return catalog, StageReport("catalog", len(catalog), 0, 0, 1, _size(folder / CATALOG))
    fingerprint = dataset_fingerprint(data_root, config.data)  # from before, so that a change during the scan shows
    with progress("scan", stderr=False) as shown:
        scan = scan_dataset(data_root, config.data, shown.show)
    write_scan(folder, scan, data_root, config.data, fingerprint)
    _say_failures("scan", [f"{row['path']}: {row['reason']}" for row in scan.rejected.to_pylist()])
    for line in said_of(scan.catalog):
        say(f"scan: {line}")
    counts = " ".join(f"{code} {count}" for code, count in class_counts(scan.catalog).items())
    say(f"scan: {len(scan.catalog):,} images ({counts}), {len(scan.duplicates):,} exact duplicates left out")
    seconds, size = time.monotonic() - began, _size(folder / CATALOG)
    return scan.catalog, StageReport("catalog", 0, len(scan.catalog), len(scan.rejected), 1, size, seconds)


def prepare_images(data: DataConfig, data_root: str, folder: Path, images: Sequence[tuple[str, str]]) -> JobResult:
    """Decode images (path, sha256) and write them as one file, without those that cannot be had. Without torch."""
    storage = open_storage(data_root)
    decode = partial(decode_resized, size=data.image_size, max_pixels=data.max_pixels)
    paths, sums = [path for path, _ in images], [sha256 for _, sha256 in images]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = list(pool.map(partial(decode_unchanged, storage, decode=decode), paths, sums))
    good = {sha256: pixels for sha256, pixels in zip(sums, found, strict=True) if isinstance(pixels, np.ndarray)}
    if good:
        write_images(folder, data.image_size, list(good), np.stack([*good.values()]))
    return JobResult(
        len(good), [f"{path}: {why}" for path, why in zip(paths, found, strict=True) if isinstance(why, str)]
    )


def _images(
    config: SetupConfig, data_root: str, folder: Path, catalog: pa.Table, need_ray: Callable[[], None]
) -> StageReport:
    began = time.monotonic()
    size, sha256, paths = config.data.image_size, catalog["sha256"].to_pylist(), catalog["path"].to_pylist()
    before = PreparedImages(folder, size)
    _remove_unreadable("images", before.unreadable)
    missing = np.flatnonzero(before.missing(sha256))
    found = len(sha256) - len(missing)
    say(f"images: {found:,} of {len(sha256):,} found at {size} px, {len(missing):,} to decode")
    failures: list[str] = []
    made = 0
    if len(missing):
        _require_space("images", folder, len(missing) * (3 * size**2 + 256))
        files = [[(paths[row], sha256[row]) for row in rows] for rows in pieces(missing, config.shard_images)]
        prepare = partial(prepare_images, config.data, data_root, folder)
        results: Iterator[JobResult] = map(prepare, files)
        if config.num_actors != 0:  # as tasks, of which as many run as the cluster has CPUs
            need_ray()
            tasks = on_tasks((prepare, files), _prepare_block, cpus=config.data.read_cpus)
            results = (JobResult(**row) for row in fan_out(numbered(len(files)), tasks))
        with progress("images", stderr=False) as shown:
            for result in results:
                made += result.images
                failures += result.failures
                shown.show(made + len(failures), len(missing))
    _say_failures("images", failures)
    shards = PreparedImages(folder, size).files
    seconds = time.monotonic() - began
    return StageReport(f"images {size}px", found, made, len(failures), len(shards), _size(*shards), seconds)


def _prepare_block(held: Any, block: pa.Table) -> pa.Table:
    prepare, files = held
    return as_block(prepare(files[block["job"][0].as_py()]))


def _features(config: SetupConfig, folder: Path, catalog: pa.Table, need_ray: Callable[[], None]) -> list[StageReport]:
    """A report of each view, then their sum."""
    from m2d.data.features import ExtractionJobs, FeatureStore, feature_bytes, read_prepared, write_features
    from m2d.models.extractors import extractor_key, load_feature_extractor

    began = time.monotonic()
    size, views, settings = config.data.image_size, config.data.views, config.feature_extractor
    key = extractor_key(settings)
    images = PreparedImages(folder, size)
    if not images.files:
        raise ConfigError(f"features are made from prepared images, and {folder} has none of {size} px; add --images")
    unprepared = images.missing(catalog["sha256"].to_pylist())
    if unprepared.any():
        count = unprepared.sum()
        say(f"features: WARNING: {count:,} images are not prepared at {size} px and left out; --images says why")
        catalog = catalog.filter(pa.array(~unprepared))
    sha256, paths = catalog["sha256"].to_pylist(), catalog["path"].to_pylist()
    before = FeatureStore(folder, key, size)
    missing = before.missing(sha256, views)
    _remove_unreadable("features", before.unreadable)
    total, left = missing.size, int(missing.sum())
    say(f"features: extractor {key}, images of {size} px in {views} view{'s' if views > 1 else ''}")
    say(f"features: {total - left:,} of {total:,} image views found, {left:,} to extract")
    if left:
        extractor = load_feature_extractor(settings.name, settings.weights, settings.input_size, settings.crop)
        needed = left * feature_bytes(extractor.dim, extractor.num_patches)
        shape = f"cls {extractor.dim}, patches {extractor.num_patches} x {extractor.dim}"
        say(f"features: {shape} in fp16; {filesize.decimal(needed)} to write")
        _require_space("features", folder, needed)
        del extractor  # it was loaded to learn its shape and that its weights are good; the actors load their own

        def keep(view: int, rows: np.ndarray, features: "Features") -> None:
            sums, names = ([column[row] for row in rows] for column in (sha256, paths))
            write_features(folder, key, size, view, sums, features, names=names)

        of_view = [pieces(np.flatnonzero(missing[:, view]), config.shard_images) for view in range(views)]
        jobs = ExtractionJobs(
            settings,
            key,
            read=partial(read_prepared, images.rows(sha256)),
            keep=keep,
            jobs=[(view, rows) for view in range(views) for rows in of_view[view]],
            batch_size=config.extract_batch_size,
            batch_setting="extract_batch_size",
        )
        made = 0
        with progress("features", unit="views", stderr=False) as shown:
            for result in _extracted(config, jobs, need_ray):
                made += result.images
                shown.show(made, left)
    now = FeatureStore(folder, key, size)
    absent = now.missing(sha256, views)
    reports = []
    for view in range(views):
        were, are, files = ~missing[:, view], ~absent[:, view], now.files(view)
        counts = int(were.sum()), int((are & ~were).sum()), int((~are).sum()), len(files), _size(*files)
        reports.append(StageReport(f"features view {view}", *counts))
    found, made, failed, file_count, size = (
        sum(column) for column in zip(*(dataclasses.astuple(report)[1:-1] for report in reports), strict=True)
    )
    return [*reports, StageReport("features", found, made, failed, file_count, size, time.monotonic() - began)]


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
        there, wanted = filesize.decimal(free), filesize.decimal(needed)
        raise DataError(
            f"{stage}: {wanted} are to be written to {folder}, where {there} are free; free some space, or choose "
            "another --cache_dir"
        )


def _say_failures(stage: str, failures: list[str]) -> None:
    for line in failures[:SHOWN_FAILURES]:
        say(f"{stage}: left out {line}")
    if len(failures) > SHOWN_FAILURES:
        say(f"{stage}: left out {len(failures):,} files in all")


def _size(*files: Path) -> int:
    return sum(path.stat().st_size for path in files)
