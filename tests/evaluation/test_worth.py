"""What synthetic images are worth comes out as it must where the truth is known."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from tiny_sets import feature_set, image_set, pairs

from m2d.classes import ISIC7
from m2d.data.features import extract_view
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import TrainingRows, Trials
from m2d.evaluation.classifiers.probe import ProbeClassifier, origins, probe_worth
from m2d.evaluation.classifiers.worth import MARGIN, RULES, Offer, WorthResult, equal_priors, mixed, verdict, word
from m2d.evaluation.images import Copy, FeatureSet
from m2d.evaluation.report import plots
from m2d.metrics.bootstrap import Estimate
from m2d.metrics.linear_probe import told_apart
from m2d.models.extractors import load_feature_extractor
from m2d.plots.style import styled

BKL, DF, MEL, NV = (ISIC7.index(code) for code in ("BKL", "DF", "MEL", "NV"))
DIMS, C = 60, 0.03
HAM10000 = Path(__file__).parents[3] / "shared" / "ham10000"


clouds = partial(pairs, scales=np.ones(DIMS))
REAL = clouds("real", {NV: 300, MEL: 40, BKL: 40}, 0)
TEST = clouds("test", {NV: 300, MEL: 300, BKL: 300}, 1)
NEW = clouds("generated", {MEL: 300, BKL: 300}, 2)  # as the real ones are distributed
AGAIN = feature_set(image_set(REAL.labels, "generated"), REAL.cls)
SHIFTED = feature_set(NEW, NEW.cls + 6 * np.eye(DIMS)[DIMS - 1])  # the same, marked: not one lesion looks so
NOISE = feature_set(NEW, 8 * np.random.default_rng(0).normal(size=NEW.cls.shape))


def judge(
    generated: FeatureSet,
    seeds: int = 1,
    known: FeatureSet | None = REAL,
    tested: FeatureSet = TEST,
    **more: Any,
) -> WorthResult:
    sides = ({"known": known} if known else {}) | {"tested": tested}
    return probe_worth(sides, generated, C, Trials(seeds=range(seeds), resamples=200), **more)


def differences(result: WorthResult) -> dict[str, Estimate]:
    return {rule: result.differences[rule]["balanced_accuracy"] for rule in RULES}


@pytest.fixture(scope="module")
def new() -> WorthResult:
    return judge(NEW, seeds=2)


def test_new_lesions_help_by_every_rule(new: WorthResult) -> None:
    assert new.verdict.word == "helps"
    assert min(new.shares) > 0
    assert all(one.above for one in differences(new).values())
    assert differences(new)["primary"].signed in new.verdict.sentence


def test_half_of_the_lesions_gain_by_the_other_half_and_by_images_like_them(new: WorthResult) -> None:
    assert new.gains["ceiling"].word == "helps"
    assert new.of_ceiling is not None
    assert new.of_ceiling.value > 0.8  # as good lesions, and more of them
    assert set(new.told_apart) == {"MEL", "BKL"}
    assert max(new.told_apart.values()) < 0.65


def test_pure_copies_are_of_no_use() -> None:
    """The lesion-grouped choice sees that they bring nothing, though a copy of each held-out lesion is among them."""
    found = judge(AGAIN)
    assert (found.verdict.word, found.shares) == ("no use", [0])
    assert differences(found)["less_real"] == Estimate(0, 0, 0)


def test_noise_is_of_no_use_where_the_old_rule_says_that_it_hurts() -> None:
    found = judge(NOISE)
    assert (found.verdict.word, found.shares) == ("no use", [0])
    assert differences(found)["argmax"].below


def test_a_shifted_prior_alone_hurts_by_the_old_rule_and_not_by_the_new_one() -> None:
    """Marked images have a region of their own: they move no threshold of unmarked ones, where oversampling does."""
    found = judge(SHIFTED)
    assert differences(found)["argmax"].below
    assert found.verdict.word in ("harmless", "no use", "no difference shown")
    assert abs(differences(found)["less_real"].value) < MARGIN
    assert min(found.told_apart.values()) > 0.95


def test_what_the_codec_keeps_is_told() -> None:
    rows = np.flatnonzero(REAL.labels != NV)
    kept, lost = (feature_set(image_set(REAL.labels[rows]), cls) for cls in (REAL.cls[rows], 0 * REAL.cls[rows]))
    whole, nothing = judge(NEW, redrawn=(rows, kept)), judge(NEW, redrawn=(rows, lost))
    assert whole.codec_retention == Estimate(1, 1, 1)
    assert nothing.gains["codec"].minus_a["balanced_accuracy"].value < MARGIN


def test_in_folds_every_lesion_is_tested_once_and_a_known_one_never() -> None:
    found = judge(NEW, seeds=2, folds=3)
    assert found.test == TEST.counts
    assert len(found.shares) == 6
    every = judge(NEW, folds=3, known=None)
    assert every.test_lesions == {"NV": 150, "MEL": 150, "BKL": 150}


def test_a_variation_stays_with_its_lesion_and_other_images_with_the_nearest() -> None:
    real = np.eye(4, 5, dtype=np.float32)[[0, 1, 2, 2]]
    groups = np.array(["first", "second", "third", "third"], dtype=object)
    made = feature_set(image_set([0, 0, 0], "generated", ["generated 0", "second", "elsewhere"]), real[[0, 0, 1]])
    assert groups[origins(real, groups, made, np.arange(4))].tolist() == ["first", "second", "second"]
    without = origins(real, groups, made, np.array([0, 2, 3]))
    assert groups[without].tolist()[:2] == ["first", "first"], "its lesion is not there"
    skins = replace(made, skins=np.array(["", "third", "first"], dtype=object))
    of_skins = groups[origins(real, groups, skins, np.arange(4))].tolist()
    assert of_skins == [["first", "first"], ["second", "third"], ["second", "first"]]


def test_no_lesion_is_called_by_a_classifier_that_was_trained_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the folds nor of those by which a share is chosen; nor do they standardise by it."""
    predict = ProbeClassifier.predict
    called: list[int] = []

    def checked(self: ProbeClassifier, rows: TrainingRows, seed: int) -> np.ndarray:
        assert rows.asked is not None
        assert rows.reference is not None
        asked = set(self.test.groups[rows.asked])
        assert not asked & set(self.train.groups[np.concatenate([rows.real, rows.reference])])
        called.append(len(asked))
        return predict(self, rows, seed)

    monkeypatch.setattr(ProbeClassifier, "predict", checked)
    judge(NEW, folds=2)
    assert len(called) > 50


