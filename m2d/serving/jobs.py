"""Jobs on a folder: large orders that the bulk pipeline makes, one after the other, and that survive the server.

    <folder>/<id>/job.json      who ordered what, and what has become of it
    <folder>/<id>/plan.parquet  what is to be made
    <folder>/<id>/references/   uploaded images that the plan names
    <folder>/<id>/images/       what m2d.generation.run makes of it (generation.output says what it holds)
    <folder>/<id>/log.txt       what that printed
Knows neither Ray nor torch: how the work is done elsewhere is a `Run`.
"""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from m2d.errors import CheckpointError, ConfigError, Incomplete, M2DError
from m2d.files.atomic import FULL, try_lock, write_whole
from m2d.generation.output import FolderSoFar, is_in_use, tar_pieces, write_rows
from m2d.generation.plan import PlanRow, rows_of, table_of, without_seldom
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.serving.orders import JobConflict, JobOrder, JobState, JobTold, Overloaded, TooManyJobs
from m2d.serving.settings import ServingLimits

logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_PATIENCE_S = 30.0  # of who calls, and of a job, for a service that is being replaced to let go of its files
_FOLDERS_KEPT = 4  # of jobs that are not at work: their rows in memory, 80 MB for 100,000 images
_PIECE_BYTES = 2**18  # of an archive
_LATER = ("started", "finished", "images_per_second", "seconds_left", "detail")  # known of a job


class Run(Protocol):
    """How the work of a job is done elsewhere: by m2d.serving.deployment on Ray, by tests in a thread."""

    async def __call__(self, config: GenerateConfig, sha256: str, log: Path) -> None:
        """`make_images(config, sha256)` elsewhere, to its end; raises the M2DError that it raises.

        log: file for what it prints. Where this call is cancelled (asyncio), the work is ended at once, and
        CancelledError goes on once nothing of it can write any more. It must also end when this process is killed.
        """
        ...


def make_images(config: GenerateConfig, sha256: str) -> None:
    """`generate`, if the checkpoint is still the one of this SHA-256. Raises an M2DError."""
    from m2d.generation.run import generate
    from m2d.models.checkpoint import checkpoint_sha256, hold_checkpoint, read_info

    with hold_checkpoint(config.checkpoint) as checkpoint:
        read_info(checkpoint)
        if checkpoint_sha256(Path(checkpoint)) != sha256:
            raise CheckpointError(f"checkpoint: {config.checkpoint} is another one than when this was ordered")
        try:
            generate(replace(config, checkpoint=checkpoint))
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ConfigError(f"output: {error.filename} cannot be written ({error.strerror})") from None


def keyed_id(owner: str, idempotency_key: str) -> str:
    """The id of the job that an owner's idempotency key begins."""
    return hashlib.sha256(json.dumps([owner, idempotency_key]).encode()).hexdigest()


@dataclass
class _Record:
    """A job and what its owner is not told."""

    job: JobTold
    owner: str  # name of the key
    config: GenerateConfig
    classes: tuple[str, ...]  # codes of the checkpoint's
    digest: str  # of the order
    resumed: tuple[float, int] | None = None  # when it was last started, and images there were
    can_stop: bool = False  # it is at work, and was not told to stop
    cancelled: bool = False

    def tell(self, **news: Any) -> None:
        """From now on, of the job."""
        self.job = self.job.model_copy(update=news)


