"""The whole service on Ray Serve, as the manifest for KubeRay has it: on loopback, with the smallest checkpoints.

`serve deploy` starts it, and changes it under load. What a route answers in all its forms is tested without Ray.
"""

import base64
import io
import json
import statistics
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import prometheus_client.parser
import pytest
import ray
import torch
import yaml
from click.testing import CliRunner
from cluster.cluster_files import MANIFESTS
from cluster.job_cluster import await_that
from ray import serve
from ray.serve.scripts import cli
from tiny_checkpoint import make_checkpoint, make_prior, write_checkpoint

from m2d.classes import ISIC7
from tests.serving import conftest
from tests.serving.conftest import free_port, new_key

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

QUEUED = 48  # images that the whole service may have waiting
NDJSON = "application/x-ndjson"
LONG = {"class": "MEL", "count": 16, "steps": 1000, "seed": 3}


@dataclass
class Served:
    """The service and how it is changed."""

    url: str
    key: str
    config: dict[str, Any]  # what `serve deploy` was last given
    dashboard: str
    folder: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=120)

    def images(self, **order: Any) -> dict[str, Any]:
        """The answer to an order, as JSON; it has to be 200."""
        with self.client() as client:
            answer = client.post("/v1/images", json={"class": "MEL", "count": 1, "seed": 0, "steps": 8, **order})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def stats(self) -> dict[str, dict[str, float]]:
        """Of each model in memory, all replicas together where there is one."""
        found: dict[str, dict[str, float]] = serve.get_deployment_handle("Models", "m2d").stats.remote().result()
        return found

    def deploy(self, **application: Any) -> None:
        """`serve deploy` with these members of the application changed; returns once all replicas run."""
        self.config["applications"][0] |= application
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(self.config))
        done = CliRunner().invoke(cli, ["deploy", str(path), "--address", self.dashboard])
        assert done.exit_code == 0, done.output
        time.sleep(1)  # until when the controller says RUNNING of what was there before

        def runs() -> bool:
            found = serve.status().applications.get("m2d")
            assert found is None or found.status != "DEPLOY_FAILED", found
            return found is not None and found.status == "RUNNING"

        await_that(runs, 400, "the application runs")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of experiments: tiny, second and third, whose images differ."""
    root = tmp_path_factory.mktemp("experiments")
    for number, name in enumerate(("tiny", "second", "third")):
        made = replace(make_checkpoint(), prior=make_prior(dict.fromkeys(ISIC7.codes, 40)))
        with torch.no_grad():
            made.denoiser.conditioning.class_embedding.weight.mul_(1 - 0.2 * number)
        write_checkpoint(made, root / name / "checkpoints" / "step_1000")
    return root


@pytest.fixture(scope="module")
def served(ray_cluster: None, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The manifest's own application, its places on this machine."""
    folder = tmp_path_factory.mktemp("served")
    port, keys = free_port(), str(folder / "keys.json")
    config = yaml.safe_load(yaml.safe_load(MANIFESTS[1].read_text())["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {
        "checkpoint": [str(checkpoints / name / "checkpoints/step_1000") for name in ("tiny", "third")],
        "checkpoints_root": str(checkpoints),
        "directory": str(folder / "serving"),
        "keys": keys,
        "replicas": "1",
        "gpus_per_replica": 0,
        "batch_wait_s": 0.3,
        "gates": {"enabled": False},
        "limits": {"queued_images": QUEUED, "steps": 1000},
    }
    key = new_key(Path(keys), "tester", operator=True)
    dashboard = f"http://{ray._private.worker.global_worker.node.webui_url}"
    found = Served(f"http://127.0.0.1:{port}", key, config, dashboard, folder)
    found.deploy()
    yield found
    serve.shutdown()


def pixels(image: dict[str, Any]) -> np.ndarray:
    return conftest.pixels(base64.b64decode(image["b64_png"]))


@contextmanager
def under_load(served: Served, **order: Any) -> Iterator[list[dict[str, Any]]]:
    """Four clients that ask again and again; each has to get all that it asked for. Yields the answers so far."""
    over, answers = threading.Event(), list[dict[str, Any]]()

    def ask() -> None:
        while not over.is_set():
            answers.append(served.images(**order))
            assert len(answers[-1]["images"]) == order["count"]

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(ask) for _ in range(4)]
        try:
            yield answers
        finally:
            over.set()
            failures = [one.exception() for one in asking]
    assert failures == [None] * 4


