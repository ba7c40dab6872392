"""Runs under SIGKILL, run again or going on by themselves, and held against unbroken ones.

python bench/kills.py generation --checkpoint experiments/RUN/checkpoints/best --output bench/out/kills.json
python bench/kills.py training --kills 10 --mtbf_s 60 --output bench/out/kills-training.json

generation: three runs of the same request, unbroken, with the driver killed `kills` times and run again each time, and
with an actor killed `kills` times. Every image of the broken runs must be the unbroken run's, byte for byte, none
missing and none twice. training: a worker, the driver or a node is killed at random moments, and nodes go after a
notice; the weights must be the unbroken run's after as many steps, bit for bit, and no step missing or told twice.
Anything else ends with exit code 1.
"""

import hashlib
import json
import math
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil
import pyarrow.parquet as pq
import torch
from jsonargparse import auto_cli
from safetensors.torch import load_file
from torch import Tensor

from m2d.demo.dataset import write_demo_dataset
from m2d.training.telemetry import MetricsLog

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[1]
ACTOR, WORKER = "BlockActor", "RayTrainWorker"  # Ray names a worker's process after its actor
NODE: dict[str, Any] = {"num_cpus": 3, "object_store_memory": 100_000_000}  # room for one training worker
LONGEST_S = 1800.0


@dataclass(frozen=True)
class Outcome:
    """A run's files against its manifest and against the unbroken run."""

    images: int
    killed_at: list[int]  # images in the finished groups at each kill
    missing: int  # ids of the plan that the manifest lacks
    twice: int
    wrong_hash: int  # files that are not what the manifest says
    unlike: int  # images whose bytes are not the unbroken run's
    leftovers: int  # partial files


def generation(checkpoint: str, num_samples: int = 24, steps: int = 4, kills: int = 3, seed: int = 0,
               output: str | None = None) -> None:  # fmt: skip
    """Kill, run again, compare.

    Args:
        checkpoint: of a trained model.
        num_samples: images per class; gates are active where the training images are found.
        steps: of the solver; few, for this is about files.
        kills: of the driver, and as many of actors.
        seed: of the moments.
        output: where the outcome goes as JSON.
    """
    moments = random.Random(seed)
    log_path = Path("kills.log" if output is None else f"{output}.log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="m2d-kills-") as folder, log_path.open("w") as log:
        command = [
            sys.executable, "jobs/generate.py", "--checkpoint", os.path.abspath(checkpoint), "--num_samples",
            str(num_samples), "--steps", str(steps), "--num_actors", "2", "--batch_size", "4", "--output",
        ]  # fmt: skip
        roots = {name: Path(folder) / name for name in ("unbroken", "driver", "actor")}

        def start(name: str) -> subprocess.Popen[bytes]:
            print(f"{name}: {made(roots[name])} images so far", flush=True)
            return subprocess.Popen([*command, str(roots[name])], cwd=ROOT, stdout=log, stderr=log)

        def wait(process: subprocess.Popen[bytes]) -> None:
            if process.wait(LONGEST_S) != 0:
                raise SystemExit(f"generate.py ended with {process.returncode}:\n{log_path.read_text()}")

        wait(start("unbroken"))
        whole = made(roots["unbroken"])

        at_driver = []
        for number in range(kills):
            process = start("driver")
            goal = moments.randint(whole * number // (kills + 1) + 1, whole * (number + 1) // (kills + 1))
            until(lambda goal=goal: made(roots["driver"]) >= goal, process, log_path)  # type: ignore[misc]
            time.sleep(moments.random())
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            psutil.wait_procs(family, timeout=60)  # Ray's processes follow their driver
            at_driver.append(made(roots["driver"]))
        wait(start("driver"))

        at_actor = []
        process = start("actor")
        for number in range(kills):
            goal = moments.randint(whole * number // (kills + 1) + 1, whole * (number + 1) // (kills + 1))
            until(lambda goal=goal: made(roots["actor"]) >= goal and below(process.pid, ACTOR), process, log_path)  # type: ignore[misc]
            time.sleep(moments.random())
            victims = below(process.pid, ACTOR)
            if not victims:
                raise SystemExit("no actor was left to be killed; ask for more images: --num_samples")
            moments.choice(victims).kill()
            at_actor.append(made(roots["actor"]))
        wait(process)

        outcomes = {
            name: compared(roots[name], roots["unbroken"], at)
            for name, at in {"unbroken": [], "driver": at_driver, "actor": at_actor}.items()
        }
    for name, outcome in outcomes.items():
        print(f"{name:9} " + ", ".join(f"{key} {value}" for key, value in asdict(outcome).items()))
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}, indent=1))
    if any(o.missing or o.twice or o.wrong_hash or o.unlike or o.leftovers for o in outcomes.values()):
        raise SystemExit(1)


