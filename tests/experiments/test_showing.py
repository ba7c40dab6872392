"""The page of one experiment, and what it says to do next."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from m2d.classes import ISIC7
from m2d.cli import parse
from m2d.experiments.commands import show_command
from m2d.experiments.details import next_step, resume_command
from m2d.experiments.record import find_records
from m2d.experiments.settings import ShowConfig

COUNTS = {split: dict.fromkeys(ISIC7.codes, 1234) for split in ("train", "val")}
TRAIN = [
    {"step": step, "time": 1735700000.0 + step, "loss/diffusion": 2.0 / step, "learning_rate/denoiser": 1e-4,
     "images_per_s": 16.0}
    for step in range(1, 8)
]  # fmt: skip
VALIDATION = [
    {"step": 3, "time": 0.0, "val/psnr_db": 21.5, "val/perceptual": 0.5},
    {"step": 6, "time": 0.0, "val/psnr_db": 20.5, "val/perceptual": 0.25},
]


@pytest.fixture
def shown(root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(experiment: str = "latest", **settings: Any) -> str:
        show_command(ShowConfig(experiment=experiment, experiments_dir=str(root), **settings))
        return capsys.readouterr().out

    return run


@pytest.fixture
def told(make_experiment: Any) -> Path:
    """An unfinished experiment whose record tells everything. Its step has 2 x 4 x 3 = 24 images."""
    path: Path = make_experiment(
        "a_20250101_000000", "failed", steps=(3, 6), best=(6, 0.25), train=TRAIN, validation=VALIDATION,
        config={"batch_size": 4, "gradient_accumulation_steps": 2},
        created="2025-01-01T02:53:20+00:00", error="\x1b[36mRuntimeError\x1b[39m: out of memory\n  File x, line 3",
        device="3 x a GPU", precision="bfloat16 autocast", world_size=3, total_steps=12,
        degraded=["features come from elsewhere"], versions={"torch": "2.15.0", "lpips": None},
        dataset={"root": "/data/ISIC", "images": 8502, "rejected": 3, "duplicates": 4, "counts": COUNTS},
    )  # fmt: skip
    return path


def test_a_page_tells_everything(shown: Any, told: Path) -> None:
    page = shown()
    for fact in (
        "a_20250101_000000  resumable", "it ended by: RuntimeError: out of memory\n", "its command continues at step 6",
        "python jobs/train.py --name tiny", "3 x a GPU", "bfloat16 autocast", "features come from elsewhere",
        "/data/ISIC: 8,502 images, 3 rejected, 4 duplicates", "7/12", "torch 2.15.0", "step_00000006", "loss/diffusion",
        "report.html",  # where the curves are
    ):  # fmt: skip
        assert fact in page
    assert "\x1b" not in page
    assert "lpips" not in page
    rows = [line.split() for line in page.splitlines()]
    for row in (
        ["class", "train", "val"],
        ["MEL", "1,234", "1,234"],
        ["all", "8,638", "8,638"],  # 7 x 1234
        ["val/psnr_db", "21.5", "3", "20.5"],  # higher is better
        ["val/perceptual", "0.25", "6", "0.25"],  # lower is better
    ):
        assert row in rows


def test_machines_get_all_of_it(shown: Any, told: Path) -> None:
    """Made 1735700000 s after 1970, its last record 7 s later; 7 steps of 24 images at 16 a second are 10.5 s."""
    known = json.loads(shown(json=True))
    assert (known["wall_seconds"], known["training_seconds"]) == (7.0, 10.5)
    assert known["state"] == "resumable"
    assert known["command"] == "python jobs/train.py --name tiny"
    checkpoints = [(c["step"], c["best"], c["measures"]["val/psnr_db"]) for c in known["checkpoints"]]
    assert checkpoints == [(3, False, 21.5), (6, True, 20.5)]
    assert known["curves"]["loss/diffusion"]["steps"] == [1, 2, 3, 4, 5, 6, 7]
    assert known["last_scalars"]["images_per_s"] == 16.0
    assert known["config"]["batch_size"] == 4
    assert known["dataset"]["counts"] == COUNTS


def test_json_holds_no_number_that_json_has_not(shown: Any, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000", train=[{"step": 1, "loss/kl": float("inf")}], steps=(1,))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(shown(json=True), parse_constant=refuse)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_page_fits_its_terminal(shown: Any, told: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    page = [line.rstrip() for line in shown().splitlines()]
    # A command is left on one line, so that it can be copied.
    assert max(len(line) for line in page if not line.startswith("python ")) <= int(columns)
    assert not any("…" in line for line in page)


@pytest.mark.parametrize("name", ["experiment_info.json", "configs/config.yaml", "metrics/train.jsonl"])
@pytest.mark.parametrize("content", ["", "{", "null", "\x00\xff"])
def test_a_broken_file_breaks_no_page(shown: Any, told: Path, name: str, content: str) -> None:
    (told / name).write_text(content)
    assert "a_20250101_000000" in shown()
    assert json.loads(shown(json=True))["name"] == "a_20250101_000000"


def test_a_broken_one_says_what_is_wrong_and_what_its_checkpoint_is_good_for(shown: Any, told: Path) -> None:
    (told / "experiment_info.json").write_text("")
    page = shown()
    assert "experiment_info.json is empty; it cannot be resumed, its checkpoint still generates" in page
    assert f"generate --checkpoint {told}/checkpoints/best" in page


def test_a_running_one_says_how_long_it_takes_yet(shown: Any, told: Path, hold_lock: Any) -> None:
    """5 steps of 24 images are left, at 16 a second: 7.5 s, which rounds to 8."""
    with hold_lock(told):
        page = shown()
    assert "it is training; about 8 s left" in page
    assert "it ended by" not in page


def test_a_finished_one_gives_the_command_that_generates(shown: Any, make_experiment: Any) -> None:
    path = make_experiment("a_20250101_000000", steps=(5,), best=(5, 0.25))
    assert f"python -m m2d generate --checkpoint {path}/checkpoints/best\n" in shown()


IN_A_COPY = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_4711"


@pytest.mark.parametrize(
    ("recorded", "cwd", "resumes"),
    [
        ("jobs/train.py --name a --fresh", None, "python jobs/train.py --name a"),
        ("jobs/train.py --fresh --name a", None, "python jobs/train.py --name a"),
        ("jobs/train.py --fresh=true --name a", None, "python jobs/train.py --name a"),
        ("jobs/train.py --fresh true --name a", None, "python jobs/train.py --name a"),
        ("/venv/bin/m2d train --data_root '/my data'", None, "m2d train --data_root '/my data'"),
        ("/code/m2d/__main__.py train --name a", None, "python -m m2d train --name a"),
        ("jobs/train.py --name a", "/my code", "cd '/my code' && python jobs/train.py --name a"),
        ("jobs/train.py --name a", IN_A_COPY, "ray job submit --working-dir . -- python jobs/train.py --name a"),
    ],
)
def test_the_command_to_resume_runs_as_it_is_and_never_starts_over(
    root: Path, make_experiment: Any, recorded: str, cwd: str | None, resumes: str
) -> None:
    make_experiment("a_20250101_000000", "failed", steps=(5,), command=recorded, cwd=cwd)
    assert resume_command(find_records(str(root))[0]) == resumes


def test_the_command_is_one_that_the_command_line_takes(root: Path, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000", "failed", command="jobs/train.py --preset demo --fresh --data_root '/my data'")
    words = shlex.split(str(resume_command(find_records(str(root))[0])))
    assert words[:2] == ["python", "jobs/train.py"]
    config = parse("train", words[2:])
    assert (config.data_root, config.fresh) == ("/my data", False)


def test_an_older_unfinished_one_is_not_what_its_command_goes_on_with(root: Path, make_experiment: Any) -> None:
    make_experiment("a_20250101_000000", "failed", steps=(5,))
    make_experiment("a_20250102_000000", "failed")
    make_experiment("a_20250103_000000", "done")
    make_experiment("b_20250104_000000", "failed")
    records = find_records(str(root))
    assert "would continue a_20250102_000000" in next_step(records[0], records)[0]
    assert next_step(records[1], records)[1] == "python jobs/train.py --name tiny"
