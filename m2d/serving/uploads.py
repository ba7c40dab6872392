"""The body of an order: JSON, or a form with files. Reference images are checked by the decoder of the training.

Nothing here touches the disk, and no name that a client gives goes further than this file.
"""

import asyncio
import binascii
import hashlib
import json
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, NoReturn

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from m2d.data.decode import ImageRejected, probe_image
from m2d.serving.problems import Problem
from m2d.serving.settings import ServingLimits

FIELDS = ("reference", "reference_b", "references", "references_b")
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp", b"II": ".tif", b"MM": ".tif"}
_FILES = 256  # of a form
_REQUEST_BYTES = 2**18  # of an order without its images
_VALUES = 10_000  # of an order; real ones have dozens
_PIECE = 2**14  # bytes of a form that are parsed before others get their turn
_BASE64_PIECE = 2**20  # characters decoded before others get their turn; a multiple of 4
_CHECKS = CapacityLimiter(1)  # pictures decoded at a time, of all requests: each takes up to 15 bytes a pixel


@dataclass(frozen=True)
class Upload:
    """An image file that the training would accept."""

    name: str  # SHA-256 and the suffix of its real format
    content: bytes


async def read_order(request: Request, limits: ServingLimits) -> tuple[dict[str, Any], dict[str, list[Upload]]]:
    """(the order, the images of each of FIELDS that it has); the order has no FIELDS any more.

    Raises a problem 400, 413, 415 or 422.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        order, files = await to_thread.run_sync(_parse, await request.body())
    elif kind == "multipart/form-data":
        order, files = await _read_form(request, limits)
    else:
        raise Problem(415, "Content-Type must be application/json or multipart/form-data")
    if sum(map(len, files.values())) > _FILES:
        raise Problem(413, f"more than {_FILES} images in one request", limit=_FILES)
    checked: dict[str, list[Upload]] = {field: [] for field in files}
    pixels = 0
    for field, content in ((field, content) for field, contents in files.items() for content in contents):
        upload, more = await to_thread.run_sync(_check, field, content, limits.upload_pixels - pixels, limiter=_CHECKS)
        checked[field].append(upload)
        pixels += more
    return order, checked


async def _read_form(request: Request, limits: ServingLimits) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    parser = MultiPartParser(
        request.headers, _pieces(request), max_files=_FILES, max_fields=len(FIELDS) + 1, max_part_size=_REQUEST_BYTES
    )
    parser.spool_max_size = limits.upload_bytes  # all in memory: the body has no more than this
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem(400, f"the form cannot be read: {error.message}") from error
    try:
        return await _parts(form)
    finally:
        await form.close()


async def _parts(form: FormData) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    body: bytes | None = None
    files: dict[str, list[Any]] = {}
    for name, part in form.multi_items():
        if name == "request" and body is None:
            body = part.encode() if isinstance(part, str) else await part.read()
        elif name in FIELDS and isinstance(part, UploadFile):
            files.setdefault(name, []).append(await part.read())
        elif name in FIELDS:
            raise Problem(422, f"{name} is text in the form; send a file, with curl as -F {name}=@FILE")
        else:
            raise Problem(422, f"the form may have one part `request`, and files {' '.join(FIELDS)}")
    if body is None:
        raise Problem(422, "the form has no part `request` with the order as JSON")
    order, members = await to_thread.run_sync(_parse, body)
    if members:
        raise Problem(422, f"{next(iter(members))} is a file of the form, not a member of `request`")
    return order, files


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    """The body, in pieces between which other requests have their turn, however it came."""
    async for chunk in request.stream():
        for start in range(0, len(chunk), _PIECE):
            yield chunk[start : start + _PIECE]
            await asyncio.sleep(0)


def _parse(body: bytes) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(the order, what its FIELDS hold)."""
    if sum(map(body.count, (b"{", b"[", b","))) > _VALUES:  # of which base64 has none
        raise Problem(413, f"the order has more than {_VALUES} values", limit=_VALUES)
    try:
        order = json.loads(
            body.decode(), object_pairs_hook=_once, parse_constant=_not_finite, parse_float=_finite_float
        )
        if not isinstance(order, dict):
            raise ValueError("it must be an object, {...}")
        members = {field: order.pop(field) for field in FIELDS if field in order}
        size = len(json.dumps(order, ensure_ascii=False).encode())  # half a surrogate pair has no encoding
    except RecursionError:
        raise Problem(400, "the body cannot be used as JSON: it is nested too deep") from None
    except ValueError as error:
        raise Problem(400, f"the body cannot be used as JSON: {error}") from None
    if size > _REQUEST_BYTES:
        raise Problem(413, f"the order has more than {_REQUEST_BYTES} bytes without its images", limit=_REQUEST_BYTES)
    texts = {field: value for field, value in members.items() if value is not None}
    return order, {field: value if isinstance(value, list) else [value] for field, value in texts.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice[:40])} is there twice; keep one")
    return members


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _check(field: str, content: bytes | str, pixels_left: int) -> tuple[Upload, int]:
    """The image and how many pixels it has."""
    if not isinstance(content, bytes):
        content = _from_base64(field, content)
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if content.startswith(start)), None)
    try:
        width, height = probe_image(content, max_pixels=pixels_left)
    except ImageRejected as error:
        status = 413 if "max_pixels" in error.reason else 415 if content and suffix is None else 422
        raise Problem(status, f"{field}: {error.reason}") from error
    return Upload(f"{hashlib.sha256(content).hexdigest()}{suffix}", content), width * height


def _from_base64(field: str, text: object) -> bytes:
    if not isinstance(text, str):
        raise Problem(422, f"{field} must be an image file in base64, or a list of them")
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise Problem(422, f"{field} is a data: URL without base64")
    try:
        if 0 <= text.find("=") < len(text) - 2:
            raise ValueError("it is padded before its end")
        pieces = (text[start : start + _BASE64_PIECE] for start in range(0, len(text), _BASE64_PIECE))
        return b"".join(binascii.a2b_base64(piece.encode("ascii"), strict_mode=True) for piece in pieces)
    except ValueError as error:
        raise Problem(422, f"{field} is not base64: {error}") from None
