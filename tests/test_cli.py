"""The command line: files and flags in their order, one line and exit code 2 for what a user can mend."""

import dataclasses
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2d.arguments import setting_comments, setting_types
from m2d.cli import COMMANDS, _Console, main, main_from_shell, parse
from m2d.data.settings import SetupConfig
from m2d.errors import ConfigError, Incomplete
from m2d.experiment import Experiment
from m2d.training.settings import TrainConfig, as_dict

ROOT = Path(__file__).resolve().parent.parent


def train_config(*arguments: str) -> TrainConfig:
    config: TrainConfig = parse("train", arguments)
    return config


def file_of(tmp_path: Path, text: str, name: str = "settings.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "group", "setting", "value"),
    [
        (["--batch_size", "5"], None, "batch_size", 5),
        (["--batch-size=5"], None, "batch_size", 5),
        (["--loss-weights.alignment-vae", "0.5"], "loss_weights", "alignment_vae", 0.5),
        (["--name", "my-run"], None, "name", "my-run"),
        (["--wandb-project=a-b"], None, "wandb_project", "a-b"),
        (
            ["--data.class-map.basal-cell", "BCC", "--data.class_map.other_one", "NV"],  # a folder's own name
            "data", "class_map", {"basal-cell": "BCC", "other_one": "NV"},
        ),
        (["--fresh"], None, "fresh", True),
        (["--fresh", "--epochs", "3"], None, "fresh", True),
        (["--fresh", "true"], None, "fresh", True),
        (["--fresh=true"], None, "fresh", True),
        (["--discriminator.enabled"], "discriminator", "enabled", True),
        (["--discriminator", "--epochs", "3"], "discriminator", "enabled", True),
        (["--channels_last", "false"], None, "channels_last", False),
    ],
)  # fmt: skip
def test_a_flag_may_be_written_in_several_ways(
    arguments: list[str], group: str | None, setting: str, value: object
) -> None:
    config: Any = train_config(*arguments)
    assert getattr(getattr(config, group) if group else config, setting) == value


def test_words_without_a_flag_are_names_also_where_they_look_like_numbers() -> None:
    assert parse("experiments show", ["2025"]).experiment == "2025"
    assert parse("experiments compare", ["2025", "1e3", "--json"]).experiments == ["2025", "1e3"]


def test_the_flags_that_people_know_are_there() -> None:
    known = """epochs max_steps batch_size num_workers use_wandb wandb_project gradient_accumulation_steps
    mixed_precision data_root experiments_dir name seed"""
    assert set(known.split()) <= dict(setting_types(TrainConfig)).keys()


def test_a_config_after_a_preset_wins(tmp_path: Path) -> None:
    preset = train_config("--preset", "demo")
    config = train_config("--preset", "demo", "--config", file_of(tmp_path, "batch_size: 3\nunet: {head_dim: 16}"))
    assert (config.batch_size, config.unet.head_dim) == (3, 16)
    assert config.unet.block_channels == preset.unet.block_channels  # what the file leaves out stays the preset's


def test_flags_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    path = file_of(tmp_path, "batch_size: 3\nepochs: 4")
    for arguments in (
        ["--batch_size", "9", "--preset", "demo", "--config", path],
        ["--preset=demo", f"--config={path}", "--batch_size=9"],
    ):
        config = train_config(*arguments)
        assert (config.batch_size, config.epochs, config.name) == (9, 4, "demo")


def test_printed_config_read_back_is_the_same_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--preset",
        "ham-64",
        "--mixed_precision",
        "no",
        "--data.class_map.mole",
        "NV",
        "--loss_weights.kl",
        "1e-8",
    ]
    with pytest.raises(SystemExit, match="0"):
        parse("train", [*given, "--print_config"])
    path = file_of(tmp_path, capsys.readouterr().out)
    assert train_config("--config", path) == train_config(*given)


