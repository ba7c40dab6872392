"""`make demo`: the whole path on images made here. Renders a data set, trains with two workers, generates, reports."""

import dataclasses
import shutil
from pathlib import Path

from m2d.arguments import parse_arguments
from m2d.classes import CLASSES
from m2d.config import TrainConfig, preset_path
from m2d.data.demo import write_demo_dataset
from m2d.experiment import list_experiments
from m2d.generation.run import generate
from m2d.generation.settings import GenerateConfig
from m2d.report import write_report
from m2d.training.trainer import train

NAME = "demo"


def run_demo(directory: str, images: int, num_samples: int, fresh: bool) -> Path:
    """Run the demo in a directory; returns its report. Run again, it goes on where it stopped."""
    root = Path(directory).resolve()
    data_root, experiments = root / "data", root / "experiments"
    counts = write_demo_dataset(data_root, total=images)
    print(f"demo images: {sum(counts.values())} in {data_root} ({' '.join(f'{c} {counts[c]}' for c in CLASSES)})")
    done = [e for e in list_experiments(str(experiments), NAME) if e.info().get("state") == "done"]
    if done and not fresh:
        experiment = done[-1]
        print(f"already trained: {experiment.path} (--fresh trains anew)")
    else:
        experiment = train(_config(data_root, experiments, fresh))
    samples = generate(
        # More guidance than the default: after so few steps it shows best what the classes were told apart by.
        GenerateConfig(
            checkpoint=str(experiment.checkpoints / "best"), num_samples=num_samples, output=None, guidance_scale=3.0
        )
    )
    shutil.copyfile(samples / "contact_sheet.png", root / "contact_sheet.png")
    report = write_report(experiment, samples)
    shutil.copyfile(report, root / "report.html")
    print(f"samples: {root / 'contact_sheet.png'}\nreport:  {root / 'report.html'}")
    return root / "report.html"


def _config(data_root: Path, experiments: Path, fresh: bool) -> TrainConfig:
    """The demo preset, in the demo's folders."""
    places = ["--data_root", str(data_root), "--experiments_dir", str(experiments), "--name", NAME]
    config = parse_arguments(
        TrainConfig, ["--preset", "demo", *places], prog="demo", description="", preset_path=preset_path
    )
    return dataclasses.replace(config, fresh=fresh)