@dataclass(frozen=True)
class Strike:
    """What one kill cost."""

    what: str  # worker, driver, node, or notice: a node some time after its end was announced
    after_s: float  # since the kill before, or the first step
    at_step: int
    resumed_from: int
    again_s: float  # from the kill to the first step after it

    @property
    def lost(self) -> int:
        """Steps that were taken again."""
        return self.at_step - self.resumed_from


@dataclass(frozen=True)
class Comparison:
    """The broken run against the unbroken one, at the same step."""

    step: int
    unlike_tensors: int
    tensors: int
    largest_difference: float
    unlike_losses: int  # steps whose logged losses differ
    missing: int  # steps that the record lacks
    twice: int
    leftovers: int  # partial files in the experiment
    unbroken_s: float  # from the first step to this one
    broken_s: float


def training(kills: int = 10, notices: int = 2, mtbf_s: float = 60.0, notice_s: float = 10.0, every_steps: int = 100,
             minutes: float = 12.0, seed: int = 0, output: str = "bench/out/kills-training.json") -> None:  # fmt: skip
    """Kill, let it go on, compare.

    Args:
        kills: of workers, drivers and nodes, by turns in random order.
        notices: nodes that go with a notice, in addition.
        mtbf_s: mean time between failures, exponential; never before the run has made a step since the last one.
        notice_s: from a notice to the node's end.
        every_steps: from checkpoint to checkpoint.
        minutes: after which nothing is killed any more; the unbroken run takes about half as long.
        seed: of kinds and moments.
        output: where the outcome goes as JSON, and a table beside it as Markdown.
    """
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by 15 otherwise: on a busy machine they would starve
    moments = random.Random(seed)
    kinds = [("worker", "driver", "node")[number % 3] for number in range(kills)] + ["notice"] * notices
    moments.shuffle(kinds)
    log_path = Path(f"{output}.log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
    # Not in the default place, where other programs of this machine would take it for theirs; short, for its sockets.
    os.environ["RAY_TMPDIR"] = temporary = tempfile.mkdtemp(prefix="m2d-", dir="/tmp")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        with tempfile.TemporaryDirectory(prefix="m2d-kills-") as name, log_path.open("w") as log:
            add_node(cluster)
            folder = Path(name)
            write_demo_dataset(folder / "data", total=70)
            broken = Training(folder, "broken", cluster.address, every_steps, log)
            broken.begin()
            strikes: list[Strike] = []
            last = time.monotonic()
            for what in kinds:
                due = last + moments.expovariate(1 / mtbf_s)
                if due > broken.began + 60 * minutes:
                    break
                until(lambda due=due: time.monotonic() >= due, broken.process, log_path)  # type: ignore[misc]
                strikes.append(strike(what, broken, cluster, notice_s, last, moments))
                last = time.monotonic() - strikes[-1].again_s
                print(strikes[-1], flush=True)
            goal = (broken.step() // every_steps + 1) * every_steps
            broken.stop_after(goal)
            unbroken = Training(folder, "unbroken", cluster.address, every_steps, log)
            unbroken.begin()
            unbroken.stop_after(goal)
            outcome = held_against(broken, unbroken, goal)
    finally:
        cluster.shutdown()
        for process in below(os.getpid(), ""):
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)
    result = {"settings": {"mtbf_s": mtbf_s, "notice_s": notice_s, "every_steps": every_steps, "seed": seed},
              "cores": os.cpu_count(), "comparison": asdict(outcome),
              "strikes": [{**asdict(one), "lost": one.lost} for one in strikes]}  # fmt: skip
    Path(output).write_text(json.dumps(result, indent=1), encoding="utf-8")
    text = table(strikes, outcome)
    Path(output).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if outcome.unlike_tensors or outcome.unlike_losses or outcome.missing or outcome.twice or outcome.leftovers:
        raise SystemExit(1)


class Training:
    """A run on two workers, one on each node, and what its files tell."""

    def __init__(self, folder: Path, name: str, address: str, every_steps: int, log: TextIO) -> None:
        self.runs, self.log = folder / name, log
        self.environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        self.command = [
            sys.executable, "-m", "m2d", "train", "--config", str(ROOT / "bench" / "tiny.yaml"),
            "--data_root", str(folder / "data"), "--cache_dir", str(folder / "cache"),
            "--experiments_dir", str(self.runs), "--num_workers", "2", "--ray.cpus_per_worker", "2",
            "--data.read_cpus", "0.5", "--ray.max_failures", "-1", "--telemetry.pictures", "false",
            "--saving.every_steps", str(every_steps), "--saving.keep_last", "3",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Begin, or run the same command again."""
        self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=self.log, stderr=self.log, env=self.environment)

    @property
    def place(self) -> Path:
        """The experiment's directory; one that is not there before it is."""
        return next(self.runs.glob("tiny_*"), self.runs / "none")

    @property
    def record(self) -> Path:
        """A line for each step. Resuming replaces the file by one without the steps that will be taken again."""
        return self.place / "metrics" / "train.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """All steps."""
        return MetricsLog(self.record.parent, "train").read()

    def step(self) -> int:
        """The last one on record."""
        last = MetricsLog(self.record.parent, "train").last() if self.record.is_file() else None
        return 0 if last is None else int(last["step"])

    def begin(self) -> None:
        """Wait for the first step, from which time counts."""
        until(lambda: self.step() > 0, self.process, Path(self.log.name))
        self.began = time.monotonic()

    def stop_after(self, step: int) -> None:
        """Ask it to stop as soon as that step's checkpoint is whole, and wait for its end."""
        complete = f"checkpoints/step_{step:08d}/complete.json"
        until(lambda: (self.place / complete).is_file(), self.process, Path(self.log.name))
        self.seconds = time.monotonic() - self.began
        self.process.send_signal(signal.SIGTERM)
        if (code := self.process.wait(LONGEST_S)) != 128 + signal.SIGTERM:
            raise SystemExit(f"the run was asked to stop and ended with {code}; its log is {self.log.name}")


def strike(
    what: str, run: Training, cluster: "Cluster", notice_s: float, last: float, moments: random.Random
) -> Strike:
    """Kill, and wait until the run takes steps again."""
    if what == "notice":
        drain(cluster.address, next(iter(cluster.worker_nodes)).node_id, notice_s)
        time.sleep(notice_s)
    workers = below(os.getpid(), WORKER)
    before, at_step, struck = run.record.stat().st_ino, run.step(), time.monotonic()
    if what == "worker":
        moments.choice(workers).kill()
    elif what == "driver":
        run.process.kill()
        run.process.wait()
        run.start()
    else:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        add_node(cluster)
    until(lambda: run.record.stat().st_ino != before, run.process, Path(run.log.name))
    resumed_from = run.step()  # at once: the first step after it takes longer
    until(lambda: run.step() > resumed_from, run.process, Path(run.log.name))
    return Strike(what, struck - last, max(at_step, resumed_from), resumed_from, time.monotonic() - struck)


def add_node(cluster: "Cluster") -> None:
    """A second node; Ray gives it a few seconds to answer, which a busy machine may not keep."""
    for attempt in range(5):
        try:
            cluster.add_node(**NODE)
        except Exception:
            if attempt == 4:
                raise
        else:
            return


def drain(address: str, node_id: str, notice_s: float) -> None:
    """What a spot instance's notice becomes in Ray."""
    subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id,
         "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
         "--deadline-remaining-seconds", str(math.ceil(notice_s))],
        check=True, capture_output=True,
    )  # fmt: skip


