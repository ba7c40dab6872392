"""Fetch a collection of the ISIC archive into class folders that m2d.data.catalog reads like any other dataset.

setup_data calls it before the scan. Run again, it fetches what is missing or has changed; its state is in
data_root/.m2d-download, which the scan ignores. What the API (v2) says, not seen live but taken from the published
sources of the archive (the server ImageMarkup/isic, the clients isic-cli and isic-metadata 4.12):

- `collections/ID/` describes a collection; an unknown one is a 404.
- `images/search/?collections=ID&limit=100` is a page {results, next, previous, count}; `next` is a whole URL with a
  cursor, null on the last page; 100 is the most a page holds.
- `images/ISIC_ID/` is one record. URLs of files may be signed, and then expire within a week.
- `files.full.size` was counted before the archive wrote licence and attribution into the file's IPTC and XMP fields
  (server: accession.blob_size and embed_iptc_metadata), so a whole file may well have another size.
- A diagnosis is `metadata.clinical.diagnosis_1` .. `diagnosis_5`, general to specific; before 2024 one `diagnosis`.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from pyarrow import fs
from urllib3 import exceptions as urllib3_errors
from urllib3.util import Retry

from m2d import __version__
from m2d.classes import ISIC7
from m2d.data.decode import ImageRejected, probe_image
from m2d.data.layouts import IMAGE_SUFFIXES, is_debris, without_image_suffix
from m2d.data.settings import SKIP, DownloadConfig, collection_number, is_web_address
from m2d.errors import DataError
from m2d.files.atomic import csv_text, try_lock, write_whole
from m2d.files.progress import progress
from m2d.files.storage import one_line, open_storage

STATE_FOLDER = ".m2d-download"
LONGEST_WAIT_S = 60.0  # between two attempts
LONGEST_PAUSE_S = 600.0  # a server that asks (Retry-After) for more is not waited for

_MAX_BYTES = 256 * 2**20  # a dermoscopic image has a few MB; an endless answer would fill the memory
_MAX_PIXELS = 250_000_000  # of one image, against decompression bombs
_LIKELY_BYTES = 300_000  # of an image whose record has no size
_SUFFIX_OF = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"II*\0": ".tif", b"MM\0*": ".tif"}
_LICENSES = {
    "CC-0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-NC": "https://creativecommons.org/licenses/by-nc/4.0/",
}
_DETAILS = ("patient_id", "diagnosis_confirm_type", "sex", "age_approx", "anatom_site_general")
_CREDITS = {"license": "copyright_license", "attribution": "attribution"}  # column -> the record's own name

T = TypeVar("T")


@dataclass(frozen=True)
class ArchiveImage:
    """One image record, checked: its id is fit for a file's name, its URL is http or https."""

    isic_id: str
    url: str
    size: int | None  # bytes, by the record; the file's own may differ (see above)
    pixels: tuple[int, int] | None  # width, height by the record
    diagnosis: tuple[str, ...]  # general to specific, () where there is none
    image_type: str  # dermoscopic, clinical: close-up, ...; "" where there is none
    row: Mapping[str, str]  # of metadata.csv, all but the class


Wanted = list[tuple[ArchiveImage, str]]  # with the class code


