"""The HTTP API over the real engine: forms of an answer, streams, OpenAI's shape, limits, and what clients do wrong."""

import asyncio
import base64
import hashlib
import io
import json
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient
from tiny_references import SixFeatures

from m2d.classes import ISIC7, ISIC8, ClassSet
from m2d.errors import ConfigError
from m2d.generation.plan import make_plan, rows_of
from m2d.generation.run import generate
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.serving import drawing
from m2d.serving.access import Caller
from m2d.serving.app import create_app
from m2d.serving.drawing import Desk
from m2d.serving.orders import Drawn
from m2d.serving.requests import ImageRequest, JobRequest, class_in, plan_images, plan_job
from m2d.serving.settings import ServeConfig, ServingLimits
from m2d.serving.uploads import Upload
from tests.serving.conftest import LocalService, new_key, pixels

ORDER = {"class": "MEL", "seed": 7, "steps": 3}


def pngs(answer: Any) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(one["b64_png"]) for one in answer.json()["images"]]


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


def upload(content: bytes) -> Upload:
    return Upload(f"{hashlib.sha256(content).hexdigest()}.jpg", content)


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_over_http_are_the_files_that_generate_writes(
    client: TestClient, checkpoint: Path, tmp_path: Path
) -> None:
    config = GenerateConfig(
        checkpoint=str(checkpoint),
        output=str(tmp_path),
        classes="MEL",
        num_samples=2,
        seed=7,
        steps=3,
        device="cpu",
        mixed_precision="no",
        num_actors=0,
        gates=GateConfig(enabled=False),
    )
    generate(config)
    written = [(tmp_path / "MEL" / f"MEL_00000{number}.png").read_bytes() for number in range(2)]
    assert pngs(client.post("/v1/images", json={**ORDER, "count": 2})) == written

    archive = client.post("/v1/images", json={**ORDER, "count": 2}, headers={"Accept": "application/zip"})
    with zipfile.ZipFile(io.BytesIO(archive.content)) as file:
        assert sorted(file.namelist()) == ["MEL/MEL_000000.png", "MEL/MEL_000001.png", "manifest.parquet"]
        assert [file.read(f"MEL/MEL_00000{number}.png") for number in range(2)] == written
        told = pq.read_table(io.BytesIO(file.read("manifest.parquet")))
    manifest = pq.read_table(tmp_path / "manifest.parquet")
    assert told.schema.equals(manifest.schema, check_metadata=True)
    assert told.drop_columns("created").equals(manifest.drop_columns("created"))


def test_json_says_what_the_images_are(client: TestClient, service: Any) -> None:
    answer = client.post("/v1/images", json={**ORDER, "class": "黑色素瘤", "count": 2, "first": 3}).json()
    card = service.engine.card
    assert answer["model"] == {"id": "tiny", "sha256": card.sha256, "step": 1000}
    assert (answer["synthetic"], answer["seed"], answer["refused"]) == (True, 7, [])
    assert answer["gates"] == {"at_work": [], "near_copy": False}
    assert [(one["index"], one["id"], one["class"]) for one in answer["images"]] == [
        (0, "MEL_000003", "MEL"),
        (1, "MEL_000004", "MEL"),
    ]
    image = answer["images"][0]
    text = Image.open(io.BytesIO(base64.b64decode(image["b64_png"]))).info
    assert (text["synthetic"], text["class"], text["checkpoint"]) == ("true", "MEL", card.sha256)
    assert text["seed"] == str(image["seed"]) == str(image["manifest"]["seed"])


def test_a_seed_is_drawn_and_told_where_none_is_sent(client: TestClient) -> None:
    order = {"class": "MEL", "steps": 1}
    first, other = (client.post("/v1/images", json=order).json() for _ in range(2))
    assert first["seed"] != other["seed"]
    again = client.post("/v1/images", json={**order, "seed": first["seed"]}).json()
    assert again["images"][0]["b64_png"] == first["images"][0]["b64_png"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("application/json;q=0.5, application/zip", "application/zip"),
        ("application/json;q=0, application/x-ndjson;q=0.1", "application/x-ndjson"),
        ("text/event-stream", "text/event-stream; charset=utf-8"),
        ("text/html", 406),
    ],
)
def test_accept_decides_the_form(client: TestClient, accept: str | None, kind: str | int) -> None:
    headers = {} if accept is None else {"Accept": accept}
    answer = client.post("/v1/images", json=ORDER, headers=headers)
    assert kind in (answer.headers["content-type"], answer.status_code)
    assert answer.headers["cache-control"] == "no-store"


