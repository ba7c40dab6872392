"""One experiment directory: what it holds, when it is continued, and a remote root that any machine can go on from."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2d import experiment as experiment_module
from m2d.errors import ConfigError, ExperimentError
from m2d.experiment import (
    FOLDERS,
    Experiment,
    back_up_code,
    complete_checkpoints,
    created,
    list_experiments,
    open_experiment,
)
from m2d.experiments.commands import clean_command
from m2d.experiments.record import find_records
from m2d.experiments.settings import CleanConfig
from m2d.files.atomic import mark_complete
from m2d.files.storage import inside
from m2d.training.settings import TrainConfig, as_dict, differences

CONFIG = as_dict(TrainConfig(name="tiny"))
COMMAND = ["jobs/train.py", "--name", "tiny", "--data_root", "/my data"]


@pytest.fixture(autouse=True)
def staging_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remote experiments are staged in the temporary directory."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def opened(root: Path | str, config: dict[str, Any] = CONFIG, *, name: str = "tiny", fresh: bool = False) -> Experiment:
    return open_experiment(str(root), name, config, differences, fresh=fresh, command=COMMAND)[0]


def continued(root: Path | str, config: dict[str, Any] = CONFIG) -> bool:
    return open_experiment(str(root), "tiny", config, differences, fresh=False, command=COMMAND)[1]


def test_a_new_one_holds_what_is_promised(tmp_path: Path) -> None:
    experiment = opened(tmp_path / "runs")
    assert re.fullmatch(r"tiny_\d{8}_\d{6}", experiment.name)
    promised = """checkpoints logs outputs generated_images cache wandb configs code_backup metrics visualizations"""
    folders = {path.name for path in experiment.path.iterdir() if path.is_dir()}
    assert folders == set(promised.split()) == set(FOLDERS)
    assert experiment.config() == CONFIG
    source = Path(experiment_module.__file__)
    assert (experiment.path / "code_backup" / "m2d" / source.name).read_text() == source.read_text()
    info = experiment.info()
    assert info["command"] == "jobs/train.py --name tiny --data_root '/my data'"
    assert {"m2d", "python", "torch", "ray", "diffusers"} <= info["versions"].keys()
    assert set(info["git"]) == {"commit", "uncommitted_changes"}
    experiment.update_info(device="cpu")
    assert (experiment.info()["device"], experiment.info()["state"]) == ("cpu", "running")


def test_the_same_command_continues_an_unfinished_one(tmp_path: Path) -> None:
    """Also with what may change; a run whose name begins with the other's is another experiment."""
    opened(tmp_path, name="tiny_long")
    first = opened(tmp_path)
    assert not first.name.startswith("tiny_long")
    first.update_info(state="failed")
    assert opened(tmp_path).path == first.path
    assert continued(tmp_path, {**CONFIG, "verbose": True, "data_root": "/elsewhere"})
    first.update_info(state="done")
    assert not continued(tmp_path, {**CONFIG, "seed": 9})


def test_a_changed_setting_is_refused_by_its_name(tmp_path: Path) -> None:
    opened(tmp_path)
    changed = {**CONFIG, "loss_weights": {**CONFIG["loss_weights"], "kl": 0.5}}
    with pytest.raises(ExperimentError, match=r"\(loss_weights\.kl: 1e-06 -> 0\.5\).*--fresh") as refusal:
        opened(tmp_path, changed)
    assert "\n" not in str(refusal.value)


def test_fresh_starts_anew_and_the_old_one_is_never_continued(tmp_path: Path) -> None:
    old = opened(tmp_path)
    new = opened(tmp_path, {**CONFIG, "seed": 9}, fresh=True)
    assert old.info()["state"] == "superseded"
    assert opened(tmp_path, {**CONFIG, "seed": 9}).path == new.path
    new.update_info(state="done")
    assert not continued(tmp_path)


def test_a_run_that_is_done_is_not_repeated_unless_that_is_asked_for(tmp_path: Path) -> None:
    """A job that was queued again, or a restart policy, gives the same command after its end."""

    def again(config: dict[str, Any] = CONFIG, *, same_images: bool = True, fresh: bool = False) -> Experiment:
        return open_experiment(
            str(tmp_path), "tiny", config, differences, lambda _: same_images, fresh=fresh, command=COMMAND
        )[0]

    done = again()
    done.update_info(state="done")
    assert again() == done
    for otherwise in ({"config": {**CONFIG, "seed": 9}}, {"same_images": False}, {"fresh": True}):
        another = again(**otherwise)
        assert another != done
        another.update_info(state="superseded")


