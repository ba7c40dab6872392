"""A demo dataset without a download: procedural images in class folders, with HAM10000's imbalance and sibling views.

Called by `make demo` and by tests. These images exercise the pipeline; they teach nothing about skin.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from m2d.classes import CLASSES
from m2d.demo.lesions import render_lesion
from m2d.errors import ConfigError, DataError
from m2d.files.atomic import write_whole

HAM10000_COUNTS = {"AKIEC": 327, "BCC": 514, "BKL": 1099, "DF": 115, "MEL": 1113, "NV": 6705, "VASC": 142}
MIN_PER_CLASS = 8
VIEWS_PER_LESION = (0.75, 0.17, 0.08)  # probability of one, two, three; HAM10000 has 1.34 images a lesion, too
DRAWING = 1  # raise it when render_lesion draws differently: a folder never mixes two drawings
_MARKER = ".m2d-demo.json"


@dataclass(frozen=True)
class _DemoImage:
    image_id: str
    label: str
    lesion_id: str
    seed: int
    view: int


def demo_counts(total: int) -> dict[str, int]:
    """Images a class, `total` together: HAM10000's proportions (largest remainder), no class below MIN_PER_CLASS.

    Raises ConfigError where `total` is too small for that.
    """
    if total < MIN_PER_CLASS * len(CLASSES):
        raise ConfigError(f"total is {total}; a demo set needs at least {MIN_PER_CLASS * len(CLASSES)} images")
    raised: set[str] = set()  # classes held at the minimum; the others share what is left
    while True:
        others = {label: count for label, count in HAM10000_COUNTS.items() if label not in raised}
        left = total - MIN_PER_CLASS * len(raised)
        shares = {label: left * count / sum(others.values()) for label, count in others.items()}
        too_small = {label for label, share in shares.items() if share < MIN_PER_CLASS}
        if not too_small:
            break
        raised |= too_small
    counts = {label: MIN_PER_CLASS if label in raised else int(shares[label]) for label in CLASSES}
    by_remainder = sorted(shares, key=lambda label: int(shares[label]) - shares[label])
    for label in by_remainder[: total - sum(counts.values())]:
        counts[label] += 1
    return counts


def write_demo_dataset(root: str | Path, *, total: int = 600, seed: int = 0) -> dict[str, int]:
    """Write `total` images as CLASS/DEMO_0000001.jpg ... (200 x 150) and metadata.csv; returns the counts by class.

    The set is a function of the arguments. Each file appears whole or not at all, and files that are there are kept:
    run again to finish an interrupted set; a complete one is left untouched. About a quarter of the lesions are shown
    in two or three views. Raises ConfigError for arguments that cannot work, and DataError where `root` holds
    something else: nothing is overwritten.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be at least 0")
    counts = demo_counts(total)
    root = Path(root)
    _claim(root, {"drawing": DRAWING, "seed": seed, "total": total})
    images = _plan(counts, seed)
    for image in images:
        path = root / image.label / f"{image.image_id}.jpg"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            encoded = io.BytesIO()
            Image.fromarray(render_lesion(image.label, image.seed, view=image.view)).save(encoded, "JPEG", quality=92)
            write_whole(path, encoded.getvalue())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image_id", "lesion_id"])
    writer.writerows([image.image_id, image.lesion_id] for image in images)
    metadata = root / "metadata.csv"
    if not metadata.exists() or metadata.read_text() != table.getvalue():
        write_whole(metadata, table.getvalue())
    return counts


def _plan(counts: dict[str, int], seed: int) -> list[_DemoImage]:
    """One entry an image, classes in order, siblings side by side."""
    rng = np.random.default_rng(seed)
    images: list[_DemoImage] = []
    lesion = 0
    for label, count in counts.items():
        last = len(images) + count
        while len(images) < last:
            lesion += 1
            views = min(last - len(images), 1 + int(rng.choice(len(VIEWS_PER_LESION), p=VIEWS_PER_LESION)))
            for view in range(views):
                image_id, lesion_id = f"DEMO_{len(images) + 1:07d}", f"DEMO_L{lesion:07d}"
                images.append(_DemoImage(image_id, label, lesion_id, seed * 10_000_000 + lesion, view))
    return images


def _claim(root: Path, arguments: dict[str, int]) -> None:
    """Make `root` the home of this set, or raise DataError where it is the home of another one."""
    marker = root / _MARKER
    if marker.exists():
        try:
            found = json.loads(marker.read_text())["arguments"]
        except (ValueError, KeyError, TypeError):
            found = "an unreadable marker"
        if found != arguments:
            raise DataError(
                f"root: {root} holds a demo set made with {found}, not {arguments}; delete it or name another folder"
            )
        return
    if root.exists() and not root.is_dir():
        raise DataError(f"root: {root} is a file; name a folder")
    if root.exists() and any(not entry.name.startswith(".") for entry in root.iterdir()):
        raise DataError(f"root: {root} is not empty and holds no demo set; name an empty or new folder")
    root.mkdir(parents=True, exist_ok=True)
    write_whole(marker, json.dumps({"arguments": arguments}))
