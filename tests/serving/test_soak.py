"""The service for as long as it takes to see what it does not give back."""

import gc
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from fastapi import FastAPI
from PIL import Image

from m2d.serving.drawing import Drawing
from m2d.serving.orders import Order

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]


@dataclass
class Held:
    """By this process, in which the engine, the HTTP side and the clients are."""

    bytes: int  # of its own
    files: int
    threads: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        process = psutil.Process()
        return cls(process.memory_full_info().uss, process.num_fds(), process.num_threads())


def ask(client: httpx.Client, number: int, reference: bytes) -> None:
    """One small request; seven kinds take turns, of which the last goes before its answer is whole."""
    order: dict[str, Any] = {"class": "MEL", "seed": number, "steps": 1}
    varied = {**order, "mode": "image2image", "feature": "none"}
    accepted = {1: "image/png", 2: "application/zip", 3: "text/event-stream"}.get(number % 7, "application/json")
    match number % 7:
        case 4:
            answer = client.post("/v1/images/generations", json={"prompt": "MEL", "seed": number, "steps": 1})
        case 5:
            answer = client.post(
                "/v1/images", data={"request": json.dumps(varied)}, files={"reference": ("a.png", reference)}
            )
        case 6:
            long = {**order, "count": 4, "steps": 100}
            with client.stream("POST", "/v1/images", json=long, headers={"Accept": "application/x-ndjson"}) as stream:
                next(stream.iter_lines())
            return
        case _:
            answer = client.post("/v1/images", json={**order, "partial_images": 1}, headers={"Accept": accepted})
    assert answer.status_code == 200, answer.text


def test_three_hundred_small_requests_leave_memory_files_and_threads_as_they_were(
    app: FastAPI, url: str, service: Any
) -> None:
    """After as many as fill pools and caches. If the reference images stayed, the later half would be 17 MiB more."""
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(noise, "PNG")
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(4) as clients:

        def soak(first: int, count: int) -> Held:
            list(clients.map(lambda number: ask(client, number, noise.getvalue()), range(first, first + count)))
            deadline = time.monotonic() + 60
            while service.engine.stats()["orders"] or app.state.desk.images:  # of clients that went
                assert time.monotonic() < deadline
                time.sleep(0.1)
            return Held.now()

        soak(0, 100)
        found = [soak(100 + 50 * part, 50) for part in range(6)]
    print(*found, sep="\n")
    before, after = found[:3], found[3:]
    assert min(one.bytes for one in after) - min(one.bytes for one in before) < 8 * 2**20
    assert min(one.files for one in after) <= min(one.files for one in before) + 2
    assert min(one.threads for one in after) <= min(one.threads for one in before) + 2
    assert [one for one in gc.get_objects() if type(one) in (Drawing, Order)] == []
