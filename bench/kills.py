"""Mass generation under SIGKILL: the driver, and apart from it an actor, killed at random moments, run again, compared.

python bench/kills.py --checkpoint experiments/RUN/checkpoints/best --output bench/out/kills.json

Three runs of the same request: unbroken, with the driver killed `kills` times and run again each time, and with an
actor killed `kills` times. Every image of the broken runs must be the unbroken run's, byte for byte, none missing and
none twice; anything else ends with exit code 1.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from jsonargparse import auto_cli

ROOT = Path(__file__).resolve().parents[1]
ACTOR = "BlockActor"  # Ray names a worker's process after its actor
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


def kills(checkpoint: str, num_samples: int = 24, steps: int = 4, kills: int = 3, seed: int = 0,
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
            until(lambda goal=goal: made(roots["actor"]) >= goal and actors(process.pid), process, log_path)  # type: ignore[misc]
            time.sleep(moments.random())
            victims = actors(process.pid)
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


def made(root: Path) -> int:
    """Image files that are whole; a partial one has another suffix."""
    return len(list(root.glob("*/*.png")))


def actors(driver: int) -> list[psutil.Process]:
    """The generators among a driver's descendants."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if ACTOR in " ".join(process.cmdline()):
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
    auto_cli(kills, as_positional=False)
