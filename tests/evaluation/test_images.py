"""Which images stand on which side, decoded to one size, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2d.classes import ISIC8
from m2d.data.catalog import scan_dataset, write_catalog
from m2d.data.decode import decode_resized
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError, DataError
from m2d.evaluation.images import PIXELS, read_image_sets, with_pixels
from m2d.evaluation.settings import EvaluateConfig
from m2d.models.checkpoint import Checkpoint

COUNTS = {"DF": 10, "MEL": 10, "NV": 20}


@pytest.fixture
def real(tmp_path: Path, paint_images: Any) -> Path:
    paint_images(tmp_path / "real", COUNTS)
    return tmp_path / "real"


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    """Two DF and one MEL of 24 px; the two DF are the same bytes."""
    folder = tmp_path / "generated"
    generator = np.random.default_rng(1)
    for label in ("DF", "MEL"):
        (folder / label).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / label / "a.png")
    shutil.copy(folder / "DF" / "a.png", folder / "DF" / "b.png")
    return folder


def read(
    tmp_path: Path, real: Path, generated: Path, checkpoint: Checkpoint | None = None, **more: Any
) -> SimpleNamespace:
    """train, test, generated and notes."""
    config = EvaluateConfig(real=str(real), generated=str(generated), cache_dir=str(tmp_path / "cache"), **more)
    notes: list[str] = []
    return SimpleNamespace(**read_image_sets(config, checkpoint, notes), notes=notes)


def test_the_real_images_are_split_by_lesion_and_all_are_of_the_generated_size(
    tmp_path: Path, real: Path, generated: Path
) -> None:
    (generated / "MEL" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    sets = read(tmp_path, real, generated)
    assert {sets.train.image_size, sets.test.image_size, sets.generated.image_size} == {24}
    assert not set(sets.train.groups) & set(sets.test.groups)
    assert sets.train.counts == {"DF": 8, "MEL": 8, "NV": 16}
    assert sets.test.counts == {"DF": 1, "MEL": 1, "NV": 2}
    assert sets.generated.counts == {"DF": 2, "MEL": 1}, "a generator that repeats itself is seen to"
    for part in ("1 generated images are exact repeats", "no generated image of NV", "left out MEL/broken.png"):
        assert any(part in note for note in sets.notes), part


def test_pixels_are_the_files_own_in_the_sets_order(tmp_path: Path, real: Path, generated: Path) -> None:
    sets = read(tmp_path, real, generated, image_size=16)
    for row in (0, len(sets.train) - 1):
        encoded = Path(sets.train.paths[row]).read_bytes()
        assert np.array_equal(sets.train.pixels[row], decode_resized(encoded, 16, max_pixels=10**6))


def test_training_images_from_a_folder_of_their_own_leave_all_of_real_unseen(
    tmp_path: Path, real: Path, generated: Path, paint_images: Any
) -> None:
    other = tmp_path / "other"
    (other / "MEL").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((30, 30, 3), 40 * number, np.uint8)).save(other / "MEL" / f"x{number}.png")
    sets = read(tmp_path, other, generated, train=str(real))
    assert (len(sets.train), sets.test.counts) == (40, {"MEL": 3})


def test_a_lesion_or_an_image_on_both_sides_is_refused_with_its_name(
    tmp_path: Path, real: Path, generated: Path
) -> None:
    copy = tmp_path / "copy" / "NV"
    copy.mkdir(parents=True)
    shutil.copy(real / "NV" / "NV_0.png", copy / "renamed.png")
    with pytest.raises(DataError, match=r"1 image of the test images .* is among the training images") as caught:
        read(tmp_path, copy.parent, generated, train=str(real))
    assert "\n" not in str(caught.value)
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(copy / "NV_3.png")  # of the lesion NV_3, by its name
    with pytest.raises(DataError, match=r"1 lesion of the test images .*: NV_3; leave them out"):
        read(tmp_path, copy.parent, generated, train=str(real))


def test_a_generated_class_that_no_real_image_has_is_refused(tmp_path: Path, real: Path, generated: Path) -> None:
    shutil.copytree(generated / "DF", generated / "VASC")
    with pytest.raises(DataError, match="images of VASC, the real training images are of DF MEL NV"):
        read(tmp_path, real, generated)


def test_a_file_gone_since_the_scan_is_left_out_and_named(
    tmp_path: Path, real: Path, generated: Path, prior_checkpoint: Checkpoint
) -> None:
    """The catalog of an experiment still lists it."""

    experiment = tmp_path / "experiment"
    (experiment / "cache").mkdir(parents=True)
    catalog = scan_dataset(str(real), DataConfig()).catalog
    write_catalog(catalog, str(experiment / "cache" / "catalog.parquet"))
    gone = next(row["path"] for row in catalog.to_pylist() if row["split"] == "train")
    (real / gone).unlink()
    info = replace(prior_checkpoint.info, config={"data_root": str(real)})
    checkpoint = replace(prior_checkpoint, path=str(experiment / "checkpoints" / "best"), info=info)
    sets = read(tmp_path, real, generated, checkpoint=checkpoint)
    assert len(sets.train) == 31
    assert any(f"{gone}: is not there" in note for note in sets.notes)
    assert any("the checkpoint's own" in note for note in sets.notes)


def test_every_side_is_of_the_set_of_the_checkpoint_or_of_the_training_images(
    tmp_path: Path, real: Path, generated: Path, prior_checkpoint: Checkpoint, paint_images: Any
) -> None:
    """Seven classes hold DF, MEL and NV as well; in eight, those after NV have other indices."""
    paint_images(tmp_path / "more", {"VASC": 10, "MEL": 10})
    shutil.rmtree(generated / "DF")
    checkpoint = replace(prior_checkpoint, info=replace(prior_checkpoint.info, classes=ISIC8))
    sets = read(tmp_path, tmp_path / "more", generated, checkpoint=checkpoint)
    assert {one.classes.name for one in (sets.train, sets.test, sets.generated)} == {"isic8"}
    assert set(sets.train.labels) == {4, 7}
    assert sets.generated.labels.tolist() == [4]
    paint_images(tmp_path / "two", {"BENIGN": 5, "MALIGNANT": 5})
    lists = r"two is of binary \(BENIGN MALIGNANT\), --train .*/real of isic7 \(AKIEC BCC BKL DF MEL NV VASC\)"
    with pytest.raises(DataError, match=lists) as caught:
        read(tmp_path, tmp_path / "two", generated, train=str(real))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shards", "has no class folder .found: shards.; only --format folder can be evaluated"),
        (None, "is not a folder"),
    ],
)
def test_a_generated_folder_that_is_none_is_one_line(
    tmp_path: Path, real: Path, content: str | None, message: str
) -> None:
    folder = tmp_path / "odd"
    if content:
        (folder / content).mkdir(parents=True)
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        read(tmp_path, real, folder)
    assert "\n" not in str(caught.value)


def test_what_was_decoded_once_is_not_decoded_again(
    tmp_path: Path, real: Path, generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(tmp_path, real, generated)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("m2d.evaluation.images.decode_resized", refuse)
    second = read(tmp_path, real, generated)
    assert np.array_equal(first.train.pixels, second.train.pixels)
    assert json.dumps(first.notes) == json.dumps(second.notes)


def test_pixels_are_kept_once_by_content(tmp_path: Path, real: Path, generated: Path) -> None:
    test = read(tmp_path, real, generated).test
    for _ in range(2):
        again = with_pixels(test, name="x", source="y", pixels=np.array(test.pixels), cache_dir=str(tmp_path / "new"))
    assert len(list((tmp_path / "new" / PIXELS).iterdir())) == 1
    assert np.array_equal(again.pixels, test.pixels)
