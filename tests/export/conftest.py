"""A tiny checkpoint of each kind of autoencoder, in an experiment, and its export."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint, make_prior, write_checkpoint

from m2d.export.export import export
from m2d.export.settings import ExportConfig
from m2d.models.autoencoder import build_autoencoder
from m2d.models.checkpoint import Checkpoint
from m2d.models.settings import AutoencoderConfig

KINDS: dict[str, Any] = {
    "kl": {"kind": "kl", "block_channels": [16, 16]},
    "linear": {"kind": "linear", "patch_size": 2},
    "residual": {"kind": "residual", "block_channels": [16, 16]},
}
COUNTS = {"AKIEC": 5, "DF": 12, "MEL": 20, "NV": 40}


def tiny(kind: str) -> Checkpoint:
    """With a prior, and with paths of this machine in the run's settings."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        autoencoder = build_autoencoder(AutoencoderConfig(latent_channels=4, norm_groups=8, **KINDS[kind]), 16).eval()
    checkpoint = make_checkpoint()
    config = {"data_root": "/data/SECRET", "cache_dir": "~/SECRET", "seed": 3, "data": {"val_fraction": 0.1}}
    info = replace(checkpoint.info, config=config, extractor_key="lite-32-whole")
    return replace(checkpoint, info=info, autoencoder=autoencoder, prior=make_prior(COUNTS))


@pytest.fixture(scope="package")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_20260101_000000 with its record, a catalog, and a checkpoint of each kind: checkpoints/KIND."""
    folder = tmp_path_factory.mktemp("experiments") / "tiny_20260101_000000"
    for kind in KINDS:
        write_checkpoint(tiny(kind), folder / "checkpoints" / kind)
    (folder / "metrics").mkdir()
    (folder / "configs").mkdir()
    (folder / "cache").mkdir()
    (folder / "configs" / "config.yaml").write_text("batch_size: 4\ngradient_accumulation_steps: 1\n")
    dataset = {"images": 3, "rejected": 1, "counts": {"train": {"MEL": 2, "DF": 0}}}
    record = {"state": "done", "device": "one abacus", "world_size": 2, "dataset": dataset, "user": "SECRET"}
    (folder / "experiment_info.json").write_text(json.dumps(record))
    entry = {"step": 1000, "images_per_s": 8.0, "model_tflops_per_s": 0.5}
    (folder / "metrics" / "train.jsonl").write_text(json.dumps(entry) + "\n")
    (folder / "metrics" / "validation.jsonl").write_text(json.dumps({"step": 1000, "val/velocity_mse": 0.75}) + "\n")
    rows = [("MEL", "one", "train"), ("MEL", "one", "train"), ("MEL", "two", "test")]
    columns = dict(zip(("label", "lesion_id", "split"), zip(*rows)))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "cache/catalog.parquet")
    return folder


@pytest.fixture(scope="package")
def exports(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each kind, in half precision, and start.png."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in KINDS:
        export(ExportConfig(checkpoint=str(experiment / "checkpoints" / kind), to=str(folder / kind)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "start.png")
    return folder
