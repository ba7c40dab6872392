"""Generated images of the class that was asked for agree, others do not, and the ceiling stands beside it."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_sets import clouds

from m2d.classes import ISIC7
from m2d.evaluation.classifiers.probe import ConsistencyResult, measure_consistency
from m2d.evaluation.images import FeatureSet

BKL, MEL, NV = (ISIC7.index(code) for code in ("BKL", "MEL", "NV"))


def features(name: str, counts: dict[int, int], seed: int, distance: float = 8.0) -> FeatureSet:
    return clouds(name, counts, seed, distance=distance, scales=np.ones(10))


TRAIN = features("train", {MEL: 30, NV: 90, BKL: 40}, 0)
TEST = features("test", {MEL: 20, NV: 60, BKL: 30}, 1)


def measure(generated: FeatureSet, train: FeatureSet = TRAIN, test: FeatureSet = TEST) -> ConsistencyResult:
    return measure_consistency(train=train, test=test, generated=generated, c=0.1, resamples=200, seed=0)


def test_images_of_their_class_agree() -> None:
    result = measure(features("generated", {MEL: 40, NV: 40}, 2))
    assert {code: estimate.value for code, estimate in result.agreement.items()} == {"MEL": 1.0, "NV": 1.0}
    assert result.mean_agreement is not None
    assert result.mean_agreement.value == 1.0


def test_images_of_another_class_stand_in_its_column() -> None:
    """Asked for melanoma, made nevi."""
    generated = features("generated", {NV: 40}, 2)
    generated = replace(generated, labels=np.full(40, MEL))
    result = measure(generated)
    assert (result.confusion[MEL][NV], sum(map(sum, result.confusion))) == (40, 40)
    assert result.agreement["MEL"].value == 0.0


def test_the_ceiling_is_the_recall_of_unseen_real_images() -> None:
    """Of classes that lie close, real images are not all recognised either."""
    near = [features(name, {MEL: 200, NV: 200}, seed, distance=1.0) for name, seed in (("train", 0), ("test", 1))]
    result = measure(features("generated", {MEL: 200, NV: 200}, 2, distance=1.0), *near)
    # Two unit Gaussians sqrt(2) apart: the best recall is Phi(sqrt(2) / 2) = 0.760.
    assert result.recall_of_real["MEL"].value == pytest.approx(0.760, abs=0.07)
    assert result.agreement["MEL"].value == pytest.approx(0.760, abs=0.07)


def test_an_agreement_of_all_is_no_certainty() -> None:
    """The score interval of 20 of 20 begins at 20 / (20 + z^2)."""
    estimate = measure(features("generated", {MEL: 20, NV: 20}, 2)).agreement["MEL"]
    assert (estimate.low, estimate.high) == pytest.approx((20 / (20 + 1.959964**2), 1.0), abs=1e-6)


def test_a_class_without_generated_or_test_images_says_why() -> None:
    result = measure(features("generated", {BKL: 20, NV: 20}, 2), test=features("test", {MEL: 20, NV: 60}, 1))
    assert set(result.left_out) == {"BKL", "MEL"}
    assert set(result.agreement) == {"BKL", "NV"}
    assert set(result.recall_of_real) == {"MEL", "NV"}


def test_without_a_class_in_common_there_is_no_mean() -> None:
    result = measure(features("generated", {BKL: 20}, 2), test=features("test", {MEL: 20, NV: 60}, 1))
    assert (result.mean_agreement, result.mean_recall_of_real) == (None, None)
