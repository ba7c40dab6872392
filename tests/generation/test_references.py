"""Input images pass the checks of training data, or are left out with a reason."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_references import SixFeatures, write_photograph, write_photographs

from m2d.errors import CheckpointError, ConfigError, DataError, M2DError
from m2d.generation.references import (
    Pasted,
    load_reference_extractor,
    read_masks,
    read_pasted,
    read_reference,
    read_references,
    read_region,
    read_sha256,
    require_dim,
)
from m2d.models.checkpoint import Checkpoint

REAL = Path(__file__).parents[3] / "shared" / "ham10000"


def fails_with(error: type[M2DError], text: str, call: object, *arguments: object, **named: object) -> None:
    with pytest.raises(error, match=text) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_the_class_of_an_image_is_its_folder_s_and_the_order_is_that_of_names(tmp_path: Path) -> None:
    for name in ("nv/b.png", "nv/a.png", "MEL/deep/1.jpg", "MEL/0.bmp"):
        write_photograph(tmp_path / name, hash(name) % 1000)
    found = read_references(str(tmp_path))
    names = {code: [str(Path(image.path).relative_to(tmp_path)) for image in of] for code, of in found.by_class.items()}
    assert names == {"MEL": ["MEL/0.bmp", "MEL/deep/1.jpg"], "NV": ["nv/a.png", "nv/b.png"]}
    assert list(found.by_class) == ["MEL", "NV"]
    assert found.rejected == ()


def test_what_cannot_be_used_is_listed_with_its_reason_and_hidden_files_are_not(tmp_path: Path) -> None:
    good = write_photograph(tmp_path / "MEL" / "good.png", 1)
    (tmp_path / "MEL" / "cut.png").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "MEL" / "empty.jpg").write_bytes(b"")
    (tmp_path / "MEL" / "notes.txt").write_text("melanoma")
    (tmp_path / "MEL" / ".hidden.png").write_bytes(b"")
    write_photograph(tmp_path / "MEL" / "tiny.png", 2, size=(4, 4))
    write_photograph(tmp_path / "loose.png", 3)
    (tmp_path / ".git").mkdir()
    found = read_references(str(tmp_path))
    assert [image.path for image in found.by_class["MEL"]] == [str(good)]
    reasons = dict(found.rejected)
    assert sorted(reasons) == ["MEL/cut.png", "MEL/empty.jpg", "MEL/notes.txt", "MEL/tiny.png", "loose.png"]
    assert reasons["MEL/empty.jpg"] == "the file is empty"
    assert "too small" in reasons["MEL/tiny.png"]
    assert "suffix" in reasons["MEL/notes.txt"]


def test_a_flat_folder_is_of_the_one_class_that_is_named(tmp_path: Path) -> None:
    write_photograph(tmp_path / "1.png", 1)
    (tmp_path / "more").mkdir()
    found = read_references(str(tmp_path), classes=["DF"])
    assert [image.label for image in found.by_class["DF"]] == ["DF"]
    assert found.rejected == (("more", "is a folder that is no class"),)
    for classes in (None, ["DF", "NV"]):
        fails_with(DataError, "name exactly one with --classes", read_references, str(tmp_path), classes=classes)


def test_only_the_classes_asked_for_are_read_and_each_must_be_there(tmp_path: Path) -> None:
    write_photographs(tmp_path, {"MEL": 2, "NV": 1})
    assert list(read_references(str(tmp_path), classes=["NV"]).by_class) == ["NV"]
    fails_with(DataError, "no usable image of DF, but of NV", read_references, str(tmp_path), classes=["DF", "NV"])


def test_folders_that_cannot_be_used_are_one_line_errors(tmp_path: Path) -> None:
    def fails(text: str, place: Path = tmp_path, **more: str) -> None:
        fails_with(DataError, text, read_references, str(place), **more)

    fails("^init_images: .*nowhere does not exist", tmp_path / "nowhere")
    fails("^reference_images_b: .*it is empty", setting="reference_images_b")
    (tmp_path / "file").write_text("x")
    fails("is a file", tmp_path / "file")
    (tmp_path / "MEL").mkdir()
    fails("holds no usable image")
    (tmp_path / "MEL" / "0.png").write_bytes(b"no image")
    fails("1 left out: MEL/0.png: the content is no image")
    (tmp_path / "wart").mkdir()
    fails("a folder that is no class: wart")


def test_a_uri_reads_like_a_path(tmp_path: Path) -> None:
    write_photographs(tmp_path, {"MEL": 2})
    here, there = read_references(str(tmp_path)), read_references(f"file://{tmp_path}")
    assert [image.sha256 for image in here.by_class["MEL"]] == [image.sha256 for image in there.by_class["MEL"]]
    assert there.by_class["MEL"][0].path == f"file://{tmp_path}/MEL/0.png"
    assert np.array_equal(*(read_reference(found.by_class["MEL"][0].path, 16) for found in (here, there)))


def test_a_reference_is_decoded_as_a_training_image(tmp_path: Path) -> None:
    """The shorter side to the size, the centre square of the longer."""
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 32:64] = (10, 200, 90)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    read = read_reference(str(tmp_path / "wide.png"), 16)
    assert read.shape == (16, 16, 3)
    assert (read[:, 2:14] == (10, 200, 90)).all()


def test_a_reference_that_went_away_is_a_one_line_error(tmp_path: Path) -> None:
    path = write_photograph(tmp_path / "a.png", 1)
    read_sha256([str(path)] * 3)
    gone = str(tmp_path / "gone.png")
    fails_with(DataError, "gone.png cannot be used", read_reference, gone, 16)
    fails_with(DataError, "1 of 2 input images cannot be used, the first is .*gone.png", read_sha256, [str(path), gone])


def extractor_of(checkpoint: Checkpoint, **config: object) -> Checkpoint:
    return replace(checkpoint, info=replace(checkpoint.info, config={"feature_extractor": config}, feature_dim=1280))


def test_the_extractor_is_the_one_that_guided_the_run(checkpoint: Checkpoint) -> None:
    guided = extractor_of(checkpoint, name="efficientnet-lite0", weights=None, input_size=64, crop="official")
    found = load_reference_extractor(guided)
    assert (found.name, found.input_size, found.crop, found.dim) == ("efficientnet-lite0", 64, "official", 1280)


def test_an_extractor_that_cannot_be_had_is_a_one_line_error(checkpoint: Checkpoint) -> None:
    fails_with(CheckpointError, "does not say which feature extractor", load_reference_extractor, checkpoint)
    lost = extractor_of(checkpoint, name="panderm-large", weights="/somewhere/panderm.pth", crop="whole")
    fails_with(ConfigError, "^extractor_weights: /somewhere/panderm.pth is not a file", load_reference_extractor, lost)
    fails_with(ConfigError, "extractor_weights: /x is not a file", load_reference_extractor, lost, "/x")
    other = extractor_of(checkpoint, name="efficientnet-lite0")
    other = replace(other, info=replace(other.info, feature_dim=6))
    fails_with(ConfigError, "have 1280 dimensions, those that guided .* have 6", load_reference_extractor, other)
    fails_with(ConfigError, "have 5 dimensions", require_dim, SixFeatures(dim=5), checkpoint)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/ham10000")
def test_real_photographs_are_all_usable() -> None:
    found = read_references(str(REAL), classes=["DF"])
    assert len(found.by_class["DF"]) == sum(1 for path in (REAL / "DF").iterdir() if path.suffix == ".jpg")
    assert found.rejected == ()
    assert torch.from_numpy(read_reference(found.by_class["DF"][0].path, 64)).float().std() > 5


def picture(path: Path, background: tuple[int, ...], lesion: tuple[int, ...], box: tuple[int, ...]) -> str:
    image = Image.new("RGB" if len(background) == 3 else "L", (96, 64), background if len(background) == 3 else 0)
    image.paste(lesion if len(lesion) == 3 else 255, box)
    image.save(path)
    return str(path)


def test_a_pasted_lesion_brings_its_skin_in_the_colours_of_the_other_and_covers_that_lesion(tmp_path: Path) -> None:
    """The centre square of 96 x 64 pixels begins at 16."""
    mine, other = (36, 20, 56, 40), (60, 30, 72, 44)
    pasted = Pasted(
        picture(tmp_path / "a.png", (100, 160, 50), (60, 40, 20), mine),
        picture(tmp_path / "a_segmentation.png", (0,), (255,), mine),
        picture(tmp_path / "b.png", (200, 120, 100), (10, 10, 10), other),
        picture(tmp_path / "b_segmentation.png", (0,), (255,), other),
    )
    found = read_pasted(pasted, 64)
    assert found[30, 30].tolist() == [120, 30, 40], "times 2, 0.75 and 2, as the skin"
    skin = np.ones((64, 64), bool)
    skin[18:42, 18:42] = False
    assert np.abs(found[skin].astype(int) - (200, 120, 100)).max() <= 1, "nothing of the other lesion"
    region = read_region((pasted.mask, pasted.skin_mask), 64)
    assert region[20:40, 20:40].min() > 0.95
    assert region[30:44, 44:56].min() > 0.95
    assert region[30, 17] < 0.5 < region[30, 18], "half way at 64 / 32 pixels"
    assert region[30, :15].max() == 0


def test_masks_are_found_by_name_at_any_depth_and_must_have_their_images_shape_and_a_lesion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "deep" / "whole_segmentation.png", (0,), (255,), (32, 0, 64, 64))
    picture(tmp_path / "dark_segmentation.png", (0,), (255,), (0, 0, 4, 4))
    picture(tmp_path / "square_segmentation.png", (0,), (255,), (32, 0, 64, 64))
    picture(tmp_path / "all_segmentation.png", (0,), (255,), (0, 0, 96, 64))
    picture(tmp_path / "whole_mask.png", (0,), (255,), (32, 0, 64, 64))
    (tmp_path / "cut_segmentation.png").write_bytes(b"PNG")
    (tmp_path / "licence.txt").write_text("CC-0")
    names = {"whole": 1.5, "dark": 1.5, "square": 1.0, "cut": 1.5, "all": 1.5, "lacking": 1.5}
    images = [(f"NV/{name}.jpg", name, ratio) for name, ratio in names.items()]
    found = read_masks(str(tmp_path), images, largest=0.6)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("masks: 1 of 6 images ")
    for reason, name in {
        "1 without a lesion": "dark_segmentation.png",
        "1 of another shape than its image": "square_segmentation.png",
        "1 unreadable": "cut_segmentation.png",
        "1 over 60% lesion": "all_segmentation.png",
        "1 of no image": "whole_mask.png",
    }.items():
        assert f"{reason}, such as {name}" in told
    with pytest.raises(DataError, match=r"^masks: no image has [^\n]+ 1 unreadable, such as cut_segmentation.png"):
        read_masks(str(tmp_path), [image for image in images if image[1] == "cut"])
    fails_with(DataError, "^masks: no image has .* holds no image", read_masks, str(tmp_path / "empty"), images)
    assert list(found) == ["whole"]
    assert found["whole"].path == str(tmp_path / "deep" / "whole_segmentation.png")
    assert found["whole"].share == pytest.approx(0.5, abs=0.02)
    fails_with(DataError, "^masks: .* cannot be listed", read_masks, str(tmp_path / "gone"), [])
