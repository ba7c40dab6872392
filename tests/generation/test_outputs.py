"""The output folder: whole files, their provenance, one recipe a folder."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2d.errors import ConfigError
from m2d.generation.outputs import MANIFEST_NAME, RECORD_NAME, ImageFolder, Recipe, default_output, replacing
from m2d.generation.request import SampleRequest
from m2d.generation.settings import GenerateConfig

RECIPE = Recipe(
    checkpoint="ab" * 32,
    seed=0,
    solver="heun",
    steps=10,
    guidance_scale=1.5,
    guidance_interval=(0.0, 0.8),
    precision="no",
    feature="prior",
    feature_temperature=1.0,
)
REQUEST = SampleRequest(label="MEL", index=3, seed=2**62 + 1)
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_a_png_says_what_it_is(tmp_path: Path) -> None:
    ImageFolder.open(tmp_path, RECIPE).write_image(REQUEST, IMAGE)
    with Image.open(tmp_path / "MEL" / "MEL_000003.png") as image:
        assert np.array_equal(np.asarray(image), IMAGE)
        text = image.info
    assert text["Software"] == "M2D"
    assert text["synthetic"] == "true"
    assert (text["class"], text["index"], text["seed"]) == ("MEL", "3", str(2**62 + 1))
    assert text["checkpoint"] == "ab" * 32
    assert json.loads(text["settings"])["steps"] == 10


def test_the_manifest_has_a_row_an_image(tmp_path: Path) -> None:
    folder = ImageFolder.open(tmp_path, RECIPE)
    folder.write_image(REQUEST, IMAGE)
    folder.write_image(SampleRequest(label="DF", index=0, seed=1), IMAGE)
    rows = pq.read_table(folder.write_manifest()).to_pylist()
    assert [row["id"] for row in rows] == ["DF_000000", "MEL_000003"]
    mel = rows[1]
    assert mel["seed"] == 2**62 + 1
    assert mel["path"] == "MEL/MEL_000003.png"
    assert mel["sha256"] == hashlib.sha256((tmp_path / mel["path"]).read_bytes()).hexdigest()
    assert (mel["width"], mel["height"], mel["solver"], mel["guidance_high"]) == (16, 16, "heun", 0.8)
    assert mel["created"].tzinfo is not None


def test_the_manifest_marks_the_images_of_a_weak_class(tmp_path: Path) -> None:
    folder = ImageFolder.open(tmp_path, RECIPE, ["DF"])
    folder.write_image(REQUEST, IMAGE)
    folder.write_image(SampleRequest(label="DF", index=0, seed=1), IMAGE)
    rows = pq.read_table(folder.write_manifest()).to_pylist()
    assert [(row["class"], row["feature_weak"]) for row in rows] == [("DF", True), ("MEL", False)]
    assert {(row["feature"], row["feature_temperature"]) for row in rows} == {("prior", 1.0)}


def test_a_folder_is_continued(tmp_path: Path) -> None:
    first = ImageFolder.open(tmp_path, RECIPE)
    first.write_image(REQUEST, IMAGE)
    assert ImageFolder.open(tmp_path, RECIPE).images == first.images


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no text", "not an image"])
def test_a_broken_image_counts_as_missing(tmp_path: Path, damage: str) -> None:
    folder = ImageFolder.open(tmp_path, RECIPE)
    folder.write_image(REQUEST, IMAGE)
    path = folder.path_of(REQUEST)
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[:-20])
        case "flipped":
            path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        case "empty":
            path.write_bytes(b"")
        case "no text":
            Image.fromarray(IMAGE).save(path)
        case _:
            path.write_text("hello")
    assert ImageFolder.open(tmp_path, RECIPE).images == {}


def test_an_image_of_another_recipe_or_place_counts_as_missing(tmp_path: Path) -> None:
    other = ImageFolder.open(tmp_path / "other", replace(RECIPE, steps=99))
    other.write_image(REQUEST, IMAGE)
    folder = ImageFolder.open(tmp_path / "ours", RECIPE)
    folder.write_image(REQUEST, IMAGE)
    folder.path_of(REQUEST).write_bytes(other.path_of(REQUEST).read_bytes())
    assert ImageFolder.open(tmp_path / "ours", RECIPE).images == {}


def test_two_recipes_never_share_a_folder(tmp_path: Path) -> None:
    ImageFolder.open(tmp_path, RECIPE)
    with pytest.raises(ConfigError, match="steps 10 there, 25 here") as caught:
        ImageFolder.open(tmp_path, replace(RECIPE, steps=25))
    assert "name another --output" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_record_is_not_trusted(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD_NAME).write_text(content)
    with pytest.raises(ConfigError, match="holds images of other settings"):
        ImageFolder.open(tmp_path, RECIPE)


@pytest.mark.parametrize("taken", ["MEL", MANIFEST_NAME])
def test_a_folder_that_m2d_did_not_start_is_left_alone(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    with pytest.raises(ConfigError, match=f"holds {taken} but no {RECORD_NAME}"):
        ImageFolder.open(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_an_output_that_is_a_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        ImageFolder.open(tmp_path / "file", RECIPE)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_midway() -> None:
        with replacing(path) as stream:
            stream.write(b"new")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail_midway()
    assert [(child.name, child.read_bytes()) for child in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "cd" * 32},
        {"seed": 1},
        {"solver": "euler"},
        {"steps": 11},
        {"guidance_scale": 2.0},
        {"guidance_interval": (0.1, 0.8)},
        {"precision": "bf16"},
        {"feature": "none"},
        {"feature_temperature": 0.5},
        {"mode": "interpolate"},
    ],
)
def test_everything_that_shapes_pixels_is_in_the_hash(change: dict[str, object]) -> None:
    assert replace(RECIPE, **change).hash != RECIPE.hash  # type: ignore[arg-type]


def test_how_many_images_and_how_they_are_batched_is_not_in_the_hash() -> None:
    configs = [
        GenerateConfig(checkpoint="c", guidance_scale=2),
        GenerateConfig(
            checkpoint="c", guidance_scale=2.0, num_samples=99, classes="MEL", batch_size=1, output="elsewhere"
        ),
    ]
    one, other = (Recipe.of(config, checkpoint_sha256="ab", precision="no", feature="prior") for config in configs)
    assert one.hash == other.hash


def test_a_recipe_says_how_features_were_drawn_or_that_none_were() -> None:
    asked = GenerateConfig(checkpoint="c", feature_temperature=0.5)
    drawn = Recipe.of(asked, checkpoint_sha256="ab", precision="no", feature="prior")
    assert (drawn.feature, drawn.feature_temperature) == ("prior", 0.5)
    alone = Recipe.of(GenerateConfig(checkpoint="c"), checkpoint_sha256="ab", precision="no", feature="none")
    assert (alone.feature, alone.feature_temperature) == ("none", None)


def test_images_lie_in_the_experiment_of_their_checkpoint() -> None:
    inside = default_output("/e/ham/checkpoints/step_10", RECIPE)
    assert inside == Path("/e/ham/generated_images") / RECIPE.hash
    assert default_output("/e/exported", RECIPE) == Path("/e/generated_images") / RECIPE.hash
