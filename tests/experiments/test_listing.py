"""The list, as a person and as a machine read it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from m2d.experiments.commands import list_command
from m2d.experiments.settings import ListConfig


@pytest.fixture
def listed(root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(**settings: Any) -> str:
        list_command(ListConfig(experiments_dir=str(root), **settings))
        return capsys.readouterr().out

    return run


def test_every_fact_of_an_experiment_stands_in_its_row(listed: Any, make_experiment: Any) -> None:
    path = make_experiment(
        "a_20250101_000000", "failed", steps=(5,), best=(5, 0.25), train=[{"step": 7}], total_steps=1200
    )
    (path / "weights").write_bytes(bytes(3 * 2**20))
    row = next(line for line in listed().splitlines() if line.startswith("a_20250101_000000"))
    assert " ".join(row.split()) == "a_20250101_000000 resumable 2025-01-01 00:00 7/1,200 perceptual 0.25 3.0 MiB"


def test_the_newest_comes_last(listed: Any, make_experiment: Any) -> None:
    for name in ("a_20250103_000000", "b_20250101_000000", "c_20250102_000000"):
        make_experiment(name)
    assert [row.split()[0][0] for row in listed().splitlines()[1:]] == ["b", "c", "a"]


def test_machines_get_the_same(listed: Any, make_experiment: Any, hold_lock: Any, root: Path) -> None:
    path = make_experiment("a_20250101_000000", "running", steps=(5,), best=(5, 0.25), total_steps=9)
    with hold_lock(path):
        (row,) = json.loads(listed(json=True))
    assert row["name"] == "a_20250101_000000"
    assert row["state"] == "running"
    assert (row["steps_done"], row["total_steps"]) == (5, 9)
    assert row["best"] == {"checkpoint": "step_00000005", "measure": "val/perceptual", "value": 0.25}
    assert row["path"] == str(root / "a_20250101_000000")


def test_an_empty_root_is_one_line_and_for_machines_an_empty_list(listed: Any, root: Path) -> None:
    assert listed() == f"no experiment in {root}\n"
    assert json.loads(listed(json=True)) == []


def test_a_name_that_nothing_bears_is_told(listed: Any, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000")
    assert listed(name="b").startswith("no experiment of the name b in")


def test_a_broken_one_is_listed_with_its_reason(listed: Any, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000")
    (make_experiment("b_20250102_000000") / "experiment_info.json").write_text("{")
    output = listed()
    assert "a_20250101_000000  done" in output
    assert "b_20250102_000000: experiment_info.json is not JSON" in output


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
