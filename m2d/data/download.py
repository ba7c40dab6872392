"""Fetch a collection of the ISIC archive into class folders, so that m2d.data.catalog can read it like any other set.

setup_data calls it before the scan. Run again, it fetches what is missing or changed. Its state is in
data_root/.m2d-download, which the scan passes over. The API, and from where it is known: m2d.data.isic_archive.
"""

import fcntl
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from m2d.classes import CLASSES
from m2d.data.archive_listing import Listing
from m2d.data.archive_notes import Ledger, LedgerEntry, file_sha256, write_metadata, write_provenance
from m2d.data.catalog import IMAGE_SUFFIXES
from m2d.data.decode import ImageRejected, probe_image
from m2d.data.isic_archive import ArchiveImage, class_of
from m2d.data.settings import DownloadConfig
from m2d.data.transfer import Refused, Transfer, TransferError, disk_is_full
from m2d.errors import DataError
from m2d.files.storage import open_storage, without_secrets

STATE_FOLDER = ".m2d-download"

_PLAIN_LINE_EVERY_S = 10.0
_MAX_PIXELS = 250_000_000  # of one image, against decompression bombs
_HASH_THREADS = 4
_LIKELY_BYTES = 300_000  # of an image whose record has no size
_SUFFIX_OF = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"II*\0": ".tif", b"MM\0*": ".tif"}


def download_isic(config: DownloadConfig, data_root: str) -> None:
    """Fetch what `data_root` lacks of the collection, as CLASS/ISIC_0024306.jpg, metadata.csv and DOWNLOAD.md.

    Does nothing unless config.enabled. A file gets its name when its length, the checksums that the server sends, and
    its pixels have proved good; its sha256 is noted, and a file that no longer has it is fetched again. Files that
    somebody else put there are never touched. An image whose diagnosis is none of the seven classes is left out and
    counted by name.
    Raises DataError in one line: no network, no such collection, another kind of answer, no space, images that could
    not be had after all attempts (the others are kept, and run again it goes on).
    """
    if not config.enabled:
        return
    root = _local_folder(data_root)
    try:
        (root / STATE_FOLDER / "partial").mkdir(parents=True, exist_ok=True)
        with _alone(root / STATE_FOLDER):
            _Download(config, root).run()
    except OSError as error:
        if disk_is_full(error):
            raise DataError(
                f"download: no space is left for {root}; free some and run the same command again"
            ) from error
        raise DataError(f"download: {root} cannot be written ({error.strerror or error}); check the path") from error


@dataclass
class _Choice:
    """What is wanted of a collection."""

    images: list[tuple[ArchiveImage, str]] = field(default_factory=list)  # with the class code
    unmapped: set[str] = field(default_factory=set)  # ids
    skipped: Counter[str] = field(default_factory=Counter)  # diagnosis, or what else stood against it -> records