def test_one_png_is_not_for_two_images(client: TestClient) -> None:
    answer = client.post("/v1/images", json={**ORDER, "count": 2}, headers={"Accept": "image/png"})
    assert answer.status_code == 406
    assert "2 are asked for" in answer.json()["detail"]


def test_image_to_image_takes_its_reference_in_either_form(client: TestClient) -> None:
    content = jpeg()
    order = {**ORDER, "mode": "image2image", "strength": 0.5, "feature": "none"}
    as_json = client.post("/v1/images", json={**order, "reference": base64.b64encode(content).decode()})
    as_form = client.post("/v1/images", data={"request": json.dumps(order)}, files={"reference": ("x/y.jpg", content)})
    assert pngs(as_json) == pngs(as_form)
    row = as_json.json()["images"][0]["manifest"]
    assert (row["mode"], row["reference"]) == ("image2image", upload(content).name)


def test_a_walk_goes_from_one_uploaded_image_to_the_other(
    config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2d.serving.engine.load_reference_extractor", lambda *_: SixFeatures().eval())
    walking = LocalService(replace(config, directory=str(tmp_path)))
    walking.engine.card = replace(walking.engine.card, has_extractor=True)
    order, ends = {**ORDER, "mode": "interpolate", "steps_between": 1}, (jpeg(0), jpeg(1))
    files = {"reference": ("a.jpg", ends[0]), "reference_b": ("b.jpg", ends[1])}
    with TestClient(create_app(walking, config), base_url="http://localhost") as client:
        answer = client.post("/v1/images", data={"request": json.dumps(order)}, files=files)
    walking.close()
    assert len(set(pngs(answer))) == 3
    rows = [image["manifest"] for image in answer.json()["images"]]
    assert [(row["id"], row["position"]) for row in rows] == [
        ("MEL_pair000_00", 0.0), ("MEL_pair000_01", 0.5), ("MEL_pair000_02", 1.0)
    ]  # fmt: skip
    assert {(row["reference"], row["reference_b"]) for row in rows} == {tuple(upload(end).name for end in ends)}


def test_concurrent_requests_share_passes_and_get_the_same_pixels(url: str, service: Any) -> None:
    orders = [{**ORDER, "class": code, "seed": number, "steps": 8} for number, code in enumerate([*ISIC7.codes, "DF"])]

    before = service.engine.passes
    with httpx.Client(base_url=url, timeout=60) as asking, ThreadPoolExecutor(8) as pool:

        def ask(order: dict[str, Any]) -> np.ndarray:
            (png,) = pngs(asking.post("/v1/images", json=order))
            return pixels(png)

        alone = [ask(order) for order in orders]
        between = service.engine.passes
        together = list(pool.map(ask, orders))
    assert between - before == 8
    assert service.engine.passes - between < 8
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1


# --- streams ----------------------------------------------------------------------------------------------------------


def events(answer: Any) -> list[tuple[str, dict[str, Any]]]:
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("application/x-ndjson"):
        lines = [json.loads(line) for line in answer.text.splitlines()]
        return [(line.pop("event"), line) for line in lines]
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks if "event" in block]


