"""The engine alone: orders share batches, an image is the bulk job's, and nobody pays for who goes or fails."""

import asyncio
import gc
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_references import SixFeatures, write_photograph

from m2d.errors import CheckpointError, ConfigError, DataError, Incomplete
from m2d.files.atomic import COMPLETE, is_in_use
from m2d.generation.generator import Generator
from m2d.generation.plan import PlanRow, image2image_plan, make_plan, rows_of
from m2d.generation.provenance import read_manifest, self_made
from m2d.generation.references import Reference
from m2d.generation.run import generate
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.models.checkpoint import load_checkpoint
from m2d.serving.engine import Engine, describe
from m2d.serving.orders import Drawn, Event, ModelCard, Order, Preview, Progress, Refused
from m2d.serving.settings import ServeConfig
from tests.serving.conftest import pixels

Draw = Callable[[Order], AsyncIterator[Event]]


@pytest.fixture(scope="module")
def card(checkpoint: Path) -> ModelCard:
    return describe(str(checkpoint), "tiny", "none")


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def load(card: ModelCard, config: ServeConfig, executor: ThreadPoolExecutor) -> Iterator[Load]:
    """An engine with settings of its own."""
    loaded: list[Engine] = []

    def make(**settings: Any) -> Engine:
        loaded.append(Engine.load(card, replace(config, **{"batch_size": 8, **settings}), executor))
        return loaded[-1]

    yield make
    for engine in loaded:
        engine.close()


