"""The engine of the service on the GPU: steps that are watched, previews, and the host that is never far ahead."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_checkpoint import make_checkpoint

from m2d.generation.gates import GatesAtWork
from m2d.generation.generator import Generator
from m2d.generation.plan import rows_of, standard_plan
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.serving.engine import Engine
from m2d.serving.orders import Drawn, Event, ModelCard, Order, Preview, Progress
from m2d.serving.settings import ServeConfig


def test_an_order_is_drawn_with_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones(x.shape, dtype=torch.bool))  # the mock has no numbers
    checkpoint = make_checkpoint()
    card = ModelCard(
        name="tiny", checkpoint="here", sha256=checkpoint.sha256, step=1, stage="joint", image_size=16,
        classes=checkpoint.info.classes, extractor="none", has_prior=False, has_extractor=False, size_bytes=1,
        created=1, licence="none",
    )  # fmt: skip
    config = GenerateConfig(checkpoint="here", steps=8)
    rows = rows_of(standard_plan({"MEL": 2}, run_seed=0, sampling=config, feature="none"))
    order = Order(id="some", model=card, config=config, rows=tuple(rows), previews=2)
    gates = GatesAtWork(GateConfig(enabled=False), ())

    async def draw(engine: Engine) -> list[Event]:
        return [event async for event in engine.draw(order)]

    with ThreadPoolExecutor(1) as executor:
        engine = Engine(card, Generator(checkpoint, device="cuda"), gates, ServeConfig(checkpoint=["here"]), executor)
        events = asyncio.run(draw(engine))
        engine.close()
    assert [type(event) for event in events if not isinstance(event, Progress)] == [Preview] * 4 + [Drawn] * 2
    assert engine.stats()["gpu_memory_bytes"] > 0
