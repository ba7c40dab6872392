"""The training stream on Ray Data: one execution for the whole rest of a run, each worker's rows fixed by arithmetic.

The dataset is a list of block numbers. One block is some consecutive micro-batches of one worker. A task looks up which
images those are (m2d.data.order) and decodes them (m2d.data.reader), into a single row of tensors, which Ray cannot cut
in two; Ray deals the blocks out to the workers in turn.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data.block import BlockMetadata
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.data.datasource import Datasource, ReadTask

from m2d.cluster.fan_out import raise_user_error
from m2d.cluster.nodes import node_resources
from m2d.data.order import Share, StreamOrder
from m2d.data.reader import ImageReader
from m2d.errors import TrainingError

if TYPE_CHECKING:  # every decoding process imports this file, and it needs neither: seconds and 200 MB each
    import torch

BLOCK_IMAGES = 512  # a task costs Ray 15 to 25 ms, so it should decode for some hundred
BLOCK_BYTES = 48 * 2**20  # of pixels; a handful of blocks a core are in flight
BLOCKS_PER_TASK = 1000  # of the tasks that number them
ENCODED_CHUNK_BYTES = 256 * 2**20  # the driver holds one chunk at a time on its way to the object store
OPEN_STREAMS = 2  # a worker process may serve the training and the validation stream in turn
PREFETCHED_BLOCKS = 1  # of each worker, in addition to the one it consumes and those in the object store


@dataclass(frozen=True)
class BlockPlan:
    """Which micro-batches are in which block. Blocks are dealt out in turn: block b is for worker b % world_size."""

    share: Share  # of any worker
    turns: range  # of each worker
    block_micro_batches: int

    @property
    def num_blocks(self) -> int:
        """Of all workers together. Each has as many, and its last one may be shorter, equally so for all."""
        return -(-len(self.turns) // self.block_micro_batches) * self.share.world_size

    def stream_rows(self, block: int) -> np.ndarray:
        """The stream rows of a block, int64 [micro-batches * batch_size]."""
        number, rank = divmod(block, self.share.world_size)
        share, first = replace(self.share, rank=rank), number * self.block_micro_batches
        return np.concatenate([share.rows(turn) for turn in self.turns[first : first + self.block_micro_batches]])


def build_stream(
    reader: ImageReader, order: StreamOrder, share: Share, turns: range, *, object_store_share: float, read_cpus: float
) -> ray.data.Dataset:
    """The micro-batches of these turns of every worker (share: of any of them), decoded on demand.

    TorchTrainer splits it under `stream_options`, as streaming_split(num_workers, equal=True) does; each worker
    reads its shard with `iterate_stream` and the same turns. Call it in a process that lives as long as the run.
    object_store_share: encoded files are put into the object store once, if they fit this share of each node's store;
    otherwise tasks read data_root. read_cpus: logical CPUs of a decoding task.
    """
    block_images = min(BLOCK_IMAGES, BLOCK_BYTES // (3 * reader.image_size**2))
    # Of a short run every core gets a share.
    plan = BlockPlan(share, turns, max(1, min(block_images // share.batch_size, -(-len(turns) // 4))))
    # Each node that can decode gets a copy of the encoded files.
    stores = [node.get("object_store_memory", 0.0) for node in node_resources() if node.get("CPU", 0) > 0]
    chunks = _put_encoded(reader) if reader.sizes.sum() <= object_store_share * min(stores, default=0.0) else []
    source = ray.put(_Source(reader, order, chunks))
    # ray.data.range with a task for each block costs Ray 1.8 ms and 8 KB each before the first batch: minutes in a long
    # run. So few tasks number the blocks. They ask for no CPU: they would not share the last one with decoding.
    numbers = _BlockNumbers(plan.num_blocks)
    stream: ray.data.Dataset = ray.data.read_datasource(
        numbers, override_num_blocks=numbers.num_tasks, num_cpus=0, concurrency=1
    ).map_batches(partial(_decode_block, source, plan), batch_size=None, num_cpus=read_cpus, zero_copy_batch=True)
    context = stream.context
    context.target_max_block_size = 1  # byte: each row, a block's number or its images, is a block of its own
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = -1  # a worker may well evaluate for half an hour between two batches
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    return stream


def stream_options() -> ray.data.ExecutionOptions:
    """For a trainer's DataConfig(execution_options=..., enable_shard_locality=False): blocks are dealt out in turn."""
    return ray.data.ExecutionOptions(preserve_order=True)


