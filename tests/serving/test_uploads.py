"""Orders with images: what is read, what is refused and by which status."""

import base64
import hashlib
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from PIL import Image
from starlette.formparsers import MultiPartParser
from starlette.testclient import TestClient

from m2d.serving import uploads
from m2d.serving.problems import install
from m2d.serving.settings import ServeConfig, ServingLimits

PIXELS = 10_000


def picture(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PNG = picture("PNG")


@pytest.fixture(scope="module")
def client() -> TestClient:
    config = ServeConfig(checkpoint=["x"], limits=ServingLimits(upload_bytes=2**20, upload_pixels=PIXELS))
    app = FastAPI()
    install(app, config)

    @app.post("/order")
    async def order(request: Request) -> dict[str, Any]:
        order, files = await uploads.read_order(request, config.limits)
        sums = {
            field: [[upload.name, hashlib.sha256(upload.content).hexdigest()] for upload in each]
            for field, each in files.items()
        }
        return {"order": order, "files": sums}

    return TestClient(app, base_url="http://localhost")


def sent(client: TestClient, body: str | bytes) -> httpx.Response:
    return client.post("/order", content=body, headers={"Content-Type": "application/json"})


def named(content: bytes, suffix: str) -> list[str]:
    digest = hashlib.sha256(content).hexdigest()
    return [f"{digest}{suffix}", digest]


def test_json_without_images_is_the_order(client) -> None:
    assert sent(client, '{"class": "黑色素瘤", "steps": 3}').json() == {
        "order": {"class": "黑色素瘤", "steps": 3},
        "files": {},
    }


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_json_may_hold_images_in_base64(client, prefix) -> None:
    text = prefix + base64.b64encode(PNG).decode()
    answer = sent(client, json.dumps({"class": "NV", "reference": text, "reference_b": [text, text]}))
    one = named(PNG, ".png")
    assert answer.json() == {"order": {"class": "NV"}, "files": {"reference": [one], "reference_b": [one, one]}}


def test_base64_is_whole_across_the_pieces_in_which_it_is_decoded(client, monkeypatch) -> None:
    monkeypatch.setattr(uploads, "_BASE64_PIECE", 64)
    answer = sent(client, json.dumps({"reference": base64.b64encode(PNG).decode()}))
    assert answer.json()["files"] == {"reference": [named(PNG, ".png")]}
    padded_at_its_piece = base64.b64encode(PNG[:46]) + base64.b64encode(PNG[46:])
    assert sent(client, json.dumps({"reference": padded_at_its_piece.decode()})).status_code == 422


def test_a_reference_that_is_null_is_none(client) -> None:
    assert sent(client, '{"reference": null}').json() == {"order": {}, "files": {}}


@pytest.mark.parametrize(
    ("kind", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png"), ("BMP", ".bmp"), ("TIFF", ".tif"), ("WEBP", ".webp")]
)
def test_a_form_may_hold_files_which_are_named_by_what_they_are(client, kind, suffix) -> None:
    content = picture(kind)
    files = [("reference", ("../../etc/passwd.gif", content, "image/gif"))]
    answer = client.post("/order", data={"request": '{"class": "NV"}'}, files=files)
    assert answer.json() == {"order": {"class": "NV"}, "files": {"reference": [named(content, suffix)]}}


def test_the_order_of_a_form_may_be_a_file_too(client) -> None:
    files = [("request", ("order.json", b'{"class": "NV"}', "application/json"))]
    assert client.post("/order", files=files).json()["order"] == {"class": "NV"}


def test_a_field_keeps_the_order_of_its_files(client) -> None:
    contents = [picture("PNG", (8 + n, 8)) for n in range(4)]
    files = [("references", (f"{n}.png", content)) for n, content in enumerate(contents)]
    answer = client.post("/order", data={"request": "{}"}, files=files)
    assert answer.json()["files"] == {"references": [named(content, ".png") for content in contents]}


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("", "cannot be used as JSON"),
        ("[]", "an object"),
        ("{", "cannot be used as JSON"),
        (b'{"class": "\xff"}', "can't decode byte"),
        ('{"seed": 1, "seed": 2}', '"seed" is there twice'),
        ('{"have": {"NV": 1, "NV": 2}}', '"NV" is there twice'),
        ('{"strength": NaN}', "NaN is no JSON number"),
        ('{"strength": -Infinity}', "-Infinity is no JSON number"),
        ('{"strength": 1e999}', "too large"),
        ('{"seed": ' + "9" * 5000 + "}", "cannot be used as JSON"),
        ('{"class": "\\ud800"}', "surrogates"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "too deep"),
    ],
)
def test_json_that_is_malformed_or_means_two_things_is_refused(client, body, detail) -> None:
    answer = sent(client, body)
    assert (answer.status_code, detail in answer.json()["detail"]) == (400, True)
    assert len(answer.json()["detail"]) < 200


