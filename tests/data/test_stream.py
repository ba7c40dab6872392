import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from m2d.data import stream as stream_module
from m2d.data.order import Share, StreamOrder
from m2d.data.reader import ImageReader, iterate_local
from m2d.data.store import PreparedImages, write_images
from m2d.data.stream import BlockPlan, build_stream, iterate_stream, stream_options
from m2d.errors import DataError, TrainingError

COUNTS = {"BCC": 9, "MEL": 14, "NV": 41}
ROWS = 64
SIZE, BATCH = 16, 4
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, paint_images: Any) -> ImageReader:
    data_root = tmp_path_factory.mktemp("painted")
    return ImageReader(paint_images(data_root, COUNTS), str(data_root), image_size=SIZE, max_pixels=10_000)


@pytest.fixture(scope="module")
def order(reader: ImageReader) -> StreamOrder:
    return StreamOrder(reader.labels, balance="natural", views=8, seed=5)


def local(
    reader: ImageReader, order: StreamOrder, start: int, number: int, rank: int = 0, world: int = 1
) -> list[Batch]:
    share = Share(batch_size=BATCH, rank=rank, world_size=world)
    return list(iterate_local(reader, order, share, range(start, start + number)))


def streamed(
    reader: ImageReader, order: StreamOrder, start: int, number: int, world: int, share: float = 0.3
) -> list[list[Batch]]:
    """What each of `world` workers gets from Ray, all reading at once."""
    workers = [Share(batch_size=BATCH, rank=rank, world_size=world) for rank in range(world)]
    turns = range(start, start + number)
    dataset = build_stream(reader, order, workers[0], turns, object_store_share=share, read_cpus=1.0)
    shards = dataset.streaming_split(world, equal=True)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda shard, worker: list(iterate_stream(shard, worker, turns)), shards, workers))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for batch, other in zip(found, expected):
        assert batch.keys() == other.keys()
        for name in batch:
            torch.testing.assert_close(batch[name], other[name], rtol=0, atol=0)


def test_a_local_batch_is_the_lookup_of_its_rows(reader: ImageReader, order: StreamOrder) -> None:
    for micro_batch, batch in enumerate(local(reader, order, 3, 5, rank=1, world=2), start=3):
        rows = Share(batch_size=BATCH, rank=1, world_size=2).rows(micro_batch)
        expected = reader.read(*order.lookup(rows)) | {"stream_rows": rows}
        assert batch.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(batch[name].numpy(), expected[name])


def test_a_resumed_local_stream_is_the_tail_of_the_unbroken_one(reader: ImageReader, order: StreamOrder) -> None:
    assert_same(local(reader, order, 17, 10), local(reader, order, 0, 27)[17:])


def test_a_local_error_reaches_the_consumer(tmp_path: Path, paint_images: Any, order: StreamOrder) -> None:
    catalog = paint_images(tmp_path, COUNTS)
    for path in tmp_path.glob("*/*"):
        path.unlink()
    broken = ImageReader(catalog, str(tmp_path), image_size=SIZE, max_pixels=10_000)
    with pytest.raises(DataError, match=r"\.png"):
        local(broken, order, 0, 2)


@pytest.mark.parametrize(("world", "number", "width"), [(1, 7, 3), (2, 8, 4), (3, 5, 2), (2, 1, 8)])
def test_blocks_dealt_out_in_turn_give_each_worker_its_rows(world: int, number: int, width: int) -> None:
    plan = BlockPlan(Share(batch_size=BATCH, world_size=world), range(11, 11 + number), width)
    blocks = [plan.stream_rows(block) for block in range(plan.num_blocks)]
    for rank in range(world):
        share = Share(batch_size=BATCH, rank=rank, world_size=world)
        expected = [share.rows(11 + m) for m in range(number)]
        np.testing.assert_array_equal(np.concatenate(blocks[rank::world]), np.concatenate(expected))
    assert stream_options().preserve_order
    for turn in range(0, plan.num_blocks, world):
        assert len({len(block) for block in blocks[turn : turn + world]}) == 1  # Ray's equal split cuts nothing off


@pytest.mark.ray
def test_ray_gives_every_worker_exactly_its_rows_and_the_local_pixels(
    ray_cluster: None, reader: ImageReader, order: StreamOrder
) -> None:
    """Two workers, two epochs and a short last block (19 micro-batches in blocks of 5)."""
    workers = streamed(reader, order, 0, 19, world=2)
    for rank, batches in enumerate(workers):
        assert_same(batches, local(reader, order, 0, 19, rank=rank, world=2))
    epoch = np.concatenate([batch["catalog_rows"] for pair in zip(*workers) for batch in pair])[:ROWS]
    assert sorted(epoch) == list(range(ROWS))


