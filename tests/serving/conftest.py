"""A service in this process: the real engine on the smallest real checkpoint, and jobs in threads."""

import asyncio
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient
from tiny_checkpoint import make_checkpoint, make_prior, write_checkpoint

from m2d.classes import ISIC7
from m2d.errors import ConfigError
from m2d.generation.generator import Generator
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.serving.access import keys_command
from m2d.serving.app import create_app
from m2d.serving.engine import Engine, describe
from m2d.serving.jobs import Jobs, make_images
from m2d.serving.orders import Event, ModelCard, Order
from m2d.serving.settings import KeysConfig, ServeConfig


async def run_in_thread(config: GenerateConfig, sha256: str, log: Path) -> None:
    """A `Run` at its own pace."""
    await asyncio.to_thread(make_images, replace(config, num_actors=0), sha256)


class Bench:
    """A `Run` that makes as many groups as the test allows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed = threading.Semaphore(0)
        self._stopping = threading.Event()
        self.begun: list[str] = []  # ids of jobs, in order
        self.drawn: list[str] = []  # ids of images
        real = Generator.generate

        def paced(generator: Generator, rows: Any, *arguments: Any) -> Any:
            while not self._allowed.acquire(timeout=0.01):
                if self._stopping.is_set():
                    raise _Stopped
            self.drawn.extend(row.id for row in rows)
            return real(generator, rows, *arguments)

        monkeypatch.setattr(Generator, "generate", paced)

    def allow(self, groups: int) -> None:
        self._allowed.release(groups)

    async def __call__(self, config: GenerateConfig, sha256: str, log: Path) -> None:
        def work() -> None:
            with suppress(_Stopped):
                make_images(replace(config, num_actors=0), sha256)

        self.begun.append(log.parent.name)
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            await asyncio.shield(working)
        finally:
            self._stopping.set()
            await asyncio.wait([working])
            self._stopping.clear()


class _Stopped(BaseException):
    """Ends the thread's work, as a signal ends a process."""


class LocalService:
    """A Service without Ray. Its engines work in whichever event loop asks, one loop at a time."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.jobs = Jobs(config.jobs_folder, run_in_thread, limits=config.limits)
        self.ready = True
        self._executor = ThreadPoolExecutor(1)
        self.engines: dict[str, Engine] = {}  # by the model's name, the default first
        for path in config.checkpoint:
            self._load(path, Path(path).parent.name)

    def _load(self, path: str, name: str) -> ModelCard:
        card = describe(path, name, self.config.licence)
        self.engines[name] = Engine.load(card, self.config, self._executor)
        return card

    @property
    def engine(self) -> Engine:
        """Of the default model."""
        return next(iter(self.engines.values()))

    async def models(self) -> list[ModelCard]:
        return [engine.card for engine in self.engines.values()]

    async def add_model(self, checkpoint: str, name: str | None = None) -> ModelCard:
        if self.config.checkpoints_root is None:
            raise ConfigError("checkpoint: none may be added; start the service with --checkpoints_root")
        return self._load(str(Path(self.config.checkpoints_root) / checkpoint), name or Path(checkpoint).name)

    async def is_ready(self) -> bool:
        return self.ready

    def draw(self, order: Order) -> AsyncIterator[Event]:
        engine = next(one for one in self.engines.values() if one.card.sha256 == order.model.sha256)
        return engine.draw(order)

    async def metrics(self) -> str:
        return "".join(f"m2d_{name} {value}\n" for name, value in self.engine.stats().items())

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self._executor.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16-pixel images of the seven classes, each with features to draw; its model is called tiny."""
    made = replace(make_checkpoint(), prior=make_prior(dict.fromkeys(ISIC7.codes, 40)))
    return write_checkpoint(made, tmp_path_factory.mktemp("serving") / "tiny" / "step_1000")


@pytest.fixture(scope="session")
def config(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """On this machine alone and without keys; no gate, which would refuse a random network's images."""
    return ServeConfig(
        checkpoint=[str(checkpoint)],
        directory=str(tmp_path_factory.mktemp("served")),
        device="cpu",
        mixed_precision="no",
        gates=GateConfig(enabled=False),
    )


@pytest.fixture(scope="session")
def service(config: ServeConfig) -> Iterator[LocalService]:
    made = LocalService(config)
    yield made
    made.close()


@pytest.fixture(scope="session")
def app(service: LocalService, config: ServeConfig) -> FastAPI:
    return create_app(service, config)


@pytest.fixture(scope="session")
def client(app: FastAPI, service: LocalService) -> Iterator[TestClient]:
    """Asks the app in this process, in an event loop of its own; an answer is read whole."""
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as made:
        assert made.portal is not None
        made.portal.call(service.jobs.start)
        yield made
        made.portal.call(service.jobs.stop)


Serve = Callable[..., list[str]]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """A function that serves apps over real HTTP on free ports of this machine until the tests end; their URLs.

    jobs: to be at work meanwhile.
    """
    running: list[tuple[list[uvicorn.Server], threading.Thread]] = []

    def begin(*apps: FastAPI, jobs: Jobs | None = None) -> list[str]:
        listening = [socket.create_server(("127.0.0.1", 0)) for _ in apps]
        settings: dict[str, Any] = {"log_level": "warning", "lifespan": "off", "timeout_graceful_shutdown": 2}
        servers = [uvicorn.Server(uvicorn.Config(app, **settings)) for app in apps]

        async def run() -> None:
            if jobs is not None:
                await jobs.start()
            await asyncio.gather(*(server.serve([one]) for server, one in zip(servers, listening)))
            if jobs is not None:
                await jobs.stop()

        thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
        thread.start()
        running.append((servers, thread))
        while not all(server.started for server in servers):
            time.sleep(0.01)
        return [f"http://127.0.0.1:{one.getsockname()[1]}" for one in listening]

    yield begin
    for servers, thread in running:
        for server in servers:
            server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def url(app: FastAPI, serve: Serve) -> str:
    """The service over real HTTP, for streams and for clients that go away."""
    return serve(app)[0]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def new_key(file: Path, name: str, **settings: Any) -> str:
    """As `serve keys add` prints it."""
    with redirect_stdout(io.StringIO()) as said:
        keys_command(KeysConfig(words=["add", name], keys=str(file), **settings))
    return said.getvalue().strip()


def pixels(png: bytes) -> np.ndarray:
    """With a sign."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image, np.int16)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])