@pytest.mark.parametrize("body", ['{"a": [' + "1," * 10_001 + "1]}", '{"a": "' + "x" * 2**19 + '"}'])
def test_an_order_that_is_large_without_its_images_is_refused(client, body) -> None:
    assert sent(client, body).status_code == 413


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_another_type_of_body_is_refused(client, kind) -> None:
    assert client.post("/order", content="{}", headers={"Content-Type": kind}).status_code == 415


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (picture("GIF"), 415, "GIF"),
        (b"%PDF-1.7", 415, "PDF"),
        (b"hello", 415, "no image"),
        (b"", 422, "empty"),
        (PNG[:-40], 422, "PNG"),
        (picture("JPEG")[:300], 422, "JPEG"),
        (picture("PNG", (101, 100)), 413, "101 x 100"),
        (picture("PNG", (7, 100)), 422, "too small"),
    ],
)
def test_an_image_that_training_would_not_take_is_refused_with_the_reason(client, content, status, detail) -> None:
    as_file = client.post("/order", data={"request": "{}"}, files=[("reference", ("a.png", content))])
    as_text = sent(client, json.dumps({"reference": base64.b64encode(content).decode()}))
    for answer in (as_file, as_text):
        assert (answer.status_code, answer.json()["detail"].startswith("reference: ")) == (status, True)
        assert detail in answer.json()["detail"]


def test_the_pixels_of_all_images_together_count(client) -> None:
    half = base64.b64encode(picture("PNG", (100, 51))).decode()
    statuses = [sent(client, json.dumps({"references": [half] * n})).status_code for n in (1, 2)]
    assert statuses == [200, 413]


@pytest.mark.parametrize(
    "text", ["a", "AAA", "AA==AAAA", "AA AA", "AAAA\n", "é===", "data:image/png,AAAA", 5, {"a": 1}]
)
def test_base64_is_read_strictly(client, text) -> None:
    answer = sent(client, json.dumps({"reference": text}))
    assert (answer.status_code, "reference" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("data", "files", "status"),
    [
        ({}, [("reference", ("a.png", PNG))], 422),  # no order
        ({"request": "{}"}, [("other", ("a.png", PNG))], 422),
        ({"request": "{}", "other": "x"}, [("reference", ("a.png", PNG))], 422),
        ({"request": '{"reference": "AAAA"}'}, [("reference", ("a.png", PNG))], 422),
        ({"request": "{"}, [("reference", ("a.png", PNG))], 400),
        ({"request": "{}"}, [("request", ("a.json", b"{}"))], 422),
        ({"request": '{"a": "' + "x" * 2**18 + '"}'}, [("reference", ("a.png", PNG))], 400),
        ({"request": "{}"}, [("reference", ("a.png", PNG))] * 257, 400),
    ],
)
def test_a_form_with_other_parts_than_an_order_and_its_images_is_refused(client, data, files, status) -> None:
    answer = client.post("/order", data=data, files=files)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")


def test_no_file_of_a_form_is_written_to_the_disk(client, monkeypatch) -> None:
    rolled = []
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", lambda file: rolled.append(file))
    content = picture("BMP", (100, 100)) + bytes(900_000)
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 1000)
    answer = client.post("/order", data={"request": "{}"}, files=[("reference", ("a.bmp", content))])
    assert (answer.status_code, rolled) == (200, [])


def test_a_path_in_place_of_a_file_is_told_how_to_send_the_file(client: TestClient) -> None:
    answer = client.post("/order", files={"request": (None, "{}"), "reference": (None, "image.png")})
    assert (answer.status_code, "reference=@FILE" in answer.json()["detail"]) == (422, True)
