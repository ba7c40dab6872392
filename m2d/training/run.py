"""A run as its driver and workers share it: the plan, worked out once by the driver, and a word in a file.

By the word a run is asked to stop, and says why it cannot continue. It is in a file because that needs nothing of Ray,
and is still there for the workers that Ray starts again.
"""

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import torch

from m2d import errors
from m2d.classes import ISIC7, ClassSet
from m2d.data.catalog import (
    Scan,
    catalog_hash,
    class_counts,
    classes_of,
    compare_catalogs,
    dataset_fingerprint,
    read_catalog,
    said_of,
    scan_dataset,
    write_catalog,
    write_csv,
)
from m2d.data.features import FeatureStore, FeatureTable
from m2d.data.order import Share, StreamOrder
from m2d.data.reader import ImageReader
from m2d.data.store import PreparedImages, prepared_folder, reusable_catalog
from m2d.errors import ConfigError, DataError, M2DError, TrainingError
from m2d.experiment import Experiment, newest_step
from m2d.files.atomic import FULL
from m2d.files.progress import progress
from m2d.models.extractors import extractor_identity
from m2d.models.settings import PerceptualKind, Precision
from m2d.training.settings import TrainConfig
from m2d.training.telemetry import Console

CATALOG = "cache/catalog.parquet"
CONTROL = ".control"  # in the experiment's directory
CONTROL_BYTES = 4096  # taken at the start, so that a word can be left on a disk that is full
STOP = "stop"
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in torch's words where the machine's memory runs out: a plain RuntimeError
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one: the terminal, or its ssh session, is closed


