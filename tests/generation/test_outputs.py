"""The output folder: whole files, their provenance, one recipe a folder, and what is done stays done."""

import errno
import hashlib
import io
import json
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2d.errors import ConfigError
from m2d.generation.output import (
    MANIFEST_NAME,
    PARTS,
    RECORD_NAME,
    OutputFolder,
    Recipe,
    attempts_left,
    experiment_of,
    group_name,
)
from m2d.generation.plan import PLAN_SCHEMA, PlanRow, retried, table_of
from m2d.generation.settings import GateConfig, GenerateConfig
from m2d.generation.workers import GroupWriter
from tests.generation.conftest import RECIPE, row

MEL, DF = row(), row("DF", 0, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
FORMATS = ["folder", "webdataset", "parquet"]


def write(root: Path, rows: list[PlanRow], recipe: Recipe = RECIPE, **settings: Any) -> None:
    """As a run does: a group of images, in whatever folder."""
    writer = GroupWriter(root=root, recipe=recipe, gates=GateConfig(enabled=False), **settings)
    writer.write(rows, np.stack([IMAGES[row.index % 2] for row in rows]), None)


def ids(root: Path, recipe: Recipe = RECIPE) -> list[str]:
    """Of the images that a run would not make again."""
    with closing(OutputFolder(root, recipe)) as folder:
        return folder.accepted["id"].to_pylist()


def manifest(root: Path) -> list[dict[str, Any]]:
    with closing(OutputFolder(root, RECIPE)) as folder:
        folder.settle(PLAN_SCHEMA.empty_table())
    return pq.read_table(root / MANIFEST_NAME).to_pylist()


def begun(root: Path, **changes: Any) -> tuple[Path, Recipe]:
    recipe = replace(RECIPE, **changes)
    OutputFolder(root, recipe).close()
    return root, recipe


@pytest.fixture
def started(tmp_path: Path) -> Path:
    return begun(tmp_path)[0]


@pytest.fixture(params=FORMATS)
def in_format(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Recipe]:
    return begun(tmp_path, format=request.param)


def test_a_png_says_what_it_is(started: Path) -> None:
    write(started, [MEL])
    with Image.open(started / "MEL" / "MEL_000003.png") as image:
        assert np.array_equal(np.asarray(image), IMAGES[1])
        text = image.info
    assert text["Software"] == "M2D"
    assert text["synthetic"] == "true"
    assert (text["class"], text["index"], text["seed"]) == ("MEL", "3", str(2**62 + 1))
    assert text["checkpoint"] == "ab" * 32
    assert json.loads(text["settings"])["steps"] == 10
    assert json.loads(text["image"])["guidance_high"] == 0.8


def test_a_png_does_not_tell_where_its_reference_lay(started: Path) -> None:
    reference = replace(MEL, mode="image2image", feature="none", feature_temperature=None, strength=0.5)
    write(started, [replace(reference, reference="/home/somebody/patients/a.png")])
    assert b"somebody" not in (started / "MEL" / "MEL_000003.png").read_bytes()


def test_the_manifest_has_a_row_an_image_and_marks_those_of_a_weak_class(started: Path) -> None:
    write(started, [MEL, DF], weak_classes=frozenset(["DF"]))
    df, mel = manifest(started)
    assert (df["id"], mel["id"], mel["seed"], mel["path"]) == (
        "DF_000000",
        "MEL_000003",
        2**62 + 1,
        "MEL/MEL_000003.png",
    )
    assert mel["sha256"] == hashlib.sha256((started / mel["path"]).read_bytes()).hexdigest()
    assert (mel["width"], mel["height"], mel["solver"], mel["guidance_high"]) == (16, 16, "heun", 0.8)
    assert mel["gates"] == "off"
    assert mel["created"].tzinfo is not None
    assert (df["feature_weak"], mel["feature_weak"]) == (True, False)
    assert (mel["feature"], mel["feature_temperature"]) == ("prior", 1.0)


def test_a_folder_is_continued(in_format: tuple[Path, Recipe]) -> None:
    root, recipe = in_format
    write(root, [MEL, DF], recipe)
    assert ids(root, recipe) == ["DF_000000", "MEL_000003"]
    plan = table_of([DF, MEL, row("NV")])
    with closing(OutputFolder(root, recipe)) as folder:
        assert attempts_left(plan, folder.journal, 1)[0]["id"].to_pylist() == ["NV_000003"]


def test_the_same_group_written_twice_is_the_same_bytes_once(in_format: tuple[Path, Recipe]) -> None:
    """A task that Ray gives to another actor may have finished all the same."""
    root, recipe = in_format
    write(root, [MEL, DF], recipe)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.suffix in (".png", ".tar")}
    before |= {path: path.read_bytes() for path in (root / "shards").glob("*.parquet")}
    assert before
    write(root, [MEL, DF], recipe)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((root / PARTS).iterdir())) == 1
    assert ids(root, recipe) == ["DF_000000", "MEL_000003"]


