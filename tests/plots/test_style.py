"""One style for all pictures, and no trace of it elsewhere."""

import contextlib
import io
import threading

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from m2d.classes import CLASSES, DIAGNOSES
from m2d.plots.style import CLASS_EDGES, CLASS_MARKERS, class_colours, drawn, new_figure, percent, png, styled


def contrast_on_white(colour: str) -> float:
    """WCAG 2.1's contrast ratio with white; 3 is its least for graphics."""
    channels = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05))


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_rc_params_are_as_they_were_after_drawing_and_after_an_error(error: type[Exception] | None) -> None:
    before = dict(matplotlib.rcParams)
    with contextlib.suppress(RuntimeError), styled():
        assert matplotlib.rcParams["axes.spines.top"] is False
        png(new_figure(1, 1))
        if error:
            raise error
    assert dict(matplotlib.rcParams) == before


def test_two_threads_that_draw_at_once_leave_no_style_behind() -> None:
    """Without the lock the second to enter would save the first's style as the one to restore."""
    before = dict(matplotlib.rcParams)
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with styled():
            first_is_in.set()
            second_is_in.wait(0.3)  # in vain, if the lock holds
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(5)
        with styled():
            second_is_in.set()
            first_is_out.wait(5)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert dict(matplotlib.rcParams) == before


@drawn
def picture() -> Figure:
    figure = new_figure(3, 2)
    figure.subplots().plot([0, 1], [0, 1])
    return figure


def test_a_users_own_settings_do_not_change_the_picture() -> None:
    plain = picture()
    assert Image.open(io.BytesIO(plain)).size == (360, 240)
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "font.size": 30}):
        assert picture() == plain


def test_a_small_share_is_not_told_as_none() -> None:
    assert [percent(share) for share in (0.414, 1.0, 0.0004, 0.0)] == ["41 %", "100 %", "0.04 %", "0 %"]


def test_class_colours_are_those_of_the_diagnoses() -> None:
    assert class_colours() == {diagnosis.code: diagnosis.colour for diagnosis in DIAGNOSES}


def test_every_class_has_a_marker_of_its_own() -> None:
    assert list(CLASS_MARKERS) == list(CLASSES)
    assert len(set(CLASS_MARKERS.values())) == len(CLASSES)


def test_the_yellow_class_has_an_edge_that_is_seen_on_white() -> None:
    assert contrast_on_white(class_colours()["DF"]) < 1.5
    assert contrast_on_white(CLASS_EDGES["DF"]) > 7
