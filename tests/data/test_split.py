from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from m2d.classes import CLASSES
from m2d.data.catalog import assign_splits
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError


def catalog_of(lesions: list[tuple[str, str]]) -> pa.Table:
    """One row for each (label, lesion_id)."""
    return pa.table(
        {
            "image_id": [f"image_{row}" for row in range(len(lesions))],
            "label": [label for label, _ in lesions],
            "lesion_id": [lesion for _, lesion in lesions],
            "split": [""] * len(lesions),
        }
    )


def single_image_lesions(label: str, count: int) -> list[tuple[str, str]]:
    return [(label, f"{label}_{lesion}") for lesion in range(count)]


def splits_by_lesion(catalog: pa.Table) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = defaultdict(set)
    for lesion, split in zip(catalog["lesion_id"].to_pylist(), catalog["split"].to_pylist(), strict=True):
        splits[lesion].add(split)
    return dict(splits)


def lesion_counts(catalog: pa.Table, label: str) -> dict[str, int]:
    counts = {"train": 0, "val": 0, "test": 0}
    lesions = {row["lesion_id"]: row["split"] for row in catalog.to_pylist() if row["label"] == label}
    for split in lesions.values():
        counts[split] += 1
    return counts


def random_catalog(generator: np.random.Generator) -> pa.Table:
    rows = []
    for label in CLASSES:
        for lesion in range(int(generator.integers(0, 60))):
            rows += [(label, f"{label}_{lesion}")] * int(generator.integers(1, 6))
    rows = rows or [("NV", "only")]
    return catalog_of([rows[row] for row in generator.permutation(len(rows))])


@pytest.mark.parametrize("trial", range(25))
def test_lesions_stay_whole_and_fractions_hold_within_one_lesion(trial: int) -> None:
    generator = np.random.default_rng(trial)
    catalog = random_catalog(generator)
    val_fraction, test_fraction = generator.uniform(0, 0.45, 2)
    split = assign_splits(catalog, val_fraction=val_fraction, test_fraction=test_fraction, seed=trial)
    assert all(len(splits) == 1 for splits in splits_by_lesion(split).values())
    for label in set(split["label"].to_pylist()):
        counts = lesion_counts(split, label)
        lesions = sum(counts.values())
        assert counts["train"] >= 1
        assert abs(counts["val"] - val_fraction * lesions) <= 1
        assert abs(counts["test"] - test_fraction * lesions) <= 1


@pytest.mark.parametrize("trial", range(15))
def test_lesions_that_span_classes_stay_whole_and_every_class_trains(trial: int) -> None:
    generator = np.random.default_rng(trial)
    rows = [(str(generator.choice(CLASSES)), f"lesion_{generator.integers(0, 80)}") for _ in range(300)]
    split = assign_splits(catalog_of(rows), val_fraction=0.2, test_fraction=0.2, seed=trial)
    assert all(len(splits) == 1 for splits in splits_by_lesion(split).values())
    for label in CLASSES:
        assert lesion_counts(split, label)["train"] >= 1


@pytest.mark.parametrize("seed", range(10))
def test_shared_lesions_count_for_each_of_their_classes(seed: int) -> None:
    """Half of DF's 20 lesions also carry NV images; both classes still get exactly a tenth in val and in test."""
    rows = single_image_lesions("DF", 20) + [("NV", f"DF_{lesion}") for lesion in range(10)]
    split = assign_splits(
        catalog_of(rows + single_image_lesions("NV", 90)), val_fraction=0.1, test_fraction=0.1, seed=seed
    )
    assert lesion_counts(split, "DF") == {"train": 16, "val": 2, "test": 2}
    assert lesion_counts(split, "NV") == {"train": 80, "val": 10, "test": 10}
    assert all(len(splits) == 1 for splits in splits_by_lesion(split).values())


def test_a_class_trains_even_where_rarer_classes_placed_most_of_its_lesions() -> None:
    """p and q may both land in val with their rarer classes; then MEL's last lesion trains instead of being tested."""
    rows = [("VASC", "p"), ("VASC", "v"), ("DF", "q"), ("DF", "d"), ("MEL", "p"), ("MEL", "q"), ("MEL", "f")]
    seen = set()
    for seed in range(20):
        counts = lesion_counts(assign_splits(catalog_of(rows), val_fraction=0.2, test_fraction=0.2, seed=seed), "MEL")
        assert counts["train"] >= 1
        seen.add(counts["val"])
    assert 2 in seen


