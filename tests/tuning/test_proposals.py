"""The values that trials take before anything is known of them."""

from m2d.cli import parse
from m2d.tuning.settings import SweepConfig
from m2d.tuning.sweep import planned

GRID = "{batch_size: 'choice(4, 8, 16)', loss_weights.diffusion: 'choice(0.5, 1)', optimizer.lr_denoiser: 'fixed(0.1)'}"
RANGES = (
    "{optimizer.lr_denoiser: 'loguniform(1e-5, 1e-2)', loss_weights.diffusion: 'uniform(1, 2)', "
    "batch_size: 'choice(4, 8)'}"
)


def config(*flags: str) -> SweepConfig:
    found: SweepConfig = parse("tune", ["--preset", "demo", *flags])
    return found


def test_a_grid_holds_every_combination_once() -> None:
    grid = config("--search", "grid", "--sweep.space", GRID)
    trials = [tuple(trial.values()) for trial in planned(grid)]
    assert grid.count == 6
    assert sorted(trials) == [(b, w, 0.1) for b in (4.0, 8.0, 16.0) for w in (0.5, 1.0)]


def test_more_trials_go_on_where_fewer_ended() -> None:
    few, many = config("--num_trials", "4"), config("--num_trials", "7")
    assert planned(many)[:4] == planned(few)
    assert len({trial["optimizer.lr_denoiser"] for trial in planned(many)}) == 7


def test_another_seed_is_another_search() -> None:
    assert planned(config("--sweep.seed", "1")) != planned(config())


def test_values_lie_where_they_may() -> None:
    trials = planned(config("--num_trials", "200", "--sweep.space", RANGES))
    rates = sorted(trial["optimizer.lr_denoiser"] for trial in trials)
    assert 1e-5 <= rates[0] < rates[-1] <= 1e-2
    assert 1e-4 < rates[100] < 1e-3  # the middle of three decades, not of the range
    assert all(1 <= trial["loss_weights.diffusion"] <= 2 for trial in trials)
    assert {trial["batch_size"] for trial in trials} == {4.0, 8.0}
