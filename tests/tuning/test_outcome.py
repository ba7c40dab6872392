"""What a sweep leaves: which trial is the best, the tables, and a file that training takes unchanged."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tuning.trial_runs import run_of

from m2d.cli import parse
from m2d.errors import TrainingError
from m2d.training.settings import TrainConfig
from m2d.tuning.ledger import WORST, Ledger, State
from m2d.tuning.outcome import TrialOutcome, best_first, importances, read_outcome, write_outcome
from m2d.tuning.settings import SweepConfig

SPACE = "{loss_weights.diffusion: 'loguniform(0.1, 10)', optimizer.lr_denoiser: 'loguniform(1e-4, 1e-2)'}"


def config() -> SweepConfig:
    found: SweepConfig = parse("tune", ["--preset", "demo", "--sweep.space", SPACE, "--data_root", "/data"])
    return found


def trial(name: str, objectives: list[float], *, finished: bool = True, **chosen: float) -> TrialOutcome:
    values = {"loss_weights.diffusion": 0.5, "optimizer.lr_denoiser": 1e-3} | chosen
    return TrialOutcome(name, values, objectives, 100, {"val/psnr_db": 30.0}, finished, None)


def test_trials_are_read_with_how_far_they_came(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    states: list[tuple[State, int | None, str | None]] = [
        ("failed", None, "no memory"),
        ("stopped", 50, None),
        ("done", None, None),
    ]
    for number, (state, step, error) in enumerate(states):
        ledger.begin(str(number), {"loss_weights.diffusion": number}, number)
        if state != "failed":
            run_of(tmp_path, f"trial_{number:03d}", state="running", steps=[50, 100])
        ledger.end(str(number), state, step=step, error=error)
    whole, stopped, broken = read_outcome(config(), ledger)
    # 20 dB is an error of 0.1, which weighs 10; the kernel distance is 1.
    assert (whole.trial, whole.finished, whole.step, whole.objectives) == ("trial_002", True, 100, [2.0, 2.0])
    assert (stopped.trial, stopped.finished, stopped.step, stopped.objectives) == ("trial_001", False, 50, [2.0])
    assert (broken.trial, broken.finished, broken.objective, broken.error) == ("trial_000", False, None, "no memory")


def test_a_table_in_a_file_is_not_cut(tmp_path: Path) -> None:
    screen = io.StringIO()
    write_outcome([trial("trial_000", [0.9])], config(), tmp_path, Console(file=screen, width=40))
    rows = [line for line in screen.getvalue().splitlines() if line.startswith("trial_000")]
    assert [row.split() for row in rows] == [["trial_000", "0.9", "100", "0.5", "0.001", "whole"]]


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (trial("stopped", [0.1], finished=False), trial("whole", [0.9])),  # however it looked
        (trial("lucky", [0.1, 0.9]), trial("steady", [0.9, 0.5])),  # the last objective counts
        (trial("without samples", [WORST]), trial("whole", [0.9])),
    ],
)
def test_the_best_comes_first(worse: TrialOutcome, better: TrialOutcome) -> None:
    assert best_first([worse, better]) == [better, worse]


def test_the_best_file_is_taken_unchanged_beside_tables_and_pictures(tmp_path: Path) -> None:
    screen = io.StringIO()
    trials = [trial("b", [0.2], **{"loss_weights.diffusion": 2.5}), trial("a", [0.9])]
    write_outcome(trials, config(), tmp_path, Console(file=screen, width=120))
    best: TrainConfig = parse("train", ["--config", str(tmp_path / "best.yaml")])
    assert best == config().training({"loss_weights.diffusion": 2.5, "optimizer.lr_denoiser": 1e-3})
    assert best.data_root == "/data"
    assert "best: b" in screen.getvalue()
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], float(row["objective"])) for row in rows] == [("b", 0.2), ("a", 0.9)]
    assert (rows[0]["loss_weights.diffusion"], rows[0]["val/psnr_db"], rows[0]["reports"]) == ("2.5", "30.0", "1")
    assert [row["objective"] for row in json.loads((tmp_path / "results.json").read_text())] == [0.2, 0.9]
    for name in ("parallel_coordinates.png", "importance.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400


def test_a_sweep_without_one_judged_trial_says_why(tmp_path: Path) -> None:
    broken = TrialOutcome("a", {}, [], 0, {}, False, "out of memory")
    with pytest.raises(TrainingError, match="could be judged \\(out of memory\\)"):
        write_outcome([broken], config(), tmp_path, Console(file=io.StringIO()))
    assert (tmp_path / "results.csv").is_file()


def planted(count: int) -> list[TrialOutcome]:
    """The objective is the logarithm of the learning rate; the loss weight does nothing. Reports: the first alone."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        rate, weight = 10 ** generator.uniform(-4, -2), 10 ** generator.uniform(-1, 1)
        chosen = {"optimizer.lr_denoiser": rate, "loss_weights.diffusion": weight}
        found.append(trial(str(number), [np.log10(rate)] * (1 + number % 2), finished=False, **chosen))
    return found


def test_what_matters_is_found() -> None:
    shares, report = importances(planted(40), config().distributions, seed=0)
    assert shares["optimizer.lr_denoiser"] > 0.9
    assert sum(shares.values()) == pytest.approx(1.0)
    assert report == 1  # the latest that every trial reached


def test_too_few_trials_tell_nothing() -> None:
    assert importances(planted(3), config().distributions, seed=0)[0] == {}
