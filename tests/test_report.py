"""report.html: one page that holds everything it shows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2d.classes import CLASSES
from m2d.experiment import Experiment
from m2d.report import write_report
from m2d.training.telemetry import MetricsLog


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    root = tmp_path / "run_20261122_120000"
    for folder in ("metrics", "visualizations"):
        (root / folder).mkdir(parents=True)
    made = Experiment(root)
    counts = {split: dict.fromkeys(CLASSES, number) for split, number in (("train", 31), ("val", 4), ("test", 5))}
    made.update_info(
        total_steps=20, device="2 CPU worker(s)", precision="float32", versions={"torch": "2.15.0", "wandb": None},
        degraded=["no GPU: training runs on CPU cores <really>"],
        dataset={"images": 280, "rejected": 3, "duplicates": 1, "counts": counts},
    )  # fmt: skip
    for step in (10, 20):
        MetricsLog(root / "metrics", "train").write(step, {"loss/diffusion": 2.0 / step, "loss/reconstruction": 0.1})
    MetricsLog(root / "metrics", "validation").write(20, {"val/psnr_db": 31.25, "val/perceptual": 0.125})
    return made


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(folder / "contact_sheet.png")
    recipe = {"solver": "unipc", "steps": 25, "guidance_scale": 1.5, "guidance_interval": [0.0, 0.8], "seed": 0}
    (folder / "generation.json").write_text(json.dumps(recipe), encoding="utf-8")
    return folder


def test_the_report_needs_no_other_file_and_no_network(experiment: Experiment, samples: Path) -> None:
    page = write_report(experiment, samples).read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_report_says_what_the_run_measured_and_what_was_degraded(experiment: Experiment, samples: Path) -> None:
    page = write_report(experiment, samples).read_text(encoding="utf-8")
    assert '<td class="n">31.250</td>' in page
    assert "280 images (3 files rejected, 1 duplicates left out)" in page
    assert "training runs on CPU cores &lt;really&gt;" in page
    assert "solver unipc, steps 25, guidance_scale 1.5" in page
    for code in CLASSES:
        assert re.search(rf'{code} [a-z ]+</td><td class="n">31</td><td class="n">4</td><td class="n">5</td>', page)


def test_the_curves_are_kept_as_a_picture_too(experiment: Experiment, samples: Path) -> None:
    write_report(experiment, samples)
    with Image.open(experiment.path / "visualizations" / "curves.png") as curves:
        assert curves.width > curves.height > 200