@pytest.fixture(scope="module")
def engine(load: Load) -> Engine:
    """Eight images at once, no gates."""
    return load()


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extractor that fits the tiny checkpoint, for the engine and for the bulk job."""
    for module in ("m2d.serving.engine", "m2d.generation.references"):
        monkeypatch.setattr(f"{module}.load_reference_extractor", lambda *_: SixFeatures().eval())


def order(card: ModelCard, count: int = 1, *, label: str = "MEL", **more: Any) -> Order:
    """As requests.py makes one. more: settings of GenerateConfig, fields of Order."""
    own = {"previews": more.pop("previews", 0)}
    config = GenerateConfig(checkpoint=card.checkpoint, classes=label, num_samples=count, **{"steps": 4, **more})
    rows = rows_of(make_plan(config, "prior", None, card.classes).table)
    return Order(id="some", model=card, config=config, rows=tuple(rows), **own)


def guided_by(card: ModelCard, upload: bytes, count: int = 1, *, strength: float = 0.5, **more: Any) -> Order:
    """image2image of a file, of no feature."""
    name = f"{hashlib.sha256(upload).hexdigest()}.png"
    files = {"MEL": (Reference(path=name, label="MEL", sha256=name[:64]),)}
    config = GenerateConfig(
        checkpoint=card.checkpoint, mode="image2image", init_images="uploads", strength=strength, feature="none",
        classes="MEL", num_samples=count, steps=4, **more,
    )  # fmt: skip
    rows = rows_of(
        image2image_plan(
            files, num_samples=count, strength=strength, run_seed=config.seed, sampling=config, feature="none"
        )
    )
    return Order(id="some", model=card, config=config, rows=tuple(rows), uploads={name: upload})


async def events_of(engine: Engine, wanted: Order) -> list[Event]:
    return [event async for event in engine.draw(wanted)]


def drawn(engine: Engine, *orders: Order) -> list[list[Event]]:
    """All events of orders that are drawn at the same time."""

    async def together() -> list[list[Event]]:
        return await asyncio.gather(*(events_of(engine, one) for one in orders))

    return asyncio.run(together())


async def left_after(engine: Engine, wanted: Order, steps: int) -> None:
    """An order whose client goes once so many steps are told."""
    async with aclosing(cast(Any, engine.draw(wanted))) as events:
        async for event in events:
            if isinstance(event, Progress) and event.done >= steps * len(wanted.rows):
                return


def images_of(events: Sequence[Event]) -> list[np.ndarray]:
    finished = sorted((event for event in events if isinstance(event, Drawn)), key=lambda event: event.index)
    return [pixels(event.png) for event in finished]


def same_images(first: Sequence[Event], second: Sequence[Event]) -> bool:
    """Up to the rounding of another batch."""
    one, other = images_of(first), images_of(second)
    return len(one) == len(other) > 0 and all(abs(a - b).max() <= 1 for a, b in zip(one, other, strict=True))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were in each call of the network, in order."""
    seen: list[int] = []
    real = Generator.velocity

    def counting(self: Generator, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        seen.append(len(x_t))
        return real(self, x_t, t, context)

    monkeypatch.setattr(Generator, "velocity", counting)
    return seen


class Gate:
    """Holds the device's thread before each step until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.asked = threading.Semaphore(0), threading.Event()
        real = Generator.velocity

        def waiting(*given: Any) -> torch.Tensor:
            self.asked.set()
            assert self.steps.acquire(timeout=60)
            return real(*given)

        monkeypatch.setattr(Generator, "velocity", waiting)

    async def reached(self) -> None:
        """The device has a pass."""
        while not self.asked.is_set():
            await asyncio.sleep(0.001)

    def open(self) -> None:
        self.steps.release(1000)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


# --- batches


def test_images_are_signed_by_the_certificate_of_the_service(load: Load, card: ModelCard, tmp_path: Path) -> None:
    signing = self_made(tmp_path)
    (events,) = drawn(load(sign=str(signing.chain)), order(card))
    (image,) = [event for event in events if isinstance(event, Drawn)]
    found = read_manifest(image.png, (tmp_path / "certificates.pem").read_text())
    assert found is not None
    assert (found.state, json.loads(found.facts["settings"])["sign"]) == ("Trusted", signing.sha256)
    assert image.entry["sha256"] == hashlib.sha256(image.png).hexdigest()


def test_eight_orders_of_one_image_are_one_pass_and_the_images_are_those_of_each_alone(
    engine: Engine, card: ModelCard
) -> None:
    orders = [order(card, seed=seed, label=label) for seed, label in enumerate(["MEL", "DF"] * 4)]
    before = engine.passes
    together = drawn(engine, *orders)
    assert engine.passes == before + 1
    alone = [drawn(engine, one)[0] for one in orders[:3]]
    assert engine.passes == before + 4
    assert all(same_images(one, other) for one, other in zip(together, alone, strict=False))


def test_two_orders_of_eight_at_batch_size_eight_are_two_passes(engine: Engine, card: ModelCard) -> None:
    before = engine.passes
    first, second = drawn(engine, order(card, 8), order(card, 8, seed=1))
    assert engine.passes == before + 2
    assert len(images_of(first)) == len(images_of(second)) == 8


def test_only_the_solver_s_settings_divide(engine: Engine, card: ModelCard) -> None:
    before = engine.passes
    drawn(engine, order(card), order(card, feature="none"), order(card, label="DF"), order(card, steps=3))
    assert engine.passes == before + 2


def test_who_comes_while_a_batch_is_drawn_joins_the_next_one(engine: Engine, card: ModelCard, gate: Gate) -> None:
    async def arriving() -> None:
        first = asyncio.create_task(events_of(engine, order(card)))
        await gate.reached()
        rest = [asyncio.create_task(events_of(engine, order(card, 2, seed=seed))) for seed in range(3)]
        await asyncio.sleep(0.05)
        gate.open()
        await asyncio.gather(first, *rest)

    before = engine.passes
    asyncio.run(arriving())
    assert engine.passes == before + 2


def test_an_order_of_other_settings_waits_for_one_pass_of_a_large_one(
    engine: Engine, card: ModelCard, gate: Gate
) -> None:
    ended: list[str] = []

    async def named(name: str, wanted: Order) -> None:
        await events_of(engine, wanted)
        ended.append(name)

    async def arriving() -> None:
        large = asyncio.create_task(named("large", order(card, 16)))  # two passes
        await gate.reached()
        small = asyncio.create_task(named("small", order(card, steps=1)))
        await asyncio.sleep(0.05)
        gate.open()
        await asyncio.gather(large, small)

    asyncio.run(arriving())
    assert ended == ["small", "large"]


def test_an_idle_engine_waits_a_little_for_company(load: Load, card: ModelCard) -> None:
    engine = load(batch_wait_s=0.5)

    async def one_after_the_other() -> None:
        first = asyncio.create_task(events_of(engine, order(card)))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, events_of(engine, order(card, seed=1)))

    asyncio.run(one_after_the_other())
    assert engine.passes == 1


def test_clients_that_ask_again_end_up_in_one_batch(engine: Engine, card: ModelCard, gate: Gate) -> None:
    """The first comes early, so five are in the second pass: kept apart, the two parties would take turns."""
    wanted = [order(card, seed=seed, steps=1) for seed in range(6)]

    async def client(one: Order) -> None:
        for _ in range(5):
            await events_of(engine, one)

    async def six_clients() -> None:
        early = asyncio.create_task(client(wanted[0]))
        await gate.reached()
        rest = [asyncio.create_task(client(one)) for one in wanted[1:]]
        await asyncio.sleep(0.05)
        gate.open()
        await asyncio.gather(early, *rest)

    before = engine.passes
    asyncio.run(six_clients())
    assert engine.passes - before == 6


# --- the images of the bulk job


def bulk(root: Path, config: GenerateConfig) -> list[tuple[dict[str, Any], bytes]]:
    """Rows of the manifest of `generate`, sorted by id, each with its file."""
    folder = generate(replace(config, output=str(root), device="cpu", mixed_precision="no", num_actors=0, batch_size=8))
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    return [(row, (folder / row["path"]).read_bytes()) for row in rows]


def without_time(entry: dict[str, Any]) -> dict[str, Any]:
    names = {name: Path(entry[name]).name if entry[name] else None for name in ("reference", "reference_b")}
    return {**{name: value for name, value in entry.items() if name != "created"}, **names}


@pytest.mark.parametrize("mode", ["standard", "image2image", "interpolate"])
@pytest.mark.usefixtures("six")
def test_files_and_manifest_are_those_that_generate_writes(
    engine: Engine, card: ModelCard, tmp_path: Path, mode: str
) -> None:
    folders: dict[str, Any] = {
        "image2image": ("init_images",),
        "interpolate": ("reference_images", "reference_images_b"),
    }
    places: dict[str, str] = {}
    uploads: dict[str, bytes] = {}
    for number, setting in enumerate(folders.get(mode, ())):
        picture = write_photograph(tmp_path / f"{number}.png", number)
        name = f"{hashlib.sha256(picture.read_bytes()).hexdigest()}.png"
        (tmp_path / setting / "MEL").mkdir(parents=True)
        uploads[name] = picture.rename(tmp_path / setting / "MEL" / name).read_bytes()
        places[setting] = str(tmp_path / setting)
    config = GenerateConfig(
        checkpoint=card.checkpoint, mode=cast(Any, mode), classes="MEL", num_samples=3, steps=4, steps_between=2,
        gates=GateConfig(enabled=False), **cast(Any, places),
    )  # fmt: skip
    planned = make_plan(config, "reference" if places else "prior", None, card.classes)
    rows = [
        replace(
            row, **{name: Path(place).name for name in ("reference", "reference_b") if (place := getattr(row, name))}
        )
        for row in rows_of(planned.table)
    ]
    wanted = Order(id="some", model=card, config=config, rows=tuple(rows), plan=planned.digest, uploads=uploads)
    found = sorted(
        (event for event in drawn(engine, wanted)[0] if isinstance(event, Drawn)), key=lambda one: one.entry["id"]
    )
    expected = bulk(tmp_path / "bulk", config)
    assert len(found) == (4 if mode == "interpolate" else 3)
    assert [one.png for one in found] == [png for _, png in expected]
    assert [without_time(one.entry) for one in found] == [without_time(row) for row, _ in expected]
    assert all(one.entry["reference"] in (None, *uploads) for one in found)


# About the median contrast of what the tiny network draws, and nothing else is refused.
GATES = GateConfig(min_contrast=39.12, max_roughness=255, max_saturated_share=1, max_attempts=3)


@pytest.fixture(scope="module")
def strict(load: Load) -> Engine:
    """Its gates refuse flat images."""
    return load(gates=GATES)


def test_what_the_gates_refuse_is_drawn_again_as_the_bulk_job_does(
    strict: Engine, card: ModelCard, tmp_path: Path
) -> None:
    wanted = order(card, 8, gates=GATES)
    events = drawn(strict, wanted)[0]
    with pytest.raises(Incomplete):
        bulk(tmp_path / "bulk", wanted.config)
    journal = pq.read_table(tmp_path / "bulk" / "journal.parquet").to_pylist()
    kept = {row["id"]: without_time({name: value for name, value in row.items() if name != "accepted"})
            for row in journal if row["accepted"]}  # fmt: skip
    found = {event.entry["id"]: without_time(event.entry) for event in events if isinstance(event, Drawn)}
    refused = [event for event in events if isinstance(event, Refused)]
    assert {row["attempt"] for row in kept.values()} > {0}
    assert {name: row["seed"] for name, row in found.items()} == {name: row["seed"] for name, row in kept.items()}
    assert {wanted.rows[one.index].id for one in refused} == {row.id for row in wanted.rows} - set(kept)
    assert refused
    assert {(one.reason, one.attempts) for one in refused} == {("blank", 3)}
    attempts = sum(row["attempt"] + 1 for row in kept.values()) + 3 * len(refused)
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last == Progress(done=4 * attempts, total=4 * attempts)


def test_what_cannot_be_replaced_is_kept_whatever_the_gates_find(load: Load, card: ModelCard, tmp_path: Path) -> None:
    strictest = load(gates=GateConfig(min_contrast=127.5, max_attempts=2))
    photograph = write_photograph(tmp_path / "one.png", 1).read_bytes()
    events = drawn(strictest, guided_by(card, photograph, strength=0.0), guided_by(card, photograph))
    (kept,) = (event for event in events[0] if isinstance(event, Drawn))
    assert (kept.entry["gates"], kept.entry["reason"], kept.gates) == ("recorded", "blank", ("blank",))
    assert [event for event in events[1] if isinstance(event, Refused)] == [
        Refused(index=0, reason="blank", attempts=2)
    ]


# --- what is told on the way


def test_each_order_is_told_its_own_progress_and_its_images_last(engine: Engine, card: ModelCard) -> None:
    for events, (count, steps) in zip(
        drawn(engine, order(card, 2), order(card, 1, seed=1)), [(2, 4), (1, 4)], strict=True
    ):
        told = [event for event in events if isinstance(event, Progress)]
        assert {event.total for event in told} == {count * steps}
        assert [event.done for event in told] == sorted({event.done for event in told})
        assert told[-1].done == count * steps
        assert all(event.done % count == 0 for event in told)
        assert [type(event) for event in events[-count:]] == [Drawn] * count
        assert sorted(event.index for event in events[-count:] if isinstance(event, Drawn)) == list(range(count))


def test_previews_come_between_the_steps_to_those_who_want_them_and_change_nothing(
    engine: Engine, card: ModelCard
) -> None:
    shown, plain = drawn(engine, order(card, 2, steps=8, previews=3), order(card, 1, steps=8, seed=1))
    previews = [event for event in shown if isinstance(event, Preview)]
    assert [(event.index, event.number) for event in previews] == [(i, k) for k in range(3) for i in order_of(previews)]
    assert {pixels(event.png).shape for event in previews} == {(16, 16, 3)}
    assert not [event for event in plain if isinstance(event, Preview)]
    assert same_images(shown, drawn(engine, order(card, 2, steps=8))[0])
    # They come closer to the image.
    for index, image in enumerate(images_of(shown)):
        far, _, near = (abs(pixels(event.png) - image).mean() for event in previews if event.index == index)
        assert near < far


def order_of(previews: Sequence[Preview]) -> list[int]:
    return [event.index for event in previews if event.number == 0]


# --- who goes, and who is late


def test_an_order_that_is_closed_leaves_its_batch_at_the_next_step_and_its_mates_get_their_images(
    engine: Engine, card: ModelCard, batches: list[int], gate: Gate
) -> None:
    staying, going = order(card, 2, steps=6, guidance_scale=1.0), order(card, 5, steps=6, guidance_scale=1.0, seed=1)

    async def beside() -> list[Event]:
        mate = asyncio.create_task(events_of(engine, staying))
        gone = asyncio.create_task(left_after(engine, going, 1))
        gate.steps.release()
        await gone
        gate.open()
        return await mate

    events = asyncio.run(beside())
    assert batches == [7, 7, 2, 2, 2, 2]  # the second was under way when the client went
    assert same_images(events, drawn(engine, staying)[0])
    assert engine.stats()["orders"] == engine.stats()["waiting"] == 0


def test_a_batch_that_nobody_wants_stops_at_the_next_step(
    engine: Engine, card: ModelCard, batches: list[int], gate: Gate
) -> None:
    async def gone() -> None:
        leaving = asyncio.create_task(left_after(engine, order(card, 3, steps=50, guidance_scale=1.0), 2))
        gate.steps.release(2)
        await leaving
        gate.open()
        await events_of(engine, order(card, steps=2, guidance_scale=1.0))

    asyncio.run(gone())
    assert batches == [3, 3, 3, 1, 1]


def test_a_waiting_order_that_is_closed_is_never_drawn(
    engine: Engine, card: ModelCard, batches: list[int], gate: Gate
) -> None:
    async def gone() -> None:
        first = asyncio.create_task(events_of(engine, order(card, guidance_scale=1.0)))
        await gate.reached()
        second = asyncio.create_task(events_of(engine, order(card, 7, guidance_scale=1.0)))
        await asyncio.sleep(0.05)
        assert engine.stats()["waiting"] == 7
        second.cancel()
        await asyncio.wait([second])
        assert engine.stats()["waiting"] == 0
        gate.open()
        await first

    asyncio.run(gone())
    assert batches == [1] * 4


def test_fifty_rounds_of_twenty_clients_of_which_ten_go_leave_nothing_behind(load: Load, card: ModelCard) -> None:
    engine = load(batch_size=32, batch_wait_s=0.0)

    orders = [order(card, steps=2, guidance_scale=1.0, seed=seed) for seed in range(20)]

    async def rounds() -> int:
        finished = 0
        for number in range(50):
            mates = [events_of(engine, one) for one in orders[:10]]
            gone = [left_after(engine, one, 1 + number % 2) for one in orders[10:]]
            results = await asyncio.gather(*mates, *gone)
            finished += sum(len(images_of(events)) for events in results if events is not None)
        return finished

    assert asyncio.run(rounds()) == 500
    stats = engine.stats()
    assert (stats["orders"], stats["waiting"]) == (0, 0)
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one).__name__ in ("_UnderWay", "_Sample")]


# --- what fails


def test_a_reference_that_cannot_be_read_fails_its_own_order_alone(
    engine: Engine, card: ModelCard, tmp_path: Path
) -> None:
    good = guided_by(card, write_photograph(tmp_path / "one.png", 1).read_bytes())
    bad = guided_by(card, b"no image", 2)

    async def together() -> list[Any]:
        tasks = [events_of(engine, one) for one in (good, bad, good)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, error, second = asyncio.run(together())
    assert isinstance(error, DataError)
    assert next(iter(bad.uploads)) in str(error)
    assert "/" not in str(error).split(" cannot be used")[0]
    assert same_images(first, drawn(engine, good)[0])
    assert same_images(second, first)
    assert engine.stats()["orders"] == 0


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_one_that_never_fits_says_so(
    load: Load, card: ModelCard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, room, real = load(), 3, Generator.denoise
    expected = drawn(engine, order(card, 8))[0]

    def denoise(self: Generator, rows: Sequence[PlanRow], watch: Any = None) -> torch.Tensor:
        if len(rows) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, rows, watch)

    monkeypatch.setattr(Generator, "denoise", denoise)
    with caplog.at_level(logging.WARNING):
        assert same_images(drawn(engine, order(card, 8))[0], expected)
    assert engine.stats()["batch_size"] == 2
    assert len(caplog.records) == 2  # 8 to 4, 4 to 2
    room = 0
    with pytest.raises(ConfigError, match="not even one image"):
        drawn(engine, order(card, 2))
    room = 8
    assert len(images_of(drawn(engine, order(card, 2))[0])) == 2


def test_a_model_without_numbers_is_told_to_each_order_and_the_engine_goes_on(
    engine: Engine, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "velocity", lambda self, x, t, context: x * float("nan"))

        async def both() -> list[Any]:
            return await asyncio.gather(*(events_of(engine, order(card)) for _ in range(2)), return_exceptions=True)

        assert [type(error) for error in asyncio.run(both())] == [CheckpointError] * 2
    assert len(images_of(drawn(engine, order(card))[0])) == 1


# --- the checkpoint


def test_the_card_says_what_the_checkpoint_is(card: ModelCard, checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    assert (card.sha256, card.step, card.image_size) == (loaded.sha256, 1000, 16)
    assert (card.has_prior, card.has_extractor) == (True, False)
    assert card.checkpoint == str(checkpoint.resolve())
    files = checkpoint.rglob("*.safetensors")
    assert card.size_bytes == sum(file.stat().st_size for file in files)


def test_another_checkpoint_than_the_card_s_is_refused_in_one_line(
    card: ModelCard, config: ServeConfig, executor: ThreadPoolExecutor
) -> None:
    with pytest.raises(CheckpointError, match=r"^[^\n]*000000000000 is to be served[^\n]*$"):
        Engine.load(replace(card, sha256="0" * 64), config, executor)


def test_a_checkpoint_is_in_use_until_its_engine_is_closed(
    card: ModelCard, config: ServeConfig, executor: ThreadPoolExecutor, checkpoint: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(checkpoint, tmp_path / "own")
    engine = Engine.load(replace(card, checkpoint=str(own)), config, executor)
    assert is_in_use(own / COMPLETE)
    engine.close()
    assert not is_in_use(own / COMPLETE)


@pytest.mark.parametrize(("feature", "message"), [("reference", "does not say which feature extractor")])
def test_a_feature_that_the_checkpoint_cannot_have_is_refused_in_one_line(
    load: Load, card: ModelCard, tmp_path: Path, feature: str, message: str
) -> None:
    wanted = guided_by(card, write_photograph(tmp_path / "one.png", 1).read_bytes())
    rows = tuple(replace(row, feature=cast(Any, feature)) for row in wanted.rows)
    with pytest.raises(CheckpointError, match=message):
        drawn(load(), replace(wanted, rows=rows))
