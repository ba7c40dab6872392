"""How a run starts and trains as its catalog grows: time to the first step by stage, memory, and the steady rate.

python bench/scaling.py --output bench/out/scaling.json

The catalog has as many rows as asked for, which point at a few generated images (so the page cache holds them all); it
stands in the experiment, so the run finds it there as a resumed run does and scans nothing. Each run is the demo
preset's joint stage through Ray with one worker, in a process of its own; sizes alternate. Nothing is prepared, so
features are extracted in the step.
"""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from m2d.cli import parse
from m2d.data.catalog import scan_dataset, write_catalog
from m2d.data.settings import DataConfig
from m2d.demo.dataset import write_demo_dataset
from m2d.experiment import list_experiments, open_experiment
from m2d.training.settings import TrainConfig, as_dict, differences, with_absolute_paths

STAGES = (
    "imports", "Ray", "catalog and plan", "worker group", "worker's imports", "networks", "features fitted",
    "stream made", "first batch", "first step",
)  # fmt: skip
SKIPPED_INTERVALS = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_500, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", help="JSON file for all numbers")
    parser.add_argument("--drive", help=argparse.SUPPRESS)  # in the process that is measured: its folder
    arguments = parser.parse_args()
    if arguments.drive:
        drive(Path(arguments.drive), arguments.steps)
        return
    runs: dict[int, list[dict[str, Any]]] = {rows: [] for rows in arguments.rows}
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        write_demo_dataset(Path(folder) / "data", total=140)
        catalog = scan_dataset(str(Path(folder) / "data"), DataConfig()).catalog
        for repetition in range(arguments.repetitions):
            for rows in arguments.rows:
                place = Path(folder) / f"{rows}-{repetition}"
                config = configuration(place, arguments.steps)
                experiment, _ = open_experiment(
                    config.experiments_dir, config.name, as_dict(config), differences, fresh=False, command=[]
                )
                write_catalog(grown(catalog, rows), str(experiment.path / "cache" / "catalog.parquet"))
                command = [sys.executable, __file__, "--drive", str(place), "--steps", str(arguments.steps)]
                environment = {**os.environ, "RAY_worker_niceness": "0"}  # 15 by default: behind all other programs
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                runs[rows].append(read(place))
                print(f"{rows:,} rows: first step after {runs[rows][-1]['first step']:.1f} s", flush=True)
    report(runs)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        found = {"arguments": vars(arguments), "cores": os.cpu_count(), "runs": runs}
        Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def configuration(place: Path, steps: int) -> TrainConfig:
    """The run, by its flags."""
    places = ["--data_root", str(place.parent / "data"), "--experiments_dir", str(place), "--name", "bench"]
    places += ["--cache_dir", str(place / "none")]
    config: TrainConfig = parse(
        "train",
        ["--preset", "demo", *places, "--num_workers", "1", "--max_steps", str(steps), "--perceptual.kind", "features",
         "--schedule.vae_warmup_fraction", "0", "--schedule.log_every_steps", "5", "--saving.every_steps", "100000",
         "--telemetry.pictures", "false"],
    )  # fmt: skip
    return with_absolute_paths(config)


def grown(catalog: pa.Table, rows: int) -> pa.Table:
    """The catalog's rows again and again, as other images of other lesions: 80 % of them for training."""
    numbers = np.arange(rows)
    splits = np.array(["train"] * 8 + ["val", "test"])
    columns = {
        "image_id": [f"BENCH_{number}" for number in numbers],
        "lesion_id": [f"LESION_{number}" for number in numbers],
        "sha256": [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers],
        "split": splits[numbers % len(splits)],
    }
    table = catalog.take(pa.array(numbers % len(catalog)))
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    return table


