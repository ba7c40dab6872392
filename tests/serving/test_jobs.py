"""Jobs on a folder. The work is the real `generate` on the tiny checkpoint, as a rule in a thread of this process."""

import asyncio
import hashlib
import io
import json
import logging
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2d.data.catalog import class_counts, scan_dataset
from m2d.data.settings import DataConfig
from m2d.generation import output
from m2d.generation.output import FolderSoFar, cannot_write, write_images
from m2d.generation.plan import rows_of, standard_plan
from m2d.generation.run import generate
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.serving.engine import describe
from m2d.serving.jobs import Jobs, Run
from m2d.serving.orders import JobConflict, JobOrder, JobTold, Overloaded, TooManyJobs
from m2d.serving.settings import ServingLimits
from tests.serving.conftest import Bench, pixels, run_in_thread

pytestmark = pytest.mark.anyio
JobSettings = Callable[..., JobOrder]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def order(checkpoint: Path) -> JobSettings:
    """A function that plans a job as the HTTP side does: groups of two images, no gates."""
    card = describe(str(checkpoint), "tiny", "")

    def plan(counts: dict[str, int], seed: int = 0, **settings: Any) -> JobOrder:
        config = GenerateConfig(
            **{
                "checkpoint": card.checkpoint, "classes": ",".join(counts), "seed": seed, "steps": 1, "batch_size": 2,
                "device": "cpu", "feature": "none", "gates": GateConfig(enabled=False),
            } | settings
        )  # fmt: skip
        rows = rows_of(standard_plan(counts, run_seed=seed, sampling=config, feature="none"))
        return JobOrder(model=card, config=config, rows=tuple(rows), request={"counts": counts, "seed": seed})

    return plan


@asynccontextmanager
async def serving(folder: Path, run: Run, limits: ServingLimits | None = None) -> AsyncIterator[Jobs]:
    jobs = Jobs(folder, run, limits=limits or ServingLimits())
    await jobs.start()
    try:
        yield jobs
    finally:
        await jobs.stop()


async def until(jobs: Jobs, job: JobTold, is_so: Callable[[JobTold], bool], owner: str = "ann") -> JobTold:
    deadline = time.monotonic() + 300
    while not is_so(found := await jobs.get(job.id, owner)):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


async def ended(jobs: Jobs, job: JobTold, owner: str = "ann") -> JobTold:
    return await until(jobs, job, lambda found: found.finished is not None, owner)


async def ids(jobs: Jobs, job: JobTold) -> list[str]:
    rows, _ = await jobs.entries(job.id, "ann", 0, 1000)
    return [row["id"] for row in rows]


async def archive(jobs: Jobs, job: JobTold, owner: str = "ann") -> bytes:
    return b"".join([piece async for piece in jobs.archive(job.id, owner)])


async def test_a_job_makes_the_images_of_a_generate_run(tmp_path: Path, order: JobSettings, bench: Bench) -> None:
    bench.allow(100)
    asked = order({"DF": 3, "MEL": 3})
    async with serving(tmp_path / "jobs", bench) as jobs:
        first = await jobs.create(asked, "ann", None)
        assert (first.model, first.counts, first.total) == ("tiny", {"DF": 3, "MEL": 3}, 6)
        job = await ended(jobs, first)
        images = {name: await jobs.image(job.id, "ann", name) for name in await ids(jobs, job)}
    assert (job.state, job.done, job.detail) == ("succeeded", 6, None)
    root = generate(replace(asked.config, num_samples=3, num_actors=0, output=str(tmp_path / "images")))
    by_hand = {path.stem: path.read_bytes() for path in root.glob("*/*.png")}
    assert sorted(images) == sorted(by_hand)
    for name, png in images.items():
        np.testing.assert_array_equal(pixels(png), pixels(by_hand[name]))
    found = scan_dataset(str(tmp_path / "jobs" / job.id / "images"), DataConfig())  # a folder to train on
    assert {code: n for code, n in class_counts(found.catalog).items() if n} == {"DF": 3, "MEL": 3}


