"""Fetch a collection of the ISIC archive into class folders that m2d.data.catalog reads like any other dataset.

setup_data calls it before the scan. Run again, it fetches what is missing or has changed; its state is in
data_root/.m2d-download, which the scan ignores. What the API says, and how that is known: m2d.data.isic_archive.
"""

import base64
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from pyarrow import fs
from urllib3 import exceptions as urllib3_errors
from urllib3.util import Retry

from m2d import __version__
from m2d.classes import CLASSES
from m2d.data.decode import ImageRejected, probe_image
from m2d.data.isic_archive import ArchiveImage, class_of, collection_number, read_record
from m2d.data.layouts import IMAGE_SUFFIXES, is_debris, without_image_suffix
from m2d.data.settings import DownloadConfig
from m2d.errors import DataError
from m2d.files.atomic import try_lock, write_whole
from m2d.files.progress import PLAIN_LINE_EVERY_S, progress
from m2d.files.storage import open_storage

STATE_FOLDER = ".m2d-download"
PAGE_SIZE = 100  # the most that the API gives
LONGEST_WAIT_S = 60.0  # between two attempts
LONGEST_PAUSE_S = 600.0  # a server that asks (Retry-After) for more is not waited for

_MAX_PAGE_BYTES = 64 * 2**20
_MAX_FILE_BYTES = 256 * 2**20  # a dermoscopic image has a few MB; an endless answer would fill the memory
_MAX_PIXELS = 250_000_000  # of one image, against decompression bombs
_LIKELY_BYTES = 300_000  # of an image whose record has no size
_SUFFIX_OF = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"II*\0": ".tif", b"MM\0*": ".tif"}
_NEVER_CONNECTED = (
    urllib3_errors.NewConnectionError,
    urllib3_errors.ConnectTimeoutError,
    urllib3_errors.ProxyError,
)
_LICENSES = {
    "CC-0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-NC": "https://creativecommons.org/licenses/by-nc/4.0/",
}
_HAM10000_PAPER = (
    "Tschandl, Rosendahl, Kittler: The HAM10000 dataset, a large collection of multi-source dermatoscopic images of "
    "common pigmented skin lesions. Scientific Data 5:180161 (2018)."
)

Wanted = list[tuple[ArchiveImage, str]]  # with the class code
T = TypeVar("T")


def download_isic(config: DownloadConfig, data_root: str, *, first_wait_s: float = 1.0) -> None:
    """Fetch what `data_root` lacks of the collection, as CLASS/ISIC_0024306.jpg, metadata.csv and DOWNLOAD.md.

    Does nothing unless config.enabled. A file gets its name once its length, the checksums that the server sends and
    its pixels are verified; its sha256 is noted, and a file that no longer has it is fetched again. Files that did not
    come from here are never touched. An image whose diagnosis is none of the seven classes is left out and counted by
    name. first_wait_s: before the second attempt, doubled with each further one.
    Raises DataError in one line: no network, no such collection, an unexpected answer, no space, images that could not
    be fetched after all attempts (the others are kept; run again to resume).
    """
    if not config.enabled:
        return
    filesystem, inner = open_storage(data_root)
    if not isinstance(filesystem, fs.LocalFileSystem):
        raise DataError(f"download: data_root is {data_root}; download into a local folder, then copy it there")
    root = Path(inner)
    try:
        (root / STATE_FOLDER / "listing").mkdir(parents=True, exist_ok=True)
        lock = try_lock(root / STATE_FOLDER / "lock")
        if lock is None:
            raise DataError(f"download: another run is fetching into {root}; wait for it to end")
        with lock:
            _download(config, root, _Archive(config, root / STATE_FOLDER, first_wait_s))
    except OSError as error:
        raise DataError(
            f"download: {root} cannot be written ({error.strerror or error}); check the path and its free space"
        ) from error


