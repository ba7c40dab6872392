"""/v1/jobs over HTTP: two keys, the real planning, the real pipeline in a thread."""

import asyncio
import copy
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from m2d.serving.app import create_app
from m2d.serving.jobs import Jobs
from m2d.serving.settings import ServeConfig, ServingLimits
from tests.serving.conftest import Bench, new_key

QUOTA = 12  # images a day of each key
Ask = Callable[..., Any]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {name: new_key(tmp_path / "keys.json", name, images_per_day=QUOTA) for name in ("ann", "bob")}


@pytest.fixture
def jobs(config: ServeConfig, bench: Bench, tmp_path: Path) -> Jobs:
    return Jobs(replace(config, directory=str(tmp_path)).jobs_folder, bench, limits=config.limits)


@pytest.fixture
def client(service: Any, config: ServeConfig, jobs: Jobs, keys: dict[str, str], tmp_path: Path) -> Iterator[TestClient]:
    """Of a service with keys and with jobs of its own; groups of two images."""
    own = replace(
        config,
        directory=str(tmp_path),
        keys=str(tmp_path / "keys.json"),
        batch_size=2,
        limits=ServingLimits(job_images=1000),
    )
    served = copy.copy(service)
    served.jobs = jobs
    with TestClient(create_app(served, own), base_url="http://localhost", raise_server_exceptions=False) as made:
        assert made.portal is not None
        made.portal.call(jobs.start)
        yield made
        made.portal.call(jobs.stop)


@pytest.fixture
def ask(client: TestClient, keys: dict[str, str]) -> Ask:
    """A function: ask("GET", "/jobs", key="ann") and so on."""

    def asked(method: str, path: str, *, key: str = "ann", headers: dict[str, str] | None = None, **how: Any) -> Any:
        return client.request(
            method, f"/v1{path}", headers={"Authorization": f"Bearer {keys[key]}", **(headers or {})}, **how
        )

    return asked


def order(ask: Ask, *, key: str = "ann", again: str | None = None, **settings: Any) -> Any:
    headers = {} if again is None else {"Idempotency-Key": again}
    return ask("POST", "/jobs", key=key, json={"counts": {"MEL": 2}, "steps": 1} | settings, headers=headers)


