"""How many generator actors the driver keeps busy, and what a plan of a million rows costs it.

python bench/scaleout.py --largest 64 --output bench/out/scaleout.json

The plan, Ray Data's pool of actors (a mock GPU each), the writing tasks and the journal are those of a real run; only
the generator is a stub that sleeps `batch_s` seconds a group and returns grey images. Efficiency is the images made per
second over those of as many sleepers without any overhead, in the time from when the last actor has begun its first
group until the first one has none left: starting costs CPU seconds an actor, which here share a machine's few cores and
elsewhere do not, so it has a column of its own. A machine that does other work must sleep longer. An actor is a process
of its own; the count stops doubling where the next would not fit the free memory.
"""

import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import ray
import ray.data
from jsonargparse import auto_cli

from m2d.classes import ISIC7
from m2d.diffusion.settings import SamplingSettings
from m2d.generation.output import PARTS, Recipe, group_name, write_rows
from m2d.generation.plan import PlanRow, read_plan, standard_plan
from m2d.generation.settings import GateConfig
from m2d.generation.workers import GroupWriter, make_on_ray, pick_pool

WRITER_SLOTS = 4  # logical CPUs; the actors ask for a GPU alone
SPARE_BYTES = 2 * 2**30  # of memory, left free
GIB = 2**30


class SleepingGenerator:
    """What an actor asks of m2d.generation.generator.Generator, with sleep in place of networks."""

    device = "none"

    def __init__(self, batch_size: int, batch_s: float, trace: Path) -> None:
        self.batch_size = batch_size
        self.batch_s = batch_s
        self.trace = trace / f"{os.getpid()}.jsonl"
        self._write({"uss": psutil.Process().memory_full_info().uss})

    def generate(self, rows: Sequence[PlanRow]) -> np.ndarray:
        """Grey images of the rows, uint8 [N, 16, 16, 3], after the sleep."""
        began = time.time()
        time.sleep(self.batch_s)
        images = np.full((len(rows), 16, 16, 3), 128, np.uint8)
        self._write({"group": group_name(rows), "began": began, "ended": time.time()})
        return images

    def _write(self, record: dict[str, Any]) -> None:
        with self.trace.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def load_sleeper(batch_size: int, batch_s: float, trace: Path, device: str) -> Any:
    """As an actor loads its generator."""
    # make_group asks torch for the type of an error; the module is half a GiB a process, so 64 would not fit here.
    sys.modules.setdefault("torch", SimpleNamespace(OutOfMemoryError=MemoryError))  # type: ignore[arg-type]
    return SleepingGenerator(batch_size, batch_s, trace)


@dataclass(frozen=True)
class Scale:
    """One run of so many actors."""

    actors: int
    groups: int
    start_s: float  # until the last actor has begun
    window_s: float  # in which efficiency is measured
    images_per_s: float
    efficiency: float  # against sleepers without overhead
    against_first: float  # an actor, over one of the first row
    written_after_s: float  # median, from a group's making to its part in the journal
    written_after_most_s: float
    driver_ms: float  # CPU of the driver's process a group, start-up included
    actor_mib: float  # memory of an actor that no other process shares, median


@dataclass(frozen=True)
class PlanCost:
    """A large plan in a fresh process."""

    rows: int
    build_s: float
    write_s: float
    read_s: float  # with every row checked
    before_gib: float  # peak memory of the process before, imports
    built_gib: float  # and after building it
    peak_gib: float  # and after reading it back


