"""Which settings of sampling draw nearer to real images: kernel distance to unseen lesions, beside the first variant's.

python bench/variants.py --real /data/ISIC --work bench/out/variants --variants '{
    "as trained": "--checkpoint RUN/checkpoints/best",
    "averaged over 0.05": "--checkpoint EXPORT",
    "guided by step 400": "--checkpoint RUN/checkpoints/best --guide_checkpoint RUN/checkpoints/step_00000400"}'

Each variant is a command `generate` with these flags, run with every seed, gates off; a seed draws the same noise in
all. The distance is that of each class to its real images outside the training split, in the features of
EfficientNet-Lite1, which guides no preset; a row has the mean over classes and seeds. The difference to the first row
is paired by class and seed, with a 95 % interval by t over these pairs. Images that are there are not made again.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from decoders import of_class, vectors
from jsonargparse import auto_cli
from scipy.stats import t as student

from m2d.data.catalog import scan_dataset
from m2d.data.decode import decode_resized
from m2d.data.settings import DataConfig
from m2d.metrics.distances import kernel_distance
from m2d.metrics.neighbours import Standardizer, at_least_part_of_median
from m2d.models.extractors import load_feature_extractor

PIXELS = 100_000_000  # an image may have


def main(
    real: str,
    variants: dict[str, str],
    work: str,
    num_samples: int = 30,
    seeds: int = 2,
    most: int = 300,
    image_size: int = 64,
    input_size: int = 192,
) -> None:
    """Print a row for each variant, and write them all to work/variants.json.

    num_samples: of each class and seed. most: real images of a class. input_size: of the judge, pixels.
    """
    judge = load_feature_extractor("efficientnet-lite1", None, input_size)
    listed = [row for row in scan_dataset(real, DataConfig()).catalog.to_pylist() if row["split"] != "train"]

    def seen(files: list[Path]) -> np.ndarray:
        return vectors(judge, np.stack([decode_resized(f.read_bytes(), image_size, max_pixels=PIXELS) for f in files]))

    rows = {label: of_class(listed, label)[:most] for label in sorted({row["label"] for row in listed})}
    own = {label: seen([Path(real) / row["path"] for row in of]) for label, of in rows.items()}
    lesions = {label: np.array([row["lesion_id"] or row["image_id"] for row in of]) for label, of in rows.items()}
    standard = Standardizer.of(np.concatenate(list(own.values())), at_least_part_of_median)
    found: dict[str, np.ndarray] = {}  # [seeds, classes]
    classes: list[str] = []  # of the first variant, whose differences are paired by class
    print("| variant | kernel distance | less the first's |\n|---|---|---|")
    for name, flags in variants.items():
        cells = []
        for seed in range(seeds):
            folder = Path(work) / f"{len(found)}-{seed}"
            command = f"-m m2d generate {flags} --num_samples {num_samples} --seed {seed} --num_actors 0"
            command += f" --gates.enabled false --output {shlex.quote(str(folder))}"
            subprocess.run([sys.executable, *shlex.split(command)], check=True, stdout=subprocess.DEVNULL)
            made = {label: seen(sorted((folder / label).glob("*.png"))) for label in own if (folder / label).is_dir()}
            if list(made) != (classes := classes or list(made)):
                raise SystemExit(f"{name}: it draws {', '.join(made)}, the first variant {', '.join(classes)}")
            cells.append(
                [
                    kernel_distance(standard(own[label]), standard(one), groups_a=lesions[label]).value
                    for label, one in made.items()
                ]
            )
        found[name] = np.array(cells)
        less = (found[name] - next(iter(found.values()))).ravel()
        half = student.ppf(0.975, len(less) - 1) * less.std(ddof=1) / np.sqrt(len(less))
        difference = f"{less.mean():+.3f} [{less.mean() - half:+.3f}, {less.mean() + half:+.3f}]"
        print(f"| {name} | {found[name].mean():.3f} | {difference if len(found) > 1 else ''} |", flush=True)
        document = {"classes": classes, "variants": variants, "distances": {k: v.tolist() for k, v in found.items()}}
        (Path(work) / "variants.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
