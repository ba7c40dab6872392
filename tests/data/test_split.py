from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest

from m2d.classes import ISIC7
from m2d.data.catalog import assign_splits
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError

Lesions = list[tuple[str, str]]  # (label, lesion_id), one for each image


def split_of(lesions: Lesions | pa.Table, val: float = 0.1, test: float = 0.1, seed: int = 0) -> pa.Table:
    catalog = catalog_of(lesions) if isinstance(lesions, list) else lesions
    return assign_splits(catalog, val_fraction=val, test_fraction=test, seed=seed)


def catalog_of(lesions: Lesions) -> pa.Table:
    columns = {"label": [label for label, _ in lesions], "lesion_id": [lesion for _, lesion in lesions]}
    return pa.table({"image_id": list(map(str, range(len(lesions)))), **columns, "split": [""] * len(lesions)})


def singles(label: str, count: int) -> Lesions:
    return [(label, f"{label}_{lesion}") for lesion in range(count)]


def splits_by_lesion(catalog: pa.Table) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in catalog.to_pylist():
        splits[row["lesion_id"]].add(row["split"])
    return dict(splits)


def lesion_counts(catalog: pa.Table, label: str) -> tuple[int, int, int]:
    """Lesions of a class in train, val and test."""
    lesions = {row["lesion_id"]: row["split"] for row in catalog.to_pylist() if row["label"] == label}
    counts = Counter(lesions.values())
    return counts["train"], counts["val"], counts["test"]


def random_lesions(generator: np.random.Generator) -> Lesions:
    rows = [("NV", "NV_0")]
    for label in ISIC7.codes:
        for lesion in range(int(generator.integers(0, 60))):
            rows += [(label, f"{label}_{lesion}")] * int(generator.integers(1, 6))
    return [rows[row] for row in generator.permutation(len(rows))]


@pytest.mark.parametrize("trial", range(25))
def test_lesions_stay_whole_and_fractions_hold_within_one_lesion(trial: int) -> None:
    generator = np.random.default_rng(trial)
    lesions, (val, test) = random_lesions(generator), generator.uniform(0, 0.45, 2)
    split = split_of(lesions, val, test, seed=trial)
    assert all(len(splits) == 1 for splits in splits_by_lesion(split).values())
    for label in {label for label, _ in lesions}:
        counts = lesion_counts(split, label)
        assert counts[0] >= 1
        assert abs(counts[1] - val * sum(counts)) <= 1
        assert abs(counts[2] - test * sum(counts)) <= 1


@pytest.mark.parametrize("trial", range(15))
def test_lesions_that_span_classes_stay_whole_and_every_class_trains(trial: int) -> None:
    generator = np.random.default_rng(trial)
    rows = [(str(generator.choice(ISIC7.codes)), f"lesion_{generator.integers(0, 80)}") for _ in range(300)]
    split = split_of(rows, 0.2, 0.2, seed=trial)
    assert all(len(splits) == 1 for splits in splits_by_lesion(split).values())
    assert all(lesion_counts(split, label)[0] >= 1 for label in ISIC7.codes)


@pytest.mark.parametrize("seed", range(10))
def test_shared_lesions_count_for_each_of_their_classes(seed: int) -> None:
    """Half of DF's 20 lesions also carry NV images; both classes still get exactly a tenth in val and in test."""
    rows = singles("DF", 20) + [("NV", f"DF_{lesion}") for lesion in range(10)]
    split = split_of(rows + singles("NV", 90), seed=seed)
    assert (lesion_counts(split, "DF"), lesion_counts(split, "NV")) == ((16, 2, 2), (80, 10, 10))
    assert all(len(splits) == 1 for splits in splits_by_lesion(split).values())


def test_a_class_trains_even_where_rarer_classes_placed_most_of_its_lesions() -> None:
    """p and q may both land in val with their rarer classes; then MEL's last lesion trains instead of being tested."""
    rows = [("VASC", "p"), ("VASC", "v"), ("DF", "q"), ("DF", "d"), ("MEL", "p"), ("MEL", "q"), ("MEL", "f")]
    counts = [lesion_counts(split_of(rows, 0.2, 0.2, seed), "MEL") for seed in range(20)]
    assert min(train for train, _, _ in counts) >= 1
    assert 2 in {val for _, val, _ in counts}


@pytest.mark.parametrize(
    ("lesions", "val", "test", "expected"),
    [
        (17, 0.1, 0.2, (12, 2, 3)),  # 1.7 and 3.4: the nearest lesion
        (100, 0.1, 0.2, (70, 10, 20)),
        (20, 0.1, 0.2, (14, 2, 4)),
        (50, 0.0, 0.1, (45, 0, 5)),  # a fraction of zero leaves its split empty
        (2, 0.0, 0.1, (1, 0, 1)),
        (10, 0.0, 0.0, (10, 0, 0)),
        *((1, fraction, fraction, (1, 0, 0)) for fraction in (0.01, 0.1, 0.26)),  # few go to train, then val, then test
        *((2, fraction, fraction, (1, 1, 0)) for fraction in (0.01, 0.1, 0.26)),
        *((3, fraction, fraction, (1, 1, 1)) for fraction in (0.01, 0.1, 0.26)),
        *((4, fraction, fraction, (2, 1, 1)) for fraction in (0.01, 0.1, 0.26)),
    ],
)
def test_counts_of_a_class(lesions: int, val: float, test: float, expected: tuple[int, int, int]) -> None:
    split = split_of(singles("NV", lesions) + singles("DF", 3), val, test, seed=3)
    assert lesion_counts(split, "NV") == expected


def test_fractions_count_lesions_and_not_images() -> None:
    """Ten lesions of one image beside ten of fifty: 4 of 20 lesions are tested whichever they are."""
    rows = singles("MEL", 10) + [("MEL", f"large_{lesion}") for lesion in range(10) for _ in range(50)]
    assert {lesion_counts(split_of(rows, 0.1, 0.2, seed), "MEL") for seed in range(5)} == {(14, 2, 4)}


def test_the_order_of_the_rows_has_no_influence_and_the_seed_has() -> None:
    catalog = catalog_of(random_lesions(np.random.default_rng(5)))
    shuffled = catalog.take(np.random.default_rng(6).permutation(catalog.num_rows))
    first, second, other = split_of(catalog, seed=1), split_of(shuffled, seed=1), split_of(catalog, seed=2)
    assert splits_by_lesion(first) == splits_by_lesion(second) != splits_by_lesion(other)
    assert second["image_id"].to_pylist() == shuffled["image_id"].to_pylist()


def test_another_val_fraction_leaves_the_test_lesions_alone() -> None:
    lesions = random_lesions(np.random.default_rng(9))
    splits = [splits_by_lesion(split_of(lesions, val, 0.2)) for val in (0.05, 0.1, 0.3)]
    tested = [{lesion for lesion, of_lesion in split.items() if of_lesion == {"test"}} for split in splits]
    assert tested[0] == tested[1] == tested[2]


def test_an_empty_catalog_splits_into_nothing() -> None:
    split = split_of(catalog_of(singles("NV", 1)).slice(0, 0))
    assert split.num_rows == 0
    assert split.schema.field("split").type == pa.string()


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="val_fraction"):
        DataConfig(val_fraction=fractions[0], test_fraction=fractions[1])