def test_a_tar_shard_is_a_webdataset(tmp_path: Path) -> None:
    write(tmp_path, [MEL, DF], begun(tmp_path, format="webdataset")[1])
    [path] = (tmp_path / "shards").iterdir()
    with tarfile.open(path) as tar:
        names = tar.getnames()
        contents = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert names == [f"{key}.{suffix}" for key in ("MEL_000003", "DF_000000") for suffix in ("png", "cls", "json")]
    assert (contents["MEL_000003.cls"], contents["DF_000000.cls"]) == (b"4", b"3")
    assert json.loads(contents["DF_000000.json"])["seed"] == 1
    with Image.open(io.BytesIO(contents["MEL_000003.png"])) as image:
        assert np.array_equal(np.asarray(image), IMAGES[1])
        assert image.info["synthetic"] == "true"


def test_a_parquet_shard_holds_pngs(tmp_path: Path) -> None:
    write(tmp_path, [MEL, DF], begun(tmp_path, format="parquet")[1])
    rows = [entry for path in (tmp_path / "shards").iterdir() for entry in pq.read_table(path).to_pylist()]
    assert [(entry["id"], entry["class"], entry["label"]) for entry in rows] == [
        ("MEL_000003", "MEL", 4), ("DF_000000", "DF", 3)
    ]  # fmt: skip
    with Image.open(io.BytesIO(rows[0]["png"])) as image:
        assert np.array_equal(np.asarray(image), IMAGES[1])


def break_file(path: Path, damage: str) -> None:
    whole = path.read_bytes()
    middle = whole.index(b"IDAT") + 20
    contents = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "not an image": b"hello",
    }
    if damage == "gone":
        path.unlink()
    elif damage == "no text":
        Image.fromarray(IMAGES[1]).save(path)
    else:
        path.write_bytes(contents[damage])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no text", "not an image", "gone"])
def test_a_broken_image_counts_as_missing(started: Path, damage: str) -> None:
    write(started, [MEL, DF])
    break_file(started / "MEL" / "MEL_000003.png", damage)
    assert ids(started) == ["DF_000000"]
    write(started, [MEL])
    assert ids(started) == ["DF_000000", "MEL_000003"]


