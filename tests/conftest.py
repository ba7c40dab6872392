"""Fixtures that all tests share. One Ray cluster serves the whole run; never `ray stop` it."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported: the networks here are tiny, and threads that wait for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers step back before everybody else (by 15): beside the tests of two other processes they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# When a driver comes Ray starts a worker for each logical CPU: more than a test uses, at seconds of CPU each.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# pytest-xdist tells its processes a width; commands under test write into a pipe that has none.
os.environ.pop("COLUMNS", None)

PaintImages = Callable[[Path, dict[str, int]], pa.Table]


class Pieces(LoadScopeScheduling):  # type: ignore[misc]
    """How `make test` divides the tests over its processes, in the order in which they are collected.

    All that starts clusters of its own is one piece, what shares a cluster are two, of the rest each file is one: so
    few clusters run at a time, and no fixture of a file is made twice. By the files' text,
    because xdist's groups do not survive pytest 9.2 (the suffix that it puts into node ids is not seen).
    """

    def _split_scope(self, nodeid: str) -> str:
        return piece_of(nodeid.partition("::")[0])


@cache
def piece_of(file: str) -> str:
    """file: relative to the repository's root."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if re.search(r"pytest\.mark\.processes\b", text):
        return "processes"
    if re.search(r"pytest\.mark\.ray\b", text):
        return "ray, data" if file.startswith(("tests/data", "tests/generation")) else "ray, the rest"
    return file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Pieces:
    return Pieces(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest pieces first."""
    first = ["processes", "ray, data", "ray, the rest"]
    pieces = {item: piece_of(item.nodeid.partition("::")[0]) for item in items}
    items.sort(key=lambda item: first.index(pieces[item]) if pieces[item] in first else len(first))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Five logical CPUs, reachable from this machine only."""
    import ray

    # In its default, token, mode a local cluster writes ~/.ray/auth_token.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",  # or it would join what another process left as the machine's current cluster
            num_cpus=5,
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
                        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                        "split": "train",
                    }
                )
        return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)

    return paint
