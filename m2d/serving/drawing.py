"""An order on its way: taken while there is room, watched, and told as JSON, events, a zip or one image."""

import asyncio
import base64
import io
import json
import time
import zipfile
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from m2d.generation.output import JOURNAL_SCHEMA, MANIFEST_NAME
from m2d.generation.plan import without_seldom
from m2d.serving.access import Access, Caller
from m2d.serving.jobs import Jobs
from m2d.serving.orders import (
    DeadlineExceeded,
    Drawn,
    Event,
    ModelCard,
    Order,
    Overloaded,
    Preview,
    Progress,
    Refused,
)
from m2d.serving.problems import as_problem, failure, problem_document, request_id
from m2d.serving.settings import ServingLimits

NOTICE = {
    "en": "Synthetic images, not patients. Not for diagnosis.",
    "zh": "合成图像，并非患者。不得用于诊断。",
}
HEARTBEAT_S = 10.0  # proxies close a connection that says nothing
_AT_ONCE_S = 0.25
_WAITING = 64  # events that a slow client has not read; then previews and progress are left out, images never


class Service(Protocol):
    """What the HTTP side asks of the rest."""

    jobs: Jobs  # or what asks them elsewhere

    async def models(self) -> list[ModelCard]:
        """All that are served, the default first."""
        ...

    async def add_model(self, checkpoint: str, name: str | None = None) -> ModelCard:
        """Serve a checkpoint; one of the same name is replaced once it is loaded. Raises ConfigError, CheckpointError.

        checkpoint: relative to ServeConfig.checkpoints_root.
        """
        ...

    async def is_ready(self) -> bool:
        """Whether a model is loaded, so that an order would be begun at once."""
        ...

    def draw(self, order: Order) -> AsyncIterator[Event]:
        """What becomes of an order; closing the iterator gives it up. Raises an M2DError."""
        ...

    async def metrics(self) -> str:
        """In Prometheus's text format."""
        ...


class Desk:
    """Takes orders of all requests, as many images at a time as the limit allows."""

    def __init__(self, service: Service, access: Access, limits: ServingLimits) -> None:
        self.service, self.access, self.limits = service, access, limits
        self.images = 0  # asked for and not made yet

    def take(self, order: Order, caller: Caller) -> "Drawing":
        """Begin with `async with`, whose end gives up what is not made. Raises Overloaded, or a Problem (429)."""
        count = len(order.rows)
        if self.images + count > self.limits.queued_images:
            raise Overloaded(
                f"{self.images} images are waiting to be made and at most {self.limits.queued_images} may; ask again",
                retry_after_s=max(1.0, self.images / 32),
            )
        self.access.spend(caller, count)
        self.images += count
        return Drawing(self, order, caller, left=count)


@dataclass
class Drawing:
    """What becomes of one order. Read eagerly, whatever the client's speed, so that the engine never waits for it."""

    desk: Desk
    order: Order
    caller: Caller
    left: int  # images
    _waiting: deque[Event] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.desk.images -= self.left
        if self.left:
            self.desk.access.refund(self.caller, self.left)
        self._reader.cancel()
        await asyncio.wait([self._reader])
        if not self._reader.cancelled():
            self._reader.exception()  # has been told, or nobody is there to be told

    async def begin(self) -> None:
        """For a stream, which then ends it. What goes wrong at once is raised here, so that it can be a status."""
        await self.__aenter__()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _AT_ONCE_S)
            if self._reader.done() and not self._waiting:
                self._reader.result()
        except BaseException:
            await self.__aexit__()
            raise

    async def events(self) -> AsyncIterator[Event | None]:
        """As they come; None after a while of silence. Raises what `Service.draw` raises, or ClientDisconnect."""
        while self._waiting or not self._reader.done():
            while self._waiting:
                yield self._waiting.popleft()
            self._news.clear()
            if self._reader.done():
                break
            try:
                await asyncio.wait_for(self._news.wait(), HEARTBEAT_S)
            except TimeoutError:
                yield None
        if self._reader.cancelled():
            raise ClientDisconnect
        self._reader.result()

    async def finish(self, request: Request) -> tuple[list[Drawn], list[Refused]]:
        """All of it, by place; given up when the client goes."""

        async def until_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._reader.cancel()

        gone = asyncio.create_task(until_gone())
        try:
            events = [event async for event in self.events()]
        finally:
            gone.cancel()
        drawn = sorted((one for one in events if isinstance(one, Drawn)), key=lambda one: one.index)
        return drawn, [one for one in events if isinstance(one, Refused)]

    async def _read(self) -> None:
        seconds = None if self.order.deadline is None else max(0.0, self.order.deadline - time.time())
        try:
            drawn = cast(AsyncGenerator[Event, None], self.desk.service.draw(self.order))
            async with asyncio.timeout(seconds), aclosing(drawn) as events:
                async for event in events:
                    self._keep(event)
        except TimeoutError:
            raise DeadlineExceeded(
                "the images were not made by the request's deadline; ask for fewer, or later"
            ) from None
        finally:
            self._news.set()

    def _keep(self, event: Event) -> None:
        if isinstance(event, Drawn | Refused):
            self.left -= 1
            self.desk.images -= 1
        if len(self._waiting) >= _WAITING:
            spare = next((one for one in self._waiting if isinstance(one, Progress | Preview)), None)
            if spare is not None:
                self._waiting.remove(spare)
        self._waiting.append(event)
        self._news.set()