@pytest.mark.parametrize("form", ["text/event-stream", "application/x-ndjson"])
@pytest.mark.parametrize("previews", [0, 1, 3])
def test_a_stream_tells_every_event_in_order(client: TestClient, form: str, previews: int) -> None:
    order = {**ORDER, "count": 3, "steps": 8, "partial_images": previews}
    told = events(client.post("/v1/images", json=order, headers={"Accept": form}))
    names = [name for name, _ in told]
    assert (names[0], names[-1]) == ("started", "done")
    counted = Counter(names)
    assert (counted["image"], counted["preview"], counted["refused"]) == (3, 3 * previews, 0)
    assert told[0][1].keys() == {"id", "seed", "model", "total"}
    assert told[-1][1] == {
        "id": told[0][1]["id"],
        "images": 3,
        "refused": 0,
        "gates": {"at_work": [], "near_copy": False},
    }
    done = [content["done"] for name, content in told if name == "progress"]
    assert done == sorted(done)
    assert done[-1] == 3 * 8
    for place in range(3):
        mine = [(name, one) for name, one in told if one.get("index") == place]
        assert [name for name, _ in mine] == ["preview"] * previews + ["image"]
        assert [one["number"] for name, one in mine if name == "preview"] == list(range(previews))
        assert all(base64.b64decode(one["b64_png"]).startswith(b"\x89PNG") for _, one in mine)
    as_json = client.post("/v1/images", json=order).json()
    assert sorted((one["id"], one["b64_png"]) for name, one in told if name == "image") == [
        (one["id"], one["b64_png"]) for one in as_json["images"]
    ]


def test_a_silent_stream_is_kept_alive(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "HEARTBEAT_S", 0.001)
    order = {**ORDER, "steps": 20}
    told = client.post("/v1/images", json=order, headers={"Accept": "text/event-stream"})
    assert "\n\n: at work\n\n" in told.text
    lines = events(client.post("/v1/images", json=order, headers={"Accept": "application/x-ndjson"}))
    assert {name for name, _ in lines} == {"started", "progress", "image", "done"}


def test_a_client_that_does_not_read_gets_its_images_and_no_more_than_fits(app: FastAPI, service: Any) -> None:
    async def read_late() -> list[Any]:
        desk: Desk = app.state.desk
        asked = {"class": "DF", "count": 3, "steps": 70, "guidance_scale": 1.0, "partial_images": 3}
        request = ImageRequest.model_validate(asked)
        order = plan_images(request, service.engine.card, {}, ServingLimits(), "late")
        async with desk.take(order, Caller("local", is_operator=True)) as drawn:
            while desk.images:
                await asyncio.sleep(0.02)
            return [event async for event in drawn.events()]

    found = asyncio.run(read_late())
    assert sum(isinstance(event, Drawn) for event in found) == 3
    assert len(found) <= 64


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_a_client_that_goes_away_gives_its_images_up(url: str, app: FastAPI, service: Any, accept: str) -> None:
    order, headers = {**ORDER, "count": 16, "steps": 100, "solver": "heun"}, {"Accept": accept}
    passes = service.engine.images
    with suppress(httpx.ReadTimeout), httpx.stream("POST", f"{url}/v1/images", json=order, headers=headers, timeout=1):
        until(lambda: service.engine.stats()["orders"] == 1)
    until(lambda: service.engine.stats()["orders"] == 0)
    until(lambda: app.state.desk.images == 0)
    assert service.engine.images == passes
    assert pngs(httpx.post(f"{url}/v1/images", json=ORDER, timeout=60))


