"""Images a second and latency of the service at 1, 4 and 16 clients, beside its generator called directly, in one run.

python bench/serving.py --checkpoint experiments/NAME/checkpoints/best --output bench/out/serving.json

The service is `jobs/serve.py` in a process of its own, on a free port; its clients are threads of this one, each with a
request of `count` images under way at any time. The generator runs in this process with as many threads and as large a
batch as a replica, before the service starts and after it has ended: read the ratios, as the machine may be busy.
Without --checkpoint the networks are random ones of a preset. In the first pass of each the caches are cold: not timed.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import torch
from jsonargparse import auto_cli
from sampling import random_checkpoint

from m2d.diffusion.settings import SamplingSettings
from m2d.files.atomic import mark_complete
from m2d.generation.generator import Generator
from m2d.generation.plan import rows_of, standard_plan
from m2d.models.checkpoint import Checkpoint, load_checkpoint, write_inference_files
from m2d.serving.client import Client

ROOT = Path(__file__).resolve().parent.parent
START_S = 300


def main(
    checkpoint: str | None = None,
    preset: str = "ham-64",
    clients: tuple[int, ...] = (1, 4, 16),
    count: int = 1,
    batch_size: int = 8,
    steps: int = 10,
    seconds: float = 60,
    threads: int = 1,
    output: str | None = None,
) -> None:
    """Measure, print a table, and write it as JSON.

    Args:
        checkpoint: to serve; None: random networks of the preset.
        preset: whose networks, where no checkpoint is given.
        clients: at once, one row each.
        count: images a request.
        batch_size: of the service and of the generator.
        steps: of the solver.
        seconds: of each row.
        threads: of torch, where a CPU computes; a replica has as many as Ray gives it, one.
        output: a JSON file of the numbers.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        place = checkpoint or str(written(random_checkpoint(preset), Path(folder) / "random/checkpoints/best"))
        before = direct_rate(place, batch_size, steps, seconds / 2)
        with served(place, batch_size, Path(folder) / "serving") as url:
            Client(url).images(Client(url).models()[0]["classes"][0]["code"], 1, steps=steps)
            measured = [(number, *measure(url, number, count, steps, seconds)) for number in clients]
        rate = statistics.mean([before, after := direct_rate(place, batch_size, steps, seconds / 2)])
    rows = []  # requests: seconds of each; /healthz was asked once in 0.1 s meanwhile
    for number, images, latencies, health in measured:
        cuts, pulse = statistics.quantiles(latencies, n=20), statistics.quantiles(health, n=100)
        row = {"clients": number, "images_per_s": images / seconds, "share": images / seconds / rate}
        row |= {"p50_s": cuts[9], "p95_s": cuts[18], "requests": len(latencies)}
        rows.append(row | {"healthz_p50_ms": 1000 * pulse[49], "healthz_p99_ms": 1000 * pulse[98]})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread(s)"
    print(f"{device}; batch size {batch_size}, {steps} steps, {count} image(s) a request, {seconds:g} s a row")
    print(f"the generator called directly: {before:.2f} images/s before, {after:.2f} after")
    print(
        "| clients | images/s | share of direct | p50, s | p95, s | /healthz p50, p99, ms |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            "| {clients} | {images_per_s:.2f} | {share:.0%} | {p50_s:.2f} | {p95_s:.2f} "
            "| {healthz_p50_ms:.0f}, {healthz_p99_ms:.0f} |".format(**row)
        )
    if output is not None:
        setting = {"device": device, "batch_size": batch_size, "steps": steps, "count": count, "seconds": seconds}
        record = setting | {"preset": checkpoint or preset, "direct": [before, after], "rows": rows}
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def written(checkpoint: Checkpoint, directory: Path) -> Path:
    """The checkpoint, as training writes it."""
    for part in ("vae", "unet"):
        (directory / part).mkdir(parents=True)
    networks = checkpoint.autoencoder, checkpoint.denoiser
    tensors = {"vae": networks[0].vae.state_dict(), "denoiser": networks[1].state_dict()}
    write_inference_files(directory, checkpoint.info, networks[0], networks[1].unet, tensors)
    mark_complete(directory)
    return directory


def direct_rate(checkpoint: str, batch_size: int, steps: int, seconds: float) -> float:
    """Images a second of full batches, PNG encoding and all else left out."""
    generator = Generator(load_checkpoint(checkpoint), batch_size=batch_size)
    rows = rows_of(
        standard_plan(
            dict.fromkeys(generator.classes.codes, batch_size),
            run_seed=0,
            sampling=SamplingSettings(steps=steps),
            feature="none",
        )
    )[:batch_size]
    generator.generate(rows)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += len(generator.generate(rows))
    return images / (time.perf_counter() - began)


@contextmanager
def served(checkpoint: str, batch_size: int, directory: Path) -> Iterator[str]:
    """The URL of a service that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "jobs/serve.py"), "--checkpoint", checkpoint, "--port", str(port)]
    command += ["--batch_size", str(batch_size), "--directory", str(directory), "--gates.enabled", "false"]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as service:
        try:
            for _ in range(START_S):
                try:
                    if requests.get(f"{url}/readyz", timeout=5).ok:
                        break
                except OSError:
                    pass
                if service.poll() is not None:
                    sys.exit(f"the service ended with exit code {service.returncode}; its line is above")
                time.sleep(1)
            else:
                sys.exit(f"the service was not ready within {START_S} s")
            yield url
        finally:
            service.terminate()  # it ends after what is under way; in the background of a shell SIGINT is ignored


def measure(url: str, clients: int, count: int, steps: int, seconds: float) -> tuple[int, list[float], list[float]]:
    """(images that arrived in time, seconds of each request, seconds of each /healthz meanwhile)."""
    until, lock = time.perf_counter() + seconds, threading.Lock()
    images, latencies, health = 0, list[float](), list[float]()

    def ask(number: int) -> None:
        nonlocal images
        client = Client(url)
        codes = [one["code"] for one in client.models()[0]["classes"]]
        turn = number
        while (began := time.perf_counter()) < until:
            found = client.images(codes[turn % len(codes)], count, steps=steps)
            turn += 1
            with lock:
                latencies.append(time.perf_counter() - began)
                images += len(found) if time.perf_counter() <= until else 0

    def pulse() -> None:
        with requests.Session() as session:
            while (began := time.perf_counter()) < until:
                session.get(f"{url}/healthz", timeout=60).raise_for_status()
                health.append(time.perf_counter() - began)
                time.sleep(0.1)

    crowd = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    crowd.append(threading.Thread(target=pulse))
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    return images, latencies, health


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
