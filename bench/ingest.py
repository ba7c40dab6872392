"""How fast training images arrive: M2D's stream beside torch's DataLoader, ray.data.read_images and the decode limit.

python bench/ingest.py --data_root ../shared/ham10000 --image_size 128 --output bench/out/ingest.json

Every contender decodes for a consumer that does nothing. Repetitions are interleaved (A B C, A B C), so that a busy
machine hurts all alike. Each repetition starts its contender again; the first `warmup` images are not timed, and the
seconds to the first batch stand in a column of their own. No contender is at its end when the clock stops, so nothing
that was decoded ahead of the warm-up is a gift. CPU microseconds an image are of this process and its descendants,
Ray's own among them: they say what a contender costs even where other programs share the cores.
"""

import contextlib
import json
import logging
import os
import platform
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.data
import torch
from jsonargparse import auto_cli
from PIL import Image

from m2d.data.catalog import scan_dataset
from m2d.data.order import Share, StreamOrder
from m2d.data.reader import ImageReader
from m2d.data.settings import DataConfig
from m2d.data.stream import build_stream, iterate_stream

MAX_PIXELS = 100_000_000
ENLARGED_SIZE = (600, 450)  # HAM10000 as published
SPARE_MICRO_BATCHES = 4096 // 32  # beyond what is timed

Batches = Iterator[int]  # sizes of batches as they arrive


@dataclass(frozen=True)
class Measurement:
    """All repetitions of one contender on one dataset."""

    dataset: str
    contender: str
    images_per_s: float  # median
    lowest: float
    highest: float
    repetitions: int
    first_batch_s: float  # median
    cpu_us: float  # CPU microseconds an image, median


@dataclass(frozen=True)
class Run:
    """One repetition of one contender."""

    first_batch_s: float
    images_per_s: float
    cpu_us: float


@dataclass(frozen=True)
class Workload:
    """What all contenders share."""

    reader: ImageReader  # encoded bytes attached
    order: StreamOrder
    data_root: str
    batch_size: int
    images: int
    warmup: int
    cores: int

    @property
    def micro_batches(self) -> int:
        """Of all workers together, and more than are consumed."""
        return (self.images + self.warmup) // self.batch_size + SPARE_MICRO_BATCHES


