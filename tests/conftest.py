"""Fixtures that all tests share. One Ray cluster serves the whole run; never `ray stop` it."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

# Before torch is imported: the networks here are tiny, and threads that wait for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest-xdist tells its processes a width; commands under test write into a pipe that has none.
os.environ.pop("COLUMNS", None)

PaintImages = Callable[[Path, dict[str, int]], pa.Table]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """How `make test` divides the tests over its processes, the longest pieces first.

    All that starts clusters of its own is one piece, all that shares one cluster another, of the rest each file: so
    there is one shared cluster, no more than two at a time, and no fixture of a file is made twice.
    """
    pieces: dict[Path, str] = {}
    for mark in ("ray", "processes"):
        pieces |= {item.path: mark for item in items if item.get_closest_marker(mark)}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(pieces.get(item.path, str(item.path))))
    first = {"processes": 0, "ray": 1}
    items.sort(key=lambda item: first.get(pieces.get(item.path, ""), 2))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Eight logical CPUs, reachable from this machine only."""
    import ray

    # In its default, token, mode a local cluster writes ~/.ray/auth_token.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=8,
            num_gpus=0,
            object_store_memory=400 * 2**20,
            include_dashboard=True,  # Train's clean-up asks it which trials live
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="session")
def paint_images() -> PaintImages:
    """A function that fills class folders with small PNGs, no two alike, and returns their catalog."""
    from m2d.data.catalog import CATALOG_SCHEMA

    def paint(data_root: Path, counts: dict[str, int]) -> pa.Table:
        rows = []
        generator = np.random.default_rng(0)
        for label, count in counts.items():
            (data_root / label).mkdir(parents=True)
            for number in range(count):
                path = data_root / label / f"{label}_{number}.png"
                pixels = generator.integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(path)
                rows.append(
                    {
                        "image_id": path.stem,
                        "path": path.relative_to(data_root).as_posix(),
                        "label": label,
                        "lesion_id": path.stem,
                        "width": 48,
                        "height": 40,
                        "bytes": path.stat().st_size,
                        "sha256": "",
                        "split": "train",
                    }
                )
        return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)

    return paint