def iterate_stream(
    shard: ray.data.DataIterator, share: Share, turns: range, *, pin_memory: bool = False
) -> "Iterator[dict[str, torch.Tensor]]":
    """The worker's micro-batches from its shard of `build_stream`, each full, on the CPU.

    Yields images uint8 [B, S, S, 3], labels, catalog_rows, stream_rows int64 [B], views int8 [B], substituted bool [B].
    The consumer owns them: a background thread copies them out of the object store.
    Raises TrainingError when Ray delivers other rows than the arithmetic assigns to this worker, and the M2DError that
    a decoding task raised.
    """
    collated: dict[str, Any] = {"collate_fn": _OwnedTensors(), "device": "cpu", "pin_memory": pin_memory}
    blocks: Any = iter(shard.iter_torch_batches(batch_size=1, prefetch_batches=PREFETCHED_BLOCKS, **collated))
    batches: Iterator[dict[str, torch.Tensor]] = (
        {name: column[first : first + share.batch_size] for name, column in block.items()}
        for block in blocks
        for first in range(0, len(block["stream_rows"]), share.batch_size)
    )
    where = f"data stream: worker {share.rank} of {share.world_size} got"
    try:
        for micro_batch in turns:
            batch = next(batches, None)
            if batch is None:
                raise TrainingError(
                    f"{where} no rows for micro-batch {micro_batch}: the stream ends earlier. Build it with the "
                    "numbers that iterate_stream is given."
                )
            found, expected = batch["stream_rows"].numpy(), share.rows(micro_batch)
            if not np.array_equal(found, expected):
                raise TrainingError(
                    f"{where} rows {found[0]}..{found[-1]} for micro-batch {micro_batch} in place of "
                    f"{expected[0]}..{expected[-1]}: Ray Data did not deal the blocks out in turn. Give the trainer's "
                    "DataConfig stream_options(), and build the stream for as many workers as it starts and for the "
                    "micro-batch at which they start."
                )
            yield batch
    except ray.exceptions.RayError as error:
        raise_user_error(error)
    finally:
        blocks.close()  # lets Ray stop decoding ahead


@dataclass(frozen=True)
class _Source:
    """What every decoding task needs, sent to each node once."""

    reader: ImageReader
    order: StreamOrder
    chunks: "list[ray.ObjectRef[pa.ChunkedArray]]"  # encoded bytes; none: rows are read from storage


def _decode_block(reference: "ray.ObjectRef[_Source]", plan: BlockPlan, block: Any) -> Any:
    """The map function: dict[str, np.ndarray] each, Ray's own type takes no narrower one.

    Ray sends its arguments with each task, so the source is fetched once by each worker process.
    """
    source = _open_source(reference)
    rows = plan.stream_rows(int(block["block"][0]))
    columns = source.reader.read(*source.order.lookup(rows)) | {"stream_rows": rows}
    return {name: column[np.newaxis] for name, column in columns.items()}


class _BlockNumbers(Datasource):
    """0 .. count - 1, in few tasks and many blocks of one number each."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count = count
        self.num_tasks = -(-count // BLOCKS_PER_TASK)

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._count

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        tasks = []
        for start in range(0, self._count, BLOCKS_PER_TASK):
            blocks = range(start, min(start + BLOCKS_PER_TASK, self._count))
            facts = BlockMetadata(num_rows=len(blocks), size_bytes=8 * len(blocks), input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(_number_blocks, blocks), facts))
        return tasks


def _number_blocks(blocks: range) -> Iterator[pa.Table]:
    for block in blocks:
        yield pa.table({"block": np.array([block])})


class _OwnedTensors(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, np.ndarray]) -> Any:  # dict[str, torch.Tensor]; Ray's own type is unbound
        import torch

        return {name: torch.from_numpy(np.array(column[0])) for name, column in batch.items()}


# Of this worker process, so that the next task finds permutations cached and bad files known.
_open_sources: OrderedDict[str, _Source] = OrderedDict()


def _open_source(reference: "ray.ObjectRef[_Source]") -> _Source:
    key = reference.hex()
    if key not in _open_sources:
        source = ray.get(reference)
        if source.chunks:
            # No copy: the arrays are in the object store's memory.
            pieces = [piece for chunk in ray.get(source.chunks) for piece in chunk.chunks]
            source.reader.attach(pa.chunked_array(pieces, type=pa.large_binary()))
        _open_sources[key] = source
        while len(_open_sources) > OPEN_STREAMS:
            _open_sources.popitem(last=False)
    return _open_sources[key]


def _put_encoded(reader: ImageReader) -> "list[ray.ObjectRef[pa.ChunkedArray]]":
    """All encoded files as Arrow chunks in the object store."""
    chunk_of_row = np.cumsum(reader.sizes) // ENCODED_CHUNK_BYTES
    bounds = [0, *(np.flatnonzero(np.diff(chunk_of_row)) + 1).tolist(), len(reader)]
    return [ray.put(reader.load_encoded(first, stop)) for first, stop in pairwise(bounds)]
