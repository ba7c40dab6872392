"""The whole evaluation on painted images and a tiny checkpoint: every part, its files, its way back after a kill."""

import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint, write_checkpoint
from tiny_sets import feature_set, image_set

from m2d.classes import BINARY, ISIC7, ISIC8, ClassSet
from m2d.cli import main, parse
from m2d.cluster.nodes import device_of_actor
from m2d.data.layouts import REPORT_FILES
from m2d.errors import ConfigError, DataError
from m2d.evaluation import evaluate as evaluate_module
from m2d.evaluation.classifiers.worth import Word
from m2d.evaluation.evaluate import evaluate, find_checkpoint
from m2d.evaluation.images import FeatureSet, ImageSet, reconstructions
from m2d.evaluation.report.page import typicality
from m2d.models.checkpoint import Checkpoint, checkpoint_sha256

COUNTS = {"DF": 24, "MEL": 40, "NV": 60}
SMALL = [
    "--image_size", "16", "--num_actors", "0", "--seeds", "1", "--bootstrap", "100", "--c", "0.01", "--ratios", "0.5,1",
    "--feature_extractor.name", "efficientnet-lite0", "--feature_extractor.input_size", "32",
    "--independent_extractor.input_size", "32", "--data.test_fraction", "0.3", "--data.val_fraction", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, paint_images: Any) -> tuple[Path, Path]:
    """Real images, and 12 generated ones of DF and of MEL."""
    root: Path = tmp_path_factory.mktemp("evaluate")
    paint_images(root / "real", COUNTS)
    paint_generated(root / "generated", {"DF": 12, "MEL": 12})
    return root / "real", root / "generated"


def flags(folders: tuple[Path, Path], tmp_path: Path, *more: str) -> list[str]:
    real, generated = folders
    places = ["--real", str(real), "--generated", str(generated), "--cache_dir", str(tmp_path / "cache")]
    return [*places, "--output", str(tmp_path / "out"), *SMALL, *more]


def test_every_part_is_answered_in_every_file(
    folders: tuple[Path, Path], tmp_path: Path, prior_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(prior_checkpoint, tmp_path / "run" / "checkpoints" / "best")
    every = ("--parts", "fidelity,memorization,downstream,consistency,privacy", "--privacy_lesions", "30")
    main("evaluate", flags(folders, tmp_path, "--checkpoint", str(checkpoint), "--preprocess", "autoencoder", *every))
    out = tmp_path / "out"
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["images"] for one in found["images"]] == [
        {"DF": 17, "MEL": 28, "NV": 42}, {"DF": 7, "MEL": 12, "NV": 18}, {"DF": 12, "MEL": 12},
    ]  # fmt: skip
    comparisons = {row["comparison"] for row in found["fidelity"][0]["rows"]}
    assert comparisons == {"generated", "floor", "unseen", "autoencoder"}
    assert [one["extractor"].split("-")[1] for one in found["fidelity"]] == ["lite1", "lite0"]
    assert found["worth"][0]["verdict"]["word"] in get_args(Word)
    assert [one["ratio"] for one in found["downstream"][0]["ratios"]] == [0.5, 1.0]
    assert found["autoencoder_downstream"]["generated"] == {"DF": 12, "MEL": 12}
    assert np.array(found["consistency"]["confusion"]).sum() == 24
    assert found["memorization"]["overall"]["generated"]["either"]["images"] == 24
    assert any("taken on trust" in note for note in found["notes"])
    privacy = found["privacy"]
    assert privacy["lesions"] == {"DF": 7, "MEL": 12, "NV": 18}
    assert privacy["membership"]["lesions"] == {"DF": 5, "MEL": 9, "NV": 14}, "30 of 37, as the classes have them"
    assert privacy["membership"]["condition"] == "class", "the tiny checkpoint names no extractor"
    assert not privacy["found"]
    plain, passed = found["worth"]
    assert plain["minus_original"] == {}
    assert passed["classifier"] == f"{plain['classifier']}, real images through the autoencoder"
    assert passed["arms"]["argmax: c"] != plain["arms"]["argmax: c"]

    page = (out / "evaluation.html").read_text(encoding="utf-8")
    assert found["worth"][0]["verdict"]["sentence"][1:] in page
    assert privacy["verdict"][1:].replace("'", "&#39;") in page
    assert "at argmax" in page[page.index("<h2>By class") : page.index("<h2>The images")]
    with (out / "privacy.csv").open(encoding="utf-8") as file:
        told = [(row["told by"], row["class"], row["measure"], float(row["value"])) for row in csv.DictReader(file)]
    area = privacy["membership"]["attacks"]["velocity error"]["auc"]["value"]
    assert told[0] == ("velocity error", "all", "AUC", area)
    assert told[-1][:2] == ("thumbnails", "all")
    worth = (out / "worth.csv").read_text(encoding="utf-8")
    for row, scores in passed["minus_original"].items():
        assert row in page
        assert f'{passed["classifier"]}",{row},melanoma_auprc,{scores["melanoma_auprc"]["value"]}' in worth
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"
    with (out / "classes.csv").open(encoding="utf-8") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["DF", "MEL", "NV"]
    assert rows["DF"]["generated_images"] == "12"
    assert rows["NV"]["generated_images"] == "0"
    assert rows["NV"]["kernel_distance_generated"] == ""
    assert float(rows["DF"]["recall_a"]) == found["downstream"][0]["arms"]["a"]["scores"]["recall_DF"]["value"]
    for name in ("fidelity", "memorization", "downstream"):
        assert len((out / f"{name}.csv").read_text(encoding="utf-8").splitlines()) > 2
    assert {path.name for path in out.iterdir()} <= REPORT_FILES | {"evaluation.json", "evaluation.html"}
    for path in out.glob("*.png"):
        assert min(Image.open(path).size) > 100
    shown = " ".join(capsys.readouterr().out.split())
    assert found["worth"][0]["verdict"]["word"] in shown.lower()
    assert "recall by training data, at argmax" in shown


