"""How decoders draw: reconstructions of unseen images beside those images, for each checkpoint.

python bench/decoders.py --real /data/ISIC --checkpoints '[RUN/checkpoints/best, OTHER/checkpoints/best]'

| column | is |
|---|---|
| PSNR | dB, mean over images; blur is its optimum |
| perceptual | distance of EfficientNet-Lite0's maps, which the decoder was trained on |
| kernel distance | of the features of EfficientNet-Lite1 and -Lite2, which it was not, between the originals of one half of the lesions and the reconstructions of the other, both ways; the row "originals" is the floor |
| AUC | of a linear detector of reconstructions by the same features, on held-out lesions: 0.5 cannot tell |
| sharpness | energy of the Laplacian relative to the originals' |

The images are of the split that the runs did not train on, so leave --data.split_seed and fractions as the runs had them.
"""  # noqa: E501

import json
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from m2d.data.catalog import scan_dataset
from m2d.data.decode import decode_resized
from m2d.data.settings import DataConfig
from m2d.metrics.distances import kernel_distance
from m2d.metrics.linear_probe import told_apart
from m2d.metrics.neighbours import Standardizer, at_least_part_of_median
from m2d.models.autoencoder import from_uint8, to_uint8
from m2d.models.checkpoint import load_checkpoint
from m2d.models.extractors import load_feature_extractor
from m2d.models.perceptual import build_perceptual
from m2d.training.losses import psnr

BATCH = 16
C = 0.001  # of the detector


def main(
    real: str,
    checkpoints: list[str],
    split: str = "val",
    per_class: int = 60,
    image_size: int = 64,
    input_size: int = 128,
    output: str | None = None,
) -> None:
    """Print a row for the originals and one for each checkpoint; write them as JSON to `output`.

    per_class: images of a class at most. input_size: of the judges, pixels.
    """
    listed = [row for row in scan_dataset(real, DataConfig()).catalog.to_pylist() if row["split"] == split]
    rows = [row for label in sorted({r["label"] for r in listed}) for row in of_class(listed, label)[:per_class]]
    files = [(Path(real) / row["path"]).read_bytes() for row in rows]
    pixels = np.stack([decode_resized(file, image_size, max_pixels=100_000_000) for file in files])
    lesions = np.array([row["lesion_id"] or row["image_id"] for row in rows], dtype=object)
    judges = {name: load_feature_extractor(f"efficientnet-{name}", None, input_size) for name in ("lite1", "lite2")}
    distance, images = build_perceptual("features", None), from_uint8(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    own = {name: vectors(judge, pixels) for name, judge in judges.items()}
    found = {"originals": {name: {"kernel_distance": across(own[name], own[name], lesions)} for name in judges}}
    for place in checkpoints:
        autoencoder = load_checkpoint(place).autoencoder
        with torch.no_grad():
            drawn = torch.cat([autoencoder.decode(autoencoder.encode(x).mean) for x in images.split(BATCH)])
            drawn = drawn.clamp(-1, 1)
            far = torch.cat([distance(*pair) for pair in zip(drawn.split(BATCH), images.split(BATCH), strict=True)])
        redrawn = to_uint8(drawn)
        measures = {"psnr_db": float(psnr(drawn, images).mean()), "perceptual": float(far.mean())}
        measures["sharpness"] = laplacian_energy(redrawn) / laplacian_energy(pixels)
        for name, judge in judges.items():
            made = vectors(judge, redrawn)
            both, is_made = np.concatenate([own[name], made]), np.arange(2 * len(made)) >= len(made)
            auc = told_apart(both, is_made, np.concatenate([lesions, lesions]), c=C, seed=0)
            measures[name] = {"kernel_distance": across(own[name], made, lesions), "auc": auc}
        found[place] = measures
    for name, measures in found.items():
        print(name, json.dumps(measures))
    if output is not None:
        Path(output).write_text(json.dumps({"images": len(rows), "found": found}, indent=1), "utf-8")


def of_class(listed: list[dict[str, str]], label: str) -> list[dict[str, str]]:
    """In a seeded order."""
    rows = [row for row in listed if row["label"] == label]
    return [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]


@torch.no_grad()
def vectors(judge: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """[N, D] of uint8 [N, H, W, 3]."""
    batches: tuple[Tensor, ...] = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(BATCH)
    return torch.cat([judge(judge.preprocess(batch)).cls for batch in batches]).numpy()


def across(own: np.ndarray, made: np.ndarray, lesions: np.ndarray) -> list[float]:
    """(kernel distance between one half's originals and the other's reconstructions, both ways; its standard error)."""
    names = np.unique(lesions.astype(str))
    first = np.isin(lesions.astype(str), np.random.default_rng(0).permutation(names)[::2])
    standard = Standardizer.of(own, at_least_part_of_median)
    ways = [
        kernel_distance(standard(own[a]), standard(made[b]), groups_a=lesions[a], groups_b=lesions[b])
        for a, b in ((first, ~first), (~first, first))
    ]
    return [float(np.mean([way.value for way in ways])), float(np.mean([way.standard_error for way in ways]))]


def laplacian_energy(pixels: np.ndarray) -> float:
    """Mean square of the Laplacian of the images' grey levels."""
    grey = pixels.astype(np.float64).mean(axis=3) / 255
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float(np.square(laplacian - 4 * grey[:, 1:-1, 1:-1]).mean())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
