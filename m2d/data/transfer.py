"""HTTP with patience: JSON pages, and files that appear whole or not at all, over connections that break.

m2d.data.download uses it from several threads. It knows nothing of ISIC, classes or folders of images.
"""

import base64
import binascii
import email.utils
import errno
import hashlib
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from m2d import __version__
from m2d.data.isic_archive import is_web_address

FIRST_WAIT_S = 1.0  # before the second attempt; doubles with each further one
LONGEST_WAIT_S = 60.0
LONGEST_PAUSE_S = 600.0  # a server that asks (Retry-After) for more is not waited for
_CONNECT_TIMEOUT_S = 10.0
_CHUNK = 256 * 1024
_MAX_PAGE_BYTES = 64 * 2**20
_MAX_FILE_BYTES = 256 * 2**20  # a dermoscopic image has a few MB; without an end, an answer would fill the disk
_REDIRECTS = 5


class TransferError(Exception):
    """It did not work, in one line without the address; another run may fare better."""


class Unreachable(TransferError):
    """No connection could be made at all, and none has been made before: there is no network to the server."""


class Refused(TransferError):
    """The server answered, and asking again would not change the answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """`stop` was set."""


class _Transient(Exception):
    """This attempt failed; another may not."""

    def __init__(self, reason: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.pause_s = pause_s  # what the server asked for, None: our own


class Transfer:
    """Connections of one download: patience and time limits are shared, sessions are one a thread.

    retries: further attempts after the first, for dropped connections, time-outs, HTTP 408, 429 and 5xx. An attempt
    that brought new bytes of a file does not count. stop: set it to end every request and wait soon (Stopped).
    """

    def __init__(self, *, retries: int, timeout_s: float) -> None:
        self.stop = threading.Event()
        self._retries = retries
        self._timeout = (min(timeout_s, _CONNECT_TIMEOUT_S), timeout_s)
        self._reached = False  # some server has answered
        self._sessions = threading.local()

    def get_json(self, url: str) -> dict[str, Any]:
        """The JSON object at `url`. Redirects are followed on the same host alone.

        Raises Refused (with the status where there is one), Unreachable, TransferError or Stopped.
        """
        for attempt in itertools.count():
            try:
                return self._get_json_once(url)
            except _Transient as failure:
                self._wait(failure, attempt)
        raise AssertionError("unreachable")

    def fetch(
        self,
        url: str,
        part: Path,
        check: Callable[[bytes], str | None],
        count_bytes: Callable[[int], None] = lambda _: None,
    ) -> str:
        """Make `part` the whole file at `url` and return its sha256 (hex).

        Bytes already in `part` are kept where the server allows it: HTTP Range with If-Range, so that the rest is of
        the same file; otherwise it starts over. The length and every checksum that the server names are verified.
        check: why these bytes are not what is wanted, or None; such a file is deleted and asked for again.
        count_bytes is called with the size of each piece that arrives.
        Raises Refused, Unreachable, TransferError, Stopped; OSError where the disk refuses.
        """
        most, attempt = _size(part), 0
        while True:
            try:
                return self._fetch_once(url, part, check, count_bytes)
            except _Transient as failure:
                gained = _size(part) > most
                most = max(most, _size(part))
                self._wait(failure, 0 if gained else attempt)
                attempt = 1 if gained else attempt + 1

    def _wait(self, failure: _Transient, attempt: int) -> None:
        if attempt >= self._retries:
            raise TransferError(str(failure) + (f", {attempt + 1} times" if attempt else "")) from failure
        if failure.pause_s is not None and failure.pause_s > LONGEST_PAUSE_S:
            raise TransferError(f"{failure}, and the server asks to wait {failure.pause_s / 60:.0f} minutes")
        own = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.75, 1.25)  # so that threads spread out
        if self.stop.wait(own if failure.pause_s is None else failure.pause_s):
            raise Stopped

    def _get_json_once(self, url: str) -> dict[str, Any]:
        origin = _origin(url)
        for _ in range(_REDIRECTS):
            with self._response(url, {"Accept": "application/json"}, redirects=False) as response:
                location = response.headers.get("Location")
                if response.is_redirect and location:
                    url = urljoin(url, location)
                    if not is_web_address(url) or _origin(url) != origin:
                        raise Refused("it sends on to another host")
                    continue
                if response.status_code != 200:
                    raise Refused(f"HTTP {response.status_code}", response.status_code)
                body = b"".join(_limited(self._pieces(response.iter_content(_CHUNK)), _MAX_PAGE_BYTES))
            try:
                page = json.loads(body)
            except ValueError:
                kind = "HTML" if body.lstrip()[:1] == b"<" else "something else"
                raise Refused(
                    f"it answered with {kind} where JSON was expected, as a login page or a proxy does"
                ) from None
            if not isinstance(page, dict):
                raise Refused("its JSON is not an object")
            return page
        raise Refused("it redirects in circles")

    def _fetch_once(
        self, url: str, part: Path, check: Callable[[bytes], str | None], count_bytes: Callable[[int], None]
    ) -> str:
        note = part.with_suffix(".validator")  # tells later which file these bytes began
        have, validator = _size(part), _read_line(note)
        headers = {"Accept-Encoding": "identity"}
        if have and validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        with self._response(url, headers) as response:
            if urlsplit(url).scheme == "https" and urlsplit(response.url).scheme != "https":
                raise Refused("it redirects from https to http")
            whole = _total_length(response, have)
            if response.status_code == 416:
                _discard(part, note)
                raise _Transient("the server refused to go on where the last attempt stopped", 0.0)
            if response.status_code == 206 and whole is None:
                _discard(part, note)
                raise _Transient("the server sent another part of the file than was asked for")
            if response.status_code not in (200, 206):
                raise Refused(f"HTTP {response.status_code}", response.status_code)
            if response.status_code == 200:
                _discard(part, note)
                if found := _validator(response):
                    note.write_text(found)
            with part.open("ab") as stream:
                for piece in _limited(self._pieces(_as_they_come(response)), _MAX_FILE_BYTES - _size(part)):
                    stream.write(piece)
                    count_bytes(len(piece))
            promised = _promised_digests(response)
        content = part.read_bytes()
        if whole is not None and len(content) != whole:
            _discard(part, note)
            raise _Transient(f"{len(content):,} bytes arrived where the server announced {whole:,}")
        for algorithm, digest in promised.items():
            if hashlib.new(algorithm, content, usedforsecurity=False).digest() != digest:
                _discard(part, note)
                raise _Transient(f"its {algorithm} is not the one that the server announced")
        if reason := check(content):
            _discard(part, note)
            raise _Transient(reason)
        note.unlink(missing_ok=True)
        return hashlib.sha256(content).hexdigest()

    def _pieces(self, body: Iterator[bytes]) -> Iterator[bytes]:
        """The same; a connection that breaks is a _Transient."""
        try:
            for piece in body:
                if self.stop.is_set():
                    raise Stopped
                yield piece
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            raise _Transient("the connection broke off") from None

    @contextmanager
    def _response(self, url: str, headers: dict[str, str], *, redirects: bool = True) -> Iterator[requests.Response]:
        if self.stop.is_set():
            raise Stopped
        try:
            response = self._session().get(
                url, headers=headers, stream=True, timeout=self._timeout, allow_redirects=redirects
            )
        except requests.exceptions.SSLError as error:
            raise Refused(f"its TLS certificate was not accepted ({_cause(error)})") from None
        except (requests.ConnectionError, requests.Timeout) as error:
            if not self._reached and _never_connected(error):
                raise Unreachable(_cause(error)) from None
            raise _Transient(_cause(error)) from None
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
            raise _Transient("the answer came garbled") from None
        except (requests.RequestException, ValueError) as error:  # an address that is none, redirects without end
            raise Refused(_cause(error)) from None
        self._reached = True
        with response:
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise _Transient(f"HTTP {response.status_code}", _retry_after(response))
            yield response

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:  # a Session is not documented to be safe in several threads
            session = self._sessions.session = requests.Session()
            session.headers["User-Agent"] = f"m2d/{__version__}"
            session.max_redirects = _REDIRECTS
        return session


def disk_is_full(error: OSError) -> bool:
    """Whether this error says that no space, or none of the user's share of it, is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _as_they_come(response: requests.Response) -> Iterator[bytes]:
    """The body in pieces of what the socket had: iter_content loses what it holds of a piece when the rest fails."""
    while piece := response.raw.read1(_CHUNK, decode_content=False):
        yield piece