class _Download:
    """One run."""

    def __init__(self, config: DownloadConfig, root: Path) -> None:
        self._config = config
        self._root = root
        self._state = root / STATE_FOLDER
        self._transfer = Transfer(retries=config.retries, timeout_s=config.timeout_s)
        self._listing = Listing(config, self._state, self._transfer)
        self._ledger: Ledger
        self._other_length = 0  # files whose record tells another size

    def run(self) -> None:
        choice = self._choose()
        if not choice.images:
            raise DataError(
                f"download: collection {self._config.collection} has no image of the seven classes "
                f"({_names(choice.skipped) or 'it is empty'}); map its diagnoses with --download.diagnoses"
            )
        write_metadata(self._root / "metadata.csv", choice.images)  # first, so that a killed run has the lesions too
        licence = write_provenance(
            self._root / "DOWNLOAD.md", choice.images, without_secrets(self._config.api), self._listing.collection
        )
        self._ledger = Ledger(self._state / "downloaded.csv")
        try:
            missing, by_hand = self._missing(choice)
            self._check_space(missing)
            failures = self._fetch_all(missing, len(choice.images))
        finally:
            self._ledger.close()
        _report(choice, failures, by_hand, self._other_length)
        print(licence)
        if failures:
            raise DataError(
                f"download: {len(failures):,} of {len(choice.images):,} images could not be fetched: "
                f"{_some([f'{name} ({reason})' for name, reason in sorted(failures.items())], 5)}; the others are in "
                f"{self._root}. Run the same command again, or go on without them by leaving --download.enabled out."
            )

    def _choose(self) -> _Choice:
        choice = _Choice()
        asked = time.monotonic()

        def on_page(records: int, announced: int | None) -> None:
            nonlocal asked
            if time.monotonic() - asked >= _PLAIN_LINE_EVERY_S:
                asked = time.monotonic()
                print(f"listing: {records:,} of {f'{announced:,}' if announced else 'the'} records", flush=True)

        host = urlsplit(self._config.api).hostname
        print(f"collection {self._config.collection} (number {self._listing.collection}) of {host}", flush=True)
        for entry in self._listing.entries(on_page):
            if isinstance(entry, str):
                choice.skipped[entry] += 1
                continue
            code = class_of(entry.diagnosis, self._listing.collection, self._config.diagnoses)
            if entry.image_type not in ("", "dermoscopic"):
                choice.skipped[f"no dermoscopic image: {entry.image_type}"] += 1
            elif code is None:
                choice.skipped[entry.diagnosis[-1] if entry.diagnosis else "no diagnosis"] += 1
                choice.unmapped.add(entry.isic_id)
            else:
                choice.images.append((entry, code))
                if len(choice.images) == self._config.limit:
                    break
        return choice

    def _missing(self, choice: _Choice) -> tuple[list[tuple[ArchiveImage, str]], int]:
        """The images to fetch, and how many others stand there by somebody else's hand."""
        own = self._ledger.entries
        for image_id in choice.unmapped & own.keys():
            self._move(image_id, f"{STATE_FOLDER}/unmapped")  # another mapping of diagnoses than last time
        for image, code in choice.images:
            if image.isic_id in own:
                self._move(image.isic_id, code)
        noted = {
            image.isic_id: self._root / own[image.isic_id].path for image, _ in choice.images if image.isic_id in own
        }
        if noted:
            print(f"checking {len(noted):,} files of earlier runs", flush=True)
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            good = {
                image_id for image_id, found in zip(noted, pool.map(file_sha256, noted.values()), strict=True)
                if found == own[image_id].sha256
            }  # fmt: skip
        others = {Path(name).stem for name in _image_files(self._root)} - own.keys()
        absent = [(image, code) for image, code in choice.images if image.isic_id not in good]
        missing = [(image, code) for image, code in absent if image.isic_id not in others]
        return missing, len(absent) - len(missing)

    def _move(self, image_id: str, folder: str) -> None:
        entry = self._ledger.entries[image_id]
        target = f"{folder}/{entry.path.rpartition('/')[2]}"
        source, destination = self._root / entry.path, self._root / target
        if source != destination and source.is_file() and not destination.exists():
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, destination)  # before its line: killed in between, the worst is that it is fetched again
            self._ledger.add(image_id, LedgerEntry(target, entry.bytes, entry.sha256))

    def _check_space(self, missing: list[tuple[ArchiveImage, str]]) -> None:
        needed = sum(image.size or _LIKELY_BYTES for image, _ in missing)
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise DataError(
                f"download: {len(missing):,} images need {needed / 1e9:.1f} GB, and {self._root} has "
                f"{free / 1e9:.1f} GB left; free some, or take fewer with --download.limit"
            )
        if missing:
            print(f"fetching {len(missing):,} images, {needed / 1e6:,.0f} MB, into {self._root}", flush=True)

    def _fetch_all(self, missing: list[tuple[ArchiveImage, str]], wanted: int) -> dict[str, str]:
        """Fetch side by side; image id -> reason of those that could not be had."""
        failures: dict[str, str] = {}
        in_a_row, too_many, reason = 0, 2 * self._config.connections + 6, ""
        futures: dict[Future[bool], str] = {}
        pool = ThreadPoolExecutor(self._config.connections, thread_name_prefix="m2d-download")
        try:
            with _progress(len(missing)) as progress:
                futures = {
                    pool.submit(self._fetch_one, image, code, progress.count_bytes): image.isic_id
                    for image, code in missing
                }
                for future in as_completed(futures):
                    try:
                        self._other_length += future.result()
                        in_a_row = 0
                    except TransferError as error:
                        failures[futures[future]] = reason = str(error)
                        in_a_row += 1
                    progress.advance()
                    if in_a_row >= too_many:
                        break
        finally:
            self._transfer.stop.set()
            pool.shutdown(cancel_futures=True)
        if in_a_row >= too_many:
            fetched = sum(not future.cancelled() and future.exception() is None for future in futures)
            raise DataError(
                f"download: {in_a_row} images in a row could not be fetched ({reason}); "
                f"{wanted - len(missing) + fetched:,} of {wanted:,} are in {self._root}. "
                "Run the same command again to go on."
            )
        return failures

    def _fetch_one(self, image: ArchiveImage, code: str, count_bytes: Callable[[int], None]) -> bool:
        """Put one image in place; whether its length is another than its record says."""
        part = self._state / "partial" / f"{image.isic_id}.part"
        inspection = _Inspection(image)
        try:
            digest = self._transfer.fetch(image.url, part, inspection, count_bytes)
        except Refused as error:
            renewed = self._listing.ask_again(image.isic_id) if error.status in (401, 403, 404, 410) else None
            if renewed is None or renewed.url == image.url:
                raise
            digest = self._transfer.fetch(renewed.url, part, inspection, count_bytes)
        size = part.stat().st_size
        name = f"{code}/{image.isic_id}{inspection.suffix}"
        (self._root / code).mkdir(exist_ok=True)
        self._ledger.add(image.isic_id, LedgerEntry(name, size, digest))
        os.replace(part, self._root / name)
        return image.size not in (None, size)