def test_a_runs_own_config_file_is_a_config_file(tmp_path: Path) -> None:
    """configs/config.yaml of an experiment repeats it."""
    config = train_config("--preset", "demo", "--max_steps", "7")
    assert train_config("--config", file_of(tmp_path, yaml.safe_dump(as_dict(config)))) == config


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "train") -> str:
    """What the command says on stderr: exactly one line, nothing on stdout, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(command, arguments)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    lines = captured.err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "3"], "--bogus is not known; --help lists them all"),
        (["--batchsize", "3"], "--batchsize is not known; did you mean --batch_size?"),
        (["--image_size", "64"], "--image_size is not known; did you mean --data.image_size?"),
        (["--epoch", "3"], "--epoch is not known; did you mean --epochs?"),
        (["--batch_size", "many"], "batch_size is many; it must be a whole number"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--max_steps", "1.5"], "max_steps is 1.5; it must be a whole number or null"),
        (["--mixed_precision", "fp8"], "mixed_precision is fp8; it must be no or bf16 or fp16 or null"),
        (["--fresh", "maybe"], "fresh is maybe; it must be true or false"),
        (["--data.views", "3"], "data.views is 3; it must be 1 or 4 or 8"),
        (["--unet.block_channels", "3"], "unet.block_channels is 3; it must be list[int]"),
        (["--loss_weights.kl", "-1"], "loss_weights.kl is -1.0; it must be at least 0"),
        (["--preset", "ham-65"], "preset ham-65 is not known; choose from demo"),
        (["--preset"], "--preset needs a name"),
        (["--config", "--fresh"], "--config needs a file"),
        (["--config", "/no/such.yaml"], "config: /no/such.yaml is not a file"),
        (
            ["--stage", "latent"],
            "stage latent trains on a frozen VAE; name an earlier run's checkpoint by --init_checkpoint",
        ),
        (["--data.class_map.mole", "XYZ"], "data.class_map is {'mole': 'XYZ'}; it must be a map to some of AKIEC"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus: 1", "bogus is not a setting"),
        ("unet: {head_dimm: 8}", "unet.head_dimm is not a setting; did you mean unet.head_dim?"),
        ("batch_size: x", "batch_size is x; it must be a whole number"),
        (
            "mixed_precision: no",
            "mixed_precision is False; it must be no or bf16 or fp16 or null; in a file write 'no'",
        ),
        ("batch_size: 0", "batch_size is 0; it must be at least 1"),
        ("a: [", "config: not a YAML file"),
        ("- a\n- b", "config: not a YAML file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "--config", file_of(tmp_path, text)).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "data_root is not set"), (["--data_root", "/no/such/folder"], "data_root: /no/such/folder is not a folder")],
)
def test_training_without_data_is_refused_before_anything_is_made(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, "--preset", "demo", *arguments).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_generating_without_a_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "checkpoint" in refusal(capsys, command="generate")


def test_a_preset_and_a_runs_own_config_serve_setup_data_too(tmp_path: Path) -> None:
    """What is training's alone is passed over; what both have means the same."""
    preset: SetupConfig = parse("setup_data", ["--preset", "ham-64", "--all"])
    train = train_config("--preset", "ham-64", "--data_root", "images", "--cache_dir", "kept", "--seed", "3")
    assert (preset.data, preset.feature_extractor) == (train.data, train.feature_extractor)
    path = file_of(tmp_path, yaml.safe_dump(as_dict(train)))
    assert parse("setup_data", ["--config", path, "--scan"]) == dataclasses.replace(
        preset, all=False, scan=True, data_root="images", cache_dir="kept"
    )


def test_a_key_that_no_command_knows_is_refused_beside_those_that_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (
        ("epochs: 3\nfeaturez: true", "featurez is not a setting; did you mean features?"),
        ("epochs: 3\ndata: {image_sise: 64}", "data.image_sise is not a setting; did you mean data.image_size?"),
    ):
        assert refusal(capsys, "--config", file_of(tmp_path, text), command="setup_data").startswith(message)
    only_training = file_of(tmp_path, "epochs: 3\nunet: {head_dim: 8}")
    assert parse("setup_data", ["--config", only_training]) == SetupConfig()


def test_a_flag_of_another_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Files are passed around; a flag was typed for this command."""
    assert refusal(capsys, "--epochs", "3", command="setup_data").startswith("--epochs is not known")


def test_a_group_with_a_switch_may_be_a_bare_flag() -> None:
    assert parse("setup_data", ["--download", "--all"]).download.enabled is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_root", "."], "nothing to do; give --all, or some of --download --import_from --scan"),
        (["--all"], "data_root is not set"),
        (["--all", "--data_root", "/no/such/folder"], "data_root: /no/such/folder is not a folder"),
        (["--all", "--data_root", ".", "--cache_dir", "s3://bucket/cache"], "cache_dir is s3://bucket/cache"),
        (["--all", "--num_actors", "-1"], "num_actors is -1; it must be at least 0"),
    ],
)
def test_setting_data_up_for_nothing_or_nowhere_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, *arguments, command="setup_data").startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main_from_shell(["trian"])
    assert capsys.readouterr().err == f"error: command trian is not known; choose from {', '.join(COMMANDS)}\n"


def test_an_interrupt_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("m2d.cli.run_training", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main("train", [])
    assert "run the same command again" in capsys.readouterr().err


def test_less_than_was_asked_for_is_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fewer(config: object) -> None:
        raise Incomplete("incomplete: 3 of 4 images are missing")

    monkeypatch.setattr("m2d.cli.run_training", fewer)
    with pytest.raises(SystemExit, match="3"):
        main("train", [])
    assert capsys.readouterr().err == "incomplete: 3 of 4 images are missing\n"


@pytest.mark.parametrize(("skipped", "code"), [(0, None), (20, None), (21, 3)])
def test_a_run_that_skipped_most_steps_has_a_page_and_no_success(
    skipped: int, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (experiment := Experiment(tmp_path)).update_info(
        skipped_steps=skipped, total_steps=40, degraded=[f"{skipped} of 40 steps were skipped"]
    )
    monkeypatch.setattr("m2d.training.trainer.train", lambda config: experiment)
    monkeypatch.setattr("m2d.experiments.page.write_report", lambda experiment: "report.html")
    if code is None:
        main("train", [])
    else:
        with pytest.raises(SystemExit, match=str(code)):
            main("train", [])
        assert "21 of 40 steps were skipped" in capsys.readouterr().err


TALKATIVE = """
import logging, sys, m2d.cli
from rich.console import Console
from m2d.files.progress import progress, say