# --- what cannot be had -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"class": None}, 422, "class is null"),
        ({"class": "wart"}, 422, "choose one of AKIEC BCC BKL DF MEL NV VASC"),
        ({"kind": "MEL"}, 422, "kind is not known"),
        ({"count": 17}, 422, "the limit is 16"),
        ({"count": 0}, 422, "count is 0"),
        ({"count": "1"}, 422, 'count is "1"'),
        ({"first": 100_000}, 422, "the limit is 100000"),
        ({"steps": 101}, 422, "the limit is 100"),
        ({"deadline_s": 601}, 422, "the limit is 600"),
        ({"seed": -1}, 422, "seed is -1"),
        ({"seed": 2**64}, 422, "seed is 18446744073709551616"),
        ({"solver": "ddim"}, 422, "solver is"),
        ({"guidance_interval": [0.8, 0.2]}, 422, "low <= high"),
        ({"partial_images": 4}, 422, "partial_images is 4"),
        ({"feature": "reference"}, 422, "needs an image to take it from"),
        ({"feature": "none", "feature_temperature": 0.5}, 422, "no feature is drawn"),
        ({"mode": "image2image"}, 422, "reference: mode image2image needs an image there"),
        ({"mode": "interpolate", "steps_between": 15}, 422, "the limit is 16"),
        ({"reference": base64.b64encode(jpeg()).decode()}, 422, "mode standard takes none"),
        ({"mode": "image2image", "reference": base64.b64encode(jpeg()).decode()}, 422, "the extractor of tiny"),
        ({"model": "other"}, 404, "there are tiny"),
        ({"model": "0" * 64}, 404, "there are tiny"),
    ],
)
def test_a_value_that_cannot_be_had_is_named(
    client: TestClient, change: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("/v1/images", json=ORDER | change)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_a_model_answers_to_its_name_and_to_the_beginning_of_its_hash(client: TestClient, service: Any) -> None:
    for name in ("tiny", service.engine.card.sha256[:8], service.engine.card.sha256):
        assert client.post("/v1/images", json={**ORDER, "steps": 1, "model": name}).status_code == 200


def test_a_deadline_that_passes_is_a_504_or_ends_the_stream(
    client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {**ORDER, "count": 16, "steps": 100, "deadline_s": 0.01}
    stream = {"Accept": "text/event-stream"}
    for headers in ({}, stream):
        answer = client.post("/v1/images", json=order, headers=headers)
        assert (answer.status_code, answer.json()["status"]) == (504, 504)
    monkeypatch.setattr(drawing, "_AT_ONCE_S", 0)  # the stream has begun
    name, last = events(client.post("/v1/images", json=order, headers=stream))[-1]
    assert (name, last["status"], last["instance"]) == ("error", 504, "/v1/images")
    assert app.state.desk.images == 0


@pytest.fixture
def strict(service: Any, config: ServeConfig) -> Iterator[TestClient]:
    """A service that lets three images wait."""
    app = create_app(service, replace(config, limits=ServingLimits(queued_images=3)))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def test_more_than_may_wait_is_a_503_that_says_when_to_ask_again(strict: TestClient) -> None:
    for _ in range(2):  # what was refused, and what was made, waits no more
        answer = strict.post("/v1/images", json={**ORDER, "count": 4})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert len(pngs(strict.post("/v1/images", json={**ORDER, "count": 3}))) == 3


def test_images_that_the_gates_refuse_are_told(config: ServeConfig, tmp_path: Path) -> None:
    gates = GateConfig(min_contrast=127.5, max_attempts=2)  # no image has so much
    strict = replace(config, gates=gates, directory=str(tmp_path))
    with (
        closing(LocalService(strict)) as service,
        TestClient(create_app(service, strict), base_url="http://localhost") as client,
    ):
        answer = client.post("/v1/images", json={**ORDER, "count": 2}).json()
        assert answer["images"] == []
        assert answer["refused"] == [{"index": place, "reason": "blank", "attempts": 2} for place in range(2)]
        assert answer["gates"] == {"at_work": ["blank"], "near_copy": False}
        told = events(client.post("/v1/images", json=ORDER, headers={"Accept": "text/event-stream"}))
        assert told[-2] == ("refused", {"index": 0, "reason": "blank", "attempts": 2})
        assert (told[-1][1]["images"], told[-1][1]["refused"]) == (0, 1)
        for headers, path in (({"Accept": "image/png"}, "/v1/images"), ({}, "/v1/images/generations")):
            wanted = ORDER if path == "/v1/images" else {"prompt": "MEL", "steps": 2}
            alone = client.post(path, json=wanted, headers=headers)
            assert (alone.status_code, "2 times (blank)" in alone.text) == (422, True)


def test_wrong_methods_and_unknown_paths_are_problems(client: TestClient) -> None:
    for method, path, status in (
        ("GET", "/v1/images", 405),
        ("POST", "/healthz", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/nothing.js", 404),
        ("GET", "/..%2fapp.py", 404),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


# --- OpenAI's shape ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_openais_client_makes_images(openai_client: openai.OpenAI, client: TestClient) -> None:
    answer = openai_client.images.generate(
        model="tiny",
        prompt="A dermoscopic image of melanoma.",
        n=2,
        size="16x16",
        response_format="b64_json",
        quality="high",
        user="somebody",
        extra_body={"seed": 7, "steps": 3},
    )
    same = pngs(client.post("/v1/images", json={**ORDER, "count": 2}))
    assert [base64.b64decode(image.b64_json or "") for image in answer.data or []] == same
    assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_openais_client_streams_images(openai_client: openai.OpenAI) -> None:
    settings = {"seed": 7, "steps": 8}
    stream = openai_client.images.generate(prompt="MEL", stream=True, partial_images=2, extra_body=settings)
    told = list(stream)
    assert [event.type for event in told] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [event.partial_image_index for event in told[:2]] == [0, 1]
    whole = openai_client.images.generate(prompt="MEL", extra_body=settings)
    assert told[-1].b64_json == (whole.data or [])[0].b64_json


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"prompt": "a cat"}, openai.UnprocessableEntityError, "names no class"),
        ({"prompt": "MEL", "size": "1024x1024"}, openai.UnprocessableEntityError, "makes 16x16"),
        ({"prompt": "MEL", "response_format": "url"}, openai.UnprocessableEntityError, "response_format is"),
        ({"prompt": "MEL", "background": "transparent"}, openai.UnprocessableEntityError, "background is"),
        ({"prompt": "MEL", "output_format": "webp"}, openai.UnprocessableEntityError, "output_format is"),
        ({"prompt": "MEL", "n": 17}, openai.UnprocessableEntityError, "the limit is 16"),
        ({"prompt": "MEL", "model": "gpt-image-2"}, openai.NotFoundError, "there are tiny"),
    ],
)
def test_openais_client_says_what_is_wrong(
    openai_client: openai.OpenAI, asked: dict[str, Any], kind: type[openai.APIStatusError], said: str
) -> None:
    with pytest.raises(kind) as error:
        openai_client.images.generate(**asked)
    assert said in error.value.message
    assert said in error.value.body["message"]  # type: ignore[index]