def test_the_equal_prior_accuracy_is_that_of_scikit_learns_classifier(new: WorthResult) -> None:
    """Arm a written out: log-probabilities less the logarithm of the class counts."""
    scaler = StandardScaler().fit(REAL.cls.astype(np.float64))
    model = LogisticRegression(C=C, max_iter=5000, tol=1e-6).fit(scaler.transform(REAL.cls), REAL.labels)
    counts = np.bincount(REAL.labels)[model.classes_]
    called = model.classes_[(model.predict_log_proba(scaler.transform(TEST.cls)) - np.log(counts)).argmax(axis=1)]
    expected = balanced_accuracy_score(TEST.labels, called)
    assert new.arms["equal priors: a"]["balanced_accuracy"].value == pytest.approx(expected, abs=0.004)


def test_copies_of_test_images_get_no_verdict_however_much_they_help() -> None:
    told = judge(replace(NEW, copies=(Copy("0.png", "test/0.png", None),)))
    assert told.verdict.word == "no verdict"
    assert "1 of 600 generated images are copies of unseen real images" in told.verdict.sentence


def test_too_few_lesions_to_choose_a_share_by_take_the_fixed_one_and_too_few_to_test_are_refused() -> None:
    few = judge(clouds("generated", {MEL: 9}, 3), known=clouds("real", {NV: 2, MEL: 2}, 4))
    assert few.shares == [0.25]
    assert any("too few" in note for note in few.notes)
    with pytest.raises(DataError, match="too few"):
        judge(NEW, known=None, tested=clouds("test", {NV: 2, MEL: 2}, 4), folds=5)


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "classes", "totals"),
    [
        (0.25, "real", (20, 6, 3)),
        (0.5, "real", (20, 6, 3)),
        (0.5, "summed", (20, 20, 43)),
        (0.25, "alike", (29 / 3, 29 / 3, 29 / 3)),
    ],
)
def test_synthetic_images_hold_their_share_of_each_class_whatever_it_weighs(
    share: float, classes: Literal["real", "summed", "alike"], totals: tuple[float, ...]
) -> None:
    real, generated = np.array([NV] * 20 + [MEL] * 6 + [DF] * 3), np.array([MEL] * 14 + [DF] * 40)
    offer = Offer(np.arange(29), np.empty(0, np.int64), np.arange(54))
    rows = mixed(real, generated, offer, share, classes=classes, asked=None)
    labels, made = rows.labels(real, generated), np.arange(len(rows.weights)) >= 29
    for label, total in zip((NV, MEL, DF), totals, strict=True):
        assert rows.weights[labels == label].sum() == pytest.approx(total)
        assert rows.weights[(labels == label) & made].sum() == pytest.approx(0 if label == NV else share * total)


