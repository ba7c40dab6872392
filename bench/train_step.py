"""What a joint training step costs: bare, as the loop that users start, and in REPA-E's order on the same networks.

python bench/train_step.py --data_root ../shared/ham10000 --output bench/out/train_step.json

Without --data_root the demo's generated images are used. Everything alternates within one process run, so that a busy
machine hurts all alike; a ratio is the median over the repetitions, each repetition's two rates divided by one another.
"Bare" is a step with its draws, on batches that lie decoded in memory. The loop's rates are those that the run itself
writes to metrics/train.jsonl, without its first intervals. CPU ms are those of this process and its descendants.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import m2d.training.step as step_module
from m2d.classes import ISIC7
from m2d.cli import parse
from m2d.data.catalog import scan_dataset
from m2d.data.order import StreamOrder
from m2d.data.reader import ImageReader
from m2d.data.setup import setup_data
from m2d.demo.dataset import write_demo_dataset
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.models.autoencoder import from_uint8
from m2d.models.perceptual import build_perceptual
from m2d.training.batch import ImageBatch, draw, extract
from m2d.training.losses import (
    DenoiserPhase,
    adversarial_loss,
    diffusion_loss,
    discriminator_loss,
    kl_loss,
    manifold_loss,
    reconstruction_loss,
)
from m2d.training.networks import Networks, build_networks
from m2d.training.settings import TrainConfig
from m2d.training.step import JointStep, StepConfig
from m2d.training.trainer import train

EVERY_K = (1, 2, 4)
ROUND = max(EVERY_K)  # steps that are timed together
IN_MEMORY = 4  # batches
SKIPPED_INTERVALS = 2  # of a run's record: memory and kernels warm up in them
SLIM = ["--autoencoder.block_channels", "[16, 32, 64]"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "joint-64.yaml"), help="of a joint run")
    parser.add_argument("--data_root", help="class folders; default: 140 of the demo's generated images")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help=f"of {ROUND} steps each, in a repetition")
    parser.add_argument("--loop_steps", type=int, default=60, help="of each real run; 0: no runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, in each contender")
    parser.add_argument("--reconstruction", type=int, default=0, help="steps of runs that compare reconstructions")
    parser.add_argument("--output", help="JSON file for all numbers")
    arguments = parser.parse_args()
    os.environ |= {"RAY_worker_niceness": "0"}  # 15 by default: on a shared machine Ray's processes would come last
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        root = Path(folder)
        if arguments.data_root is None:
            write_demo_dataset(root / "data", total=140)
            arguments.data_root = str(root / "data")
        found: dict[str, Any] = {"arguments": vars(arguments), "cores": os.cpu_count(), "torch": torch.__version__}
        if arguments.reconstruction:
            found["reconstruction"] = reconstructions(root, arguments)
        else:
            found |= speeds(root, arguments)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def configuration(root: Path, arguments: argparse.Namespace, *flags: str, cached: bool = True) -> TrainConfig:
    """The joint stage without the VAE's warm-up, in which the U-Net would do nothing."""
    places = ["--data_root", arguments.data_root, "--experiments_dir", str(root / "runs"), "--fresh"]
    places += ["--cache_dir", str(root / ("cache" if cached else "none")), "--name", "bench"]
    config: TrainConfig = parse(
        "train",
        ["--config", arguments.config, *places, "--schedule.vae_warmup_fraction", "0", "--perceptual.kind", "features",
         "--discriminator.kind", "patch",
         "--schedule.log_every_steps", "5", "--saving.every_steps", "100000", "--telemetry.pictures", "false",
         "--discriminator.start_step", "0", "--data.views", "1",
         "--ray.threads_per_worker", str(arguments.threads), *flags],
    )  # fmt: skip
    return config