def test_openais_client_says_what_broke_a_stream(
    service: Any, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_AT_ONCE_S", 0)
    app = create_app(service, replace(config, limits=ServingLimits(deadline_s=0.01)))
    with TestClient(app) as client:
        asking = openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=client)
        stream = asking.images.generate(prompt="MEL", n=16, stream=True, extra_body={"steps": 100})
        with pytest.raises(openai.APIError, match="deadline"):
            list(stream)


@pytest.mark.parametrize(
    ("prompt", "classes", "code"),
    [
        ("MEL", ISIC7, "MEL"),
        ("Basal cell carcinoma", ISIC7, "BCC"),
        ("一张黑色素瘤的皮肤镜图像", ISIC7, "MEL"),
        ("a dermoscopic image of melanoma", ISIC7, "MEL"),
        ("two nevi, please: melanocytic nevi!", ISIC7, "NV"),
        ("a squamous-cell carcinoma", ISIC8, "SCC"),
        ("photo of a squamous cell carcinoma in situ", ISIC8, "AKIEC"),
        ("鳞状细胞癌", ISIC8, "SCC"),
    ],
)
def test_a_prompt_names_its_class(prompt: str, classes: ClassSet, code: str) -> None:
    assert class_in(prompt, classes) == code


@pytest.mark.parametrize("prompt", ["a melanoma beside a nevus", "黑色素瘤和血管病变", "a lesion", "!"])
def test_a_prompt_of_two_classes_or_none_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="MEL"):
        class_in(prompt, ISIC7)


# --- models and the service -------------------------------------------------------------------------------------------