def main(
    data_root: str = "../shared/ham10000",
    image_size: int = 128,
    images: int = 8192,
    warmup: int = 2048,
    batch_size: int = 64,
    repetitions: int = 5,
    enlarged: int = 2000,
    decoders: bool = False,
    output: str | None = None,
) -> None:
    """Measure and print a table.

    Args:
        data_root: class folders of images
        image_size: pixels a side
        images: timed images in a repetition
        warmup: images before them
        batch_size: images in a batch
        repetitions: of each contender on each dataset
        enlarged: how many images are also measured at 600 x 450, JPEG quality 90 (0: none)
        decoders: only Pillow's and torchvision's decoders, one core each
        output: JSON file for the measurements
    """
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    datasets = {"as it is": data_root}
    if enlarged:
        datasets[f"{enlarged} images at 600 x 450"] = str(enlarge(Path(data_root), enlarged))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only; token mode would write to the home directory
    if not decoders:
        ray.init(
            num_cpus=cores,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=2 * 2**30,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    measurements: list[Measurement] = []
    try:
        for name, root in datasets.items():
            catalog = scan_dataset(root, DataConfig(image_size=image_size)).catalog
            reader = ImageReader(catalog, root, image_size=image_size, max_pixels=MAX_PIXELS)
            reader.attach(reader.load_encoded())
            order = StreamOrder(reader.labels, balance="natural", views=1, seed=0)  # read_images has no views
            workload = Workload(reader, order, root, batch_size, images, warmup, cores)
            measurements += measure(name, workload, DECODERS if decoders else CONTENDERS, repetitions)
    finally:
        ray.shutdown()
    report(measurements)
    if output:
        settings = {"image_size": image_size, "images": images, "warmup": warmup, "batch_size": batch_size}
        machine = {"cores": cores, "machine": platform.machine(), "ray": ray.__version__, "torch": torch.__version__}
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(
            json.dumps({**settings, **machine, "measurements": [asdict(row) for row in measurements]}, indent=1) + "\n"
        )


def measure(
    dataset: str, workload: Workload, contenders: dict[str, Callable[[Workload], Batches]], repetitions: int
) -> list[Measurement]:
    """Every contender `repetitions` times, interleaved."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for repetition in range(repetitions):
        for name, contender in contenders.items():
            run = timed(contender, workload)
            runs[name].append(run)
            print(f"{dataset}, repetition {repetition + 1}: {name} {run.images_per_s:,.0f} images/s", flush=True)
    return [
        Measurement(
            dataset=dataset,
            contender=name,
            images_per_s=statistics.median(run.images_per_s for run in of_name),
            lowest=min(run.images_per_s for run in of_name),
            highest=max(run.images_per_s for run in of_name),
            repetitions=repetitions,
            first_batch_s=statistics.median(run.first_batch_s for run in of_name),
            cpu_us=statistics.median(run.cpu_us for run in of_name),
        )
        for name, of_name in runs.items()
    ]


def timed(contender: Callable[[Workload], Batches], workload: Workload) -> Run:
    """One repetition."""
    start = time.perf_counter()
    batches = contender(workload)
    seen = next(batches)
    first = time.perf_counter() - start
    while seen < workload.warmup:
        seen += next(batches)
    warm, warm_cpu, warm_seen = time.perf_counter(), _cpu_seconds(), seen
    while seen < workload.warmup + workload.images:
        seen += next(batches)
    images, seconds, end_cpu = seen - warm_seen, time.perf_counter() - warm, _cpu_seconds()
    batches.close()  # type: ignore[attr-defined]
    cpu = sum(used - warm_cpu.get(process, 0.0) for process, used in end_cpu.items())
    return Run(first, images / seconds, 1e6 * cpu / images)


def decode_limit(workload: Workload) -> Batches:
    """One core, no hand-over: what the decoder itself can do."""
    for start in range(0, workload.micro_batches * workload.batch_size, workload.batch_size):
        rows = np.arange(start, start + workload.batch_size)
        yield len(workload.reader.read(*workload.order.lookup(rows))["images"])


def torchvision_limit(workload: Workload) -> Batches:
    """The same by torchvision's decoder, which decodes at full size, and its antialiased bicubic resize."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import center_crop, resize

    size, reader = workload.reader.image_size, workload.reader
    for start in range(0, workload.micro_batches * workload.batch_size, workload.batch_size):
        rows, _ = workload.order.lookup(np.arange(start, start + workload.batch_size))
        images = []
        for encoded in reader._fetch(rows):
            decoded = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
            scaled = resize(decoded, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
            images.append(center_crop(scaled, [size, size]))
        yield len(torch.stack(images).permute(0, 2, 3, 1).contiguous().numpy())


def stream(workload: Workload) -> Batches:
    """M2D's stream for one worker, consumed as a Train worker does."""
    (shard,) = _stream_shards(workload, 1)
    for batch in _shard_batches(shard, workload, 0, 1):
        yield len(batch["images"])


def stream_of_two(workload: Workload) -> Batches:
    """M2D's stream split for two workers; a batch is of either."""
    shards = _stream_shards(workload, 2)
    arrived: queue.Queue[int] = queue.Queue(4)
    stopped = threading.Event()

    def consume(rank: int) -> None:
        batches = _shard_batches(shards[rank], workload, rank, 2)
        for batch in batches:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    arrived.put(len(batch["images"]), timeout=0.1)
                    break
            if stopped.is_set():
                break
        batches.close()  # type: ignore[attr-defined]

    consumers = [threading.Thread(target=consume, args=(rank,)) for rank in range(2)]
    for consumer in consumers:
        consumer.start()
    try:
        while True:
            yield arrived.get()
    finally:
        stopped.set()
        for consumer in consumers:
            consumer.join()


def read_images(workload: Workload) -> Batches:
    """What Ray Data offers for a folder of images. It squeezes to a square; M2D crops one."""
    passes = -(-workload.micro_batches * workload.batch_size // len(workload.reader))
    dataset = ray.data.read_images([workload.data_root] * passes, size=(workload.reader.image_size,) * 2, mode="RGB")
    for batch in dataset.iter_torch_batches(batch_size=workload.batch_size, prefetch_batches=2):
        yield len(batch["image"])


def data_loader(workload: Workload) -> Batches:
    """torch's DataLoader as it is mostly written: an image at a time, default collate."""
    yield from _data_loader(_Images(workload), workload)


def data_loader_of_batches(workload: Workload) -> Batches:
    """torch's DataLoader at its best: a worker reads a whole batch into one array."""
    yield from _data_loader(_ImageBatches(workload), workload)


CONTENDERS: dict[str, Callable[[Workload], Batches]] = {
    "M2D stream, 1 worker": stream,
    "DataLoader, by image": data_loader,
    "M2D stream, 2 workers": stream_of_two,
    "DataLoader, by batch": data_loader_of_batches,
    "ray.data.read_images": read_images,
    "decode limit of one core": decode_limit,
}
DECODERS: dict[str, Callable[[Workload], Batches]] = {
    "Pillow, one core": decode_limit,
    "torchvision, one core": torchvision_limit,
}


def enlarge(data_root: Path, count: int) -> Path:
    """`count` images spread over the dataset, scaled to 600 x 450 and saved as JPEG of quality 90, once."""
    target = Path(__file__).parent / "out" / f"enlarged-{count}"
    if not (target / "complete").exists():
        files = sorted(path for path in data_root.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        for path in files[:: max(1, len(files) // count)][:count]:
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            enlarged = Image.open(path).convert("RGB").resize(ENLARGED_SIZE, Image.Resampling.BICUBIC)
            enlarged.save(target / path.parent.name / f"{path.stem}.jpg", quality=90)
        (target / "complete").touch()
    return target


def report(measurements: list[Measurement]) -> None:
    """A plain table; the ratio columns divide by the faster DataLoader and by read_images."""
    print(f"\n{'dataset':28} {'contender':26} {'images/s':>9} {'lowest':>8} {'highest':>8} ", end="")
    print(f"{'first s':>8} {'CPU us':>7} {'x DataLoader':>12} {'x read_images':>13}")
    for row in measurements:
        peers = {peer.contender: peer.images_per_s for peer in measurements if peer.dataset == row.dataset}
        loader = max((rate for name, rate in peers.items() if name.startswith("DataLoader")), default=float("nan"))
        print(
            f"{row.dataset:28} {row.contender:26} {row.images_per_s:9,.0f} {row.lowest:8,.0f} {row.highest:8,.0f} "
            f"{row.first_batch_s:8.2f} {row.cpu_us:7,.0f} {row.images_per_s / loader:12.2f} "
            f"{row.images_per_s / peers.get('ray.data.read_images', float('nan')):13.2f}"
        )
    print(f"median, lowest and highest of {measurements[0].repetitions} interleaved repetitions")


def _cpu_seconds() -> dict[psutil.Process, float]:
    """Of this process and everything below it that lives."""
    seconds = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process] = times.user + times.system
    return seconds


class _Images(torch.utils.data.Dataset[Any]):
    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __len__(self) -> int:
        return self.workload.micro_batches * self.workload.batch_size

    def __getitem__(self, row: int) -> dict[str, Any]:
        columns = self.workload.reader.read(*self.workload.order.lookup(np.array([row])))
        return {name: column[0] for name, column in columns.items()}


class _ImageBatches(_Images):
    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        columns = self.workload.reader.read(*self.workload.order.lookup(np.array(rows)))
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def _data_loader(images: _Images, workload: Workload) -> Batches:
    collate = (lambda batch: batch) if isinstance(images, _ImageBatches) else None
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=workload.batch_size,
        num_workers=workload.cores,
        persistent_workers=True,
        collate_fn=collate,
        multiprocessing_context="fork",  # the encoded bytes are shared, not copied
    )
    for batch in loader:
        yield len(batch["images"])


def _stream_shards(workload: Workload, workers: int) -> list[ray.data.DataIterator]:
    share, turns = Share(batch_size=workload.batch_size, world_size=workers), range(workload.micro_batches)
    dataset = build_stream(workload.reader, workload.order, share, turns, object_store_share=0.3, read_cpus=1.0)
    return list(dataset.streaming_split(workers, equal=True))


def _shard_batches(
    shard: ray.data.DataIterator, workload: Workload, rank: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    share = Share(batch_size=workload.batch_size, rank=rank, world_size=workers)
    return iterate_stream(shard, share, range(workload.micro_batches))


if __name__ == "__main__":
    auto_cli(main)
