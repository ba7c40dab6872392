"""A sweep's settings, the values that its trials take, and the runs that they become."""

import dataclasses

import pytest

from m2d.cli import parse
from m2d.errors import ConfigError
from m2d.training.settings import RayConfig, TrainConfig, as_dict
from m2d.tuning.ledger import WORST, objective
from m2d.tuning.settings import SweepConfig, SweepSettings, parse_distribution
from m2d.tuning.sweep import concurrent_trials, planned, trial_cpus


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("loguniform(0.1, 10)", "loguniform", (0.1, 10.0)),
        (" Uniform( -1 ,1 ) ", "uniform", (-1.0, 1.0)),
        ("choice(1e-4, 1e-3, 1e-2)", "choice", (1e-4, 1e-3, 1e-2)),
        ("fixed(3)", "fixed", (3.0,)),
    ],
)
def test_a_range_is_read_as_it_is_written(text: str, kind: str, numbers: tuple[float, ...]) -> None:
    found = parse_distribution("lr", text)
    assert (found.kind, found.numbers) == (kind, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "0.1..10", "normal(0, 1)", "uniform(a, b)", "uniform()", "uniform(0, inf)", "uniform(2, 1)", "uniform(1, 2, 3)",
        "loguniform(0, 1)", "fixed(1, 2)",
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_the_settings_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.space: optimizer\.lr is .*; it must be loguniform"):
        parse_distribution("optimizer.lr", text)


@pytest.mark.parametrize(
    ("text", "logarithmic"),
    [("loguniform(1, 2)", True), ("uniform(1, 1000)", False), ("choice(1, 1000)", True), ("choice(1, 2)", False)],
)
def test_an_axis_is_logarithmic_where_values_span_decades(text: str, logarithmic: bool) -> None:
    assert parse_distribution("lr", text).is_logarithmic is logarithmic


def config(*flags: str) -> SweepConfig:
    found: SweepConfig = parse("tune", ["--preset", "demo", *flags])
    return found


def test_flags_of_training_and_of_the_sweep_go_together() -> None:
    found = config("--num_trials", "6", "--search", "optuna", "--max_steps", "50", "--batch_size", "4")
    assert (found.num_trials, found.search, found.max_steps, found.batch_size) == (6, "optuna", 50, 4)
    assert found.data.image_size == 48  # the preset's
    assert set(found.sweep.space) == {
        "loss_weights.diffusion", "loss_weights.reconstruction", "loss_weights.alignment", "loss_weights.perceptual",
        "optimizer.lr_autoencoder", "optimizer.lr_denoiser",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep.space", "{loss_weights.difuse: 'uniform(0, 1)'}"], "names loss_weights.difuse, which is no setting"),
        (["--sweep.space", "{name: 'choice(1, 2)'}"], "names name, which is no number"),
        (["--search", "grid"], "which no grid can hold"),
        (["--num_trials", "0"], "num_trials is 0"),
        (["--num_workers", "0"], "num_workers is 0; a trial trains with"),
        (["--resume", "--fresh"], "contradict each other"),
        (["--sweep.grace_reports", "20"], "more than sweep.reports"),
        (["--sweep.reduction_factor", "1"], "must be above 1"),
        (["--experiments_dir", "s3://bucket/x"], "experiments_dir is a URI"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*flags)


def test_a_trial_is_the_sweeps_run_with_the_chosen_values() -> None:
    whole = config("--max_steps", "100", "--sweep.reports", "5")
    trial = whole.trial({"loss_weights.diffusion": 0.25, "batch_size": 4.0}, name="trial_1", folder="somewhere")
    plain = as_dict(whole.training({}))
    changed = {key for key, value in as_dict(trial).items() if value != plain[key]}
    assert type(trial) is TrainConfig
    assert changed == {"name", "experiments_dir", "wandb_group", "saving", "telemetry", "loss_weights", "batch_size"}
    assert trial.loss_weights == dataclasses.replace(whole.loss_weights, diffusion=0.25)
    assert trial.batch_size == 4
    assert (trial.saving.every_steps, trial.saving.validation_samples) == (20, 70)  # not the preset's 200 steps


@pytest.mark.parametrize(
    ("steps", "reports", "every", "judged"),
    [(100, 5, 20, 5), (100, 7, 15, 7), (100, 6, 17, 6), (3, 10, 1, 3)],
)
def test_a_trial_is_judged_evenly_and_no_more_often_than_asked_for(
    steps: int, reports: int, every: int, judged: int
) -> None:
    whole = SweepConfig(max_steps=steps, sweep=SweepSettings(reports=reports, grace_reports=1))
    assert whole.trial({}, name="trial_1", folder="x").saving.every_steps == every
    assert whole.reports == judged


def test_a_trial_measured_in_epochs_is_judged_after_each() -> None:
    whole = SweepConfig(epochs=30)
    assert whole.trial({}, name="trial_1", folder="x").saving.every_steps is None
    assert whole.reports == 30


def test_a_searched_setting_of_saving_or_telemetry_reaches_the_trial() -> None:
    assert SweepConfig().trial({"telemetry.sample_steps": 7.0}, name="t", folder="x").telemetry.sample_steps == 7


@pytest.mark.parametrize(
    ("measures", "worth"),
    [
        ({"val/kernel_distance": 0.5, "val/psnr_db": 20.0}, 1.5),  # 20 dB is an error of 0.1
        ({"val/kernel_distance": 0.5, "val/psnr_db": 20.0, "loss/diffusion": 9.0}, 1.5),
        ({}, WORST),
        ({"val/psnr_db": 30.0}, WORST),
        ({"val/kernel_distance": float("nan"), "val/psnr_db": 1.0}, WORST),
    ],
)
def test_the_objective_is_the_distance_and_the_weighted_error_and_no_loss(
    measures: dict[str, float], worth: float
) -> None:
    assert objective(measures, 10.0) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("nodes", "trials"),
    [
        ([{"CPU": 8}], 3),  # 2.1 CPUs each: one worker, the stream, and a tenth for the driver
        ([{"CPU": 2.1}], 1),
        ([{"CPU": 4.1}], 1),  # not two: the second's driver would hold what a worker waits for
        ([{"CPU": 64, "GPU": 4}], 4),
        ([{"CPU": 0}, {"CPU": 8, "GPU": 1}, {"CPU": 2, "GPU": 4}], 2),  # three of the last one's GPUs lack a CPU
        ([{"CPU": 1000}], 12),  # no more than there are
    ],
)
def test_as_many_trials_as_the_cluster_holds(nodes: list[dict[str, float]], trials: int) -> None:
    whole = SweepConfig(num_workers=1)
    assert trial_cpus(whole) == 2.0
    assert concurrent_trials(whole, nodes) == trials


@pytest.mark.parametrize(
    ("nodes", "trials"),
    [
        ([{"CPU": 4}, {"CPU": 4}], 1),  # one's driver may sit on either
        ([{"CPU": 4}, {"CPU": 4}, {"CPU": 4}], 1),  # not two: their drivers may sit on two of three
        ([{"CPU": 4.2}, {"CPU": 4.2}, {"CPU": 4}], 2),
    ],
)
def test_a_worker_has_its_cpus_on_one_node(nodes: list[dict[str, float]], trials: int) -> None:
    whole = SweepConfig(num_workers=1, ray=RayConfig(cpus_per_worker=4))
    assert concurrent_trials(whole, nodes) == trials


@pytest.mark.parametrize(
    "nodes",
    [
        [{"CPU": 1}],
        [{"CPU": 64, "GPU": 1}],
        [{"CPU": 64}, {"CPU": 1, "GPU": 2}],
        [{"CPU": 1}, {"CPU": 0.6}, {"CPU": 3}],  # enough CPUs, were it not for the driver on the wrong node
    ],
)
def test_a_cluster_that_cannot_hold_one_trial_is_told_why(nodes: list[dict[str, float]]) -> None:
    with pytest.raises(ConfigError, match="lower --num_workers"):
        concurrent_trials(SweepConfig(num_workers=2, ray=RayConfig(cpus_per_worker=1.5)), nodes)


def test_more_trials_at_once_than_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sweep.max_concurrent is 4, and the cluster can hold 1"):
        concurrent_trials(SweepConfig(num_workers=1, sweep=SweepSettings(max_concurrent=4)), [{"CPU": 3}])


GRID = "{batch_size: 'choice(4, 8, 16)', loss_weights.diffusion: 'choice(0.5, 1)', optimizer.lr_denoiser: 'fixed(0.1)'}"
RANGES = (
    "{optimizer.lr_denoiser: 'loguniform(1e-5, 1e-2)', loss_weights.diffusion: 'uniform(1, 2)', "
    "batch_size: 'choice(4, 8)'}"
)


def test_a_grid_holds_every_combination_once() -> None:
    grid = config("--search", "grid", "--sweep.space", GRID)
    trials = [tuple(trial.values()) for trial in planned(grid)]
    assert grid.count == 6
    assert sorted(trials) == [(b, w, 0.1) for b in (4.0, 8.0, 16.0) for w in (0.5, 1.0)]


def test_more_trials_continue_where_fewer_ended_and_another_seed_is_another_search() -> None:
    few, many = config("--num_trials", "4"), config("--num_trials", "7")
    assert planned(many)[:4] == planned(few) != planned(config("--num_trials", "4", "--sweep.seed", "1"))
    assert len({trial["optimizer.lr_denoiser"] for trial in planned(many)}) == 7


def test_values_lie_where_they_may() -> None:
    trials = planned(config("--num_trials", "200", "--sweep.space", RANGES))
    rates = sorted(trial["optimizer.lr_denoiser"] for trial in trials)
    assert 1e-5 <= rates[0] < rates[-1] <= 1e-2
    assert 1e-4 < rates[100] < 1e-3  # the middle of three decades, not of the range
    assert all(1 <= trial["loss_weights.diffusion"] <= 2 for trial in trials)
    assert {trial["batch_size"] for trial in trials} == {4.0, 8.0}