def paint_generated(folder: Path, counts: dict[str, int]) -> None:
    generator = np.random.default_rng(7)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


@pytest.mark.parametrize(
    ("classes", "real", "train", "test", "made"),
    [
        (
            BINARY,
            {"BENIGN": 50, "MALIGNANT": 20},
            {"BENIGN": 35, "MALIGNANT": 14},
            {"BENIGN": 15, "MALIGNANT": 6},
            {"BENIGN": 8, "MALIGNANT": 8},
        ),
        (
            ISIC8,
            {"AKIEC": 10, "MEL": 30, "SCC": 20},
            {"AKIEC": 7, "MEL": 21, "SCC": 14},
            {"AKIEC": 3, "MEL": 9, "SCC": 6},
            {"MEL": 8, "SCC": 9},
        ),
    ],
    ids=["binary", "isic8"],
)
def test_another_set_of_classes_is_evaluated_and_reported(
    tmp_path: Path,
    paint_images: Any,
    capsys: pytest.CaptureFixture[str],
    classes: ClassSet,
    real: dict[str, int],
    train: dict[str, int],
    test: dict[str, int],
    made: dict[str, int],
) -> None:
    """The checkpoint's set; isic8 has a table of lesions, the binary set has none, which the report says."""
    paint_images(tmp_path / "real", real)
    if classes is ISIC8:
        lesions = "".join(f"{code}_{k},lesion_{code}_{k}\n" for code, count in real.items() for k in range(count))
        (tmp_path / "real" / "metadata.csv").write_text("image_id,lesion_id\n" + lesions)
    paint_generated(tmp_path / "generated", made)
    checkpoint = write_checkpoint(make_checkpoint(classes), tmp_path / "run" / "checkpoints" / "best")
    main(
        "evaluate",
        flags((tmp_path / "real", tmp_path / "generated"), tmp_path, "--checkpoint", str(checkpoint)),
    )
    out = tmp_path / "out"
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["images"] for one in found["images"]] == [train, test, made]
    assert found["class_set"]["name"] == classes.name
    assert found["consistency"]["classes"] == list(classes.codes)
    assert np.array(found["consistency"]["confusion"]).shape == (len(classes), len(classes))
    assert np.array(found["consistency"]["confusion"]).sum(axis=1).tolist() == [made.get(c, 0) for c in classes.codes]
    scores = found["downstream"][0]["arms"]["d"]["scores"]
    assert [name for name in scores if name.startswith("recall_")] == [f"recall_{code}" for code in real]
    assert ("melanoma_auprc" in scores) == ("MEL" in classes.codes)
    assert found["downstream"][0]["arms"]["d"]["images"] == {code: train[code] + made.get(code, 0) for code in train}
    assert list(found["memorization"]["classes"]) == list(made)
    assert any(note.startswith("lesions: no table") for note in found["notes"]) == (classes is BINARY)
    page = (out / "evaluation.html").read_text(encoding="utf-8")
    for code in made:
        assert classes.names[code] in page
        assert f"background:{classes.colours[code]}" in page
    with (out / "classes.csv").open(encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(real)
    assert " ".join(f"{code} {count}" for code, count in train.items()) in " ".join(capsys.readouterr().err.split())


def test_real_images_of_another_set_than_the_checkpoints_are_refused_with_both_lists(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(make_checkpoint(BINARY), tmp_path / "run" / "checkpoints" / "best")
    for more in ([], ["--data.classes", "isic7"]):
        with pytest.raises(SystemExit, match="2"):
            main("evaluate", flags(folders, tmp_path, "--checkpoint", str(checkpoint), *more))
        (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
        assert " ".join(ISIC7.codes) in line
        assert "BENIGN MALIGNANT" in line


def test_forty_classes_fit_the_page(tmp_path: Path, paint_images: Any) -> None:
    """Of long names; the set is the folders' own."""
    codes = [f"condition_of_the_skin_number_{number:02}" for number in range(40)]
    paint_images(tmp_path / "real", dict.fromkeys(codes, 5))
    paint_generated(tmp_path / "generated", dict.fromkeys(codes, 1))
    parts = ["--data.classes", "folders", "--parts", "fidelity,memorization,consistency"]
    asked = flags((tmp_path / "real", tmp_path / "generated"), tmp_path, *parts)
    out = evaluate(parse("evaluate", asked))
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert found["images"][2]["images"] == dict.fromkeys(codes, 1)
    with Image.open(out / "confusion.png") as picture:
        assert picture.height > 1200


def test_a_second_run_extracts_and_trains_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = flags(folders, tmp_path, "--parts", "downstream")
    evaluate(parse("evaluate", asked))
    first = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr("m2d.data.features.load_feature_extractor", refuse)
    monkeypatch.setattr("m2d.evaluation.classifiers.probe.ProbeClassifier.predict", refuse)
    evaluate(parse("evaluate", asked))
    second = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert second["downstream"] == first["downstream"]
    assert first["fidelity"] == []
    assert first["consistency"] is None
    assert first["memorization"] is None


def test_a_table_without_recall_has_no_word_on_it(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluate(parse("evaluate", flags(folders, tmp_path, "--parts", "memorization")))
    assert "recall" not in capsys.readouterr().out.replace(str(tmp_path), "")
    assert "Recall" not in (out / "evaluation.html").read_text(encoding="utf-8")


def test_nothing_of_an_earlier_report_stays_beside_a_new_one(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("evaluation.json", "sites.csv", "site_counts.csv", "confusion.png", "notes.csv", "photograph.png"):
        (out / name).touch()
    evaluate(parse("evaluate", flags(folders, tmp_path, "--parts", "memorization")))
    assert "earlier report" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "evaluation.html", "classes.csv", "memorization.csv", "generated.png", "unseen.png",
        "most_typical.png", "least_typical.png", "nearest_pairs.png", "notes.csv", "photograph.png",
    }  # fmt: skip


def test_of_one_class_what_can_be_asked_is_answered_and_the_report_is_no_class_the_next_time(
    tmp_path: Path, paint_images: Any
) -> None:
    paint_images(tmp_path / "real", {"MEL": 40})
    paint_generated(tmp_path / "generated", {"MEL": 8})
    asked = flags((tmp_path / "real", tmp_path / "generated"), tmp_path)
    del asked[asked.index("--output") : asked.index("--output") + 2]
    for _ in range(2):
        out = evaluate(parse("evaluate", asked))
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert out == tmp_path / "generated" / "evaluation"
    assert found["fidelity"]
    assert found["memorization"]
    assert (found["downstream"], found["consistency"]) == ([], None)
    for part in ("downstream", "consistency"):
        assert any(note.startswith(f"{part} was not measured: training and test images") for note in found["notes"])
    with pytest.raises(DataError, match=r"downstream was not measured: .* share too few classes .MEL."):
        evaluate(parse("evaluate", [*asked, "--parts", "downstream"]))


def test_without_a_checkpoint_privacy_is_of_the_images_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = evaluate(parse("evaluate", flags(folders, tmp_path, "--parts", "privacy")))
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert found["privacy"]["membership"] is None
    assert set(found["privacy"]["nearer"]) == {"features", "thumbnails"}
    lines = [note for note in found["notes"] if note.startswith("membership inference was not measured: no checkpoint")]
    assert len(lines) == 1


def test_folds_are_reported(folders: tuple[Path, Path], tmp_path: Path) -> None:
    more = {"parts": "downstream", "folds": "2", "classifiers": "logistic,finetune", "finetune.epochs": "0.1"}
    more |= {"finetune.model": "timm:test_resnet", "finetune.pretrained": "false", "finetune.input_size": "32"}
    asked = [word for name, value in (more | {"finetune.device": "cpu"}).items() for word in (f"--{name}", value)]
    out = evaluate(parse("evaluate", flags(folders, tmp_path, *asked)))
    worth, tuned = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["worth"]
    assert (worth["test"], tuned["test"]) == (COUNTS, COUNTS)
    assert (worth["folds"], len(worth["shares"])) == (2, 4)
    assert (tuned["folds"], tuned["seeds"], tuned["shares"], tuned["gains"]) == (2, [0, 1], [0.25] * 4, {})
    assert "in 2 folds, 2 times" in (out / "evaluation.html").read_text(encoding="utf-8")
    assert len((out / "worth.csv").read_text(encoding="utf-8").splitlines()) > 40


def test_test_images_among_the_generated_ones_are_listed_and_no_verdict_is_given(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[1], tmp_path / "merged")
    for path in (folders[0] / "MEL").iterdir():
        shutil.copy(path, tmp_path / "merged" / "MEL")
    out = evaluate(parse("evaluate", flags((folders[0], tmp_path / "merged"), tmp_path, "--parts", "downstream")))
    assert json.loads((out / "evaluation.json").read_text())["worth"][0]["verdict"]["word"] == "no verdict"
    assert len((out / "copies.csv").read_text().splitlines()) == 1 + 12
    assert '<div class="answer open">' in (out / "evaluation.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--image_size", "16"], "does not say what made it and no --checkpoint is given"),
        (["--image_size", "24", "--checkpoint", "checkpoints/best"], "it is of 16 px; set --image_size to it"),
    ],
    ids=["no checkpoint", "another size"],
)
def test_an_autoencoder_that_cannot_be_used_to_preprocess_is_one_line(
    folders: tuple[Path, Path], tmp_path: Path, prior_checkpoint: Checkpoint, given: list[str], message: str
) -> None:
    write_checkpoint(prior_checkpoint, tmp_path / "checkpoints" / "best")
    given = [one.replace("checkpoints", str(tmp_path / "checkpoints")) for one in given]
    with pytest.raises(ConfigError, match=f"^preprocess is autoencoder, but .*{message}") as caught:
        evaluate(parse("evaluate", flags(folders, tmp_path, "--preprocess", "autoencoder", *given)))
    assert "\n" not in str(caught.value)


def test_one_network_as_both_extractors_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    asked = parse("evaluate", flags(folders, tmp_path, "--independent_extractor.name", "efficientnet-lite0"))
    with pytest.raises(ConfigError, match="the same network as feature_extractor"):
        evaluate(asked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--parts", "fidelity,beauty"], "parts is fidelity,beauty; choose some of fidelity memorization downstream"),
        (["--parts", ""], "parts is empty; choose some of"),
        (["--classifiers", "svm"], "classifiers is svm; choose some of logistic finetune"),
        (["--ratios", "1,x"], "ratios is 1,x; it must be numbers"),
        (["--ratios", "0"], "ratios is 0; each must be above 0"),
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--folds", "0"], "folds is 0; it must be at least 1"),
        (["--setting", "hospital"], "setting is hospital; choose one of same site"),
        (["--setting", "site", "--preprocess", "autoencoder"], "preprocess is autoencoder; setting site"),
        (["--setting", "site", "--ratios", "0.5,1"], "ratios is 0.5,1; setting site does not use it"),
        (["--setting", "site", "--folds", "1"], "folds is 1; with setting site it must be at least 2"),
        (["--site_share", "0.1,x"], "site_share is 0.1,x; it must be numbers"),
        (["--site_share", "10"], "site_share is 10; each must be above 0 and below 1"),
        (["--site_share", "0.1"], "site_share is 0.1; setting same does not use it"),
        (["--site_share", ""], "site_share is empty; each must be above 0 and below 1"),
        (["--output", "s3://bucket"], "output is s3://bucket; it must be a folder of this machine"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse("evaluate", given)
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_one_line(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="2"):
        main("evaluate", flags(folders, tmp_path, "--parts", "consistency", "--output", str(tmp_path / "file" / "x")))
    assert re.search(r"^error: output: .* cannot be written", capsys.readouterr().err, re.MULTILINE)


@pytest.fixture
def run(tmp_path: Path, prior_checkpoint: Checkpoint) -> tuple[Path, Path]:
    """A checkpoint, and a folder of images that it made, where `m2d generate` leaves them."""
    checkpoint = write_checkpoint(prior_checkpoint, tmp_path / "run" / "checkpoints" / "best")
    images = tmp_path / "run" / "generated_images" / "abc"
    images.mkdir(parents=True)
    record = json.dumps({"checkpoint": checkpoint_sha256(checkpoint), "steps": 25})
    (images / "generation.json").write_text(record, encoding="utf-8")
    return checkpoint, images


def test_the_checkpoint_is_found_around_its_images_and_noted_where_it_is_gone(run: tuple[Path, Path]) -> None:
    checkpoint, images = run
    found, notes = find_checkpoint(str(images), None)
    assert found is not None
    assert Path(found).samefile(checkpoint)
    assert notes == []
    shutil.rmtree(checkpoint)
    found, notes = find_checkpoint(str(images), None)
    assert found is None
    assert "was not found around them" in notes[0]
    found, notes = find_checkpoint(str(images.parent), None)
    assert found is None
    assert "does not say what made it" in notes[0]


def test_another_checkpoint_than_the_images_own_is_refused(
    run: tuple[Path, Path], tmp_path: Path, prior_checkpoint: Checkpoint
) -> None:
    _, images = run
    other = write_checkpoint(replace(prior_checkpoint, prior=None), tmp_path / "other")
    with pytest.raises(ConfigError, match="did not make the images"):
        find_checkpoint(str(images), str(other))


def test_typicality_is_the_mean_distance_to_the_nearest_of_the_class() -> None:
    """Standardised, the training features of a class are the two unit axes; a generated one lies on the first."""

    def features(cls: list[list[float]]) -> FeatureSet:
        return feature_set(image_set([0] * len(cls)), np.array(cls))

    train = features([[1, 0], [-1, 0], [0, 1], [0, -1]])
    found = typicality(train, features([[3, 0]]))
    np.testing.assert_allclose(found, [(0 + 1 + 1 + 2) / 4], atol=1e-6)


def test_small_sets_start_no_ray(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Ray was started for a few images")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(evaluate_module, "ray_cluster", refuse)
    asked = flags(folders, tmp_path, "--parts", "consistency")
    asked[asked.index("--num_actors") + 1] = "null"
    assert (evaluate(parse("evaluate", asked)) / "evaluation.html").is_file()


@pytest.mark.parametrize(("asked", "given"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")])
def test_a_task_sees_the_gpu_that_it_reserves_as_its_first(asked: str, given: str) -> None:
    assert device_of_actor(asked) == given


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    return image_set([0] * 7, "test", pixels=pixels)


@pytest.mark.parametrize(("batch_size", "at_once"), [(None, [7]), (3, [3, 3, 1])])
def test_reconstructions_are_the_decoded_posterior_means(
    prior_checkpoint: Checkpoint, images: ImageSet, tmp_path: Path, batch_size: int | None, at_once: list[int]
) -> None:
    vae = prior_checkpoint.autoencoder.vae
    with torch.no_grad():
        pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = prior_checkpoint.autoencoder.vae.decode(
            prior_checkpoint.autoencoder.vae.encode(pixels).latent_dist.mean
        ).sample
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    seen: list[int] = []
    handle = vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    redrawn = reconstructions(images, prior_checkpoint, device="cpu", cache_dir=str(tmp_path), batch_size=batch_size)
    handle.remove()
    np.testing.assert_allclose(redrawn.pixels, expected, atol=0.501)
    assert seen == at_once


def test_reconstructions_are_kept_by_checkpoint_and_pixels(
    prior_checkpoint: Checkpoint, images: ImageSet, tmp_path: Path
) -> None:
    again = partial(reconstructions, device="cpu", cache_dir=str(tmp_path))
    first = again(images, prior_checkpoint)
    seen: list[int] = []
    handle = prior_checkpoint.autoencoder.vae.decoder.register_forward_pre_hook(lambda *_: seen.append(1))
    second = again(replace(images, name="train", sha256=()), prior_checkpoint)
    assert seen == []
    assert second.sha256 == first.sha256 == tuple(sha256(image.tobytes()).hexdigest() for image in first.pixels)
    assert np.array_equal(second.pixels, first.pixels)
    again(images, replace(prior_checkpoint, sha256="1" * 64))
    again(replace(images, pixels=255 - images.pixels), prior_checkpoint)
    assert seen == [1, 1]
    handle.remove()


def test_a_batch_that_does_not_fit_is_a_one_line_error(
    prior_checkpoint: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(prior_checkpoint.autoencoder, "decode", full)
    with pytest.raises(ConfigError, match="try --batch_size 3 ") as caught:
        reconstructions(images, prior_checkpoint, device="cpu", cache_dir=str(tmp_path), batch_size=6)
    assert "\n" not in str(caught.value)
