"""Which experiments a root holds, and which one a name means."""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from m2d.errors import ExperimentError
from m2d.experiments.record import find_records, resolve


def names(root: Path | str, name: str | None = None) -> list[str]:
    return [record.name for record in find_records(str(root), name)]


def meant(root: Path, wanted: str) -> str:
    return resolve(find_records(str(root)), wanted, str(root)).name


def test_they_come_by_time_whatever_their_names(root: Path, make_experiment: Any) -> None:
    for name in ("b_20250101_000000", "a_20250102_000000", "a_20241231_235959"):
        make_experiment(name)
    assert names(root) == ["a_20241231_235959", "b_20250101_000000", "a_20250102_000000"]
    assert names(root, "a") == ["a_20241231_235959", "a_20250102_000000"]


def test_what_has_no_experiments_name_is_none(root: Path, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000")
    make_experiment("notes_of_my_own_experiments")
    make_experiment(".removing-a_20250101_000001")
    (root / "a_20250101_000002").write_text("a file")
    assert names(root) == ["a_20250101_000000"]


def test_a_broken_one_is_among_them(root: Path) -> None:
    (root / "a_20250101_000000").mkdir()
    assert names(root) == ["a_20250101_000000"]


@pytest.mark.parametrize("found", ["not there", "not a folder"])
def test_a_root_that_is_no_folder_is_refused_in_one_line(tmp_path: Path, found: str) -> None:
    if found == "not a folder":
        (tmp_path / "nowhere").write_text("")
    with pytest.raises(ExperimentError, match=f"experiments_dir: .*nowhere is {found}") as refusal:
        find_records(str(tmp_path / "nowhere"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "wanted", ["b_20250102_000000", "b", "b_2025", "latest", "runs/b_20250102_000000/", "./runs/b_20250102_000000"]
)
def test_a_whole_name_its_beginning_a_path_and_latest_mean_one(root: Path, make_experiment: Any, wanted: str) -> None:
    make_experiment("a_20250101_000000")
    make_experiment("b_20250102_000000")
    assert meant(root, wanted) == "b_20250102_000000"


def test_a_name_that_matches_two_lists_both(root: Path, make_experiment: Any) -> None:
    for name in ("ham_20250101_000000", "ham-long_20250102_000000", "other_20250103_000000"):
        make_experiment(name)
    with pytest.raises(ExperimentError) as refusal:
        meant(root, "ham")
    assert "ham_20250101_000000, ham-long_20250102_000000" in str(refusal.value)
    assert "other" not in str(refusal.value)


def test_a_whole_name_means_itself_though_another_begins_with_it(root: Path, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000")
    make_experiment("a_20250101_000000_20250102_000000")
    assert meant(root, "a_20250101_000000") == "a_20250101_000000"


@pytest.mark.parametrize("wanted", ["c", "/", ""])
def test_a_name_that_matches_none_lists_what_is_there(root: Path, make_experiment: Any, wanted: str) -> None:
    make_experiment("a_20250101_000000")
    with pytest.raises(ExperimentError, match=r"there: a_20250101_000000, or say latest"):
        meant(root, wanted)


def test_nothing_is_meant_in_an_empty_root(root: Path) -> None:
    with pytest.raises(ExperimentError, match="no experiment in"):
        meant(root, "latest")


def test_a_remote_one_is_read_where_it_was_published(
    root: Path, make_experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = make_experiment("a_20250101_000000", "failed", steps=(5,), train=[{"step": 7}], total_steps=9)
    here, there = find_records(str(root))[0], find_records(root.as_uri())[0]
    assert (there.state, there.steps_done, there.total_steps) == ("resumable", 7, 9)
    assert there.files.size("checkpoints") == here.files.size("checkpoints")
    assert not (there.experiment.path / "metrics").exists()  # nothing was copied into a run's staging directory
    assert path.is_dir()


def test_whether_a_remote_one_runs_elsewhere_is_not_known(
    root: Path, make_experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_experiment("a_20250101_000000", "running", steps=(5,))
    assert find_records(root.as_uri())[0].state == "unknown"
