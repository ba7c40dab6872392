"""/v1/jobs: large orders over HTTP. What is asked is planned here; m2d.serving.jobs does it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from m2d.serving import requests as asked
from m2d.serving.access import Access, Caller
from m2d.serving.drawing import Service
from m2d.serving.jobs import keyed_id
from m2d.serving.orders import JobOrder, JobTold
from m2d.serving.problems import Problem, documented
from m2d.serving.settings import ServeConfig
from m2d.serving.uploads import read_order

_TAR, _PNG = "application/x-tar", "image/png"


class JobList(BaseModel):
    """A key's jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobTold]


class JobImages(BaseModel):
    """A page of a job's images."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]] = Field(description="rows of the manifest, by id, each with the url of its PNG")
    total: int = Field(description="images there are so far")
    next: int | None = Field(description="`first` of the next page; null where this is the last")


def create_router(service: Service, access: Access, config: ServeConfig) -> APIRouter:
    """All routes below /v1/jobs."""
    router = APIRouter(prefix="/v1/jobs", responses=documented(401, 403, 500, 503))
    caller_of = Annotated[Caller, Depends(access)]
    one_at_a_time = asyncio.Lock()  # so that no image is counted, or given back, twice

    # Each is whole though its client goes: a job that is there has been counted, and one that was stopped given back.

    async def ordered(order: JobOrder, caller: Caller, idempotency_key: str | None) -> tuple[JobTold, bool]:
        """(the job, whether it is a new one)."""
        async with one_at_a_time:
            with suppress(KeyError):
                if idempotency_key is not None:
                    await service.jobs.get(keyed_id(caller.name, idempotency_key), caller.name)
                    return await service.jobs.create(order, caller.name, idempotency_key), False
            access.spend(caller, len(order.rows), at_once=False)
            try:
                return await service.jobs.create(_as_served(order, config), caller.name, idempotency_key), True
            except BaseException:
                access.refund(caller, len(order.rows), at_once=False)
                raise

    async def stopped(job_id: str, caller: Caller) -> JobTold:
        async with one_at_a_time:
            before = await service.jobs.get(job_id, caller.name)
            job = await service.jobs.cancel(job_id, caller.name)
            if before.finished is None and job.state == "cancelled":
                access.refund(caller, job.total - job.done, at_once=False)
        return job

    @router.post(
        "",
        status_code=202,
        summary="Order many images",
        openapi_extra=asked.body_of(asked.JobRequest, "references", "references_b", many=True),
        response_model=JobTold,
        responses={
            200: {"model": JobTold, "description": "The job that this Idempotency-Key began"},
            **documented(400, 404, 409, 413, 415, 422, 429),
        },
    )
    async def create(
        request: Request,
        response: Response,
        caller: caller_of,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> JobTold:
        """Jobs wait for each other and survive the server. The same Idempotency-Key again is the same job."""
        content, uploads = await read_order(request, config.limits)
        ask = asked.JobRequest.model_validate(content)
        card = asked.pick_model(await service.models(), ask.model)
        order = await to_thread.run_sync(asked.plan_job, ask, card, uploads, config.limits)
        job, is_new = await asyncio.shield(ordered(order, caller, idempotency_key))
        if not is_new:
            response.status_code = 200
        response.headers["Location"] = f"{router.prefix}/{job.id}"
        return job

    @router.get("", summary="This key's jobs", response_model=JobList)
    async def all_jobs(caller: caller_of) -> dict[str, Any]:
        """The newest first."""
        return {"data": await service.jobs.all(caller.name)}

    @router.get("/{job_id}", summary="How far a job is", response_model=JobTold, responses=documented(404))
    async def one(job_id: str, caller: caller_of) -> JobTold:
        """Its state, and how much of it is done."""
        with _or_404():
            return await service.jobs.get(job_id, caller.name)

    @router.delete("/{job_id}", summary="Stop a job", response_model=JobTold, responses=documented(404))
    async def cancel(job_id: str, caller: caller_of) -> JobTold:
        """Images that are done stay. A job that has ended stays as it is."""
        with _or_404():
            return await asyncio.shield(stopped(job_id, caller))

    @router.get(
        "/{job_id}/images",
        summary="A job's images, page by page",
        response_model=JobImages,
        responses=documented(404, 422),
    )
    async def images(
        job_id: str,
        caller: caller_of,
        first: Annotated[int, Query(ge=0, le=2**31, description="of the page, counted from 0")] = 0,
        count: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict[str, Any]:
        """Those that are done, by id; while the job is running new ones may come in between."""
        with _or_404():
            rows, total = await service.jobs.entries(job_id, caller.name, first, count)
        data = [{**row, "url": f"{router.prefix}/{job_id}/images/{row['id']}"} for row in rows]
        after = first + len(rows)
        return {"data": data, "total": total, "next": after if rows and after < total else None}

    @router.get(
        "/{job_id}/images/{image_id}",
        summary="An image",
        response_class=Response,
        responses={200: {"content": {_PNG: asked.BINARY}}, **documented(404)},
    )
    async def image(job_id: str, image_id: str, caller: caller_of) -> Response:
        """With what made it in its text chunks."""
        with _or_404("no job of this key has this image"):
            return Response(await service.jobs.image(job_id, caller.name, image_id), media_type=_PNG)

    @router.get(
        "/{job_id}/archive",
        summary="All images of a job",
        response_class=StreamingResponse,
        responses={200: {"content": {_TAR: asked.BINARY}}, **documented(404)},
    )
    async def archive(job_id: str, caller: caller_of) -> StreamingResponse:
        """Those that are done, as a tar in WebDataset's layout: <id>.png, <id>.cls, <id>.json."""
        with _or_404():
            await service.jobs.get(job_id, caller.name)
        name = {"Content-Disposition": f'attachment; filename="m2d-job-{job_id[:8]}.tar"'}
        return StreamingResponse(service.jobs.archive(job_id, caller.name), media_type=_TAR, headers=name)

    return router


def _as_served(order: JobOrder, config: ServeConfig) -> JobOrder:
    """With the settings that are the service's, kept with the job so that a restart with others changes nothing."""
    names = ("gates", "batch_size", "device", "mixed_precision", "extractor_weights")
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    return replace(order, config=replace(order.config, **own))


@contextmanager
def _or_404(text: str = "no job of this key has this id") -> Iterator[None]:
    try:
        yield
    except KeyError:
        raise Problem(404, text) from None
