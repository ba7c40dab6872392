"""Every error as problem details (RFC 9457), and what goes around each answer: ids, headers, limits, the access log."""

import json
import logging
import math
import re
import secrets
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.serving.orders import DeadlineExceeded, JobConflict, Overloaded, TooManyJobs
from m2d.serving.settings import ServeConfig, is_loopback

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_STATUS = {ConfigError: 422, DataError: 422, JobConflict: 409, TooManyJobs: 429, Overloaded: 503, DeadlineExceeded: 504}
_ROUTING = {
    404: "there is nothing here; /docs lists what there is",
    405: "not by this method; /docs lists what there is",
}
_LIMIT_S = 60  # until somebody with too many unfinished jobs should ask again
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Problem(HTTPException):
    """An answer with an error's status; `detail` is one line, `more` are further members, such as limit=16."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.more = more


class ProblemDetails(BaseModel):
    """What every error answers (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(description="the status in words")
    status: int
    detail: str = Field(description="what is wrong and what is allowed, in one line")
    instance: str = Field(description="the path that was asked for")
    request_id: str = Field(description="as in the header X-Request-ID; the service's log has it too")
    limit: float | None = Field(default=None, description="that was passed, where there is one")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: that it may answer so."""
    schema = {"schema": ProblemDetails.model_json_schema()}
    return {status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}} for status in statuses}


def as_problem(error: Exception) -> Problem | None:
    """The answer that an error means to a client; None for a bug."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return Problem(error.status_code, _ROUTING.get(error.status_code, error.detail), error.headers)
    if isinstance(error, RequestValidationError | ValidationError):
        return _validation_problem(error)
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), None)
    if status is None:
        return None
    wait = error.retry_after_s if isinstance(error, Overloaded) else _LIMIT_S if status == 429 else None
    return Problem(status, str(error), {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))})


def failure(error: Exception, request_id: str) -> Problem:
    """For what as_problem does not know: the log has it whole, the client is told nothing of this machine."""
    logger.error("request %s failed", request_id, exc_info=error)
    what = "the model cannot be loaded" if isinstance(error, CheckpointError) else "the service failed"
    return Problem(500, f"{what}; the service's log says why under this request's id")


def problem_document(problem: Problem, path: str, request_id: str) -> dict[str, Any]:
    """The members of a problem, also for the last event of a stream that breaks off."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(problem.status_code).phrase,
        "status": problem.status_code,
        "detail": " ".join(problem.detail.split()),
        "instance": path,
        "request_id": request_id,
        **problem.more,
    }


def request_id(request: Request) -> str:
    """Of the request under way: the client's own, or one that was made for it."""
    return str(request.state.request_id)


def install(app: FastAPI, config: ServeConfig, *, behind_serve: bool = False) -> None:
    """Errors become problems; ids, security headers, limits and the access log go around every route."""
    for kind in (HTTPException, RequestValidationError, ValidationError, *_STATUS):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(_Guard, config=config)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Idempotency-Key", "X-Request-ID"],
            expose_headers=["Location", "Retry-After", "X-Request-ID"],
        )
    app.add_middleware(_Envelope, config=config, behind_serve=behind_serve)


class _Envelope:
    """The outermost layer. Plain ASGI: starlette's BaseHTTPMiddleware hides a client's going and holds up streams."""

    def __init__(self, app: ASGIApp, config: ServeConfig, *, behind_serve: bool) -> None:
        self.app, self.behind_serve = app, behind_serve
        tls = {"Strict-Transport-Security": "max-age=31536000"} if config.tls_cert else {}
        self.headers = {**_SECURITY, **tls}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", sent) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 499  # until an answer begins: the client went first

        async def send_dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if not (self.behind_serve and request_id == sent):  # or there would be two
                    headers["X-Request-ID"] = request_id
                if scope["path"].startswith("/v1/"):  # what a key may see is for no cache; jobs and models change
                    headers["Cache-Control"] = "no-store"
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_dressed)
        finally:
            caller = state.get("caller")
            entry = {
                "request_id": request_id,
                "caller": caller and caller.name,
                "method": scope["method"],
                "path": scope["path"],  # without the query, in which a client may have put a key by mistake
                "status": status,
                "ms": round(1000 * (time.monotonic() - began)),
                "images": caller.images if caller else 0,
            }
            logger.info("%s", json.dumps(entry))


class _Guard:
    """Refuses what no route should see, and answers for what the routes did not catch."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, read, began = self.config.limits.upload_bytes, 0, False

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _too_large(limit)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive_counted, send_noted)
        except ClientDisconnect:
            return
        except Exception as error:
            problem = as_problem(error) or failure(error, scope["state"]["request_id"])
            if began:  # too late for a status: breaking off tells the client that the answer is not whole
                raise
            await _response(Request(scope), problem)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        length, limit = headers.get("content-length", ""), self.config.limits.upload_bytes
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        if self.config.keys is not None:
            return
        # Without keys, whoever reaches the port may order. A page of another site reaches it through this machine's
        # browser: under a name of its own that resolves to loopback (DNS rebinding), or by posting from its own origin.
        host = headers.get("host", "")
        if not is_loopback(_hostname(f"//{host}")):
            raise Problem(
                403, f"host {host[:80]} is not this machine's own; without keys the service answers to localhost only"
            )
        origin = headers.get("origin")
        allowed = self.config.cors_origins
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or origin is None or origin in allowed or "*" in allowed:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise Problem(403, f"origin {origin[:80]} may not order here; start the service with it in cors_origins")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # of brackets that hold no IPv6 address
        return ""


def _too_large(limit: int) -> Problem:
    return Problem(413, f"the request has more than {limit} bytes", limit=limit)


async def _answer(request: Request, error: Exception) -> Response:
    problem = as_problem(error)
    assert problem is not None
    return _response(request, problem)


def _response(request: Request, problem: Problem) -> Response:
    document = problem_document(problem, request.url.path, request_id(request))
    # In ASCII: a detail may repeat what a client sent, also half a surrogate pair, which has no encoding.
    return Response(json.dumps(document), problem.status_code, problem.headers, media_type=MEDIA_TYPE)


def _validation_problem(error: RequestValidationError | ValidationError) -> Problem:
    """One line for the first value that is wrong: its field, what was sent, what is allowed."""
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    loc = first["loc"]
    place = [str(part) for part in (loc[1:] if isinstance(error, RequestValidationError) else loc)]
    field = ".".join(place)[:80] or "the body"
    if first["type"] == "missing":
        text = f"{field} is missing"
    elif first["type"] == "extra_forbidden":
        text = f"{field} is not known here"
    else:
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        text = f"{field} is {_short(first['input'])}; it {message}"
    return Problem(422, " ".join(text.split()) + (f" ({len(others)} more)" if others else ""))


def _short(value: object) -> str:
    """What was sent, as far as it may be repeated: no keys, no files."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > 48:
        return "too long to repeat"
    return "a key" if "m2d_" in text else text