class Jobs:
    """The jobs of one folder; another service of the same folder waits until this one has stopped.

    Of all owners: a job that is not the owner's is not there (KeyError).
    """

    def __init__(self, folder: Path, run: Run, *, limits: ServingLimits, at_once: int = 1) -> None:
        """at_once: jobs at work at a time."""
        self._folder = folder.absolute()
        self._run = run
        self._limits = limits
        self._at_once = at_once
        self._records: dict[str, _Record] = {}
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._read_folders: dict[str, FolderSoFar] = {}
        self._is_ours = False
        self._one_at_a_time = asyncio.Lock()  # new jobs
        self._saving = asyncio.Lock()
        self._lock: IO[Any] | None = None
        self._taking_over: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Go on with what is unfinished, as soon as no other service has the folder. Does not wait for that."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = try_lock(self._folder / ".lock")
        except OSError as error:
            raise ConfigError(f"directory: {self._folder} cannot be written ({error.strerror})") from None
        self._taking_over = asyncio.create_task(self._take_over())

    async def stop(self) -> None:
        """End the work; the next service goes on with it."""
        self._is_ours = False
        if self._taking_over is not None:
            self._taking_over.cancel()
            await asyncio.wait([self._taking_over])
        for job_id, task in self._at_work.items():
            if self._records[job_id].can_stop:
                task.cancel()
        if self._at_work:
            await asyncio.wait(self._at_work.values())
        if self._lock is not None:
            self._lock.close()

    async def create(self, order: JobOrder, owner: str, idempotency_key: str | None) -> JobTold:
        """The new job, or the one that this owner's idempotency key began. Raises JobConflict or TooManyJobs."""
        await self._wait_until_ours()
        return await asyncio.shield(self._create(order, owner, idempotency_key))  # whole, though the client goes

    async def all(self, owner: str) -> list[JobTold]:
        """The owner's jobs, the newest first."""
        await self._wait_until_ours()
        found = [record for record in self._records.values() if record.owner == owner]
        found.sort(key=lambda record: record.job.created, reverse=True)
        return [await self._told(record) for record in found]

    async def get(self, job_id: str, owner: str) -> JobTold:
        """Raises KeyError."""
        return await self._told(await self._find(job_id, owner))

    async def cancel(self, job_id: str, owner: str) -> JobTold:
        """Stops it; images that are done stay. A job that has ended stays as it is. Raises KeyError."""
        record = await self._find(job_id, owner)
        task = self._at_work.get(job_id)
        if task is not None:
            await asyncio.sleep(0)  # it has begun then; cancelled before, it would never end the job
            if record.can_stop:
                record.can_stop, record.cancelled = False, True
                task.cancel()
            await asyncio.wait([task])
        elif record.job.state == "queued":
            done = self._images(job_id).count() if record.job.started else 0
            await self._end(record, "cancelled", done, None)
        return await self._told(record)

    async def entries(self, job_id: str, owner: str, first: int, count: int) -> tuple[list[dict[str, Any]], int]:
        """(rows of the manifest from `first` on, by id; how many there are so far). Raises KeyError."""
        await self._find(job_id, owner)
        rows = await asyncio.to_thread(self._images(job_id).rows)
        page = without_seldom(rows.slice(first, count).drop_columns("accepted")).to_pylist()
        for row in page:  # references lie in a folder of this machine
            row |= {name: row[name] and Path(row[name]).name for name in ("reference", "reference_b")}
        return page, rows.num_rows

    async def image(self, job_id: str, owner: str, image_id: str) -> bytes:
        """A PNG. Raises KeyError."""
        await self._find(job_id, owner)

        def read(images: FolderSoFar) -> bytes:
            rows = images.rows()
            place = pc.index(rows["id"], image_id).as_py()
            if place < 0:
                raise KeyError(image_id)
            return (images.root / rows["path"][place].as_py()).read_bytes()

        return await asyncio.to_thread(read, self._images(job_id))

    async def archive(self, job_id: str, owner: str) -> AsyncIterator[bytes]:
        """A tar in WebDataset's layout, piece by piece: <id>.png, .cls, .json of each image. Raises KeyError."""
        record = await self._find(job_id, owner)
        images = self._images(job_id)
        pieces = tar_pieces(_each(await asyncio.to_thread(images.rows), images.root), record.classes)

        def read() -> bytes:
            piece = b""
            while len(piece) < _PIECE_BYTES and (more := next(pieces, b"")):
                piece += more
            return piece

        while piece := await asyncio.to_thread(read):
            yield piece

    # --- the queue --------------------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        while self._lock is None:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._lock = try_lock(self._folder / ".lock")
        self._records = await asyncio.to_thread(self._read)
        self._is_ours = True
        self._begin_next()

    async def _wait_until_ours(self) -> None:
        assert self._taking_over is not None
        await asyncio.wait([self._taking_over], timeout=_PATIENCE_S)
        if self._taking_over.done() and not self._taking_over.cancelled():
            self._taking_over.result()  # raises, for example where the disk refused
        if not self._is_ours:
            raise Overloaded("the jobs are with another service, which this one replaces or is replaced by", 5)

    async def _find(self, job_id: str, owner: str) -> _Record:
        await self._wait_until_ours()
        record = self._records[job_id]
        if record.owner != owner:
            raise KeyError(job_id)
        return record

    async def _create(self, order: JobOrder, owner: str, idempotency_key: str | None) -> JobTold:
        digest = await asyncio.to_thread(_digest, order)
        async with self._one_at_a_time:
            job_id = secrets.token_hex(16) if idempotency_key is None else keyed_id(owner, idempotency_key)
            if known := self._records.get(job_id):
                if known.digest != digest:
                    raise JobConflict("this Idempotency-Key came with another order before; take a new one")
                return await self._told(known)
            jobs = [record.job for record in self._records.values() if record.owner == owner]
            if sum(job.finished is None for job in jobs) >= self._limits.jobs:
                raise TooManyJobs(f"{self._limits.jobs} jobs of this key are unfinished; wait for one, or cancel one")
            unknown: dict[str, Any] = dict.fromkeys(_LATER)
            job = JobTold(
                id=job_id,
                state="queued",
                model=order.model.name,
                sha256=order.model.sha256,
                counts=dict(Counter(row.label for row in order.rows)),
                total=len(order.rows),
                done=0,
                created=time.time(),
                **unknown,
                request=dict(order.request),
            )
            record = _Record(job, owner, order.config, order.model.classes.codes, digest)
            try:
                await asyncio.to_thread(self._write, record, order)
            except (OSError, ConfigError) as error:
                logger.error("job %s: %s", job_id, error)
                shutil.rmtree(self._folder / job_id, ignore_errors=True)
                raise Overloaded("the service cannot write a new job; its log says why", 60) from None
            self._records[job_id] = record
        self._begin_next()
        return record.job

    def _begin_next(self) -> None:
        while len(self._at_work) < self._at_once and self._is_ours:
            waiting = [record for record in self._records.values() if record.job.state == "queued"]
            if not waiting:
                return
            record = min(waiting, key=self._turn)
            record.tell(state="running", started=record.job.started or time.time())
            record.can_stop = True
            self._at_work[record.job.id] = asyncio.create_task(self._work(record))

    def _turn(self, record: _Record) -> tuple[Any, ...]:
        """What was begun before a restart, then the owner who has least at work and has waited longest."""
        job = record.job
        same = [other.job for other in self._records.values() if other.owner == record.owner]
        at_work = sum(other.state == "running" for other in same)
        return job.started is None, at_work, max(other.started or 0 for other in same), job.created

    async def _work(self, record: _Record) -> None:
        job, place = record.job, self._folder / record.job.id
        images = self._images(job.id)
        state: JobState = "failed"
        detail = None
        try:
            for _ in range(int(_PATIENCE_S / _LOOK_EVERY_S)):  # a child of a killed service may be about to end
                if not is_in_use(images.root):
                    break
                await asyncio.sleep(_LOOK_EVERY_S)
            record.resumed = time.time(), await asyncio.to_thread(images.count)
            await self._save(record)
            config = replace(record.config, plan=str(place / "plan.parquet"), output=str(images.root), format="folder")
            await self._run(config, job.sha256, place / "log.txt")
            state = "succeeded"
        except asyncio.CancelledError:
            if not record.cancelled:
                raise
            state = "cancelled"
        except M2DError as error:
            state = "incomplete" if isinstance(error, Incomplete) else "failed"
            detail = self._line(error, record)
        except Exception:
            logger.exception("job %s failed", job.id)
            detail = "the service failed, and its log says why; order it again"
        record.can_stop = False
        await self._end(record, state, await asyncio.to_thread(images.count), detail)

    async def _end(self, record: _Record, state: JobState, done: int, detail: str | None) -> None:
        rate = _rate(record, done)
        record.tell(state=state, done=done, detail=detail, finished=time.time(), images_per_second=rate)
        await self._save(record)
        self._at_work.pop(record.job.id, None)
        self._begin_next()

    async def _told(self, record: _Record) -> JobTold:
        if record.job.started is None or record.job.finished is not None:
            return record.job
        done = await asyncio.to_thread(self._images(record.job.id).count)
        job = record.job
        if job.finished is not None:
            return job
        rate = _rate(record, done)
        left = (job.total - done) / rate if rate else None
        return job.model_copy(update={"done": done, "images_per_second": rate, "seconds_left": left})

    def _line(self, error: M2DError, record: _Record) -> str:
        """An error of `generate` for a client: no paths of this machine, no advice on a command line."""
        place = f"{self._folder / record.job.id}/"
        text = str(error).replace(place, "").replace(record.config.checkpoint, record.job.model)
        text = _PATH.sub(lambda found: Path(found[0]).name, text)
        text = " ".join(text.split())
        text = text.rpartition("; ")[0] or text
        return text if isinstance(error, Incomplete) else f"{text}; order it again"

    # --- the folder -------------------------------------------------------------------------------------------------

    def _images(self, job_id: str) -> FolderSoFar:
        """Those at work stay in memory, for they have thousands of parts; of the others those that were used last."""
        images = self._read_folders.pop(job_id, None) or FolderSoFar(self._folder / job_id / "images")
        self._read_folders[job_id] = images
        others = [other for other in self._read_folders if other not in self._at_work]
        for other in others[:-_FOLDERS_KEPT]:
            del self._read_folders[other]
        return images

    def _read(self) -> dict[str, _Record]:
        """All jobs; those that were at work wait."""
        records = {}
        for place in [path for path in self._folder.iterdir() if re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", path.name)]:
            if not (place / "job.json").exists():  # the service was killed as it took the order
                shutil.rmtree(place)
                continue
            try:
                read = json.loads((place / "job.json").read_text(encoding="utf-8"))
                job = JobTold(**read["job"])
                config, classes = _config_of(read["config"]), tuple(read["classes"])
                record = _Record(job, str(read["job"]["owner"]), config, classes, str(read["digest"]))
            except (OSError, KeyError, TypeError, ValueError, M2DError) as error:
                logger.error("%s cannot be read (%s), so this job is left out", place / "job.json", error)
                continue
            if record.job.state == "running":
                record.tell(state="queued")
            records[record.job.id] = record
        return records

    def _write(self, record: _Record, order: JobOrder) -> None:
        """A new job, job.json last."""
        place = self._folder / record.job.id
        references = place / "references"
        references.mkdir(parents=True, exist_ok=True)
        for name, content in order.uploads.items():
            write_whole(references / name, content)
        places = {name: str(references / name) for name in order.uploads}
        rows = [
            replace(row, reference=places.get(row.reference or ""), reference_b=places.get(row.reference_b or ""))
            for row in order.rows
        ]
        write_rows(place / "plan.parquet", table_of(rows))
        write_whole(place / "job.json", _json(record))

    async def _save(self, record: _Record) -> None:
        async with self._saving:
            try:
                file = self._folder / record.job.id / "job.json"
                await asyncio.to_thread(write_whole, file, _json(record))
            except OSError as error:  # a full disk: what the job has come to is known until the next restart
                logger.error("job %s: %s cannot be written (%s)", record.job.id, error.filename, error.strerror)


_PATH = re.compile(r"(?<![\w.:/])/[^\s;,:()'\"]+")


def _rate(record: _Record, done: int) -> float | None:
    """Images a second since the job was last started."""
    if record.resumed is None:
        return None
    since, before = record.resumed
    return (done - before) / max(time.time() - since, 1e-3)


def _digest(order: JobOrder) -> str:
    """Of what a client sent; not of its plan, which another checkpoint of the same name may change."""
    references = sorted({(row.reference or "", row.reference_b or "") for row in order.rows})
    return hashlib.sha256(json.dumps([dict(order.request), references], sort_keys=True).encode()).hexdigest()


def _json(record: _Record) -> str:
    job = record.job.model_dump(exclude={"object"}) | {"owner": record.owner}
    kept = {"job": job, "config": asdict(record.config), "classes": record.classes}
    return json.dumps(kept | {"digest": record.digest}, indent=1)


def _config_of(settings: dict[str, Any]) -> GenerateConfig:
    """The inverse of `asdict`."""
    own: dict[str, Any] = {"gates": GateConfig(**settings["gates"])}
    if settings["mode"] != "image2image":  # earlier jobs kept a strength that nothing used
        own["strength"] = GenerateConfig.strength
    return GenerateConfig(**(settings | own))


def _each(rows: pa.Table, root: Path) -> Iterator[tuple[PlanRow, bytes]]:
    """What a tar holds of each image that is there."""
    for first in range(0, rows.num_rows, 256):
        some = rows.slice(first, 256)
        for row, path in zip(rows_of(some), some["path"].to_pylist(), strict=True):
            with suppress(FileNotFoundError):  # found damaged meanwhile, and about to be made again
                yield row, (root / path).read_bytes()
