"""Cleaning removes what is old and of no use, nothing else, and only when it is told to."""

import builtins
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from m2d.errors import ConfigError, ExperimentError
from m2d.experiments.commands import clean_command, planned, remove
from m2d.experiments.record import find_records
from m2d.experiments.settings import CleanConfig
from m2d.models.checkpoint import hold_checkpoint


def there(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def names(*days: int, name: str = "a") -> list[str]:
    return [f"{name}_202501{day:02d}_000000" for day in days]


@pytest.fixture
def clean(root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """clean(...) keeps none and does not ask, unless told otherwise; what it said."""

    def run(**settings: Any) -> str:
        clean_command(CleanConfig(experiments_dir=str(root), **({"yes": True, "keep": 0} | settings)))
        return capsys.readouterr().out

    return run


def test_the_newest_of_each_name_stay(clean: Any, root: Path, make_experiment: Any) -> None:
    for name in [*names(1, 2, 3), *names(1, 2, name="ab"), *names(4, name="b")]:
        make_experiment(name)
    clean(keep=2)
    assert there(root) == sorted([*names(2, 3), *names(1, 2, name="ab"), *names(4, name="b")])
    clean(name="b")
    assert there(root) == sorted([*names(2, 3), *names(1, 2, name="ab")])


def test_five_stay_where_nothing_is_said(clean: Any, root: Path, make_experiment: Any) -> None:
    for name in names(*range(1, 8)):
        make_experiment(name)
    clean(keep=CleanConfig().keep)
    assert there(root) == names(3, 4, 5, 6, 7)


def test_a_running_one_is_never_removed(clean: Any, root: Path, make_experiment: Any, hold_lock: Any) -> None:
    path = make_experiment(names(1)[0], "running", steps=(5,))
    make_experiment(names(2)[0])
    with hold_lock(path):
        assert "it is running" in clean(include_unfinished=True)
    assert there(root) == names(1)
    assert (path / "checkpoints" / "step_00000005" / "complete.json").is_file()


def test_one_whose_checkpoint_is_being_read_is_left_alone(clean: Any, root: Path, make_experiment: Any) -> None:
    path = make_experiment(names(1)[0], steps=(5,))
    (removal,), _ = planned(CleanConfig(experiments_dir=str(root), keep=0))
    with hold_checkpoint(str(path / "checkpoints" / "step_00000005")):
        assert "a generation reads its checkpoint" in clean()
        assert "a generation reads its checkpoint" in str(remove(removal))
    assert there(root) == names(1)
    clean()
    assert there(root) == []


def test_what_changed_after_the_plan_is_left_alone(root: Path, make_experiment: Any, hold_lock: Any) -> None:
    path = make_experiment(names(1)[0], "failed")
    (removal,), _ = planned(CleanConfig(experiments_dir=str(root), keep=0))
    with hold_lock(path):
        assert remove(removal) == "a run has just started in it"
    (path / "checkpoints" / "step_00000005").mkdir()
    (path / "checkpoints" / "step_00000005" / "complete.json").write_text("{}")
    assert "it is resumable now" in str(remove(removal))
    assert (path / "experiment_info.json").is_file()
    shutil.rmtree(path)
    assert remove(removal) == "it is gone already"


@pytest.mark.parametrize(("recorded", "why"), [("failed", "it can be resumed"), (None, "holds a checkpoint")])
def test_what_holds_a_checkpoint_and_is_not_done_goes_only_when_that_is_said(
    clean: Any, root: Path, make_experiment: Any, recorded: str | None, why: str
) -> None:
    path = make_experiment(names(1)[0], recorded or "done", steps=(5,))
    if recorded is None:
        (path / "experiment_info.json").write_text("")
    assert why in clean()
    assert there(root) == names(1)
    clean(include_unfinished=True)
    assert there(root) == []


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_broken_one_goes_in_its_turn(clean: Any, root: Path, make_experiment: Any, content: str | None) -> None:
    info = make_experiment(names(1)[0]) / "experiment_info.json"
    info.unlink()
    (info.parent / ".running.lock").touch()  # as every run leaves it
    if content is not None:
        info.write_text(content)
    make_experiment(names(2)[0])
    clean(keep=1)
    assert there(root) == names(2)


def test_one_that_is_just_being_made_stays(clean: Any, root: Path) -> None:
    (root / names(1)[0]).mkdir()
    assert "made a moment ago" in clean()
    assert there(root) == names(1)


@pytest.mark.parametrize(("state", "stays"), [("failed", True), ("done", False)])
def test_what_an_unfinished_run_starts_from_stays(
    clean: Any, root: Path, make_experiment: Any, state: str, stays: bool
) -> None:
    base = make_experiment(names(1)[0], steps=(5,), best=(5, 0.25))
    start = str(base / "checkpoints" / "best")
    make_experiment(names(2, name="b")[0], state, steps=(3,), config={"init_checkpoint": start})
    assert ("starts from it" in clean(name="a")) is stays
    assert base.is_dir() is stays


def test_links_and_what_they_lead_to_stay(clean: Any, root: Path, make_experiment: Any, tmp_path: Path) -> None:
    elsewhere = make_experiment(names(1)[0]).rename(tmp_path / "elsewhere")
    (root / names(1)[0]).symlink_to(elsewhere)
    (make_experiment(names(2)[0]) / "link").symlink_to(elsewhere)
    assert "it is a link" in clean()
    assert there(root) == names(1)
    assert (elsewhere / "experiment_info.json").is_file()


def test_a_dry_run_says_all_and_removes_nothing(clean: Any, root: Path, make_experiment: Any) -> None:
    path = make_experiment(names(1)[0])
    (path / "generated_images" / "one.png").write_bytes(bytes(2 * 2**20))
    output = clean(yes=False, dry_run=True)
    assert all(part in output for part in ("would remove", names(1)[0], "2.0 MiB of generated images"))
    assert there(root) == names(1)


def test_it_says_what_each_frees_and_all_together(clean: Any, make_experiment: Any) -> None:
    for name in names(1, 2):
        (make_experiment(name) / "outputs.bin").write_bytes(bytes(3 * 2**20))
    rows = [line.split() for line in clean().splitlines()]
    assert [row[1:3] for row in rows if row[0] in names(1, 2)] == [["3.0", "MiB"]] * 2
    assert ["in", "all", "6.0", "MiB"] in rows
    assert ["freed", "6.0", "MiB"] in rows


@pytest.mark.parametrize(("said", "removed"), [("y", True), ("yes", True), ("Y", True), ("n", False), ("", False)])
def test_it_asks_first(
    clean: Any, root: Path, make_experiment: Any, monkeypatch: pytest.MonkeyPatch, said: str, removed: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(builtins, "input", lambda: said)
    make_experiment(names(1)[0])
    output = clean(yes=False)
    assert "Remove 1 directory, " in output
    assert "[y/N]" in output
    assert (there(root) == []) is removed


def test_without_a_terminal_it_refuses_in_one_line(clean: Any, root: Path, make_experiment: Any) -> None:
    make_experiment(names(1)[0])
    with pytest.raises(ExperimentError, match=r"^[^\n]*--yes[^\n]*$"):
        clean(yes=False)
    assert there(root) == names(1)


def test_with_nothing_to_remove_it_needs_no_answer(clean: Any, root: Path, make_experiment: Any) -> None:
    (root / ".removing-notes").mkdir()  # only looks like what an interrupted clean leaves
    assert clean(yes=False) == "nothing to remove\n"
    make_experiment(names(1)[0])
    assert clean(yes=False, keep=5) == "nothing to remove\n"
    assert there(root) == [".removing-notes", *names(1)]


@pytest.mark.parametrize("root_given", ["s3://bucket/runs", "file:///runs"])
def test_a_remote_root_is_refused(root_given: str) -> None:
    with pytest.raises(ExperimentError, match="experiments_dir"):
        clean_command(CleanConfig(experiments_dir=root_given, yes=True))


def test_killed_half_way_it_leaves_no_half_experiment_and_resumes_the_next_time(
    clean: Any, root: Path, make_experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_experiment(names(1)[0], steps=(5,))

    def killed(path: Path) -> None:
        (path / "experiment_info.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            clean()
    assert find_records(str(root)) == []
    assert there(root) == [f".removing-{names(1)[0]}"]
    assert "left by an interrupted clean" in clean()
    assert there(root) == []


def test_caches_go_from_finished_ones_alone_and_the_catalog_stays(clean: Any, root: Path, make_experiment: Any) -> None:
    for state in ("done", "superseded", "failed"):
        cache = make_experiment(f"{state}_20250101_000000", state, steps=(5,)) / "cache"
        (cache / "latents").mkdir()
        (cache / "latents" / "latents_0.safetensors").write_bytes(bytes(2**20))
        (cache / ".removing-old").mkdir()  # an earlier clean was killed here
        (cache / "catalog.parquet").write_text("")
    assert "freed 2.0 MiB" in clean(caches=True)
    assert {path.name.partition("_")[0]: there(path / "cache") for path in root.iterdir()} == {
        "done": ["catalog.parquet"],
        "superseded": ["catalog.parquet"],
        "failed": [".removing-old", "catalog.parquet", "latents"],
    }


def test_machines_get_what_went_and_what_stayed(clean: Any, make_experiment: Any) -> None:
    make_experiment(names(1)[0])
    make_experiment(names(2)[0], "failed", steps=(5,))
    known = json.loads(clean(json=True))
    assert known["removed"] == names(1)
    assert known["freed_bytes"] == known["to_remove"][0]["bytes"] > 0
    assert [kept["name"] for kept in known["kept"]] == names(2)


@pytest.mark.parametrize(("settings", "message"), [({"json": True}, "--yes"), ({"keep": -1}, "keep")])
def test_a_machine_cannot_be_asked_and_fewer_than_none_cannot_be_kept(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CleanConfig(**settings)
