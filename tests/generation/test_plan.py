"""A plan holds everything that shapes its images, survives the disk, and is refused where a person broke it."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2d.classes import ISIC7
from m2d.data.catalog import CATALOG_SCHEMA
from m2d.data.settings import DataConfig
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.generation import plan
from m2d.generation.output import write_rows
from m2d.generation.plan import (
    PLAN_SCHEMA,
    PlanRow,
    check_plan,
    data_config_of,
    digest_of,
    image2image_plan,
    interpolation_plan,
    make_plan,
    masked_references,
    pasted_references,
    read_plan,
    retried,
    rows_of,
    seed_of,
    standard_plan,
    table_of,
    training_references,
)
from m2d.generation.references import Reference
from m2d.generation.settings import GenerateConfig
from m2d.models.checkpoint import CheckpointInfo

SAMPLING = SamplingSettings(solver="heun", steps=9, guidance_scale=2.0, guidance_interval=(0.1, 0.7))


def standard(counts: dict[str, int], **settings: Any) -> list[PlanRow]:
    return rows_of(standard_plan(counts, **{"run_seed": 4, "sampling": SAMPLING, "feature": "none", **settings}))


def references(counts: dict[str, int], folder: str = "a") -> dict[str, tuple[Reference, ...]]:
    def one(code: str, n: int) -> Reference:
        return Reference(path=f"/{folder}/{code}/{n}.png", label=code, sha256=f"{folder}{code}{n}")

    return {code: tuple(one(code, n) for n in range(count)) for code, count in counts.items()}


def image2image(counts: dict[str, int], **settings: Any) -> list[PlanRow]:
    chosen = {"num_samples": 3, "strength": 0.75, "run_seed": 4, "sampling": SAMPLING, **settings}
    return rows_of(image2image_plan(references(counts), **chosen))


def interpolation(a: dict[str, int], b: dict[str, int], **settings: Any) -> list[PlanRow]:
    chosen = {"steps_between": 3, "run_seed": 4, "sampling": SAMPLING, **settings}
    return rows_of(interpolation_plan(references(a), references(b, "b"), **chosen))


def first_64_bits_halved(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


def test_a_standard_plan_is_the_images_that_were_always_made() -> None:
    rows = standard({"DF": 3, "MEL": 3})
    assert [(row.id, row.label, row.index, row.seed) for row in rows] == [
        (f"{label}_{index:06d}", label, index, seed_of(f"4/{label}/{index}"))
        for index in range(3)
        for label in ("DF", "MEL")
    ]


def test_every_row_says_how_it_is_made() -> None:
    (row,) = standard({"MEL": 1}, feature="prior", feature_temperature=0.5)
    assert row == PlanRow(
        id="MEL_000000", label="MEL", index=0, seed=seed_of("4/MEL/0"), mode="standard", feature="prior",
        feature_temperature=0.5, solver="heun", steps=9, guidance_scale=2.0, guidance_low=0.1, guidance_high=0.7,
    )  # fmt: skip


def test_classes_take_turns_while_they_last() -> None:
    rows = standard({"AKIEC": 1, "BCC": 0, "DF": 3, "NV": 2})
    turns = [("AKIEC", 0), ("DF", 0), ("NV", 0), ("DF", 1), ("NV", 1), ("DF", 2)]
    assert [(row.label, row.index) for row in rows] == turns
    assert set(standard({"DF": 2, "NV": 1})) < set(standard({"DF": 7, "NV": 1})), "a longer plan holds the shorter"
    assert standard_plan({}, run_seed=0, sampling=SAMPLING, feature="none").schema == PLAN_SCHEMA


def test_image2image_goes_round_the_references_with_the_seeds_of_standard() -> None:
    rows = image2image({"DF": 2, "MEL": 5})
    taken = [("DF", 0, 0), ("MEL", 0, 0), ("DF", 1, 1), ("MEL", 1, 1), ("DF", 2, 0), ("MEL", 2, 2)]
    expected = [(f"{code}_00000{number}", f"/a/{code}/{reference}.png") for code, number, reference in taken]
    assert [(row.id, row.reference) for row in rows] == expected
    assert [row.seed for row in rows] == [row.seed for row in standard({"DF": 3, "MEL": 3})]
    shared = ("image2image", 0.75, "reference", None)
    assert {(row.mode, row.strength, row.feature, row.feature_temperature) for row in rows} == {shared}


def test_a_range_of_strengths_is_drawn_by_each_seed_and_rows_of_one_strength_are_together() -> None:
    rows = image2image({"MEL": 2}, num_samples=300, strength="0.3..0.5")
    found = [row.strength for row in rows]
    assert found == sorted(found)
    assert {value: found.count(value) > 30 for value in found} == dict.fromkeys([0.3, 0.35, 0.4, 0.45, 0.5], True)
    longer = image2image({"MEL": 2}, num_samples=400, strength="0.3..0.5")
    assert set(rows) < set(longer), "a strength is its row's own"
    assert {row.strength for row in image2image({"MEL": 1}, strength=0.123456789)} == {0.123456789}


def training_images(**lesions: int) -> pa.Table:
    """Of MEL: so many images of each lesion."""
    of = [(lesion, number) for lesion, count in lesions.items() for number in range(count)]
    columns = {name: [f"{lesion}{number}" for lesion, number in of] for name in ("path", "sha256")}
    return pa.table({**columns, "lesion_id": [lesion for lesion, _ in of], "label": ["MEL"] * len(of)})


def test_variations_are_spread_evenly_over_lesions_and_within_them_over_images() -> None:
    images = training_images(many=3, two=2, one=1)
    found = training_references(images, "/data", {"MEL": 12, "NV": 0}, run_seed=4)
    assert list(found) == ["MEL"]
    counted = Counter(parent.lesion_id for parent in found["MEL"])
    assert counted == {"many": 4, "two": 4, "one": 4}
    of_image = Counter(parent.path for parent in found["MEL"])
    assert sorted(of_image.values()) == [1, 1, 2, 2, 2, 4], "4 = 2 + 1 + 1 = 2 + 2 = 4"
    assert found == training_references(images.take([5, 3, 1, 0, 2, 4]), "/data", {"MEL": 12}, run_seed=4)
    assert training_references(images, "/data", {"MEL": 5}, run_seed=4)["MEL"] == found["MEL"][:5]
    orders = {training_references(images, "/data", {"MEL": 3}, run_seed=seed)["MEL"] for seed in range(8)}
    assert len(orders) > 1, "the seed shuffles"
    (row, *_) = rows_of(image2image_plan(found, num_samples={"MEL": 12}, strength=0.5, run_seed=4, sampling=SAMPLING))
    assert (row.mode, row.reference, row.group) == ("image2image", found["MEL"][0].path, found["MEL"][0].lesion_id)
    with pytest.raises(DataError, match=r"^balance_from: no training image of NV [^\n]+$"):
        training_references(images, "/data", {"MEL": 1, "NV": 1}, run_seed=4)
    with pytest.raises(ConfigError, match="data_root"):
        training_references(images, "s3://key:secret@bucket", {"MEL": 1}, run_seed=4)


def with_masks(folder: Path, **shares: float) -> pa.Table:
    """An image of each lesion, one of MEL for each in capitals, the others of NV; and its mask, a strip of the side."""
    for lesion, share in shares.items():
        mask = np.zeros((64, 64), np.uint8)
        mask[:, : round(64 * share)] = 255
        Image.fromarray(mask).save(folder / f"{lesion}_segmentation.png")
    names = list(shares)
    columns = {"path": [f"{name}.jpg" for name in names], "sha256": names, "lesion_id": names}
    columns["label"] = ["MEL" if name.isupper() else "NV" for name in names]
    return pa.table({**columns, "width": [64] * len(names), "height": [64] * len(names)})


def test_each_lesion_is_pasted_into_skins_that_no_other_one_takes(tmp_path: Path) -> None:
    shares = {"A": 0.5, "B": 0.2, "C": 0.7, **{f"nv{number}": 0.2 for number in range(5)}, "broad": 0.4}
    images = with_masks(tmp_path, **shares)
    wanted = {"MEL": 8, "NV": 0}
    found = pasted_references(images, "/data", str(tmp_path), wanted, run_seed=4)["MEL"]
    assert Counter(one.lesion_id for one in found) == {"A": 4, "B": 4}, "C leaves no skin around it"
    skins = {lesion: [one.skin for one in found if one.lesion_id == lesion] for lesion in "AB"}
    of = {lesion: [skin.lesion_id for skin in taken if skin] for lesion, taken in skins.items()}
    assert {*of["A"], *of["B"]} == {f"nv{number}" for number in range(5)}, "and so would the broad one"
    assert not set(of["A"]) & set(of["B"])
    assert {lesion: len(set(taken)) for lesion, taken in of.items()} in ({"A": 3, "B": 2}, {"A": 2, "B": 3})
    drawn: dict[str, Any] = {"strength": 0.5, "run_seed": 4, "sampling": SAMPLING}
    for row, one in zip(rows_of(image2image_plan({"MEL": found}, num_samples=wanted, **drawn)), found, strict=False):
        name, skin = one.lesion_id, str(one.skin and one.skin.lesion_id)
        assert (row.group, row.skin_lesion_id) == (name, skin)
        assert (row.reference, row.reference_b) == (f"/data/{name}.jpg", f"/data/{skin}.jpg")
        assert (row.mask, row.mask_b) == tuple(f"{tmp_path}/{one}_segmentation.png" for one in (name, skin))
    mixed = images.take([8, 3, 1, 0, 2, 4, 7, 6, 5])
    assert pasted_references(mixed, "/data", str(tmp_path), wanted, run_seed=4) == {"MEL": found}
    alone = pasted_references(images, "/data", str(tmp_path), wanted, run_seed=4, alone=True)["MEL"]
    assert [one.path for one in alone] == [one.path for one in found]
    assert {one.skin for one in alone} == {None}
    with pytest.raises(DataError, match=r"^masks: 5 lesions are varied and only 2 others have a mask [^\n]+$"):
        pasted_references(images, "/data", str(tmp_path), {"NV": 5}, run_seed=4)


def test_the_digest_of_a_plan_of_before_masks_is_what_it_was() -> None:
    table = mixed_plan()
    rows = table.drop_columns(["mask", "mask_b", "skin_lesion_id", "view"]).to_pylist()
    sums = {row[name]: f"sum of {row[name]}" for row in rows for name in ("reference", "reference_b") if row[name]}
    lines = sorted(repr(tuple(sums.get(value, value) for value in row.values())) for row in rows)
    assert digest_of(table, sums) == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_of_image2image_those_with_a_mask_are_redrawn(tmp_path: Path) -> None:
    with_masks(tmp_path, **{"1": 0.5})
    masked = masked_references(str(tmp_path), references({"MEL": 3}))
    (row,) = rows_of(image2image_plan(masked, num_samples=1, strength=0.5, run_seed=4, sampling=SAMPLING))
    assert (row.reference, row.mask, row.reference_b) == ("/a/MEL/1.png", f"{tmp_path}/1_segmentation.png", None)
    check_plan(table_of([row]))
    with pytest.raises(DataError, match=r"^masks: [^\n]+ of any image of NV; [^\n]+$"):
        masked_references(str(tmp_path), references({"MEL": 3, "NV": 1}))


def test_an_interpolation_walks_from_each_reference_to_its_partner() -> None:
    rows = interpolation({"MEL": 1}, {"MEL": 1})
    assert [(row.id, row.index, row.position) for row in rows] == [
        (f"MEL_pair000_0{number}", number, number / 4) for number in range(5)
    ]
    places = ("MEL_pair000", "/a/MEL/0.png", "/b/MEL/0.png")
    seeds = (first_64_bits_halved("4/MEL/reference/aMEL0"), first_64_bits_halved("4/MEL/reference/bMEL0"))
    assert {(row.group, row.reference, row.reference_b) for row in rows} == {places}
    assert {(row.seed, row.seed_b) for row in rows} == {seeds}


def test_the_smaller_of_two_folders_starts_again_and_whole_pairs_take_turns() -> None:
    rows = interpolation({"DF": 1, "MEL": 3}, {"DF": 1, "MEL": 2}, steps_between=0)
    assert [(row.group, row.reference, row.reference_b) for row in rows[::2]] == [
        ("DF_pair000", "/a/DF/0.png", "/b/DF/0.png"),
        ("MEL_pair000", "/a/MEL/0.png", "/b/MEL/0.png"),
        ("MEL_pair001", "/a/MEL/1.png", "/b/MEL/1.png"),
        ("MEL_pair002", "/a/MEL/2.png", "/b/MEL/0.png"),
    ]
    assert rows[3].seed_b == rows[7].seed_b  # one reference, one noise


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: interpolation({"DF": 1, "NV": 1}, {"DF": 1}), "reference_images_b holds no usable image of NV"),
        (lambda: interpolation({"DF": 1}, {"DF": 1, "NV": 1}), "reference_images holds no usable image of NV"),
        (lambda: standard({"DF": 1}, feature_temperature=0.5), "0.5, but no feature is drawn"),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_one_line_error(call: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_plan_that_no_memory_holds_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "plan.parquet", table_of(standard({"DF": 4})))
    known = dict.fromkeys(("image_id", "path", "lesion_id", "sha256"), "") | {"label": "DF", "split": "train"}
    catalog = pa.Table.from_pylist([known], CATALOG_SCHEMA)
    balance = GenerateConfig(checkpoint="c", mode="balance", catalog="given", to="5")
    monkeypatch.setattr(plan, "_MOST_ROWS", 3)
    for setting, call in {
        "num_samples": lambda: standard({"DF": 2, "MEL": 2}),
        "steps_between": lambda: interpolation({"DF": 1}, {"DF": 1}, steps_between=2),
        "to": lambda: make_plan(balance, "none", catalog, ISIC7),
        "plan": lambda: read_plan(tmp_path / "plan.parquet"),
    }.items():
        with pytest.raises(ConfigError, match=rf"^{setting}: a plan of 4 images [^\n]+$"):
            call()
    assert len(standard({"DF": 3})) == 3


def test_a_retry_is_another_noise_under_the_same_id_for_ever() -> None:
    (row,) = standard({"MEL": 1})
    first, second = retried(row), retried(retried(row))
    assert (first.id, first.attempt, second.attempt) == (row.id, 1, 2)
    assert first.seed == first_64_bits_halved(f"{row.seed}/attempt/1")
    assert second.seed == first_64_bits_halved(f"{first.seed}/attempt/2")
    assert replace(first, seed=row.seed, attempt=0) == row
    walk = interpolation({"DF": 1}, {"DF": 1})[1]
    assert retried(walk).seed != walk.seed
    assert retried(walk).seed_b == first_64_bits_halved(f"{walk.seed_b}/attempt/1")


def mixed_plan() -> pa.Table:
    """Rows of all modes."""
    rows = [*standard({"NV": 2}, feature="prior"), *image2image({"DF": 1}), *interpolation({"MEL": 1}, {"MEL": 1})]
    return table_of(rows)


def test_a_plan_is_the_same_in_rows_and_on_the_disk(tmp_path: Path) -> None:
    table = mixed_plan()
    assert table.schema == PLAN_SCHEMA
    assert table_of(rows_of(table)).equals(table)
    write_rows(tmp_path / "deep" / "plan.parquet", table)
    assert read_plan(tmp_path / "deep" / "plan.parquet").equals(table)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plan.parquet"]


def test_a_plan_that_pandas_filtered_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "plan.parquet", mixed_plan())
    frame = pd.read_parquet(tmp_path / "plan.parquet")
    frame = frame[frame["mode"] == "standard"][frame.columns[::-1]]
    frame["steps"] = 12
    frame.to_parquet(tmp_path / "edited.parquet")
    assert rows_of(read_plan(tmp_path / "edited.parquet")) == [
        replace(row, steps=12) for row in standard({"NV": 2}, feature="prior")
    ]


def test_seeds_that_pandas_rounded_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "plan.parquet", mixed_plan())
    pd.read_parquet(tmp_path / "plan.parquet").to_parquet(tmp_path / "edited.parquet")
    with pytest.raises(ConfigError, match=r'seed_b as double, which has rounded the seeds.*dtype_backend="pyarrow"'):
        read_plan(tmp_path / "edited.parquet")
    pd.read_parquet(tmp_path / "plan.parquet", dtype_backend="pyarrow").to_parquet(tmp_path / "kept.parquet")
    assert read_plan(tmp_path / "kept.parquet").equals(mixed_plan())


def test_a_file_that_is_no_plan_is_a_one_line_error(tmp_path: Path) -> None:
    plan, without_steps = mixed_plan(), mixed_plan().drop_columns(["steps"])
    for text, table in {
        "lacks columns seed;": plan.drop_columns(["seed"]),
        "has unknown columns note;": plan.append_column("note", [["x"] * 10]),
        "has no rows": plan.slice(0, 0),
        "has steps as string; it must be int64": without_steps.append_column("steps", [["many"] * 10]),
        "has steps as double; it must be int64": without_steps.append_column("steps", [[2.5] * 10]),
    }.items():
        pq.write_table(table, tmp_path / f"{text[:12]}.parquet")
        with pytest.raises(ConfigError, match=rf"^[^\n]*{text}[^\n]*$"):
            read_plan(tmp_path / f"{text[:12]}.parquet")
    (tmp_path / "text.parquet").write_text("id,class")
    for name, text in (
        ("nowhere.parquet", "does not exist; write one with --plan_only"),
        ("text.parquet", "is no Parq"),
    ):
        with pytest.raises(ConfigError, match=rf"^[^\n]*{text}[^\n]*$"):
            read_plan(tmp_path / name)


NORMAL, FROM_IMAGE, WALK = 0, 2, 5  # rows of mixed_plan


@pytest.mark.parametrize(
    ("row", "column", "value", "text"),
    [
        (NORMAL, "id", "../MEL", "be a file name"),
        (NORMAL, "id", None, "has id 'nothing'"),
        (NORMAL, "id", "NV_000001", "2 rows with id NV_000001"),
        (NORMAL, "class", "melanoma", "has class 'melanoma'; it must be one of AKIEC"),
        (NORMAL, "index", -1, "has index '-1'"),
        (NORMAL, "seed", -5, "has seed '-5'"),
        (NORMAL, "seed", None, "has seed 'nothing'"),
        (NORMAL, "mode", "balance", "has mode 'balance'"),
        (NORMAL, "solver", "ddim", "it must be one of euler heun dpmpp unipc"),
        (NORMAL, "steps", 0, "has steps '0'"),
        (NORMAL, "guidance_scale", float("nan"), "has guidance_scale 'nan'"),
        (NORMAL, "guidance_scale", float("inf"), "has guidance_scale 'inf'"),
        (NORMAL, "guidance_low", 0.9, "it must be at most guidance_high"),
        (NORMAL, "guidance_high", 1.5, r"it must be in \[0, 1\]"),
        (NORMAL, "feature_temperature", None, "be a number of at least 0 with feature prior"),
        (NORMAL, "feature", "none", "has feature_temperature '1.0'; it must be empty but with feature prior"),
        (NORMAL, "feature", "reference", "has reference 'nothing'; it must be an absolute path"),
        (NORMAL, "strength", 0.5, "it must be empty but with mode image2image"),
        (NORMAL, "reference", "/a.png", "it must be empty but with an input image"),
        (NORMAL, "position", 0.5, "it must be empty but with mode interpolate"),
        (FROM_IMAGE, "strength", 1.5, r"has strength '1.5'; it must be in \[0, 1\]"),
        (FROM_IMAGE, "strength", None, "has strength 'nothing'"),
        (NORMAL, "mask", "/m.png", "it must be empty but with mode image2image"),
        (FROM_IMAGE, "mask", "m.png", "has mask 'm.png'; it must be an absolute path"),
        (FROM_IMAGE, "reference_b", "/b.png", "it must be empty but with mode interpolate or a mask_b"),
        (FROM_IMAGE, "mask_b", "/m.png", "has reference_b 'nothing'; it must be an absolute path"),
        (FROM_IMAGE, "skin_lesion_id", "L1", "it must be empty but with a mask_b"),
        (FROM_IMAGE, "view", 3, "it must be empty but with strength 0 and no mask"),
        (FROM_IMAGE, "reference", "images/a.png", "it must be an absolute path"),
        (WALK, "position", -0.1, "has position '-0.1'"),
        (WALK, "seed_b", None, "has seed_b 'nothing'"),
        (WALK, "reference_b", None, "has reference_b 'nothing'"),
        (WALK, "feature", "prior", "it must be reference with mode interpolate"),
        (WALK, "group", "a/b", "be a file name"),
    ],
)
def test_a_row_that_a_person_broke_is_named(row: int, column: str, value: object, text: str) -> None:
    rows = mixed_plan().to_pylist()
    rows[row][column] = value
    with pytest.raises(ConfigError, match=text) as caught:
        check_plan(pa.Table.from_pylist(rows, PLAN_SCHEMA))
    assert "\n" not in str(caught.value)
    assert "rows with id" in text or re.search(rf"row {row} \(", str(caught.value))


def test_any_sound_plan_passes() -> None:
    check_plan(mixed_plan())
    rows = mixed_plan().to_pylist()
    rows[NORMAL] |= {"feature": "reference", "feature_temperature": None, "reference": "s3://bucket/a.png"}
    check_plan(pa.Table.from_pylist(rows, PLAN_SCHEMA))


def test_the_split_of_a_checkpoint_of_another_version_is_its_own() -> None:
    """One setting that this M2D lacks must not turn the others into defaults: training images would pass as unseen."""
    info = CheckpointInfo(
        step=1, stage="joint", image_size=16, feature_extractor="a", feature_dim=1, num_patches=1, conditioning={},
        config={"data": {"split_seed": 7, "gone": 3}},
    )  # fmt: skip
    assert data_config_of(info) == DataConfig(split_seed=7)
    info.config["data"]["val_fraction"] = -1
    with pytest.raises(CheckpointError, match="val_fraction"):
        data_config_of(info)
