"""The training stream in one process: the batches of m2d.data.stream without Ray, for tests and notebooks."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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

    def read(micro_batch: int) -> dict[str, np.ndarray]:
        rows = worker_rows(
            micro_batch,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            step_micro_batches=step_micro_batches,
        )
        return reader.read(*order.lookup(rows)) | {"stream_rows": rows}

    thread = ThreadPoolExecutor(1, thread_name_prefix="m2d-local-stream")
    ahead: deque[Future[dict[str, np.ndarray]]] = deque()
    try:
        for place in range(num_micro_batches + PREFETCHED_BATCHES):
            if place < num_micro_batches:
                ahead.append(thread.submit(read, start_micro_batch + place))
            if place >= PREFETCHED_BATCHES:
                yield {name: torch.from_numpy(column) for name, column in ahead.popleft().result().items()}
    finally:
        thread.shutdown(cancel_futures=True)
