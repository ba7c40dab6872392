"""Which images stand on which side, decoded to one size, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_checkpoint import write_checkpoint
from tiny_sets import image_set

from m2d.classes import ISIC8
from m2d.data.catalog import scan_dataset, write_catalog
from m2d.data.decode import decode_resized
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError, DataError
from m2d.evaluation.images import PIXELS, near_copies, read_image_sets, stored_pixels
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


def test_a_variation_is_of_its_lesion_and_is_left_out_where_that_is_tested(
    tmp_path: Path, real: Path, generated: Path
) -> None:
    of = {side: getattr(read(tmp_path, real, generated), side).groups for side in ("train", "test")}

    def read_with(lesion: str) -> SimpleNamespace:
        sha256 = hashlib.sha256((generated / "MEL" / "a.png").read_bytes()).hexdigest()
        pq.write_table(pa.table({"sha256": [sha256], "lesion_id": [lesion]}), generated / "manifest.parquet")
        return read(tmp_path, real, generated)

    made = read_with(str(of["train"][0])).generated
    assert made.groups.tolist() == ["generated 0", "generated 1", of["train"][0]]
    left = read_with(str(of["test"][0]))
    assert left.generated.counts == {"DF": 2}
    assert "left out 1 generated images, variations of lesions that are tested" in left.notes
    inpainted = pq.read_table(generated / "manifest.parquet").to_pydict() | {"lesion_id": [str(of["train"][0])]}
    pq.write_table(pa.table(inpainted | {"skin_lesion_id": [str(of["test"][0])]}), generated / "manifest.parquet")
    assert read(tmp_path, real, generated).generated.counts == {"DF": 2}, "by the lesion whose skin it took"
    pa_csv.write_csv(pq.read_table(generated / "manifest.parquet"), generated / "metadata.csv")  # as an export has it
    (generated / "manifest.parquet").unlink()
    assert read(tmp_path, real, generated).generated.counts == {"DF": 2}
    shutil.rmtree(generated / "DF")
    with pytest.raises(DataError, match=r"^generated: all images of [^\n]+ are variations of lesions that are tested$"):
        read(tmp_path, real, generated)
    (generated / "metadata.csv").write_text(f"sha256,mode\n{inpainted['sha256'][0]},image2image\n")  # an older export's
    told = [note for note in read(tmp_path, real, generated).notes if "began from real ones" in note]
    assert told == ["1 generated images began from real ones of unnamed lesions, which may be tested"]


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


def made_by(checkpoint: Checkpoint, experiment: Path, catalog: pa.Table | None, **config: str) -> Checkpoint:
    """The checkpoint as that of an experiment with this catalog."""
    if catalog is not None:
        write_catalog(catalog, experiment / "cache" / "catalog.parquet")
    path = str(experiment / "checkpoints" / "best")
    return replace(checkpoint, path=path, info=replace(checkpoint.info, config=config))


def rows_of(catalog: pa.Table, column: str, *splits: str) -> set[str]:
    return {row[column] for row in catalog.to_pylist() if row["split"] in splits}


OTHER_SPLIT = DataConfig(split_seed=7, test_fraction=0.5, val_fraction=0)


def test_what_the_generator_was_trained_on_is_not_unseen_wherever_it_lies_now(
    tmp_path: Path, real: Path, generated: Path, prior_checkpoint: Checkpoint
) -> None:
    """By the file: the images lie elsewhere, under other names, and are split otherwise."""
    own = scan_dataset(str(real), DataConfig()).catalog
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted(real.glob("*/*.png"))):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.parent.name / f"{number}.png")
    checkpoint = made_by(prior_checkpoint, tmp_path / "experiment", own, data_root=str(real))
    before = sum(row["split"] == "test" for row in scan_dataset(str(moved), OTHER_SPLIT).catalog.to_pylist())
    sets = read(tmp_path, moved, generated, checkpoint=checkpoint, data=OTHER_SPLIT)
    assert sets.test.sha256
    assert set(sets.test.sha256) <= rows_of(own, "sha256", "val", "test")
    validated = set(sets.test.sha256) & rows_of(own, "sha256", "val")
    assert f"chose its best checkpoint by {len(validated)} of {before} test images" in " ".join(sets.notes)
    (note,) = [note for note in sets.notes if note.startswith("left out")]
    assert note.startswith(f"left out {before - len(sets.test)} of {before} test images, for they, or others")

    only = scan_dataset(str(moved), replace(OTHER_SPLIT, test_fraction=0.0)).catalog
    checkpoint = made_by(prior_checkpoint, tmp_path / "experiment", only, data_root=str(real))
    with pytest.raises(
        DataError, match=r"real: none of 20 test images .* is unseen, .* trained on by the generator"
    ) as one:
        read(tmp_path, moved, generated, checkpoint=checkpoint, data=OTHER_SPLIT)
    assert "\n" not in str(one.value)


def test_a_lesion_that_the_generator_saw_is_not_unseen_in_another_file(
    tmp_path: Path, real: Path, generated: Path, prior_checkpoint: Checkpoint
) -> None:
    """By the tables' names of lesions; without a table two datasets may call their files alike."""
    table = "image_id,lesion_id\n" + "".join(f"{path.stem},L_{path.stem}\n" for path in real.glob("*/*.png"))
    (real / "metadata.csv").write_text(table)
    own = scan_dataset(str(real), DataConfig()).catalog
    smaller = tmp_path / "smaller"
    for path in sorted(real.glob("*/*.png")):
        (smaller / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(12, expand=True).save(smaller / path.parent.name / path.name)
    checkpoint = made_by(prior_checkpoint, tmp_path / "experiment", own, data_root=str(real))
    unnamed = read(tmp_path, smaller, generated, checkpoint=checkpoint, data=OTHER_SPLIT)
    assert len(unnamed.test) == 20
    (smaller / "metadata.csv").write_text(table)
    named = read(tmp_path, smaller, generated, checkpoint=checkpoint, data=OTHER_SPLIT)
    assert set(named.test.groups) <= rows_of(own, "lesion_id", "val", "test")
    assert any(f"left out {20 - len(named.test)} of 20 test images" in note for note in named.notes)


def test_what_an_earlier_stage_was_trained_on_is_not_unseen_either(
    tmp_path: Path, real: Path, generated: Path, prior_checkpoint: Checkpoint
) -> None:
    """A decoder is tuned on the latents of a run that split otherwise; where a catalog is gone, the notes say so."""
    first, second = (scan_dataset(str(real), data).catalog for data in (DataConfig(split_seed=3), DataConfig()))
    earlier = write_checkpoint(prior_checkpoint, tmp_path / "earlier" / "checkpoints" / "best")
    config = {"data_root": str(real), "init_checkpoint": str(earlier)}
    checkpoint = made_by(prior_checkpoint, tmp_path / "experiment", second, **config)
    lost = f"whether the generator saw the test images is not known: {tmp_path / 'earlier/cache/catalog.parquet'}"
    sets = read(tmp_path, real, generated, checkpoint=checkpoint)
    assert set(sets.test.sha256) == rows_of(second, "sha256", "test")
    assert any(note.startswith(lost) for note in sets.notes)
    made_by(prior_checkpoint, tmp_path / "earlier", first)
    with pytest.raises(DataError, match=r"none of 4 test images .* is unseen"):
        read(tmp_path, real, generated, checkpoint=checkpoint)


def test_folds_test_every_lesion_but_those_that_the_generator_saw(
    tmp_path: Path, real: Path, generated: Path, prior_checkpoint: Checkpoint
) -> None:
    """Without a checkpoint nothing is known to be seen; with one its train split is trained on and never tested."""
    every = read(tmp_path, real, generated, folds=3)
    assert len(every.tested) == 40
    assert not hasattr(every, "known")
    own = scan_dataset(str(real), DataConfig()).catalog
    checkpoint = made_by(prior_checkpoint, tmp_path / "experiment", own, data_root=str(real))
    sets = read(tmp_path, real, generated, checkpoint=checkpoint, folds=3)
    assert set(sets.tested.sha256) == rows_of(own, "sha256", "val", "test")
    assert set(sets.known.sha256) == rows_of(own, "sha256", "train")
    gone = made_by(prior_checkpoint, tmp_path / "elsewhere", None, data_root=str(real))
    assert set(read(tmp_path, real, generated, checkpoint=gone, folds=3).tested.sha256) == set(sets.tested.sha256)


def test_in_folds_lesions_that_look_the_same_are_one_and_copies_of_what_is_tested_are_named(
    tmp_path: Path, real: Path, generated: Path
) -> None:
    Image.open(real / "NV" / "NV_0.png").transpose(Image.Transpose.ROTATE_90).save(real / "MEL" / "twin.png")
    shutil.copy(real / "MEL" / "MEL_3.png", generated / "MEL")
    sets = read(tmp_path, real, generated, folds=3)
    lesion = dict(zip((Path(path).stem for path in sets.tested.paths), sets.tested.groups, strict=True))
    assert lesion["twin"] == lesion["NV_0"]
    assert len(set(lesion.values())) == 40
    assert [Path(copy.real).stem for copy in sets.generated.copies] == ["MEL_3"]


def test_a_test_image_that_looks_the_same_as_a_training_image_is_left_out(
    tmp_path: Path, real: Path, generated: Path
) -> None:
    """Turned and saved anew, under another lesion's name: other bytes, the same photograph."""
    other = tmp_path / "other"
    paint_blobs(other / "NV", ["new_0", "new_1"], seed=5)
    (other / "MEL").mkdir()
    photograph = Image.open(real / "NV" / "NV_0.png")
    photograph.transpose(Image.Transpose.ROTATE_90).save(other / "MEL" / "twin.png")
    sets = read(tmp_path, other, generated, train=str(real))
    assert sorted(Path(path).stem for path in sets.test.paths) == ["new_0", "new_1"]
    (note,) = [note for note in sets.notes if note.startswith("left out 1 of 3 test images, ")]
    assert note.endswith("look the same as training images; none of MEL is left")


def paint_blobs(folder: Path, names: list[str], seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for name in names:
        pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{name}.png")


def test_generated_images_that_are_real_ones_are_named(tmp_path: Path, real: Path, generated: Path) -> None:
    """As the same file, of the test or the val split; and made smaller, turned or stretched."""
    catalog = scan_dataset(str(real), DataConfig()).catalog.to_pylist()
    of_split = {
        split: [real / row["path"] for row in catalog if row["split"] == split] for split in ("train", "val", "test")
    }
    same, saved = of_split["test"][:2]
    shutil.copy(same, generated / "DF" / "same.png")
    shutil.copy(of_split["val"][0], generated / "DF" / "val.png")
    shutil.copy(of_split["train"][0], generated / "DF" / "train.png")
    turned = Image.open(saved).crop((4, 0, 44, 40)).resize((24, 24)).transpose(Image.Transpose.ROTATE_180)
    turned.save(generated / "DF" / "turned.png")
    Image.open(saved).resize((64, 64)).save(generated / "DF" / "stretched.png")
    sets = read(tmp_path, real, generated, image_size=64)
    copies = {Path(one.generated).name: (Path(one.real).name, one.distance) for one in sets.generated.copies}
    assert set(copies) == {"same.png", "val.png", "turned.png", "stretched.png"}
    assert (copies["same.png"], copies["turned.png"][0]) == ((same.name, None), saved.name)
    assert 0 < copies["turned.png"][1] < 3e-3
    assert any("4 of 8 generated images are copies of unseen real images" in note for note in sets.notes)
    assert any("1 of 8 generated images are training images, byte for byte" in note for note in sets.notes)


def test_a_black_image_is_no_copy_of_another(tmp_path: Path) -> None:
    black, grey = (image_set([0], "x", pixels=np.full((1, 16, 16, 3), level, np.uint8)) for level in (0, 90))
    assert near_copies(black, grey)[0].tolist() == [-1]


def test_folders_of_generated_images_are_called_as_those_of_real_ones(
    tmp_path: Path, real: Path, generated: Path
) -> None:
    (generated / "DF").rename(generated / "my_fibromas")
    data = DataConfig(class_map={"my_fibromas": "DF"})
    assert read(tmp_path, real, generated, data=data).generated.counts == {"DF": 2, "MEL": 1}


def test_a_report_beside_the_class_folders_is_no_class(tmp_path: Path, real: Path, generated: Path) -> None:
    """Of an earlier evaluation, under any name; its tables say nothing of images."""
    expected = read(tmp_path, real, generated)
    for folder in (real / "report", generated / "evaluation"):
        folder.mkdir()
        (folder / "evaluation.json").write_text("{}")
        (folder / "classes.csv").write_text("class,train_images\nMEL,3\n")
        Image.new("RGB", (30, 30)).save(folder / "confusion.png")
    found = read(tmp_path, real, generated)
    assert (found.train.paths, found.generated.paths) == (expected.train.paths, expected.generated.paths)
    assert found.notes == expected.notes


def test_a_folder_of_runs_is_answered_with_the_runs_in_it(tmp_path: Path, real: Path, generated: Path) -> None:
    experiment = tmp_path / "experiment"
    for name in ("aaa", "bbb"):
        (experiment / "generated_images" / name).mkdir(parents=True)
        (experiment / "generated_images" / name / "generation.json").write_text("{}")
        for above in (experiment, experiment / "generated_images"):
            with pytest.raises(DataError, match=rf"--generated .*generated_images/(aaa or .*)?{name}$"):
                read(tmp_path, real, above)
    (generated / "generation.json").write_text("{}")
    (generated / "parts").mkdir()
    with pytest.raises(DataError, match="a run that has not ended"):
        read(tmp_path, real, generated)


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
        again = stored_pixels(
            str(tmp_path / "new"), test.sha256, test.pixels.shape, lambda out: np.copyto(out, test.pixels)
        )
    assert len(list((tmp_path / "new" / PIXELS).iterdir())) == 1
    assert np.array_equal(again, test.pixels)
