"""What telemetry costs: steps/s with everything on (wandb offline, TensorBoard, gradients) beside everything off.

Runs alternate, so that a machine's mood meets both. Pictures are left out, as the target leaves them; how long one set
of them takes is printed beside. Each run's first interval is left out: it includes the start.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from m2d.cli import parse
from m2d.demo.dataset import write_demo_dataset
from m2d.experiment import Experiment
from m2d.training.settings import TrainConfig
from m2d.training.trainer import train

OFF = ["--telemetry.gradients_every_steps", "0"]
ON = ["--use_wandb", "--wandb_mode", "offline", "--telemetry.tensorboard"]


def main() -> None:
    """Train by turns and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo", help="whose networks and sizes are trained")
    parser.add_argument("--steps", type=int, default=220, help="of each run; gradients are looked at every 100")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", default="bench/out/telemetry.json")
    arguments = parser.parse_args()
    os.environ["WANDB_SILENT"] = "true"
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        root = Path(folder)
        write_demo_dataset(root / "data", total=280)
        rates: dict[str, list[float]] = {"off": [], "on": []}
        for repetition in range(arguments.repetitions):
            order = ("off", "on") if repetition % 2 == 0 else ("on", "off")
            for name in order:
                flags = [*(ON if name == "on" else OFF), "--telemetry.pictures", "false"]
                experiment = _run(root, arguments, f"{name}{repetition}", flags)
                rates[name].append(_steps_per_s(experiment))
                print(f"{name:3} {repetition}: {rates[name][-1]:.3f} steps/s", flush=True)
        began = time.perf_counter()
        drawn = _run(root, arguments, "pictures", [*OFF, "--telemetry.pictures", "true", "--max_steps", "10"])
        pictures_s = time.perf_counter() - began
        plain = time.perf_counter()
        _run(root, arguments, "plain", [*OFF, "--telemetry.pictures", "false", "--max_steps", "10"])
        pictures_s -= time.perf_counter() - plain
        kinds = len(list((drawn.path / "visualizations").iterdir()))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    cost = 1 - medians["on"] / medians["off"]
    result = {"steps_per_s": rates, "median": medians, "cost": cost, "pictures_s": pictures_s, "picture_kinds": kinds}
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"steps/s: off {medians['off']:.3f}, on {medians['on']:.3f}; telemetry costs {100 * cost:.1f} % (target: 3)")
    print(f"one set of {kinds} kinds of pictures: {pictures_s:.1f} s more at the end of a run of 10 steps\n{output}")


def _run(root: Path, arguments: argparse.Namespace, name: str, flags: list[str]) -> Experiment:
    places = ["--data_root", str(root / "data"), "--experiments_dir", str(root / "runs"), "--name", name]
    places += ["--cache_dir", str(root / "cache")]
    steps = [] if "--max_steps" in flags else ["--max_steps", str(arguments.steps)]
    settings = ["--preset", arguments.preset, "--num_workers", "0", "--schedule.vae_warmup_fraction", "0"]
    config: TrainConfig = parse("train", [*settings, *places, *steps, "--saving.every_steps", "100000", *flags])
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config)


def _steps_per_s(experiment: Experiment) -> float:
    """From the first record to the last."""
    lines = (experiment.path / "metrics" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    first, *_, last = (json.loads(line) for line in lines)
    return float((last["step"] - first["step"]) / (last["time"] - first["time"]))


if __name__ == "__main__":
    main()
