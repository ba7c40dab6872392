"""What every answer has, whatever the route: problem details, ids, headers, limits, a line in the log."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated

import pytest
from fastapi import FastAPI, Header, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.serving.orders import DeadlineExceeded, JobConflict, Overloaded, TooManyJobs
from m2d.serving.problems import Problem, install
from m2d.serving.settings import ServeConfig, ServingLimits

ERRORS = {
    "config": ConfigError("count is 0; it must be at least 1"),
    "data": DataError("no image"),
    "conflict": JobConflict("another order had this key"),
    "jobs": TooManyJobs("20 jobs are not done"),
    "overloaded": Overloaded("256 images wait", retry_after_s=2.4),
    "deadline": DeadlineExceeded("given up after 5 s"),
    "problem": Problem(406, "only one", limit=1),
    "bug": RuntimeError("/home/secret"),
    "checkpoint": CheckpointError("/data/secret is broken"),
}


class Wanted(BaseModel):
    count: int = Field(ge=1, le=16)
    name: str = Field("x", max_length=3)


def app_of(**settings) -> FastAPI:
    config = ServeConfig(checkpoint=["x"], limits=ServingLimits(upload_bytes=1000), **settings)
    app = FastAPI()
    install(app, config)

    @app.get("/fail/{name}")
    async def fail(name: str) -> None:
        raise ERRORS[name]

    @app.post("/wanted")
    async def wanted(body: Wanted, x_level: Annotated[int, Header()] = 0) -> int:
        return body.count

    @app.post("/read")
    async def read(request: Request) -> int:
        return len(await request.body())

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "one\n"
            raise RuntimeError("in the middle")

        return StreamingResponse(pieces())

    return app


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(app_of(), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("name", "status", "title", "wait"),
    [
        ("config", 422, "Unprocessable Entity", None),
        ("data", 422, "Unprocessable Entity", None),
        ("conflict", 409, "Conflict", None),
        ("jobs", 429, "Too Many Requests", "60"),
        ("overloaded", 503, "Service Unavailable", "3"),
        ("deadline", 504, "Gateway Timeout", None),
    ],
)
def test_an_error_becomes_the_problem_that_it_is(client, name, status, title, wait) -> None:
    answer = client.get(f"/fail/{name}")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers.get("Retry-After") == wait
    assert (answer.status_code, answer.json()) == (
        status,
        {
            "type": "about:blank",
            "title": title,
            "status": status,
            "detail": str(ERRORS[name]),
            "instance": f"/fail/{name}",
            "request_id": answer.headers["X-Request-ID"],
        },
    )


def test_a_problem_tells_the_limit(client) -> None:
    assert client.get("/fail/problem").json()["limit"] == 1


@pytest.mark.parametrize(("name", "said"), [("bug", "the service"), ("checkpoint", "the model")])
def test_a_bug_is_told_in_the_log_under_the_requests_id_and_not_to_the_client(client, name, said, caplog) -> None:
    with caplog.at_level(logging.ERROR):
        answer = client.get(f"/fail/{name}", headers={"X-Request-ID": "abc-1"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (500, "application/problem+json")
    assert answer.json()["detail"].startswith(said)
    assert "secret" not in answer.text
    assert [record.message for record in caplog.records] == ["request abc-1 failed"]
    assert "secret" in caplog.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/read", 405)])
def test_what_no_route_takes_is_a_problem_too(client, method, path, status) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert "/docs" in answer.json()["detail"]
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ('{"count": 99}', 422, "count is 99; it should be less than or equal to 16"),
        ('{"count": "many"}', 422, 'count is "many"; it should be a valid integer'),
        ('{"count": 0, "name": "long"}', 422, "count is 0; it should be greater than or equal to 1 (1 more)"),
        ('{"count": 1, "name": "\\ud800\\n\\u0000---"}', 422, "name is "),
        ("{}", 422, "count is missing"),
        ("[", 400, "the body is no JSON"),
    ],
)
def test_a_wrong_value_is_told_in_one_line_with_its_field_and_what_is_allowed(client, body, status, detail) -> None:
    answer = client.post("/wanted", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["detail"].startswith(detail)
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize("sent", ["m2d_abc", "A" * 500])
def test_a_wrong_value_is_not_repeated_where_it_is_a_key_or_a_file(client, sent) -> None:
    answer = client.post("/wanted", json={"count": 1, "name": sent})
    assert answer.status_code == 422
    assert sent not in answer.text


@pytest.mark.parametrize("sent", ["a" * 64, "9f.B_c-0"])
def test_a_clients_request_id_is_kept(client, sent) -> None:
    assert client.get("/nowhere", headers={"X-Request-ID": sent}).headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", ["", "a" * 65, "a b", 'a"}', "../x", "a\nb"])
def test_a_request_id_that_is_odd_is_replaced(client, sent) -> None:
    made = client.get("/nowhere", headers={"X-Request-ID": sent}).headers["X-Request-ID"]
    assert made != sent
    assert made.isalnum()


@pytest.mark.parametrize("path", ["/docs", "/nowhere", "/fail/bug"])
def test_every_answer_has_the_security_headers(client, path) -> None:
    headers = client.get(path).headers
    policy = headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'self'", "object-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Strict-Transport-Security" not in headers


def test_https_alone_is_asked_for_where_there_is_a_certificate() -> None:
    client = TestClient(app_of(tls_cert="c", tls_key="k"), base_url="https://localhost")
    assert "max-age=" in client.get("/nowhere").headers["Strict-Transport-Security"]


def test_a_body_that_says_that_it_is_too_large_is_refused_before_it_is_read() -> None:
    async def never() -> dict[str, object]:
        raise AssertionError("it was read")

    status, document = asyncio.run(raw("/read", [(b"content-length", b"1001")], never))
    assert (status, document["status"], document["limit"]) == (413, 413, 1000)


def test_a_body_that_does_not_say_how_large_it_is_is_refused_once_it_is_too_large() -> None:
    received = []

    async def long() -> dict[str, object]:
        received.append(300)
        return {"type": "http.request", "body": bytes(300), "more_body": len(received) < 100}

    status, document = asyncio.run(raw("/read", [], long))
    assert (status, document["limit"]) == (413, 1000)
    assert sum(received) == 1200


def test_a_body_of_just_the_limit_is_read(client) -> None:
    assert client.post("/read", content=bytes(1000)).json() == 1000


def posted(path: str, headers: list[tuple[bytes, bytes]], method: str = "POST") -> dict:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"localhost:8000"), *headers],
        "server": ("localhost", 8000),
        "client": ("127.0.0.1", 5000),
    }


async def raw(path: str, headers: list[tuple[bytes, bytes]], receive) -> tuple[int, dict]:
    """Of a POST as a server passes it on."""
    sent = []

    async def send(message) -> None:
        sent.append(message)

    await app_of()(posted(path, headers), receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"])
def test_without_keys_this_machines_names_are_answered(client, host) -> None:
    assert client.post("/read", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "10.0.0.5", "[::1", "", "a@localhost.x"],
)
def test_without_keys_another_sites_name_is_refused_that_resolves_to_this_machine(client, host) -> None:
    assert client.get("/nowhere", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1"])
def test_without_keys_a_page_of_another_site_cannot_order(client, origin) -> None:
    assert client.post("/read", headers={"Origin": origin}).status_code == 403


def test_without_keys_the_own_page_may_order(client) -> None:
    assert client.post("/read", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200


def test_cors_is_off(client) -> None:
    headers = client.get("/docs", headers={"Origin": "http://evil.example"}).headers
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_site_that_was_named_may_call_and_read_also_problems() -> None:
    site = "https://lab.example"
    client = TestClient(app_of(cors_origins=[site]), base_url="http://localhost")
    for path, status in [("/read", 200), ("/nowhere", 404)]:
        answer = client.post(path, headers={"Origin": site})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, site)
    asked = {"Origin": site, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert client.options("/read", headers=asked).status_code == 200
    other = client.options("/read", headers={**asked, "Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


def test_the_log_has_a_line_of_json_for_each_request_and_no_query(client, caplog) -> None:
    with caplog.at_level(logging.INFO, "m2d.serving"):
        client.post("/read?key=m2d_secret", headers={"X-Request-ID": "r1", "Authorization": "Bearer m2d_secret"})
    entry = json.loads(caplog.messages[0])
    assert entry.pop("ms") >= 0
    assert entry == {"request_id": "r1", "caller": None, "method": "POST", "path": "/read", "status": 200, "images": 0}
    assert "m2d_secret" not in caplog.text


def test_a_stream_that_fails_breaks_off_and_does_not_look_complete(client, caplog) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):  # the server closes the connection upon it
        client.get("/stream")
    assert "failed" in caplog.text


def test_a_client_that_goes_while_it_sends_is_no_failure(caplog) -> None:
    async def gone() -> dict[str, object]:
        return {"type": "http.disconnect"}

    with caplog.at_level(logging.INFO, "m2d.serving"), pytest.raises(IndexError):  # nothing is sent
        asyncio.run(raw("/read", [], gone))
    assert [json.loads(line)["status"] for line in caplog.messages] == [499]


def test_a_stream_reaches_its_client_piece_by_piece() -> None:
    async def first_piece() -> bytes:
        app = app_of()
        release = asyncio.Event()

        @app.get("/slow")
        async def slow() -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                yield b"one"
                await release.wait()
                yield b"two"

            return StreamingResponse(pieces())

        got: asyncio.Queue[bytes] = asyncio.Queue()

        async def send(message) -> None:
            if message.get("body"):
                got.put_nowait(message["body"])

        async def receive() -> dict[str, object]:
            await release.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(app(posted("/slow", [], "GET"), receive, send))
        first = await asyncio.wait_for(got.get(), 5)
        release.set()
        await task
        return first

    assert asyncio.run(first_piece()) == b"one"
