"""Mean cosines equal those of all pairs, one by one."""

from itertools import product

import numpy as np
import pytest

from m2d.classes import CLASSES, class_index
from m2d.plots.tiles import class_similarities

pytestmark = pytest.mark.filterwarnings("error")
MEL, NV, DF = (class_index(code) for code in ("MEL", "NV", "DF"))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_the_numbers_equal_those_of_all_pairs_by_hand() -> None:
    draw = np.random.default_rng(0)
    members = {MEL: draw.normal(size=(4, 5)), NV: draw.normal(size=(9, 5)) + 1, DF: draw.normal(size=(2, 5)) - 1}
    generated = draw.normal(size=(3, 5))
    centre = np.mean([features.mean(axis=0) for features in members.values()], axis=0)
    found = class_similarities(
        np.concatenate(list(members.values())),
        np.repeat(list(members), [4, 9, 2]),
        generated,
        np.full(3, MEL),
    )["MEL"]
    real, drawn = {k: v - centre for k, v in members.items()}, generated - centre
    own = [cosine(a, b) for a, b in product(drawn, real[MEL])]
    others = [np.mean([cosine(a, b) for a, b in product(drawn, real[k])]) for k in (NV, DF)]
    pairs = [cosine(real[MEL][i], real[MEL][j]) for i, j in product(range(4), range(4)) if i != j]
    real_others = [np.mean([cosine(a, b) for a, b in product(real[MEL], real[k])]) for k in (NV, DF)]
    assert found["generated_to_own"] == pytest.approx(np.mean(own))
    assert found["generated_to_others"] == pytest.approx(np.mean(others))
    assert found["real_to_own"] == pytest.approx(np.mean(pairs))
    assert found["real_to_others"] == pytest.approx(np.mean(real_others))


def test_a_feature_does_not_meet_itself() -> None:
    """Each of two orthogonal features has cosine 0 with the other and 1 with itself, which is left out."""
    real = np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
    numbers = class_similarities(real, np.array([MEL, MEL, NV, NV]), np.zeros((0, 3)), np.zeros(0, int))
    assert numbers["MEL"]["real_to_own"] == pytest.approx(0.0)  # with themselves: 0.5


def test_the_largest_class_is_not_the_centre() -> None:
    real = np.concatenate([np.tile([1.0, 0.1], (98, 1)), np.tile([-1.0, 0.1], (2, 1))])
    numbers = class_similarities(real, np.repeat([NV, MEL], [98, 2]), real[:1], np.array([NV]))
    assert numbers["NV"]["generated_to_own"] == pytest.approx(1.0)
    assert numbers["NV"]["generated_to_others"] == pytest.approx(-1.0)


def test_numbers_that_cannot_be_had_are_left_out() -> None:
    real, labels = np.array([[1.0, 0], [0, 1], [0, 2]]), np.array([MEL, NV, NV])
    numbers = class_similarities(real, labels, np.array([[1.0, 1]]), np.array([DF]))
    assert list(numbers) == list(CLASSES)
    assert set(numbers["MEL"]) == {"real_to_others"}  # one image alone has no other of its own
    assert set(numbers["DF"]) == {"generated_to_others"}
    assert numbers["VASC"] == {}


def test_equal_features_have_no_direction() -> None:
    real, labels = np.full((6, 3), 0.1), np.repeat([MEL, NV], 3)
    assert (real[:3].mean(axis=0) != 0.1).all()  # so centring leaves rounding, which points somewhere
    numbers = class_similarities(real, labels, real, labels)
    assert set(numbers["MEL"].values()) == {0.0}


def test_no_real_features_give_no_numbers() -> None:
    numbers = class_similarities(np.zeros((0, 3)), np.zeros(0, int), np.ones((1, 3)), np.array([MEL]))
    assert numbers == {code: {} for code in CLASSES}