def test_every_route_answers(served: Served) -> None:
    with served.client() as client:
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v1/service", "/v1/models", "/v1/jobs"):
            assert client.get(path).status_code == 200, path
        order = {"class": "MEL", "count": 2, "seed": 5, "steps": 4}
        archive = client.post("/v1/images", json=order, headers={"Accept": "application/zip"})
        assert sorted(zipfile.ZipFile(io.BytesIO(archive.content)).namelist())[0] == "MEL/MEL_000000.png"
        asked = {"prompt": "melanoma", "n": 1, "seed": 5, "steps": 4}
        assert len(client.post("/v1/images/generations", json=asked).json()["data"]) == 1
        assert client.get("/v1/images").status_code == 405
    assert httpx.get(f"{served.url}/v1/models").status_code == 401


def test_a_job_is_made_beside_the_models_and_is_what_a_request_gets(served: Served) -> None:
    counts = {"MEL": 3, "DF": 2}
    with served.client() as client:
        begun = client.post("/v1/jobs", json={"counts": counts, "seed": 11, "steps": 8})
        assert begun.status_code == 202, begun.text
        place = begun.headers["Location"]
        await_that(lambda: client.get(place).json()["finished"] is not None, 400, "the job ends")
        assert client.get(place).json()["state"] == "succeeded", client.get(place).text
        with tarfile.open(fileobj=io.BytesIO(client.get(f"{place}/archive").content)) as archive:
            members = archive.getnames()
        made = client.get(f"{place}/images/MEL_000002").content
    assert sorted(name for name in members if name.endswith(".png")) == [
        "DF_000000.png", "DF_000001.png", "MEL_000000.png", "MEL_000001.png", "MEL_000002.png",
    ]  # fmt: skip
    (image,) = served.images(first=2, seed=11)["images"]
    assert abs(pixels(image) - conftest.pixels(made)).max() <= 1


def test_events_come_while_images_are_being_made(served: Served) -> None:
    with (
        served.client() as client,
        client.stream(
            "POST", "/v1/images", json=LONG | {"steps": 100, "partial_images": 1}, headers={"Accept": NDJSON}
        ) as answer,
    ):
        came = [(time.monotonic(), json.loads(line)["event"]) for line in answer.iter_lines()]
    names = [name for _, name in came]
    assert (names[0], names[-1]) == ("started", "done")
    assert (names.count("preview"), names.count("image")) == (16, 16)
    first_preview, first_image = (next(at for at, name in came if name == one) for one in ("preview", "image"))
    assert first_image - first_preview > 0.2 * (came[-1][0] - came[0][0])


def test_an_answer_has_one_request_id(served: Served) -> None:
    with served.client() as client:
        kept = client.get("/nowhere", headers={"X-Request-ID": "mine-7"})
        made = client.get("/nowhere")
    assert kept.headers.get_list("X-Request-ID") == ["mine-7"] == [kept.json()["request_id"]]
    assert made.headers.get_list("X-Request-ID") == [made.json()["request_id"]]