async def test_progress_and_results_come_as_images_are_done(tmp_path: Path, order: JobSettings, bench: Bench) -> None:
    async with serving(tmp_path, bench) as jobs:
        job = await jobs.create(order({"MEL": 6}), "ann", None)
        assert (await jobs.entries(job.id, "ann", 0, 10)) == ([], 0)
        bench.allow(2)
        job = await until(jobs, job, lambda found: found.done == 4)
        assert job.state == "running"
        assert job.images_per_second
        assert job.seconds_left == pytest.approx(2 / job.images_per_second)
        page, total = await jobs.entries(job.id, "ann", 1, 2)
        assert ([row["id"] for row in page], total) == (["MEL_000001", "MEL_000002"], 4)
        assert page[0]["sha256"] == hashlib.sha256(await jobs.image(job.id, "ann", "MEL_000001")).hexdigest()
        for unknown in ("MEL_000005", "../job", "MEL/MEL_000001"):
            with pytest.raises(KeyError):
                await jobs.image(job.id, "ann", unknown)
        bench.allow(1)
        job = await ended(jobs, job)
        assert (job.done, job.seconds_left) == (6, None)


async def test_the_archive_holds_what_is_done_so_far_as_a_webdataset(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    asked = order({"DF": 2, "MEL": 2})
    async with serving(tmp_path / "jobs", bench) as jobs:
        job = await jobs.create(asked, "ann", None)
        bench.allow(1)
        await until(jobs, job, lambda found: found.done == 2)
        with tarfile.open(fileobj=io.BytesIO(await archive(jobs, job))) as tar:
            assert tar.getnames() == [
                f"{image}.{part}" for image in ("DF_000000", "MEL_000000") for part in ("png", "cls", "json")
            ]
            assert [tar.extractfile(f"{one}.cls").read() for one in ("DF_000000", "MEL_000000")] == [b"3", b"4"]  # type: ignore[union-attr]
        bench.allow(1)
        await ended(jobs, job)
        images = [(row, await jobs.image(job.id, "ann", row.id)) for row in sorted(asked.rows, key=lambda row: row.id)]
        (path, *_) = write_images(tmp_path, "webdataset", "all", images)
        assert await archive(jobs, job) == (tmp_path / path).read_bytes()


async def test_a_running_job_is_stopped_and_what_is_done_stays(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    async with serving(tmp_path, bench) as jobs:
        job = await jobs.create(order({"MEL": 6}), "ann", None)
        bench.allow(1)
        await until(jobs, job, lambda found: found.done == 2)
        told = await asyncio.gather(jobs.cancel(job.id, "ann"), jobs.cancel(job.id, "ann"))
        assert [(one.state, one.done) for one in told] == 2 * [("cancelled", 2)]
        bench.allow(100)
        other = await ended(jobs, await jobs.create(order({"DF": 1}), "ann", None))
        assert other.state == "succeeded"
        assert (await jobs.cancel(other.id, "ann")).state == "succeeded"  # it has ended
        assert await ids(jobs, job) == ["MEL_000000", "MEL_000001"]
    async with serving(tmp_path, bench) as jobs:
        assert (await jobs.get(job.id, "ann")).state == "cancelled"
    assert bench.begun == [job.id, other.id]


async def test_a_waiting_job_is_cancelled_and_the_running_one_goes_on(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    async with serving(tmp_path, bench) as jobs:
        running, waiting = [await jobs.create(order({"MEL": 2}, seed), "ann", None) for seed in (0, 1)]
        assert (await jobs.cancel(waiting.id, "ann")).state == "cancelled"
        assert (await jobs.get(running.id, "ann")).state == "running"
        bench.allow(100)
        assert (await ended(jobs, running)).state == "succeeded"
    assert bench.begun == [running.id]


async def test_a_job_that_is_cancelled_in_the_moment_of_its_turn_ends_and_the_next_one_begins(
    tmp_path: Path, order: JobSettings, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once() -> None:
        pass

    async with serving(tmp_path, bench) as jobs:
        first, second, third = [await jobs.create(order({"MEL": 1}, seed), "ann", None) for seed in range(3)]
        monkeypatch.setattr(jobs, "_wait_until_ours", at_once)
        stopping = asyncio.create_task(jobs.cancel(first.id, "ann"))
        while second.id not in jobs._at_work:
            await asyncio.sleep(0)
        assert (await jobs.cancel(second.id, "ann")).state == "cancelled"
        await stopping
        bench.allow(1)
        assert (await ended(jobs, third)).state == "succeeded"


async def test_owners_take_turns_and_see_their_own_jobs_alone(tmp_path: Path, order: JobSettings, bench: Bench) -> None:
    async with serving(tmp_path, bench) as jobs:
        ann = [await jobs.create(order({"MEL": 1}, seed), "ann", None) for seed in range(3)]
        bob = [await jobs.create(order({"MEL": 1}, seed), "bob", None) for seed in range(2)]
        assert [job.id for job in await jobs.all("bob")] == [bob[1].id, bob[0].id]
        for use in (jobs.get, jobs.cancel):
            with pytest.raises(KeyError):
                await use(ann[2].id, "bob")
        with pytest.raises(KeyError):
            await jobs.entries(ann[0].id, "bob", 0, 1)
        with pytest.raises(KeyError):
            await archive(jobs, ann[0], "bob")
        bench.allow(100)
        await asyncio.gather(*(ended(jobs, job) for job in ann), *(ended(jobs, job, "bob") for job in bob))
    assert bench.begun == [ann[0].id, bob[0].id, ann[1].id, bob[1].id, ann[2].id]


async def test_an_idempotency_key_is_one_job_of_its_owner_whatever_happens(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    bench.allow(100)
    async with serving(tmp_path, bench) as jobs:
        job, again = await asyncio.gather(*(jobs.create(order({"MEL": 1}), "ann", "monday") for _ in range(2)))
        assert again.id == job.id
        await ended(jobs, job)
    async with serving(tmp_path, bench) as jobs:
        again = await jobs.create(order({"MEL": 1}), "ann", "monday")
        assert (again.id, again.state) == (job.id, "succeeded")
        with pytest.raises(JobConflict):
            await jobs.create(order({"MEL": 2}), "ann", "monday")
        other = await jobs.create(order({"MEL": 2}), "bob", "monday")
        assert other.id != job.id
        await ended(jobs, other, "bob")
    assert bench.begun == [job.id, other.id]


async def test_a_key_has_so_many_unfinished_jobs_and_no_more(tmp_path: Path, order: JobSettings, bench: Bench) -> None:
    async with serving(tmp_path, bench, ServingLimits(jobs=2)) as jobs:
        first, _ = [await jobs.create(order({"MEL": 1}, seed), "ann", None) for seed in range(2)]
        with pytest.raises(TooManyJobs, match="2 jobs"):
            await jobs.create(order({"MEL": 1}), "ann", None)
        await jobs.create(order({"MEL": 1}), "bob", None)
        await jobs.cancel(first.id, "ann")
        await jobs.create(order({"MEL": 1}), "ann", None)


async def test_the_next_service_waits_for_the_folder_and_goes_on(
    tmp_path: Path, order: JobSettings, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2d.serving.jobs._LOOK_EVERY_S", 0.02)
    monkeypatch.setattr("m2d.serving.jobs._PATIENCE_S", 0.1)
    old = Jobs(tmp_path, bench, limits=ServingLimits())
    await old.start()
    running = await old.create(order({"MEL": 6}), "ann", None)
    waiting = await old.create(order({"MEL": 2}), "bob", None)
    bench.allow(2)
    await until(old, running, lambda found: found.done == 4)
    async with serving(tmp_path, bench) as new:
        with pytest.raises(Overloaded):
            await new.get(running.id, "ann")
        await old.stop()
        bench.allow(100)
        assert [(await ended(new, running)).done, (await ended(new, waiting, "bob")).done] == [6, 2]
        assert (await new.get(running.id, "ann")).started == pytest.approx(running.created, abs=1)
    assert bench.begun == [running.id, running.id, waiting.id]  # what was begun goes first
    assert sorted(bench.drawn) == sorted([*(f"MEL_{n:06d}" for n in range(6)), "MEL_000000", "MEL_000001"])


async def test_images_that_the_gates_refuse_leave_a_job_incomplete(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    bench.allow(100)
    strict = GateConfig(near_copy=False, class_consistency=False, min_contrast=127, max_attempts=2)
    async with serving(tmp_path, bench) as jobs:
        job = await ended(jobs, await jobs.create(order({"MEL": 2}, gates=strict), "ann", None))
    assert (job.state, job.done) == ("incomplete", 0)
    assert job.detail == "incomplete: 2 of 2 images are missing, rejected 2 times each: MEL 2 (blank 4)"


async def test_a_job_whose_checkpoint_is_another_one_fails_in_one_line(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    asked = order({"MEL": 1})
    changed = replace(asked, model=replace(asked.model, sha256="0" * 64))
    gone = replace(asked, config=replace(asked.config, checkpoint=f"{tmp_path}/some where/gone"))
    async with serving(tmp_path, bench) as jobs:
        told = [await ended(jobs, await jobs.create(one, "ann", None)) for one in (changed, gone)]
    assert [job.state for job in told] == ["failed", "failed"]
    assert told[0].detail == "checkpoint: tiny is another one than when this was ordered; order it again"
    assert told[1].detail == "checkpoint: tiny is not a directory; order it again"


async def test_a_full_disk_fails_a_job_and_not_the_next(tmp_path: Path, order: JobSettings, bench: Bench) -> None:
    bench.allow(100)

    async def full(config: GenerateConfig, sha256: str, log: Path) -> None:
        if config.seed == 1:
            raise cannot_write(Path(str(config.output)) / "MEL", OSError(28, "No space left on device"))
        await bench(config, sha256, log)

    async with serving(tmp_path, full) as jobs:
        job = await ended(jobs, await jobs.create(order({"MEL": 1}, seed=1), "ann", None))
        assert job.detail == "output: images/MEL cannot be written (No space left on device); order it again"
        assert (await ended(jobs, await jobs.create(order({"MEL": 1}), "ann", None))).state == "succeeded"


async def test_a_job_that_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, order: JobSettings, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async with serving(tmp_path, bench) as jobs:
        with monkeypatch.context() as patch:
            patch.setattr("m2d.serving.jobs.write_whole", full)
            with pytest.raises(Overloaded):
                await jobs.create(order({"MEL": 1}), "ann", None)
        assert await jobs.all("ann") == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


async def test_a_bug_fails_a_job_and_its_traceback_is_for_the_log(
    tmp_path: Path, order: JobSettings, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(config: GenerateConfig, sha256: str, log: Path) -> None:
        raise ZeroDivisionError("secret")

    async with serving(tmp_path, broken) as jobs:
        job = await ended(jobs, await jobs.create(order({"MEL": 1}), "ann", None))
    assert (job.state, job.detail) == ("failed", "the service failed, and its log says why; order it again")
    assert "ZeroDivisionError: secret" in caplog.text


async def test_a_damaged_job_is_left_out_and_a_half_written_one_removed(
    tmp_path: Path, order: JobSettings, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, bench) as jobs:
        damaged, whole = [await jobs.create(order({"MEL": 1}), "ann", None) for _ in range(2)]
    (tmp_path / damaged.id / "job.json").write_text("{")
    kept = json.loads((tmp_path / whole.id / "job.json").read_text())
    kept["config"]["strength"] = 0.4  # of no use here: an earlier M2D kept it all the same
    (tmp_path / whole.id / "job.json").write_text(json.dumps(kept))
    (tmp_path / ("0" * 32) / "references").mkdir(parents=True)
    bench.allow(100)
    with caplog.at_level(logging.ERROR):
        async with serving(tmp_path, bench) as jobs:
            assert [job.id for job in await jobs.all("ann")] == [whole.id]
            await ended(jobs, whole)
    assert f"{damaged.id}/job.json cannot be read" in caplog.text
    assert not (tmp_path / ("0" * 32)).exists()


async def test_uploads_lie_beside_the_plan_and_are_told_by_name(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    bench.allow(100)
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(buffer, "PNG")
    name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.png"
    plain = order({"MEL": 2})
    rows = tuple(replace(row, mode="image2image", reference=name, strength=0.5) for row in plain.rows)
    async with serving(tmp_path, bench) as jobs:
        job = await jobs.create(replace(plain, rows=rows, uploads={name: buffer.getvalue()}), "ann", None)
        assert (await ended(jobs, job)).state == "succeeded"
        (row, _), _ = await jobs.entries(job.id, "ann", 0, 10)
        with tarfile.open(fileobj=io.BytesIO(await archive(jobs, job))) as tar:
            settings = json.load(tar.extractfile("MEL_000000.json"))  # type: ignore[arg-type]
    assert row["reference"] == settings["reference"] == name


async def test_each_part_of_a_folder_is_read_once(
    tmp_path: Path, order: JobSettings, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = pq.read_table

    def counting(stream: Any, **settings: Any) -> Any:
        read.append(Path(stream.name).name)
        return real(stream, **settings)

    async with serving(tmp_path, bench) as jobs:
        job = await jobs.create(order({"MEL": 6}), "ann", None)
        bench.allow(2)
        await until(jobs, job, lambda found: found.done == 4)
        images = FolderSoFar(tmp_path / job.id / "images")
        monkeypatch.setattr(output.pq, "read_table", counting)
        assert [images.count() for _ in range(3)] == [4, 4, 4]
        assert len(read) == len(set(read)) == 2


async def test_no_image_is_missed_while_parts_become_a_journal(
    tmp_path: Path, order: JobSettings, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, bench) as jobs:
        job = await jobs.create(order({"MEL": 6}), "ann", None)
        bench.allow(2)
        await until(jobs, job, lambda found: found.done == 4)
        images = FolderSoFar(tmp_path / job.id / "images")
        real = images._read

        def too_late(name: str, path: Path) -> None:
            """The part has been listed, and is gone as it is opened."""
            bench.allow(1)
            while (images.root / "parts").exists():
                time.sleep(0.01)
            real(name, path)

        monkeypatch.setattr(images, "_read", too_late)
        assert await asyncio.to_thread(images.count) == 6
        assert images.rows()["id"].to_pylist() == [f"MEL_{number:06d}" for number in range(6)]


def test_a_server_killed_with_a_job_half_done_and_started_again_gives_every_image_once(
    tmp_path: Path, order: JobSettings, bench: Bench
) -> None:
    asked = order({"MEL": 20, "DF": 20}, steps=4)

    async def place(folder: Path) -> JobTold:
        async with serving(folder, bench) as jobs:
            return await jobs.create(asked, "ann", "the same")

    job = asyncio.run(place(tmp_path / "jobs"))
    script = (
        "import asyncio, pathlib, sys; from m2d.serving.jobs import *\n"
        "async def run(config, sha256, log):\n"
        "    await asyncio.to_thread(make_images, replace(config, num_actors=0), sha256)\n"
        "async def serve():\n"
        "    await Jobs(pathlib.Path(sys.argv[1]), run, limits=ServingLimits()).start()\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(serve())"
    )
    images = FolderSoFar(tmp_path / "jobs" / job.id / "images")
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "jobs")]) as server:
        while images.count() < 10:
            assert server.poll() is None
            time.sleep(0.02)
        server.kill()
    done = images.count()
    assert 10 <= done < 40
    before = {path: path.stat().st_mtime_ns for path in images.root.glob("*/*.png") if path.stem in _listed(images)}

    async def finish(folder: Path, run: Run) -> dict[str, bytes]:
        async with serving(folder, run) as jobs:
            assert (await ended(jobs, job)).state == "succeeded"
            return {name: await jobs.image(job.id, "ann", name) for name in await ids(jobs, job)}

    bench.allow(1000)
    resumed = asyncio.run(finish(tmp_path / "jobs", run_in_thread))
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none was made again
    assert asyncio.run(place(tmp_path / "unbroken")).id == job.id
    assert resumed == asyncio.run(finish(tmp_path / "unbroken", bench))
    assert len(resumed) == 40


def _listed(images: FolderSoFar) -> set[str]:
    return set(images.rows()["id"].to_pylist())
