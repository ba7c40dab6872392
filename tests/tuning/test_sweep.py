"""A sweep on Ray: trials are stopped early and free their CPUs; a killed driver costs no finished trial."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import descendants, end_all
from ray.tune.experiment import Trial
from tiny_run import TINY, write_images
from tuning.trial_runs import run_of

from m2d.cli import parse
from m2d.errors import ConfigError, ExperimentError, Incomplete
from m2d.experiment import list_experiments
from m2d.tuning.ledger import Ledger, TrialRecord
from m2d.tuning.settings import SweepConfig
from m2d.tuning.sweep import held, in_own_words, optuna_search, require_same, sweep, trial_scheduler, write_settings

ROOT = Path(__file__).parents[2]
SPACE = "{loss_weights.diffusion: 'loguniform(0.1, 10)', optimizer.lr_denoiser: 'loguniform(1e-5, 1e-2)'}"
DEADLINE_S = 900.0  # for a whole sweep on a machine that does much else
# Runs the command in a cluster of its own, and says whether all of its CPUs are free in the end.
PROGRAM = """
import sys, time, ray
from m2d.cli import main
from m2d.cluster.start import ray_cluster
with ray_cluster(min_cpus=3):
    main("tune", sys.argv[1:])
    deadline = time.monotonic() + 180
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            sys.exit(f"not free: {ray.available_resources()} of {ray.cluster_resources()}")
        time.sleep(0.5)
    print("all CPUs are free")
"""


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


def flags_of(data_root: Path, root: Path, *more: str) -> list[str]:
    places = ["--data_root", str(data_root), "--experiments_dir", str(root), "--cache_dir", str(root / "cache")]
    judged = ["--sweep.reports", "4", "--sweep.grace_reports", "1", "--sweep.reduction_factor", "2"]
    small = ["--max_steps", "8", "--sweep.samples", "7", "--telemetry.sample_steps", "2", "--sweep.space", SPACE]
    return [*places, *TINY, *judged, *small, "--num_workers", "1", "--name", "s", *more]


def config_of(data_root: Path, root: Path, *more: str) -> SweepConfig:
    found: SweepConfig = parse("tune", flags_of(data_root, root, *more))
    return found


def test_fresh_moves_no_sweep_away_that_runs(data_root: Path, tmp_path: Path) -> None:
    config = config_of(data_root, tmp_path, "--fresh")
    folder = tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    write_settings(folder, config)
    with held(folder), pytest.raises(ExperimentError, match="another process"):
        sweep(config)
    assert [path.name for path in folder.parent.iterdir()] == ["s"]


class Driver:
    """A sweep in a process of its own, with a Ray cluster of its own."""

    def __init__(self, flags: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *flags],
                env=environment, stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL, as a machine's memory killer does. Its Ray follows it; what does not is ended by id."""
        children = descendants(of=self.process.pid)
        self.process.kill()
        self.process.wait()
        end_all(children, patience_s=20)

    def press_ctrl_c(self) -> int:
        """As a terminal does it: the sweep and all that it started hear of it. The exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=DEADLINE_S)

    def finish(self) -> str:
        """Wait for its end; what it said."""
        code = self.process.wait(timeout=DEADLINE_S)
        said = self.log.read_text()
        assert code == 0, said[-3000:]
        return said


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """For a driver's Ray: its own directory, with a path that a socket's may begin with."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r", ignore_cleanup_errors=True) as short:
        unwanted = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        kept = {name: value for name, value in os.environ.items() if name not in unwanted}
        yield kept | {
            "RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
        }  # fmt: skip


