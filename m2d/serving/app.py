"""The HTTP API: what is asked is checked and planned here, drawn and kept elsewhere. Knows no Ray.

A request's way: key -> body -> plan -> desk -> `Service.draw` -> the answer in the form that it accepts.
"""

import mimetypes
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader
from starlette.staticfiles import StaticFiles
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from m2d import __version__
from m2d.diffusion.settings import SOLVERS
from m2d.errors import CheckpointError, ConfigError
from m2d.generation.settings import GenerateConfig
from m2d.serving import requests as asked
from m2d.serving.access import Access, Caller
from m2d.serving.drawing import (
    NOTICE,
    Desk,
    Drawing,
    Service,
    Streamed,
    answer,
    base64_of,
    broken_off,
    image_entry,
    ndjson,
    sse,
    told,
    zip_of,
)
from m2d.serving.job_routes import create_router
from m2d.serving.orders import Drawn, Order, Preview, Refused
from m2d.serving.problems import Problem, as_problem, documented, install
from m2d.serving.settings import ServeConfig
from m2d.serving.uploads import Upload, read_order

PAGE = Path(__file__).parent / "page"
_JSON, _ZIP, _PNG = "application/json", "application/zip", "image/png"
_SSE, _NDJSON = "text/event-stream", "application/x-ndjson"
_STREAMS = {_SSE: sse, _NDJSON: ndjson}
_OPENAI_EVENTS = ["image_generation.partial_image", "image_generation.completed", "error"]
_FORMS = (_JSON, _ZIP, _PNG, *_STREAMS)
_DEFAULTS = (
    "solver", "steps", "guidance_scale", "guidance_interval", "feature_temperature", "strength", "steps_between",
)  # fmt: skip
_DESCRIPTION = """Labelled synthetic dermoscopy images on demand. Every image says in its PNG text chunks and in its
manifest row that it is synthetic, and which checkpoint, seed and settings made it. Not for diagnosis."""


def create_app(service: Service, config: ServeConfig, *, behind_serve: bool = False) -> FastAPI:
    """The whole of the HTTP side. Raises ConfigError where the file of keys cannot be used.

    behind_serve: Serve's proxy adds to the answer the X-Request-ID that it handed on.
    """
    mimetypes.add_type("text/javascript", ".js")  # some systems' tables say otherwise, and modules then do not load
    app = FastAPI(title="M2D", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None)
    install(app, config, behind_serve=behind_serve)
    access = Access(config)
    desk = Desk(service, access, config.limits)
    app.state.desk = desk
    app.include_router(_image_routes(desk), tags=["images"])
    app.include_router(_openai_routes(desk), tags=["images"])
    app.include_router(create_router(service, access, config), tags=["jobs"])
    app.include_router(_model_routes(service, access, config), tags=["models"])
    app.include_router(_service_routes(service, access, config), tags=["service"])
    app.include_router(_page_routes(app))
    app.openapi = lambda: _openapi(app, config)  # type: ignore[method-assign]
    return app


def _image_routes(desk: Desk) -> APIRouter:
    router = APIRouter()
    names = ["started", "progress", "preview", "image", "refused", "done", "error"]
    contents = {_ZIP: asked.BINARY, _PNG: asked.BINARY, **_events_schema(names)}

    @router.post(
        "/v1/images",
        summary="Make images of one class",
        openapi_extra=asked.body_of(asked.ImageRequest, "reference", "reference_b"),
        responses={
            200: {"model": asked.ImagesTold, "description": "The images, as Accept asks", "content": contents},
            **documented(400, 401, 403, 404, 406, 413, 415, 422, 429, 500, 503, 504),
        },
    )
    async def make_images(request: Request, caller: Annotated[Caller, Depends(desk.access)]) -> Response:
        """As JSON with base64 PNGs, a zip with a manifest, one image/png, or a stream of events, by `Accept`.

        A stream tells `started`, then `progress`, `preview`, `image` and `refused` as they come, then `done` or
        `error`. Closing the connection gives up what is not made.
        """
        form = _form_of(request)
        content, uploads = await read_order(request, desk.limits)
        order = await _planned(desk, asked.ImageRequest.model_validate(content), uploads)
        if form == _PNG and len(order.rows) != 1:
            raise Problem(406, f"image/png is one image, and {len(order.rows)} are asked for; accept {_ZIP} or {_JSON}")
        drawing = desk.take(order, caller)
        if form in _STREAMS:
            await drawing.begin()
            return Streamed(drawing, told(drawing, request, _STREAMS[form]), form)
        async with drawing:
            drawn, refused = await drawing.finish(request)
        if form == _ZIP:
            archive = await to_thread.run_sync(zip_of, order, drawn)
            return Response(archive, media_type=_ZIP, headers=_attachment(f"{order.id}.zip"))
        if form == _PNG:
            if not drawn:
                raise Problem(422, f"the gates refused the image {refused[0].attempts} times ({refused[0].reason})")
            return Response(drawn[0].png, media_type=_PNG, headers=_attachment(f"{drawn[0].entry['id']}.png"))
        return JSONResponse(await to_thread.run_sync(answer, order, drawn, refused))

    return router


