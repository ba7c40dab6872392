"""A loaded checkpoint that many orders share. Knows neither HTTP nor Ray; runs in one event loop.

Orders become single samples. Waiting samples of the same solver settings share a batch, whoever asked for them; an
image does not depend on who does. Passes run one after another in a thread that is given, looking at images and
encoding them in others, so the event loop never waits. A sample that nobody wants any more leaves its batch at the next
step of the solver.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2d.errors import CheckpointError, ConfigError, M2DError
from m2d.files.atomic import COMPLETE
from m2d.files.paths import checkpoint_folder
from m2d.files.progress import say
from m2d.generation.gates import GateReference, GatesAtWork, active_gates, prepare_gates
from m2d.generation.generator import Generator, batch_key, pick_feature, require_prior, start_of
from m2d.generation.output import Recipe, encode_png
from m2d.generation.plan import PlanRow, retried
from m2d.generation.provenance import signing_of
from m2d.generation.references import extractor_settings, load_reference_extractor
from m2d.generation.settings import GenerateConfig
from m2d.generation.workers import Looked, journal_rows, look_at
from m2d.models.checkpoint import (
    CONDITIONING,
    EXPORTED,
    PRIOR,
    WEIGHTS,
    checkpoint_sha256,
    hold_checkpoint,
    load_checkpoint,
    read_info,
    read_prior,
)
from m2d.models.settings import require_extractor
from m2d.serving.orders import (
    Drawn,
    Event,
    ModelCard,
    Order,
    Overloaded,
    Preview,
    Progress,
    Refused,
)
from m2d.serving.settings import ServeConfig

logger = logging.getLogger(__name__)
_PREVIEW_SIDE = 128  # pixels, at most
_STEPS_AHEAD = 2  # that the host may be ahead of a GPU: never waited for, and never long in noticing who is gone
_FILLS = 100  # last passes whose batches' fill is told


def describe(path: str, name: str, licence: str, extractor_weights: str | None = None) -> ModelCard:
    """The card of a checkpoint. Reads its description and hashes its weights; loads no network.

    extractor_weights: as of load_reference_extractor. Raises CheckpointError where it cannot be served.
    """
    with hold_checkpoint(path) as held:
        directory = Path(checkpoint_folder(held))
        info = read_info(directory)
        try:
            extractor: tuple[Any, ...] = extractor_settings(info, held, extractor_weights)
            require_extractor(*extractor)
            has_extractor = True
        except M2DError:
            has_extractor = False
        weights = [f"vae/{WEIGHTS}", f"unet/{WEIGHTS}", CONDITIONING, PRIOR, EXPORTED]
        return ModelCard(
            name=name,
            checkpoint=str(directory),
            sha256=checkpoint_sha256(directory),
            step=info.step,
            stage=info.stage,
            image_size=info.image_size,
            classes=info.classes,
            extractor=info.feature_extractor,
            has_prior=read_prior(directory, info) is not None,
            has_extractor=has_extractor,
            size_bytes=sum(file.stat().st_size for file in map(directory.joinpath, weights) if file.is_file()),
            created=int((directory / COMPLETE).stat().st_mtime),
            licence=licence,
        )


@dataclass(eq=False, kw_only=True)
class _UnderWay:
    """An order and what its reader has not taken yet."""

    order: Order
    recipe: Recipe
    left: int  # images whose end is not told
    total: int  # solver steps
    done: int = 0
    closed: bool = False  # nobody wants it any more; read in the thread of the passes
    events: deque[Event | Exception] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, event: Event | Exception) -> None:
        """To the reader. A slow one is told the newest progress alone."""
        if isinstance(event, Progress) and self.events and isinstance(self.events[-1], Progress):
            self.events.pop()
        self.events.append(event)
        self.news.set()


@dataclass(eq=False, kw_only=True)
class _Sample:
    """An image that is asked for, at its present attempt."""

    number: int  # of all samples: who came first
    of: _UnderWay
    index: int  # in the order
    row: PlanRow
    attempts: int = 1
    done: int = 0  # steps of this attempt

    @property
    def steps(self) -> int:
        """Of the solver, in one attempt."""
        return start_of(self.row)[1]

    @property
    def preview_steps(self) -> list[int]:
        """After which previews are made: evenly spaced, and none where no step is in between."""
        parts = self.of.order.previews + 1
        return sorted({self.steps * part // parts for part in range(1, parts)} - {0})


class Engine:
    """One checkpoint on a device. `draw` may be called any number of times at once, in one event loop."""

    def __init__(
        self, card: ModelCard, generator: Generator, gates: GatesAtWork, config: ServeConfig, executor: Executor
    ) -> None:
        """See `load`. executor: of one thread, in which everything on the device happens; engines may share it."""
        self.card = card
        self.passes = 0  # of batches through the solver
        self.images = 0  # made and kept
        self._generator, self._gates, self._config, self._executor = generator, gates, config, executor
        self._reference = None if gates.reference is None else GateReference.load(gates.reference)
        self._signing = signing_of(config.sign, config.sign_key)
        self._weak = frozenset(generator.checkpoint.prior.weak if generator.checkpoint.prior else ())
        self._held = ExitStack()
        self._orders: set[_UnderWay] = set()
        self._waiting: list[_Sample] = []  # those who came first are first
        self._samples = 0
        self._work: asyncio.Task[None] | None = None
        self._finishing: set[asyncio.Task[None]] = set()
        self._fills: deque[float] = deque(maxlen=_FILLS)
        self._seconds = 0.0

    @classmethod
    def load(cls, card: ModelCard, config: ServeConfig, executor: Executor) -> Self:
        """Load the card's checkpoint; what the gates hold images against is made if need be, which takes minutes.

        The checkpoint is not removed by training or `clean` until `close`. Raises an M2DError, in one line: a
        CheckpointError where the directory holds another checkpoint than the card's, or none.
        """
        with ExitStack() as held:
            path = held.enter_context(hold_checkpoint(card.checkpoint))
            checkpoint = load_checkpoint(path)
            if checkpoint.sha256 != card.sha256:
                raise CheckpointError(
                    f"checkpoint: {card.checkpoint} is {checkpoint.sha256[:12]} now, and {card.sha256[:12]} is to be "
                    "served; name it again"
                )
            settings = GenerateConfig(
                checkpoint=path, gates=config.gates, extractor_weights=config.extractor_weights, device=config.device
            )
            generator = Generator(
                checkpoint,
                batch_size=config.batch_size,
                device=config.device,
                mixed_precision=config.mixed_precision,
            )
            gates = prepare_gates(settings, checkpoint, None, str(generator.device))
            if gates.build is not None:
                try:
                    gates.build()
                except M2DError as error:
                    off = "the gates near_copy and class_consistency are off, for what they need cannot be made"
                    say(f"warning: {off} ({error}); new images may repeat old ones")
                    gates = GatesAtWork(gates.config, active_gates(gates.config, features=False, pixels=False))
            if gates.extractor is not None:
                generator.take_extractor(gates.extractor)
            engine = cls(card, generator, gates, config, executor)
            engine._held.push(held.pop_all())
            return engine

    def close(self) -> None:
        """Give up the orders under way, if any, and let the checkpoint go."""
        for under in list(self._orders):
            self._end(under, Overloaded("the model is being replaced; ask again"))
        self._held.close()

    def stats(self) -> dict[str, float]:
        """Plain numbers, for metrics."""
        on_gpu = self._generator.device.type == "cuda"
        return {
            "waiting": len(self._waiting),
            "orders": len(self._orders),
            "passes": self.passes,
            "images": self.images,
            "batch_size": self._generator.batch_size,
            "batch_fill": sum(self._fills) / len(self._fills) if self._fills else 0.0,
            "pass_seconds": self._seconds,
            "gpu_memory_bytes": torch.cuda.memory_reserved(self._generator.device) if on_gpu else 0,
        }

    async def draw(self, order: Order) -> AsyncIterator[Event]:
        """What becomes of the order's images, see orders.py. Closing the iterator gives the order up.

        The deadline is its caller's. Raises an M2DError: ConfigError for a feature that the checkpoint does not have,
        DataError for a reference that cannot be read.
        """
        loop = asyncio.get_running_loop()
        rows, config = order.rows, order.config
        drawn = [row.label for row in rows if row.feature == "prior"]
        if drawn:
            require_prior(self._generator.checkpoint).require(list(dict.fromkeys(drawn)))
        if any(row.feature == "reference" for row in rows):
            await loop.run_in_executor(self._executor, self._need_extractor)
        recipe = Recipe.of(
            config,
            checkpoint=self.card.sha256,
            precision=self._generator.precision,
            feature=pick_feature(config.feature or config.own_feature, self._generator.checkpoint),
            gates=self._gates.record,
            plan=order.plan,
            classes=self.card.classes.codes,
            time_shift=self._generator.time_shift,
            sign=None if self._signing is None else self._signing.sha256,
        )
        under = _UnderWay(order=order, recipe=recipe, left=len(rows), total=sum(start_of(row)[1] for row in rows))
        self._orders.add(under)
        try:
            self._enqueue(
                _Sample(number=self._samples + index, of=under, index=index, row=row) for index, row in enumerate(rows)
            )
            self._samples += len(rows)
            while under.left or under.events:
                if not under.events:
                    under.news.clear()
                    await under.news.wait()
                event = under.events.popleft()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self._end(under)

    def _need_extractor(self) -> None:
        if self._generator.extractor is None:
            self._generator.take_extractor(
                load_reference_extractor(self._generator.checkpoint, self._config.extractor_weights)
            )

    def _end(self, under: _UnderWay, error: Exception | None = None) -> None:
        """Nothing more is made for it."""
        if under.closed:
            return
        under.closed = True
        self._orders.discard(under)
        self._waiting = [sample for sample in self._waiting if sample.of is not under]
        if error is not None:
            under.tell(error)

    # --- batches ------------------------------------------------------------------------------------------------------

    def _enqueue(self, samples: Iterable[_Sample]) -> None:
        for sample in samples:
            if not sample.of.closed:
                insort(self._waiting, sample, key=lambda one: one.number)
        if self._waiting and (self._work is None or self._work.done()):
            self._work = asyncio.create_task(self._draw_all())

    async def _draw_all(self) -> None:
        """Passes until nothing waits.

        Where fewer wait than have just been drawn, those who now get their images are likely to ask again: begun
        without them, small and large batches would take turns for good. Solver settings take turns: a large order
        keeps one of other settings waiting for a pass, not for all of its own.
        """
        company, key = self._generator.batch_size, None
        while self._waiting:
            if len(self._waiting) < company:
                if self._finishing:
                    await asyncio.wait(self._finishing)
                await asyncio.sleep(self._config.batch_wait_s)
            keys = [batch_key(sample.row) for sample in self._waiting]  # the oldest first
            key = next((other for other in keys if other != key), key)
            batch = [sample for sample in self._waiting if batch_key(sample.row) == key][: self._generator.batch_size]
            self._waiting = [sample for sample in self._waiting if sample not in batch]
            await self._pass(batch)
            company = min(len(batch), self._generator.batch_size)

    async def _pass(self, batch: Sequence[_Sample]) -> None:
        """Draw a batch. Where that fails, each order's samples are drawn alone, and who fails alone is told so."""
        loop = asyncio.get_running_loop()
        batch = [sample for sample in batch if not sample.of.closed]
        if not batch:
            return
        self.passes += 1
        self._fills.append(len(batch) / self._generator.batch_size)
        began = time.monotonic()
        try:
            made = await loop.run_in_executor(self._executor, self._draw_batch, batch, loop)
        except Exception as error:
            for sample in batch:  # their attempts are to be repeated
                sample.of.done -= sample.done
                sample.done = 0
            if isinstance(error, torch.OutOfMemoryError):
                device, half = self._generator.device, len(batch) // 2
                if half:
                    self._generator.batch_size = half
                    logger.warning("%d images at once do not fit %s; from now on %d", len(batch), device, half)
                    self._enqueue(batch)
                    return
                error = ConfigError("not even one image at once fits the memory of the device")
            orders = list(dict.fromkeys(sample.of for sample in batch))
            if len(orders) == 1:
                self._end(orders[0], error)
                return
            failed = [[sample for sample in batch if sample.of is under] for under in orders]
        else:
            if made is not None:
                task = asyncio.create_task(self._finish(*made))
                self._finishing.add(task)
                task.add_done_callback(self._finishing.discard)
            return
        finally:
            self._seconds += time.monotonic() - began
        for part in failed:
            await self._pass(part)

    def _draw_batch(
        self, batch: Sequence[_Sample], loop: asyncio.AbstractEventLoop
    ) -> tuple[list[_Sample], np.ndarray, np.ndarray | None] | None:
        """In the device's thread: those who stayed, their images uint8 [N, H, W, 3] and features where the gates ask.

        None: nobody stayed.
        """
        staying = [sample for sample in batch if not sample.of.closed]
        if not staying:
            return None
        generator, ahead = self._generator, deque[torch.cuda.Event]()

        def watch(step: int, clean: Tensor) -> list[int] | None:
            if clean.is_cuda:
                event = torch.cuda.Event()
                event.record()
                ahead.append(event)
                if len(ahead) > _STEPS_AHEAD:
                    ahead.popleft().synchronize()
            wanted = [place for place, sample in enumerate(staying) if not sample.of.closed]
            shown = [place for place in wanted if step in staying[place].preview_steps]
            previews = []
            if shown:
                pictures = generator.decode(torch.stack([clean[place] for place in shown]))
                for place, picture in zip(shown, pictures, strict=True):
                    sample = staying[place]
                    number = sample.preview_steps.index(step)
                    previews.append((sample, Preview(index=sample.index, number=number, png=_small_png(picture))))
            left = len(staying)
            staying[:] = [staying[place] for place in wanted]
            loop.call_soon_threadsafe(self._stepped, list(staying), step, previews)
            return None if len(wanted) == left else wanted

        generator.uploads = {name: one for sample in staying for name, one in sample.of.order.uploads.items()}
        try:
            latents = generator.denoise([sample.row for sample in staying], watch)
        finally:
            generator.uploads = {}
        if not staying:
            return None
        images = generator.decode(latents)
        return staying, images, generator.features(images) if self._gates.need_features else None

    def _stepped(self, samples: Sequence[_Sample], step: int, previews: Sequence[tuple[_Sample, Preview]]) -> None:
        for sample in samples:
            sample.of.done += step - sample.done
            sample.done = step
        for under in dict.fromkeys(sample.of for sample in samples):
            if not under.closed:
                under.tell(Progress(done=under.done, total=under.total))
        for sample, preview in previews:
            if not sample.of.closed:
                sample.of.tell(preview)

    # --- finished images ----------------------------------------------------------------------------------------------

    async def _finish(self, samples: Sequence[_Sample], images: np.ndarray, features: np.ndarray | None) -> None:
        """Tell what became of a batch; what the gates refused waits again."""
        rows = [sample.row for sample in samples]
        try:
            looked = await asyncio.to_thread(look_at, rows, images, features, self._gates.config, self._reference)
        except Exception as error:
            for under in dict.fromkeys(sample.of for sample in samples):
                self._end(under, error)
        else:
            await asyncio.gather(*map(self._tell, samples, looked, images))

    async def _tell(self, sample: _Sample, looked: Looked, image: np.ndarray) -> None:
        under = sample.of
        if under.closed:
            return
        if sample.done < sample.steps:  # without noise there is no step
            self._stepped([sample], sample.steps, [])
        if not looked.kept and sample.attempts < self._config.gates.max_attempts:
            under.total += sample.steps
            sample.row, sample.attempts, sample.done = retried(sample.row), sample.attempts + 1, 0
            self._enqueue([sample])
            return
        event: Event
        if looked.verdict is not None and not looked.kept:
            event = Refused(index=sample.index, reason=str(looked.verdict.reason), attempts=sample.attempts)
        else:
            try:
                event = await asyncio.to_thread(self._encode, sample, looked, image)
            except Exception as error:
                self._end(under, error)
                return
            self.images += 1
        under.left -= 1
        under.tell(event)

    def _encode(self, sample: _Sample, looked: Looked, image: np.ndarray) -> Drawn:
        row, recipe = looked.row, sample.of.recipe
        png = encode_png(image, row, recipe, self._signing)
        table = journal_rows([(looked, f"{row.label}/{row.id}.png", png)], image.shape[:2], recipe, self._weak)
        entry = table.drop_columns("accepted").to_pylist()[0]
        return Drawn(index=sample.index, png=png, entry=entry, gates=self._gates.names)


def _small_png(image: np.ndarray) -> bytes:
    """Of uint8 [H, W, 3]."""
    picture = Image.fromarray(image)
    picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
