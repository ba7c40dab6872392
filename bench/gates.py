"""What the gates let through and what they catch, on real images: planted copies, held-out lesions, wrong classes.

python bench/gates.py --checkpoint CHECKPOINT --data_root ../shared/ham10000 [--generated OUTPUT]
"""

import argparse
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageFilter

from m2d.classes import ISIC7
from m2d.data.catalog import scan_dataset
from m2d.data.features import extract_view
from m2d.data.reader import ImageReader
from m2d.data.settings import DataConfig
from m2d.data.views import apply_view
from m2d.generation.gates import Verdict, build_gate_reference, check
from m2d.generation.references import load_reference_extractor
from m2d.generation.settings import GateConfig
from m2d.models.autoencoder import from_uint8, to_uint8
from m2d.models.checkpoint import Checkpoint, load_checkpoint

Change = Callable[[Image.Image], Image.Image]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--generated", nargs="*", default=[], help="folders of generation runs")
    parser.add_argument("--copies", type=int, default=500, help="training images that are copied")
    arguments = parser.parse_args()

    checkpoint = load_checkpoint(arguments.checkpoint)
    extractor = load_reference_extractor(checkpoint, None).to(memory_format=torch.channels_last)
    recorded = {k: v for k, v in checkpoint.info.config.get("data", {}).items() if k in DataConfig.__dataclass_fields__}
    data = DataConfig(**recorded)
    catalog = scan_dataset(arguments.data_root, data).catalog
    config = GateConfig()

    def split(names: tuple[str, ...]) -> tuple[pa.Table, ImageReader]:
        rows = catalog.filter(pc.is_in(catalog["split"], pa.array(names)))
        reader = ImageReader(rows, arguments.data_root, image_size=checkpoint.image_size, max_pixels=data.max_pixels)
        return rows, reader

    def verdicts(images: np.ndarray, labels: list[str]) -> list[Verdict]:
        found: list[Verdict] = []
        for first in range(0, len(images), 64):
            part = slice(first, first + 64)
            cls = extract_view(extractor, images[part], 0, "cpu").cls.float().numpy()
            found += check(images[part], cls, labels[part], reference, config)
        return found

    train, train_reader = split(("train",))
    reference = build_gate_reference(train, train_reader, extractor, config)
    print(f"near-copies: features up to {reference.copy_threshold:.4f}, pixels up to {reference.pixel_threshold:.4f}")
    print(
        "class thresholds:", dict(zip(ISIC7.codes, reference.class_thresholds, strict=True)), "weak:", *reference.weak
    )

    other, other_reader = split(("val", "test"))
    held_out = pixels_of(other_reader, np.arange(len(other)))
    labels = other["label"].to_pylist()
    print("held-out real images", len(other), share(verdicts(held_out, labels)))
    nevi = np.flatnonzero(np.array(labels) == "NV")[:200]
    for code in ISIC7.codes:
        print(f"held-out NV called {code}:", share(verdicts(held_out[nevi], [code] * len(nevi))))
    noise = np.random.default_rng(0).integers(0, 256, (50, *held_out.shape[1:]), dtype=np.uint8)
    for code in ISIC7.codes:
        print(f"noise called {code}:", share(verdicts(noise, [code] * len(noise))))

    rows = np.sort(np.random.default_rng(0).choice(len(train), min(arguments.copies, len(train)), replace=False))
    originals = pixels_of(train_reader, rows)
    labels = train["label"].take(rows).to_pylist()
    print(f"copies of {len(rows)} training images: by features, by pixels, refused as near_copy by either")
    for name, change in copies(checkpoint).items():
        found = verdicts(change(originals), labels)
        by_features = np.mean([verdict.nearest_distance <= reference.copy_threshold for verdict in found])
        by_pixels = np.mean([verdict.pixel_distance <= reference.pixel_threshold for verdict in found])
        either = np.mean([verdict.reason == "near_copy" for verdict in found])
        print(f"{name:12} {by_features:6.1%} {by_pixels:6.1%} {either:6.1%}", flush=True)
    for folder in arguments.generated:
        paths = sorted(path for code in ISIC7.codes for path in Path(folder, code).glob("*.png"))
        images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        print(folder, len(paths), share(verdicts(images, [path.parent.name for path in paths])))


def pixels_of(reader: ImageReader, rows: np.ndarray) -> np.ndarray:
    return reader.read(rows, np.zeros(len(rows), dtype=np.int8))["images"]


def share(verdicts: list[Verdict]) -> str:
    counts = Counter(verdict.reason for verdict in verdicts if verdict.reason)
    return ", ".join(f"{reason} {count / len(verdicts):.1%}" for reason, count in counts.items()) or "all accepted"


def copies(checkpoint: Checkpoint) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Ways in which an image comes back: uint8 [n, S, S, 3] to the same."""

    def each(change: Change) -> Callable[[np.ndarray], np.ndarray]:
        return lambda images: np.stack([np.asarray(change(Image.fromarray(image))) for image in images])

    def jpeg(quality: int) -> Change:
        def change(image: Image.Image) -> Image.Image:
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=quality)
            return Image.open(stream).convert("RGB")

        return change

    def zoomed(image: Image.Image) -> Image.Image:
        edge = round(image.width * 0.05)
        return image.crop((edge, edge, image.width - edge, image.height - edge)).resize(image.size)

    def noisy(images: np.ndarray) -> np.ndarray:
        return np.clip(images + np.random.default_rng(1).normal(0, 5, images.shape), 0, 255).astype(np.uint8)

    @torch.inference_mode()
    def drawn_by_vae(images: np.ndarray) -> np.ndarray:
        vae = checkpoint.autoencoder.vae
        pixels = from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))
        return np.concatenate(
            [to_uint8(vae.decode(vae.encode(part).latent_dist.mean).sample) for part in pixels.split(32)]
        )

    return {
        "exact": lambda images: images,
        "left-right": lambda images: np.stack([apply_view(image, 1) for image in images]),
        "up-down": lambda images: np.stack([apply_view(image, 2) for image in images]),
        "quarter turn": lambda images: np.stack([apply_view(image, 4) for image in images]),
        "JPEG 75": each(jpeg(75)),
        "JPEG 50": each(jpeg(50)),
        "blur 1 px": each(lambda image: image.filter(ImageFilter.GaussianBlur(1))),
        "noise 5": noisy,
        "VAE": drawn_by_vae,
        "zoom 10 %": each(zoomed),
        "shift 2 px": lambda images: np.pad(images, ((0, 0), (2, 0), (2, 0), (0, 0)), mode="edge")[:, :-2, :-2],
    }


if __name__ == "__main__":
    main()