def speeds(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The table of contenders and the table of the step's parts."""
    config = configuration(root, arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        places = ["--data_root", arguments.data_root, "--cache_dir", str(root / "cache"), "--num_actors", "0"]
        setup_data(parse("setup_data", ["--all", "--config", arguments.config, *places, "--data.views", "1"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extracted, cached = batches(config, device)
    contenders: dict[str, OurStep | RepaEStep] = {"step, features extracted": OurStep(config, device, extracted)}
    for k in EVERY_K:
        schedule = dataclasses.replace(config.schedule, vae_every_k_steps=k)
        name = "step, features cached" + (f", VAE each {k}. step" if k > 1 else "")
        contenders[name] = OurStep(dataclasses.replace(config, schedule=schedule), device, cached)
    contenders["REPA-E's order"] = RepaEStep(config, device, extracted, align_only=True)
    contenders["REPA-E's order, whole U-Net twice"] = RepaEStep(config, device, extracted, align_only=False)
    loops = {
        "loop on Ray, prepared data": configuration(root, arguments, "--num_workers", "1"),
        "loop on Ray, nothing prepared": configuration(root, arguments, "--num_workers", "1", cached=False),
        "loop in this process, prepared data": configuration(root, arguments, "--num_workers", "0"),
    }
    for contender in contenders.values():
        contender.one()  # warm-up
    print("warm", flush=True)
    rates: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    waits: dict[str, list[float]] = defaultdict(list)
    images = arguments.rounds * ROUND * config.batch_size
    for repetition in range(arguments.repetitions):
        seconds: dict[str, float] = defaultdict(float)
        used: dict[str, float] = defaultdict(float)
        for _ in range(arguments.rounds):
            for name, contender in contenders.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                contender.round()
                seconds[name] += time.perf_counter() - began
                used[name] += time.process_time() - cpu_began
        for name in contenders:
            rates[name].append(images / seconds[name])
            cpu[name].append(1000 * used[name] / images)
        for name, loop in loops.items() if arguments.loop_steps else ():
            # The bare step once more beside each run, for they take long enough for the machine to change its mood.
            bare = contenders["step, features extracted" if "nothing" in name else "step, features cached"]
            rate, wait, cpu_ms = run_rate(loop, arguments.loop_steps)
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(arguments.rounds):
                bare.round()
            rates[f"beside {name}"].append(images / (time.perf_counter() - began))
            cpu[f"beside {name}"].append(1000 * (time.process_time() - cpu_began) / images)
            rates[name].append(rate)
            cpu[name].append(cpu_ms)
            waits[name].append(wait)
        print(f"\nafter {repetition + 1} of {arguments.repetitions} repetitions", flush=True)
        report(rates, cpu, waits, config.batch_size)
    parts = {
        "features extracted": timed_parts(OurStep(config, device, extracted), arguments.rounds),
        "features cached": timed_parts(OurStep(config, device, cached), arguments.rounds),
    }
    report_parts(parts)
    return {"images_per_s": rates, "cpu_ms_per_image": cpu, "data_wait_share": waits, "parts_ms": parts}


def batches(config: TrainConfig, device: torch.device) -> tuple[list[ImageBatch], list[ImageBatch]]:
    """The first batches of the run's stream, without features and with them as the cache has them."""
    catalog = scan_dataset(config.checked_data_root, config.data).catalog
    size = config.data.image_size
    reader = ImageReader(catalog, config.checked_data_root, image_size=size, max_pixels=config.data.max_pixels)
    order = StreamOrder(reader.labels, balance=config.data.balance, views=config.data.views, seed=config.seed)
    extractor = build_networks(config, device).extractor
    assert extractor is not None
    extracted, cached = [], []
    for first in range(0, IN_MEMORY * config.batch_size, config.batch_size):
        rows = torch.arange(first, first + config.batch_size).numpy()
        read = reader.read(*order.lookup(rows))
        batch = ImageBatch(torch.from_numpy(read["images"]).to(device), torch.from_numpy(read["labels"]).to(device))
        features = extract(extractor, batch.images.permute(0, 3, 1, 2))
        half = step_module.Features(features.cls.half(), features.patches.half())
        extracted.append(batch)
        cached.append(dataclasses.replace(batch, features=half))
    return extracted, cached


class OurStep:
    """JointStep on batches in memory."""

    def __init__(self, config: TrainConfig, device: torch.device, batches: list[ImageBatch]) -> None:
        self.config, self.device, self.batches, self.done = config, device, batches, 0
        self.networks = build_networks(config, device)
        settings = StepConfig(config, precision="no", total_steps=10_000)
        perceptual = build_perceptual("features", self.networks.extractor)
        self.step = JointStep(self.networks, perceptual, settings, device)
        size = config.data.image_size
        self.latent_shape = self.networks.denoiser.latent_shape(size, self.networks.autoencoder.downsampling)

    def round(self) -> None:
        """ROUND optimiser steps, and one reading of the scalars as the loop does every few steps."""
        for _ in range(ROUND):
            self.one()
        self.step.read_scalars()

    def one(self) -> None:
        """One optimiser step."""
        config, size = self.config, self.config.batch_size
        rows = torch.arange(self.done * size, (self.done + 1) * size, device=self.device)
        draws = draw(config.seed, rows, self.latent_shape, self.networks.feature_dim, config.conditioning)
        self.step([(self.batches[self.done % len(self.batches)], draws)], self.done)
        self.done += 1


class RepaEStep:
    """The order of REPA-E's train_repae.py:337-437, written as it is published, on M2D's networks and losses.

    Features are extracted in every step; all losses of the VAE have one backward pass; the alignment loss is a loop
    over images; the U-Net's half is a pass of its own; EMA goes tensor by tensor; every loss is read in every step;
    networks are laid out as torch does, AdamW is torch's default. align_only: the pass for the VAE stops at the aligned
    block, as REPA-E's code does; otherwise the whole U-Net is run and its velocity thrown away.
    """

    def __init__(self, config: TrainConfig, device: torch.device, batches: list[ImageBatch], align_only: bool) -> None:
        self.config, self.device, self.batches, self.align_only, self.done = config, device, batches, align_only, 0
        self.networks: Networks = build_networks(dataclasses.replace(config, channels_last=False), device)
        self.perceptual = build_perceptual("features", self.networks.extractor)
        self.phase = DenoiserPhase(self.networks.denoiser, self.networks.projector, config.alignment.tap)
        self.ema = copy.deepcopy(self.networks.denoiser).requires_grad_(False)
        rates, betas = config.optimizer, tuple(config.optimizer.betas)
        self.optimizers = {
            module: torch.optim.AdamW(module.parameters(), lr=rate, betas=betas, weight_decay=rates.weight_decay)
            for module, rate in (
                (self.networks.autoencoder, rates.lr_autoencoder),
                (self.phase, rates.lr_denoiser),
                (self.networks.discriminator, rates.lr_discriminator),
            )
            if module is not None
        }

    def round(self) -> None:
        """ROUND optimiser steps."""
        for _ in range(ROUND):
            self.one()

    def one(self) -> None:
        """One step; the numbers are REPA-E's own."""
        n, weights, phase, discriminator = (
            self.networks,
            self.config.loss_weights,
            self.phase,
            self.networks.discriminator,
        )
        batch = self.batches[self.done % len(self.batches)]
        pixels = batch.images.permute(0, 3, 1, 2)
        images = from_uint8(pixels)
        assert n.extractor is not None
        features = extract(n.extractor, pixels)  # 0
        posterior = n.autoencoder.encode(images)  # 1
        z = posterior.sample()
        reconstructed = n.autoencoder.decode(z)

        phase.requires_grad_(False).eval()  # 2
        t, noise = torch.rand(len(z), device=z.device), torch.randn_like(z)
        losses = {
            "reconstruction": reconstruction_loss(reconstructed, images),
            "perceptual": self.perceptual(reconstructed, images).mean(),
            "kl": kl_loss(posterior.mean, posterior.logvar),
        }
        total = weights.reconstruction * losses["reconstruction"] + weights.perceptual * losses["perceptual"]
        total = total + weights.kl * losses["kl"]
        if discriminator is not None:
            discriminator.requires_grad_(False)
            losses["adversarial"] = adversarial_loss(discriminator(reconstructed))
            total = total + weights.adversarial * losses["adversarial"]
        context = n.denoiser.context(batch.labels, features.cls)
        x_t = interpolate(n.denoiser.normalize(z), noise, t)
        if self.align_only:
            tapped = n.denoiser.tapped(x_t, t, context, phase.tap)
        else:
            _, tapped = n.denoiser.velocity_and_tap(x_t, t, context, phase.tap)
        losses["alignment_vae"] = looped_alignment(n.projector(tapped, features.patches.shape[1]), features.patches)
        self.update(n.autoencoder, total + weights.alignment_vae * losses["alignment_vae"])

        if discriminator is not None:  # 3
            discriminator.requires_grad_(True)
            real, fake = discriminator(images), discriminator(reconstructed.detach())
            losses["discriminator"] = discriminator_loss(real, fake)
            self.update(discriminator, losses["discriminator"])

        phase.requires_grad_(True).train()  # 4
        clean = n.denoiser.latent_norm(z.detach())
        dropped = torch.rand(len(z), device=z.device) < self.config.conditioning.class_dropout
        context = n.denoiser.context(torch.where(dropped, len(ISIC7), batch.labels), features.cls)
        velocity, tapped = n.denoiser.velocity_and_tap(interpolate(clean, noise, t), t, context, phase.tap)
        predicted = n.projector(tapped, features.patches.shape[1])
        losses["diffusion"] = diffusion_loss(velocity, velocity_target(clean, noise))
        losses["alignment"] = looped_alignment(predicted, features.patches)
        losses["manifold"] = manifold_loss(predicted, features.patches)  # U-REPA's, which is part of our step too
        alignment = losses["alignment"] + weights.manifold * losses["manifold"]
        self.update(phase, weights.diffusion * losses["diffusion"] + weights.alignment * alignment)

        with torch.no_grad():  # 5
            decay = self.config.schedule.ema_decay
            averages = [*self.ema.parameters(), *self.ema.buffers()]
            for averaged, current in zip(averages, [*n.denoiser.parameters(), *n.denoiser.buffers()], strict=True):
                if averaged.is_floating_point():
                    averaged.mul_(decay).add_(current, alpha=1 - decay)
        for loss in losses.values():
            loss.item()
        self.done += 1

    def update(self, module: nn.Module, loss: Tensor) -> None:
        """Backward, clip, step."""
        optimizer = self.optimizers[module]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.config.optimizer.clip_norm)
        optimizer.step()


def looped_alignment(predicted: Tensor, target: Tensor) -> Tensor:
    """REPA-E's: mean negative cosine over the tokens of an image, added up image by image."""
    total = predicted.new_zeros(())
    for own, theirs in zip(predicted, target, strict=True):
        total = total - (F.normalize(own, dim=-1) * F.normalize(theirs, dim=-1)).sum(dim=-1).mean()
    return total / len(predicted)


def run_rate(config: TrainConfig, steps: int) -> tuple[float, float, float]:
    """Of a real run by its own record: images a second, share of time that waited for data, CPU ms an image.

    The last is of every process: the worker, decoding, Ray's own.
    """
    used: list[tuple[float, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            used.append((time.time(), cpu_seconds()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            experiment = train(dataclasses.replace(config, max_steps=steps))
    finally:
        over.set()
        watcher.join()
    lines = (experiment.path / "metrics" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    *_, before = (records := [json.loads(line) for line in lines])[:SKIPPED_INTERVALS]
    records = records[SKIPPED_INTERVALS:]
    seconds = sum(1 / record["images_per_s"] for record in records)  # intervals are of equal length
    wait = sum(record["data_wait_share"] / record["images_per_s"] for record in records) / seconds
    began, ended = np.interp([before["time"], records[-1]["time"]], *zip(*used))
    images = (records[-1]["step"] - before["step"]) * config.batch_size
    return len(records) / seconds, wait, 1000 * (ended - began) / images


def cpu_seconds() -> float:
    """Of this process and everything below it that lives."""
    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def timed_parts(ours: OurStep, rounds: int) -> dict[str, float]:
    """Milliseconds of each part of a step, by putting a clock around the functions that it calls.

    Of CPU time, where the CPU computes, since other programs take none of that. The backward passes are told apart by
    their order, which is the step's own.
    """
    spent: dict[str, float] = defaultdict(float)
    now = time.perf_counter if ours.device.type == "cuda" else time.process_time  # other programs take no CPU time
    order = ["reconstruction", "perceptual", "decode", "alignment pass", "encode", "U-Net"]
    if ours.networks.discriminator is not None:
        order = ["reconstruction", "perceptual", "adversarial", "decode", "discriminator", *order[3:]]
    turn = 0

    def clock(part: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal turn
        if part == "backward":
            part = f"{order[turn % len(order)]}, backward"
            turn += 1
        synchronize(ours.device)
        began = now()
        answer = call(*arguments, **named)
        synchronize(ours.device)
        spent[part] += 1000 * (now() - began)
        return answer

    places: list[tuple[Any, str, str]] = [
        (step_module, "extract", "extractor"),
        (step_module, "guarded_update", "optimiser"),
        (ours.networks.autoencoder, "encode", "encode"),
        (ours.networks.autoencoder, "decode", "decode"),
        (ours.step.perceptual, "forward", "perceptual"),
        (ours.step.denoiser_phase, "align_autoencoder", "alignment pass"),
        (ours.step.denoiser_phase, "forward", "U-Net"),
        (ours.step.ema, "update", "EMA"),
        (torch.autograd, "backward", "backward"),
    ]
    ours.round()
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, functools.partial(clock, part, getattr(owner, name))))
        stack.enter_context(patch.dict(globals(), draw=functools.partial(clock, "draws", draw)))
        turn, began = 0, now()
        for _ in range(rounds * ROUND):
            ours.one()
        synchronize(ours.device)
        whole = 1000 * (now() - began)
    spent["everything else"] = whole - sum(spent.values())
    return {part: milliseconds / (rounds * ROUND) for part, milliseconds in spent.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Series = dict[str, list[float]]


def report(rates: Series, cpu: Series, waits: Series, batch: int) -> None:
    """Rates and the ratios that matter. By CPU time: what one thread each computes, whatever else the machine does."""
    print(f"\n| | images/s: median, least, most | ms a step of {batch} | CPU ms an image |\n|---|---|---|---|")
    for name, of_name in rates.items():
        rate = statistics.median(of_name)
        used = f"{statistics.median(cpu[name]):.0f}" if name in cpu else ""
        print(f"| {name} | {rate:.1f}, {min(of_name):.1f}, {max(of_name):.1f} | {1000 * batch / rate:.0f} | {used} |")
    print("\n| how many times as fast: median, least, most | by the clock | by CPU time |\n|---|---|---|")
    pairs = [(name, f"beside {name}") for name in waits]
    ours = [name for name in rates if name.startswith("step")]
    pairs += [(name, other) for other in rates if other.startswith("REPA-E") for name in ours]
    pairs += [(name, "step, features cached") for name in ours if "VAE" in name]
    for name, other in pairs:
        ratios = [a / b for a, b in zip(rates[name], rates[other], strict=True)]
        work = [b / a for a, b in zip(cpu.get(name, []), cpu.get(other, []))]
        label = "bare step" if other.startswith("beside") else other
        print(f"| {name} / {label} | {_spread(ratios)} | {_spread(work) if work else ''} |")
    for name, of_name in waits.items():
        print(f"{name}: {100 * statistics.median(of_name):.1f} % of the time waits for data", flush=True)


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}, {min(ratios):.2f}, {max(ratios):.2f}"


def report_parts(parts: dict[str, dict[str, float]]) -> None:
    """Milliseconds by part, forward and backward side by side."""
    for kind, spent in parts.items():
        whole = sum(spent.values())
        print(f"\n| part of the step, {kind} | forward, ms | backward, ms | share |\n|---|---|---|---|")
        names = dict.fromkeys(name.removesuffix(", backward") for name in spent)
        for name in names:
            forward, backward = spent.get(name, 0.0), spent.get(f"{name}, backward", 0.0)
            print(f"| {name} | {forward:.1f} | {backward:.1f} | {100 * (forward + backward) / whole:.0f} % |")
        print(f"| all | {whole:.0f} | | |")


def reconstructions(root: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What a VAE that learns less often, or is slimmer, costs in reconstruction after as many steps."""
    kinds = {f"VAE each {k}. step": ["--schedule.vae_every_k_steps", str(k)] for k in EVERY_K}
    kinds["slimmer VAE, [16, 32, 64]"] = SLIM
    kinds["VAE on top of block PCA"] = ["--autoencoder.kind", "residual"]
    found = {}
    print(f"\n| {arguments.reconstruction} steps | PSNR, dB | perceptual | velocity MSE | s |\n|---|---|---|---|---|")
    for name, flags in kinds.items():
        steps = ["--num_workers", "0", "--max_steps", str(arguments.reconstruction)]
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            experiment = train(configuration(root, arguments, *flags, *steps, cached=False))
        seconds = time.perf_counter() - began
        line = (experiment.path / "metrics" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        found[name] = {**json.loads(line), "seconds": seconds}
        psnr, distance, error = (found[name][f"val/{measure}"] for measure in ("psnr_db", "perceptual", "velocity_mse"))
        print(f"| {name} | {psnr:.2f} | {distance:.4f} | {error:.3f} | {seconds:.0f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
