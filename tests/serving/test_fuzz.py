"""Uploads that are cut short, lie or want too much: nothing breaks, and nothing grows."""

import asyncio
import io
import json
import resource
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from PIL import Image
from starlette.testclient import TestClient

from m2d.serving import uploads
from m2d.serving.problems import install
from m2d.serving.settings import ServeConfig, ServingLimits

LIMITS = ServingLimits(upload_bytes=4 * 2**20, upload_pixels=4_000_000)


def app_of() -> FastAPI:
    config = ServeConfig(checkpoint=["x"], limits=LIMITS)
    app = FastAPI()
    install(app, config)

    @app.post("/order")
    async def order(request: Request) -> list[str]:
        _, files = await uploads.read_order(request, LIMITS)
        return [upload.name[64:] for each in files.values() for upload in each]

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    return app


@pytest.fixture(scope="module")
def uploading() -> TestClient:
    return TestClient(app_of(), base_url="http://localhost")


def form_of(content: bytes) -> dict[str, Any]:
    return {"data": {"request": "{}"}, "files": [("reference", ("a.png", content))]}


def statuses(client: TestClient, contents: list[bytes]) -> list[int]:
    answers = [client.post("/order", **form_of(content)) for content in contents]
    kinds = {answer.headers["Content-Type"] for answer in answers if answer.status_code != 200}
    assert kinds <= {"application/problem+json"}
    return [answer.status_code for answer in answers]


