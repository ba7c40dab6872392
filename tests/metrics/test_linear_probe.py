"""The probe finds what is there, finds nothing where nothing is, and holds lesions together when it chooses c."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from m2d.metrics import linear_probe
from m2d.metrics.linear_probe import C_GRID, LinearProbe, choose_c


def clouds(seed: int, images: int, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 12] of seven classes as Gaussian clouds about corners `distance` away, on scales of their own."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(7, size=images)
    features = generator.normal(size=(images, 12)) + distance * np.eye(7, 12)[labels]
    return (features * np.logspace(-2, 2, 12) + 5).astype(np.float32), labels


def test_separable_classes_are_told_apart_on_new_images() -> None:
    probe = LinearProbe.fit(*clouds(0, 700, distance=12), c=0.1)
    features, labels = clouds(1, 700, distance=12)
    assert balanced_accuracy_score(labels, probe.predict(features)) == 1.0


def test_shuffled_labels_give_chance() -> None:
    features, labels = clouds(0, 4000, distance=12)
    labels = np.random.default_rng(5).permutation(labels)
    probe = LinearProbe.fit(features[:2000], labels[:2000], c=0.1)
    assert balanced_accuracy_score(labels[2000:], probe.predict(features[2000:])) == pytest.approx(1 / 7, abs=0.04)


def test_it_is_scikit_learns_balanced_logistic_regression_on_standardised_features() -> None:
    features, labels = clouds(0, 400, distance=1.5)
    kept = np.flatnonzero((labels != 3) | (np.arange(400) % 8 == 0))  # a rare class
    features, labels = features[kept].astype(np.float64), labels[kept]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=5000))
    model.fit(features, labels)
    fresh, _ = clouds(1, 400, distance=1.5)
    expected = model.predict(fresh.astype(np.float64))
    assert (LinearProbe.fit(features, labels, c=0.01).predict(fresh.astype(np.float64)) == expected).all()


def test_a_feature_that_never_changes_does_no_harm() -> None:
    features, labels = clouds(0, 700, distance=12)
    features[:, 11] = np.where(labels == 3, 0.3, np.nextafter(np.float32(0.3), np.float32(1)))  # but for rounding
    probe = LinearProbe.fit(features, labels, c=0.1)
    fresh, truth = clouds(1, 700, distance=12)  # there it changes
    assert balanced_accuracy_score(truth, probe.predict(fresh)) == 1.0


def test_a_fit_that_stops_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clouds(0, 300, distance=1)
    assert LinearProbe.fit(features, labels, c=1.0).converged
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 2)
    stopped = LinearProbe.fit(features, labels, c=1.0)
    assert (stopped.converged, stopped.iterations) == (False, 2)


def test_photographs_of_one_lesion_never_choose_c_for_each_other() -> None:
    """Labels are noise, each lesion has four photographs alike: only folds that cut a lesion in two beat chance."""
    generator = np.random.default_rng(0)
    lesions = np.arange(600) // 4
    labels = generator.integers(3, size=150)[lesions]
    features = (generator.normal(size=(150, 200))[lesions] + 0.01 * generator.normal(size=(600, 200))).astype(
        np.float32
    )
    _, tried = choose_c(features, labels, lesions, num_classes=7, seed=0)
    assert tuple(tried) == C_GRID
    assert max(tried.values()) == pytest.approx(1 / 3, abs=0.12)


def test_c_is_judged_by_what_held_out_lesions_say() -> None:
    """Of many noisy features a strong penalty makes the better probe."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=240)
    features = generator.normal(size=(240, 400)).astype(np.float32)
    features += 0.15 * (2 * labels[:, None] - 1)
    best, tried = choose_c(features, labels, np.arange(240), num_classes=7, seed=0)
    assert tried[best] == max(tried.values())
    fresh_labels = generator.integers(2, size=4000)
    fresh = (generator.normal(size=(4000, 400)) + 0.15 * (2 * fresh_labels[:, None] - 1)).astype(np.float32)
    for c, held_out in tried.items():
        on_fresh = balanced_accuracy_score(fresh_labels, LinearProbe.fit(features, labels, c=c).predict(fresh))
        assert held_out == pytest.approx(on_fresh, abs=0.08)


@pytest.mark.parametrize("lesions", [2, 3])
def test_too_few_lesions_leave_c_open(lesions: int) -> None:
    labels = np.arange(lesions) % 2
    found = choose_c(np.eye(lesions, dtype=np.float32), labels, np.arange(lesions), num_classes=7, seed=0)
    assert found == (None, {})