def test_models_are_told_without_their_places(client: TestClient, service: Any, checkpoint: Path) -> None:
    answer = client.get("/v1/models")
    (model,) = answer.json()["data"]
    assert (model["id"], model["object"], model["default"], model["image_size"]) == ("tiny", "model", True, 16)
    assert model["sha256"] == service.engine.card.sha256
    assert [one["code"] for one in model["classes"]] == list(ISIC7.codes)
    assert model["modes"] == ["standard", "image2image"]  # no extractor guided it
    assert str(checkpoint.parent) not in answer.text


def test_the_service_tells_its_limits_and_defaults(client: TestClient) -> None:
    about = client.get("/v1/service").json()
    assert about["limits"]["images"] == 16
    assert about["defaults"]["guidance_interval"] == [0.0, 0.8]
    assert about["solvers"] == ["euler", "heun", "dpmpp", "unipc"]
    assert about["keys_required"] is False
    assert about["notice"].keys() == {"en", "zh"}


def test_health_readiness_and_metrics(client: TestClient, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(service, "ready", False)
    waiting = client.get("/readyz")
    assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "5")
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "m2d_passes" in metrics.text


def test_the_page_is_served_with_types_that_browsers_take(client: TestClient) -> None:
    assert "<html" in client.get("/").text
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        assert client.get(f"/{name}").headers["content-type"].startswith(kind)


def test_the_documents_need_no_other_host(client: TestClient) -> None:
    docs = client.get("/docs").text
    assert "POST /v1/images" in docs
    assert "ImageRequest" in docs
    assert "://" not in docs
    document = client.get("/openapi.json").json()
    assert document["components"]["schemas"]["ImageRequest"]["properties"]["count"]["maximum"] == 16
    assert {"400", "401", "406", "413", "415", "422", "429", "503", "504"} <= document["paths"]["/v1/images"]["post"][
        "responses"
    ].keys()


@pytest.fixture
def keyed(
    service: Any, config: ServeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TestClient, dict[str, dict[str, str]]]]:
    """A service with keys, and the headers of a user and an operator."""
    file = tmp_path / "keys.json"
    keys = {name: new_key(file, name, operator=name == "operator") for name in ("user", "operator")}
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    root = str(Path(config.checkpoint[0]).parent)
    keyed_config = replace(config, keys=str(file), directory=str(tmp_path), checkpoints_root=root)
    monkeypatch.setattr(service, "config", keyed_config)
    with TestClient(create_app(service, keyed_config), base_url="http://localhost") as client:
        yield client, headers


def test_keys_are_asked_for_where_there_are_some(keyed: tuple[TestClient, dict[str, dict[str, str]]]) -> None:
    client, headers = keyed
    for method, path in (("POST", "/v1/images"), ("POST", "/v1/images/generations"), ("GET", "/v1/models")):
        assert client.request(method, path, json=ORDER).status_code == 401
    assert client.get("/metrics").status_code == 401
    refused = client.post("/v1/images/generations", json={"prompt": "MEL"}).json()
    assert refused["error"]["message"] == refused["detail"]
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v1/service"):
        assert client.get(path).status_code == 200
    assert client.post("/v1/images", json=ORDER, headers=headers["user"]).status_code == 200


def test_operators_alone_add_models(
    keyed: tuple[TestClient, dict[str, dict[str, str]]], service: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, headers = keyed
    monkeypatch.setattr(service, "engines", dict(service.engines))
    wanted = {"checkpoint": checkpoint.name, "name": "second"}
    assert client.post("/v1/models", json=wanted, headers=headers["user"]).status_code == 403
    broken = client.post("/v1/models", json={"checkpoint": "nothing"}, headers=headers["operator"])
    assert broken.status_code == 422
    added = client.post("/v1/models", json=wanted, headers=headers["operator"])
    assert (added.status_code, added.json()["id"], added.json()["default"]) == (201, "second", False)
    told = client.get("/v1/models", headers=headers["user"]).json()["data"]
    assert [(model["id"], model["default"]) for model in told] == [("tiny", True), ("second", False)]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["standard", "image2image", "interpolate"])
