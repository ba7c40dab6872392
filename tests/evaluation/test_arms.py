"""Each arm holds the images that its name says, and none that it must not."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_sample_weight
from tiny_sets import image_set

from m2d.classes import class_index
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import limits, scored_classes, training_rows, unscored

DF, MEL, NV, VASC = (class_index(code) for code in ("DF", "MEL", "NV", "VASC"))
REAL = np.array([NV] * 20 + [MEL] * 6 + [DF] * 3)
GENERATED = np.array([MEL] * 14 + [DF] * 40)


@pytest.mark.parametrize(("arm", "real", "generated"), [("a", 29, 0), ("d", 29, 54), ("e", 0, 54)])
def test_arms_a_d_and_e_hold_every_image_of_their_kinds_once(arm: str, real: int, generated: int) -> None:
    rows = training_rows(arm, REAL, GENERATED, seed=0)
    assert (rows.real.tolist(), rows.generated.tolist()) == (list(range(real)), list(range(generated)))
    assert set(rows.weights) == {1.0}


def test_arm_b_weighs_as_scikit_learns_balanced_weights() -> None:
    rows = training_rows("b", REAL, GENERATED, seed=0)
    assert np.array_equal(rows.real, np.arange(29))
    assert rows.weights == pytest.approx(compute_sample_weight("balanced", REAL), rel=1e-12)


@pytest.mark.parametrize("ratio", [None, 0.5, 1, 2, 5, 10])
def test_arm_c_has_the_class_counts_of_arm_d(ratio: float | None) -> None:
    control, added = (training_rows(arm, REAL, GENERATED, ratio=ratio, seed=3) for arm in "cd")
    counts = [np.bincount(rows.labels(REAL, GENERATED), minlength=7).tolist() for rows in (control, added)]
    assert counts[0] == counts[1]
    assert not len(control.generated)


def test_arm_c_repeats_the_images_of_a_class_equally_often() -> None:
    """14 more images of 6 melanomas: each stands 3 or 4 times."""
    repeats = np.bincount(training_rows("c", REAL, GENERATED, seed=0).real)[REAL == MEL]
    assert sorted(repeats) == [3, 3, 3, 3, 4, 4]


def test_a_ratio_counts_against_the_real_images_of_each_class() -> None:
    rows = training_rows("d", REAL, GENERATED, ratio=2, seed=0)
    assert np.bincount(GENERATED[rows.generated], minlength=7)[[DF, MEL, NV]].tolist() == [6, 12, 0]


def test_a_smaller_ratio_takes_a_part_of_a_larger_one() -> None:
    small, large = (set(training_rows("d", REAL, GENERATED, ratio=r, seed=1).generated.tolist()) for r in (1, 5))
    assert small < large


def test_a_ratio_says_where_there_are_too_few_images_for_it() -> None:
    assert limits(REAL, GENERATED, 5) == "MEL 14 of 30, NV 0 of 100"
    assert limits(REAL[20:], GENERATED, 2) is None


def test_the_seed_decides_what_is_drawn() -> None:
    first, again, other = (training_rows("d", REAL, GENERATED, ratio=1, seed=s).generated.tolist() for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_too_few_classes_to_compare_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"too few classes \(MEL\)"):
        scored_classes(image_set([MEL, NV]), image_set([MEL, DF]))


def test_classes_of_one_side_are_left_out_with_the_reason() -> None:
    train, test = image_set([MEL, NV, DF], groups=["1", "2", "3"]), image_set([MEL, NV, VASC], groups=["4", "5", "6"])
    assert scored_classes(train, test) == sorted([MEL, NV])
    reasons = unscored(train, test)
    assert set(reasons) == {"DF", "VASC"}
    assert "no test image" in reasons["DF"]
    assert "no real training image" in reasons["VASC"]