def held_against(broken: Training, unbroken: Training, step: int) -> Comparison:
    """Weights, moments and averages after that step, and the losses on the way."""
    records = [[r for r in run.records() if r["step"] <= step] for run in (broken, unbroken)]
    losses = [
        {int(r["step"]): {name: value for name, value in r.items() if name.startswith("loss/")} for r in of_run}
        for of_run in records
    ]
    steps = [int(r["step"]) for r in records[0]]
    found, expected = (tensors(run.place / "checkpoints" / f"step_{step:08d}") for run in (broken, unbroken))
    unlike = [name for name in expected.keys() | found.keys() if not same(found.get(name), expected.get(name))]
    differences = [float((found[n].double() - expected[n].double()).abs().max()) for n in unlike if n in found]
    return Comparison(
        step=step,
        unlike_tensors=len(unlike),
        tensors=len(expected),
        largest_difference=max(differences, default=0.0),
        unlike_losses=sum(losses[0].get(n) != losses[1].get(n) for n in range(1, step + 1)),
        missing=step - len(set(steps)),
        twice=len(steps) - len(set(steps)),
        leftovers=len(list(broken.place.rglob("*.partial*"))),
        unbroken_s=unbroken.seconds,
        broken_s=broken.seconds,
    )


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds."""
    return {
        f"{path.relative_to(checkpoint)}:{name}": tensor
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Bit for bit."""
    return one is not None and other is not None and torch.equal(one, other)