def wait_for_ended_trials(folder: Path, driver: Driver, count: int) -> None:
    """Until so many trials have ended and another one is under way, with a checkpoint or without."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert driver.process.poll() is None, driver.log.read_text()[-3000:]
        ledger = Ledger(folder)
        if len(ledger.in_state("done", "stopped")) >= count and any(map(ledger.experiment, ledger.in_state("open"))):
            return
        time.sleep(0.2)
    raise AssertionError(driver.log.read_text()[-3000:])


def left_by(folder: Path, record: TrialRecord) -> tuple[TrialRecord, dict[str, str]]:
    """What must not change of a trial that has ended: its record, and every number that it wrote."""
    ledger = Ledger(folder)
    experiment = ledger.experiment(record)
    assert experiment is not None
    rows = ledger.rows(record)
    files = {"name": experiment.name, "config": (experiment.path / "configs" / "config.yaml").read_text()}
    now = ledger.records[record.number]
    return TrialRecord(now.number, now.chosen, now.state, now.step, now.error), files | {"rows": json.dumps(rows)}


@pytest.mark.processes
@pytest.mark.exhaustive
@pytest.mark.timeout(DEADLINE_S)
def test_a_trial_that_lags_is_stopped_and_frees_its_cpus(
    ray_cluster: None, environment: dict[str, str], data_root: Path, tmp_path: Path
) -> None:
    """Beside another cluster (the tests' own), where Ray Train alone would never free them. The rate leaves nothing."""
    space = "{optimizer.lr_autoencoder: 'choice(0.001, 1000000)'}"
    grid = ["--search", "grid", "--sweep.space", space, "--max_steps", "4", "--sweep.reports", "2"]
    said = Driver(flags_of(data_root, tmp_path, *grid), environment, tmp_path / "log").finish()
    assert "all CPUs are free" in said
    folder = tmp_path / "sweeps" / "s"
    assert {number: record.state for number, record in Ledger(folder).records.items()} == {0: "done", 1: "stopped"}
    best = parse("train", ["--config", str(folder / "best.yaml")])
    assert best.optimizer.lr_autoencoder == 0.001
    assert best.data_root == str(data_root)
    results = json.loads((folder / "results.json").read_text())
    assert [(result["step"], result["finished"]) for result in results] == [(4, True), (2, False)]


RANDOM = ["--num_trials", "6", "--sweep.max_concurrent", "1"]
GRID = ["--search", "grid", "--sweep.space", "{loss_weights.diffusion: 'choice(0.5, 1.0, 2.0)'}"]


@pytest.mark.processes
@pytest.mark.exhaustive
@pytest.mark.timeout(2 * DEADLINE_S)
@pytest.mark.parametrize(("how", "search", "trials"), [("kill", RANDOM, 6), ("Ctrl-C", GRID, 3)])
def test_an_interrupted_sweep_resumes_with_what_is_left_and_its_best_trains(
    ray_cluster: None, environment: dict[str, str], data_root: Path, tmp_path: Path, how: str, search: list[str],
    trials: int,
) -> None:  # fmt: skip
    """Where one trial at a time fits, one that was stopped and kept its CPUs would keep the next ones from starting."""
    flags, folder = flags_of(data_root, tmp_path, *search), tmp_path / "sweeps" / "s"
    first = Driver(flags, environment, tmp_path / "first.log")
    try:
        wait_for_ended_trials(folder, first, trials // 3)
        if how == "Ctrl-C":
            assert first.press_ctrl_c() == 130
    finally:
        first.kill()
    said = first.log.read_text()
    if how == "Ctrl-C":
        assert said.endswith("interrupted; run the same command again to resume\n")
        assert "Traceback" not in said
        assert "Tuner.restore" not in said
    ended = Ledger(folder).in_state("done", "stopped")
    assert trials // 3 <= len(ended) < trials
    before = [left_by(folder, record) for record in ended]

    said = Driver([*flags, "--resume"], environment, tmp_path / "second.log").finish()
    assert f"{trials} trials by" in said
    assert f", {len(ended)} of them ended before" in said
    assert "all CPUs are free" in said
    assert [left_by(folder, record) for record in ended] == before
    ledger = Ledger(folder)
    assert sorted(ledger.records) == list(range(trials))
    assert not ledger.in_state("open", "failed"), said
    assert len(list_experiments(str(folder / "trials"))) == trials  # each trial once
    results = json.loads((folder / "results.json").read_text())
    assert {result["trial"]: result["chosen"] for result in results} == {
        record.name: record.chosen for record in ledger.records.values()
    }
    if how == "Ctrl-C":
        chosen = [record.chosen["loss_weights.diffusion"] for record in ledger.records.values()]
        assert sorted(chosen) == [0.5, 1.0, 2.0]
        return
    assert ledger.in_state("stopped")
    best = [str(ROOT / "jobs" / "train.py"), "--config", str(folder / "best.yaml")]
    trained = subprocess.run(
        [sys.executable, *best], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert [run.info()["state"] for run in list_experiments(str(tmp_path), "s")] == ["done"]


def test_resuming_what_was_never_begun_is_refused(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="there is no sweep"):
        sweep(config_of(data_root, tmp_path, "--resume"))


def begun(config: SweepConfig, root: Path, trials: int) -> Path:
    """A sweep's folder with so many trials that took all their steps."""
    folder = root / "sweeps" / "s"
    folder.mkdir(parents=True)
    write_settings(folder, config)
    ledger = Ledger(folder)
    for number in range(trials):
        chosen = {"loss_weights.diffusion": 1.0 + number, "optimizer.lr_denoiser": 1e-3}
        ledger.begin(str(number), chosen, number)
        run_of(folder, f"trial_{number:03d}", state="done", steps=[4, 8])
        ledger.end(str(number), "done")
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_steps", "9"], r"begun with other settings \(max_steps: 8 -> 9\)"),
        (["--sweep.seed", "3"], r"sweep\.seed: 0 -> 3"),
        (["--num_trials", "2"], "num_trials is 2, and the sweep .* has begun 3 trials already; give at least 3"),
    ],
)
def test_a_resumption_that_would_be_another_sweep_is_refused(
    data_root: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    begun(config_of(data_root, tmp_path), tmp_path, 3)
    with pytest.raises((ConfigError, ExperimentError), match=message):
        sweep(config_of(data_root, tmp_path, "--resume", *more))


def test_a_setting_of_sweeps_that_a_newer_m2d_added_is_no_difference(data_root: Path, tmp_path: Path) -> None:
    config = config_of(data_root, tmp_path)
    path = begun(config, tmp_path, 3) / "sweep.yaml"
    old = yaml.safe_load(path.read_text())
    del old["sweep"]["reconstruction_weight"], old["sweep"]["max_concurrent"], old["optimizer"]["weight_decay"]
    path.write_text(yaml.safe_dump(old))
    require_same(path.parent, config)


def test_a_sweep_that_never_began_a_trial_may_be_repeated_with_other_settings(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(config_of(data_root, tmp_path), tmp_path, 0)
    monkeypatch.setattr("m2d.tuning.sweep._run", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):  # for no trial ended
        sweep(config_of(data_root, tmp_path, "--max_steps", "9"))
    assert "max_steps: 9" in (folder / "sweep.yaml").read_text()


def test_a_sweep_whose_trials_have_all_ended_is_told_again_without_ray(data_root: Path, tmp_path: Path) -> None:
    config = config_of(data_root, tmp_path, "--num_trials", "3")
    folder = begun(config, tmp_path, 3)
    outcome = sweep(config_of(data_root, tmp_path, "--num_trials", "3", "--resume", "--sweep.max_concurrent", "2"))
    assert [trial.finished for trial in outcome] == [True] * 3
    assert (folder / "best.yaml").is_file()


def test_a_sweep_with_a_failed_trial_has_its_table_and_no_success(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data_root, tmp_path, "--num_trials", "3")
    folder = begun(config, tmp_path, 2)

    def fails(config: SweepConfig, folder: Path, ledger: Ledger, console: object) -> None:
        ledger.begin("2", {"loss_weights.diffusion": 3.0, "optimizer.lr_denoiser": 1e-3}, 2)
        ledger.end("2", "failed", error="no memory")

    monkeypatch.setattr("m2d.tuning.sweep._run", fails)
    with pytest.raises(Incomplete, match=r"1 of 3 trials failed \(trial_002: no memory\)"):
        sweep(config)
    assert (folder / "best.yaml").is_file()


def test_an_interruption_is_told_in_the_sweeps_words(capsys: pytest.CaptureFixture[str]) -> None:
    """The messages are Tune's (ray 2.60, tune/tune.py)."""

    def is_shown(message: str) -> bool:
        return in_own_words(logging.makeLogRecord({"msg": message}))

    assert not is_shown("Stop signal received (e.g. via SIGINT/Ctrl+C), ending Ray Tune run. ")
    assert not is_shown("Experiment has been interrupted, but the most recent state was saved.\nResume with: x")
    assert is_shown("something else")
    assert capsys.readouterr().out == "ending the trials that run; Ctrl-C again ends at once\n"


def answers(config: SweepConfig, worth: dict[str, list[float]], objectives: list[float]) -> list[str]:
    """What the scheduler says to each report of a new trial."""
    scheduler, trial, nobody = trial_scheduler(config, worth), Trial("new", stub=True, trial_id="new"), None
    asked: Any = scheduler
    asked.on_trial_add(nobody, trial)
    return [
        asked.on_trial_result(nobody, trial, {"report": report, "objective": objective})
        for report, objective in enumerate(objectives, start=1)
    ]


def test_asha_knows_after_a_resumption_what_ended_before_it(data_root: Path, tmp_path: Path) -> None:
    config = config_of(data_root, tmp_path)
    assert answers(config, {}, [9.0]) == ["CONTINUE"]
    assert answers(config, {"trial_000": [1.0, 1.0, 1.0, 1.0]}, [9.0]) == ["STOP"]


def test_a_trial_is_not_stopped_at_its_last_report(data_root: Path, tmp_path: Path) -> None:
    past = {"trial_000": [2.0, 2.0, 2.0, 2.0]}
    assert answers(config_of(data_root, tmp_path), past, [1.0, 1.0, 1.0, 9.0]) == ["CONTINUE"] * 4


def test_optuna_begins_with_the_trials_that_are_left(data_root: Path, tmp_path: Path) -> None:
    chosen = {"loss_weights.diffusion": 0.3, "optimizer.lr_denoiser": 0.0021}
    search = optuna_search(config_of(data_root, tmp_path), [], [TrialRecord(0, chosen)], at_once=2)
    assert search.suggest("a") == chosen
    other = search.suggest("b")
    assert other != chosen
    assert search.suggest("c") is None  # two at a time


def test_optuna_proposes_near_what_was_good_before(data_root: Path, tmp_path: Path) -> None:
    config = config_of(data_root, tmp_path, "--sweep.space", "{loss_weights.diffusion: 'uniform(0, 1)'}")
    known = [(TrialRecord(k, {"loss_weights.diffusion": k / 40}), abs(k / 40 - 0.8)) for k in range(40)]
    search = optuna_search(config, known, [], at_once=20)
    proposed = [search.suggest(str(k))["loss_weights.diffusion"] for k in range(20)]  # type: ignore[index]
    assert sum(abs(value - 0.8) < 0.2 for value in proposed) > 14  # 8 by chance
