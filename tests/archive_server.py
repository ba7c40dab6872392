"""A stand-in for the ISIC archive on the loopback: the API's pages, and image files over connections that misbehave."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image


def jpeg(number: int, size: tuple[int, int] = (48, 36)) -> bytes:
    """A real JPEG of about 2 KB, another one for each number; size is (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


class Archive:
    """What the server holds, how it misbehaves, and what it was asked."""

    def __init__(self, address: str = "") -> None:
        self.address = address
        self.records: list[Any] = []
        self.files: dict[str, bytes] = {}
        self.collections: dict[int, str] = {212: "HAM10000", 66: "Challenge 2018: Task 3: Training"}
        self.page_size = 2
        self.server_header = "test"
        self.extra_headers: dict[str, str] = {}  # of files
        self.mishaps: dict[str, list[Any]] = {}  # path's last part -> what happens to the next requests
        self.overrides: dict[str, bytes] = {}  # path -> this body in place of JSON
        self.next_url: str | None = None  # in place of the true next page
        self.delay_s = 0.0  # before each file
        self.asked: list[str] = []  # path and query of each request, in order
        self.file_ids: list[str] = []  # of each request for a file
        self.lock = threading.Lock()

    def add(self, number: int, **clinical: str) -> str:
        """One image with its record; returns its id."""
        isic_id = f"ISIC_{number:07d}"
        self.files[isic_id] = jpeg(number)
        self.records.append(
            {
                "isic_id": isic_id,
                "public": True,
                "copyright_license": "CC-BY-NC",
                "attribution": "ViDIR Group, Department of Dermatology, Medical University of Vienna",
                "files": {
                    "full": {"url": f"{self.address}/images/{isic_id}.jpg", "size": len(self.files[isic_id])},
                    "thumbnail_256": {"url": f"{self.address}/thumbnails/{isic_id}.jpg", "size": 100},
                },
                "metadata": {
                    "acquisition": {"pixels_x": 48, "pixels_y": 36, "image_type": "dermoscopic"},
                    "clinical": clinical,
                },
            }
        )
        return isic_id

    def fetched(self) -> list[str]:
        """Ids of the files that were asked for, sorted, with repetitions."""
        return sorted(self.file_ids)

    def reset(self) -> None:
        self.asked.clear()
        self.file_ids.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    archive: Archive

    def log_message(self, *_: object) -> None:
        pass

    def version_string(self) -> str:
        return self.archive.server_header

    def do_GET(self) -> None:
        archive, parts = self.archive, urlsplit(self.path)
        name = parts.path.rstrip("/").rpartition("/")[2]
        with archive.lock:
            archive.asked.append(self.path)
            if parts.path.startswith("/images/"):
                archive.file_ids.append(name.removesuffix(".jpg"))
            waiting = archive.mishaps.get(name, [])
            mishap = waiting.pop(0) if waiting else None
        if isinstance(mishap, dict):
            self._send(mishap["status"], b"{}", {key: value for key, value in mishap.items() if key != "status"})
        elif parts.path.startswith("/api/v2/"):
            self._api(parts.path.removeprefix("/api/v2/"), parse_qs(parts.query))
        elif parts.path.startswith("/images/") and name.removesuffix(".jpg") in archive.files:
            self._file(archive.files[name.removesuffix(".jpg")], mishap)
        else:
            self._send(404, b"<html>not found</html>", {"Content-Type": "text/html"})

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        archive = self.archive
        if path in archive.overrides:
            self._send(200, archive.overrides[path], {"Content-Type": "text/html"})
        elif path.startswith("collections/"):
            number = int(path.split("/")[1])
            if number in archive.collections:
                self._json({"id": number, "name": archive.collections[number], "public": True})
            else:
                self._send(404, b'{"detail": "Not Found"}', {})
        elif path == "images/search/":
            start = int(base64.b64decode(query["cursor"][0])) if "cursor" in query else 0
            end = start + archive.page_size
            following = archive.next_url
            if following is None and end < len(archive.records):
                cursor = base64.b64encode(str(end).encode()).decode()
                following = f"{archive.address}/api/v2/images/search/?collections=212&cursor={cursor}&limit=100"
            count = None if "cursor" in query else len(archive.records)
            page = {"results": archive.records[start:end], "count": count, "next": following, "previous": None}
            self._json(page)
        else:
            wanted = path.split("/")[1]
            found = [record for record in archive.records if record.get("isic_id") == wanted]
            self._json(found[0]) if found else self._send(404, b"{}", {})

    def _file(self, content: bytes, mishap: Any) -> None:
        archive = self.archive
        time.sleep(archive.delay_s)
        headers = {"Content-Type": "image/jpeg"} | archive.extra_headers
        self._send(200, content, headers, mishap if isinstance(mishap, int) else None)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        """cut: close the connection after so many bytes of the body, all of which were announced."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed, or has had enough, is no news here."""


@contextmanager
def running(archive: Archive) -> Iterator[Archive]:
    """Serve it on a free port of 127.0.0.1."""
    handler = type("Handler", (_Handler,), {"archive": archive})
    server = _Server(("127.0.0.1", 0), handler)
    archive.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield archive
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