class Streamed(StreamingResponse):
    """A body made of the events of a drawing that has begun. However it ends, the drawing ends with it."""

    def __init__(self, drawing: Drawing, body: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(body, media_type=media_type, headers={"X-Accel-Buffering": "no"})
        self.drawing = drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.drawing.__aexit__()


def sse(name: str, content: Mapping[str, Any]) -> bytes:
    """An event of text/event-stream."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


def ndjson(name: str, content: Mapping[str, Any]) -> bytes:
    """An event as a line of JSON."""
    return f"{json.dumps({'event': name, **content})}\n".encode()


async def told(
    drawing: Drawing, request: Request, form: Callable[[str, Mapping[str, Any]], bytes]
) -> AsyncIterator[bytes]:
    """The stream of /v1/images. In silence SSE sends a comment, ndjson the last progress again."""
    order, progress = drawing.order, {"done": 0, "total": 0}
    images, refused, gates = 0, 0, set[str]()
    yield form("started", {**_head(order), "total": len(order.rows)})
    try:
        async for event in drawing.events():
            match event:
                case Progress():
                    progress = vars(event)
                    yield form("progress", progress)
                case Preview():
                    yield form(
                        "preview", {"index": event.index, "number": event.number, "b64_png": base64_of(event.png)}
                    )
                case Drawn():
                    images, gates = images + 1, gates | {*event.gates}
                    yield form("image", image_entry(event))
                case Refused():
                    refused, gates = refused + 1, gates or {event.reason}
                    yield form("refused", vars(event))
                case None:
                    yield b": at work\n\n" if form is sse else form("progress", progress)
        yield form("done", {"id": order.id, "images": images, "refused": refused, "gates": gates_entry(gates)})
    except Exception as error:
        yield form("error", broken_off(error, request))


def broken_off(error: Exception, request: Request) -> dict[str, Any]:
    """The problem that ends a stream; of a bug the log has more."""
    if isinstance(error, ClientDisconnect):
        raise error
    problem = as_problem(error) or failure(error, request_id(request))
    return problem_document(problem, request.url.path, request_id(request))


def answer(order: Order, drawn: list[Drawn], refused: list[Refused]) -> dict[str, Any]:
    """The JSON of /v1/images."""
    return {
        **_head(order),
        "created": int(time.time()),
        "synthetic": True,
        "notice": NOTICE["en"],
        "gates": gates_entry({gate for one in drawn for gate in one.gates} or {one.reason for one in refused}),
        "images": [image_entry(one) for one in drawn],
        "refused": [vars(one) for one in refused],
    }


def zip_of(order: Order, drawn: list[Drawn]) -> bytes:
    """CLASS/ID.png and a manifest as `generate` writes them."""
    schema = JOURNAL_SCHEMA.remove(JOURNAL_SCHEMA.get_field_index("accepted"))
    table = without_seldom(pa.Table.from_pylist([one.entry for one in drawn], schema)).sort_by("id")
    missing = Counter(row.label for row in order.rows) - Counter(one.entry["class"] for one in drawn)
    record = {"asked": str(len(order.rows)), "missing": json.dumps(missing)}
    if drawn:
        with Image.open(io.BytesIO(drawn[0].png)) as image:
            record["m2d"] = image.info["settings"]
    manifest = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(record), manifest)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # PNGs are compressed already
        for one in drawn:
            file.writestr(one.entry["path"], one.png)
        file.writestr(MANIFEST_NAME, manifest.getvalue())
    return archive.getvalue()


def image_entry(event: Drawn) -> dict[str, Any]:
    """An image as JSON has it."""
    row = {name: one.isoformat() if isinstance(one, datetime) else one for name, one in event.entry.items()}
    known = {name: row[name] for name in ("id", "class", "seed")}
    return {"index": event.index, **known, "b64_png": base64_of(event.png), "manifest": row}


def gates_entry(gates: set[str]) -> dict[str, Any]:
    """Which gates were at work, and whether copies of training images were among what they looked for."""
    return {"at_work": sorted(gates), "near_copy": any(gate.startswith("near_copy") for gate in gates)}


def _head(order: Order) -> dict[str, Any]:
    model = {"id": order.model.name, "sha256": order.model.sha256, "step": order.model.step}
    return {"id": order.id, "seed": order.config.seed, "model": model}


def base64_of(content: bytes) -> str:
    """As JSON carries bytes."""
    return base64.b64encode(content).decode()
