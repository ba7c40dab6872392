import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import make_checkpoint, write_checkpoint

from m2d.cli import main, parse
from m2d.errors import ConfigError
from m2d.files.paths import checkpoint_folder, input_path, result_path
from m2d.training.settings import TrainConfig, with_absolute_paths

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the name by which Ray hands a job its configuration
SUBMITTED = json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_4711.zip"}, "metadata": {}})
BARE = json.dumps({"runtime_env": {"env_vars": {}}, "metadata": {}})


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job that was submitted with --working-dir, as Ray lays it out."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_4711"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(JOB, SUBMITTED)
    return folder


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "storage"
    folder.mkdir()
    monkeypatch.setenv("M2D_STORAGE", str(folder))
    return folder


@pytest.mark.parametrize("location", ["./experiments", "~/experiments", "/mnt/experiments", "s3://bucket/a", None])
def test_outside_a_job_every_place_stays_as_it_is(
    location: str | None, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(JOB, raising=False)
    assert result_path("experiments_dir", location) == location
    assert input_path("data_root", location) == location


def test_results_of_a_job_in_a_lasting_directory_go_where_they_always_went(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert result_path("experiments_dir", "experiments") == "experiments"  # of a job that left its copy
    monkeypatch.setenv(JOB, BARE)
    config = with_absolute_paths(TrainConfig(experiments_dir="experiments", data_root="images"))
    assert (config.experiments_dir, config.data_root) == (str(tmp_path / "experiments"), str(tmp_path / "images"))


def test_results_in_a_copy_are_refused_with_the_fix(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"^output: out would .* copy .*absolute path, or set M2D_STORAGE [^\n]*$"):
        result_path("output", "out")


@pytest.mark.parametrize("place", ["", "below/results", "below/../results"])
def test_an_absolute_path_into_the_copy_is_refused_and_one_outside_taken(
    place: str, copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="copy of the submitted directory"):
        result_path("output", str(copy / place))
    for outside in (str(tmp_path / "out"), "s3://bucket/out", None):
        assert result_path("output", outside) == outside


@pytest.mark.parametrize("config", [SUBMITTED, BARE])
def test_relative_results_of_a_job_go_to_the_clusters_storage(
    config: str, copy: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOB, config)
    assert result_path("experiments_dir", "./experiments") == str(storage / "experiments")


def test_a_path_that_leaves_the_storage_and_a_relative_storage_are_refused(
    copy: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="leaves M2D_STORAGE"):
        result_path("output", "../out")
    monkeypatch.setenv("M2D_STORAGE", "mnt/m2d")
    with pytest.raises(ConfigError, match="M2D_STORAGE is mnt/m2d"):
        result_path("output", "out")


def test_an_input_is_looked_for_in_the_copy_then_in_the_storage(copy: Path, storage: Path) -> None:
    for folder in (copy / "both", storage / "both", storage / "runs" / "best"):
        folder.mkdir(parents=True)
    assert input_path("data_root", "both") == str(copy / "both")
    assert input_path("checkpoint", "runs/best") == str(storage / "runs" / "best")
    with pytest.raises(ConfigError, match=f"data_root: ISIC is not there, nor in M2D_STORAGE .{storage}.: "):
        input_path("data_root", "ISIC")


def test_what_is_only_read_where_it_is_there_may_be_absent(copy: Path) -> None:
    (copy / "images").mkdir()
    config = TrainConfig(data_root="images", experiments_dir="/mnt/experiments", cache_dir="cache")
    assert with_absolute_paths(config).cache_dir == str(copy / "cache")


@pytest.mark.parametrize(
    ("command", "arguments", "setting"),
    [
        ("train", ["--data_root", "here"], "experiments_dir"),
        ("tune", ["--data_root", "here", "--num_trials", "1"], "experiments_dir"),
        ("setup_data", ["--data_root", "here", "--all"], "cache_dir"),
        ("setup_data", ["--data_root", "there", "--download", "--cache_dir", "/mnt/cache"], "data_root"),
        ("generate", ["--checkpoint", "here", "--output", "out"], "output"),
        ("evaluate", ["--real", "here", "--generated", "here"], "cache_dir"),
        ("evaluate", ["--real", "here", "--generated", "here", "--cache_dir", "/mnt/cache"], "output"),
        ("evaluate", ["probe", "--data_root", "here", "--cache_dir", "/mnt/cache"], "output"),
        ("experiments", ["list"], "experiments_dir"),
        ("experiments", ["show"], "experiments_dir"),
        ("experiments", ["clean", "--yes"], "experiments_dir"),
        ("demo", [], "directory"),
    ],
)  # fmt: skip
def test_no_command_leaves_results_in_a_copy(
    command: str, arguments: list[str], setting: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "here").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(command, arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"error: {setting}: ")
    assert "this job's copy of the submitted directory" in error
    assert list(copy.iterdir()) == [copy / "here"]


def test_images_do_not_go_beside_a_checkpoint_of_the_copy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --output they go into the checkpoint's experiment."""
    write_checkpoint(make_checkpoint(), copy / "best")
    with pytest.raises(SystemExit):
        main("generate", ["--checkpoint", "best", "--feature", "none", "--num_actors", "0", "--gates.enabled", "false"])
    error = capsys.readouterr().err
    assert error.startswith(f"error: output: {copy}")
    assert "this job's copy" in error


@pytest.mark.parametrize(
    ("command", "arguments", "setting"),
    [
        ("train", ["--data_root", "gone", "--experiments_dir", "/mnt/e"], "data_root"),
        ("train", ["--init_checkpoint", "gone", "--experiments_dir", "/mnt/e"], "init_checkpoint"),
        ("setup_data", ["--data_root", "gone", "--all", "--cache_dir", "/mnt/cache"], "data_root"),
        ("generate", ["--checkpoint", "gone"], "checkpoint"),
        ("evaluate", ["--real", "gone"], "real"),
        ("evaluate", ["--generated", "gone"], "generated"),
        ("evaluate", ["probe", "--data_root", "gone"], "data_root"),
    ],
)  # fmt: skip
def test_every_command_tells_why_an_input_is_absent_in_a_copy(
    command: str, arguments: list[str], setting: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(command, arguments)
    assert capsys.readouterr().err.startswith(f"error: {setting}: gone is not there: this job runs in a copy")


def test_commands_find_and_leave_everything_in_the_storage(
    copy: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (storage / "experiments").mkdir()
    main("experiments", ["list"])
    assert capsys.readouterr().out.replace("\n", "") == f"no experiment in {storage / 'experiments'}"
    for name in ("ISIC", "made"):
        (storage / name).mkdir()
    config = parse("evaluate", ["--real", "ISIC", "--generated", "made", "--output", "report"]).in_this_place()
    assert (config.real, config.generated) == (str(storage / "ISIC"), str(storage / "made"))
    assert (config.output, config.cache_dir) == (str(storage / "report"), str(storage / "cache"))


@pytest.mark.parametrize(
    ("command", "arguments", "setting"),
    [
        ("train", ["--cache_dir", "../cache"], "experiments_dir"),
        ("train", ["--experiments_dir", "../experiments"], "cache_dir"),
        ("setup_data", ["--all"], "cache_dir"),
        ("evaluate", ["probe"], "cache_dir"),
        ("evaluate", ["probe", "--cache_dir", "../cache"], "output"),
    ],
)
def test_the_defaults_never_land_among_the_images(
    command: str, arguments: list[str], setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """cd /data/ISIC, then a command with --data_root . and no other place."""
    data_root = tmp_path / "ISIC"
    data_root.mkdir()
    monkeypatch.chdir(data_root)
    with pytest.raises(SystemExit) as ended:
        main(command, [*arguments, "--data_root", "."])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith(f"error: {setting}: {data_root}/")
    assert error.endswith(f"name another place by --{setting}")
    assert not list(data_root.iterdir())
    assert list(tmp_path.iterdir()) == [data_root]


def test_best_is_what_its_record_says_and_a_link_only_where_there_is_none(tmp_path: Path) -> None:
    for name in ("step_1", "step_2"):
        (tmp_path / name).mkdir()
    best = str(tmp_path / "best")
    assert checkpoint_folder(best) == best
    (tmp_path / "best").symlink_to("step_1")
    assert checkpoint_folder(best) == str(tmp_path / "step_1")
    (tmp_path / "best.json").write_text('{"checkpoint": "step_2", "score": 1.0}')
    assert checkpoint_folder(best) == str(tmp_path / "step_2")
    (tmp_path / "best").unlink()
    assert checkpoint_folder(best) == str(tmp_path / "step_2")
    (tmp_path / "best.json").write_text("")
    assert checkpoint_folder(best) == best


@pytest.mark.parametrize("location", ["~nobody_of_this_name/runs", "a" * 256, f"runs/{'é' * 128}/a", "a\0b"])
def test_what_no_file_system_takes_is_refused_in_one_line(location: str) -> None:
    for of in (result_path, input_path):
        with pytest.raises(ConfigError, match=r"^data_root: [^\n\0]*$"):
            of("data_root", location)


def test_a_process_without_home_and_name_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    """As `docker run --user 12345`; libraries would raise, or keep their caches in a folder called `~`."""
    program = (
        "import getpass, os, pwd\n"
        "def unknown(*_): raise KeyError\n"
        "pwd.getpwuid = unknown\n"
        "from m2d.files.paths import ensure_home\n"
        "ensure_home()\n"
        "print(os.path.expanduser('~'), getpass.getuser())"
    )
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment | {"TMPDIR": str(tmp_path)}
    )
    home, user = done.stdout.split()
    assert Path(home).parent == tmp_path
    assert stat.S_IMODE(Path(home).stat().st_mode) == 0o700
    assert user == f"uid{os.getuid()}"


@pytest.mark.parametrize("location", ["", " "])
def test_an_empty_place_of_results_is_refused(location: str) -> None:
    """It would mean the folder that one happens to be in."""
    with pytest.raises(ConfigError, match="directory is empty"):
        result_path("directory", location)
