"""Experiments side by side: what was set otherwise, and which one did better, where that can be said."""

import json
from pathlib import Path
from typing import Any

import pytest

from m2d.errors import ConfigError
from m2d.experiments.commands import compare_command, measure_rows, setting_differences
from m2d.experiments.record import find_records
from m2d.experiments.settings import CompareConfig

A, B = "a_20250101_000000", "b_20250102_000000"


def validation(*values: float, name: str = "val/psnr_db") -> list[dict[str, float]]:
    return [{"step": step, "time": 0.0, name: value} for step, value in enumerate(values, start=1)]


def train(name: str, value: float) -> list[dict[str, float]]:
    return [{"step": 1, "time": 0.0, name: value}]


def better(root: Path, label: str) -> str | None:
    records = find_records(str(root))
    (row,) = [row for row in measure_rows(records)[0] if row.label == label]
    return None if row.better is None else records[row.better].name


@pytest.fixture
def compared(root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*names: str, json: bool = False) -> str:
        compare_command(CompareConfig(experiments=list(names), experiments_dir=str(root), json=json))
        return capsys.readouterr().out

    return run


def test_settings_that_differ_are_told_by_their_dotted_keys(root: Path, make_experiment: Any) -> None:
    """One that an older run did not have is not null; where a run is makes no difference."""
    a = {"seed": 0, "data": {"image_size": 64, "views": 8}, "optimizer": {"betas": [0.9, 0.99]}}
    b = {"seed": 0, "data": {"image_size": 96, "views": 8}, "optimizer": {"betas": [0.9, 0.999]}}
    make_experiment(A, config={**a, "experiments_dir": "/one", "verbose": True})
    make_experiment(B, config={**b, "experiments_dir": "/two", "verbose": False, "brand_new": None})
    assert setting_differences(find_records(str(root))) == {
        "brand_new": ("not there", None),
        "data.image_size": (64, 96),
        "optimizer.betas": ([0.9, 0.99], [0.9, 0.999]),
    }


@pytest.mark.parametrize(
    ("measure", "values", "winner"),
    [("val/psnr_db", (20.0, 21.0), B), ("val/perceptual", (0.2, 0.3), A), ("val/psnr_db", (20.0, 20.0), None),
     ("val/psnr_db", (36.904125690, 36.904125452), None), ("val/unheard_of", (1.0, 2.0), None)],
)  # fmt: skip
def test_the_better_one_is_marked_where_its_direction_is_known(
    root: Path, make_experiment: Any, measure: str, values: tuple[float, float], winner: str | None
) -> None:
    for name, value in zip((A, B), values):
        make_experiment(name, validation=validation(value, name=measure))
    assert better(root, f"{measure}, last") == winner


def test_best_and_last_of_a_measure_may_have_two_winners(root: Path, make_experiment: Any) -> None:
    make_experiment(A, validation=validation(30.0, 10.0))
    make_experiment(B, validation=validation(20.0, 20.0))
    assert (better(root, "val/psnr_db, best"), better(root, "val/psnr_db, last")) == (A, B)


def test_the_only_one_that_has_a_measure_is_not_the_better_one(root: Path, make_experiment: Any) -> None:
    make_experiment(A, validation=validation(30.0))
    make_experiment(B)
    assert better(root, "val/psnr_db, last") is None


@pytest.mark.parametrize(
    ("differs", "measure"),
    [
        ({"dataset": {"sha256": "other"}}, "val/psnr_db"),
        ({"device": "1 CPU worker"}, "images/s"),
        ({"perceptual": "lpips"}, "val/perceptual"),
        ({"config": {"data": {"image_size": 32}}}, "val/psnr_db"),
        ({"config": {"saving": {"validation_images": 3}}}, "val/psnr_db"),
    ],
)
def test_what_was_measured_on_other_grounds_has_no_better_one(
    root: Path, make_experiment: Any, differs: dict[str, Any], measure: str
) -> None:
    for name, value, more in ((A, 0.1, {}), (B, 0.9, differs)):
        measured = validation(value, name=measure.replace("images/s", "val/psnr_db"))
        make_experiment(name, validation=measured, train=train("images_per_s", value), **more)
    _, notes = measure_rows(find_records(str(root)))
    assert better(root, f"{measure}, last") is None
    assert any(measure in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "winner"),
    [
        (({"stage": "joint"}, {"stage": "joint"}), None),  # each moves its latents its own way
        (({"stage": "latent", "init_checkpoint": "/x"}, {"stage": "latent", "init_checkpoint": "/y"}), None),
        (({"stage": "latent", "init_checkpoint": "/x"}, {"stage": "latent", "init_checkpoint": "/x"}), A),
    ],
)
def test_velocity_errors_compare_on_the_same_latents_alone(
    root: Path, make_experiment: Any, settings: tuple[dict[str, str], dict[str, str]], winner: str | None
) -> None:
    for name, config, value in zip((A, B), settings, (0.5, 0.6)):
        make_experiment(name, config=config, validation=validation(value, name="val/velocity_mse"))
    assert better(root, "val/velocity_mse, last") == winner


def test_the_last_training_loss_and_the_speed_are_compared(root: Path, make_experiment: Any) -> None:
    make_experiment(A, train=[{"step": 1, "loss/reconstruction": 0.1, "images_per_s": 10.0},
                              {"step": 2, "loss/reconstruction": 0.5, "images_per_s": 10.0}])  # fmt: skip
    make_experiment(B, train=[{"step": 2, "loss/reconstruction": 0.4, "images_per_s": 30.0}])
    assert better(root, "loss/reconstruction, last") == B
    assert better(root, "images/s, last") == B
    assert better(root, "steps") is None


def test_a_person_sees_both_the_difference_and_the_mark(compared: Any, make_experiment: Any) -> None:
    for name, seed, psnr in ((A, 1, 20.0), (B, 2, 25.0), ("c_20250103_000000", 3, 15.0)):
        make_experiment(name, config={"seed": seed}, validation=validation(psnr))
    rows = [line.split() for line in compared("a", "b", "c").splitlines()]
    assert ["A", A, "done"] in rows
    assert ["seed", "1", "2", "3"] in rows
    assert ["val/psnr_db,", "best", "20", "25", "*", "15"] in rows


def test_machines_get_the_same(compared: Any, make_experiment: Any) -> None:
    make_experiment(A, config={"seed": 1}, validation=validation(20.0))
    make_experiment(B, config={"seed": 2, "brand_new": 3}, validation=validation(25.0))
    known = json.loads(compared("a", "b", json=True))
    assert known["settings"] == {"seed": {A: 1, B: 2}, "brand_new": {B: 3}}
    assert known["measures"]["val/psnr_db, best"] == {"values": {A: 20.0, B: 25.0}, "better": B}


def test_a_broken_one_and_a_running_one_can_be_compared(compared: Any, make_experiment: Any, hold_lock: Any) -> None:
    running, broken = make_experiment(A, "running"), make_experiment(B)
    (broken / "experiment_info.json").write_text("")
    with hold_lock(running):
        rows = [line.split() for line in compared("a", "b").splitlines()]
    assert ["A", A, "running"] in rows
    assert ["B", B, "broken"] in rows


def test_one_alone_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="experiments"):
        CompareConfig(experiments=["a"])