def doing(config):
    logging.warning("on stderr")
    with progress("work", 2000) as shown:
        for number in range(2000):  # more than a pipe holds
            print("a file's name may be any bytes: \\udcff")
            Console().print(f"step {number}")
            say("beside the result")
            shown.advance(1)
    open(sys.argv[1], "x").close()

m2d.cli.run_training = doing
m2d.cli.main("train", [])
"""


@pytest.mark.parametrize("console", ["| head -1", "2>&1 | head -1", "> /dev/full 2>&1", ">&- 2>&-", "<&- >&-"])
def test_a_console_that_nobody_reads_or_that_is_full_changes_nothing(console: str, tmp_path: Path) -> None:
    """Nor the exit code, which Python makes 120 where it cannot flush stdout at the end."""
    line = f'set -o pipefail; "$@" {console}'
    program = [sys.executable, "-c", TALKATIVE, str(tmp_path / "done")]
    ended = subprocess.run(["bash", "-c", line, "-", *program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (tmp_path / "done").exists(), ended.stderr
    assert ended.returncode == 0
    assert "Error" not in ended.stderr


def test_a_result_that_could_not_be_printed_whole_is_no_success(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "m2d", "experiments", "list", "--json", "--experiments_dir", str(tmp_path)]
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    message = "error: stdout cannot be written (No space left on device); make room, or send it elsewhere\n"
    assert (ended.returncode, ended.stderr) == (2, message)


def test_a_signals_handler_says_its_line_while_another_line_is_being_written() -> None:
    """To a pipe that is full, so that the signal comes in the middle, and that does not block, as ssh may set it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read: list[bytes] = []
    console = _Console(writer, "w")

    def drain() -> None:
        time.sleep(0.4)
        while found := os.read(reader, 2**16):
            read.append(found)

    draining = threading.Thread(target=drain)
    draining.start()
    before = signal.signal(signal.SIGALRM, lambda number, frame: console.write(b"saving"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        console.write(b"." * 2**20)
    finally:
        signal.signal(signal.SIGALRM, before)
        console.close()
        draining.join()
    os.close(reader)
    everything = b"".join(read)
    assert everything.count(b".") == 2**20
    assert b"saving" in everything


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_function_and_every_setting_explains_itself(command: str) -> None:
    """By the comment at the end of its line, which --help shows."""
    assert callable(pkgutil.resolve_name(COMMANDS[command].run))
    config = COMMANDS[command].config
    assert dict(setting_types(config)).keys() - dict(setting_comments(config)).keys() == set()


def test_help_shows_what_each_setting_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("train", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--batch_size BATCH_SIZE images a worker and micro-batch (type: int, default: 32)" in text
    assert "--preset NAME" in text


def test_the_job_and_the_module_are_the_same_command() -> None:
    arguments = ["--preset", "demo", "--batch-size", "3", "--fresh", "--print_config"]
    said = [
        subprocess.run([sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        for program in (["jobs/train.py"], ["-m", "m2d", "train"])
    ]
    assert said[0].stdout == said[1].stdout
    assert yaml.safe_load(said[0].stdout)["batch_size"] == 3


def test_the_shell_sees_exit_code_two_and_no_traceback() -> None:
    command = [sys.executable, "jobs/train.py", "--batch_size", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "error: batch_size is 0; it must be at least 1\n")


@pytest.mark.parametrize("command", ["train", "setup_data", "generate", "evaluate", "tune"])
@pytest.mark.parametrize(
    "text",
    ["data: {image_size: 16}\nseed: 1\nseed: 2\n", "seed: 1\ndata:\n  class_map: {nv: NV, nv: MEL}\n",
     "data: {image_size: 16}\ndata.image_size: 32\n"],
    ids=["a setting", "a word of a map", "two spellings"],
)  # fmt: skip
def test_a_key_twice_in_a_file_is_refused_by_every_command(tmp_path: Path, command: str, text: str) -> None:
    """YAML's readers would take the second one without a word."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^config: .*run\.yaml has [\w.]+ twice, in lines \d and \d; keep one$"):
        parse(command, ["--config", str(tmp_path / "run.yaml")])


def test_a_word_twice_in_a_flags_map_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.class_map has nv twice"):
        parse("train", ["--data.class_map", "{nv: NV, nv: MEL}"])


def test_what_an_anchor_repeats_is_not_twice(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("unet: {block_channels: &a [32, 64, 96]}\nautoencoder: {block_channels: *a}\n")
    config = parse("train", ["--config", str(tmp_path / "run.yaml")])
    assert config.unet.block_channels == config.autoencoder.block_channels == [32, 64, 96]
