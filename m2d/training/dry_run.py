"""`train --dry_run`: memory, time and disk that a run will need, before any GPU is booked.

Counted is a training step in its steady state, on fake tensors (fake_run.py). What runs beside it (validation, samples,
the latent stage's encoding) is not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.compute as pc
from pyarrow import fs

from m2d.config import TrainConfig, with_absolute_paths
from m2d.data.catalog import IMAGE_SUFFIXES, is_debris
from m2d.data.feature_store import FeatureStore, feature_bytes
from m2d.data.prepared import prepared_folder, reusable_catalog
from m2d.errors import DataError
from m2d.files.storage import open_storage
from m2d.models.extractors import extractor_identity
from m2d.training.fake_run import FakeRun, StepCost, largest_batch
from m2d.training.flops import known_peak
from m2d.training.plan import RunPlan

GIB, GB = 2**30, 1e9
ASSUMED_IMAGES = 10_000  # about HAM10000's, where no data_root is named
UTILISATION = 0.35  # of the data sheet's FLOP/s; an assumption, usual for convolutions without torch.compile
LAUNCH_S = 8e-6  # of the host's time for a kernel launch without torch.compile; an assumption
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 3090")
# A card's GB, and the GiB of tensors that fit beside what ALLOWANCE names.
CARDS = {8: 6.7, 12: 10.5, 16: 14.0, 24: 21.5, 40: 36.0, 80: 72.0}
ALLOWANCE = "CUDA context 0.4 to 0.6, cuDNN workspaces 0.1 to 0.3, fragmentation 5 to 10 %"


@dataclass(frozen=True)
class DataCount:
    """How many images there are, and how that is known."""

    images: int
    train: int
    known_from: str
    cached: bool = False  # whether setup_data's features are there for all of them


def dry_run(config: TrainConfig) -> None:
    """Print what the run will need. Writes nothing. Raises an M2DError for settings that a run would refuse."""
    config = with_absolute_paths(config)
    count = count_images(config)
    run = FakeRun(config, train_images=count.train, cached=count.cached)
    own = run.cost(config.batch_size)
    low, high = two_alike(run, own)
    costs = {
        number: own if number == run.first_whole_step else run.cost(config.batch_size, number, computed=1)
        for number in kinds_of_steps(run.plan)
    }
    print("\n".join([*_run_lines(run, count), "", *_memory_lines(own, low, high), "", *_time_lines(run, costs)]))
    print("\n".join(["", *_disk_lines(run, count)]))


def two_alike(run: FakeRun, own: StepCost) -> tuple[StepCost, StepCost]:
    """Steps of two batch sizes, of at least `own`'s, that differ in nothing but sizes, for `largest_batch`.

    With one image or two torch takes other paths here and there (layouts are ambiguous), so small sizes are doubled.
    """
    low, high = own, run.cost(2 * own.batch_size)
    for _ in range(3):
        if len(low.trace) == len(high.trace):
            break
        low, high = high, run.cost(2 * high.batch_size)
    return low, high


def count_images(config: TrainConfig) -> DataCount:
    """The images of data_root: of setup_data's catalog where that still holds, else by the files' names.

    Raises DataError where data_root cannot be listed or holds no image, ConfigError where it is no folder.
    """
    train_share = 1 - config.data.val_fraction - config.data.test_fraction
    if config.data_root is None:
        train = round(ASSUMED_IMAGES * train_share)
        return DataCount(ASSUMED_IMAGES, train, "assumed, about HAM10000; --data_root counts yours")
    root = config.checked_data_root
    folder = prepared_folder(config.cache_dir, root)
    catalog = reusable_catalog(folder, root, config.data)
    if catalog is not None:
        store = FeatureStore.open(folder, extractor_identity(config.feature_extractor)[0], config.data.image_size)
        split = {
            name: catalog.filter(pc.equal(catalog["split"], name))["sha256"].to_pylist() for name in ("train", "val")
        }
        absent = store.missing(split["train"], config.data.views).any() or store.missing(split["val"], 1).any()
        return DataCount(len(catalog), len(split["train"]), "setup_data's catalog", cached=not absent)
    filesystem, path = open_storage(root)
    entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files = [entry.base_name for entry in entries if entry.type == fs.FileType.File]
    images = sum(name.lower().endswith(IMAGE_SUFFIXES) and not is_debris(name) for name in files)
    if images == 0:
        raise DataError(f"data_root: {root} holds no image; expected {' '.join(IMAGE_SUFFIXES)}")
    return DataCount(images, max(1, round(images * train_share)), "image files, counted by name")


def kinds_of_steps(plan: RunPlan) -> dict[int, int]:
    """How many steps of the run do the same work, by the number of the first of them.

    In the joint stage: the VAE's warm-up, then steps that train all, and between them those that leave the VAE alone.
    """
    total = plan.total_steps
    if plan.config.stage != "joint":
        return {0: total}
    warmup = min(plan.vae_warmup_steps, total)
    whole = -(-(total - warmup) // plan.config.schedule.vae_every_k_steps)
    kinds = {0: warmup, warmup: whole, warmup + 1: total - warmup - whole}
    return {number: count for number, count in kinds.items() if count > 0}


def _run_lines(run: FakeRun, count: DataCount) -> list[str]:
    config, plan = run.config, run.plan
    features = "from setup_data's cache" if count.cached else f"{config.feature_extractor.name} in every step"
    net = f" ({config.perceptual.lpips_net})" if plan.perceptual == "lpips" else ""
    assumed = ", assumed" if config.perceptual.kind is None else ""
    return [
        f"{config.name}: stage {config.stage}, {config.data.image_size} px, {plan.precision}",
        f"step: {plan.global_batch} images = batch_size {config.batch_size} x {config.gradient_accumulation_steps} "
        f"micro-batches x {plan.world_size} worker(s)",
        f"features: {features}; perceptual: {plan.perceptual}{net}{assumed}",
        f"images: {count.images:,}, {count.train:,} of them for training ({count.known_from})",
    ]


def _memory_lines(own: StepCost, low: StepCost, high: StepCost) -> list[str]:
    parts = sorted(own.parts.items(), key=lambda part: -part[1])
    shown = [(name, size) for name, size in parts if size >= 0.005 * GIB]
    fitting = [largest_batch(low, high, usable * GIB) for usable in CARDS.values()]
    return [
        f"memory of a worker at the peak of a step{'GiB':>13}",
        *(f"  {name:43}{size / GIB:8.2f}" for name, size in shown),
        f"  {'all live tensors':43}{own.peak / GIB:8.2f}   ({own.between / GIB:.2f} between steps)",
        f"beside them: {ALLOWANCE}",
        "",
        f"{'card, GB':26}" + "".join(f"{card:9}" for card in CARDS),
        f"{'tensors that fit, GiB':26}" + "".join(f"{usable:9g}" for usable in CARDS.values()),
        f"{'largest batch_size':26}" + "".join(f"{batch or 'none':>9}" for batch in fitting),
    ]


def _time_lines(run: FakeRun, costs: Mapping[int, StepCost]) -> list[str]:
    plan, kinds = run.plan, kinds_of_steps(run.plan)
    micro_batches = plan.accumulation(plan.world_size)
    flops = sum(micro_batches * costs[number].flops * count for number, count in kinds.items()) / plan.total_steps
    launches = max(cost.launches for cost in costs.values())
    warmup = f", the VAE alone in the first {kinds[0]:,}" if run.first_whole_step > 0 else ""
    lines = [
        f"{plan.total_steps:,} steps, {plan.steps_per_epoch:,} an epoch{warmup}",
        f"{flops / 1e12:.4g} TFLOP a step and worker on average, {launches:,} kernel launches a micro-batch",
        f"{f'{UTILISATION:.0%} of the data sheet':26}{'TFLOP/s':>9}{'images/s':>9}{'hours':>9}",
    ]
    for gpu in GPUS:
        peak = known_peak(gpu)
        assert peak is not None, gpu
        reached = peak * UTILISATION / (2 if plan.precision == "no" else 1)  # TF32 is half of bf16
        seconds, waiting = 0.0, 0.0
        for number, count in kinds.items():
            computing, launching = costs[number].flops / reached, costs[number].launches * LAUNCH_S
            seconds += count * micro_batches * max(computing, launching)
            waiting += count * micro_batches * max(launching - computing, 0.0)
        bound = f"  launches of {LAUNCH_S * 1e6:g} us set the pace" if waiting > seconds / 10 else ""
        lines.append(
            f"{gpu:26}{reached / 1e12:9.0f}{plan.total_steps * plan.global_batch / seconds:9,.0f}"
            f"{seconds / 3600:9.2g}{bound}"
        )
    return lines


def _disk_lines(run: FakeRun, count: DataCount) -> list[str]:
    data, kept, checkpoint = run.config.data, run.config.saving.keep_last + 1, run.checkpoint_bytes / GB
    features = count.images * data.views * feature_bytes(run.feature_dim, run.num_patches)
    caches = {"features": features, "decoded images": count.images * 3 * data.image_size**2}
    if run.config.stage == "latent":
        entry = 2 * 2 * math.prod(run.latent_shape)  # mean and deviation in fp16
        entry += 0 if count.cached else 2 * run.feature_dim * (1 + run.num_patches)
        caches["latents"] = count.train * data.views * entry
    return [
        f"disk, GB: a checkpoint {checkpoint:.2g}, the last {kept - 1} and the best {kept * checkpoint:.2g}",
        f"caches, GB: {', '.join(f'{name} {size / GB:.2g}' for name, size in caches.items())}",
    ]
