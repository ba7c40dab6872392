"""The state of an experiment, and the facts that every command reads of it."""

import fcntl
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from m2d.experiment import Experiment
from m2d.experiments.details import curve
from m2d.experiments.record import Record, read_record


def read(path: Path) -> Record:
    return read_record(Experiment(path))


@pytest.mark.parametrize(
    ("recorded", "steps", "state"),
    [
        ("done", (5,), "done"),
        ("superseded", (5,), "superseded"),
        ("failed", (5,), "resumable"),
        ("running", (5,), "resumable"),  # killed: nobody holds its lock
        ("failed", (), "failed"),
        ("running", (), "failed"),
    ],
)
def test_its_state_follows_from_the_record_and_its_checkpoints(
    make_experiment: Any, recorded: str, steps: tuple[int, ...], state: str
) -> None:
    assert read(make_experiment("a_20250101_000000", recorded, steps=steps)).state == state


def test_a_checkpoint_that_was_cut_off_does_not_make_it_resumable(make_experiment: Any) -> None:
    path = make_experiment("a_20250101_000000", "failed", steps=(5,))
    (path / "checkpoints" / "step_00000005" / "complete.json").unlink()
    assert read(path).state == "failed"


def test_it_is_running_while_another_process_holds_it(make_experiment: Any, hold_lock: Any) -> None:
    path = make_experiment("a_20250101_000000", "failed", steps=(5,))
    with hold_lock(path):
        assert read(path).state == "running"
    assert read(path).state == "resumable"


def test_a_running_one_whose_record_is_broken_is_running(make_experiment: Any, hold_lock: Any) -> None:
    path = make_experiment("a_20250101_000000")
    (path / "experiment_info.json").write_text("")
    with hold_lock(path):
        assert read(path).state == "running"


def test_looking_leaves_no_file_behind(make_experiment: Any) -> None:
    path = make_experiment("a_20250101_000000")
    before = sorted(path.rglob("*"))
    read(path)
    assert sorted(path.rglob("*")) == before


def test_two_who_look_do_not_take_each_other_for_a_run(make_experiment: Any) -> None:
    path = make_experiment("a_20250101_000000")
    (path / ".running.lock").touch()
    with (path / ".running.lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not Experiment(path).is_running


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("experiment_info.json", None, "experiment_info.json is missing"),
        ("experiment_info.json", "", "experiment_info.json is empty"),
        ("experiment_info.json", '{"state": "do', "experiment_info.json is not JSON"),
        ("experiment_info.json", "[]", "experiment_info.json holds no"),
        ("configs/config.yaml", None, "configs/config.yaml is missing"),
        ("configs/config.yaml", "a: [", "configs/config.yaml is not YAML"),
        ("configs/config.yaml", "", "configs/config.yaml is empty"),
        ("configs/config.yaml", "3", "configs/config.yaml holds no"),
    ],
)
def test_one_whose_record_cannot_be_read_is_broken(
    make_experiment: Any, file: str, content: str | None, problem: str
) -> None:
    path = make_experiment("a_20250101_000000", steps=(5,))
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    record = read(path)
    assert record.state == "broken"
    assert str(record.problem).startswith(problem)
    assert "\n" not in str(record.problem)


def test_a_directory_that_holds_nothing_is_broken(root: Path) -> None:
    (root / "a_20250101_000000").mkdir()
    assert read(root / "a_20250101_000000").state == "broken"


def test_the_best_is_the_checkpoints_score_by_the_name_of_what_its_stage_minimises(make_experiment: Any) -> None:
    joint = read(make_experiment("a_20250101_000000", steps=(5,), best=(5, 0.25)))
    latent = read(make_experiment("b_20250101_000000", steps=(5,), best=(5, 0.75), config={"stage": "latent"}))
    assert joint.best == ("step_00000005", "val/perceptual", 0.25)
    assert latent.best == ("step_00000005", "val/velocity_mse", 0.75)


def test_a_checkpoint_that_nothing_judged_is_no_best(make_experiment: Any) -> None:
    assert read(make_experiment("a_20250101_000000", steps=(5,), best=(5, float("inf")))).best is None


def test_its_steps_are_those_of_the_last_whole_record(make_experiment: Any) -> None:
    path = make_experiment("a_20250101_000000", steps=(5,), train=[{"step": 5}, {"step": 12}], total_steps=20)
    with (path / "metrics" / "train.jsonl").open("a") as file:
        file.write('{"step": 17, "loss/')  # cut by a crash
    assert (read(path).steps_done, read(path).total_steps) == (12, 20)


def test_its_steps_are_found_at_the_end_of_a_long_file(make_experiment: Any) -> None:
    train = [{"step": step, "padding": "x" * 100} for step in range(1, 3001)]
    assert read(make_experiment("a_20250101_000000", train=train)).steps_done == 3000


def test_its_size_is_that_of_its_files_and_of_no_link(make_experiment: Any, tmp_path: Path) -> None:
    path = make_experiment("a_20250101_000000", steps=(5,), best=(5, 0.25))
    files = [file for file in path.rglob("*") if file.is_file() and "best" not in file.relative_to(path).parts]
    (tmp_path / "large").write_bytes(bytes(10_000))
    (path / "outputs").symlink_to(tmp_path)
    (path / "link").symlink_to(tmp_path / "large")
    assert read(path).files.size() == sum(file.stat().st_size for file in files)


def test_it_started_when_its_record_says_or_its_name(make_experiment: Any) -> None:
    told = read(make_experiment("a_20250101_000000", created="2025-03-04T05:06:07+00:00"))
    untold = read(make_experiment("b_20250102_030405"))
    assert told.started == datetime.fromisoformat("2025-03-04T05:06:07+00:00")
    assert untold.started.replace(tzinfo=None) == datetime(2025, 1, 2, 3, 4, 5)


def test_a_long_curve_keeps_its_ends_and_the_medians_between() -> None:
    values = [1.0, 1.0, 1.0, 5.0, 5.0, 99.0, 7.0, 7.0, 7.0]
    records = [{"step": step, "x": value} for step, value in zip(range(10, 100, 10), values)]
    thin = curve(records, "x", points=3)
    assert thin is not None
    assert (thin["steps"][0], thin["steps"][-1], thin["values"]) == (10, 90, [1.0, 5.0, 7.0])


def test_a_curve_has_the_finite_values_of_its_measure_and_two_at_least() -> None:
    records = [{"step": 1, "a": 1.0, "b": float("nan"), "c": "?"}, {"step": 2, "a": 2.0, "b": 3.0, "c": "?"}]
    assert curve(records, "a") == {"steps": [1, 2], "values": [1.0, 2.0]}
    assert curve(records, "b") is None
    assert curve(records, "c") is None