@pytest.mark.parametrize("format_name", ["webdataset", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_broken_shard_counts_as_missing_whole(tmp_path: Path, format_name: str, damage: str) -> None:
    _, recipe = begun(tmp_path, format=format_name)
    write(tmp_path, [MEL, DF], recipe)
    write(tmp_path, [row("NV")], recipe)
    path = next(path for path in (tmp_path / "shards").iterdir() if path.stem == group_name([MEL, DF]))
    break_file(path, damage)
    assert ids(tmp_path, recipe) == ["NV_000003"]
    assert not path.exists(), "half a shard would give its images twice"
    write(tmp_path, [MEL, DF], recipe)
    assert ids(tmp_path, recipe) == ["DF_000000", "MEL_000003", "NV_000003"]


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_torn_part_of_the_journal_costs_its_images_alone(started: Path, content: bytes) -> None:
    write(started, [MEL])
    write(started, [DF])
    (started / PARTS / f"{group_name([MEL])}.parquet").write_bytes(content)
    assert ids(started) == ["DF_000000"]
    write(started, [MEL])
    assert ids(started) == ["DF_000000", "MEL_000003"]


@pytest.mark.parametrize("file", [f"{PARTS}/{group_name([MEL])}.parquet", "MEL/MEL_000003.png"])
def test_what_the_disk_does_not_give_is_not_removed(started: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error, a stale network handle or a missing right says nothing about the content."""
    write(started, [MEL])
    there = Path.open

    def failing(path: Path, *arguments: Any, **more: Any) -> Any:
        if path == started / file:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return there(path, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", failing)
        with pytest.raises(ConfigError, match=rf"^output: .*{Path(file).name} cannot be read"):
            ids(started)
    assert ids(started) == ["MEL_000003"]


def test_parts_become_one_journal_and_nothing_counts_twice(started: Path) -> None:
    write(started, [MEL])
    write(started, [DF])
    manifest(started)
    assert not (started / PARTS).exists()
    write(started, [MEL])  # a writer that ended late
    write(started, [row("NV")])
    assert ids(started) == ["DF_000000", "MEL_000003", "NV_000003"]
    (started / "DF" / "DF_000000.png").unlink()
    assert ids(started) == ["MEL_000003", "NV_000003"], "it is struck from the journal"
    assert [entry["id"] for entry in manifest(started)] == ["MEL_000003", "NV_000003"]


def test_an_image_without_its_journal_does_not_count_and_leaves_nothing(in_format: tuple[Path, Recipe]) -> None:
    """What a killed run leaves: images written, not yet listed, and half-written files."""
    root, recipe = in_format
    write(root, [MEL], recipe)
    for part in (root / PARTS).iterdir():
        part.unlink()
    for suffix in ("partial", "tmp"):  # the second of older versions
        (root / f".manifest.parquet.host.1.1.{suffix}").write_bytes(b"half")
    assert ids(root, recipe) == []
    left = {path.name for path in root.rglob("*") if path.is_file()}
    assert left == {RECORD_NAME, ".running.lock"}


def test_files_of_the_user_are_left_alone(started: Path) -> None:
    (started / "MEL").mkdir()
    (started / "MEL" / "MEL_000001.png").write_bytes(b"mine")
    Image.fromarray(IMAGES[0]).save(started / "MEL" / "MEL_000002.png")
    assert ids(started) == []
    assert len(list((started / "MEL").iterdir())) == 2


def test_rejected_attempts_come_again_as_the_next_ones() -> None:
    journal = table_of([MEL, retried(MEL), DF])
    rejected = [False, False, False]
    journal = journal.append_column("accepted", [rejected])
    rounds = attempts_left(table_of([row("NV"), DF, MEL]), journal, 3)
    assert [table["id"].to_pylist() for table in rounds] == [["NV_000003"], ["DF_000000"], ["MEL_000003"]]
    assert [len(table) for table in attempts_left(table_of([MEL]), journal, 2)] == [0, 0]


@pytest.mark.parametrize(
    ("here", "text"),
    [
        ({"steps": 25}, "steps 10 there, 25 here.*name another --output"),
        ({"guide": None}, "guide efefefefefef there, None here"),
        ({"gates": {"blank": True, "near_copy_quantile": 0.2}}, "gates.near_copy_quantile 0.1 there, 0.2 here"),
    ],
)
def test_two_recipes_never_share_a_folder(tmp_path: Path, here: dict[str, Any], text: str) -> None:
    _, recipe = begun(tmp_path, gates={"blank": True, "near_copy_quantile": 0.1}, guide="ef" * 32)
    with pytest.raises(ConfigError, match=f"^[^\n]*{text}[^\n]*$"):
        OutputFolder(tmp_path, replace(recipe, **here))


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with closing(OutputFolder(tmp_path, RECIPE)), pytest.raises(ConfigError, match="another run"):
        OutputFolder(tmp_path, RECIPE)
    OutputFolder(tmp_path, RECIPE).close()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_record_is_not_trusted(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD_NAME).write_text(content)
    with pytest.raises(ConfigError, match="holds images of other settings"):
        OutputFolder(tmp_path, RECIPE)


def test_a_folder_of_an_m2d_that_lacked_a_field_is_continued_where_the_field_has_its_default(tmp_path: Path) -> None:
    older = {name: value for name, value in json.loads(RECIPE.to_json()).items() if name not in ("mode", "balance")}
    (tmp_path / RECORD_NAME).write_text(json.dumps(older))
    OutputFolder(tmp_path, RECIPE).close()
    with pytest.raises(ConfigError, match="mode"):
        OutputFolder(tmp_path, replace(RECIPE, mode="balance"))


@pytest.mark.parametrize("taken", ["MEL", MANIFEST_NAME, "shards"])
def test_a_folder_that_m2d_did_not_start_is_left_alone(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    with pytest.raises(ConfigError, match=f"holds {taken} but no {RECORD_NAME}"):
        OutputFolder(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_an_output_that_is_a_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        OutputFolder(tmp_path / "file", RECIPE)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "cd" * 32}, {"seed": 1}, {"solver": "euler"}, {"steps": 11}, {"guidance_scale": 2.0},
        {"guidance_interval": (0.1, 0.8)}, {"precision": "bf16"}, {"feature": "none"}, {"feature_temperature": 0.5},
        {"mode": "interpolate"}, {"format": "parquet"}, {"gates": {"blank": True}}, {"balance": {"to": "300"}},
        {"plan": "ef" * 32}, {"time_shift": 3.0}, {"guide": "ef" * 32},
    ],
)  # fmt: skip
def test_everything_that_shapes_pixels_is_in_the_hash(change: dict[str, Any]) -> None:
    assert replace(RECIPE, **change).hash != RECIPE.hash


def test_a_recipe_without_shift_and_guide_is_recorded_as_before_there_were_any() -> None:
    before = {
        "checkpoint", "seed", "solver", "steps", "guidance_scale", "guidance_interval", "precision", "feature",
        "feature_temperature", "mode", "format", "gates", "balance", "plan",
    }  # fmt: skip
    assert json.loads(RECIPE.to_json()).keys() == before
    used = replace(RECIPE, time_shift=3.0, guide="ef")
    assert json.loads(used.to_json()).keys() == before | {"time_shift", "guide"}
    assert used.is_read_from(used.to_json())
    assert not used.is_read_from(RECIPE.to_json())


def test_how_many_images_and_how_they_are_batched_is_not_in_the_hash() -> None:
    more = {"num_samples": 99, "classes": "MEL", "batch_size": 1, "output": "elsewhere", "num_actors": 4}
    configs = [
        GenerateConfig(checkpoint="c", guidance_scale=2),
        GenerateConfig(checkpoint="c", guidance_scale=2.0, **more),
    ]
    one, other = (Recipe.of(config, checkpoint="ab", precision="no", feature="prior") for config in configs)
    assert one.hash == other.hash


def test_a_recipe_says_how_features_were_drawn_or_that_none_were() -> None:
    asked = GenerateConfig(checkpoint="c", feature_temperature=0.5)
    drawn, alone = (Recipe.of(asked, checkpoint="ab", precision="no", feature=feature) for feature in ("prior", "none"))
    assert [(one.feature, one.feature_temperature) for one in (drawn, alone)] == [("prior", 0.5), ("none", None)]


def test_a_checkpoint_s_experiment_is_what_holds_its_checkpoints() -> None:
    assert experiment_of("/e/ham/checkpoints/step_10") == Path("/e/ham")
    assert experiment_of("/e/exported") == Path("/e")
