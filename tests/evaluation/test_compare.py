"""The verdict comes out as it must where the truth is known, for us and against us."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ray import cloudpickle
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from tiny_sets import feature_set, image_set, pairs

from m2d.classes import ISIC7
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import (
    DownstreamResult,
    Job,
    TrainingRows,
    Trials,
    compare_arms,
    limits,
    run_jobs,
    scored_classes,
    training_rows,
    unscored,
)
from m2d.evaluation.classifiers.probe import ProbeClassifier, measure_downstream
from m2d.evaluation.images import FeatureSet

BKL, DF, MEL, NV, VASC = (ISIC7.index(code) for code in ("BKL", "DF", "MEL", "NV", "VASC"))
DIMS = 40
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import tests
clouds = partial(pairs, scales=np.logspace(-1, 1, DIMS))
TRAIN = clouds("train", {NV: 200, MEL: 8, BKL: 8}, 0)
TEST = clouds("test", {NV: 200, MEL: 100, BKL: 100}, 1)
TRUE = clouds("generated", {MEL: 192, BKL: 192}, 2)  # as the real ones are distributed
BALANCED = clouds("train", {NV: 100, MEL: 100, BKL: 100}, 3)


def measure(
    generated: FeatureSet,
    train: FeatureSet = TRAIN,
    test: FeatureSet = TEST,
    c: float | None = 0.1,
    ratios: Sequence[float] = (),
) -> DownstreamResult:
    trials = Trials(seeds=[0, 1, 2], resamples=200, ratios=ratios)
    return measure_downstream(train=train, test=test, generated=generated, c=c, trials=trials)


@pytest.fixture(scope="module")
def helpful() -> DownstreamResult:
    return measure(TRUE, ratios=[0.5, 2, 100])


def test_true_images_of_rare_classes_help(helpful: DownstreamResult) -> None:
    assert helpful.minus_c["balanced_accuracy"].low > 0


def test_the_training_set_again_as_synthetic_equals_oversampling() -> None:
    result = measure(feature_set(image_set(TRAIN.labels, "generated"), TRAIN.cls))
    difference = result.minus_c["balanced_accuracy"]
    assert difference.low <= 0 <= difference.high
    assert difference.value == pytest.approx(0, abs=1e-3)


def test_shuffled_labels_hurt() -> None:
    labels = np.random.default_rng(0).permutation(np.tile([NV, MEL, BKL], 400))
    shuffled = clouds("generated", {NV: 400, MEL: 400, BKL: 400}, 4)
    result = measure(replace(shuffled, labels=labels), train=BALANCED)
    assert result.minus_c["balanced_accuracy"].high < 0


def test_noise_far_from_every_real_image_hurts() -> None:
    generator = np.random.default_rng(0)
    noise = 30 * generator.normal(size=(600, DIMS)) * np.logspace(-1, 1, DIMS)
    result = measure(feature_set(image_set(np.repeat([NV, MEL, BKL], 200), "generated"), noise), train=BALANCED)
    assert result.minus_c["balanced_accuracy"].high < 0


def test_scores_of_every_arm_are_those_of_scikit_learns_classifier(helpful: DownstreamResult) -> None:
    """The same training written out: images repeated, class weights by name, standardised by the real ones."""
    scaler = StandardScaler().fit(TRAIN.cls.astype(np.float64))
    oversampled = training_rows("c", TRAIN.labels, TRUE.labels, seed=0).real
    arms = {
        "a": (TRAIN.cls, TRAIN.labels, None),
        "b": (TRAIN.cls, TRAIN.labels, "balanced"),
        "c": (TRAIN.cls[oversampled], TRAIN.labels[oversampled], None),
        "d": (np.concatenate([TRAIN.cls, TRUE.cls]), np.concatenate([TRAIN.labels, TRUE.labels]), None),
        "e": (TRUE.cls, TRUE.labels, None),
    }
    for arm, (cls, labels, weights) in arms.items():
        model = LogisticRegression(C=0.1, class_weight=weights, max_iter=5000, tol=1e-6)
        model.fit(scaler.transform(cls.astype(np.float64)), labels)
        expected = balanced_accuracy_score(TEST.labels, model.predict(scaler.transform(TEST.cls.astype(np.float64))))
        # Rounding may turn single images; the oversampled ones are the same ones with every seed but for one each.
        assert helpful.arms[arm].scores["balanced_accuracy"].value == pytest.approx(expected, abs=0.006), arm


def test_a_difference_is_that_of_the_arms_scores(helpful: DownstreamResult) -> None:
    for control, minus in (("b", helpful.minus_b), ("c", helpful.minus_c)):
        for name, difference in minus.items():
            expected = helpful.arms["d"].scores[name].value - helpful.arms[control].scores[name].value
            assert difference.value == pytest.approx(expected, abs=1e-12)


def test_arms_are_paired_by_the_same_resamples() -> None:
    """Of nearly equal arms the difference is far more certain than either."""
    result = measure(clouds("generated", {NV: 4}, 5), train=BALANCED)
    width = {key: one["balanced_accuracy"] for key, one in (("d", result.arms["d"].scores), ("d-a", result.minus_c))}
    assert width["d-a"].high - width["d-a"].low < 0.5 * (width["d"].high - width["d"].low)


def test_only_arms_that_draw_are_trained_for_every_seed() -> None:
    result = measure(clouds("generated", {MEL: 11, BKL: 11}, 2))  # 11 of 8: three more of each are drawn by chance
    assert {arm: one.trainings for arm, one in result.arms.items()} == {"a": 1, "b": 1, "c": 3, "d": 1, "e": 1}


class AllOrNone(ProbeClassifier):
    """All right or all wrong, by its seed alone."""

    seeded = True

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        return np.eye(7)[self.test.labels if seed % 2 else (self.test.labels + 1) % 7]


def test_what_the_seeds_draw_widens_the_interval() -> None:
    classifier, images = AllOrNone(TRAIN, TEST, TRUE, 0.1), (TRAIN, TEST, TRUE)

    def interval(*seeds: int) -> tuple[float, float]:
        found = compare_arms(classifier, {}, Trials(seeds=seeds, resamples=200), images=images, notes=[])
        score = found.arms["c"].scores["balanced_accuracy"]
        return score.low, score.high

    assert interval(1, 3) == (1, 1)
    assert interval(1, 2) == (0, 1)


def test_the_sweep_has_a_step_for_each_ratio_up_to_the_images_there_are(helpful: DownstreamResult) -> None:
    assert [(step.ratio, step.added) for step in helpful.ratios] == [
        (0.5, {"BKL": 4, "MEL": 4}),
        (2, {"BKL": 16, "MEL": 16}),
        (100, {"BKL": 192, "MEL": 192}),
    ]
    last = helpful.ratios[2]
    assert last.limited == "BKL 192 of 800, MEL 192 of 800, NV 0 of 20,000"
    assert (last.minus_c, last.synthetic) == (helpful.minus_c, helpful.arms["d"].scores)


def test_c_is_chosen_without_a_look_at_the_test_images() -> None:
    turned = replace(TEST, labels=TEST.labels[::-1].copy())
    chosen, again = (measure(TRUE, test=test, c=None).settings["c"] for test in (TEST, turned))
    assert chosen == again


def test_too_few_lesions_to_choose_c_are_named() -> None:
    with pytest.raises(DataError, match="4 training images of 2 lesions"):
        measure(clouds("generated", {NV: 3}, 0), train=clouds("train", {NV: 2, MEL: 2}, 0), c=None)


def test_a_class_without_test_images_is_trained_on_but_not_scored() -> None:
    result = measure(TRUE, test=clouds("test", {NV: 50, MEL: 50}, 1))
    assert "no test image" in result.left_out["BKL"]
    assert "recall_BKL" not in result.minus_c
    assert result.arms["a"].images["BKL"] == 8


def test_test_images_of_an_unknown_class_are_not_scored() -> None:
    counts = {NV: 60, MEL: 60, BKL: 60}
    alone = measure(TRUE, test=clouds("test", counts, 1))
    with_df = measure(TRUE, test=clouds("test", {**counts, DF: 30}, 1))
    assert "no real training image" in with_df.left_out["DF"]
    assert with_df.test == alone.test
    assert set(with_df.minus_c) == set(alone.minus_c)


def test_synthetic_images_of_one_class_leave_arm_e_out() -> None:
    result = measure(clouds("generated", {MEL: 50}, 2))
    assert set(result.arms) == set("abcd")
    assert "alone" in result.left_out["arm e"]


def test_a_class_of_few_test_lesions_is_noted() -> None:
    result = measure(TRUE, test=clouds("test", {NV: 60, MEL: 60, BKL: 6}, 1))
    assert any("rough interval: BKL 3" in note for note in result.notes)


# --- what an arm trains on --------------------------------------------------------------------------------------------


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


def test_arm_c_cannot_repeat_a_class_that_has_no_real_image() -> None:
    rows = training_rows("c", np.array([MEL, MEL]), np.array([MEL, DF, DF]), seed=0)
    assert sorted(np.bincount(rows.real)) == [1, 2]


def test_arm_c_repeats_the_images_of_a_class_equally_often() -> None:
    """14 more images of 6 melanomas: each stands 3 or 4 times."""
    repeats = np.bincount(training_rows("c", REAL, GENERATED, seed=0).real)[REAL == MEL]
    assert sorted(repeats) == [3, 3, 3, 3, 4, 4]


def test_a_ratio_counts_against_the_real_images_of_each_class() -> None:
    rows = training_rows("d", REAL, GENERATED, ratio=2, seed=0)
    assert np.bincount(GENERATED[rows.generated], minlength=7)[[DF, MEL, NV]].tolist() == [6, 12, 0]


def test_a_smaller_ratio_takes_a_part_of_a_larger_one_and_the_seed_decides_which() -> None:
    small, again, other, large = (
        set(training_rows("d", REAL, GENERATED, ratio=ratio, seed=seed).generated.tolist())
        for ratio, seed in ((1, 5), (1, 5), (1, 6), (5, 5))
    )
    assert small < large
    assert small == again != other


def test_a_ratio_says_where_there_are_too_few_images_for_it() -> None:
    assert limits(REAL, GENERATED, 5) == "MEL 14 of 30, NV 0 of 100"
    assert limits(REAL[20:], GENERATED, 2) is None


def test_too_few_classes_to_compare_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"too few classes \(MEL\)"):
        scored_classes(image_set([MEL, NV]), image_set([MEL, DF]))


def test_classes_of_one_side_are_left_out_with_the_reason() -> None:
    train, test = image_set([MEL, NV, DF]), image_set([MEL, NV, VASC])
    assert scored_classes(train, test) == sorted([MEL, NV])
    reasons = unscored(train, test)
    assert set(reasons) == {"DF", "VASC"}
    assert "no test image" in reasons["DF"]
    assert "no real training image" in reasons["VASC"]


# --- the trainings ----------------------------------------------------------------------------------------------------


class Counted(ProbeClassifier):
    """Notes its trainings, and is killed in one of them."""

    trained: list[str] = []  # noqa: RUF012 - the tests' own
    killed_at: int | None = None

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        if len(self.trained) == self.killed_at:
            Counted.killed_at = None
            raise KeyboardInterrupt
        self.trained.append(Job.of(self, rows, seed).digest)
        return super().predict(rows, seed)


@pytest.fixture
def counted() -> Counted:
    Counted.trained, Counted.killed_at = [], None
    return Counted(TRAIN, TEST, TRUE, 0.1)


def jobs_of(classifier: ProbeClassifier, arms: str = "abde") -> list[Job]:
    return [Job.of(classifier, training_rows(arm, TRAIN.labels, TRUE.labels, seed=0), 0) for arm in arms]


def kept_in(folder: Path, *, on_ray: bool = False) -> Trials:
    return Trials(seeds=[0], resamples=100, kept=folder, on_ray=on_ray)


def test_finished_jobs_are_not_done_again_and_equal_ones_once(counted: Counted, tmp_path: Path) -> None:
    first = run_jobs(counted, jobs_of(counted, "abdeab"), kept_in(tmp_path))
    again = run_jobs(counted, jobs_of(counted), kept_in(tmp_path))
    assert len(counted.trained) == 4
    assert all(np.array_equal(first[digest], answer) for digest, answer in again.items())


def test_a_killed_run_resumes_where_it_stopped(counted: Counted, tmp_path: Path) -> None:
    Counted.killed_at = 2
    with pytest.raises(KeyboardInterrupt):
        run_jobs(counted, jobs_of(counted), kept_in(tmp_path))
    run_jobs(counted, jobs_of(counted), kept_in(tmp_path))
    assert len(counted.trained) == len(set(counted.trained)) == 4


def test_a_broken_file_is_made_again(counted: Counted, tmp_path: Path) -> None:
    (whole,) = run_jobs(counted, jobs_of(counted, "a"), kept_in(tmp_path)).values()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    (again,) = run_jobs(counted, jobs_of(counted, "a"), kept_in(tmp_path)).values()
    assert np.array_equal(again, whole)
    assert len(counted.trained) == 2


def test_other_images_settings_rows_or_weights_are_another_job() -> None:
    other = replace(TEST, cls=TEST.cls + 1)
    changed = [ProbeClassifier(TRAIN, TEST, TRUE, 0.2), ProbeClassifier(TRAIN, other, TRUE, 0.1)]
    digests = [job.digest for one in [ProbeClassifier(TRAIN, TEST, TRUE, 0.1), *changed] for job in jobs_of(one)]
    assert len(set(digests)) == 12


def test_the_seed_is_another_job_only_where_it_changes_something() -> None:
    rows = training_rows("a", TRAIN.labels, TRUE.labels, seed=0)
    for kind, digests in ((ProbeClassifier, 1), (AllOrNone, 2)):
        classifier = kind(TRAIN, TEST, TRUE, 0.1)
        assert len({Job.of(classifier, rows, seed).digest for seed in (0, 1)}) == digests


class ByProcess(ProbeClassifier):
    """Answers with the number of the process that asks; refuses the arm e."""

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        if not len(rows.real):
            raise DataError("test: 3 of these lesions have no name; give them one")
        return np.full((1, 7), os.getpid())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_give_what_this_process_gives_and_keep_it(tmp_path: Path) -> None:
    judge = ProbeClassifier(TRAIN, TEST, TRUE, 0.1)
    remote = run_jobs(judge, jobs_of(judge, "bd"), kept_in(tmp_path, on_ray=True))
    for digest, answer in run_jobs(judge, jobs_of(judge, "bd"), Trials(seeds=[0], resamples=100)).items():
        assert remote[digest] == pytest.approx(answer, abs=1e-6)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(job.digest for job in jobs_of(judge, "bd"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_run_in_other_processes_and_a_user_facing_error_comes_through_as_one_line(tmp_path: Path) -> None:
    judge = ByProcess(TRAIN, TEST, TRUE, 0.1)
    (first,) = run_jobs(judge, jobs_of(judge, "a"), kept_in(tmp_path, on_ray=True)).values()
    assert first[0, 0] != os.getpid()
    (kept,) = run_jobs(judge, jobs_of(judge, "a"), kept_in(tmp_path)).values()
    assert np.array_equal(kept, first)
    with pytest.raises(DataError, match=r"^test: 3 of these lesions have no name; give them one$"):
        run_jobs(judge, jobs_of(judge, "be"), kept_in(tmp_path, on_ray=True))
