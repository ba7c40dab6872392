"""A sweep on Ray: trials are judged, some may be stopped, and what was found trains."""

from pathlib import Path

import pytest
from tiny_run import TINY, write_images

from m2d.cli import parse
from m2d.errors import ExperimentError
from m2d.experiment import list_experiments
from m2d.tuning.settings import SweepConfig
from m2d.tuning.sweep import sweep

SPACE = "{loss_weights.diffusion: 'loguniform(0.1, 10)', optimizer.lr_denoiser: 'loguniform(1e-5, 1e-2)'}"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


def config_of(data_root: Path, root: Path, *more: str) -> SweepConfig:
    places = ["--data_root", str(data_root), "--experiments_dir", str(root), "--cache_dir", str(root / "cache")]
    judged = ["--sweep.reports", "2", "--sweep.grace_reports", "1", "--sweep.reduction_factor", "2"]
    small = ["--max_steps", "4", "--sweep.samples", "7", "--telemetry.sample_steps", "2", "--sweep.space", SPACE]
    found: SweepConfig = parse("tune", [*places, *TINY, *judged, *small, "--num_workers", "1", "--name", "s", *more])
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_ends_and_leaves_a_run_that_trains(ray_cluster: None, data_root: Path, tmp_path: Path) -> None:
    config = config_of(data_root, tmp_path, "--num_trials", "3")
    outcome = sweep(config)
    assert len(outcome.trials) == 3
    assert [trial.error for trial in outcome.trials] == [None] * 3
    assert outcome.best is not None
    assert outcome.best.finished
    assert outcome.best.step == 4
    assert len({trial.chosen["optimizer.lr_denoiser"] for trial in outcome.trials}) == 3
    folder = tmp_path / "sweeps" / "s"
    best = parse("train", ["--config", str(folder / "best.yaml")])
    assert best.loss_weights.diffusion == outcome.best.chosen["loss_weights.diffusion"]
    states = {experiment.info()["state"] for experiment in list_experiments(str(folder / "trials"))}
    assert states <= {"done", "superseded"}
    with pytest.raises(ExperimentError, match=r"begun with other settings \(max_steps: 4 -> 5\)"):
        sweep(config_of(data_root, tmp_path, "--num_trials", "3", "--max_steps", "5"))


def test_resuming_what_was_never_begun_is_refused(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="there is no sweep"):
        sweep(config_of(data_root, tmp_path, "--resume"))