def test_another_users_run_is_neither_continued_nor_superseded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two people share a folder and both use the default name."""
    theirs = opened(tmp_path)
    theirs.update_info(user="somebody else")
    mine = opened(tmp_path, {**CONFIG, "seed": 9})
    assert mine != theirs
    assert f"{theirs.path} is unfinished and of the user somebody else" in caplog.text
    assert opened(tmp_path, fresh=True) != theirs
    assert (theirs.info()["state"], mine.info()["state"]) == ("running", "superseded")


def test_fresh_leaves_a_running_one_alone(tmp_path: Path) -> None:
    old = opened(tmp_path)
    with old.running():
        assert opened(tmp_path, fresh=True).path != old.path
    assert old.info()["state"] == "running"


def test_one_that_holds_a_checkpoint_is_never_discarded(tmp_path: Path) -> None:
    experiment = opened(tmp_path / "runs")
    (experiment.checkpoints / "step_00000004").mkdir()
    assert not experiment.discard()
    assert experiment.path.is_dir()
    (experiment.checkpoints / "step_00000004").rmdir()
    assert experiment.discard()
    assert not experiment.path.exists()


def test_a_folder_that_nfs_keeps_is_no_experiment_and_clean_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = opened(tmp_path / "runs")
    with monkeypatch.context() as patched, experiment.running():
        patched.setattr(shutil, "rmtree", lambda path, **_: None)
        assert experiment.discard()
    assert list_experiments(str(tmp_path / "runs")) == find_records(str(tmp_path / "runs")) == []
    clean_command(CleanConfig(experiments_dir=str(tmp_path / "runs"), yes=True))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("write", ["configs/config.yaml", "code_backup", "experiment_info.json"])
def test_a_disk_that_is_full_at_the_start_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    for module, name in ((shutil, "copyfile"), (experiment_module, "write_whole")):
        real = getattr(module, name)

        def limited(*args: Any, real: Any = real) -> Any:
            if any(write in str(arg) for arg in args):
                raise OSError(errno.ENOSPC, "No space left on device", str(args[-1]))
            return real(*args)

        monkeypatch.setattr(module, name, limited)
    with pytest.raises(ExperimentError, match=r"^experiments_dir: .*No space left on device[^\n]*make room[^\n]*$"):
        opened(tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("content", ["", "\0" * 64, '{"state": '])
def test_what_a_power_cut_leaves_of_the_records_does_not_stop_the_run(tmp_path: Path, content: str) -> None:
    """The settings are in every checkpoint; a checkpoint that is cut short counts as none."""
    experiment = opened(tmp_path)
    for step in (1, 2):
        folder = experiment.checkpoints / f"step_{step:08d}"
        folder.mkdir()
        (folder / "checkpoint.yaml").write_text(yaml.safe_dump({"config": CONFIG}))
        mark_complete(folder)
    (folder / "checkpoint.yaml").write_text(content)
    (experiment.checkpoints / "best.json").write_text(content)
    (experiment.path / "experiment_info.json").write_text(content)
    (experiment.path / "configs" / "config.yaml").write_text(content)
    assert continued(tmp_path)
    lines = experiment.mend()
    assert [re.sub(rf"{tmp_path}\S*/", "", line) for line in lines] == [
        "checkpoint: checkpoint.yaml is missing or cut short, so step_00000002 does not count; the newest whole one is "
        "of step 1",
        "configs/config.yaml was damaged and is written again, from a checkpoint's copy",
    ]
    assert complete_checkpoints(experiment.checkpoints) == [experiment.checkpoints / "step_00000001"]
    assert yaml.safe_load((experiment.path / "configs" / "config.yaml").read_text()) == CONFIG
    experiment.update_info(state="running")
    assert experiment.info() == {"state": "running"}
    assert experiment.mend() == []


def test_settings_that_are_nowhere_are_asked_for_in_one_line(tmp_path: Path) -> None:
    experiment = opened(tmp_path)
    (experiment.path / "configs" / "config.yaml").write_text("")
    with pytest.raises(ExperimentError, match=r"config\.yaml is missing, empty or damaged, [^\n]*--fresh$"):
        continued(tmp_path)
    assert opened(tmp_path, fresh=True).path != experiment.path


def test_a_backup_of_what_is_installed_for_reading_only_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "m2d"
    package.mkdir()
    (package / "experiment.py").touch(mode=0o444)
    package.chmod(0o555)
    monkeypatch.setattr(experiment_module, "__file__", str(package / "experiment.py"))
    back_up_code(tmp_path / "backup")
    copies = [tmp_path / "backup" / "m2d", tmp_path / "backup" / "m2d" / "experiment.py"]
    assert all(copy.stat().st_mode & stat.S_IWUSR for copy in copies)


def test_two_of_one_second_get_two_directories(tmp_path: Path) -> None:
    assert opened(tmp_path, fresh=True).path != opened(tmp_path, fresh=True).path


ENTER = """
import os, sys
from pathlib import Path
from m2d.errors import ExperimentError
from m2d.experiment import Experiment
try:
    with Experiment(Path(sys.argv[1])).running():
        print("entered", flush=True)
        os._exit(0)
