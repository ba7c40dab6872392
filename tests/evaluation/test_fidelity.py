"""Fidelity: controls come out as they must, sides are compared like with like, and what is left out is told."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from tiny_sets import feature_set, image_set

from m2d.classes import ISIC7
from m2d.evaluation.fidelity import (
    AUTOENCODER,
    FLOOR,
    GENERATED,
    UNSEEN,
    FidelityResult,
    FidelityRow,
    lesion_disjoint_halves,
    measure_fidelity,
)
from m2d.evaluation.images import FeatureSet
from m2d.metrics.distances import kernel_distance, vendi_score

D = 12
SCALES = np.array([100.0, 1.0, 1.0] * 4)  # dimensions differ by orders of magnitude


def features_of(name: str, counts: dict[str, int], vectors: np.ndarray, photographs: int = 1) -> FeatureSet:
    """So many images of each class; so many in a row are of one lesion."""
    labels = np.concatenate([np.full(count, ISIC7.index(code)) for code, count in counts.items()]).astype(np.int64)
    groups = [f"{name}-{label}-{row // photographs}" for row, label in enumerate(labels)]
    return feature_set(image_set(labels, name, groups), vectors)


def real(name: str, counts: dict[str, int], seed: int, *, shift: float = 0.0, photographs: int = 1) -> FeatureSet:
    """Each class around a place of its own; shift moves all, in deviations."""
    generator = np.random.default_rng(seed)
    places = np.repeat([2.0 * ISIC7.index(code) for code in counts], list(counts.values()))
    vectors = generator.standard_normal((len(places), D)) + shift
    vectors[:, 0] += places
    return features_of(name, counts, vectors * SCALES, photographs)


COUNTS = {"MEL": 150, "NV": 300}


def measure(
    generated: FeatureSet,
    *,
    train: FeatureSet | None = None,
    test: FeatureSet | None = None,
    reconstructions: FeatureSet | None = None,
    circular: bool | None = False,
    seed: int = 0,
) -> FidelityResult:
    train = real("train", COUNTS, 0) if train is None else train
    return measure_fidelity(
        train=train, test=test, generated=generated, reconstructions=reconstructions, circular=circular, seed=seed
    )


def row(result: FidelityResult, comparison: str, label: str | None = None) -> FidelityRow:
    found = result.row(comparison, label)
    assert found is not None
    return found


# --- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [None, "MEL", "NV"])
def test_images_of_the_same_distribution_lie_at_the_floor(label: str | None) -> None:
    result = measure(real("generated", {"MEL": 100, "NV": 100}, 1), test=real("test", {"MEL": 60, "NV": 80}, 2))
    for comparison in (GENERATED, FLOOR, UNSEEN):
        found = row(result, comparison, label)
        assert found.kernel_distance is not None
        assert found.kernel_distance_se is not None
        assert abs(found.kernel_distance) < 3 * found.kernel_distance_se
    generated, floor = row(result, GENERATED, label), row(result, FLOOR, label)
    assert generated.frechet_distance == pytest.approx(floor.frechet_distance, rel=0.35)
    assert generated.coverage == pytest.approx(floor.coverage, abs=0.1)


def test_noise_is_far() -> None:
    noise = np.random.default_rng(1).uniform(-8, 8, (200, D)) * SCALES
    result = measure(features_of("generated", {"MEL": 100, "NV": 100}, noise))
    generated, floor = row(result, GENERATED), row(result, FLOOR)
    assert generated.kernel_distance > 10 * generated.kernel_distance_se
    assert generated.frechet_distance > 10 * floor.frechet_distance
    assert generated.coverage < 0.2 * floor.coverage
    assert generated.precision < 0.2


def test_a_shift_of_every_feature_is_its_squared_length_in_frechet_distance() -> None:
    """Moved by one deviation of the training images in each of D dimensions: D above the floor."""
    train = real("train", {"MEL": 2000}, 0)
    moved = replace(train, cls=train.cls + train.cls.std(axis=0))
    result = measure(moved, train=train)
    floor = row(result, FLOOR, "MEL").frechet_distance
    assert row(result, GENERATED, "MEL").frechet_distance == pytest.approx(D + floor, rel=0.05)


def test_duplicates_lower_vendi_and_coverage() -> None:
    varied = real("generated", {"MEL": 100}, 1)
    copied = replace(varied, cls=np.repeat(varied.cls[:5], 20, axis=0))
    whole, copies = row(measure(varied), GENERATED, "MEL"), row(measure(copied), GENERATED, "MEL")
    assert copies.vendi_other < 5.001 < 0.8 * whole.vendi_other
    assert copies.coverage < 0.7 * whole.coverage
    assert copies.vendi_reference == pytest.approx(whole.vendi_reference)


def test_a_model_that_ignores_the_class_is_far_overall() -> None:
    """Every class drawn from the mix of both: no pooled distance would see it."""
    vectors = np.random.default_rng(4).permutation(real("", {"MEL": 100, "NV": 100}, 3).cls)
    result = measure(features_of("generated", {"MEL": 100, "NV": 100}, vectors))
    overall = row(result, GENERATED)
    assert overall.kernel_distance > 3 * overall.kernel_distance_se
    assert overall.frechet_distance == pytest.approx(row(result, FLOOR).frechet_distance, rel=0.35)


def test_blurred_reconstructions_are_the_autoencoders_floor() -> None:
    test = real("test", {"MEL": 60, "NV": 60}, 2)
    blurred = replace(test, cls=test.cls * 0.3)
    result = measure(real("generated", {"MEL": 60, "NV": 60}, 1), test=test, reconstructions=blurred)
    assert row(result, AUTOENCODER).kernel_distance > 5 * row(result, UNSEEN).kernel_distance
    assert row(result, AUTOENCODER, "MEL").frechet_distance > 2 * row(result, UNSEEN, "MEL").frechet_distance


# --- like with like ---------------------------------------------------------------------------------------------------


def test_a_class_is_compared_with_itself_and_all_its_images() -> None:
    train, generated = real("train", COUNTS, 0, photographs=2), real("generated", {"MEL": 30, "NV": 70}, 1, shift=0.5)
    mean, std = train.cls.astype(float).mean(axis=0), train.cls.astype(float).std(axis=0)
    rows = train.rows(ISIC7.index("MEL"))
    expected = kernel_distance(
        (train.cls[rows] - mean) / std, (generated.cls[:30] - mean) / std, groups_a=train.groups[rows]
    )
    found = row(measure(generated, train=train), GENERATED, "MEL")
    assert (found.kernel_distance, found.kernel_distance_se) == pytest.approx(
        (expected.value, expected.standard_error), rel=1e-9
    )
    assert (found.n_reference, found.n_other) == (150, 30)


def test_overall_kernel_distance_is_the_mean_over_the_classes() -> None:
    result = measure(real("generated", {"MEL": 30, "NV": 70}, 1, shift=0.5))
    overall, mel, nv = (row(result, GENERATED, label) for label in (None, "MEL", "NV"))
    assert overall.kernel_distance == pytest.approx((mel.kernel_distance + nv.kernel_distance) / 2)
    assert overall.kernel_distance_se == pytest.approx(np.hypot(mel.kernel_distance_se, nv.kernel_distance_se) / 2)


def test_every_comparison_has_the_same_number_of_images_of_a_class() -> None:
    """MEL: half of 150 training images is the least; NV: the 40 test images."""
    test = real("test", {"MEL": 90, "NV": 40}, 2)
    result = measure(real("generated", {"MEL": 200, "NV": 120}, 1), test=test, reconstructions=test)
    for comparison in (GENERATED, FLOOR, UNSEEN, AUTOENCODER):
        sizes = [row(result, comparison, label).n_matched for label in ("MEL", "NV", None)]
        assert sizes == [75, 40, 115], comparison
    assert result.overall_counts == {"MEL": 75, "NV": 40}


def test_another_class_mix_is_no_distance() -> None:
    """Nine NV to one MEL in training, one to one generated; NV and MEL lie apart, yet overall is at the floor."""
    train = real("train", {"MEL": 100, "NV": 900}, 0)
    result = measure(real("generated", {"MEL": 100, "NV": 100}, 1), train=train)
    generated, floor = row(result, GENERATED), row(result, FLOOR)
    assert generated.frechet_distance == pytest.approx(floor.frechet_distance, rel=0.3)
    assert generated.recall == pytest.approx(floor.recall, abs=0.1)


def test_vendi_of_whole_sets_is_that_of_their_standardised_features() -> None:
    """A class of one size on both sides is drawn whole, so its score is known."""
    train = real("train", {"MEL": 60}, 0)
    result = measure(real("generated", {"MEL": 30}, 1), train=train)
    generated = real("generated", {"MEL": 30}, 1)
    standardised = (generated.cls - train.cls.mean(axis=0)) / train.cls.std(axis=0)
    assert row(result, GENERATED, "MEL").vendi_other == pytest.approx(vendi_score(standardised), rel=1e-5)


@pytest.mark.parametrize("deviation", [0.0, 0.01])
def test_a_feature_that_hardly_changes_in_training_is_not_blown_up(deviation: float) -> None:
    """It is divided by 0.3 of the median deviation, that of the features that change at all."""
    train, generated = real("train", {"MEL": 60}, 0), real("generated", {"MEL": 60}, 1)
    train.cls[:, 1] = 7 + deviation * train.cls[:, 1]
    generated.cls[:, 1] = 9
    mean, std = train.cls.astype(float).mean(axis=0), train.cls.astype(float).std(axis=0)
    std[1] = 0.3 * np.median(std if deviation else np.delete(std, 1))
    expected = kernel_distance((train.cls - mean) / std, (generated.cls - mean) / std).value
    assert row(measure(generated, train=train), GENERATED, "MEL").kernel_distance == pytest.approx(expected, rel=1e-9)


def test_halves_share_no_lesion_and_split_each_class_evenly() -> None:
    train = real("train", {"DF": 30, "MEL": 151, "NV": 300}, 0, photographs=3)
    halves = lesion_disjoint_halves(train.labels, train.groups, seed=1)
    assert np.array_equal(np.sort(np.concatenate(halves)), np.arange(481))
    assert not set(train.groups[halves[0]]) & set(train.groups[halves[1]])
    for code in ("DF", "MEL", "NV"):
        sizes = [(train.labels[half] == ISIC7.index(code)).sum() for half in halves]
        assert abs(sizes[0] - sizes[1]) <= 3


def test_a_lesion_of_two_classes_stays_in_one_half() -> None:
    groups = np.array(["a", "b", "c", "d", "a", "e", "f", "d"], dtype=object)
    halves = lesion_disjoint_halves(np.array([0, 0, 0, 0, 1, 1, 1, 1]), groups, seed=0)
    assert not set(groups[halves[0]]) & set(groups[halves[1]])


# --- what is left out -------------------------------------------------------------------------------------------------


def test_a_class_of_nine_images_has_a_kernel_distance_and_a_reason_for_the_rest() -> None:
    result = measure(real("generated", {"DF": 9, "MEL": 60}, 1), train=real("train", {"DF": 40, "MEL": 150}, 0))
    found = row(result, GENERATED, "DF")
    assert found.kernel_distance is not None
    assert found.left_out == dict.fromkeys(
        ("frechet_distance", "precision", "recall", "density", "coverage", "vendi_reference", "vendi_other"),
        "9 images a side can be compared at equal N; 20 are needed",
    )
    assert (found.precision, found.vendi_other, found.n_matched) == (None, None, 0)
    assert row(result, FLOOR, "DF").n_matched == 20, "the others keep their images"


def test_a_class_of_thirty_images_has_all_but_the_frechet_distance() -> None:
    result = measure(real("generated", {"MEL": 30}, 1))
    found = row(result, GENERATED, "MEL")
    assert found.left_out == {"frechet_distance": "30 images a side can be compared at equal N; 50 are needed"}
    assert (found.n_matched, found.draws) == (30, 10)
    assert list(result.comparisons) == [GENERATED, FLOOR]
    assert result.row(UNSEEN) is None
    assert result.notes == ["no reconstructions were given, so there is no comparison with them"]


def test_a_class_without_three_test_lesions_is_left_out_of_the_overall_rows() -> None:
    test = real("test", {"MEL": 60, "NV": 4}, 2, photographs=2)
    result = measure(real("generated", {"MEL": 60, "NV": 60}, 1), test=test)
    unseen = row(result, UNSEEN, "NV")
    assert unseen.kernel_distance is None
    assert unseen.left_out["kernel_distance"] == "2 lesions on the side that has fewer; 3 are needed"
    assert result.overall_counts == {"MEL": 60}
    assert result.notes[0] == "NV is left out of the overall rows: fewer than 3 lesions on a side (unseen 2)"
    assert row(result, GENERATED).kernel_distance == row(result, GENERATED, "MEL").kernel_distance


def test_no_class_with_enough_lesions_leaves_the_overall_rows_empty_with_a_reason() -> None:
    found = row(measure(real("generated", {"MEL": 2}, 1)), GENERATED)
    assert found.kernel_distance is None
    assert found.left_out["kernel_distance"] == "no class has it in every comparison"
    assert found.left_out["precision"] == "0 images a side can be compared at equal N; 20 are needed"


def test_rows_are_by_comparison_and_a_missing_number_and_a_reason_go_together() -> None:
    result = measure(real("generated", {"DF": 2, "MEL": 30}, 1), train=real("train", {"DF": 1, "MEL": 150}, 0))
    assert [(one.comparison, one.label) for one in result.rows] == [
        (comparison, label) for comparison in (GENERATED, FLOOR) for label in (None, "DF", "MEL")
    ]
    for one in result.rows:
        assert {name for name, value in asdict(one).items() if value is None and name != "label"} == set(one.left_out)


@pytest.mark.parametrize(
    ("circular", "sentence"),
    [
        (True, "net-1 guided the training of the model, so its distances flatter the generated images"),
        (False, "net-1 had no part in the training of the model"),
        (None, "Whether net-1 guided the training of the model is not known"),
    ],
)
def test_it_says_whether_the_extractor_guided_the_training(circular: bool | None, sentence: str) -> None:
    result = measure(real("generated", {"MEL": 30}, 1), circular=circular)
    assert result.circular is circular
    assert result.circularity.startswith(sentence)


def test_the_seed_decides_and_a_test_set_does_not_change_what_the_others_draw() -> None:
    generated = real("generated", {"MEL": 90}, 1)
    first, again, other = (measure(generated, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert row(first, GENERATED, "MEL").frechet_distance != row(other, GENERATED, "MEL").frechet_distance
    along = measure(generated, test=real("test", {"MEL": 90}, 2), seed=3)
    assert row(first, GENERATED, "MEL") == row(along, GENERATED, "MEL")
