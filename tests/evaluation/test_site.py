"""What a site with few lesions gains comes out as it must where the truth is known."""

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_sets
from PIL import Image
from tiny_sets import feature_set, pairs

from m2d.classes import ISIC7
from m2d.cli import parse
from m2d.errors import DataError
from m2d.evaluation.classifiers.compare import TrainingRows, Trials
from m2d.evaluation.classifiers.finetune import FinetuneClassifier, finetuned_site
from m2d.evaluation.classifiers.probe import ProbeClassifier, probe_site
from m2d.evaluation.classifiers.site import SiteResult, chosen_of_few, site_rows
from m2d.evaluation.classifiers.worth import SHARES, Pool
from m2d.evaluation.evaluate import evaluate
from m2d.evaluation.images import Copy, FeatureSet, ImageSet, Unanswerable
from m2d.evaluation.provenance import made_from_others, near_copy_gate
from m2d.evaluation.settings import FinetuneConfig
from m2d.metrics.linear_probe import C_GRID

BKL, DF, MEL, NV = (ISIC7.index(code) for code in ("BKL", "DF", "MEL", "NV"))
DIMS = 60


clouds = partial(pairs, scales=np.ones(DIMS))
KNOWN = clouds("known", {NV: 500, MEL: 200, BKL: 100}, 0)
TESTED = clouds("tested", {NV: 300, MEL: 120, BKL: 60}, 1)
NEW = clouds("generated", {MEL: 120, BKL: 120}, 2)  # as real lesions are distributed
NOISE = feature_set(NEW, 8 * np.random.default_rng(0).normal(size=NEW.cls.shape))


def judge(
    generated: FeatureSet, seeds: int = 1, known: FeatureSet | None = KNOWN, c: float | None = 0.01, **more: Any
) -> SiteResult:
    sides = ({"known": known} if known else {}) | {"tested": TESTED}
    return probe_site(sides, generated, c, Trials(seeds=range(seeds), resamples=200), share=0.05, folds=2, **more)


@pytest.fixture(scope="module")
def new() -> SiteResult:
    return judge(NEW, seeds=2)


def test_a_site_gains_from_new_lesions_and_the_report_says_what_it_has(new: SiteResult) -> None:
    assert new.verdict.word == "helps"
    assert np.mean(new.shares) > 0.25
    assert new.lesions == {"NV": 20, "MEL": 8, "BKL": 4}  # a twentieth of 400, 160 and 80
    assert new.images == {"NV": 40, "MEL": 16, "BKL": 8}
    assert "a site with 32 lesions, 4 of them of the class benign keratosis, gains +" in new.verdict.sentence
    assert new.differences["less_real"]["balanced_accuracy"].signed in new.verdict.sentence
    assert new.test == TESTED.counts


def test_the_generators_own_images_are_lent_up_to_the_same_counts(new: SiteResult) -> None:
    assert (new.offered, new.offered_real) == ({"MEL": 120, "BKL": 120}, {"MEL": 120, "BKL": 100})
    assert new.differences["shared"]["balanced_accuracy"].above
    assert new.of_shared is not None
    assert 0.5 < new.of_shared.value < 2  # as good lesions, of one class a few more


def test_noise_gets_no_share_that_changes_anything() -> None:
    found = judge(NOISE, c=None)
    assert np.mean(found.shares) <= 0.1
    assert found.verdict.word in ("no use", "harmless", "no difference shown")
    assert not found.differences["less_real"]["balanced_accuracy"].below


def test_the_chosen_c_suits_a_site_of_that_size() -> None:
    """Cross-validation of a class-weighted probe took 0.001 here, and nothing could be seen."""
    chosen = judge(NEW, c=None)
    given = {c: judge(NEW, c=c).arms["equal priors: a"]["balanced_accuracy"].value for c in C_GRID[2:]}
    assert chosen.arms["equal priors: a"]["balanced_accuracy"].value >= max(given.values()) - 0.005
    assert given[1e-3] < max(given.values()) - 0.005
    assert chosen.verdict.word == "helps"