def table(strikes: list[Strike], outcome: Comparison) -> str:
    """As Markdown: the kills by kind, then the comparison."""
    lines = ["| killed | times | steps lost | mean | seconds to the next step | mean |", "|---|---|---|---|---|---|"]
    for what in sorted({one.what for one in strikes}):
        lost = [one.lost for one in strikes if one.what == what]
        again = [one.again_s for one in strikes if one.what == what]
        each, seconds = ", ".join(map(str, lost)), ", ".join(f"{value:.0f}" for value in again)
        means = statistics.mean(lost), statistics.mean(again)
        name = "node, after a notice" if what == "notice" else what
        lines.append(f"| {name} | {len(lost)} | {each} | {means[0]:.0f} | {seconds} | {means[1]:.0f} |")
    between = statistics.mean(one.after_s for one in strikes)
    return "\n".join(
        [
            *lines,
            "",
            f"{outcome.step} steps; a kill every {between:.0f} s on average. Against the unbroken run:",
            f"{outcome.unlike_tensors} of {outcome.tensors} tensors unlike (largest difference "
            f"{outcome.largest_difference:g}), {outcome.unlike_losses} steps with other losses, "
            f"{outcome.missing} steps missing, {outcome.twice} twice, {outcome.leftovers} partial files left;",
            f"{outcome.broken_s:.0f} s instead of {outcome.unbroken_s:.0f} s, "
            f"{(outcome.broken_s - outcome.unbroken_s) / len(strikes):.0f} s a kill.",
            "",
        ]
    )


def made(root: Path) -> int:
    """Image files that are whole; a partial one has another suffix."""
    return len(list(root.glob("*/*.png")))


def below(parent: int, named: str) -> list[psutil.Process]:
    """The descendants of a process whose command line has this in it."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if named in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait; the run must still be going on then."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run was over before it could be killed, with {process.returncode}; its log is {log}")
        time.sleep(0.02)


def compared(root: Path, unbroken: Path, killed_at: list[int]) -> Outcome:
    """What is in the folder, read again from the disk."""
    rows = pq.read_table(root / "manifest.parquet").to_pylist()
    planned = pq.read_table(root / "plan.parquet")["id"].to_pylist()
    ids = [row["id"] for row in rows]
    hashes = {row["path"]: hashlib.sha256((root / row["path"]).read_bytes()).hexdigest() for row in rows}
    other = {p.relative_to(unbroken).as_posix(): p.read_bytes() for p in unbroken.glob("*/*.png")}
    own = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.glob("*/*.png")}
    return Outcome(
        images=len(rows),
        killed_at=killed_at,
        missing=len(set(planned) - set(ids)),
        twice=len(ids) - len(set(ids)),
        wrong_hash=sum(hashes[row["path"]] != row["sha256"] for row in rows),
        unlike=sum(own.get(path) != other.get(path) for path in own.keys() | other.keys()),
        leftovers=len(list(root.rglob("*.partial*"))),
    )


if __name__ == "__main__":
    auto_cli([generation, training], as_positional=False)
