"""A client of the service: needs requests and Pillow, and nothing else of M2D's heavy packages."""

import base64
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import requests
from PIL import Image
from urllib3.util import Retry

from m2d.errors import M2DError
from m2d.files.atomic import whole_file

Source = str | PathLike[str] | bytes
"""An input image: a file's path, or its content."""

ENDED = ("succeeded", "incomplete", "failed", "cancelled")


class ServiceError(M2DError):
    """What the service refused: `status` of HTTP, and `problem`, the members of its answer (RFC 9457)."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or f"the service answered {status}"))
        self.status, self.problem = status, problem


@dataclass(frozen=True)
class SyntheticImage:
    """An image that the service made, and what it says of it."""

    id: str  # MEL_000003
    label: str  # class code
    index: int  # place in the request
    seed: int  # of its noise
    png: bytes
    manifest: dict[str, Any]  # its row of a manifest, as `generate` writes it

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """Of an entry of `images`, or of an `image` event."""
        png = base64.b64decode(answer["b64_png"])
        return cls(answer["id"], answer["class"], answer["index"], answer["seed"], png, answer["manifest"])

    @property
    def picture(self) -> Image.Image:
        """Decoded, with what its text chunks say in `.info`; to keep those, write `png` to a file."""
        return Image.open(io.BytesIO(self.png))


class Client:
    """Asks one service. `settings` are the fields of POST /v1/images or /v1/jobs; docs/serving.md lists them.

    key: where the service asks for one. timeout_s: without any answer. retries: of a request that the service was too
    busy for (503), each after as many seconds as it says. Every method raises ServiceError, or requests' own
    ConnectionError where nothing answers.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, *, timeout_s: float = 600, retries: int = 5
    ) -> None:
        self.url, self._timeout = url.rstrip("/"), timeout_s
        self._session = requests.Session()
        if key is not None:
            self._session.headers["Authorization"] = f"Bearer {key}"
        busy = Retry(
            total=retries,
            status_forcelist=[503],
            allowed_methods=None,  # POST too: what was refused was not begun
            backoff_factor=0.5,
            raise_on_status=False,
            read=0,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=busy))

    def models(self) -> list[dict[str, Any]]:
        """The checkpoints that are served, the default first."""
        return list(self._ask("GET", "/v1/models").json()["data"])

    def images(self, label: str, count: int = 1, **settings: Any) -> list[SyntheticImage]:
        """Images of a class, by its code or name; `reference` and `reference_b` are Sources.

        Fewer than count where the gates refused some.
        """
        answer = self._ask("POST", "/v1/images", json=_order(label, count, settings)).json()
        return [SyntheticImage.of(one) for one in answer["images"]]

    def stream(self, label: str, count: int = 1, **settings: Any) -> Iterator[dict[str, Any] | SyntheticImage]:
        """As `images`, each as soon as it is there, and between them the service's other events as they come.

        Those are dicts with an `event`: started, progress, preview, refused, done. Ending the loop gives the order up.
        """
        asked = {"json": _order(label, count, settings), "headers": {"Accept": "application/x-ndjson"}, "stream": True}
        with self._ask("POST", "/v1/images", **asked) as response:
            for line in response.iter_lines():
                if not line:  # a sign of life
                    continue
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "error":
                    raise ServiceError(event.get("status", 500), event)
                yield SyntheticImage.of(event) if event["event"] == "image" else event

    def order(
        self,
        counts: Mapping[str, int] | None = None,
        *,
        have: Mapping[str, int] | None = None,
        to: str = "max",
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Begin a job: so many images of each class (counts), or what fills up a dataset of `have` images a class.

        idempotency_key: a word of the caller's; the same one again gives the same job. Returns the job.
        """
        wanted = {"counts": dict(counts)} if counts else {"balance": {"have": dict(have or {}), "to": to}}
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return dict(self._ask("POST", "/v1/jobs", json=wanted | settings, headers=headers).json())

    def jobs(self) -> list[dict[str, Any]]:
        """This key's, the newest first."""
        return list(self._ask("GET", "/v1/jobs").json()["data"])

    def job(self, job_id: str) -> dict[str, Any]:
        """How far it is."""
        return dict(self._ask("GET", f"/v1/jobs/{job_id}").json())

    def wait(self, job_id: str, *, every_s: float = 2.0) -> dict[str, Any]:
        """The job, once it has ended; `state` says how."""
        while (job := self.job(job_id))["state"] not in ENDED:
            time.sleep(every_s)
        return job

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop it; what is done stays."""
        return dict(self._ask("DELETE", f"/v1/jobs/{job_id}").json())

    def download(self, job_id: str, path: str | PathLike[str]) -> Path:
        """The job's images so far, as a tar in WebDataset's layout, whole or not at all."""
        place = Path(path)
        with (
            self._ask("GET", f"/v1/jobs/{job_id}/archive", stream=True) as response,
            whole_file(place) as partial,
            partial.open("wb") as file,
        ):
            for piece in response.iter_content(1 << 20):
                file.write(piece)
        return place

    def _ask(self, method: str, path: str, **how: Any) -> requests.Response:
        response = self._session.request(method, self.url + path, timeout=self._timeout, **how)
        if response.ok:
            return response
        try:
            problem = dict(response.json())
        except ValueError:  # of something in between
            problem = {"detail": f"{self.url} answered {response.status_code} {response.reason}"}
        raise ServiceError(response.status_code, problem)


def _order(label: str, count: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    order = {"class": label, "count": count, **settings}
    for name in {"reference", "reference_b"} & order.keys():
        source = order[name]
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        order[name] = base64.b64encode(content).decode()
    return order