@pytest.mark.ray
def test_a_resumed_ray_stream_is_the_tail_of_the_unbroken_one(
    ray_cluster: None, reader: ImageReader, order: StreamOrder
) -> None:
    """From an odd micro-batch, by another number of tasks, and with files in place of the object store."""
    for rank, batches in enumerate(streamed(reader, order, 7, 6, world=2, share=1e-9)):
        assert_same(batches, local(reader, order, 0, 13, rank=rank, world=2)[7:])


@pytest.mark.ray
@pytest.mark.parametrize("share", [0.3, 1e-9], ids=["object store", "shards"])
def test_prepared_images_stream_as_decoded_ones_do(
    ray_cluster: None, reader: ImageReader, order: StreamOrder, tmp_path: Path, paint_images: Any, share: float
) -> None:
    """All but the last rows are prepared, and their files are gone."""
    root = tmp_path / "data"
    catalog = paint_images(root, COUNTS)
    paths = [root / path for path in catalog["path"].to_pylist()]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    catalog = catalog.set_column(catalog.column_names.index("sha256"), "sha256", pa.array(sums))
    pixels = reader.read(np.arange(ROWS), np.zeros(ROWS, dtype=np.int8))["images"]
    for first, stop in ((0, 20), (20, 50)):
        write_images(tmp_path / "cache", SIZE, sums[first:stop], pixels[first:stop])
        for path in paths[first:stop]:
            path.unlink()
    images = PreparedImages(tmp_path / "cache", SIZE)
    other = ImageReader(catalog, str(root), image_size=SIZE, max_pixels=10_000, prepared=images)
    (batches,) = streamed(other, order, 0, 16, world=1, share=share)
    assert_same(batches, local(reader, order, 0, 16))


@pytest.mark.ray
def test_the_consumer_owns_its_batches(ray_cluster: None, reader: ImageReader, order: StreamOrder) -> None:
    ((first, *_),) = streamed(reader, order, 0, 2, world=1)
    first["images"].zero_()
    ((again, *_),) = streamed(reader, order, 0, 2, world=1)
    assert again["images"].any()


@pytest.mark.ray
def test_rows_of_another_worker_are_an_error_not_silence(
    ray_cluster: None, reader: ImageReader, order: StreamOrder
) -> None:
    alone, turns = Share(batch_size=BATCH), range(2)
    dataset = build_stream(reader, order, alone, turns, object_store_share=0.3, read_cpus=1.0)
    (shard,) = dataset.streaming_split(1, equal=True)
    with pytest.raises(TrainingError, match=r"rows 0\.\.3 for micro-batch 0 in place of 4\.\.7.*stream_options"):
        next(iterate_stream(shard, Share(batch_size=BATCH, rank=1, world_size=2), turns))
    with pytest.raises(TrainingError, match="no rows for micro-batch 2"):
        list(iterate_stream(shard, alone, range(3)))


@pytest.mark.ray
def test_an_error_in_a_task_names_the_file_in_one_line(
    ray_cluster: None, tmp_path: Path, paint_images: Any, order: StreamOrder
) -> None:
    catalog: pa.Table = paint_images(tmp_path, COUNTS)
    for path in tmp_path.glob("*/*"):
        path.unlink()
    broken = ImageReader(catalog, str(tmp_path), image_size=SIZE, max_pixels=10_000)
    with pytest.raises(DataError, match=r"\.png in .*readable") as error:
        streamed(broken, order, 0, 2, world=1)
    assert "\n" not in str(error.value)


@pytest.mark.ray
def test_encoded_files_of_many_chunks_are_one(
    ray_cluster: None, reader: ImageReader, order: StreamOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "ENCODED_CHUNK_BYTES", int(reader.sizes.sum()) // 5)
    chunks = stream_module._put_encoded(reader)
    assert len(chunks) in (5, 6)
    import ray

    pieces = [piece for chunk in ray.get(chunks) for piece in chunk.chunks]
    assert pa.chunked_array(pieces).to_pylist() == reader.load_encoded().to_pylist()


@pytest.mark.ray
def test_a_run_of_a_hundred_million_images_starts_as_a_short_one_does(
    ray_cluster: None, reader: ImageReader, order: StreamOrder
) -> None:
    """200,000 blocks. A task for each would take Ray about six minutes and 1.6 GB before the first batch."""
    alone, turns = Share(batch_size=512), range(100_000_000 // 512)
    dataset = build_stream(reader, order, alone, turns, object_store_share=0.3, read_cpus=1.0)
    (shard,) = dataset.streaming_split(1, equal=True)
    batches = iterate_stream(shard, alone, turns)
    assert next(batches)["stream_rows"].tolist() == list(range(512))
    batches.close()  # type: ignore[attr-defined]