def until(ask: Ask, job: dict[str, Any], is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while not is_so(found := ask("GET", f"/jobs/{job['id']}").json()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return dict(found)


def ended(ask: Ask, job: dict[str, Any]) -> dict[str, Any]:
    return until(ask, job, lambda found: found["finished"] is not None)


def quota_left(ask: Ask, key: str = "ann") -> int:
    """As the problem says it that an order of too many gets."""
    answer = order(ask, key=key, counts={"NV": QUOTA + 1})
    assert answer.status_code == 429
    return int(answer.json()["detail"].split("of which ")[1].split()[0])


def test_a_job_is_ordered_watched_and_fetched(ask: Ask, bench: Bench) -> None:
    bench.allow(100)
    answer = order(ask, counts={"melanoma": 3, "皮肤纤维瘤": 2}, seed=7)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    assert (answer.json()["object"], answer.json()["counts"]) == ("job", {"DF": 2, "MEL": 3})
    job = ended(ask, answer.json())
    assert {name: job[name] for name in ("state", "model", "total", "done", "detail", "seconds_left")} == {
        "state": "succeeded", "model": "tiny", "total": 5, "done": 5, "detail": None, "seconds_left": None
    }  # fmt: skip
    assert job["request"]["seed"] == 7
    assert "owner" not in job
    assert ask("GET", "/jobs").json() == {"object": "list", "data": [job]}

    first = ask("GET", f"/jobs/{job['id']}/images?count=3").json()
    rest = ask("GET", f"/jobs/{job['id']}/images?first={first['next']}&count=3").json()
    assert ([first["next"], rest["next"]], [first["total"], rest["total"]]) == ([3, None], [5, 5])
    rows = first["data"] + rest["data"]
    ids = ["DF_000000", "DF_000001", "MEL_000000", "MEL_000001", "MEL_000002"]
    assert [row["id"] for row in rows] == ids
    png = ask("GET", rows[2]["url"].removeprefix("/v1"))
    assert png.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(png.content)) as image:
        assert (image.info["synthetic"], image.info["class"], int(image.info["seed"])) == (
            "true",
            "MEL",
            rows[2]["seed"],
        )
    answer = ask("GET", f"/jobs/{job['id']}/archive")
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        assert tar.getnames() == [f"{one}.{part}" for one in ids for part in ("png", "cls", "json")]
        assert tar.extractfile("MEL_000000.png").read() == png.content  # type: ignore[union-attr]


def test_a_balanced_set_is_ordered_by_what_there_is(ask: Ask) -> None:
    balance = {"have": {"NV": 5, "DF": 2, "MEL": 5}, "to": "max"}
    answer = ask("POST", "/jobs", json={"balance": balance, "steps": 1})
    assert (answer.status_code, answer.json()["counts"]) == (202, {"DF": 3})


def test_references_come_as_files_of_a_form(ask: Ask, bench: Bench) -> None:
    bench.allow(100)
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(buffer, "PNG")
    asked = {"mode": "image2image", "feature": "none", "counts": {"MEL": 2}, "steps": 2}
    files = [("references", ("../../etc/passwd", buffer.getvalue(), "image/png"))]
    answer = ask("POST", "/jobs", data={"request": json.dumps(asked)}, files=files)
    assert answer.status_code == 202, answer.text
    assert ended(ask, answer.json())["state"] == "succeeded"
    row = ask("GET", f"/jobs/{answer.json()['id']}/images").json()["data"][0]
    assert row["reference"].endswith(".png")
    assert len(row["reference"]) == 64 + len(".png")


def test_an_idempotency_key_orders_once(ask: Ask) -> None:
    first, again = order(ask, again="monday"), order(ask, again="monday")
    assert [first.status_code, again.status_code] == [202, 200]
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    other = order(ask, again="monday", seed=1)
    assert (other.status_code, other.headers["content-type"]) == (409, "application/problem+json")
    assert order(ask, key="bob", again="monday").json()["id"] != first.json()["id"]
    assert order(ask, again="x" * 201).status_code == 422
    assert quota_left(ask) == QUOTA - 2


def test_the_quota_is_spent_by_orders_and_given_back_for_what_a_cancelled_one_did_not_make(
    ask: Ask, bench: Bench
) -> None:
    job = order(ask, counts={"MEL": 8}).json()
    assert quota_left(ask) == QUOTA - 8
    bench.allow(1)
    until(ask, job, lambda found: found["done"] == 2)
    for _ in range(2):
        stopped = ask("DELETE", f"/jobs/{job['id']}")
        assert (stopped.status_code, stopped.json()["state"], stopped.json()["done"]) == (200, "cancelled", 2)
        assert quota_left(ask) == QUOTA - 2
    assert quota_left(ask, "bob") == QUOTA


@pytest.mark.parametrize(("method", "left"), [("create", QUOTA - 8), ("cancel", QUOTA)])
def test_the_quota_is_right_for_a_client_that_goes_before_the_answer(
    client: TestClient,
    jobs: Jobs,
    ask: Ask,
    keys: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    left: int,
) -> None:
    """Serve cancels the route of a client that has gone."""
    made, real = asyncio.Event(), getattr(jobs, method)

    async def late(*arguments: Any) -> Any:
        job = await real(*arguments)
        made.set()
        await asyncio.sleep(0.2)
        return job

    async def ask_and_go(method: str, path: str) -> None:
        headers = {"Authorization": f"Bearer {keys['ann']}"}
        content = {"counts": {"MEL": 8}, "steps": 1}
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1") as going:
            asking = asyncio.create_task(going.request(method, path, json=content, headers=headers))
            await made.wait()
            asking.cancel()
            await asyncio.wait([asking])
        await asyncio.sleep(0.4)

    job = order(ask, counts={"MEL": 8}).json() if method == "cancel" else None
    monkeypatch.setattr(jobs, method, late)
    assert client.portal is not None
    client.portal.call(ask_and_go, *(("DELETE", f"/jobs/{job['id']}") if job else ("POST", "/jobs")))
    assert quota_left(ask) == left


def test_another_keys_job_is_not_there(ask: Ask, bench: Bench) -> None:
    bench.allow(100)
    job = ended(ask, order(ask).json())
    place = f"/jobs/{job['id']}"
    for method, path in (
        ("GET", place),
        ("DELETE", place),
        ("GET", f"{place}/images"),
        ("GET", f"{place}/images/MEL_000000"),
        ("GET", f"{place}/archive"),
    ):
        answers = [ask(method, path, key="bob"), ask(method, path.replace(job["id"], "0" * 32))]
        assert [answer.status_code for answer in answers] == [404, 404]
        told = [{**answer.json(), "request_id": "", "instance": ""} for answer in answers]
        assert told[0] == told[1]  # nothing tells the two apart
    assert ask("GET", "/jobs", key="bob").json()["data"] == []
    for unknown in ("MEL_000002", "..%2f..%2fjob.json", "%00", "MEL%2fMEL_000000"):
        assert ask("GET", f"{place}/images/{unknown}").status_code == 404


@pytest.mark.parametrize(
    ("settings", "status", "named"),
    [
        ({"counts": {"MEL": 1001}}, 422, "1000"),
        ({"counts": {"MEL": 0}}, 422, "at least one"),
        ({"counts": {"WART": 1}}, 422, "WART"),
        ({"counts": None}, 422, "balance"),
        ({"model": "other"}, 404, "tiny"),
        ({"steps": 101}, 422, "100"),
        ({"mode": "image2image"}, 422, "references"),
    ],
)
def test_what_cannot_be_made_is_refused_and_spends_nothing(
    ask: Ask, settings: dict[str, Any], status: int, named: str
) -> None:
    answer = order(ask, **settings)
    assert (answer.status_code, named in answer.json()["detail"]) == (status, True), answer.text
    assert quota_left(ask) == QUOTA
    assert ask("GET", "/jobs").json()["data"] == []


@pytest.mark.parametrize("query", ["first=-1", "count=0", "count=1001", "first=x", f"first={2**70}"])
def test_a_page_that_cannot_be_is_refused(ask: Ask, query: str) -> None:
    job = order(ask).json()
    assert ask("GET", f"/jobs/{job['id']}/images?{query}").status_code == 422