def main(
    smallest: int = 1,
    largest: int = 64,
    batch_s: float = 4.0,
    groups: int = 8,
    batch_size: int = 4,
    plan_rows: int = 1_000_000,
    output: str | None = None,
) -> None:
    """Measure and print.

    Args:
        smallest: actors of the first row
        largest: actors of the last, after 2, 4 ... times the smallest (0: the plan alone)
        batch_s: seconds that an actor sleeps for each group
        groups: an actor, on average
        batch_size: images a group, 16 x 16 pixels
        plan_rows: of the large plan (0: none)
        output: a JSON file
    """
    plan = measure_plan(plan_rows) if plan_rows else None
    scales = measure_scales(smallest, largest, batch_s, groups, batch_size) if largest else []
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        document = {
            "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "ray": ray.__version__,
            "batch_s": batch_s,
            "batch_size": batch_size,
            "plan": None if plan is None else asdict(plan),
            "scales": [asdict(scale) for scale in scales],
        }
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure_plan(rows: int) -> PlanCost:
    """In a process of its own, whose peak is the plan's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        cost = pool.apply(build_plan, (rows,))
    print(
        f"plan of {cost.rows:,} rows: built in {cost.build_s:.1f} s (target 30), written in {cost.write_s:.1f} s, read "
        f"and checked in {cost.read_s:.1f} s; peak memory {cost.built_gib:.2f} GiB built, {cost.peak_gib:.2f} GiB read "
        f"back (target 2), of which imports {cost.before_gib:.2f} GiB",
        flush=True,
    )
    return cost


def build_plan(rows: int) -> PlanCost:
    before = _peak_gib()
    times = [time.perf_counter()]
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        path = Path(folder) / "plan.parquet"
        table = standard_plan(_counts(rows), run_seed=0, sampling=SamplingSettings(), feature="prior")
        times.append(time.perf_counter())
        built = _peak_gib()
        write_rows(path, table)
        times.append(time.perf_counter())
        read_plan(path)
        times.append(time.perf_counter())
    build_s, write_s, read_s = np.diff(times).tolist()
    return PlanCost(table.num_rows, build_s, write_s, read_s, before, built, _peak_gib())


def measure_scales(smallest: int, largest: int, batch_s: float, groups: int, batch_size: int) -> list[Scale]:
    """One row after the other, as far as memory reaches."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only; token mode would write to the home directory
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 any other program starves the workers
    ray.init(
        num_cpus=WRITER_SLOTS,
        num_gpus=largest,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 * 2**20,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    scales: list[Scale] = []
    print(f"\na group sleeps {batch_s:g} s and has {batch_size} images; {os.cpu_count()} real CPU cores")
    print("| actors | groups | started in | images/s | of linear | of the first's | written after, most | driver CPU |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    try:
        actors = smallest
        while actors <= largest:
            needed = actors * scales[-1].actor_mib * 2**20 if scales else 0
            free = psutil.virtual_memory().available - SPARE_BYTES
            if needed > free:
                print(
                    f"stopped before {actors} actors: they need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
                )
                break
            scales.append(measure(actors, batch_s, groups * actors, batch_size, scales))
            _print(scales[-1])
            actors *= 2
    finally:
        ray.shutdown()
    return scales


def measure(actors: int, batch_s: float, groups: int, batch_size: int, before: Sequence[Scale]) -> Scale:
    """One run of m2d.generation.workers."""
    table = standard_plan(_counts(groups * batch_size), run_seed=0, sampling=SamplingSettings(), feature="prior")
    plan = [table.slice(first, batch_size) for first in range(0, table.num_rows, batch_size)]
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        root, trace = Path(folder) / "images", Path(folder) / "trace"
        for path in (root, trace):
            path.mkdir()
        recipe = Recipe(
            checkpoint="0" * 64, seed=0, solver="unipc", steps=1, guidance_scale=1.0, guidance_interval=(0.0, 1.0),
            precision="no", feature="prior", feature_temperature=1.0,
        )  # fmt: skip
        writer = GroupWriter(root=root, recipe=recipe, gates=GateConfig(enabled=False))
        load = partial(load_sleeper, batch_size, batch_s, trace)
        pool = pick_pool(actors, 1.0, "none", groups)
        began, cpu_began = time.time(), time.process_time()
        made = sum(result.kept for result in make_on_ray(load, pool, plan, 0, writer, features=False))
        driver_s = time.process_time() - cpu_began
        assert made == table.num_rows, f"{made} of {table.num_rows} images came back"
        records = [
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in trace.iterdir()
        ]
        written = {path.stem: path.stat().st_mtime for path in (root / PARTS).iterdir()}
    # A process that Ray gave up while it started, and replaced, has made no group.
    records = [of_one for of_one in records if any("group" in record for record in of_one)]
    assert len(records) == actors, f"{len(records)} of {actors} actors worked; raise --groups"
    of_actor = [[record for record in of_one if "group" in record] for of_one in records]
    first = max(spans[0]["began"] for spans in of_actor)
    last = min(spans[-1]["ended"] for spans in of_actor)
    assert last > first, "no time in which all actors worked; raise --groups"
    spans = [span for of_one in of_actor for span in of_one]
    # A sleep that the busy machine drew out counts as the sleep that was asked for.
    done = sum(
        max(0.0, min(span["ended"], last) - max(span["began"], first)) / (span["ended"] - span["began"])
        for span in spans
    )
    rate = done / (last - first)  # groups a second
    lags = [written[span["group"]] - span["ended"] for span in spans]
    efficiency = rate * batch_s / actors
    return Scale(
        actors=actors,
        groups=groups,
        start_s=first - began,
        window_s=last - first,
        images_per_s=rate * batch_size,
        efficiency=efficiency,
        against_first=efficiency / (before[0].efficiency if before else efficiency),
        written_after_s=statistics.median(lags),
        written_after_most_s=max(lags),
        driver_ms=1000 * driver_s / groups,
        actor_mib=statistics.median(of_one[0]["uss"] for of_one in records) / 2**20,
    )


def _counts(rows: int) -> dict[str, int]:
    """`rows` over the seven classes."""
    return {code: len(range(number, rows, len(ISIC7.codes))) for number, code in enumerate(ISIC7.codes)}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _print(scale: Scale) -> None:
    print(
        f"| {scale.actors} | {scale.groups} | {scale.start_s:.0f} s | {scale.images_per_s:.2f} | "
        f"{scale.efficiency:.1%} | {scale.against_first:.1%} | {scale.written_after_s:.2f} s, "
        f"{scale.written_after_most_s:.2f} s | {scale.driver_ms:.0f} ms a group |",
        flush=True,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
