"""How many images each class lacks: by hand."""

import pyarrow as pa
import pytest

from m2d.classes import ISIC7
from m2d.data.catalog import CATALOG_SCHEMA
from m2d.errors import ConfigError, DataError
from m2d.generation.plan import make_plan, targets
from m2d.generation.settings import BalanceSplit, GenerateConfig, parse_target

COUNTS = {"AKIEC": 0, "BCC": 40, "BKL": 0, "DF": 3, "MEL": 25, "NV": 100, "VASC": 7}


@pytest.mark.parametrize(
    ("to", "made"),
    [
        ("max", {"BCC": 60, "DF": 97, "MEL": 75, "NV": 0, "VASC": 93}),
        ("30", {"BCC": 0, "DF": 27, "MEL": 5, "NV": 0, "VASC": 23}),
        ("0.25", {"BCC": 0, "DF": 22, "MEL": 0, "NV": 0, "VASC": 18}),
        ("x0.25", {"BCC": 0, "DF": 22, "MEL": 0, "NV": 0, "VASC": 18}),
        ("ratio 0.25", {"BCC": 0, "DF": 22, "MEL": 0, "NV": 0, "VASC": 18}),
        ("1.0", {"BCC": 60, "DF": 97, "MEL": 75, "NV": 0, "VASC": 93}),
        ("x1", {"BCC": 60, "DF": 97, "MEL": 75, "NV": 0, "VASC": 93}),
        ("1000", {"BCC": 960, "DF": 997, "MEL": 975, "NV": 900, "VASC": 993}),
    ],
)
def test_a_class_is_filled_up_and_never_made_smaller(to: str, made: dict[str, int]) -> None:
    assert targets(COUNTS, to) == made


def test_classes_that_are_named_are_filled_up_alone_and_measured_by_the_largest_of_all() -> None:
    assert targets(COUNTS, "max", ["VASC", "DF"]) == {"DF": 97, "VASC": 93}
    assert targets(COUNTS, "30", ["AKIEC"]) == {"AKIEC": 30}, "one without an image only by name"


@pytest.mark.parametrize("share", ["0.125", ".125"])
def test_a_share_is_rounded_to_the_nearest_image(share: str) -> None:
    assert targets({"NV": 100, "DF": 0}, share, ["DF"]) == {"DF": 13}
    assert targets({"NV": 99, "DF": 0}, share, ["DF"]) == {"DF": 12}


@pytest.mark.parametrize("to", ["", "most", "0", "-5", "3e2", "0.0", "1.5", "x2", "x0", "ratio", "nan", "²", "1,5"])
def test_any_other_target_is_refused_in_one_line(to: str) -> None:
    with pytest.raises(ConfigError, match=r"^to is [^\n]+$"):
        parse_target(to)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="no image"):
        targets(dict.fromkeys(COUNTS, 0), "max")


@pytest.mark.parametrize(("split", "before"), [("all", {"DF": 2, "NV": 3}), ("train", {"DF": 1, "NV": 2})])
def test_all_splits_count_or_training_alone(split: BalanceSplit, before: dict[str, int]) -> None:
    rows = [("DF", "train"), ("DF", "val"), ("NV", "train"), ("NV", "train"), ("NV", "test")]
    blank = dict.fromkeys(["image_id", "path", "lesion_id", "sha256"], "")
    catalog = pa.Table.from_pylist([blank | {"label": code, "split": of} for code, of in rows], CATALOG_SCHEMA)
    config = GenerateConfig(checkpoint="c", mode="balance", catalog="given", balance_split=split)
    found = make_plan(config, "none", catalog, ISIC7)
    assert found.before == dict.fromkeys(ISIC7.codes, 0) | before
    assert found.classes == ["DF"]