def encoded(kind: str, **settings: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *chunks: bytes, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def tiff_of(*tags: tuple[int, int, int, int]) -> bytes:
    """Little-endian; tags are (number, type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + 3000)


def bombs() -> dict[str, bytes]:
    """Small files that ask for gigabytes, each by another way."""
    compressor = zlib.compressobj(1)  # piece by piece, or the peak of memory were this one
    zeros = b"".join([compressor.compress(bytes(2**20)) for _ in range(128)] + [compressor.flush()])
    pixels = chunk(b"IDAT", zlib.compress(bytes(49 * 64), 9))
    sides = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 200), (279, 4, 1, 256)]
    second = encoded("JPEG")
    return {
        "png_sides": png_of(100_000, 100_000, chunk(b"IDAT", zeros)),
        "png_too_much_data": png_of(16, 16, chunk(b"IDAT", zeros)),
        "png_text": png_of(16, 16, chunk(b"zTXt", b"a\0\0" + zeros), pixels),
        "png_international_text": png_of(16, 16, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros), pixels),
        "png_many_texts": png_of(16, 16, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000), 9))] * 800, pixels),
        "png_profile": png_of(16, 16, chunk(b"iCCP", b"a\0\0" + zeros), pixels),
        "png_exif": png_of(16, 16, chunk(b"eXIf", b"MM\0*" + bytes(60_000)), pixels),
        "bmp_sides": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, *[0] * 5),
        "webp_sides": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\xff\xff" * 2 + b"VP8L\0\0\0\0",
        "jpeg_sides": encoded("JPEG").replace(b"\0\x30\0\x40\x03", b"\xff\xff\xff\xff\x03"),
        "tiff_sides": tiff_of((256, 4, 1, 2**31), (257, 4, 1, 2**31), *sides[2:]),
        "tiff_strip": tiff_of(*sides[:5], (279, 4, 1, 2**32 - 1)),
        "tiff_strips": tiff_of(*sides[:4], (273, 4, 2**30, 200), (279, 4, 2**30, 200)),
        "tiff_samples": tiff_of(*sides[:2], (258, 3, 2**31, 100), *sides[3:], (277, 3, 1, 65535)),
        "tiff_tile": tiff_of(*sides[:4], (322, 4, 1, 2**30), (323, 4, 1, 2**30), (324, 4, 1, 200), (325, 4, 1, 256)),
        "tiff_loop": b"II*\0" + struct.pack("<IH", 8, 0) + struct.pack("<I", 8),
        "mpo_that_lies": encoded("MPO", append_images=[Image.open(io.BytesIO(second))], save_all=True).replace(
            struct.pack("<I", 2), struct.pack("<I", 2**31), 1
        ),
    }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
def test_a_file_that_is_cut_short_anywhere_is_refused(uploading, kind) -> None:
    whole = encoded(kind)
    lengths = np.linspace(0, len(whole) - 200, 25, dtype=int)
    assert set(statuses(uploading, [whole[:length] for length in lengths])) <= {415, 422}
    assert statuses(uploading, [whole]) == [200]


def test_a_file_with_any_byte_changed_is_taken_or_refused(uploading) -> None:
    random = np.random.default_rng(1)
    changed = []
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        for _ in range(25):
            content = bytearray(encoded(kind))
            place = int(random.integers(0, min(len(content), 400)))  # mostly headers: the rest is noise anyway
            content[place] = int(random.integers(0, 256))
            changed.append(bytes(content))
    assert set(statuses(uploading, changed)) <= {200, 413, 415, 422}


def test_a_file_that_is_two_things_counts_as_what_it_begins_with(uploading) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("index.html", "<script>alert(1)</script>")
    page = b"<html><script>alert(1)</script>"
    gif = b"GIF89a" + encoded("JPEG")
    contents = [encoded("PNG") + archive.getvalue(), archive.getvalue() + encoded("PNG"), page + encoded("PNG"), gif]
    answers = [uploading.post("/order", **form_of(content)) for content in contents]
    assert [answer.status_code for answer in answers] == [200, 415, 415, 415]
    assert answers[0].json() == [".png"]


BOUNDARY = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="reference"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", PART + b"--b--"),
        ("multipart/form-data; boundary=", PART + b"--b--"),
        ("multipart/form-data; boundary=" + "b" * 5000, PART + b"--b--"),
        ('multipart/form-data; boundary="b', PART + b"--b--"),
        ("multipart/form-data; boundary=other", PART + b"--b--"),
        ("multipart/form-data; boundary=b; charset=no-such", PART[:-2] + b"\xff\r\n--b--"),
        (BOUNDARY, b""),
        (BOUNDARY, PART),
        (BOUNDARY, FILE + encoded("PNG")),
        (BOUNDARY, b"--b\r\n" + b"x" * 100_000),
        (BOUNDARY, b"--b\r\n\r\nno headers\r\n--b--"),
        (BOUNDARY, b"--b\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--b--"),
        (BOUNDARY, b"--b\r\nContent-Disposition: " + b"a" * 2_000_000 + b"\r\n\r\n\r\n--b--"),
        (BOUNDARY, b"--b\r\n" + b"A: b\r\n" * 20_000 + b"\r\n\r\n--b--"),
        (BOUNDARY, PART + (FILE + b"\r\n") * 5000 + b"--b--"),
        (BOUNDARY, PART * 5000 + b"--b--"),
        (BOUNDARY, FILE + b"\r\n" * 1_000_000 + b"--b--"),
        (BOUNDARY, bytes(range(256)) * 1000),
    ],
)
def test_a_form_that_is_none_is_refused(uploading, kind, body) -> None:
    answer = uploading.post("/order", content=body, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 500
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_others_are_answered_while_an_image_is_decoded(monkeypatch) -> None:
    answered = threading.Event()

    def slow_probe(content: bytes, *, max_pixels: int) -> tuple[int, int]:
        assert answered.wait(10)
        return 8, 8

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app_of())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            decoding = asyncio.create_task(client.post("/order", **form_of(b"BM")))
            await asyncio.sleep(0.05)
            health = await client.get("/healthz")
            answered.set()
            return [health.status_code, (await decoding).status_code]

    monkeypatch.setattr(uploads, "probe_image", slow_probe)
    assert asyncio.run(run()) == [200, 200]


def test_bombs_take_neither_memory_nor_the_event_loop() -> None:
    """In a process of its own, which the peak of memory belongs to. A turn is the loop's own work, not waiting."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(run.stdout)
    assert found["mebibytes"] < 60
    assert found["longest_turn_s"] < 0.1
    assert set(found["statuses"].values()) <= {200, 413, 415, 422}
    refused = {name for name, status in found["statuses"].items() if status != 200}
    assert refused >= {"png_sides", "png_text", "png_profile", "bmp_sides", "jpeg_sides", "tiff_sides", "tiff_samples"}


async def _throw_bombs() -> dict[str, Any]:
    """Each bomb as a file of a form, all at once, and how long the loop worked between two of its turns."""
    turns, over = [0.0], False

    async def watch() -> None:
        while not over:
            began = time.thread_time()
            await asyncio.sleep(0.001)
            turns.append(time.thread_time() - began)

    transport = httpx.ASGITransport(app_of())
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=100) as client:
        await client.get("/healthz")
        names, contents = zip(*bombs().items())
        watching = asyncio.create_task(watch())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answers = await asyncio.gather(*(client.post("/order", **form_of(content)) for content in contents))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        over = True
        await watching
    return {
        "statuses": dict(zip(names, (answer.status_code for answer in answers))),
        "mebibytes": (peak - before) // 1024,
        "longest_turn_s": max(turns),
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))  # the machine's sake, should a bomb go off
    print(json.dumps(asyncio.run(_throw_bombs())))