except ExperimentError as error:
    print(error)
"""


def test_a_second_process_is_refused_while_one_trains_and_a_dead_one_holds_nobody_up(tmp_path: Path) -> None:
    experiment = opened(tmp_path)

    def try_to_enter() -> str:
        program = [sys.executable, "-c", ENTER, str(experiment.path)]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout

    with experiment.running():
        assert "is being trained by another process" in try_to_enter()
    assert try_to_enter() == "entered\n"  # and died in it
    assert not experiment.is_running
    assert try_to_enter() == "entered\n"


def make(root: Path, name: str, **info: str) -> None:
    (root / name / "configs").mkdir(parents=True)
    (root / name / "experiment_info.json").write_text(json.dumps({"state": "done", **info}))
    (root / name / "configs" / "config.yaml").write_text(yaml.safe_dump(CONFIG))


@pytest.mark.parametrize("remote", [False, True], ids=["path", "uri"])
def test_the_list_goes_by_time_and_leaves_out_what_is_no_experiment(tmp_path: Path, remote: bool) -> None:
    root = tmp_path / "runs"
    for name in ("b_20250101_000000", "a_20250102_000000", "a_20241231_235959"):
        make(root, name)
    (root / "a_20250103_000000").mkdir()
    (root / "notes.txt").write_text("")
    location = root.as_uri() if remote else str(root)
    assert [e.name for e in list_experiments(location)] == [
        "a_20241231_235959",
        "b_20250101_000000",
        "a_20250102_000000",
    ]
    assert [e.name for e in list_experiments(location, "a")] == ["a_20241231_235959", "a_20250102_000000"]


@pytest.mark.parametrize("remote", [False, True], ids=["path", "uri"])
def test_the_list_goes_by_the_recorded_time_where_names_are_of_several_time_zones(tmp_path: Path, remote: bool) -> None:
    """Earlier versions named a run in local time and recorded UTC; the last one's record is damaged."""
    make(tmp_path, "a_20261127_004317", created="2026-11-26T10:43:17+00:00")  # in Kiritimati
    make(tmp_path, "a_20261126_004329", created="2026-11-26T10:43:29+00:00")  # in Honolulu
    make(tmp_path, "a_20261126_104400")
    (tmp_path / "a_20261126_104400" / "experiment_info.json").write_text("{")
    location = tmp_path.as_uri() if remote else str(tmp_path)
    assert [e.name[-6:] for e in list_experiments(location)] == ["004317", "004329", "104400"]


def test_a_new_ones_name_is_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        experiment = opened(tmp_path)
        assert created(experiment.name, {}) - created("", experiment.info()) <= timedelta(seconds=5)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("remote", [False, True], ids=["path", "uri"])
def test_a_root_that_is_not_there_yet_is_empty_and_one_that_cannot_be_written_is_refused(
    tmp_path: Path, remote: bool
) -> None:
    root = tmp_path / "not yet"
    assert list_experiments(root.as_uri() if remote else str(root)) == []
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "runs"
    with pytest.raises(ExperimentError, match=r"^experiments_dir: [^\n]* cannot be [^\n]*$"):
        opened(root.as_uri() if remote else root)


def save_checkpoint(experiment: Experiment, step: int, *, best: int | None = None, content: bytes = b"weights") -> None:
    folder = experiment.checkpoints / f"step_{step:08d}"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(content)
    (folder / "complete.json").write_text("{}")
    if best is not None:
        record = {"checkpoint": f"step_{best:08d}", "score": 1.0}
        (experiment.checkpoints / "best.json").write_text(json.dumps(record))
        (experiment.checkpoints / "best").unlink(missing_ok=True)
        (experiment.checkpoints / "best").symlink_to(f"step_{best:08d}")


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One whose temporary directory holds nothing of the run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))