def test_counts_are_rounded_to_the_nearest_lesion() -> None:
    split = assign_splits(catalog_of(single_image_lesions("NV", 17)), val_fraction=0.1, test_fraction=0.2, seed=0)
    assert lesion_counts(split, "NV") == {"train": 12, "val": 2, "test": 3}  # 1.7 and 3.4


def test_round_numbers_are_met_exactly() -> None:
    catalog = catalog_of(single_image_lesions("NV", 100) + single_image_lesions("DF", 20))
    split = assign_splits(catalog, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert lesion_counts(split, "NV") == {"train": 70, "val": 10, "test": 20}
    assert lesion_counts(split, "DF") == {"train": 14, "val": 2, "test": 4}


@pytest.mark.parametrize(
    ("lesions", "expected"),
    [
        (1, {"train": 1, "val": 0, "test": 0}),
        (2, {"train": 1, "val": 1, "test": 0}),
        (3, {"train": 1, "val": 1, "test": 1}),
        (4, {"train": 2, "val": 1, "test": 1}),
    ],
)
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.26])
def test_few_lesions_go_to_train_then_val_then_test(lesions: int, expected: dict[str, int], fraction: float) -> None:
    catalog = catalog_of(single_image_lesions("VASC", lesions))
    split = assign_splits(catalog, val_fraction=fraction, test_fraction=fraction, seed=3)
    assert lesion_counts(split, "VASC") == expected


def test_a_fraction_of_zero_leaves_its_split_empty() -> None:
    catalog = catalog_of(single_image_lesions("NV", 50) + single_image_lesions("DF", 2))
    split = assign_splits(catalog, val_fraction=0.0, test_fraction=0.1, seed=0)
    assert lesion_counts(split, "NV") == {"train": 45, "val": 0, "test": 5}
    assert lesion_counts(split, "DF") == {"train": 1, "val": 0, "test": 1}
    split = assign_splits(catalog, val_fraction=0.0, test_fraction=0.0, seed=0)
    assert set(split["split"].to_pylist()) == {"train"}


def test_fractions_count_lesions_and_not_images() -> None:
    """Ten lesions of one image beside ten of fifty: 4 of 20 lesions are tested whichever they are."""
    rows = single_image_lesions("MEL", 10) + [("MEL", f"large_{lesion}") for lesion in range(10) for _ in range(50)]
    for seed in range(5):
        split = assign_splits(catalog_of(rows), val_fraction=0.1, test_fraction=0.2, seed=seed)
        assert lesion_counts(split, "MEL") == {"train": 14, "val": 2, "test": 4}


def test_the_order_of_the_rows_has_no_influence() -> None:
    catalog = random_catalog(np.random.default_rng(5))
    shuffled = catalog.take(np.random.default_rng(6).permutation(catalog.num_rows))
    first, second = (assign_splits(rows, val_fraction=0.1, test_fraction=0.1, seed=1) for rows in (catalog, shuffled))
    assert splits_by_lesion(first) == splits_by_lesion(second)
    assert second["image_id"].to_pylist() == shuffled["image_id"].to_pylist()


def test_the_seed_decides_which_lesions() -> None:
    catalog = catalog_of(single_image_lesions("NV", 200))
    one, same, other = (assign_splits(catalog, val_fraction=0.1, test_fraction=0.1, seed=seed) for seed in (1, 1, 2))
    assert one.equals(same)
    assert splits_by_lesion(one) != splits_by_lesion(other)


def test_another_val_fraction_leaves_the_test_lesions_alone() -> None:
    catalog = random_catalog(np.random.default_rng(9))
    tested = [
        {lesion for lesion, splits in splits_by_lesion(split).items() if splits == {"test"}}
        for split in (assign_splits(catalog, val_fraction=val, test_fraction=0.2, seed=0) for val in (0.05, 0.1, 0.3))
    ]
    assert tested[0] == tested[1] == tested[2]


def test_an_empty_catalog_splits_into_nothing() -> None:
    empty = catalog_of([("NV", "one")]).slice(0, 0)
    split = assign_splits(empty, val_fraction=0.1, test_fraction=0.1, seed=0)
    assert split.num_rows == 0
    assert split.schema.field("split").type == pa.string()


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="val_fraction"):
        DataConfig(val_fraction=fractions[0], test_fraction=fractions[1])
