"""Which experiments a root holds, which one a name means, what is known of each, and the list of them."""

import fcntl
import json
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from m2d.errors import ExperimentError
from m2d.experiment import Experiment
from m2d.experiments.commands import list_command
from m2d.experiments.details import curve
from m2d.experiments.record import Record, find_records, read_record, resolve
from m2d.experiments.settings import ListConfig

A, B = "a_20250101_000000", "b_20250102_000000"


def read(path: Path) -> Record:
    return read_record(Experiment(path))


def names(root: Path | str, name: str | None = None) -> list[str]:
    return [record.name for record in find_records(str(root), name)]


def meant(root: Path, wanted: str) -> str:
    return resolve(find_records(str(root)), wanted, str(root)).name


@pytest.fixture
def listed(root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(**settings: Any) -> str:
        list_command(ListConfig(experiments_dir=str(root), **settings))
        return capsys.readouterr().out

    return run


def test_they_come_by_time_whatever_their_names(root: Path, make_experiment: Any, listed: Any) -> None:
    for name in (B, "a_20250103_000000", "a_20241231_235959"):
        make_experiment(name)
    assert names(root) == ["a_20241231_235959", B, "a_20250103_000000"]
    assert names(root, "a") == ["a_20241231_235959", "a_20250103_000000"]
    assert [row.split()[0] for row in listed().splitlines()[1:]] == names(root)


def test_the_latest_is_the_last_one_made_whatever_its_time_zone(root: Path, make_experiment: Any) -> None:
    """Names of earlier versions are in local time."""
    make_experiment("a_20261127_004317", created="2026-11-26T10:43:17+00:00")
    make_experiment("a_20261126_004329", created="2026-11-26T10:43:29+00:00")
    assert meant(root, "latest") == "a_20261126_004329"


def test_what_has_no_experiments_name_is_none_and_a_broken_one_is_one(root: Path, make_experiment: Any) -> None:
    for name in (A, "notes_of_my_own_experiments", ".removing-a_20250101_000001"):
        make_experiment(name)
    (root / "a_20250101_000002").write_text("a file")
    (root / B).mkdir()
    assert names(root) == [A, B]
    assert read(root / B).state == "broken"


@pytest.mark.parametrize("found", ["not there", "not a folder"])
def test_a_root_that_is_no_folder_is_refused_in_one_line(tmp_path: Path, found: str) -> None:
    if found == "not a folder":
        (tmp_path / "nowhere").write_text("")
    with pytest.raises(ExperimentError, match=f"^experiments_dir: .*nowhere is {found}[^\n]*$"):
        find_records(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("wanted", [B, "b", "b_2025", "latest", f"runs/{B}/", f"./runs/{B}"])
def test_a_whole_name_its_beginning_a_path_and_latest_mean_one(root: Path, make_experiment: Any, wanted: str) -> None:
    for name in (A, B):
        make_experiment(name)
    assert meant(root, wanted) == B


def test_a_name_that_matches_two_lists_both(root: Path, make_experiment: Any) -> None:
    for name in ("ham_20250101_000000", "ham-long_20250102_000000", "other_20250103_000000"):
        make_experiment(name)
    with pytest.raises(ExperimentError, match="ham_20250101_000000, ham-long_20250102_000000;"):
        meant(root, "ham")


def test_a_whole_name_means_itself_though_another_begins_with_it(root: Path, make_experiment: Any) -> None:
    for name in (A, f"{A}_20250102_000000"):
        make_experiment(name)
    assert meant(root, A) == A


@pytest.mark.parametrize("wanted", ["c", "/", ""])
def test_a_name_that_matches_none_lists_what_is_there(root: Path, make_experiment: Any, wanted: str) -> None:
    with pytest.raises(ExperimentError, match="no experiment in"):
        meant(root, "latest")
    make_experiment(A)
    with pytest.raises(ExperimentError, match=f"there: {A}, or say latest"):
        meant(root, wanted)


def test_a_remote_one_is_read_where_it_was_published(
    root: Path, make_experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_experiment(A, "failed", steps=(5,), train=[{"step": 7}], total_steps=9)
    make_experiment(B, "running", steps=(5,))
    (here, _), (there, elsewhere) = find_records(str(root)), find_records(root.as_uri())
    assert (there.state, there.steps_done, there.total_steps) == ("resumable", 7, 9)
    assert there.files.size("checkpoints") == here.files.size("checkpoints")
    assert not (there.experiment.path / "metrics").exists()  # nothing was copied into a run's staging directory
    assert elsewhere.state == "unknown"  # whether it runs on another machine


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
    assert read(make_experiment(A, recorded, steps=steps)).state == state


def test_a_checkpoint_that_was_cut_off_does_not_make_it_resumable(make_experiment: Any) -> None:
    path = make_experiment(A, "failed", steps=(5,))
    (path / "checkpoints" / "step_00000005" / "complete.json").unlink()
    assert read(path).state == "failed"


def test_it_is_running_while_another_process_holds_it_whatever_its_record_says(
    make_experiment: Any, hold_lock: Any
) -> None:
    path = make_experiment(A, "failed", steps=(5,))
    with hold_lock(path):
        assert read(path).state == "running"
        (path / "experiment_info.json").write_text("")
        assert read(path).state == "running"
    assert read(path).state == "broken"


def test_looking_leaves_no_file_and_two_who_look_do_not_take_each_other_for_a_run(make_experiment: Any) -> None:
    path = make_experiment(A)
    before = sorted(path.rglob("*"))
    read(path)
    assert sorted(path.rglob("*")) == before
    (path / ".running.lock").touch()
    with (path / ".running.lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not Experiment(path).is_running


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("experiment_info.json", None, "is missing"),
        ("experiment_info.json", "", "is empty"),
        ("experiment_info.json", '{"state": "do', "is not JSON"),
        ("experiment_info.json", "[]", "holds no"),
        ("configs/config.yaml", None, "is missing"),
        ("configs/config.yaml", "a: [", "is not YAML"),
        ("configs/config.yaml", "", "is empty"),
        ("configs/config.yaml", "3", "holds no"),
    ],
)
def test_one_whose_record_cannot_be_read_is_broken(
    make_experiment: Any, listed: Any, file: str, content: str | None, problem: str
) -> None:
    path = make_experiment(A, steps=(5,))
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    record = read(path)
    assert record.state == "broken"
    assert str(record.problem).startswith(f"{file} {problem}")
    assert "\n" not in str(record.problem)
    assert f"{A}: {record.problem}\n" in listed()


def test_the_best_is_the_checkpoints_score_by_the_name_of_what_its_stage_minimises(make_experiment: Any) -> None:
    joint = read(make_experiment(A, steps=(5,), best=(5, 0.25)))
    latent = read(make_experiment(B, steps=(5,), best=(5, 0.75), config={"stage": "latent"}))
    assert joint.best == ("step_00000005", "val/perceptual", 0.25)
    assert latent.best == ("step_00000005", "val/velocity_mse", 0.75)
    assert read(make_experiment("c_20250101_000000", steps=(5,), best=(5, float("inf")))).best is None  # never judged


def test_its_steps_are_those_of_the_last_whole_record_also_of_a_long_file(make_experiment: Any) -> None:
    train = [{"step": step, "padding": "x" * 100} for step in range(1, 3001)]
    path = make_experiment(A, steps=(5,), train=train, total_steps=4000)
    with (path / "metrics" / "train.jsonl").open("a") as file:
        file.write('{"step": 3017, "loss/')  # cut by a crash
    assert (read(path).steps_done, read(path).total_steps) == (3000, 4000)


def test_its_size_is_that_of_its_files_and_of_no_link(make_experiment: Any, tmp_path: Path) -> None:
    path = make_experiment(A, steps=(5,), best=(5, 0.25))
    files = [file for file in path.rglob("*") if file.is_file() and "best" not in file.relative_to(path).parts]
    (tmp_path / "large").write_bytes(bytes(10_000))
    (path / "outputs").symlink_to(tmp_path)
    (path / "link").symlink_to(tmp_path / "large")
    assert read(path).files.size() == sum(file.stat().st_size for file in files)


def test_it_started_when_its_record_says_or_its_name(make_experiment: Any) -> None:
    told, untold = read(make_experiment(A, created="2025-03-04T05:06:07+00:00")), read(make_experiment(B))
    assert told.started == datetime.fromisoformat("2025-03-04T05:06:07+00:00")
    assert untold.started.replace(tzinfo=None) == datetime(2025, 1, 2)


def test_a_long_curve_keeps_its_ends_and_the_medians_between() -> None:
    values = [1.0, 1.0, 1.0, 5.0, 5.0, 99.0, 7.0, 7.0, 7.0]
    thin = curve([{"step": step, "x": value} for step, value in zip(range(10, 100, 10), values)], "x", points=3)
    assert thin is not None
    assert (thin["steps"][0], thin["steps"][-1], thin["values"]) == (10, 90, [1.0, 5.0, 7.0])


def test_a_curve_has_the_finite_values_of_its_measure_and_two_at_least() -> None:
    records = [{"step": 1, "a": 1.0, "b": float("nan"), "c": "?"}, {"step": 2, "a": 2.0, "b": 3.0, "c": "?"}]
    assert curve(records, "a") == {"steps": [1, 2], "values": [1.0, 2.0]}
    assert (curve(records, "b"), curve(records, "c")) == (None, None)


# --- the list ---------------------------------------------------------------------------------------------------------


def test_every_fact_of_an_experiment_is_in_its_row(listed: Any, make_experiment: Any) -> None:
    path = make_experiment(A, "failed", steps=(5,), best=(5, 0.25), train=[{"step": 7}], total_steps=1200)
    (path / "weights").write_bytes(bytes(3 * 2**20))
    row = next(line for line in listed().splitlines() if line.startswith(A))
    assert " ".join(row.split()) == f"{A} resumable 2025-01-01 00:00 7/1,200 perceptual 0.25 3.0 MiB"


def test_machines_get_the_same_list(listed: Any, make_experiment: Any, hold_lock: Any, root: Path) -> None:
    path = make_experiment(A, "running", steps=(5,), best=(5, 0.25), total_steps=9)
    with hold_lock(path):
        (row,) = json.loads(listed(json=True))
    best = {"checkpoint": "step_00000005", "measure": "val/perceptual", "value": 0.25}
    expected = {"name": A, "state": "running", "steps_done": 5, "total_steps": 9, "best": best, "path": str(root / A)}
    assert row | expected == row


def test_where_there_is_none_the_list_is_one_line_and_for_machines_empty(
    listed: Any, root: Path, make_experiment: Any
) -> None:
    assert listed() == f"no experiment in {root}\n"
    assert json.loads(listed(json=True)) == []
    make_experiment(A)
    assert listed(name="b").startswith("no experiment of the name b in")


@pytest.mark.parametrize("columns", ["30", "40", "60"])
def test_a_narrow_terminal_cuts_nothing_off(
    listed: Any, make_experiment: Any, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    make_experiment("a_name_of_some_length_20250101_000000", steps=(5,), best=(5, 0.25), total_steps=1200)
    wide = listed()
    monkeypatch.setenv("COLUMNS", columns)
    narrow = listed()
    assert max(len(line) for line in narrow.splitlines()) <= int(columns)
    assert Counter("".join(narrow.split())) == Counter("".join(wide.split()))  # folded, no character lost


def test_no_command_loads_torch() -> None:
    """So that a list is there at once."""
    heavy = {"torch", "ray", "matplotlib", "diffusers", "wandb"}
    program = f"import sys, m2d.experiments.commands; print(*{heavy} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"