@dataclass(frozen=True, kw_only=True, repr=False)  # Ray shows the text of what a trainer is given
class RunPlan:
    """What a worker needs to know. Small: it is sent to each."""

    config: TrainConfig
    experiment: Experiment
    world_size: int  # workers that the run was planned for; an elastic one may have fewer for a time
    train_images: int
    precision: Precision
    perceptual: PerceptualKind
    prepared: Path | None = None  # the folder where setup_data put decoded images, where it holds all of them
    features: Path | None = None  # the same for features
    extractor_key: str = ""
    classes: ClassSet = ISIC7  # those of the catalog

    @property
    def step_micro_batches(self) -> int:
        """Micro-batches an optimiser step, of all workers together and however many there are."""
        return self.config.gradient_accumulation_steps * self.world_size

    @property
    def global_batch(self) -> int:
        """Images an optimiser step."""
        return self.config.batch_size * self.step_micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training image has been seen once (under `natural`); the last one may straddle."""
        return -(-self.train_images // self.global_batch)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.config.epochs * self.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    @property
    def vae_warmup_steps(self) -> int:
        """Steps in which the VAE learns alone."""
        return round(self.config.schedule.vae_warmup_fraction * self.total_steps)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` workers takes a step: more of them where workers are missing."""
        return -(-self.step_micro_batches // world_size)

    def share(self, rank: int, world_size: int) -> Share:
        """What one of `world_size` workers takes of the stream."""
        return Share(
            batch_size=self.config.batch_size,
            rank=rank,
            world_size=world_size,
            step_micro_batches=self.step_micro_batches,
        )

    def turns_from(self, step: int, world_size: int) -> range:
        """Those of each of `world_size` workers, from `step` to the end."""
        k = self.accumulation(world_size)
        return range(step * k, self.total_steps * k)

    def reader(self, split: str) -> ImageReader:
        """Reads the images of a split."""
        root, data = self.config.checked_data_root, self.config.data
        prepared = None if self.prepared is None else PreparedImages(self.prepared, data.image_size)
        size, most = data.image_size, data.max_pixels
        return ImageReader(self.catalog(split), root, image_size=size, max_pixels=most, prepared=prepared)

    def feature_table(self, split: str) -> FeatureTable | None:
        """Cached features of a split: every view in which its images are shown."""
        if self.features is None:
            return None
        store = FeatureStore(self.features, self.extractor_key, self.config.data.image_size)
        views = self.config.data.views if split == "train" else 1
        return store.table(self.catalog(split)["sha256"].to_pylist(), views)

    def order(self, reader: ImageReader) -> StreamOrder:
        """The order of the training stream."""
        data = self.config.data
        return StreamOrder(reader.labels, balance=data.balance, views=data.views, seed=self.config.seed)

    def pictures_due(self, step: int) -> set[str]:
        """Of `reconstructions`, `samples`, `features`, what is drawn after `step` steps: by epochs, and at the end."""
        telemetry = self.config.telemetry
        if not telemetry.pictures:
            return set()
        due = set()
        for kind in ("reconstructions", "samples", "features"):
            epochs: int = getattr(telemetry, f"{kind}_every_epochs")
            if step == self.total_steps or (epochs and step % (epochs * self.steps_per_epoch) == 0):
                due.add(kind)
        # Before the U-Net has learnt anything its samples are noise.
        return due if step > self.vae_warmup_steps or self.config.stage != "joint" else due & {"reconstructions"}

    def catalog(self, split: str) -> pa.Table:
        """The experiment's catalog rows of a split."""
        catalog = read_catalog(str(Path(self.experiment.path) / CATALOG))
        return catalog.filter(pc.equal(catalog["split"], split))


def run_catalog(config: TrainConfig, experiment: Experiment, data_root: str, console: Console) -> pa.Table:
    """The images of the run: those that it began with. Raises DataError where it cannot have them any more.

    Of a new run, and of one that has no checkpoint yet, they are what data_root holds now.
    """
    path, recorded = experiment.path / CATALOG, experiment.info().get("dataset") or {}
    files = dataset_fingerprint(data_root, config.data)  # from before the scan, so that a change during it shows
    own = read_catalog(str(path)) if path.is_file() else None
    folder, root = prepared_folder(config.cache_dir, data_root), str(recorded.get("root", data_root))
    if own is not None and recorded.get("files") == files:
        if root != data_root:
            experiment.update_info(dataset={**recorded, "root": data_root})
        return own
    if newest_step(experiment.checkpoints) == 0:
        if own is not None:
            console.say("the images are not as at the first try, which left no checkpoint: the run begins anew")
            shutil.rmtree(path.with_name("latents"), ignore_errors=True)  # of the list that goes
        return _new_catalog(_scan(config, data_root, folder, console), experiment, data_root, files, console)
    if own is None:
        scan = _scan(config, data_root, folder, console)
        if recorded.get("sha256") not in (None, catalog_hash(scan.catalog)):
            raise DataError(
                f"data_root: {data_root} is not as when this run began ({recorded.get('images')} images then, "
                f"{len(scan.catalog)} now), and the run's own list of them, {path}, is gone; put back one of the two, "
                "or start over with --fresh"
            )
        return _new_catalog(scan, experiment, data_root, files, console)
    needed = own.filter(pc.not_equal(own["split"], "test"))["sha256"].to_pylist()
    if root == data_root and not PreparedImages(folder, config.data.image_size).missing(needed).any():
        console.warn(
            f"{data_root} is not as when this run began; the run goes on with its own images, which are prepared in "
            f"{folder}; --fresh starts over with what is there now"
        )
        return own
    catalog, found = compare_catalogs(own, _scan(config, data_root, folder, console))
    _tell_changes(found, own, data_root, root, console)
    if catalog["path"] != own["path"]:
        write_catalog(catalog, str(path))
    if not any(found.values()):  # the next start need not compare again
        experiment.update_info(dataset={**recorded, "root": data_root, "files": files})
    return catalog


def _scan(config: TrainConfig, data_root: str, folder: Path, console: Console) -> Scan:
    """setup_data's where that still holds, otherwise a new one."""
    prepared = reusable_catalog(folder, data_root, config.data)
    if prepared is not None:
        console.say(f"catalog: from {folder}, whose scan was of the same files")
        return Scan(prepared, *(pa_csv.read_csv(folder / name) for name in ("rejected.csv", "duplicates.csv")))
    with progress("scan", stderr=False) as shown:
        return scan_dataset(data_root, config.data, shown.show)


def _new_catalog(scan: Scan, experiment: Experiment, data_root: str, files: str, console: Console) -> pa.Table:
    """Tell, record and keep what a scan found."""
    path = experiment.path / CATALOG
    for line in said_of(scan.catalog):
        console.say(line)
    write_catalog(scan.catalog, str(path))
    if len(scan.rejected):
        listed = str(path.with_name("rejected.csv"))
        write_csv(scan.rejected, listed)
        for row in scan.rejected.slice(0, 10).to_pylist():
            console.say(f"rejected: {row['path']}: {row['reason']}")
        console.say(f"rejected {len(scan.rejected)} files; all of them with reasons: {listed}")
    if len(scan.duplicates):
        console.say(f"left out {len(scan.duplicates)} exact duplicates")
    dataset = {
        "root": data_root,
        "files": files,
        "classes": classes_of(scan.catalog).as_dict(),
        "said": said_of(scan.catalog),
        "images": len(scan.catalog),
        "rejected": len(scan.rejected),
        "duplicates": len(scan.duplicates),
        "sha256": catalog_hash(scan.catalog),
        "counts": {split: class_counts(scan.catalog, split) for split in ("train", "val", "test")},
    }
    experiment.update_info(dataset=dataset)
    return scan.catalog


def _tell_changes(found: dict[str, list[str]], own: pa.Table, data_root: str, root: str, console: Console) -> None:
    """Warn of what differs. Raises DataError where the run cannot have its own images, or data_root is another one."""
    told = [f"{len(paths):,} {what} ({paths[0]} for one)" for what, paths in found.items() if paths]
    if not told:
        return
    unseen = set(own.filter(pc.equal(own["split"], "test"))["path"].to_pylist())
    lost = {path for what in ("gone", "replaced", "unreadable") for path in found[what]}
    if lost - unseen or root != data_root:
        if root == data_root:
            holds, remedy = f"does not hold the {len(own):,} images", "put them back"
        else:
            holds, remedy = f"holds other images than the {len(own):,} of {root}", "name the old one to continue"
        raise DataError(
            f"data_root: {data_root} {holds} that this run began with: {', '.join(told)}; {remedy}, or start over with "
            "--fresh"
        )
    console.warn(
        f"{data_root} is not as when this run began: {', '.join(told)}; the run goes on with what it began with, and "
        "--fresh starts over with what is there now"
    )


def allocator_settings() -> dict[str, str]:
    """Environment of a process that trains on a GPU, against fragmentation of its memory; the user's own comes first.

    torch reads it when CUDA starts. Of its two variables some versions prefer the one and some the other.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
        return {}
    return {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}


def prepared_parts(config: TrainConfig, experiment: Experiment, catalog: pa.Table, console: Console) -> dict[str, Any]:
    """The plan's entries for what setup_data made: used where it is complete, reported where it is not."""
    folder, size = prepared_folder(config.cache_dir, config.checked_data_root), config.data.image_size
    key, sha256 = extractor_identity(config.feature_extractor)
    before = (experiment.info().get("feature_extractor") or {}).get("weights_sha256", sha256)
    if before != sha256 and newest_step(experiment.checkpoints):
        raise ConfigError(
            f"feature_extractor.weights: {config.feature_extractor.weights} has other weights than this run began with "
            f"(sha256 {before[:12]}, now {sha256[:12]}); put those back, or start over with --fresh"
        )
    experiment.update_info(feature_extractor={"key": key, "weights_sha256": sha256})
    parts: dict[str, Any] = {"extractor_key": key}
    if not folder.is_dir():  # asking for a million images takes 160 MB
        return parts
    found = []
    if not PreparedImages(folder, size).missing(catalog["sha256"].to_pylist()).any():
        parts["prepared"] = folder
        found.append("images")
    store = FeatureStore(folder, key, size)
    train, val = (catalog["sha256"].filter(pc.equal(catalog["split"], split)).to_pylist() for split in ("train", "val"))
    missing = np.concatenate([store.missing(train, config.data.views).ravel(), store.missing(val, 1).ravel()])
    if not missing.any():
        parts["features"] = folder
        found.append(f"features ({key})")
    elif not missing.all():
        console.warn(
            f"the cache in {folder} lacks {missing.sum():,} of {len(missing):,} image views of {key}, so the extractor "
            "runs in every step; jobs/setup_data.py --features with this run's settings completes it"
        )
    if found:
        console.say(f"prepared {' and '.join(found)}: from {folder}")
    return parts


class Wish(IntEnum):
    """What a worker is asked for between two steps."""

    GO_ON = 0
    SAVE = 1  # a checkpoint now: a node is about to be taken away
    STOP = 2  # a checkpoint, and no further step


class Stopped(M2DError):
    """The run ended early because it was asked to. exit_code: what a shell expects after that signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def stop_is_wanted(experiment: Path) -> bool:
    """Whether the driver of the run in this directory was asked to stop."""
    return _read(experiment) == STOP


def recorded_failure(experiment: Path) -> M2DError | None:
    """What a worker of the run in this directory left, so that it is not tried again."""
    kind, _, message = _read(experiment).partition(": ")
    return getattr(errors, kind)(message) if message else None


@contextmanager
def failures_recorded(experiment: Path, config: TrainConfig) -> Iterator[None]:
    """Around a worker's work: what the user has to fix is left for the driver, since another try would not help.

    Raises TrainingError for a full disk (an OSError) and for memory that is not enough.
    """
    try:
        yield
    except Exception as error:
        told = users_error(error, experiment, config)
        if told is None:
            raise
        _write(experiment, f"{type(told).__name__}: {told}")
        if told is error:
            raise
        raise told from error


def users_error(error: Exception, experiment: Path, config: TrainConfig) -> M2DError | None:
    """What the user is told, in one line; None where the next try may go better."""
    if isinstance(error, M2DError):
        return error
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS):
        remedy = "make room" if error.errno in FULL else "see to the disk"
        return TrainingError(
            f"{error.filename or experiment} cannot be written ({error.strerror}); checkpoints are intact, {remedy} "
            "and run the same command again"
        )
    in_torch = isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and in_torch):
        return None
    batch, accumulated = config.batch_size, config.gradient_accumulation_steps
    halved = f"--batch_size {batch // 2} --gradient_accumulation_steps {accumulated * 2} (the same optimiser step), "
    return TrainingError(
        f"batch_size {batch} with gradient_accumulation_steps {accumulated} does not fit into memory; try "
        f"{halved if batch % 2 == 0 else ''}--unet.gradient_checkpointing true or "
        "--autoencoder.gradient_checkpointing true, and the run resumes from its last checkpoint; train --dry_run "
        "predicts what fits"
    )


@contextmanager
def stop_requests(experiment: Path, say: Callable[[str], None], *, signals: bool = True) -> Iterator[list[int]]:
    """In the main thread SIGNALS ask the run to save and stop; a second SIGINT or SIGTERM ends the process at once.

    Yields the signal that asked, if any. In another thread, which may set no handlers, and with signals=False, signals
    stay as they are; so does a SIGHUP that nohup has set to be ignored. say: prints a line.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGHUP:
            return  # shell and kernel both send one
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if asked:
            sys.exit(128 + number)
        asked.append(number)
        _write(experiment, STOP)
        say(f"{signal.Signals(number).name}: saving a checkpoint, then stopping; once more to stop at once")

    (experiment / CONTROL).write_bytes(b" " * CONTROL_BYTES)  # forgets what an earlier run left
    handles = signals and threading.current_thread() is threading.main_thread()
    numbers = [n for n in SIGNALS if handles and not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN)]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (experiment / CONTROL).unlink(missing_ok=True)


def _read(experiment: Path) -> str:
    """The word in the file. Opened each time: network file systems show what was closed before."""
    try:
        return (experiment / CONTROL).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def _write(experiment: Path, word: str) -> None:
    """Over what is there, which takes no new space. A run without the file, or that cannot write it, goes without."""
    with suppress(OSError), (experiment / CONTROL).open("r+b") as file:
        file.write(word.encode()[:CONTROL_BYTES].ljust(CONTROL_BYTES))
