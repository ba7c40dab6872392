"""Off a terminal, progress is a plain line now and then; its speed leaves out what was there at the first report."""

from types import SimpleNamespace

import pytest

from m2d.files import progress as module
from m2d.files.progress import progress


def test_plain_lines_tell_speed_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([100.0, 105.0, 120.0, 150.0, 200.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with progress("features", 10_000, unit="views") as shown:
        shown.show(1000, 10_000)  # was there before
        shown.advance(100)  # too soon for a line
        shown.advance(900)
        shown.advance(3000)
        shown.show(10_000, 10_000)  # the end speaks for itself
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "features: 2,000 of 10,000 views, 50.0 views/s, 2.7 min left",
        "features: 5,000 of 10,000 views, 80.0 views/s, 62 s left",
    ]


@pytest.mark.parametrize("total", [None, 0, 3])
def test_a_terminal_gets_a_bar_unless_there_is_nothing_to_do(
    total: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("scan [x]", total, stderr=False) as shown:
        if total is None:
            shown.show(3, 3)
        elif total:
            shown.advance(3)
    assert ("scan [x]" in capsys.readouterr().out) == (total != 0)


def test_the_terminal_of_a_notebook_which_keeps_every_frame_gets_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("JPY_PARENT_PID", "1")  # as Jupyter's kernels and Colab's have it
    with progress("scan", 3) as shown:
        shown.advance(3)
    assert capsys.readouterr().err == ""
