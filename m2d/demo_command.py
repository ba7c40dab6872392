"""`make demo`: the whole path on images made here: renders a dataset, trains with two workers, balances it, reports."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from m2d.arguments import parse_arguments
from m2d.classes import ISIC7
from m2d.demo.dataset import write_demo_dataset
from m2d.experiment import list_experiments
from m2d.experiments.page import write_report
from m2d.files.paths import result_path
from m2d.generation.run import generate
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.training.settings import TrainConfig
from m2d.training.trainer import train

NAME = "demo"
BALANCED_TO = 40  # images of every class; as many as the largest has would take minutes more


def run_demo(config: Any) -> Path:
    """Run the demo (m2d.cli.DemoConfig); returns its report. Run again, it resumes where it stopped."""
    root = Path(result_path("directory", config.directory)).resolve()
    data_root, experiments = root / "data", root / "experiments"
    counts = write_demo_dataset(data_root, total=config.images)
    print(f"demo images: {sum(counts.values())} in {data_root} ({' '.join(f'{c} {counts[c]}' for c in ISIC7.codes)})")
    done = [e for e in list_experiments(str(experiments), NAME) if e.info().get("state") == "done"]
    if done and not config.fresh:
        experiment = done[-1]
        print(f"already trained: {experiment.path} (--fresh trains again)")
    else:
        places = ["--data_root", str(data_root), "--experiments_dir", str(experiments), "--name", NAME]
        places += ["--cache_dir", str(root / "cache"), f"--fresh={config.fresh}"]
        preset = ["--preset", "demo", *places]
        experiment = train(parse_arguments(TrainConfig, preset, prog="demo", description="", presets=True))
    # More guidance than the default: after so few steps it shows the classes' features best.
    # The gates know real dermoscopy images only by their features, and what 400 steps give is far from those: one try.
    settings = GenerateConfig(
        checkpoint=str(experiment.checkpoints / "best"),
        guidance_scale=3.0,
        num_samples=config.num_samples,
        gates=GateConfig(enabled=False),
    )
    samples = generate(settings)
    shutil.copyfile(samples / "contact_sheet.png", root / "contact_sheet.png")
    balanced = generate(
        dataclasses.replace(settings, mode="balance", data_root=str(data_root), to=str(BALANCED_TO), merge=True)
    )
    report = write_report(experiment, samples)
    shutil.copyfile(report, root / "report.html")
    print(f"balanced: {balanced}\nsamples:  {root / 'contact_sheet.png'}\nreport:   {root / 'report.html'}")
    return root / "report.html"