def test_real_images_offered_as_generated_count_as_such_and_a_share_of_0_offers_none() -> None:
    real = np.array([NV] * 4 + [MEL] * 4)
    offer = Offer(np.array([0, 1, 2, 4, 5]), np.array([6, 7]), np.empty(0, np.int64))
    rows = mixed(real, real[:0], offer, 0.5, asked=np.array([3]))
    assert rows.real.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert rows.weights.tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert rows.reference is not None
    assert rows.reference.tolist() == [0, 1, 2, 4, 5]
    assert mixed(real, real[:0], offer, 0, asked=None).real.tolist() == [0, 1, 2, 4, 5]


def test_equal_priors_divide_by_what_was_trained_on_by_weight() -> None:
    rows = TrainingRows(np.arange(3), np.arange(1), np.array([1, 1, 2, 4.0]))
    found = equal_priors(np.array([[0.5, 0.5, 0.0]]), rows, np.array([0, 0, 1]), np.array([1]))
    assert found.tolist() == [[0.25, 0.5 / 6, 0]]


def drawn(value: float, deviation: float) -> np.ndarray:
    """A difference and its resamples."""
    return np.concatenate([[value], value + deviation * np.random.default_rng(0).normal(size=1000)])


@pytest.mark.parametrize(
    ("against_c", "against_a", "said"),
    [
        (drawn(0.03, 0.01), drawn(0.03, 0.01), "helps"),
        (drawn(0.03, 0.01), drawn(0.01, 0.01), "no difference shown"),  # c was the weaker control by chance
        (drawn(-0.03, 0.01), drawn(-0.03, 0.01), "hurts"),
        (drawn(-0.03, 0.01), drawn(0.0, 0.001), "no difference shown"),
        (drawn(0.0, 0.005), drawn(0.002, 0.005), "harmless"),
        (drawn(0.0, 0.02), drawn(0.0, 0.02), "no difference shown"),
        (drawn(0.01, 0.002), drawn(0.01, 0.002), "helps"),  # less than the margin, yet shown
        (drawn(0.0, 0.0), drawn(0.0, 0.0), "no difference shown"),  # too few lesions, of which none is called otherwise
        (drawn(0.3, 0.0), drawn(0.3, 0.1), "no difference shown"),  # one lesion of each class
    ],
)
def test_the_word_needs_both_controls(against_c: np.ndarray, against_a: np.ndarray, said: str) -> None:
    assert word([against_c, against_a], [0.25, 0.0]) == said
    assert word([against_c, against_a], [0.0, 0.0]) == "no use"


def test_an_interval_that_is_a_point_is_not_taken_for_a_test_that_sees_everything() -> None:
    def sentence(low: float, high: float) -> str:
        found = {"balanced_accuracy": Estimate(0, low, high)}
        return verdict("no difference shown", {"primary": found, "less_real": found}, [0.5], (0, 9)).sentence

    assert "sees differences from about 0.03 on" in sentence(-0.03, 0.03)
    assert "sees differences" not in sentence(0, 0)
    assert "too few lesions" in sentence(0, 0)


UP, DOWN, OPEN = Estimate(0.05, 0.01, 0.09), Estimate(-0.05, -0.09, -0.01), Estimate(0.01, -0.03, 0.05)