def test_a_remote_root_holds_all_that_was_published(tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    experiment = opened(root.as_uri())
    save_checkpoint(experiment, 5, best=5, content=bytes(2**20))
    (experiment.path / "metrics" / "train.jsonl").write_text("{}\n")
    (experiment.path / "metrics" / ".half.partial").write_text("")
    experiment.publish("checkpoints/step_00000005")
    there = root / experiment.name
    weights = there / "checkpoints" / "step_00000005" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    experiment.publish()
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (2**20, before)  # it is not copied again
    assert (there / "metrics" / "train.jsonl").read_text() == "{}\n"
    assert (there / "configs" / "config.yaml").is_file()
    assert (there / "code_backup" / "m2d" / "experiment.py").is_file()
    assert not (there / "metrics" / ".half.partial").exists()
    assert not (there / "checkpoints" / "best").exists()  # a link, which best.json stands for
    experiment.update_info(state="done")
    assert json.loads((there / "experiment_info.json").read_text())["state"] == "done"


def test_another_machine_goes_on_from_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = (tmp_path / "bucket").as_uri()
    experiment = opened(root)
    for step, best in ((1, 1), (2, 2), (3, 2)):
        save_checkpoint(experiment, step, best=best)
    experiment.publish()
    on_another_machine(monkeypatch, tmp_path)
    resumed, continues = open_experiment(root, "tiny", CONFIG, differences, fresh=False, command=COMMAND)
    assert continues
    assert resumed.path != experiment.path
    fetched = sorted(path.name for path in resumed.checkpoints.iterdir())
    assert fetched == ["best", "best.json", "step_00000002", "step_00000003"]  # the best and the newest
    assert (resumed.checkpoints / "best").resolve().name == "step_00000002"
    assert all((resumed.path / folder).is_dir() for folder in FOLDERS)


def test_a_machine_that_fell_behind_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = (tmp_path / "bucket").as_uri()
    first = opened(root)
    save_checkpoint(first, 1, best=1)
    first.publish()
    home = tempfile.gettempdir()
    on_another_machine(monkeypatch, tmp_path)
    save_checkpoint(opened(root), 2, best=2)
    opened(root).publish()
    monkeypatch.setattr(tempfile, "tempdir", home)
    assert (opened(root).checkpoints / "step_00000002" / "complete.json").is_file()


def test_a_machine_that_is_ahead_keeps_its_own(tmp_path: Path) -> None:
    """Killed between writing a checkpoint and publishing it."""
    root = (tmp_path / "bucket").as_uri()
    experiment = opened(root)
    save_checkpoint(experiment, 1, best=1)
    experiment.publish()
    save_checkpoint(experiment, 2, best=2)
    assert json.loads((opened(root).checkpoints / "best.json").read_text())["checkpoint"] == "step_00000002"


def test_listing_a_remote_root_fetches_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = (tmp_path / "bucket").as_uri()
    experiment = opened(root)
    save_checkpoint(experiment, 1, best=1)
    experiment.publish()
    on_another_machine(monkeypatch, tmp_path)
    (listed,) = list_experiments(root)
    files = sorted(str(path.relative_to(listed.path)) for path in listed.path.rglob("*") if path.is_file())
    assert files == ["configs/config.yaml", "experiment_info.json"]


def test_what_is_staged_is_for_the_user_alone(tmp_path: Path) -> None:
    staging = opened((tmp_path / "bucket").as_uri()).path.parents[1]
    assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    staging.chmod(0o755)  # as an earlier version left it
    opened((tmp_path / "bucket").as_uri())
    assert stat.S_IMODE(staging.stat().st_mode) == 0o700


@pytest.mark.parametrize("whose", ["a link", "another user's", "a file"])
def test_a_staging_directory_that_is_not_the_users_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """Its name can be guessed: who makes it first in /tmp would read and write what lies there."""
    staging = tmp_path / "tmp" / f"m2d-staging-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    if whose == "a link":
        staging.symlink_to(tmp_path / "elsewhere")
    elif whose == "a file":
        staging.write_text("")
    else:
        staging.mkdir()
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        staging.rename(tmp_path / "tmp" / f"m2d-staging-{uid + 1}")
    with pytest.raises(ConfigError, match=r"^TMPDIR: .*m2d-staging[^\n]*$"):
        opened((tmp_path / "bucket").as_uri())
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_two_remote_roots_are_staged_apart(tmp_path: Path) -> None:
    for root in ("one", "two"):
        make(tmp_path / root, "a_20250101_000000", made_in=root)
    listed = [list_experiments((tmp_path / root).as_uri())[0].info()["made_in"] for root in ("one", "two")]
    assert listed == ["one", "two"]


def test_options_of_a_uri_stay_at_its_end() -> None:
    assert inside("s3://bucket/runs/?region=x", "a_1") == "s3://bucket/runs/a_1?region=x"
    assert inside("/what?/runs", "a_1") == "/what?/runs/a_1"
