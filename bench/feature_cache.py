"""What setup_data's cache saves: one joint epoch from cached images and features beside one that decodes and extracts.

python bench/feature_cache.py --data_root ../shared/ham10000 --images 420 --output bench/out/feature_cache.json

Both are the same run of `joint-64.yaml` (without the warm-up, in which no feature is used) on the same images, in the
calling process; they alternate (without, with, without, with), so that a busy machine hurts both alike. PanDerm's
weights cannot be had without its authors' leave, so PanDerm-Base runs with random ones: the time does not depend on
them. Both the seconds of one epoch are given, which is what a user waits for, and the seconds that filling the cache
took, so that the table says after how many epochs it has paid for itself.
"""

import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from jsonargparse import auto_cli

from m2d.cli import parse
from m2d.data.catalog import scan_dataset
from m2d.data.settings import DataConfig
from m2d.data.setup import setup_data
from m2d.training.features import spread_over_classes
from m2d.training.trainer import train

PRESET = ["--config", str(Path(__file__).parent / "joint-64.yaml")]
JOINT = ["--perceptual.kind", "features", "--schedule.vae_warmup_fraction", "0"]


@dataclass(frozen=True)
class Result:
    """One extractor."""

    extractor: str
    images: int
    views: int
    setup_s: float
    epoch_without_s: float  # median
    epoch_with_s: float
    ratio: float  # of the two
    pays_after_epochs: float


def main(
    data_root: str,
    images: int = 420,
    repetitions: int = 2,
    extractors: list[str] = ["efficientnet-lite0", "panderm-base"],  # noqa: B006 - read only
    views: int = 4,
    output: str | None = None,
) -> None:
    """Measure and print.

    Args:
        data_root: a folder of class folders
        images: taken of it, as evenly over the classes as can be
        repetitions: epochs of each kind
        extractors: names; PanDerm ones get random weights
        views: of an image
        output: a JSON file
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="m2d-bench-") as folder:
        root = Path(folder)
        count = _subset(data_root, root / "images", images)
        for name in extractors:
            results.append(_measure(name, root, count, repetitions, views))
            _print(results)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        document = {
            "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "torch": torch.__version__,
            "repetitions": repetitions,
            "results": [asdict(result) for result in results],
        }
        Path(output).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _measure(name: str, root: Path, count: int, repetitions: int, views: int) -> Result:
    extractor = ["--feature_extractor.name", name, "--data.views", str(views)]
    if name.startswith("panderm-"):
        extractor += ["--feature_extractor.weights", str(_random_weights(name, root / f"{name}.pth"))]
        extractor += ["--feature_extractor.input_size", "224"]
    cache = root / f"cache-{name}"
    place = ["--data_root", str(root / "images")]
    began = time.perf_counter()
    setup_data(parse("setup_data", ["--all", *place, *PRESET, *extractor, "--cache_dir", str(cache)]))
    setup_s = time.perf_counter() - began
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repetition in range(repetitions):
        for cached in (False, True):
            run = ["--epochs", "1", "--num_workers", "0", "--experiments_dir", str(root / "runs"), "--fresh"]
            run += ["--cache_dir", str(cache if cached else root / "none"), "--name", f"run{repetition}{cached:d}"]
            with contextlib.redirect_stdout(io.StringIO()):
                experiment = train(parse("train", [*place, *PRESET, *JOINT, *extractor, *run]))
            seconds[cached].append(_epoch_seconds(experiment.path / "metrics" / "train.jsonl"))
            shutil.rmtree(experiment.path)
    without, with_cache = (statistics.median(seconds[cached]) for cached in (False, True))
    saved = without - with_cache
    return Result(
        extractor=name,
        images=count,
        views=views,
        setup_s=setup_s,
        epoch_without_s=without,
        epoch_with_s=with_cache,
        ratio=without / with_cache,
        pays_after_epochs=setup_s / saved if saved > 0 else float("inf"),
    )


def _epoch_seconds(metrics: Path) -> float:
    """Seconds of the steps alone, without validation and saving.

    The first part, in which memory and kernels warm up, is taken to be as fast as the later ones.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = np.diff([0, *(record["step"] for record in records)])
    batch = 8
    times = [batch * count / record["images_per_s"] for count, record in zip(steps, records, strict=True)]
    return float(sum(times[1:]) * steps.sum() / steps[1:].sum())


def _subset(data_root: str, target: Path, wanted: int) -> int:
    catalog = scan_dataset(data_root, DataConfig()).catalog
    labels = catalog["label"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    paths = catalog["path"].to_pylist()
    chosen = spread_over_classes(labels.astype(np.int64), wanted, seed=0)
    for row in chosen:
        (target / paths[row]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(data_root) / paths[row], target / paths[row])
    return len(chosen)


def _random_weights(name: str, path: Path) -> Path:
    """A file in the published key layout."""
    torch.manual_seed(0)
    size = name.removeprefix("panderm-")
    network = timm.create_model(
        f"beit_{size}_patch16_224",
        pretrained=False,
        num_classes=0,
        use_abs_pos_emb=True,
        use_rel_pos_bias=False,
        init_values=0.1,
        global_pool="token",
    )
    torch.save(network.state_dict(), path)
    return path


def _print(results: list[Result]) -> None:
    print("| extractor | images x views | cache filled in | epoch without | epoch with | ratio | pays after |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.extractor} | {r.images} x {r.views} | {r.setup_s:.0f} s | {r.epoch_without_s:.1f} s | "
            f"{r.epoch_with_s:.1f} s | {r.ratio:.2f} | {r.pays_after_epochs:.1f} epochs |",
            flush=True,
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