def test_what_got_worse_while_balanced_accuracy_rose_is_warned_of() -> None:
    def warned(balanced_accuracy: Estimate, shares: tuple[float, ...] = (0.25,), **more: Estimate) -> list[str]:
        primary = {"balanced_accuracy": balanced_accuracy, **more}
        return verdict(
            "helps" if any(shares) else "no use", {"primary": primary, "less_real": primary}, shares, (0, 9)
        ).warnings

    (warning,) = warned(UP, macro_auprc=DOWN, melanoma_auprc=OPEN, expected_calibration_error=UP)
    assert "macro AUPRC by -0.050 [-0.090, -0.010]; expected calibration error by +0.050" in warning
    assert "melanoma" not in warning
    # Where the balanced accuracy fell, the verdict says enough; a smaller calibration error is a better one.
    assert warned(DOWN, macro_auprc=DOWN) == warned(UP, expected_calibration_error=DOWN) == []
    assert warned(UP, (0.0,), macro_auprc=DOWN) == []


def test_a_long_name_stays_above_its_own_chart(new: WorthResult) -> None:
    long = replace(new, classifier="efficientnet-lite0 fine-tuned on the pixels, real images through the autoencoder")
    with styled():
        figure = plots.differences.__wrapped__([new, long])  # type: ignore[attr-defined]
        figure.draw_without_rendering()
        for left, right in (figure.axes[:2], figure.axes[2:]):
            assert left.get_tightbbox().x1 < right.get_tightbbox().x0
            assert right.get_tightbbox().x1 < figure.bbox.x1


def test_a_detector_knows_a_mark_and_not_a_copy() -> None:
    cls, made = np.concatenate([REAL.cls, REAL.cls]), np.arange(2 * len(REAL)) >= len(REAL)
    groups = np.concatenate([REAL.groups, REAL.groups])
    assert told_apart(cls, made, groups, c=C, seed=0) == pytest.approx(0.5, abs=0.02)
    assert told_apart(cls + 3 * made[:, None], made, groups, c=C, seed=0) == pytest.approx(1)
    assert told_apart(cls[:6], made[-6:] & False, groups[:6], c=C, seed=0) is None


# --- real images ------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not HAM10000.is_dir(), reason="../shared/ham10000 is not here")
def test_on_real_images_copies_are_of_no_use_and_blurred_new_lesions_do_not_hurt() -> None:
    """An image of each lesion. Blurred ones are told from sharp ones, and by argmax they seem to hurt."""
    lines = (HAM10000 / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    once = set({line.split(",")[2]: line.split(",")[0] for line in lines}.values())
    wanted = {"MEL": 120, "BKL": 120, "NV": 240}
    files = [
        path
        for code, count in wanted.items()
        for path in [path for path in sorted((HAM10000 / code).glob("*.jpg")) if path.stem in once][:count]
    ]
    sharp = [Image.open(path).convert("RGB").resize((64, 64)) for path in files]
    labels, place = np.array([ISIC7.index(path.parent.name) for path in files]), np.arange(len(files)) % 6
    extractor = load_feature_extractor("efficientnet-lite1", input_size=64, crop="whole")

    def features(name: str, rows: np.ndarray, images: list[Image.Image] = sharp) -> FeatureSet:
        pixels = np.stack([np.asarray(images[row]) for row in np.flatnonzero(rows)])
        return feature_set(image_set(labels[rows], name), extract_view(extractor, pixels, 0, "cpu").cls.numpy())

    rare = labels != ISIC7.index("NV")
    train, test = features("train", (place < 1) | ((place < 4) & ~rare)), features("test", place >= 4)
    blurred = [one.resize((12, 12)).resize((64, 64)) for one in sharp]
    copies = feature_set(image_set(train.labels, "generated"), train.cls)
    again = judge(copies, known=train, tested=test)
    assert (again.verdict.word, again.shares) == ("no use", [0])
    new = judge(features("generated", rare & (place > 0) & (place < 4), blurred), known=train, tested=test)
    assert new.verdict.word != "hurts"
    assert differences(new)["argmax"].value < differences(new)["less_real"].value
    assert min(new.told_apart.values()) > 0.9