def test_site_test_and_generator_have_no_common_lesion(monkeypatch: pytest.MonkeyPatch) -> None:
    """In no training, those by which a share is chosen included; and no site knows what the generator learned on."""
    predict = ProbeClassifier.predict
    sizes: set[int] = set()

    def checked(self: ProbeClassifier, rows: TrainingRows, seed: int) -> np.ndarray:
        assert rows.asked is not None
        assert rows.reference is not None
        asked, site = set(self.test.groups[rows.asked]), set(self.train.groups[rows.reference])
        assert not asked & set(self.train.groups[rows.real])
        assert not asked & site
        assert all(lesion.startswith("tested") for lesion in asked | site)
        sizes.add(len(site))
        return predict(self, rows, seed)

    monkeypatch.setattr(ProbeClassifier, "predict", checked)
    judge(NEW)
    assert max(sizes) == 32


def test_turned_images_that_look_the_same_change_nothing_and_others_are_trained_on() -> None:
    same = judge(NEW, known=None, turned=[TESTED.cls, TESTED.cls])
    assert "shared" not in same.differences
    augmented, alone = (same.arms[f"equal priors: {arm}"]["balanced_accuracy"].value for arm in "ta")
    assert augmented == pytest.approx(alone, abs=0.005)  # the solver stops elsewhere
    moved = judge(NEW, known=None, turned=[TESTED.cls + 1])
    assert moved.arms["equal priors: t"] != moved.arms["equal priors: a"]


def test_copies_of_tested_images_get_no_verdict() -> None:
    told = judge(replace(NEW, copies=(Copy("0.png", "tested/0.png", None),)))
    assert told.verdict.word == "no verdict"
    assert "1 of 240 generated images are copies" in told.verdict.sentence


def test_a_site_has_its_share_of_each_class_and_one_lesion_at_least() -> None:
    labels = np.repeat([NV, MEL, DF], [100, 40, 6])
    groups = np.array([f"{number // 2}" for number in range(146)], dtype=object)  # 50, 20 and 3 lesions
    pool = Pool(labels, groups, np.arange(146) % 4 < 2, np.array([MEL]), ISIC7)  # every other lesion
    rest = np.flatnonzero(pool.tested)
    rows = site_rows(pool, rest, 0.1, [0])
    assert {k: len(set(groups[rows[labels[rows] == k]])) for k in (NV, MEL, DF)} == {NV: 5, MEL: 2, DF: 1}
    assert len(rows) == 16
    assert set(rows) <= set(rest)
    assert not np.array_equal(rows, site_rows(pool, rest, 0.1, [1]))
    with pytest.raises(
        Unanswerable, match=r"site_share 0.6 is 44 of all 73 lesions.* 37 are left; ask .* up to 0.506,"
    ):
        site_rows(pool, rest, 0.6, [0])


def marked(side: int, counts: dict[int, int]) -> ImageSet:
    """A pixel each, of class, side and lesion; two images of a lesion."""
    labels = np.repeat(list(counts), list(counts.values()))
    lesions = np.arange(len(labels)) // 2
    pixels = np.stack([labels, np.full(len(labels), side), lesions], axis=1).astype(np.uint8)[:, None, None]
    return tiny_sets.image_set(labels, str(side), [f"{side}-{lesion}" for lesion in lesions], pixels)


