"""A demo dataset without a download: procedural images in class folders, with HAM10000's imbalance and sibling views.

Called by `make demo` and by tests. These images exercise the pipeline; they teach nothing about skin.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from m2d.classes import ISIC7
from m2d.demo.lesions import render_lesion
from m2d.errors import ConfigError, DataError
from m2d.files.atomic import write_whole

HAM10000_COUNTS = {"AKIEC": 327, "BCC": 514, "BKL": 1099, "DF": 115, "MEL": 1113, "NV": 6705, "VASC": 142}
MIN_PER_CLASS = 8
VIEWS_PER_LESION = (0.75, 0.17, 0.08)  # probability of one, two, three; HAM10000 has 1.34 images a lesion, too
DRAWING = 1  # raise it when render_lesion draws differently: a folder never mixes two drawings
_MARKER = ".m2d-demo.json"


def demo_counts(total: int) -> dict[str, int]:
    """Images per class, `total` together: HAM10000's proportions (largest remainder), no class below MIN_PER_CLASS.

    Raises ConfigError where `total` is too small for that.
    """
    if total < MIN_PER_CLASS * len(ISIC7.codes):
        raise ConfigError(f"total is {total}; a demo set needs at least {MIN_PER_CLASS * len(ISIC7.codes)} images")
    shares: dict[str, float] = dict(HAM10000_COUNTS)  # of the classes above the minimum
    while True:
        left = total - MIN_PER_CLASS * (len(ISIC7.codes) - len(shares))
        of_them = sum(HAM10000_COUNTS[label] for label in shares)
        shares = {label: left * HAM10000_COUNTS[label] / of_them for label in shares}
        if min(shares.values()) >= MIN_PER_CLASS:
            break
        shares = {label: share for label, share in shares.items() if share >= MIN_PER_CLASS}
    counts = {label: int(shares.get(label, MIN_PER_CLASS)) for label in ISIC7.codes}
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
    rng = np.random.default_rng(seed)
    rows = ["image_id,lesion_id"]
    lesion = 0
    for label, count in counts.items():
        (root / label).mkdir(exist_ok=True)
        last = len(rows) + count
        while len(rows) < last:
            lesion += 1
            views = min(last - len(rows), 1 + int(rng.choice(len(VIEWS_PER_LESION), p=VIEWS_PER_LESION)))
            for view in range(views):
                path = root / label / f"DEMO_{len(rows):07d}.jpg"
                rows.append(f"{path.stem},DEMO_L{lesion:07d}")
                if not path.exists() or not path.stat().st_size:  # after a power cut
                    encoded = io.BytesIO()
                    pixels = render_lesion(label, seed * 10_000_000 + lesion, view=view)
                    Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
                    write_whole(path, encoded.getvalue(), durable=False)
    metadata, table = root / "metadata.csv", "\n".join(rows) + "\n"
    if not metadata.exists() or metadata.read_text() != table:
        write_whole(metadata, table)
    return counts


def _claim(root: Path, arguments: dict[str, int]) -> None:
    """Make `root` the home of this set. Raises DataError where it is the home of another one or of something else."""
    marker = root / _MARKER
    content = json.dumps({"arguments": arguments})
    if marker.exists():
        if marker.read_text() != content:
            raise DataError(
                f"root: {root} holds a demo set made with {marker.read_text()}, not {content}; delete it or name "
                "another folder"
            )
        return
    if root.exists() and (root.is_file() or any(not entry.name.startswith(".") for entry in root.iterdir())):
        raise DataError(f"root: {root} is not empty and holds no demo set; name an empty or new folder")
    root.mkdir(parents=True, exist_ok=True)
    write_whole(marker, content)
