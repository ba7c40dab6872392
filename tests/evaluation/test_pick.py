"""What is picked, by hand and by scikit-learn; the command leaves a run as it is and makes a folder beside it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_sets import clouds

from m2d.data.catalog import scan_dataset
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError, DataError
from m2d.evaluation.evaluate import evaluate
from m2d.evaluation.images import Unanswerable
from m2d.evaluation.pick import class_probabilities, farthest_points, pick
from m2d.evaluation.settings import EvaluateConfig, PickConfig
from m2d.models.settings import FeatureExtractorConfig

SMALL = FeatureExtractorConfig(input_size=32)  # Lite0
COLOURS = {"DF": (200, 60, 60), "MEL": (60, 60, 200)}
MADE, RIGHT = 8, 6  # images of each class, and of these in its own colour


def test_farthest_points_go_from_end_to_end_and_then_halve_the_gaps() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 10, 45, 80, 90]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert farthest_points(points, 0, 5) == [0, 4, 2, 1, 3]
    assert farthest_points(points, 4, 2) == [4, 0]
    assert farthest_points(points.repeat(2, 1), 0, 10)[:5] == [0, 4, 2, 1, 3], "repeats come last"
    assert sorted(farthest_points(points.repeat(2, 1), 0, 10)) == list(range(10))
    assert farthest_points(points, 0, 0) == []


def test_probabilities_of_real_images_are_scikit_learns_on_held_out_lesions_and_variations_are_held_out_too() -> None:
    lesions = [f"lesion {number // 2}" for number in range(90)]
    train = clouds("train", {0: 30, 1: 40, 2: 20}, 0, distance=1.0, scales=np.ones(6), groups=lesions)
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=5)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000))
    expected = cross_val_predict(probe, train.cls, train.labels, groups=train.groups, cv=folds, method="predict_proba")[
        np.arange(90), train.labels
    ]
    real, of_parents = class_probabilities(train, train, c=0.1, seed=5)
    np.testing.assert_allclose(real, expected, atol=1e-3)
    np.testing.assert_allclose(of_parents, real, err_msg="a variation that is its parent is called as that is")
    strangers = replace(train, groups=np.arange(90).astype(object))
    _, without = class_probabilities(train, strangers, c=0.1, seed=5)
    by_fold = [
        probe.fit(train.cls[fitted], train.labels[fitted]).predict_proba(train.cls)[np.arange(90), train.labels]
        for fitted, _ in folds.split(train.cls, train.labels, train.groups)
    ]
    np.testing.assert_allclose(without, np.mean(by_fold, axis=0), atol=1e-3)


def test_too_few_lesions_are_no_training_set() -> None:
    few = clouds("train", {0: 4, 1: 4}, 0, distance=1.0, scales=np.ones(6), groups=["a"] * 4 + ["b"] * 4)
    with pytest.raises(Unanswerable, match="too few"):
        class_probabilities(few, few, c=0.1, seed=0)


def paint(folder: Path, colours: list[tuple[int, int, int]], seed: int) -> None:
    """A PNG of each colour with some noise."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number, colour in enumerate(colours):
        pixels = np.clip(generator.normal(colour, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{folder.name}_{number}.png")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Any]:
    """Real images of two colours, and a run whose last two images of each class are of the other one's colour."""
    root = tmp_path / "generated_images" / "run"
    for seed, (code, other) in enumerate((("DF", "MEL"), ("MEL", "DF"))):
        paint(tmp_path / "real" / code, [COLOURS[code]] * 20, seed)
        paint(root / code, [COLOURS[code]] * RIGHT + [COLOURS[other]] * (MADE - RIGHT), 10 + seed)
    files = sorted(root.glob("*/*.png"))
    rows = {
        "id": [path.stem for path in files],
        "class": [path.parent.name for path in files],
        "path": [path.relative_to(root).as_posix() for path in files],
        "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "lesion_id": [f"elsewhere {path.stem}" for path in files],
    }
    pq.write_table(pa.table(rows), root / "manifest.parquet")
    (root / "generation.json").write_text(json.dumps({"checkpoint": "c0ffee", "mode": "standard"}))
    return {"real": str(tmp_path / "real"), "generated": str(root), "cache_dir": str(tmp_path / "cache")}


def config(places: dict[str, Any], **more: Any) -> PickConfig:
    return PickConfig(**{**places, "feature_extractor": SMALL, "c": 0.1, "num_actors": 0, "device": "cpu", **more})


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_shows_its_class_is_picked_and_the_run_stays_as_it_is(
    places: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(places["generated"])
    before = content(run)
    picked = pick(config(places))
    assert content(run) == before
    assert picked.parent == run.parent
    rows = pq.read_table(picked / "manifest.parquet").to_pylist()
    wrong = {f"{code}_{number}" for code in COLOURS for number in range(RIGHT, MADE)}
    assert rows, "some are sure of their class"
    assert not {row["id"] for row in rows} & wrong
    for row in rows:
        assert (picked / row["path"]).read_bytes() == before[row["path"]]
        assert row["pick_rule"] == "classifier"
        assert row["pick_probability"] > 0.5
    for code in COLOURS:
        of_class = [row for row in rows if row["class"] == code]
        assert sorted(row["pick_order"] for row in of_class) == list(range(len(of_class)))
        assert max(of_class, key=lambda row: row["pick_probability"])["pick_order"] == 0, "the surest comes first"
    assert {path for path in content(picked) if "/" not in path} == {
        "manifest.parquet", "generation.json", "lesions.csv", "contact_sheet.png"
    }  # fmt: skip
    found = scan_dataset(str(picked), DataConfig()).catalog
    assert set(found["lesion_id"].to_pylist()) == {row["lesion_id"] for row in rows}
    capsys.readouterr()
    written = content(picked)
    assert (pick(config(places)), content(picked)) == (picked, written)
    assert "already picked" in capsys.readouterr().out

    # The control: as many of each class, whatever they show; and a smaller pick begins like a larger one.
    control = pq.read_table(pick(config(places, rule="random")) / "manifest.parquet").to_pylist()
    assert sorted(row["class"] for row in control) == sorted(row["class"] for row in rows)
    assert pick(config(places, rule="random", seed=1)) not in (picked, None)
    fewer = pq.read_table(pick(config(places, count=2)) / "manifest.parquet").to_pylist()
    assert {row["id"] for row in fewer} == {row["id"] for row in rows if row["pick_order"] < 2}

    # Who picked does not judge.
    judged = {**places, "generated": str(picked), "device": "cpu", "num_actors": 0, "parts": "consistency"}
    other = FeatureExtractorConfig(name="efficientnet-lite1", input_size=32)
    with pytest.raises(ConfigError, match=r"^independent_extractor is efficientnet-lite0, by which the images [^\n]+$"):
        evaluate(EvaluateConfig(**judged, independent_extractor=SMALL, feature_extractor=other))


def test_a_place_that_is_taken_and_a_run_that_is_none_are_refused_in_one_line(places: dict[str, Any]) -> None:
    run = Path(places["generated"])
    before = content(run)
    with pytest.raises(ConfigError, match=r"^output: [^\n]+ is there already [^\n]+$"):
        pick(config(places, output=str(run)))
    assert content(run) == before
    (run / "DF" / "DF_0.png").write_bytes((run / "DF" / "DF_1.png").read_bytes())
    with pytest.raises(DataError, match=r"^generated: [^\n]+DF_0.png is not what manifest.parquet says[^\n]+$"):
        pick(config(places))
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    (run / "manifest.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"^generated: [^\n]+ cannot be read [^\n]+$"):
        pick(config(places))
    (run / "manifest.parquet").unlink()
    with pytest.raises(DataError, match=r"^generated: [^\n]+ has no manifest.parquet[^\n]+$"):
        pick(config(places))
    for wrong in ({"rule": "best"}, {"count": 0}, {"generated": "s3://bucket/run"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PickConfig(**wrong)
