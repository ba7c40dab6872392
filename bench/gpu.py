"""What a GPU makes of M2D, in about five minutes: `make gpu`, or python bench/gpu.py. Needs no data and no weights.

Runs the tests that need a GPU, then measures on random networks: a training step of every preset that fits, its memory
beside the prediction of `train --dry_run`, what switches such as torch.compile change, sampling, and with two GPUs or
more a step over NCCL. Writes docs/results/gpu-NAME.md, ready to be sent in, and the same as JSON beside it.

A step is the worker's own: precision, TF32, allocator, pinned batches and draws as in training. It stands for all steps
in which every network learns. One synthetic batch with cached features stays in memory, so no reading is measured.
Accumulation is cut to two micro-batches, so that a step is short; with more, the update's share is smaller. The
perceptual loss is the extractor's, whose weights M2D always has.
"""

import gc
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

# As training workers have it; torch reads it when it is imported.
os.environ["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from m2d.arguments import preset_names
from m2d.classes import ISIC7
from m2d.cli import parse
from m2d.cluster.nodes import gpu_facts
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import ConfigError, M2DError
from m2d.generation.generator import Generator
from m2d.generation.plan import rows_of, standard_plan
from m2d.models.checkpoint import Checkpoint, CheckpointInfo
from m2d.models.extractors import Features
from m2d.models.perceptual import build_perceptual
from m2d.models.precision import DTYPES, pick_precision
from m2d.models.settings import Precision
from m2d.training.batch import Draws, ImageBatch, LatentBatch, draw, pinned
from m2d.training.dry_run import FakeRun
from m2d.training.measure import peak_flops
from m2d.training.networks import Networks, build_networks, idle_modules
from m2d.training.settings import TrainConfig
from m2d.training.step import DecoderStep, JointStep, LatentStep, StepConfig, build_step

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
FEATURE_DIM, PATCH = 1280, 32  # EfficientNet-Lite0's, which all presets name
WARMUP = 3  # steps before the clock starts: moments are made, kernels chosen and compiled
ROW_S = 5.0  # a row takes fewer steps where they would take longer
DDP_STEPS = 10
SAMPLED = 32  # images in a batch, as `generate` has it
# Images a second that an H100 should reach: a quarter of its peak.
GOALS = {"ham-128": 860, "ham-128-latent": 4200, "isic-256": 82, "isic-256-latent": 1850}
SAMPLING_GOALS = {"ham-128": 270, "isic-256": 94}
WORKSPACES_GIB = 0.1  # of cuBLAS and cuDNN, which no prediction counts
TESTS = "tests that need a GPU"
SWITCHED = ("ham-128", "ham-64", "demo")  # the first that fits is measured with switches turned
# Presets are for small cards; a large one takes the same steps in larger micro-batches.
LARGER = {"isic-256": 32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to measure: a preset's settings, and what is unlike in them."""

    name: str
    config: TrainConfig
    benchmark: bool = False  # cuDNN tries its algorithms


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured. None: it does not apply."""

    name: str
    part: str = ""  # of PARTS
    batch: str | None = None  # images x micro-batches x workers
    precision: Precision | None = None
    steps: int | None = None
    images_per_s: float | None = None
    goal: float | None = None
    step_s: float | None = None
    first_step_s: float | None = None  # compilation and choice of kernels included
    tflops: float | None = None
    utilisation: float | None = None  # of the peak, 1 is all
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    predicted_gib: float | None = None
    kernels: int | None = None  # in one step
    kernel_s: float | None = None  # their own time: what a step takes where the host keeps up
    host_waits: int | None = None  # in one step
    waits_at: list[str] = field(default_factory=list)
    failed: str | None = None  # why there are no numbers


def main(
    presets: list[str] | None = None,
    steps: int = 20,
    device: str = "cuda",
    compile: bool = True,  # noqa: A002 - the flag is called so
    tests: bool = True,
    workers: int | None = None,
    output: str | None = None,
) -> None:
    """Measure, print and write.

    Args:
        presets: which; none takes all of them
        steps: timed ones in a row, fewer where a step is long
        device: cpu tries the demo preset only, to test this script
        compile: measure torch.compile too, which takes a minute
        tests: run the tests that need a GPU first
        workers: of the step over NCCL; none takes two where there are two GPUs
        output: a folder; none takes docs/results, and bench/out on a CPU
    """
    facts, where = gpu_facts(), torch.device(device)
    on_gpu = where.type == "cuda"
    if on_gpu and facts.name is None:
        raise ConfigError(f"torch sees no GPU (--device cpu tries this script without one): {facts.advice}")
    if steps < 1:
        raise ConfigError(f"steps is {steps}; it must be at least 1")
    names = presets or (preset_names() if on_gpu else ["demo"])
    cases = preset_cases(names, where)
    set_up_torch(where)
    folder = ROOT / ("docs/results" if on_gpu else "bench/out") if output is None else Path(output)
    report = Report(facts.name if on_gpu and facts.name else "cpu", folder)
    command = f"python bench/gpu.py --steps {steps}" + (f" --presets '[{','.join(presets)}]'" if presets else "")
    report.facts = machine(where) | {"driver": facts.driver or "not found", "command": command}
    if tests and on_gpu:
        report.facts[TESTS] = run_gpu_tests()
    for case in cases:
        report.add(case.name, "presets", partial(measure, case, steps, where))
    for name in SAMPLING_GOALS if on_gpu else ["demo"]:
        report.add(name, "sampling", partial(measure_sampling, name, where))
    fitting = {row.name for row in report.rows if row.part == "presets" and row.failed is None}
    base = next((name for name in SWITCHED if name in fitting), names[0])
    workers = min(torch.cuda.device_count(), 2) if workers is None and on_gpu else workers or 0
    if workers > 1:
        report.add(f"{base}, {workers} workers", "workers", partial(measure_workers, base, where.type, workers))
    for case in switch_cases(base, where, compiled=compile and on_gpu):
        report.add(case.name, "switches", partial(measure, case, steps, where))
    if on_gpu:
        report.predict({case.name: case.config for case in cases})
    print(f"\n{report.markdown()}\nwritten: {report.save()}")


def settings(preset: str, device: torch.device, *flags: str) -> TrainConfig:
    """A preset as the command line reads it, in a step of which every network learns."""
    config: TrainConfig = parse(
        "train",
        ["--preset", preset, "--init_checkpoint", "random", "--autoencoder.pretrained", "null",
         "--perceptual.kind", "features", "--schedule.vae_warmup_fraction", "0", "--discriminator.start_step", "0",
         *flags],
    )  # fmt: skip
    return replace(
        config,
        gradient_accumulation_steps=min(config.gradient_accumulation_steps, 2),
        mixed_precision=pick_precision(config.mixed_precision, device),
    )


def preset_cases(names: Sequence[str], device: torch.device) -> list[Case]:
    """Each preset at its own batch, and those for small cards at a large one's too."""
    cases = [Case(name=name, config=settings(name, device)) for name in names]
    for name, size in LARGER.items():
        if name in names:
            flags = ("--batch_size", str(size), "--gradient_accumulation_steps", "1")
            cases.append(Case(name=f"{name}, batch {size}", config=settings(name, device, *flags)))
    return cases


def switch_cases(preset: str, device: torch.device, *, compiled: bool) -> list[Case]:
    """The preset as it is and with each switch turned; torch.compile on its latent stage, where launches count most."""

    def case(name: str, label: str, *flags: str, benchmark: bool = False) -> Case:
        return Case(name=f"{name}, {label}", config=settings(name, device, *flags), benchmark=benchmark)

    config = settings(preset, device)
    last = str(not config.channels_last).lower()
    cases = [case(preset, "as it is"), case(preset, f"channels_last {last}", "--channels_last", last)]
    if device.type == "cuda":
        precision = "bf16" if config.mixed_precision == "no" else "no"
        cases.append(case(preset, "cudnn.benchmark", benchmark=True))
        cases.append(case(preset, f"mixed_precision {precision}", "--mixed_precision", precision))
    if compiled:
        latent = f"{preset}-latent" if f"{preset}-latent" in preset_names() else preset
        cases += [
            case(latent, "as it is"),
            case(latent, "compile", "--compile", "true"),
            case(latent, "compile, reduce-overhead", "--compile", "true", "--compile_mode", "reduce-overhead"),
        ]
    return cases


class Training:
    """A preset's random networks and their step, as m2d.training.loop builds them, and a batch in memory."""

    def __init__(self, config: TrainConfig, device: torch.device, *, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.device, self.rank = config, device, rank
        self.networks = networks = random_networks(config, device)
        self.step = step_of(config, networks, device, distributed=world_size > 1)
        self.latent_shape = networks.denoiser.latent_shape(config.data.image_size, networks.autoencoder.downsampling)
        self.micro_batches = config.gradient_accumulation_steps
        self.batch = self._batch()
        for module in idle_modules(config, networks, self.step.ema.module):
            module.to("cpu")

    def take(self, number: int) -> None:
        """One optimiser step."""
        micro_batches = [(self.batch, self.draws(number * self.micro_batches + k)) for k in range(self.micro_batches)]
        self.step(micro_batches, number)

    def flops(self) -> int:
        """Of a step."""
        return self.step.flops(self.batch, self.draws(0), 0) * self.micro_batches

    def draws(self, micro_batch: int) -> Draws:
        """Of the worker's micro-batch."""
        size, config = self.config.batch_size, self.config
        first = (micro_batch * 2 + self.rank) * size
        rows = torch.arange(first, first + size, device=self.device)
        return draw(config.seed, rows, self.latent_shape, FEATURE_DIM, config.conditioning)

    def _batch(self) -> ImageBatch | LatentBatch:
        size, side = self.config.batch_size, self.config.data.image_size
        generator = torch.Generator().manual_seed(self.rank)
        cells = (self.config.feature_extractor.input_size or 224) // PATCH
        labels = torch.randint(len(ISIC7), (size,), generator=generator)
        features = Features(
            torch.randn(size, FEATURE_DIM, generator=generator).half(),
            torch.randn(size, cells**2, FEATURE_DIM, generator=generator).half(),
        )
        batch: ImageBatch | LatentBatch
        if self.config.stage == "latent":
            mean = torch.randn(size, *self.latent_shape, generator=generator).half()
            batch = LatentBatch(mean, torch.full_like(mean, 0.1), features, labels)
        else:
            images = torch.randint(256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
            batch = ImageBatch(images, labels, features)
        return pinned(batch) if self.device.type == "cuda" else batch


def random_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Those of a run that starts from scratch, also in stages that cannot: no checkpoint is read."""
    discriminator = replace(config.discriminator, enabled=config.discriminator.enabled and config.stage != "latent")
    fresh = replace(config, stage="joint", init_checkpoint=None, discriminator=discriminator)
    return build_networks(fresh, device, FEATURE_DIM)


def step_of(
    config: TrainConfig, networks: Networks, device: torch.device, *, distributed: bool
) -> JointStep | LatentStep | DecoderStep:
    """The step of the config's stage; every network learns in it from its first step on."""
    config = replace(config, discriminator=replace(config.discriminator, start_step=0))
    step_config = StepConfig(config, precision=config.mixed_precision or "no", total_steps=config.max_steps or 10_000)
    perceptual = build_perceptual("features", None)
    if config.stage != "latent":
        perceptual.to(device)
    return build_step(config.stage, networks, perceptual, step_config, device, distributed)


def measure(case: Case, steps: int, device: torch.device) -> Row:
    """Take the case's steps. FLOPs are not counted under torch.compile."""
    config, on_gpu = case.config, device.type == "cuda"
    before = _clear(device)
    torch.backends.cudnn.benchmark = case.benchmark
    training = Training(config, device)
    flops = None if config.compile else training.flops()
    warm = [_seconds(partial(training.take, number), device) for number in range(WARMUP if on_gpu else 1)]
    first = len(warm)
    steps = max(1, min(steps, int(ROW_S / warm[-1])))
    seconds, memory = _measured(lambda: [training.take(first + number) for number in range(steps)], device, before)
    waits = host_waits(partial(training.take, first + steps)) if on_gpu else []
    kernels, kernel_s = kernel_time(partial(training.take, first + steps + 1)) if on_gpu else (None, None)
    skipped = training.step.read_scalars()["skipped_steps"]
    if skipped >= 1:
        raise RuntimeError(f"{skipped:.0f} steps were skipped: a loss or gradient is not finite")
    precision = config.mixed_precision or "no"
    images, step_s = config.batch_size * training.micro_batches, seconds / steps
    return Row(
        name=case.name,
        batch=f"{config.batch_size} x {training.micro_batches}",
        precision=precision,
        steps=steps,
        images_per_s=images / step_s,
        goal=GOALS.get(case.name.partition(", batch")[0]),
        step_s=step_s,
        first_step_s=warm[0],
        tflops=None if flops is None else flops / step_s / 1e12,
        utilisation=None if flops is None else flops / step_s / _peak(device, precision),
        kernels=kernels or None,  # none are seen where the profiler may not look
        kernel_s=kernel_s or None,
        host_waits=len(waits) if on_gpu else None,
        waits_at=sorted(set(waits)),
        **memory,
    )


def measure_sampling(preset: str, device: torch.device, batches: int = 2) -> Row:
    """Images a second of Generator with its default solver, guided by the class; pixels are in host memory at the end.

    One batch before is not timed.
    """
    before = _clear(device)
    on_gpu = device.type == "cuda"
    size = SAMPLED if on_gpu else 2
    sampling = SamplingSettings() if on_gpu else SamplingSettings(steps=2)
    config = settings(preset, device)
    networks = random_networks(config, device)
    info = CheckpointInfo(
        step=0, stage="joint", image_size=config.data.image_size, feature_extractor=config.feature_extractor.name,
        feature_dim=FEATURE_DIM, num_patches=16, conditioning=vars(config.conditioning), config={},
    )  # fmt: skip
    frozen = [network.eval().requires_grad_(False) for network in (networks.autoencoder, networks.denoiser)]
    checkpoint = Checkpoint(f"random {preset}", "0" * 64, info, *frozen)
    del networks
    generator = Generator(checkpoint, batch_size=size, device=str(device))
    each = -(-size * batches // len(ISIC7))
    table = standard_plan(dict.fromkeys(ISIC7.codes, each), run_seed=0, sampling=sampling, feature="none")
    rows = rows_of(table)[: size * batches]
    generator.generate(rows[:size])
    seconds, memory = _measured(lambda: generator.generate(rows), device, before)
    return Row(
        name=f"{preset}, {sampling.solver}, {sampling.steps} steps",
        batch=f"{size} x {batches}",
        precision=generator.precision,
        images_per_s=len(rows) / seconds,
        goal=SAMPLING_GOALS.get(preset),
        **memory,
    )


def measure_workers(preset: str, device_type: str, workers: int) -> Row:
    """DDP over NCCL (gloo on a CPU), a process for each GPU, each with images of its own: weights must stay equal."""
    _clear(torch.device(device_type))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, args=(preset, device_type, workers, folder), nprocs=workers)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    return Row(name=f"{preset}, {workers} workers", **found)


def _work(rank: int, preset: str, device_type: str, workers: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # NCCL's newer engine takes its device from it
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_up_torch(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    try:
        config = settings(preset, device)
        training = Training(config, device, rank=rank, world_size=workers)
        first_step_s = _seconds(lambda: training.take(0), device)
        seconds = _seconds(lambda: [training.take(1 + n) for n in range(DDP_STEPS)], device) / DDP_STEPS
        modules = training.networks.trained().values()
        sums = torch.stack([p.detach().double().sum() for module in modules for p in module.parameters()])
        everyone = [torch.empty_like(sums) for _ in range(workers)]
        dist.all_gather(everyone, sums)
        equal = all(torch.equal(theirs, sums) for theirs in everyone)
        if rank == 0:
            found = {
                "batch": f"{config.batch_size} x {training.micro_batches} x {workers}",
                "precision": config.mixed_precision,
                "steps": DDP_STEPS,
                "images_per_s": config.batch_size * training.micro_batches * workers / seconds,
                "step_s": seconds,
                "first_step_s": first_step_s,
                "failed": None if equal else f"weights differ between workers after {DDP_STEPS + 1} steps",
            }
            (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def attempt(name: str, compute: Callable[[], Row]) -> Row:
    """The row, or why there is none: one that fails does not cost the table."""
    try:
        return compute()
    except Exception as error:  # whatever a GPU, its driver or a compiler says
        text = f"{type(error).__name__}: {error}".replace(str(ROOT), ".").replace(str(Path.home()), "~")
        if re.search("OutOfMemoryError|ALLOC_FAILED", text):  # torch's own words, and cuBLAS's and cuDNN's
            return Row(name=name, failed="does not fit")
        lines = [line for line in text.splitlines() if line.strip()]
        in_worker = isinstance(error, torch.multiprocessing.ProcessRaisedException)  # a traceback, its error last
        return Row(name=name, failed=lines[-1 if in_worker else 0][:200])


def host_waits(compute: Callable[[], object]) -> list[str]:
    """file:line of everything in `compute` for which the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]


def kernel_time(compute: Callable[[], object]) -> tuple[int, float]:
    """How many kernels and copies `compute` runs on the GPU, and their seconds, one after the other."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        compute()
        torch.cuda.synchronize()
    spans = [event.time_range.elapsed_us() for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return len(spans), sum(spans) / 1e6


def predicted_gib(config: TrainConfig) -> float:
    """What `train --dry_run` says of live tensors at the peak."""
    run = FakeRun(config, train_images=10_000, cached=True)
    return float(run.cost(config.batch_size).peak) / GIB


def run_gpu_tests() -> str:
    """The last line of pytest, shown as it runs."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return last.strip("= ")


def set_up_torch(device: torch.device) -> None:
    """As training workers have it."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


class Report:
    """The rows so far, and the two files that hold them: written after each row, so that nothing is lost."""

    def __init__(self, device_name: str, folder: Path) -> None:
        self.device_name = device_name
        self.path = folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.md"
        self.facts: dict[str, str] = {}
        self.rows: list[Row] = []
        self._began = time.perf_counter()

    def add(self, name: str, part: str, compute: Callable[[], Row]) -> None:
        """Measure a row, print it, and write."""
        row = replace(attempt(name, compute), part=part)
        self.rows.append(row)
        outcome = row.failed or f"{_number(row.images_per_s)} images/s"
        print(f"[{time.perf_counter() - self._began:4.0f} s] {part}: {row.name}: {outcome}", flush=True)
        self.save()

    def predict(self, configs: Mapping[str, TrainConfig]) -> None:
        """Give the presets' rows their predicted memory, counted side by side on the CPU's cores."""
        with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            counts = {name: pool.submit(predicted_gib, config) for name, config in configs.items()}
            for place, row in enumerate(self.rows):
                if row.part != "presets":
                    continue
                error = counts[row.name].exception()
                if error is None:
                    self.rows[place] = replace(row, predicted_gib=counts[row.name].result())
                else:
                    print(f"no prediction for {row.name}: {type(error).__name__}: {error}", flush=True)
        print(f"[{time.perf_counter() - self._began:4.0f} s] memory is predicted", flush=True)
        self.save()

    def save(self) -> Path:
        """Write both files; returns the table's."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.markdown(), encoding="utf-8")
        document = self.facts | {"rows": [asdict(row) for row in self.rows]}
        self.path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return self.path

    def markdown(self) -> str:
        """Everything, for people."""
        lines = [f"# What M2D does on {self.device_name}", "", *_table(["", ""], self.facts.items()), ""]
        for part, (title, text) in PARTS.items():
            rows = [row for row in self.rows if row.part == part]
            used = [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]
            cells = [[row.name, *(column.cell(row) for column in used), row.failed or ""] for row in rows]
            if rows:
                lines += [f"## {title}", "", text, ""]
                lines += [*_table(["", *(column.head for column in used), ""], cells), ""]
        return "\n".join([*lines, "## What falls short", "", *(self.short() or ["Nothing."])]) + "\n"

    def short(self) -> list[str]:
        """A line for each finding to look into."""
        tests = self.facts.get(TESTS, "")
        found = [f"- {TESTS}: {tests}"] if re.search("failed|error", tests) else []
        for row in self.rows:
            share, gib = _of_prediction(row), abs((row.allocated_gib or 0) - (row.predicted_gib or 0))
            if row.failed:
                found.append(f"- {row.name} ({row.part}): {row.failed}")
            if row.host_waits:
                found.append(f"- {row.name}: the host waits {row.host_waits} times a step, at {' '.join(row.waits_at)}")
            if share is not None and abs(share - 1) > 0.1 and gib > WORKSPACES_GIB:
                found.append(f"- {row.name}: memory is {share:.2f} of the prediction")
        return found


@dataclass(frozen=True)
class Column:
    """A column of the tables; it is left out where no row has a value."""

    head: str
    value: Callable[[Row], Any]
    shown: Callable[[Any], str] = str

    def cell(self, row: Row) -> str:
        """The row's value, as text."""
        value = self.value(row)
        return "" if value is None else self.shown(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _of_prediction(row: Row) -> float | None:
    if row.allocated_gib is None or row.predicted_gib is None:
        return None
    return row.allocated_gib / row.predicted_gib


COLUMNS = [
    Column("batch", lambda row: row.batch),
    Column("precision", lambda row: row.precision),
    Column("images/s", lambda row: row.images_per_s, _number),
    Column("goal on an H100", lambda row: row.goal, _number),
    Column("s a step", lambda row: row.step_s, "{:.4f}".format),
    Column("s, first step", lambda row: row.first_step_s, "{:.1f}".format),
    Column("TFLOP/s", lambda row: row.tflops, _number),
    Column("utilisation", lambda row: row.utilisation, "{:.1%}".format),
    Column("allocated GiB", lambda row: row.allocated_gib, "{:.2f}".format),
    Column("predicted GiB", lambda row: row.predicted_gib, "{:.2f}".format),
    Column("allocated / predicted", _of_prediction, "{:.2f}".format),
    Column("reserved GiB", lambda row: row.reserved_gib, "{:.2f}".format),
    Column("kernels", lambda row: row.kernels, "{:,}".format),
    Column("s, kernels alone", lambda row: row.kernel_s, "{:.4f}".format),
    Column("host waits", lambda row: row.host_waits),
]
PARTS = {
    "presets": (
        "A training step of each preset",
        "Random networks, one synthetic batch in memory, cached features, every network learning, at most two\n"
        "micro-batches a step (8 x 2: two of 8 images). Goals are a quarter of an H100's peak. Memory is of a step in\n"
        "its steady state; predicted are the live tensors that `train --dry_run` counts. Where the kernels alone\n"
        "take much less than a step, the host sets the pace.",
    ),
    "switches": ("What switches change", "The same, with one setting turned in each row."),
    "sampling": ("Sampling", "`Generator` on random networks, guided by the class, without Ray."),
    "workers": ("Several GPUs", f"DDP, a process for each GPU, {DDP_STEPS} steps; the weights stay equal."),
}


def machine(device: torch.device) -> dict[str, str]:
    """What a number is worth nothing without."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    facts = {
        "date": date.today().isoformat(),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "Python, torch": f"{platform.python_version()}, {torch.__version__}",
        "CPU cores": str(os.cpu_count()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        peak, source = peak_flops(device, DTYPES[pick_precision(None, device)])
        facts |= {
            "CUDA, cuDNN": f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
            "GPUs": f"{torch.cuda.device_count()} of {properties.total_memory / GIB:.1f} GiB, "
            f"compute capability {properties.major}.{properties.minor}",
            "peak TFLOP/s": f"{peak / 1e12:.0f} ({source})",
        }
    return facts


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


@cache
def _peak(device: torch.device, precision: Precision) -> float:
    return peak_flops(device, DTYPES[precision])[0]


def _seconds(compute: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    synchronize()
    began = time.perf_counter()
    compute()
    synchronize()
    return time.perf_counter() - began


def _clear(device: torch.device) -> int:
    """Give back what earlier rows left. Returns the bytes that are allocated still."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _measured(compute: Callable[[], object], device: torch.device, before: int) -> tuple[float, dict[str, float]]:
    """Seconds, and on a GPU the most GiB allocated (beside what was before) and reserved."""
    if device.type != "cuda":
        return _seconds(compute, device), {}
    torch.cuda.reset_peak_memory_stats(device)
    seconds = _seconds(compute, device)
    return seconds, {
        "allocated_gib": (torch.cuda.max_memory_allocated(device) - before) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


if __name__ == "__main__":
    try:
        auto_cli(main)
    except M2DError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