def drive(place: Path, steps: int) -> None:
    """The measured process: `train`, with a mark written down whenever a stage is over, here and in Ray's processes."""
    marks = place / "marks.jsonl"
    mark(marks, "process started", psutil.Process().create_time())
    import m2d.training.ray_worker as ray_side
    import m2d.training.trainer as trainer

    mark(marks, "imports")
    run_ray, prepared_parts, group_stream = trainer.ray_cluster, trainer.prepared_parts, ray_side.GroupStream

    @contextlib.contextmanager
    def marked_ray(**settings: Any) -> Iterator[None]:
        with run_ray(**settings):
            mark(marks, "Ray")
            yield

    def marked_parts(*arguments: Any) -> dict[str, Any]:
        parts = prepared_parts(*arguments)
        mark(marks, "catalog and plan")
        return parts

    class MarkedStream(group_stream):  # type: ignore[misc, valid-type]
        @classmethod
        def placeholder(cls) -> dict[str, Any]:
            ray_side.GroupStream = group_stream  # type: ignore[misc]  # Ray looks for the base class under its name
            return group_stream.placeholder()

        def stream(self, world_size: int) -> Any:
            stream = super().stream(world_size)
            mark(marks, "stream made")
            return stream

    def marked_worker(settings: dict[str, Any]) -> None:
        mark(marks, "worker group")
        from m2d.training import loop as worker
        from m2d.training.ray_worker import ray_worker
        from m2d.training.step import JointStep

        mark(marks, "worker's imports")
        build, fit, ahead = worker.build_networks, worker._fit_features, worker.read_ahead
        step = JointStep.__call__

        def marked_build(*arguments: Any) -> Any:
            networks = build(*arguments)
            mark(marks, "networks")
            return networks

        def marked_fit(*arguments: Any, **named: Any) -> Any:
            prior = fit(*arguments, **named)
            mark(marks, "features fitted")
            return prior

        def marked_ahead(*arguments: Any, **named: Any) -> Iterator[Any]:
            for number, batch in enumerate(ahead(*arguments, **named)):
                if number == 0:
                    mark(marks, "first batch")
                yield batch

        def marked_step(self: Any, micro_batches: Any, number: int) -> None:
            step(self, micro_batches, number)
            if number == 0:
                mark(marks, "first step")

        worker.build_networks, worker._fit_features, worker.read_ahead = marked_build, marked_fit, marked_ahead
        JointStep.__call__ = marked_step  # type: ignore[method-assign]
        ray_worker(settings)
        mark(marks, "worker's end")

    trainer.ray_cluster, trainer.prepared_parts = marked_ray, marked_parts  # type: ignore[assignment]
    ray_side.GroupStream, ray_side.ray_worker = MarkedStream, marked_worker  # type: ignore[misc, assignment]
    trainer.train(configuration(place, steps))
    mark(marks, "driver's end")


def mark(path: Path, name: str, when: float | None = None) -> None:
    """Write down that a stage is over, and the most memory that its process has had so far."""
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, "time": when or time.time(), "peak_mib": peak_mib}) + "\n")


def read(place: Path) -> dict[str, Any]:
    """Seconds from the process's start to the end of each stage, peaks of memory in MiB, images a second."""
    lines = [json.loads(line) for line in (place / "marks.jsonl").read_text(encoding="utf-8").splitlines()]
    marks = {line["name"]: line for line in reversed(lines)}  # the first of each name
    began = marks["process started"]["time"]
    (experiment,) = list_experiments(str(place))
    records = [
        json.loads(line)
        for line in (experiment.path / "metrics" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ][SKIPPED_INTERVALS:]
    return {
        **{stage: marks[stage]["time"] - began for stage in STAGES},
        "driver, MiB": marks["driver's end"]["peak_mib"],
        "worker, MiB": marks["worker's end"]["peak_mib"],
        "stream's maker, MiB": marks["stream made"]["peak_mib"],
        "images/s": len(records) / sum(1 / record["images_per_s"] for record in records),
    }


def report(runs: dict[int, list[dict[str, Any]]]) -> None:
    """Medians side by side, a column for each size."""
    print("\n| median (least, most) | " + " | ".join(f"{rows:,} rows" for rows in runs) + " |")
    print("|---|" + "---|" * len(runs))
    print(
        "| **seconds to the first step** | "
        + " | ".join(_spread(of_size, "first step") for of_size in runs.values())
        + " |"
    )
    for before, stage in zip(("", *STAGES), STAGES):
        cells = []
        for of_size in runs.values():
            took = [run[stage] - (run[before] if before else 0.0) for run in of_size]
            cells.append(f"{statistics.median(took):.1f}")
        print(f"| of them: {stage} | " + " | ".join(cells) + " |")
    for name in ("driver, MiB", "worker, MiB", "stream's maker, MiB", "images/s"):
        print(f"| {name} | " + " | ".join(_spread(of_size, name) for of_size in runs.values()) + " |")


def _spread(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs]
    digits = 0 if "MiB" in name else 1
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}, {max(values):,.{digits}f})"


if __name__ == "__main__":
    main()