async def _planned(desk: Desk, request: asked.ImageRequest, uploads: dict[str, list[Upload]]) -> Order:
    card = asked.pick_model(await desk.service.models(), request.model)
    return await to_thread.run_sync(asked.plan_images, request, card, uploads, desk.limits, uuid.uuid4().hex)


def _form_of(request: Request) -> str:
    """Of the answer. Raises Problem (406)."""
    accept = ",".join(request.headers.getlist("accept")) or _JSON
    form = parse_accept_header(accept, MIMEAccept).best_match(_FORMS)
    if form is None:
        raise Problem(406, f"Accept is {accept[:80]}; there are {' '.join(_FORMS)}")
    return form


def _events_schema(names: list[str]) -> dict[str, Any]:
    """Of streams, as FastAPI writes it for its own: one item's."""
    name = {"type": "string", "enum": names}
    event = {"type": "object", "properties": {"event": name, "data": {"type": "string"}}, "required": ["event", "data"]}
    line = {"type": "object", "properties": {"event": name}, "required": ["event"]}
    return {_SSE: {"itemSchema": event}, _NDJSON: {"itemSchema": line}}


def _attachment(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


# --- OpenAI's shape ---------------------------------------------------------------------------------------------------


class _OpenAIRoute(APIRoute):
    """Problems have OpenAI's `error` too, from which its clients take their message."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                problem = as_problem(error)
                if problem is None:
                    raise
                problem.more["error"] = _openai_error(problem.status_code, problem.detail)
                raise problem from error

        return answered


def _openai_error(status: int, detail: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": detail, "type": kind, "param": None, "code": str(status)}


def _openai_routes(desk: Desk) -> APIRouter:
    router = APIRouter(route_class=_OpenAIRoute)

    @router.post(
        "/v1/images/generations",
        summary="OpenAI's images.generate",
        openapi_extra=asked.body_of(asked.OpenAIRequest),
        responses={
            200: {"model": asked.OpenAIAnswer, "content": {_SSE: _events_schema(_OPENAI_EVENTS)[_SSE]}},
            **documented(400, 401, 403, 404, 413, 415, 422, 429, 500, 503, 504),
        },
    )
    async def generate(request: Request, caller: Annotated[Caller, Depends(desk.access)]) -> Response:
        """For OpenAI's clients as they are: the prompt names a class by its code, or by its English or Chinese name."""
        content, uploads = await read_order(request, desk.limits)
        ask = asked.OpenAIRequest.model_validate(content)
        card = asked.pick_model(await desk.service.models(), ask.model)
        size = f"{card.image_size}x{card.image_size}"
        if ask.size not in (None, "auto", size):
            raise ConfigError(f"size: {ask.size} cannot be had, {card.name} makes {size}; ask for that, or for auto")
        if ask.partial_images and not ask.stream:
            raise ConfigError("partial_images: they come in a stream; add stream=true")
        own = {
            "model": card.name,
            "class": asked.class_in(ask.prompt, card.classes),
            "count": 1 if ask.n is None else ask.n,
            **ask.model_dump(include={"seed", "steps", "guidance_scale"}),
            "partial_images": ask.partial_images or 0,
        }
        order = await _planned(desk, asked.ImageRequest.model_validate(own), uploads)
        drawing = desk.take(order, caller)
        if ask.stream:
            await drawing.begin()
            return Streamed(drawing, _openai_events(drawing, request, size), _SSE)
        async with drawing:
            drawn, refused = await drawing.finish(request)
        if not drawn:
            raise Problem(422, f"the gates refused each image {refused[0].attempts} times ({refused[0].reason})")
        whole = answer(order, drawn, refused)
        names = ("id", "class", "seed")
        data = [{"b64_json": one["b64_png"], **{name: one[name] for name in names}} for one in whole["images"]]
        kept = {name: whole[name] for name in ("created", "seed", "model", "synthetic", "notice", "refused")}
        return JSONResponse({"data": data, "background": "opaque", "output_format": "png", "size": size, **kept})

    return router


async def _openai_events(drawing: Drawing, request: Request, size: str) -> AsyncIterator[bytes]:
    shared = {"created_at": int(time.time()), "size": size, "quality": "auto", "background": "opaque"}
    shared["output_format"] = "png"
    usage: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    usage |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
    refused: list[Refused] = []
    try:
        async for event in drawing.events():
            match event:
                case Preview():
                    partial = {"b64_json": base64_of(event.png), "partial_image_index": event.number}
                    yield _openai_event("partial_image", partial | shared)
                case Drawn():
                    entry = image_entry(event)
                    final = {"b64_json": entry["b64_png"], "id": entry["id"], "class": entry["class"]}
                    yield _openai_event("completed", final | {"seed": entry["seed"], "usage": usage} | shared)
                case Refused():
                    refused.append(event)
                case None:
                    yield b": at work\n\n"
        if refused:  # OpenAI has no event for it
            first = refused[0]
            raise Problem(422, f"the gates refused {len(refused)} images {first.attempts} times each ({first.reason})")
    except Exception as error:
        problem = broken_off(error, request)
        yield sse("error", {"type": "error", "error": _openai_error(problem["status"], problem["detail"])})


def _openai_event(kind: str, content: dict[str, Any]) -> bytes:
    return sse(f"image_generation.{kind}", {"type": f"image_generation.{kind}", **content})


# --- models and the service -------------------------------------------------------------------------------------------


def _model_routes(service: Service, access: Access, config: ServeConfig) -> APIRouter:
    router = APIRouter(prefix="/v1/models")

    @router.get(
        "",
        summary="Which checkpoints are served",
        responses={200: {"model": asked.ModelList}, **documented(401, 403, 500)},
    )
    async def models(caller: Annotated[Caller, Depends(access)]) -> Response:
        """The default first; also in the shape of OpenAI's models.list."""
        found = await service.models()
        data = [asked.model_told(card, default=place == 0) for place, card in enumerate(found)]
        return JSONResponse({"object": "list", "data": data})

    @router.post(
        "",
        status_code=201,
        summary="Serve another checkpoint",
        openapi_extra=asked.body_of(asked.ModelRequest),
        responses={201: {"model": asked.ModelEntry}, **documented(400, 401, 403, 413, 415, 422, 500)},
    )
    async def add_model(request: Request, caller: Annotated[Caller, Depends(access)]) -> Response:
        """For operators. One of the same name is replaced once the new one is loaded; no request is lost."""
        if not caller.is_operator:
            raise Problem(403, "this key is not an operator's; make one by `serve keys add NAME --operator`")
        content, _ = await read_order(request, config.limits)
        ask = asked.ModelRequest.model_validate(content)
        try:
            card = await service.add_model(ask.checkpoint, ask.name)
        except CheckpointError as error:
            raise Problem(422, str(error)) from None
        first, *_ = await service.models()
        return JSONResponse(asked.model_told(card, default=card.name == first.name), 201)

    return router


def _service_routes(service: Service, access: Access, config: ServeConfig) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/service", summary="What this service allows", responses=documented(500))
    async def about() -> dict[str, Any]:
        """Limits and defaults, for a page or a client; no key is asked for."""
        return {
            "version": __version__,
            "keys_required": config.keys is not None,
            "limits": vars(config.limits),
            "defaults": {name: getattr(GenerateConfig, name) for name in _DEFAULTS},
            "solvers": SOLVERS,
            "notice": NOTICE,
        }

    @router.get("/healthz", summary="Whether the process lives", responses=documented(500))
    async def healthz() -> dict[str, str]:
        """Answers whatever the models do."""
        return {"status": "ok"}

    @router.get("/readyz", summary="Whether a model is loaded", responses=documented(500, 503))
    async def readyz() -> dict[str, str]:
        """503 until an order would be begun at once."""
        if not await service.is_ready():
            raise Problem(503, "no model is loaded yet; ask again", {"Retry-After": "5"})
        return {"status": "ready"}

    @router.get("/metrics", summary="For Prometheus", responses=documented(401, 500), response_class=PlainTextResponse)
    async def metrics(caller: Annotated[Caller, Depends(access)]) -> Response:
        """Queue, batches, images, latency and GPU memory, as text."""
        return PlainTextResponse(await service.metrics(), media_type="text/plain; version=0.0.4")

    return router


# --- the page and the documents ---------------------------------------------------------------------------------------


def _page_routes(app: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=PAGE)

    @router.get("/docs", response_class=HTMLResponse)
    async def docs() -> str:
        """The OpenAPI document as a plain page: FastAPI's own loads its scripts from another host."""
        template = Environment(loader=PackageLoader("m2d", "serving"), autoescape=True).get_template("docs.html.jinja")
        return template.render(document=app.openapi())

    @router.get("/")
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    # Not a mount at /, which would take the wrong methods of other routes for files.
    @router.get("/{name}")
    async def page_file(request: Request, name: str) -> Response:
        return await files.get_response(name, request.scope)

    return router


def _openapi(app: FastAPI, config: ServeConfig) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        document["components"].setdefault("schemas", {}).update(asked.schemas(config.limits))
        if config.keys is None:  # nobody has to send one
            del document["components"]["securitySchemes"]
            for route in (route for methods in document["paths"].values() for route in methods.values()):
                route.pop("security", None)
        app.openapi_schema = document
    return app.openapi_schema