def test_a_fine_tuned_network_is_asked_about_the_same_sites_and_gets_the_right_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that reads the class off the pixel calls all images rightly. Sides: 0 known, 1 tested, 2 generated."""
    sets = {"known": marked(0, {NV: 60, MEL: 20}), "tested": marked(1, {NV: 80, MEL: 40})}
    trained, weighed = list[set[int]](), list[np.ndarray]()

    def predict(self: FinetuneClassifier, rows: TrainingRows, seed: int) -> np.ndarray:
        assert rows.asked is not None
        images = np.concatenate([self.train[rows.real], self.generated[rows.generated]])[:, 0, 0]
        assert np.array_equal(images[:, 0], rows.labels(self.train_labels, self.generated_labels))
        own, asked = images[: rows.own], self.test[rows.asked][:, 0, 0]
        assert (set(own[:, 1]), set(asked[:, 1])) == ({1}, {1})
        assert not set(own[:, 2]) & set(asked[:, 2])
        trained.append({*images[rows.own :, 1].tolist()})
        weighed.append(np.bincount(images[:, 0], rows.weights, 7)[[NV, MEL]])
        return np.eye(7)[asked[:, 0]]

    monkeypatch.setattr(FinetuneClassifier, "predict", predict)
    config = FinetuneConfig(model="timm:test_resnet", pretrained=False, input_size=32, recipe="replace")
    trials = Trials(seeds=range(1), resamples=100)
    found = finetuned_site(sets, marked(2, {MEL: 30}), config, trials, share=0.1, folds=2)
    assert trained == 2 * [set(), set(), set()] + 2 * [{2}, {2}, {0}]  # a, b, c; d, d class-balanced, f
    for (a, _, c), (d, alike, f) in zip((weighed[:3], weighed[3:6]), (weighed[6:9], weighed[9:]), strict=True):
        assert d == pytest.approx(c), "it is drawn as the oversampled control is"
        assert f == pytest.approx(a + [0, 20])
        assert alike[0] == pytest.approx(alike[1])
    assert {arm: one["balanced_accuracy"].value for arm, one in found.arms.items()} == dict.fromkeys(found.arms, 1)
    assert (found.shares, found.inner, found.offered_real) == ([0.5, 0.5], {}, {"MEL": 20})
    assert found.lesions == {"NV": 7, "MEL": 3}  # a tenth of 70 and 30
    assert "augmented" not in found.differences


# --- the choice of a share --------------------------------------------------------------------------------------------


def chosen(answers: dict[float, np.ndarray], truth: np.ndarray) -> float:
    """The share for these answers to one partition of single images, as if classes had been alike in training."""
    pool = Pool(truth, np.arange(len(truth)).astype(object), np.ones(len(truth), bool), np.array([1]), ISIC7)
    balanced = TrainingRows(np.arange(2), np.empty(0, np.int64), np.ones(2), asked=np.arange(len(truth)))
    spread = {share: np.pad(answer, ((0, 0), (0, 5))) for share, answer in answers.items()}
    return chosen_of_few(pool, [{s: (balanced, one) for s, one in spread.items()}], 0)[0]


TRUTH = np.arange(80) % 2
SURE = np.where(np.random.default_rng(0).random(80) < 0.7, TRUTH, 1 - TRUTH)  # right on 70 %, and always sure
SKILL = {share: np.where(np.arange(80) < 80 * right, TRUTH, 1 - TRUTH) for share, right in zip(SHARES, (0.7, 0.9) * 3)}


def called(classes: np.ndarray, sure: float) -> np.ndarray:
    return np.where(np.eye(2)[classes] > 0, sure, 1 - sure)


def test_what_only_makes_a_classifier_less_sure_is_given_no_share() -> None:
    """By the plain loss it would be: 30 % of the calls are wrong, and sure."""
    assert chosen({share: called(SURE, 0.999 - 0.3 * share) for share in SHARES}, TRUTH) == 0


def test_of_shares_that_are_as_good_the_smallest_is_taken_and_0_where_nothing_is_better() -> None:
    assert chosen({share: called(SKILL[share], 0.9) for share in SHARES}, TRUTH) == 0.1
    assert chosen({share: called(SURE, 0.9) for share in SHARES}, TRUTH) == 0


# --- what the run that made the images says ---------------------------------------------------------------------------


def test_images_that_started_from_unseen_lesions_and_refused_copies_are_found(tmp_path: Path) -> None:
    for name in ("trained", "unseen"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    own, foreign, gone = (str(tmp_path / f"{name}.png") for name in ("trained", "unseen", "gone"))
    references = {"free": (None, None), "own": (own, None), "walk": (own, foreign), "gone": (gone, None)}
    one, other = zip(*references.values(), strict=True)
    table = pa.table({"sha256": list(references), "reference": one, "reference_b": other})
    pq.write_table(table, tmp_path / "manifest.parquet")
    trained = {hashlib.sha256(b"trained").hexdigest()}
    found = made_from_others(str(tmp_path), [*references, "another's"], trained)
    assert found.tolist() == [False, False, True, True, False]
    assert made_from_others(str(tmp_path / "elsewhere"), ["free"], trained).tolist() == [False]

    rows = [(True, "on", None), (False, "on", "near_copy"), (False, "on", "blank"), (True, "off", None)]
    journal = dict(zip(("accepted", "gates", "reason"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(journal), tmp_path / "journal.parquet")
    gate = near_copy_gate(str(tmp_path))
    assert gate is not None
    assert (gate.tried, gate.refused, gate.kept, gate.off) == (4, 1, 0, 1)
    assert near_copy_gate(str(tmp_path / "elsewhere")) is None


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(tmp_path: Path, paint_images: Any) -> list[str]:
    """80 real images, a lesion each, a half of which the generator has not seen, and 12 generated ones."""
    paint_images(tmp_path / "real", {"MEL": 32, "NV": 48})
    for number in range(12):
        (tmp_path / "generated" / "MEL").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "generated" / "MEL" / f"{number}.png")
    places = {name: str(tmp_path / name) for name in ("real", "generated")}
    more = {"setting": "site", "site_share": "0.1,0.4", "cache_dir": str(tmp_path / "cache"), "folds": "2"}
    more |= {"output": str(tmp_path / "out"), "image_size": "16", "num_actors": "0", "bootstrap": "100", "c": "0.01"}
    more |= {"parts": "downstream,memorization", "data.test_fraction": "0.3", "data.val_fraction": "0.2"}
    more |= {"repeats": "1", "feature_extractor.input_size": "32", "independent_extractor.input_size": "32"}
    more |= {"classifiers": "logistic,finetune", "finetune.model": "timm:test_resnet", "finetune.pretrained": "false"}
    more |= {"finetune.input_size": "32", "finetune.epochs": "1", "finetune.batch_size": "8", "finetune.device": "cpu"}
    return [word for name, value in (places | more).items() for word in (f"--{name}", value)]


def test_the_command_answers_the_shares_that_can_be_had(flags: list[str], tmp_path: Path) -> None:
    out = evaluate(parse("evaluate", flags))
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    site, tuned = found["sites"]
    assert (site["share"], site["lesions"]) == (0.1, {"MEL": 3, "NV": 5})
    assert sum(site["test"].values()) == 40
    assert site["offered_real"] == {"MEL": 12}
    assert (tuned["classifier"], tuned["shares"]) == ("timm:test_resnet fine-tuned on the pixels", [0.25, 0.25])
    assert (tuned["lesions"], tuned["test"], tuned["offered_real"]) == (site["lesions"], site["test"], {"MEL": 12})
    assert (found["worth"], found["downstream"]) == ([], [])
    assert any("site_share 0.4 is 32 of all 80 lesions" in note for note in found["notes"])
    page = " ".join((out / "evaluation.html").read_text(encoding="utf-8").split())
    for one in (site, tuned):
        assert one["verdict"]["sentence"][1:].replace("'", "&#39;") in page
    assert "The share of the synthetic images&#39; weight is 0.25." in page
    assert "Near-copies of the generator&#39;s training images are" in page
    assert len((out / "site_counts.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert "equal priors: d - t" in (out / "sites.csv").read_text(encoding="utf-8")


def test_images_made_from_unseen_lesions_alone_are_refused(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    files = sorted((folder / "MEL").iterdir())
    sha256 = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    somewhere = [str(tmp_path / "elsewhere.png")] * len(files)
    table = pa.table({"sha256": sha256, "reference": somewhere, "reference_b": somewhere})
    pq.write_table(table, folder / "manifest.parquet")
    with pytest.raises(
        DataError, match=r"generated: 12 of 12 generated images, MEL/0.png for one, were made from real"
    ):
        evaluate(parse("evaluate", flags))