def _download(config: DownloadConfig, root: Path, archive: "_Archive") -> None:
    number, host = archive.collection, urlsplit(config.api).hostname
    print(f"collection {config.collection} (number {number}) of {host}", flush=True)

    # 1. Of the collection, the dermoscopic images of the seven classes.
    wanted: Wanted = []
    unmapped: set[str] = set()
    skipped: Counter[str] = Counter()
    for entry in archive.entries():
        if isinstance(entry, str):
            skipped[entry] += 1
            continue
        code = class_of(entry.diagnosis, number, config.diagnoses)
        if entry.image_type not in ("", "dermoscopic"):
            skipped[f"no dermoscopic image: {entry.image_type}"] += 1
        elif code is None:
            skipped[entry.diagnosis[-1] if entry.diagnosis else "no diagnosis"] += 1
            unmapped.add(entry.isic_id)
        else:
            wanted.append((entry, code))
            if len(wanted) == config.limit:
                break
    names = _some([f"{name} ({count:,})" for name, count in skipped.most_common()], 12)
    if not wanted:
        raise DataError(
            f"download: collection {config.collection} has no image of the seven classes ({names or 'it is empty'}); "
            "map its diagnoses with --download.diagnoses"
        )

    # 2. The notes come first, so that an interrupted run has the lesions too.
    _write_metadata(root / "metadata.csv", wanted)
    licence = _write_provenance(root / "DOWNLOAD.md", wanted, config.api, number)

    # 3. What is in place already, moved where a diagnosis is mapped differently than the last time.
    ledger = _Ledger(root)
    for image_id in unmapped & ledger.files.keys():
        ledger.move(image_id, f"{STATE_FOLDER}/unmapped")
    for image, code in wanted:
        if image.isic_id in ledger.files:
            ledger.move(image.isic_id, code)
    good = ledger.unchanged({image.isic_id for image, _ in wanted})
    found = (path.relative_to(root) for path in root.glob("*/**/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    others = {path.stem for path in found if not any(is_debris(part) for part in path.parts)} - ledger.files.keys()
    absent = [(image, code) for image, code in wanted if image.isic_id not in good]
    missing = [(image, code) for image, code in absent if image.isic_id not in others]

    # 4. The rest.
    needed, free = sum(image.size or _LIKELY_BYTES for image, _ in missing), shutil.disk_usage(root).free
    if needed > free:
        raise DataError(
            f"download: {len(missing):,} images need {needed / 1e9:.1f} GB, and {root} has {free / 1e9:.1f} GB left; "
            "free some, or take fewer with --download.limit"
        )
    if missing:
        print(f"fetching {len(missing):,} images, {needed / 1e6:,.0f} MB, into {root}", flush=True)

    def fetch(image: ArchiveImage, code: str) -> bool:
        """Put one image in place; returns whether its length differs from its record."""
        content, suffix = archive.get_image(image)
        part, path = root / STATE_FOLDER / f"{image.isic_id}.part", f"{code}/{image.isic_id}{suffix}"
        part.write_bytes(content)
        ledger.add(image.isic_id, _File(path, len(content), hashlib.sha256(content).hexdigest()))
        (root / code).mkdir(exist_ok=True)
        os.replace(part, root / path)
        return image.size not in (None, len(content))

    failures: dict[str, str] = {}
    other_length = in_a_row = 0
    pool = ThreadPoolExecutor(config.connections, thread_name_prefix="m2d-download")
    try:
        with progress("fetching", len(missing), stderr=False) as shown:
            futures = {pool.submit(fetch, image, code): image.isic_id for image, code in missing}
            for done, future in enumerate(as_completed(futures), 1):
                try:
                    other_length += future.result()
                    in_a_row = 0
                except _Failure as failure:
                    failures[futures[future]] = str(failure)
                    in_a_row += 1
                    if in_a_row == 2 * config.connections + 6:  # the network is gone: do not try every image
                        there = len(wanted) - len(missing) + done - len(failures)
                        raise DataError(
                            f"download: {in_a_row} images in a row could not be fetched ({failure}); {there:,} of "
                            f"{len(wanted):,} are in {root}. Run the same command again to resume."
                        ) from None
                shown.advance(1)
    finally:
        archive.stop.set()
        pool.shutdown(cancel_futures=True)

    # 5. What came of it.
    counts = Counter(code for image, code in wanted if image.isic_id not in failures)
    print("class   images")
    for code in CLASSES:
        print(f"{code:6} {counts[code]:7,}")
    if skipped:
        print(f"skipped {skipped.total():,} records: {names}")
    if by_hand := len(absent) - len(missing):
        print(f"{by_hand:,} images were there before, not from this command: left as they are")
    if no_lesion := sum(not image.lesion_id for image, _ in wanted):
        print(f"{no_lesion:,} images have no lesion_id in the archive: each counts as a lesion of its own")
    if other_length:
        print(
            f"{other_length:,} files have another length than their record says, as the archive adds licence fields to "
            "a file after measuring it; what the server sent with them was checked instead"
        )
    print(licence)
    if failures:
        raise DataError(
            f"download: {len(failures):,} of {len(wanted):,} images could not be fetched: "
            f"{_some([f'{name} ({reason})' for name, reason in sorted(failures.items())], 5)}; the others are in "
            f"{root}. Run the same command again, or continue without them by leaving --download.enabled out."
        )


def _some(entries: list[str], most: int) -> str:
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


# --- the archive, over connections that break -------------------------------------------------------------------------


class _Failure(Exception):
    """It did not work, in one line without the address."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _Transient(_Failure):
    """Another attempt may succeed, after the pause that the server asked for (None: after our own)."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class _Archive:
    """One collection, for several threads. Set `stop` to end every request and wait soon."""

    def __init__(self, config: DownloadConfig, state: Path, first_wait_s: float) -> None:
        number = collection_number(config.collection)
        assert number is not None, "checked by DownloadConfig"
        self.collection = number
        self.stop = threading.Event()
        self._config = config
        self._api = config.api.rstrip("/")
        self._state = state
        self._first_wait_s = first_wait_s
        self._reached = False  # some server has answered
        self._of_thread = threading.local()

    def entries(self) -> Iterator[ArchiveImage | str]:
        """Every record once, in the archive's order: the image, or in a few words why it is of no use."""
        self._ask(f"{self._api}/collections/{self.collection}/", self._check_collection)
        seen: set[str] = set()
        records, shown = 0, time.monotonic()
        url: str | None = f"{self._api}/images/search/?collections={self.collection}&limit={PAGE_SIZE}"
        while url is not None:
            page = self._ask(url, self._check_page)
            url, fresh = page["next"], 0
            for entry in map(read_record, page["results"]):
                if isinstance(entry, ArchiveImage):
                    if entry.isic_id in seen:
                        continue
                    seen.add(entry.isic_id)
                fresh += 1
                yield entry
            if not fresh and url is not None:
                raise DataError(f"download: {self._api} repeats its pages; try again with --download.fresh_listing")
            records += len(page["results"])
            if time.monotonic() - shown >= PLAIN_LINE_EVERY_S:
                shown = time.monotonic()
                print(f"listing: {records:,} records", flush=True)

    def get_image(self, image: ArchiveImage) -> tuple[bytes, str]:
        """The whole, verified file, and the suffix that its bytes call for. Raises _Failure."""
        verify = partial(_with_suffix, image)
        try:
            return self._get(image.url, verify, _MAX_FILE_BYTES)
        except _Failure as failure:
            if failure.status not in (401, 403, 404, 410):
                raise
            with suppress(_Failure):  # a signed URL expires, so ask for the record as of now
                renewed = read_record(self._get(f"{self._api}/images/{image.isic_id}/", _read_json, _MAX_PAGE_BYTES))
                if isinstance(renewed, ArchiveImage) and renewed.isic_id == image.isic_id and renewed.url != image.url:
                    return self._get(renewed.url, verify, _MAX_FILE_BYTES)
            raise

    def _ask(self, url: str, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """What the API says at `url`, kept on disk once it is checked: a killed or repeated run asks nothing twice."""
        kept = self._state / "listing" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.json"
        with suppress(FileNotFoundError, _Failure):
            if not self._config.fresh_listing:
                return _read_json(kept.read_bytes())
        try:
            found = self._get(url, _read_json, _MAX_PAGE_BYTES, same_host=True)
        except _Failure as failure:
            if failure.status == 404 and "/collections/" in url:
                raise DataError(
                    f"download.collection: {self._api} has no public collection {self._config.collection} "
                    f"(HTTP 404 for number {self.collection}); look its number up in the archive"
                ) from failure
            raise DataError(
                f"download: {self._api} did not list the images: {failure}; check the network and --download.api and "
                "run again to resume, or put the images into class folders by hand"
            ) from failure
        check(found)
        write_whole(kept, json.dumps(found))
        return found

    def _check_collection(self, about: dict[str, Any]) -> None:
        """A search in a collection that does not exist is just empty; a name that moved on would fetch other images."""
        name = about.get("name")
        if self._config.collection == "ham10000" and isinstance(name, str) and "ham10000" not in name.casefold():
            raise DataError(
                f"download.collection: number {self.collection} is called {name[:80]!r} in {self._api}, not HAM10000; "
                "look its number up there and give that"
            )

    def _check_page(self, page: dict[str, Any]) -> None:
        following = page.get("next")
        if not isinstance(page.get("results"), list) or not isinstance(following, str | None) or "next" not in page:
            raise DataError(
                f"download: {self._api} answered with JSON that is no page of images; is --download.api right?"
            )
        if following is not None and _origin(following) != _origin(self._api):
            raise DataError(f"download: the next page of {self._api} is on another host; refused")

    def _get(self, url: str, use: Callable[[bytes], T], most: int, *, same_host: bool = False) -> T:
        """use(the verified body at `url`), which raises _Transient to have it fetched again.

        A body that breaks off is continued where the server allows it: HTTP Range with If-Range, so that the rest is of
        the same file. urllib3's Retry ends where a body begins, hence this loop; an attempt that brings new bytes does
        not count as one. most: bytes, more are refused.
        """
        body, validator, failures, longest = bytearray(), None, 0, 0
        while True:
            headers = {"Accept-Encoding": "identity"}
            if body and validator:
                headers |= {"Range": f"bytes={len(body)}-", "If-Range": validator}
            try:
                with self._response(url, headers, same_host) as response:
                    whole = _start(response, body)
                    if response.status_code == 200:
                        etag = response.headers.get("ETag", "")  # If-Range takes a strong one, or a date
                        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
                    # What the socket has; iter_content would lose what it holds of a piece when the rest fails.
                    while piece := response.raw.read1(256 * 1024, decode_content=True):
                        body += piece
                        if self.stop.is_set():
                            raise _Failure("stopped")
                        if len(body) > most:
                            raise _Failure("its answer is too long to be what was asked for")
                try:
                    _verify(body, whole, response)
                    return use(bytes(body))
                except _Transient:
                    body.clear()
                    raise
            except (_Transient, urllib3_errors.HTTPError) as error:
                failure = error if isinstance(error, _Transient) else _Transient("the connection broke off")
                if len(body) > longest:
                    failures, longest = 0, len(body)
                if failures >= self._config.retries:
                    raise _Failure(str(failure) + (f", {failures + 1} times" if failures else "")) from failure
                pause = failure.pause_s
                if pause is None:  # spread, so that the threads do not come back together
                    pause = min(self._first_wait_s * 2**failures, LONGEST_WAIT_S) * random.uniform(0.75, 1.25)
                if pause > LONGEST_PAUSE_S:
                    raise _Failure(f"{failure}, and the server asks to wait {pause / 60:.0f} minutes") from failure
                self.stop.wait(pause)
                failures += 1

    @contextmanager
    def _response(self, url: str, headers: dict[str, str], same_host: bool) -> Iterator[requests.Response]:
        if self.stop.is_set():
            raise _Failure("stopped")
        timeout = self._config.timeout_s
        if not hasattr(self._of_thread, "session"):  # a Session is not documented to be safe in several threads
            self._of_thread.session = requests.Session()
            self._of_thread.session.headers["User-Agent"] = f"m2d/{__version__}"
            self._of_thread.session.max_redirects = 5
        try:
            response = self._of_thread.session.get(
                url,
                headers=headers,
                stream=True,
                timeout=(min(timeout, 10.0), timeout),
                hooks={"response": partial(_check_redirect, same_host)},
            )
        except requests.RequestException as error:
            lost = isinstance(error, requests.ConnectionError | requests.Timeout)
            reason = getattr(error.args[0], "reason", None) if error.args else None
            no_network = not self._reached and isinstance(reason, _NEVER_CONNECTED)  # say so at once
            if not lost or no_network or isinstance(error, requests.exceptions.SSLError):
                raise _Failure(_cause(error)) from None
            raise _Transient(_cause(error)) from None
        self._reached = True
        with response:
            status = response.status_code
            if status in (408, 429) or status >= 500:
                pause = None
                with suppress(urllib3_errors.InvalidHeader):
                    pause = Retry().parse_retry_after(response.headers.get("Retry-After", ""))
                raise _Transient(f"HTTP {status}", pause)
            if status not in (200, 206, 416):
                raise _Failure(f"HTTP {status}", status)
            yield response


def _check_redirect(same_host: bool, response: requests.Response, **_: Any) -> None:
    """requests calls it with each response before it follows a redirect."""
    if response.is_redirect:
        here, there = _origin(response.url), _origin(urljoin(response.url, response.headers["Location"]))
        if same_host and here != there:
            raise _Failure("it redirects to another host")
        if here[0] == "https" != there[0]:
            raise _Failure("it redirects from https to http")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port
    except ValueError:
        return "", None, None


def _start(response: requests.Response, body: bytearray) -> int | None:
    """Length of the whole file, None where the server does not say. Empties `body` where the file starts over."""
    if response.status_code == 200:
        body.clear()
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() and "Content-Encoding" not in response.headers else None
    span = re.fullmatch(rf"bytes {len(body)}-[0-9]+/([0-9]+)", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or span is None:
        body.clear()
        raise _Transient("the server refused to continue where the last attempt stopped", 0.0)
    return int(span[1])


def _verify(body: bytearray, whole: int | None, response: requests.Response) -> None:
    """Length and checksums, as far as the server's headers give them.

    An ETag is an MD5 only on S3, for an object that was uploaded in one piece and is not encrypted with a key of its
    own (AWS, "Common response headers"). Digests of S3's multipart uploads end in "-NUMBER" and are not of the file.
    """
    if whole is not None and len(body) != whole:
        raise _Transient(f"{len(body):,} bytes arrived where the server announced {whole:,}")
    headers = response.headers
    announced = {name: headers.get(f"x-amz-checksum-{name}", "") for name in ("sha1", "sha256")}
    if response.status_code == 200:  # of a 206 it may be the part's
        announced["md5"] = headers.get("Content-MD5", "")
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    plain = headers.get("x-amz-server-side-encryption", "AES256") == "AES256"
    own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
    if etag and headers.get("Server") == "AmazonS3" and plain and not own_key:
        announced["md5"] = base64.b64encode(bytes.fromhex(etag[1])).decode()
    for name, digest in announced.items():
        found = base64.b64encode(hashlib.new(name, body, usedforsecurity=False).digest()).decode()
        if len(digest) == len(found) and digest != found:
            raise _Transient(f"its {name} is not the one that the server announced")


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        kind = "HTML" if body.lstrip()[:1] == b"<" else "something else"
        raise _Failure(f"it answered with {kind} where JSON was expected, as a login page or a proxy does") from None
    if not isinstance(found, dict):
        raise _Failure("its JSON is not an object")
    return found


def _with_suffix(image: ArchiveImage, content: bytes) -> tuple[bytes, str]:
    """The bytes and the suffix by their signature; _Transient where they are not the whole image of the record."""
    suffix = next((suffix for signature, suffix in _SUFFIX_OF.items() if content.startswith(signature)), None)
    if suffix is None:
        raise _Transient("what came is " + ("a web page" if content.lstrip()[:1] == b"<" else "no image"))
    try:
        pixels = probe_image(content, max_pixels=_MAX_PIXELS)
    except ImageRejected as rejection:
        raise _Transient(f"what came is no whole image: {rejection.reason}") from None
    if image.pixels is not None and sorted(pixels) != sorted(image.pixels):
        raise _Transient(f"what came has {pixels[0]} x {pixels[1]} pixels, the record {image.pixels}")
    return content, suffix


def _cause(error: requests.RequestException) -> str:
    """What the operating system said, without the class names and addresses around it."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    text = " ".join(str(error).split())
    plain = re.search(
        r"\[Errno -?\d+\] ([^'\")]+)|(Remote end closed connection|certificate verify failed[^(')]*)", text
    )
    return (plain[1] or plain[2]).strip() if plain else (text[:160] or type(error).__name__)


# --- notes beside the images ------------------------------------------------------------------------------------------


class _File(NamedTuple):
    path: str  # relative to data_root
    bytes: int
    sha256: str


class _Ledger:
    """downloaded.csv: which file was put where, and its sha256. A line is added before its file gets its name.

    So a file without a line did not come from here, and a line without its file is harmless.
    """

    _LINE = re.compile(
        rf"(ISIC_[0-9]+),((?:{'|'.join(CLASSES)}|{re.escape(STATE_FOLDER)}/unmapped)/\1\.[a-z]+),"
        r"([0-9]+),([0-9a-f]{64})"
    )

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / STATE_FOLDER / "downloaded.csv"
        self._lock = threading.Lock()
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        lines = filter(None, map(self._LINE.fullmatch, text.splitlines()))  # a torn line does not match
        self.files = {line[1]: _File(line[2], int(line[3]), line[4]) for line in lines}
        if not text.endswith("\n"):
            self._append("\n" if text else "image_id,path,bytes,sha256\n")

    def add(self, image_id: str, file: _File) -> None:
        """Write one line, at once. Safe in several threads."""
        with self._lock:
            self.files[image_id] = file
            self._append(f"{image_id},{file.path},{file.bytes},{file.sha256}\n")

    def move(self, image_id: str, folder: str) -> None:
        """Put an image into another folder, unless it is there already or not where its line says."""
        file = self.files[image_id]
        moved = file._replace(path=f"{folder}/{file.path.rpartition('/')[2]}")
        source, target = self._root / file.path, self._root / moved.path
        if source != target and source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)  # before its line: killed in between, at worst it is fetched again
            self.add(image_id, moved)

    def unchanged(self, image_ids: set[str]) -> set[str]:
        """Those whose file still has its sha256."""
        noted = [image_id for image_id in self.files if image_id in image_ids]
        if noted:
            print(f"checking {len(noted):,} files of earlier runs", flush=True)

        def is_good(image_id: str) -> bool:
            path = self._root / self.files[image_id].path
            return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.files[image_id].sha256

        with ThreadPoolExecutor(4) as pool:
            return {image_id for image_id, good in zip(noted, pool.map(is_good, noted), strict=True) if good}

    def _append(self, text: str) -> None:
        with self._path.open("a") as stream:
            stream.write(text)


def _write_metadata(path: Path, wanted: Wanted) -> None:
    """metadata.csv, one row per image: what m2d.data.catalog reads, licence and attribution.

    Rows and columns of an existing table stay, unless they are of these images. Raises DataError where what is there
    is no table with a column image_id.
    """
    rows: dict[str, dict[str, str]] = {}
    columns = ["image_id"]
    if path.exists():
        try:
            reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), restval="")
            reader.fieldnames = columns = [column.strip() for column in reader.fieldnames or ()]
            columns.index("image_id")
            rows = {
                without_image_suffix(row["image_id"].strip()): {name: row[name] for name in columns} for row in reader
            }
        except (ValueError, csv.Error):
            raise DataError(
                f"{path} is no CSV file in UTF-8 with a column image_id; move it away, then run again"
            ) from None
    for image, code in wanted:
        known = {
            "image_id": image.isic_id,
            "lesion_id": image.lesion_id,
            "class": code,
            "diagnosis": ": ".join(image.diagnosis),
            **image.details,
            "license": image.license,
            "attribution": image.attribution,
        }
        old = rows.get(image.isic_id, {})
        rows[image.isic_id] = old | {name: value for name, value in known.items() if value or name not in old}
        columns += [name for name in known if name not in columns]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    _write_changed(path, table.getvalue())


def _write_provenance(path: Path, wanted: Wanted, source: str, collection: int) -> str:
    """DOWNLOAD.md: where the images come from, under which licences, whom to credit. Returns it as one line."""
    licenses = Counter(image.license for image, _ in wanted).most_common()
    attributions = Counter(image.attribution for image, _ in wanted).most_common()

    def cell(text: str) -> str:
        return text.replace("|", "/").replace("<", "(").replace(">", ")")

    lines = [
        "# Where these images come from",
        "",
        f"Fetched by `m2d` from the ISIC archive, collection {collection} of <{source}>, "
        f"on {datetime.now(UTC):%Y-%m-%d}. `metadata.csv` names licence and attribution of each image.",
        "",
        "| licence | images | text |",
        "|---|---|---|",
        *(f"| {cell(name)} | {count:,} | {_LICENSES.get(name, '')} |" for name, count in licenses),
        "",
        "Attribution, which the licences ask for:",
        "",
        *(f"- {cell(name)} ({count:,} images)" for name, count in attributions),
        "",
        "CC-BY-NC allows no commercial use.",
    ]
    if collection in (66, 212):
        lines += ["", f"Cite: {_HAM10000_PAPER}"]
    _write_changed(path, "\n".join(lines) + "\n")
    counts = ", ".join(f"{name} ({count:,} images)" for name, count in licenses[:4])
    return f"licence: {counts}; attribution: {_some([name for name, _ in attributions], 3)}; all of it in {path}"


def _write_changed(path: Path, text: str) -> None:
    """The same content keeps its date, by which the next scan knows it."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)