def _promised_digests(response: requests.Response) -> dict[str, bytes]:
    """Digests of the whole file that the server's headers name, by hashlib's names.

    An ETag is an MD5 only on S3, for an object that was uploaded in one piece and is not encrypted with a key of its
    own (AWS, "Common response headers"). Digests of S3's multipart uploads end in "-NUMBER" and are not of the file.
    """
    headers = response.headers
    promised: dict[str, bytes] = {}
    for algorithm in ("sha1", "sha256"):
        promised |= _decoded(algorithm, headers.get(f"x-amz-checksum-{algorithm}", ""))
    if response.status_code == 200:  # of a 206 it may be the part's
        promised |= _decoded("md5", headers.get("Content-MD5", ""))
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    plain = headers.get("x-amz-server-side-encryption", "AES256") == "AES256"
    own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
    if etag and headers.get("Server") == "AmazonS3" and plain and not own_key:
        promised["md5"] = bytes.fromhex(etag[1])
    return promised


def _decoded(algorithm: str, value: str) -> dict[str, bytes]:
    try:
        digest = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return {}
    return {algorithm: digest} if len(digest) == hashlib.new(algorithm, usedforsecurity=False).digest_size else {}


def _total_length(response: requests.Response, have: int) -> int | None:
    """Bytes of the whole file as the headers tell; None where they do not, or tell of another part than we wanted."""
    if response.status_code == 206:
        span = re.fullmatch(rf"bytes {have}-[0-9]+/([0-9]+)", response.headers.get("Content-Range", ""))
        return int(span[1]) if span else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and "Content-Encoding" not in response.headers else None


def _validator(response: requests.Response) -> str | None:
    """What If-Range may hold for this file: a strong ETag, or a date of change; None where there is neither."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _retry_after(response: requests.Response) -> float | None:
    """Seconds that Retry-After asks for, given as such or as a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _never_connected(error: requests.RequestException) -> bool:
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, (requests.ConnectTimeout, requests.exceptions.ProxyError)) or isinstance(
        reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.NameResolutionError)
    )


def _cause(error: Exception) -> str:
    """What the operating system said, without the class names and addresses around it."""
    text = " ".join(str(error).split())
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    plain = re.search(
        r"\[Errno -?\d+\] ([^'\")]+)|(Remote end closed connection|certificate verify failed[^(')]*)", text
    )
    return (plain[1] or plain[2]).strip() if plain else (text[:160] or type(error).__name__)


def _limited(pieces: Iterator[bytes], most: int) -> Iterator[bytes]:
    for piece in pieces:
        most -= len(piece)
        if most < 0:
            raise Refused("its answer is too long to be what was asked for")
        yield piece


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_line(path: Path) -> str | None:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.isprintable() and text.isascii() and text else None


def _discard(part: Path, note: Path) -> None:
    part.unlink(missing_ok=True)
    note.unlink(missing_ok=True)