def download_isic(config: DownloadConfig, data_root: str, *, first_wait_s: float = 1.0) -> None:
    """Fetch what `data_root` lacks of the collection, as CLASS/ISIC_0024306.jpg, metadata.csv and DOWNLOAD.md.

    A file gets its name once its length, the MD5 of a file on S3 and its pixels are verified; its sha256 is noted, and
    a file that no longer has it is fetched again. Files that did not come from here are never touched. An image whose
    diagnosis is none of the seven classes is left out and counted by
    name. first_wait_s: before the second attempt, doubled with each further one.
    Raises DataError in one line: no network, no such collection, an unexpected answer, no space, images that could not
    be fetched after all attempts (the others are kept; run again to resume).
    """
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
    number = archive.collection
    print(f"collection {config.collection} (number {number}) of {urlsplit(config.api).hostname}", flush=True)

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
    names = ", ".join(f"{name} ({count:,})" for name, count in skipped.most_common(12))
    if not wanted:
        raise DataError(
            f"download: collection {config.collection} has no image of the seven classes ({names or 'it is empty'}); "
            "map its diagnoses with --download.diagnoses"
        )

    # 2. The notes come first, so that an interrupted run has the lesions too.
    _write_metadata(root / "metadata.csv", wanted)
    _write_provenance(root / "DOWNLOAD.md", wanted, config.api, number)

    # 3. What is in place already, moved where a diagnosis is mapped differently than the last time.
    ledger = _Ledger(root)
    for image_id in unmapped & ledger.files.keys():
        ledger.move(image_id, f"{STATE_FOLDER}/unmapped")
    for image, code in wanted:
        if image.isic_id in ledger.files:
            ledger.move(image.isic_id, code)
    good = ledger.unchanged({image.isic_id for image, _ in wanted})
    found = (path.relative_to(root) for path in root.glob("*/**/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    others = {path.stem for path in found if not any(map(is_debris, path.parts))} - ledger.files.keys()
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

    def fetch(image: ArchiveImage, code: str) -> None:
        content, suffix = archive.get_image(image)
        part, path = root / STATE_FOLDER / f"{image.isic_id}.part", f"{code}/{image.isic_id}{suffix}"
        part.write_bytes(content)
        ledger.add(image.isic_id, path, _fingerprint(content))
        (root / code).mkdir(exist_ok=True)
        os.replace(part, root / path)

    fetched = in_a_row = 0
    failures: dict[str, str] = {}
    pool = ThreadPoolExecutor(config.connections, thread_name_prefix="m2d-download")
    try:
        with progress("fetching", len(missing), stderr=False) as shown:
            futures = {pool.submit(fetch, image, code): image.isic_id for image, code in missing}
            for future in as_completed(futures):
                try:
                    future.result()
                    fetched, in_a_row = fetched + 1, 0
                except _Failure as failure:
                    failures[futures[future]] = str(failure)
                    in_a_row += 1
                shown.advance(1)
                if in_a_row == 2 * config.connections + 6:  # the network is gone: do not try every image
                    break
    finally:
        archive.stop.set()
        pool.shutdown(cancel_futures=True)

    # 5. The result.
    if lost := len(missing) - fetched:
        why = ", ".join([f"{name} ({reason})" for name, reason in sorted(failures.items())][:5])
        raise DataError(
            f"download: {lost:,} of {len(wanted):,} images could not be fetched: {why}; the others are in {root}. Run "
            "the same command again to resume, or continue without them by leaving --download.enabled out."
        )
    counts = Counter(code for _, code in wanted)
    print("class   images", *(f"{code:6} {counts[code]:7,}" for code in ISIC7.codes), sep="\n")
    if skipped:
        print(f"skipped {skipped.total():,} records: {names}")
    if by_hand := len(absent) - len(missing):
        print(f"{by_hand:,} images were there before, not from this command: left as they are")
    if no_lesion := sum(not image.row["lesion_id"] for image, _ in wanted):
        print(f"{no_lesion:,} images have no lesion_id in the archive: each counts as a lesion of its own")
    print(f"licences and whom to credit: {root / 'DOWNLOAD.md'}")


# --- the archive, over connections that break -------------------------------------------------------------------------


class _Failure(Exception):
    """It did not work, in one line without the address. again: another attempt may succeed (after pause_s)."""

    def __init__(self, reason: str, *, status: int = 0, again: bool = False, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.again, self.pause_s = status, again, pause_s


class _Archive:
    """One collection, for several threads. Set `stop` to end every request and wait soon."""

    def __init__(self, config: DownloadConfig, state: Path, first_wait_s: float) -> None:
        self.collection = collection_number(config.collection) or 0  # checked by DownloadConfig
        self.stop = threading.Event()
        self._config = config
        self._api = config.api.rstrip("/")
        self._listing = state / "listing"
        self._first_wait_s = first_wait_s
        self._reached = False  # some server has answered
        self._of_thread = threading.local()

    def entries(self) -> Iterator[ArchiveImage | str]:
        """Every record once, in the archive's order: the image, or in a few words why it is of no use."""
        self._ask(f"{self._api}/collections/{self.collection}/", self._check_collection)
        url: str | None = f"{self._api}/images/search/?collections={self.collection}&limit=100"
        asked, seen = set[str](), set[str]()
        while url is not None:
            if url in asked:
                raise DataError(f"download: {self._api} repeats its pages; try again with --download.fresh_listing")
            asked.add(url)
            page = self._ask(url, self._check_page)
            for entry in map(read_record, page["results"]):
                if isinstance(entry, str) or entry.isic_id not in seen:
                    yield entry
                if isinstance(entry, ArchiveImage):
                    seen.add(entry.isic_id)
            url = page["next"]

    def get_image(self, image: ArchiveImage) -> tuple[bytes, str]:
        """The whole, verified file, and the suffix that its bytes call for. Raises _Failure."""
        verify = partial(_with_suffix, image)
        try:
            return self._get(image.url, verify)
        except _Failure as failure:
            if failure.status not in (401, 403, 404, 410):
                raise
            with suppress(_Failure):  # a signed URL expires, so ask for the record as of now
                renewed = read_record(self._get(f"{self._api}/images/{image.isic_id}/", _read_json))
                if isinstance(renewed, ArchiveImage) and renewed.isic_id == image.isic_id and renewed.url != image.url:
                    return self._get(renewed.url, verify)
            raise

    def _ask(self, url: str, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """What the API says at `url`, kept on disk once it is checked: a killed or repeated run asks nothing twice."""
        kept = self._listing / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.json"
        with suppress(FileNotFoundError, _Failure):
            if not self._config.fresh_listing:
                return _read_json(kept.read_bytes())
        try:
            found = self._get(url, _read_json)
        except _Failure as failure:
            raise DataError(
                f"download: {self._api} did not list collection {self._config.collection}, number {self.collection} "
                f"there: {failure}; check the network, --download.collection and --download.api and run again to "
                "resume, or put the images into class folders by hand"
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
        following = page.get("next", 0)
        if not isinstance(page.get("results"), list) or not isinstance(following, str | None):
            raise DataError(
                f"download: {self._api} answered with JSON that is no page of images; is --download.api right?"
            )
        if following is not None and _origin(following) != _origin(self._api):
            raise DataError(f"download: the next page of {self._api} is on another host; refused")

    def _get(self, url: str, use: Callable[[bytes], T]) -> T:
        """use(the verified body at `url`), asked for again where a failure may pass.

        urllib3's own Retry ends where a body begins, and cannot be stopped while it waits.
        """
        for attempt in range(self._config.retries + 1):
            try:
                return use(self._body(url))
            except _Failure as error:
                failure = error
            except requests.RequestException as error:
                failure = self._lost(error)
            if not failure.again or attempt == self._config.retries:
                break
            own_pause = min(self._first_wait_s * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.75, 1.25)  # spread
            pause = own_pause if failure.pause_s is None else failure.pause_s
            if pause > LONGEST_PAUSE_S:
                raise _Failure(f"{failure}, and the server asks to wait {pause / 60:.0f} minutes")
            self.stop.wait(pause)
        raise _Failure(f"{failure}, {attempt + 1} times" if attempt else str(failure), status=failure.status)

    def _body(self, url: str) -> bytes:
        if not hasattr(self._of_thread, "session"):  # a Session is not documented to be safe in several threads
            self._of_thread.session = requests.Session()
            self._of_thread.session.headers.update({"User-Agent": f"m2d/{__version__}", "Accept-Encoding": "identity"})
            self._of_thread.session.max_redirects = 5
        timeout, body = (min(self._config.timeout_s, 10.0), self._config.timeout_s), bytearray()
        hooks = {"response": partial(_check_redirect, url.startswith(self._api))}
        with self._of_thread.session.get(url, stream=True, timeout=timeout, hooks=hooks) as response:
            self._reached = True
            status, headers = response.status_code, response.headers
            if status in (408, 429) or status >= 500:
                pause = None
                with suppress(urllib3_errors.InvalidHeader):
                    pause = Retry().get_retry_after(response.raw)
                raise _Failure(f"HTTP {status}", again=True, pause_s=pause)
            if status != 200:
                raise _Failure(f"HTTP {status}", status=status)
            for piece in response.iter_content(256 * 1024):  # raises where it ends before its Content-Length
                body += piece
                if self.stop.is_set() or len(body) > _MAX_BYTES:
                    raise _Failure("stopped, or its answer is too long to be what was asked for")
        # S3's ETag is the MD5 of an object uploaded in one piece, not encrypted with a key of its own (AWS, "Common
        # response headers"); of one uploaded in parts it ends in "-NUMBER".
        etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
        plain = (
            headers.get("x-amz-server-side-encryption", "AES256") == "AES256" and headers.get("Server") == "AmazonS3"
        )
        if etag and plain and hashlib.md5(body, usedforsecurity=False).hexdigest() != etag[1]:
            raise _Failure("its md5 is not the one that the server announced", again=True)
        return bytes(body)

    def _lost(self, error: requests.RequestException) -> _Failure:
        """What the operating system said, without the class names and addresses around it."""
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            return _Failure("the connection broke off", again=True)
        reason = getattr(error.args[0], "reason", None) if error.args else None
        never = (urllib3_errors.NewConnectionError, urllib3_errors.ConnectTimeoutError, urllib3_errors.ProxyError)
        no_network = not self._reached and isinstance(reason, never)  # say so at once
        passes = isinstance(error, requests.ConnectionError | requests.Timeout) and not no_network
        cause = "no answer in time" if isinstance(error, requests.Timeout) else one_line(reason or error)
        return _Failure(cause.rpartition(": ")[2], again=passes and not isinstance(error, requests.exceptions.SSLError))


def _check_redirect(same_host: bool, response: requests.Response, **_: Any) -> None:
    """requests calls it with each response before it follows a redirect."""
    if response.is_redirect:
        here, there = _origin(response.url), _origin(urljoin(response.url, response.headers["Location"]))
        if same_host and here != there:
            raise _Failure("it redirects to another host")
        if here.startswith("https:") and not there.startswith("https:"):
            raise _Failure("it redirects from https to http")


def _origin(url: str) -> str:
    """Scheme, host and port."""
    return "/".join(url.split("/", 3)[:3])


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
    """The bytes and the suffix by their signature; _Failure where they are not the whole image of the record."""
    suffix = next((suffix for signature, suffix in _SUFFIX_OF.items() if content.startswith(signature)), None)
    if suffix is None:
        raise _Failure("what came is " + ("a web page" if content.lstrip()[:1] == b"<" else "no image"), again=True)
    try:
        pixels = probe_image(content, max_pixels=_MAX_PIXELS)
    except ImageRejected as rejection:
        raise _Failure(f"what came is no whole image: {rejection.reason}", again=True) from None
    if image.pixels is not None and sorted(pixels) != sorted(image.pixels):
        raise _Failure(f"what came has {pixels[0]} x {pixels[1]} pixels, the record {image.pixels}", again=True)
    return content, suffix


# --- records and their classes ----------------------------------------------------------------------------------------


def read_record(record: Any) -> ArchiveImage | str:
    """One entry of a page's results; or, in a few words, why it is of no use. Never raises, whatever the API sent."""
    isic_id = _at(record, "isic_id")
    if not isinstance(isic_id, str) or not re.fullmatch(r"ISIC_[0-9]{1,12}", isic_id):  # it becomes a file name
        return "record whose id is not ISIC_ and a number"
    size, url = _at(record, "files", "full", "size"), _at(record, "files", "full", "url")
    if not isinstance(url, str) or not is_web_address(url):
        return "record without an http(s) address of its file"
    width, height = (_at(record, "metadata", "acquisition", f"pixels_{axis}") for axis in "xy")
    clinical = partial(_text, record, "metadata", "clinical")
    levels = [clinical(f"diagnosis_{level}") for level in range(1, 6)]
    if not any(levels):
        levels = [part.strip() for part in clinical("diagnosis").split(":")]
    row = {
        "image_id": isic_id,
        "lesion_id": clinical("lesion_id"),
        "class": "",
        "diagnosis": ": ".join(filter(None, levels)),
    }
    row |= {name: clinical(name) for name in _DETAILS}
    row |= {name: _text(record, key) or "not stated" for name, key in _CREDITS.items()}
    return ArchiveImage(
        isic_id=isic_id,
        url=url,
        size=size if isinstance(size, int) and size > 0 else None,
        pixels=(width, height) if isinstance(width, int) and isinstance(height, int) else None,
        diagnosis=tuple(filter(None, levels)),
        image_type=_text(record, "metadata", "acquisition", "image_type"),
        row=row,
    )


def _at(record: Any, *keys: str) -> Any:
    """What is under these keys of nested objects; None where it is not."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _text(record: Any, *keys: str) -> str:
    """A scalar as one line; lists, objects, null and booleans' absence as nothing."""
    value = _at(record, *keys)
    return " ".join(str(value).split())[:500] if isinstance(value, (str, int, float)) else ""


# The archive files HAM10000's intraepithelial carcinomas (Bowen's disease) under squamous cell carcinoma: in collection
# 212, 149 solar or actinic keratoses and 229 carcinomas make the 378 AKIEC of task 3 (327 training, 8 validation, 43
# test). Elsewhere the same words mean an invasive carcinoma, which is none of the seven classes.
_TASK_3_COLLECTIONS = {66, 67, 73, 212}
_TASK_3_BRANCHES = {"squamous cell carcinoma": "AKIEC", "squamous cell carcinoma, nos": "AKIEC"}


def class_of(diagnosis: tuple[str, ...], collection: int, own_classes: Mapping[str, str]) -> str | None:
    """The class code of a diagnosis (general to specific), None where the tables name none: it is never guessed.

    collection: its number, because HAM10000 uses one term in a way of its own. own_classes: the user's diagnosis name
    -> class code or SKIP, any letter case; covers what is below it and goes before the tables.
    The most specific term that is known decides.
    """
    task_3 = _TASK_3_BRANCHES if collection in _TASK_3_COLLECTIONS else {}
    code = ISIC7.find(*diagnosis, own={**task_3, **own_classes})
    return None if code == SKIP else code


# --- notes beside the images ------------------------------------------------------------------------------------------


class _Ledger:
    """downloaded.csv: which file was put where, and its sha256. A line is added before its file gets its name.

    So a file without a line did not come from here, and a line without its file is harmless.
    """

    _LINE = re.compile(
        rf"(ISIC_[0-9]+),((?:{'|'.join(ISIC7.codes)}|{re.escape(STATE_FOLDER)}/unmapped)/\1\.[a-z]+),"
        r"([0-9]+,[0-9a-f]{64})"
    )

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / STATE_FOLDER / "downloaded.csv"
        self._lock = threading.Lock()
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        lines = filter(None, map(self._LINE.fullmatch, text.splitlines()))  # a torn line does not match
        self.files = {line[1]: (line[2], line[3]) for line in lines}  # image_id -> path in data_root, fingerprint
        if not text.endswith("\n"):
            self._append("\n" if text else "image_id,path,bytes,sha256\n")

    def add(self, image_id: str, path: str, fingerprint: str) -> None:
        """Write one line, at once. Safe in several threads."""
        with self._lock:
            self.files[image_id] = path, fingerprint
            self._append(f"{image_id},{path},{fingerprint}\n")

    def move(self, image_id: str, folder: str) -> None:
        """Put an image into another folder, unless it is there already or not where its line says."""
        path, fingerprint = self.files[image_id]
        moved = f"{folder}/{path.rpartition('/')[2]}"
        source, target = self._root / path, self._root / moved
        if source != target and source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)  # before its line: killed in between, at worst it is fetched again
            self.add(image_id, moved, fingerprint)

    def unchanged(self, image_ids: set[str]) -> set[str]:
        """Those whose file still has its sha256."""

        def is_good(image_id: str) -> bool:
            path, fingerprint = self.files[image_id]
            file = self._root / path
            return file.is_file() and _fingerprint(file.read_bytes()) == fingerprint

        noted = sorted(self.files.keys() & image_ids)
        if noted:
            print(f"checking {len(noted):,} files of earlier runs", flush=True)
        with ThreadPoolExecutor(4) as pool:
            return {image_id for image_id, good in zip(noted, pool.map(is_good, noted), strict=True) if good}

    def _append(self, text: str) -> None:
        with self._path.open("a") as stream:
            stream.write(text)


def _fingerprint(content: bytes) -> str:
    """As in a line of the ledger: length and sha256."""
    return f"{len(content)},{hashlib.sha256(content).hexdigest()}"


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
        known = {**image.row, "class": code}
        old = rows.get(image.isic_id, {})
        rows[image.isic_id] = old | {name: value for name, value in known.items() if value or name not in old}
        columns += [name for name in known if name not in columns]
    _write_changed(path, csv_text(rows.values(), columns, "\n"))


def _write_provenance(path: Path, wanted: Wanted, source: str, collection: int) -> None:
    """DOWNLOAD.md: where the images come from, under which licences, whom to credit."""
    plain = str.maketrans("|<>", "/()")
    licenses, owners = (Counter(image.row[column] for image, _ in wanted).most_common() for column in _CREDITS)
    text = [
        "# Where these images come from\n",
        f"Fetched by `m2d` from the ISIC archive, collection {collection} of <{source}>, on "
        f"{datetime.now(UTC):%Y-%m-%d}. `metadata.csv` names licence and attribution of each image.\n",
        "| licence | images | text |\n|---|---|---|",
        *(f"| {name.translate(plain)} | {count:,} | {_LICENSES.get(name, '')} |" for name, count in licenses),
        "\nAttribution, which the licences ask for:\n",
        *(f"- {name.translate(plain)} ({count:,} images)" for name, count in owners),
        "\nCC-BY-NC allows no commercial use.",
    ]
    if collection in (66, 212):
        text.append(
            "\nCite: Tschandl, Rosendahl, Kittler: The HAM10000 dataset, a large collection of multi-source "
            "dermatoscopic images of common pigmented skin lesions. Scientific Data 5:180161 (2018)."
        )
    _write_changed(path, "\n".join(text) + "\n")


def _write_changed(path: Path, text: str) -> None:
    """The same content keeps its date, by which the next scan knows it."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_whole(path, text)
