"""Real images in the channel of generated ones; the command on small images, and what it refuses in one line."""

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image
from tiny_sets import clouds

from m2d.classes import ISIC7
from m2d.cli import main, main_from_shell, parse
from m2d.data import features
from m2d.data.catalog import scan_dataset, write_catalog
from m2d.data.settings import DataConfig
from m2d.evaluation.classifiers.compare import Trials
from m2d.evaluation.classifiers.probe import probe_worth
from m2d.evaluation.images import FeatureSet

MEL, NV = ISIC7.index("MEL"), ISIC7.index("NV")
COLOURS = dict(zip(ISIC7.codes, ("red", "lime", "blue", "yellow", "black", "white", "magenta")))
COLOURS |= {"BENIGN": "red", "MALIGNANT": "blue"}


def paint(data_root: Path, lesions: dict[str, int], *, photographs: int = 2, seed: int = 0) -> str:
    """Class folders of squares in the class's colour, each with noise of its own; metadata.csv tells the lesions."""
    generator = np.random.default_rng(seed)
    rows = ["image_id,lesion_id"]
    for label, count in lesions.items():
        (data_root / label).mkdir(parents=True)
        for number in range(count * photographs):
            image_id = f"{label}_{seed}_{number}"
            noise = generator.integers(-9, 10, size=(40, 48, 3))
            pixels = np.clip(np.array(Image.new("RGB", (48, 40), COLOURS[label])) + noise, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(data_root / label / f"{image_id}.png")
            rows.append(f"{image_id},lesion_{label}_{seed}_{number // photographs}")
    (data_root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return str(data_root)


# --- what images are worth to it --------------------------------------------------------------------------------------


def test_in_a_common_channel_marked_images_are_worth_what_unmarked_ones_are() -> None:
    """The mark of generated images is in the real ones too, where nothing is lost: standardised, it is gone."""
    made = partial(clouds, distance=2.0, scales=np.ones(20))
    sides = {"known": made("real", {NV: 60, MEL: 12}, 0), "tested": made("test", {NV: 60, MEL: 60}, 1)}
    new = made("generated", {MEL: 60}, 2)

    def marked(features: FeatureSet) -> FeatureSet:
        return replace(features, cls=features.cls + np.float32(8) * np.eye(20, dtype=np.float32)[-1])

    judge = partial(probe_worth, c=0.03, trials=Trials(seeds=range(1), resamples=200))
    plain = judge(sides, new)
    passed = judge({name: marked(one) for name, one in sides.items()}, marked(new), original=sides)
    gained = {row: one["balanced_accuracy"].value for row, one in passed.minus_original.items()}
    ruled = {rule: one["balanced_accuracy"].value for rule, one in plain.differences.items()}
    assert gained == pytest.approx(
        {
            "equal priors: d - c on original images": ruled["primary"],
            "class-balanced loss: d - b on original images": ruled["class_balanced"],
            "equal priors: c - c on original images": 0,
            "class-balanced loss: b - b on original images": 0,
        },
        abs=1e-3,
    )
    assert ruled["primary"] > 0.02
    assert passed.told_apart["MEL"] < 0.75 < 0.95 < judge(sides, marked(new)).told_apart["MEL"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven classes, eight lesions of two photographs each."""
    return paint(tmp_path_factory.mktemp("data") / "skin", dict.fromkeys(ISIC7.codes, 8))


def arguments(tmp_path: Path, *more: str) -> list[str]:
    places = ["--cache_dir", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    small = ["--feature_extractor.input_size", "32", "--bootstrap", "200", "--device", "cpu"]
    split = ["--data.test_fraction", "0.25", "--data.val_fraction", "0"]
    return ["probe", *places, *small, *split, *more]


def run(tmp_path: Path, *more: str) -> dict:
    main("evaluate", arguments(tmp_path, *more))
    result: dict = json.loads((tmp_path / "out/probe.json").read_text())
    return result


def refusal(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    """The last line on stderr, with exit code 2 and no traceback."""
    with pytest.raises(SystemExit, match="2"):
        main("evaluate", given)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1].removeprefix("error: ")


def catalogs(tmp_path: Path, data_root: str, train: pc.Expression, test: pc.Expression) -> list[str]:
    """Flags that name two catalogs, each some rows of the dataset."""
    whole = scan_dataset(data_root, DataConfig(val_fraction=0, test_fraction=0.25)).catalog
    given = ["--data_root", data_root]
    for name, rows in (("train", train), ("test", test)):
        write_catalog(whole.filter(rows), str(tmp_path / f"{name}.parquet"))
        given += [f"--{name}_catalog", str(tmp_path / f"{name}.parquet")]
    return given


TRAIN, TEST = pc.field("split") == "train", pc.field("split") == "test"


def test_classes_that_colour_tells_apart_are_recognised_and_a_second_probe_runs_no_extractor(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, "--data_root", dataset)
    assert result["balanced_accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["test"]["images"] == dict.fromkeys(ISIC7.codes, 4)  # 2 of 8 lesions, 2 photographs each
    assert result["test"]["lesions"] == dict.fromkeys(ISIC7.codes, 2)
    assert result["train"]["images"] == dict.fromkeys(ISIC7.codes, 12)
    assert (np.array(result["confusion"]) == 4 * np.eye(7)).all()
    assert result["extracted"] == 112
    said = capsys.readouterr()
    first = said.err.splitlines()[0]
    assert first.startswith("linear probe of efficientnet-lite0-")
    assert "-32-official on cpu: fits on 84 images (train split" in first
    shown = " ".join(said.out.split())
    for part in ("balanced accuracy", "0.797", "0.58", "100% of a class's images are recognised"):
        assert part in shown
    with (tmp_path / "out/probe.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["score"] for row in rows] == ["accuracy", "balanced accuracy", "macro-F1"] + ["recall"] * 7
    assert [row["class"] for row in rows[3:]] == list(ISIC7.codes)
    assert float(rows[2]["value"]) == result["macro_f1"]["value"]
    assert (rows[0]["images"], rows[0]["lesions"], rows[3]["images"]) == ("28", "14", "4")
    with Image.open(tmp_path / "out/probe.png") as picture:
        assert min(picture.size) > 400

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the extractor was loaded")

    monkeypatch.setattr(features, "load_feature_extractor", refuse)
    second = run(tmp_path, "--data_root", dataset)
    assert second["extracted"] == 0
    assert {**second, "extracted": 112, "seconds": 0, "created": ""} == {**result, "seconds": 0, "created": ""}


def test_a_pair_of_catalogs_is_used_whole(dataset: str, tmp_path: Path) -> None:
    other = paint(tmp_path / "other", dict.fromkeys(ISIC7.codes, 3), seed=1)
    for name, root in (("train", dataset), ("test", other)):
        write_catalog(scan_dataset(root, DataConfig()).catalog, str(tmp_path / f"{name}.parquet"))
    pair = ["--train_catalog", str(tmp_path / "train.parquet"), "--test_catalog", str(tmp_path / "test.parquet")]
    result = run(tmp_path, "--data_root", dataset, "--test_data_root", other, *pair)
    assert sum(result["train"]["images"].values()) == 112
    assert sum(result["test"]["images"].values()) == 42


def test_one_catalog_gives_its_own_train_and_test_split(dataset: str, tmp_path: Path) -> None:
    whole = scan_dataset(dataset, DataConfig(val_fraction=0.25, test_fraction=0.125)).catalog
    write_catalog(whole, str(tmp_path / "catalog.parquet"))
    result = run(tmp_path, "--data_root", dataset, "--train_catalog", str(tmp_path / "catalog.parquet"))
    assert sum(result["train"]["images"].values()) == 7 * 5 * 2  # of 8 lesions 2 validate and 1 tests
    assert sum(result["test"]["images"].values()) == 7 * 1 * 2


def test_a_lesion_or_an_image_on_both_sides_is_refused_by_name(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = pc.field("image_id") == "MEL_0_0"  # one photograph of a lesion, the other stays in train
    given = catalogs(tmp_path, dataset, ~leaked & (TRAIN | (pc.field("lesion_id") == "lesion_MEL_0_0")), TEST | leaked)
    message = refusal(capsys, arguments(tmp_path, *given))
    assert "1 lesion of the test images" in message
    assert "lesion_MEL_0_0;" in message

    given = catalogs(tmp_path, dataset, TRAIN, TEST)
    whole = scan_dataset(dataset, DataConfig(val_fraction=0, test_fraction=0.25)).catalog
    copied = whole.filter(TRAIN).slice(0, 1)
    copied = copied.set_column(copied.column_names.index("lesion_id"), "lesion_id", pa.array(["under another name"]))
    write_catalog(pa.concat_tables([whole.filter(TEST), copied]), str(tmp_path / "test.parquet"))
    message = refusal(capsys, arguments(tmp_path, *given))
    assert "1 image of the test images" in message
    assert f"{copied['sha256'][0].as_py()[:16]};" in message


def test_classes_that_one_side_lacks_are_told(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DF cannot be learned, so its recall is 0; VASC is not tested, so it is in no mean: 5 of 6 recalls are 1."""
    given = catalogs(tmp_path, dataset, TRAIN & (pc.field("label") != "DF"), TEST & (pc.field("label") != "VASC"))
    result = run(tmp_path, *given)
    assert result["balanced_accuracy"]["value"] == pytest.approx(5 / 6)
    assert result["recall"]["DF"]["value"] == 0
    assert "VASC" not in result["recall"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "no training images of DF: never called, recall 0" in shown
    assert "no test images of VASC: left out of every mean" in shown


def test_images_that_are_gone_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_root = paint(tmp_path / "skin", {"MEL": 8, "NV": 8})
    given = catalogs(tmp_path, data_root, TRAIN, TEST)
    (tmp_path / "skin/NV/NV_0_3.png").unlink()
    result = run(tmp_path, *given)
    assert result["unreadable"] == ["NV/NV_0_3.png: is not there"]
    assert sum(sum(result[side]["images"].values()) for side in ("train", "test")) == 31
    assert "left out: 1: NV/NV_0_3.png: is not there" in " ".join(capsys.readouterr().out.split())
    empty = tmp_path / "empty"
    empty.mkdir()
    given[given.index("--data_root") + 1] = str(empty)
    message = refusal(capsys, [*arguments(tmp_path, *given), "--cache_dir", str(tmp_path / "new")])
    assert message.startswith(f"probe: none of 32 images in {empty} can be read, the first: MEL/")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data_root is not set; name the folder"),
        (["--data_root", "/no/such/folder"], "data_root: /no/such/folder is not a folder"),
        (["--test_catalog", "t.parquet"], "test_catalog is given without train_catalog"),
        (["--test_data_root", "other"], "test_data_root is given without test_catalog"),
        (["--c", "0"], "c is 0.0; it must be a number above 0"),
        (["--bootstrap", "10"], "bootstrap is 10; it must be at least 100"),
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--device", "abacus"], "device is abacus, which cannot be used here"),
        (["--cache_dir", "s3://bucket/cache"], "cache_dir is s3://bucket/cache; it must be a folder of this machine"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, arguments(tmp_path, *given)).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--train_catalog", "none.parquet"], "catalog: none.parquet does not exist"),
        (["--data.test_fraction", "0"], "probe: the test side (test split of {root}) holds no image"),
        ([], "probe: the train side (train split of {root}) holds only images of NV; it needs two classes"),
    ],
)
def test_a_catalog_or_split_without_two_classes_is_refused(
    given: list[str], message: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = dataset if given else paint(tmp_path / "skin", {"NV": 8})
    found = refusal(capsys, arguments(tmp_path, "--data_root", root, *given))
    assert found.startswith(message.format(root=root))


def test_the_probe_shows_images_as_the_authors_do_unless_told() -> None:
    assert parse("evaluate probe", []).feature_extractor.crop == "official"
    assert parse("evaluate probe", ["--feature_extractor.input_size", "64"]).feature_extractor.crop == "official"
    assert parse("evaluate probe", ["--feature_extractor.crop", "whole"]).feature_extractor.crop == "whole"


def test_evaluating_nothing_in_particular_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, []).startswith("real is not set; name the folder")
    known = "evaluate, evaluate probe, evaluate pick"
    assert refusal(capsys, ["prob"]) == f"command evaluate prob is not known; choose from {known}"
    with pytest.raises(SystemExit, match="2"):
        main_from_shell(["evaluate", "probe", "--c", "-1"])
    assert capsys.readouterr().err == "error: c is -1.0; it must be a number above 0\n"


def test_two_classes_are_probed_as_seven_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_root = paint(tmp_path / "skin", {"BENIGN": 8, "MALIGNANT": 4})
    result = run(tmp_path, "--data_root", data_root)
    assert result["classes"] == ["BENIGN", "MALIGNANT"]
    assert result["train"]["images"] == {"BENIGN": 12, "MALIGNANT": 6}
    assert result["test"]["images"] == {"BENIGN": 4, "MALIGNANT": 2}
    assert result["test"]["lesions"] == {"BENIGN": 2, "MALIGNANT": 1}
    assert result["confusion"] == [[4, 0], [0, 2]]
    assert result["balanced_accuracy"]["value"] == 1
    assert result["notes"] == []
    assert "guessing: 50%" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "skin" / "metadata.csv").unlink()
    untold = run(tmp_path, "--data_root", data_root)
    assert untold["test"]["images"] == {"BENIGN": 4, "MALIGNANT": 2}
    assert untold["notes"][0].startswith("lesions: no table")
    assert "note: lesions: no table" in " ".join(capsys.readouterr().out.split())


def test_catalogs_of_two_sets_of_classes_are_refused_with_both_lists(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = {"train": dataset, "test": paint(tmp_path / "two", {"BENIGN": 2, "MALIGNANT": 2})}
    given = ["--data_root", dataset, "--test_data_root", roots["test"]]
    for name, root in roots.items():
        write_catalog(scan_dataset(root, DataConfig()).catalog, str(tmp_path / f"{name}.parquet"))
        given += [f"--{name}_catalog", str(tmp_path / f"{name}.parquet")]
    line = refusal(capsys, arguments(tmp_path, *given))
    assert "binary (BENIGN MALIGNANT)" in line
    assert f"isic7 ({' '.join(ISIC7.codes)})" in line
