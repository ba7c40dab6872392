"""The training stream in one process: the batches of m2d.data.stream without Ray, for tests and notebooks."""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch

from m2d.data.order import StreamOrder, worker_rows
from m2d.data.reader import ImageReader

PREFETCHED_BATCHES = 2


def iterate_local(
    reader: ImageReader,
    order: StreamOrder,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    start_micro_batch: int,
    num_micro_batches: int,
    step_micro_batches: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches start_micro_batch .. start_micro_batch + num_micro_batches - 1 of worker `rank`, each full.

    Yields images uint8 [B, S, S, 3], labels, catalog_rows, stream_rows int64 [B], views int8 [B], substituted bool [B];
    the consumer owns them. A thread decodes ahead; what it raises is raised here, and leaving the loop ends it.
    """
    batches: queue.Queue[dict[str, np.ndarray] | Exception] = queue.Queue(PREFETCHED_BATCHES)
    stopped = threading.Event()

    def hand_over(batch: dict[str, np.ndarray] | Exception) -> bool:
        while not stopped.is_set():
            try:
                batches.put(batch, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def decode_ahead() -> None:
        try:
            for micro_batch in range(start_micro_batch, start_micro_batch + num_micro_batches):
                rows = worker_rows(
                    micro_batch,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    step_micro_batches=step_micro_batches,
                )
                if not hand_over(reader.read(*order.lookup(rows)) | {"stream_rows": rows}):
                    return
        except Exception as error:  # raised again where the consumer can see it
            hand_over(error)

    thread = threading.Thread(target=decode_ahead, name="m2d-local-stream", daemon=True)
    thread.start()
    try:
        for _ in range(num_micro_batches):
            batch = batches.get()
            if isinstance(batch, Exception):
                raise batch
            yield {name: torch.from_numpy(column) for name, column in batch.items()}
    finally:
        stopped.set()
        thread.join()
