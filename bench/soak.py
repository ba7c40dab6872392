"""A run that goes on for half an hour and longer: does any of its processes grow?

python bench/soak.py --minutes 30 --output bench/out/soak.json

Trains bench/tiny.yaml on Ray, with validation, pictures, a checkpoint, wandb (offline) and TensorBoard every few steps,
so that what a real run does in weeks happens in minutes. Every few seconds it looks at each process of the run, at its
private memory, open files and threads, and at Ray's object store. The first third is left out; of the rest the slope is
Theil and Sen's, over the medians of minutes, with its 95 % interval. A second table has the last half of that, where
what only fills up at first is flat.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from jsonargparse import auto_cli
from scipy.stats import theilslopes

from m2d.demo.dataset import write_demo_dataset
from m2d.training.telemetry import MetricsLog

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
# What a process is, by the first of these in its command line; Ray names its workers after what they run.
ROLES = {
    "-m m2d": "driver",
    "wandb": "wandb",
    "gcs_server": "Ray's GCS",
    "raylet/raylet": "raylet",
    "ray/": "Ray's dashboard and monitors",
    "ray-dashboard": "Ray's dashboard and monitors",
}
TASKS = ("IDLE", "Read_BlockNumbers")  # a worker takes what comes: all of them are one row
# What fills up by design is small here, so that it is full soon: the store by what the stream reads ahead, and the
# tasks that Ray remembers (100,000 otherwise, in 140 MiB).
SMALL = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000", "RAY_task_events_max_num_task_in_gcs": "2000"}
Sample = dict[str, float]  # seconds, steps and "role: what"


@dataclass(frozen=True)
class Trend:
    """Of one quantity over the time after the start."""

    name: str
    first: float  # median of the first fifth
    last: float  # of the last
    per_hour: float
    low: float  # of its 95 % interval
    high: float

    @property
    def verdict(self) -> str:
        """Flat where the interval has zero in it."""
        return "flat" if self.low <= 0 <= self.high else "falls" if self.high < 0 else "grows"


def soak(minutes: float = 30.0, num_workers: int = 2, every_steps: int = 20, sample_s: float = 5.0,
         output: str = "bench/out/soak.json") -> None:  # fmt: skip
    """Train, look, fit.

    Args:
        minutes: until the run is asked to stop.
        num_workers: training workers on Ray; 0: the calling process alone.
        every_steps: a checkpoint with its validation; pictures come every five epochs of seven steps.
        sample_s: from one look to the next.
        output: where samples and trends go as JSON, and a table beside it as Markdown.
    """
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="m2d-soak-") as name, Path(f"{output}.log").open("w") as log:
        folder = Path(name)
        write_demo_dataset(folder / "data", total=70)
        command = [
            sys.executable, "-m", "m2d", "train", "--config", str(ROOT / "bench" / "tiny.yaml"),
            "--data_root", str(folder / "data"), "--experiments_dir", str(folder / "runs"),
            "--cache_dir", str(folder / "cache"), "--num_workers", str(num_workers),
            "--saving.every_steps", str(every_steps), "--saving.validation_samples", "8",
            "--telemetry.reconstructions_every_epochs", "5", "--telemetry.samples_every_epochs", "5",
            "--telemetry.features_every_epochs", "5", "--telemetry.gradients_every_steps", "10",
            "--telemetry.samples_per_class", "1", "--telemetry.sample_steps", "2", "--telemetry.tensorboard",
            "--use_wandb", "--wandb_mode", "offline",
        ]  # fmt: skip
        environment = {**os.environ, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
        environment |= SMALL
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 60 * minutes
        began, family = time.monotonic(), [psutil.Process(process.pid)]
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(sample_s)
            family = [family[0], *children(family[0])]
            samples.append({"seconds": time.monotonic() - began, "steps": steps(folder), **look(family, folder)})
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        _, left = psutil.wait_procs(family, timeout=30)
        done = steps(folder)
    after = [sample for sample in samples if sample["seconds"] > 20 * minutes]  # a third
    result = {
        "minutes": minutes, "workers": num_workers, "every_steps": every_steps, "steps": done, "exit_code": code,
        "processes_left": len(left), "python": platform.python_version(), "cores": os.cpu_count(),
        "trends": [asdict(trend) for trend in trends(after)],
        "second_half": [asdict(trend) for trend in trends(after[len(after) // 2 :])],
        "samples": samples,
    }  # fmt: skip
    Path(output).write_text(json.dumps(result, indent=1), encoding="utf-8")
    text = table(trends(after)) + "\nThe second half of that:\n\n" + table(trends(after[len(after) // 2 :]))
    text = f"{done} steps in {minutes:g} minutes; exit code {code}; processes left: {len(left)}\n\n{text}"
    Path(output).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if code != 128 + signal.SIGTERM or left:
        raise SystemExit(1)


def children(parent: psutil.Process) -> list[psutil.Process]:
    """All processes below one."""
    try:
        return parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def look(family: list[psutil.Process], folder: Path) -> Sample:
    """What the processes hold at this moment, summed over those of a role."""
    found: dict[str, float] = defaultdict(float)
    for process in family:
        try:
            line = " ".join(process.cmdline())
            memory, files, threads = process.memory_info(), process.num_fds(), process.num_threads()
        except psutil.Error:
            continue
        role = next((ROLES[part] for part in ROLES if part in line), "other")
        if line.startswith("ray::"):
            name = line.removeprefix("ray::").split()[0].partition(".")[0]
            role = name if "(" not in name and name not in TASKS else "Ray's tasks"
        found[f"{role}: processes"] += 1
        found[f"{role}: private MiB"] += (memory.rss - memory.shared) / MIB
        found[f"{role}: open files"] += files
        found[f"{role}: threads"] += threads
        session = re.search(r"--session[-_]dir=(\S+)", line) if role == "raylet" else None
        if session is not None:
            found |= object_store(Path(session[1]))
    found["the experiment: files"] = sum(1 for path in folder.glob("runs/*/**/*") if path.is_file())
    return dict(found)


def object_store(session: Path) -> Sample:
    """What the raylet last wrote of its store, which it does every ten seconds, and the size of all logs."""
    found: Sample = {"Ray's logs: MiB": sum(f.stat().st_size for f in session.glob("logs/**/*") if f.is_file()) / MIB}
    with suppress(FileNotFoundError):
        text = (session / "logs" / "debug_state.txt").read_text(encoding="utf-8", errors="replace")
        numbers = dict(re.findall(r"^- ([a-z ]+): (\d+)$", text, flags=re.MULTILINE))
        if numbers:
            found["object store: objects"] = float(numbers["num pinned objects"])
            found["object store: MiB"] = float(numbers["pinned objects size"]) / MIB
            found["object store: MiB spilled"] = float(numbers["num bytes currently spilled"]) / MIB
    return found


def steps(folder: Path) -> int:
    """The last one on record."""
    last = [MetricsLog(path.parent, "train").last() for path in folder.glob("runs/*/metrics/train.jsonl")]
    return max((int(record["step"]) for record in last if record is not None), default=0)


def trends(samples: list[Sample]) -> list[Trend]:
    """The slope of each quantity, an hour, over the medians of minutes."""
    found = []
    for name in sorted({name for sample in samples for name in sample} - {"seconds", "steps"}):
        by_minute: dict[int, list[float]] = defaultdict(list)
        for sample in samples:
            by_minute[int(sample["seconds"] // 60)].append(sample.get(name, 0.0))
        if len(by_minute) < 3:
            continue
        values = np.array([np.median(by_minute[minute]) for minute in sorted(by_minute)])
        slope, _, low, high = theilslopes(values, np.array(sorted(by_minute)) / 60, alpha=0.95)
        fifth = max(1, len(values) // 5)
        ends = float(np.median(values[:fifth])), float(np.median(values[-fifth:]))
        found.append(Trend(name, *ends, float(slope), float(low), float(high)))
    return found


def table(found: list[Trend]) -> str:
    """As Markdown: a row for each kind of process, then what is no process."""
    by_name = {trend.name: trend for trend in found}
    roles = [name.removesuffix(": processes") for name in by_name if name.endswith(": processes")]
    lines = ["| process | how many | open files | threads | private MiB | MiB an hour (95 % interval) | |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for role in roles:
        count, files, threads = (ends(by_name[f"{role}: {what}"]) for what in ("processes", "open files", "threads"))
        memory = by_name[f"{role}: private MiB"]
        lines.append(
            f"| {role} | {count} | {files} | {threads} | {ends(memory)} | {slope(memory)} | {memory.verdict} |"
        )
    rest = [trend for trend in found if trend.name.partition(":")[0] not in roles]
    lines += ["", "| | | an hour (95 % interval) | |", "|---|---|---|---|"]
    lines += [f"| {trend.name} | {ends(trend)} | {slope(trend)} | {trend.verdict} |" for trend in rest]
    return "\n".join(lines) + "\n"


def ends(trend: Trend) -> str:
    """At first and at last."""
    first, last = f"{trend.first:,.4g}", f"{trend.last:,.4g}"
    return first if first == last else f"{first} to {last}"


def slope(trend: Trend) -> str:
    """With its interval."""
    return f"{trend.per_hour:+.3g} ({trend.low:+.3g} to {trend.high:+.3g})"


if __name__ == "__main__":
    auto_cli(soak, as_positional=False)