def test_requests_that_come_together_share_passes_and_get_the_same_images(served: Served) -> None:
    before = served.stats()["tiny"]["passes"]
    alone = [pixels(served.images(seed=seed)["images"][0]) for seed in range(8)]
    between = served.stats()["tiny"]["passes"]
    assert between - before == 8
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda seed: pixels(served.images(seed=seed)["images"][0]), range(8)))
    assert served.stats()["tiny"]["passes"] - between <= 3
    assert max(abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 1


def test_a_full_service_says_so_and_clients_that_go_make_room(served: Served) -> None:
    with ExitStack() as clients:
        client = clients.enter_context(served.client())
        for _ in range(QUEUED // 16):
            stream = client.stream("POST", "/v1/images", json=LONG, headers={"Accept": NDJSON})
            next(clients.enter_context(closing(clients.enter_context(stream).iter_lines())))
        refused = client.post("/v1/images", json=LONG)
    assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
    assert int(refused.headers["Retry-After"]) >= 1
    await_that(lambda: served.stats()["tiny"]["orders"] == 0, 5, "the replica has no order under way")
    assert served.stats()["tiny"]["waiting"] == 0
    assert len(served.images(count=16)["images"]) == 16


def test_health_is_answered_under_full_load(served: Served) -> None:
    took: list[float] = []
    with under_load(served, count=8, steps=50), httpx.Client(base_url=served.url) as client:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            began = time.monotonic()
            assert client.get("/healthz").status_code == 200
            took.append(time.monotonic() - began)
    p50, p99 = statistics.median(took), statistics.quantiles(took, n=100)[-1]
    print(f"/healthz: {len(took)} answers, p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms")
    assert p50 < 1


def test_the_model_that_was_not_used_for_longest_goes(served: Served) -> None:
    """The manifest's two models in memory; the third to be asked for takes the place of the one before the last."""
    with served.client() as client:
        added = client.post("/v1/models", json={"checkpoint": "second/checkpoints/step_1000"})
        assert added.status_code == 201, added.text
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "third", "second"]
    for model in ("tiny", "second", "third"):
        assert served.images(model=model)["model"]["id"] == model
    assert set(served.stats()) == {"second", "third"}
    served.images(model="tiny")
    assert set(served.stats()) == {"third", "tiny"}


@pytest.mark.parametrize(
    "checkpoint", ["../secrets", "/etc", "outside", "second", "a\0b"], ids=["above", "whole", "link", "none", "NUL"]
)
def test_an_operator_names_checkpoints_below_the_root_alone(
    served: Served, checkpoints: Path, tmp_path: Path, checkpoint: str
) -> None:
    if checkpoint == "outside":
        (checkpoints / "outside").symlink_to(tmp_path)
    with served.client() as client:
        refused = client.post("/v1/models", json={"checkpoint": checkpoint})
    assert refused.status_code == 422
    assert ("below" if checkpoint != "second" else "not a complete checkpoint") in refused.json()["detail"]


def test_a_model_is_replaced_under_load(served: Served) -> None:
    new = {"checkpoint": "second/checkpoints/step_1000", "name": "tiny"}
    old = served.images()["model"]["sha256"]
    with under_load(served, count=2, steps=20) as answers, served.client() as client:
        replaced = client.post("/v1/models", json=new)
        assert replaced.status_code == 201, replaced.text
        sha256 = replaced.json()["sha256"]
        await_that(lambda: answers[-1:] and answers[-1]["model"]["sha256"] == sha256, 200, "the new model answers")
    assert sha256 != old == answers[0]["model"]["sha256"]


def test_prometheus_is_told_of_queues_batches_images_and_seconds(served: Served) -> None:
    served.images()
    wanted = {"waiting_images", "orders", "batch_fill", "gpu_memory_bytes", "images_total", "pass_seconds_total"}
    wanted |= {"request_seconds_count"}

    def told() -> set[str]:
        with served.client() as client:
            text = client.get("/metrics").text
        families = list(prometheus_client.parser.text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families)
        return {sample.name.removeprefix("ray_m2d_") for family in families for sample in family.samples}

    await_that(lambda: wanted <= told(), 200, "the exporter has them, which it asks for every ten seconds")


@pytest.mark.exhaustive
def test_the_service_is_replaced_under_load_with_what_an_operator_has_added(served: Served) -> None:
    with served.client() as client:
        added = client.post("/v1/models", json={"checkpoint": "second/checkpoints/step_1000", "name": "tiny"}).json()
    with under_load(served, count=2, steps=20) as answers, served.client() as client:
        served.deploy(args=served.config["applications"][0]["args"] | {"licence": "of the second kind"})
        at = len(answers)
        await_that(lambda: len(answers) > at + 4, 200, "more answers")
        models = client.get("/v1/models").json()["data"]
    assert {answer["model"]["sha256"] for answer in answers} == {added["sha256"]}
    assert [model["licence"] for model in models if model["id"] == "third"] == ["of the second kind"]


@pytest.mark.exhaustive
def test_replicas_that_come_and_go_lose_no_request(served: Served) -> None:
    def replicas() -> int:
        return serve.status().applications["m2d"].deployments["Models"].replica_states.get("RUNNING", 0)

    with under_load(served, count=8, steps=50) as answers:
        for number in (2, 1):
            served.deploy(deployments=[{"name": "Models", "num_replicas": number}])
            await_that(lambda number=number: replicas() == number, 200, f"{number} replicas")  # type: ignore[misc]
            at = len(answers)
            await_that(lambda at=at: len(answers) > at + 4, 200, "more answers")  # type: ignore[misc]
