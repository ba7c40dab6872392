"""The client, and the examples of docs/serving.md as they are written, against the service over real HTTP."""

import copy
import io
import re
import subprocess
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from PIL import Image

from m2d.serving.app import create_app
from m2d.serving.client import Client, ServiceError, SyntheticImage
from m2d.serving.jobs import Jobs
from m2d.serving.settings import ServeConfig
from tests.serving.conftest import LocalService, Serve, run_in_thread

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/serving.md"


@pytest.fixture(scope="module")
def with_jobs(
    service: LocalService, config: ServeConfig, serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The URL of a service whose jobs are at work."""
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), run_in_thread, limits=config.limits)
    made = copy.copy(service)
    made.jobs = jobs
    return serve(create_app(made, config), jobs=jobs)[0]


def test_the_examples_of_the_page_work_as_they_are_written(with_jobs: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    ran, names = 0, dict[str, Any]()
    for language, text in blocks:
        asked = text.replace("http://127.0.0.1:8000", with_jobs)
        if language == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path)
                exec(compile(asked, str(PAGE), "exec"), names)  # noqa: S102 - our own page
        elif asked == text:  # it starts the service, or makes keys
            continue
        else:
            command = ["bash", "-euo", "pipefail", "-c", asked]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{asked}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == 6
    for name in ("melanoma", "variation", "MEL_000000", "MEL_000001"):
        assert Image.open(tmp_path / f"{name}.png").info["synthetic"] == "true"
    with zipfile.ZipFile(tmp_path / "dermatofibromas.zip") as archive:
        assert sum(name.endswith(".png") for name in archive.namelist()) == 4
    events = (tmp_path / "events.txt").read_text(encoding="utf-8")
    assert (events.count("event: preview\n"), events.count("event: image\n")) == (4, 2)
    assert len(names["images"]) == 2
    assert Image.open(io.BytesIO(names["images"][0])).size == (16, 16)
    with tarfile.open(tmp_path / "images.tar") as tar:
        assert Counter(name[:2] for name in tar.getnames() if name.endswith(".png")) == {"DF": 3, "VA": 2}
    assert {job["total"] for job in Client(with_jobs).jobs()} == {4, 5}  # DF is filled up from 2 to 6


def test_the_client_streams_images_between_other_events(with_jobs: str) -> None:
    events = list(Client(with_jobs).stream("MEL", 2, seed=3, steps=3, partial_images=1))
    kinds = [event["event"] if isinstance(event, dict) else "image" for event in events]
    assert (kinds[0], kinds[-1]) == ("started", "done")
    assert kinds.count("image") == kinds.count("preview") == 2
    drawn = sorted((one for one in events if isinstance(one, SyntheticImage)), key=lambda image: image.index)
    assert [image.id for image in drawn] == ["MEL_000000", "MEL_000001"]
    at_once = Client(with_jobs).images("melanoma", 2, seed=3, steps=3)  # by its name
    assert [(image.id, image.seed, image.png) for image in drawn] == [(one.id, one.seed, one.png) for one in at_once]


def test_the_client_sends_references_as_files_or_bytes(with_jobs: str, tmp_path: Path) -> None:
    (start,) = Client(with_jobs).images("NV", seed=1, steps=2)
    (tmp_path / "nevus.png").write_bytes(start.png)
    ask = {"mode": "image2image", "strength": 0.0, "feature": "none", "seed": 2}
    (one,) = Client(with_jobs).images("NV", reference=tmp_path / "nevus.png", **ask)
    (other,) = Client(with_jobs).images("NV", reference=start.png, **ask)
    assert one.png == other.png != start.png


def test_an_error_has_the_service_s_own_words(with_jobs: str) -> None:
    with pytest.raises(ServiceError, match="steps") as caught:
        Client(with_jobs).images("MEL", steps=0)
    assert (caught.value.status, caught.value.problem["status"]) == (422, 422)
    with pytest.raises(ServiceError) as caught:
        Client(with_jobs).job("0" * 32)
    assert caught.value.status == 404


def test_the_client_comes_again_when_a_busy_service_says(serve: Serve) -> None:
    asked: list[float] = []
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> Response:
        asked.append(time.monotonic())
        if len(asked) < 3:
            return JSONResponse({"detail": "full"}, 503, {"Retry-After": "1"})
        return JSONResponse({"data": [{"id": "late"}]})

    (url,) = serve(app)
    assert Client(url).models() == [{"id": "late"}]
    assert len(asked) == 3
    assert asked[1] - asked[0] >= 1
    assert asked[2] - asked[1] >= 1
    asked.clear()
    with pytest.raises(ServiceError, match="full"):
        Client(url, retries=0).models()