class _Inspection:
    """Whether bytes are the image that a record describes: a whole picture of its size in pixels."""

    def __init__(self, image: ArchiveImage) -> None:
        self._image = image
        self.suffix = ""  # of the last bytes that passed; told by their signature, not by the server

    def __call__(self, content: bytes) -> str | None:
        """Why these bytes are not the image, None where they are."""
        suffixes = [suffix for signature, suffix in _SUFFIX_OF.items() if content.startswith(signature)]
        if not suffixes:
            return "what came is " + ("a web page" if content.lstrip()[:1] == b"<" else "no image")
        try:
            pixels = probe_image(content, max_pixels=_MAX_PIXELS)
        except ImageRejected as rejection:
            return f"what came is no whole image: {rejection.reason}"
        if self._image.pixels is not None and sorted(pixels) != sorted(self._image.pixels):
            return f"what came has {pixels[0]} x {pixels[1]} pixels, the record {self._image.pixels}"
        self.suffix = suffixes[0]
        return None


class _Counter:
    """What progress is shown from; count_bytes may be called from any thread."""

    def __init__(self, total: int, show: Callable[["_Counter"], None]) -> None:
        self.total = total
        self.done = 0
        self.bytes = 0
        self.began = time.monotonic()
        self._show = show

    def count_bytes(self, count: int) -> None:
        self.bytes += count  # threads may lose a count now and then; it is only shown

    def advance(self) -> None:
        self.done += 1
        self._show(self)

    @property
    def megabytes_per_s(self) -> float:
        return self.bytes / 1e6 / max(time.monotonic() - self.began, 1e-3)


@contextmanager
def _progress(total: int) -> Iterator[_Counter]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not sys.stdout.isatty():
        shown = time.monotonic()

        def show_line(counter: _Counter) -> None:
            nonlocal shown
            if time.monotonic() - shown >= _PLAIN_LINE_EVERY_S:
                shown = time.monotonic()
                left = (shown - counter.began) / counter.done * (total - counter.done)
                speed = f"{counter.megabytes_per_s:.1f} MB/s, {left / 60:.1f} min left"
                print(f"{counter.done:,} of {total:,} images, {speed}", flush=True)

        yield _Counter(total, show_line)
        return
    columns = (TextColumn("fetching"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console()) as bar:
        task = bar.add_task("", total=total)
        yield _Counter(
            total, lambda counter: bar.update(task, advance=1, description=f"{counter.megabytes_per_s:.1f} MB/s")
        )


def _report(choice: _Choice, failures: dict[str, str], by_hand: int, other_length: int) -> None:
    counts = Counter(code for image, code in choice.images if image.isic_id not in failures)
    print("class   images")
    for code in CLASSES:
        print(f"{code:6} {counts[code]:7,}")
    if choice.skipped:
        print(f"skipped {choice.skipped.total():,} records: {_names(choice.skipped)}")
    if by_hand:
        print(f"{by_hand:,} images were there before, not from this command: left as they are")
    if no_lesion := sum(not image.lesion_id for image, _ in choice.images):
        print(f"{no_lesion:,} images have no lesion_id in the archive: each counts as a lesion of its own")
    if other_length:
        print(
            f"{other_length:,} files have another length than their record says, as the archive adds licence fields to "
            "a file after measuring it; what the server sent with them was checked instead"
        )


def _names(skipped: Counter[str]) -> str:
    return _some([f"{name} ({count:,})" for name, count in skipped.most_common()], 12)


def _some(entries: list[str], most: int) -> str:
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


def _image_files(root: Path) -> Iterator[str]:
    """Names of the image files in the folders below root, hidden folders left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if Path(folder) != root:
            yield from (name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _local_folder(data_root: str) -> Path:
    filesystem, inner = open_storage(data_root)
    if not isinstance(filesystem, fs.LocalFileSystem):
        raise DataError(
            f"download: data_root is {without_secrets(data_root)}; download into a local folder, then copy it there"
        )
    return Path(inner)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"download: another run is fetching into {state.parent}; wait for it to end") from None
        yield
