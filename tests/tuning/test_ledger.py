"""The ledger of a sweep: what is known of its trials whenever its driver dies."""

from pathlib import Path

import pytest
from tuning.trial_runs import run_of

from m2d.errors import ExperimentError
from m2d.tuning.ledger import Ledger
from m2d.tuning.settings import SweepConfig
from m2d.tuning.sweep import require_same

FIRST, SECOND = {"optimizer.lr_denoiser": 0.001}, {"optimizer.lr_denoiser": 0.002}


def taken_up(folder: Path) -> Ledger:
    """As the next driver reads it."""
    ledger = Ledger(folder)
    ledger.take_up()
    return ledger


def test_what_was_written_is_what_the_next_driver_knows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("a", FIRST, 0)
    ledger.begin("b", SECOND, 1)
    ledger.end("a", "stopped", step=12)
    after = taken_up(tmp_path)
    assert [(r.number, r.state, r.step, r.chosen) for r in after.in_state("open", "stopped")] == [
        (0, "stopped", 12, FIRST),
        (1, "open", None, SECOND),
    ]


@pytest.mark.parametrize(("failed", "run", "state"), [(False, "done", "done"), (True, "failed", "open")])
def test_a_run_that_ended_unseen_is_not_repeated_and_a_failed_one_is_tried_again(
    tmp_path: Path, failed: bool, run: str, state: str
) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("a", FIRST, 0)
    if failed:
        ledger.end("a", "failed", error="out of memory")
    run_of(tmp_path, "trial_000", state=run, steps=[4])
    assert [(record.state, record.error) for record in taken_up(tmp_path).records.values()] == [(state, None)]


def test_values_proposed_again_go_on_with_the_trial_that_has_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("a", FIRST, None)
    ledger.begin("b", SECOND, None)
    after = taken_up(tmp_path)
    assert after.begin("c", SECOND, None).number == 1
    assert after.begin("d", SECOND, None).number == 2  # the same values once more: a trial of its own
    assert after.begin("c", SECOND, None).number == 1  # Tune starts it again


def test_what_a_stopped_trial_still_wrote_while_it_died_does_not_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin("a", FIRST, 0)
    run_of(tmp_path, "trial_000", state="running", steps=[4, 8, 12])
    ledger.end("a", "stopped", step=8)
    assert [row["step"] for row in ledger.rows(ledger.of("a"))] == [4, 8]


def test_a_damaged_ledger_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text("[{")
    with pytest.raises(ExperimentError, match=r"trials\.json is damaged"):
        Ledger(tmp_path)


def test_settings_that_a_power_cut_emptied_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch()
    with pytest.raises(ExperimentError, match=r"sweep\.yaml is empty or damaged"):
        require_same(tmp_path, SweepConfig())