def test_rows_are_those_that_generate_plans(mode: str, service: Any, tmp_path: Path) -> None:
    card = replace(service.engine.card, has_extractor=True)
    settings: dict[str, Any] = {"mode": mode, "seed": 5, "steps": 9, "steps_between": 2}
    uploads = {}
    for field, folder in (("reference", "a"), ("reference_b", "b")):
        content = jpeg(len(uploads))
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.jpg").write_bytes(content)
        uploads[field] = [upload(content)]
    own: dict[str, Any] = {}
    if mode == "image2image":
        own, uploads = {"init_images": str(tmp_path / "a"), "strength": 0.4}, {"reference": uploads["reference"]}
    elif mode == "interpolate":
        own = {"reference_images": str(tmp_path / "a"), "reference_images_b": str(tmp_path / "b")}
    else:
        uploads = {}
    config = GenerateConfig(checkpoint="x", classes="MEL", num_samples=4, **settings, **own)
    planned = make_plan(config, "prior" if mode == "standard" else "reference", None, ISIC7)
    asked = {"class": "melanoma", "count": 4, **settings, "strength": 0.4}  # of the others it is nothing
    order = plan_images(ImageRequest.model_validate(asked), card, uploads, ServingLimits(), "x")
    bare = {"reference": None, "reference_b": None}
    assert [replace(row, **bare) for row in order.rows] == [replace(row, **bare) for row in rows_of(planned.table)]
    assert order.plan == planned.digest
    assert set(order.uploads) == {name for row in order.rows for name in (row.reference, row.reference_b) if name}


def test_a_jobs_rows_fill_up_what_there_is(service: Any) -> None:
    asked = {"balance": {"have": {"nevus": 5, "DF": 2, "MEL": 4}, "to": "max"}, "steps": 9}
    job = plan_job(JobRequest.model_validate(asked), service.engine.card, {}, ServingLimits())
    assert Counter(row.label for row in job.rows) == {"DF": 3, "MEL": 1}
    assert job.request == asked
    asked = {"counts": {"MEL": 2, "皮肤纤维瘤": 1}, "seed": 3}
    job = plan_job(JobRequest.model_validate(asked), service.engine.card, {}, ServingLimits())
    config = GenerateConfig(checkpoint="x", classes="MEL,DF", num_samples=2, seed=3)
    of_generate = rows_of(make_plan(config, "prior", None, ISIC7).table)
    assert set(job.rows) == {row for row in of_generate if row.id != "DF_000001"}


def test_a_job_from_references_is_of_one_class(service: Any) -> None:
    card = replace(service.engine.card, has_extractor=True)
    files = [upload(jpeg(number)) for number in range(3)]
    varied = {"mode": "image2image", "counts": {"DF": 5}}
    job = plan_job(JobRequest.model_validate(varied), card, {"references": files}, ServingLimits())
    assert [row.reference for row in job.rows] == [files[number % 3].name for number in range(5)]
    walks = {"mode": "interpolate", "class": "DF", "steps_between": 1}
    both = {"references": files, "references_b": files[:1]}
    job = plan_job(JobRequest.model_validate(walks), card, both, ServingLimits())
    assert [row.id for row in job.rows[:4]] == ["DF_pair000_00", "DF_pair000_01", "DF_pair000_02", "DF_pair001_00"]
    assert len(job.rows) == 9


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "counts: give"),
        ({"counts": {"DF": 1}, "balance": {"have": {"DF": 1}}}, "counts: give"),
        ({"counts": {"DF": 0}}, "nothing to make"),
        ({"counts": {}}, "nothing to make"),
        ({"counts": {"DF": 1, "dermatofibroma": 2}}, "DF is there twice"),
        ({"balance": {"have": {"DF": 5}, "to": "2.5"}}, "to is 2.5"),
        ({"mode": "image2image", "counts": {"DF": 1}}, "references: mode image2image needs an image"),
        ({"mode": "image2image", "counts": {"DF": 1, "NV": 1}}, "of one class"),
        ({"mode": "interpolate", "counts": {"DF": 1}}, "needs the class of its references"),
    ],
)
def test_a_job_that_cannot_be_planned_is_refused_in_one_line(service: Any, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_job(JobRequest.model_validate(asked), service.engine.card, {}, ServingLimits())
