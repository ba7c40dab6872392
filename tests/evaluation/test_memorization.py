"""Planted copies are found, unseen lesions are not; limits, shares and distances by hand and against scipy."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_sets
from PIL import Image, ImageFilter
from scipy.stats import binomtest

from m2d.classes import ISIC7
from m2d.data.features import extract_view
from m2d.data.views import apply_view
from m2d.errors import DataError
from m2d.evaluation.images import FeatureSet, ImageSet
from m2d.evaluation.memorization import Limits, MemorizationResult, Pair, measure_memorization
from m2d.evaluation.report.plots import nearest_pairs
from m2d.models.extractors import load_feature_extractor

HAM10000 = Path(__file__).parents[3] / "shared" / "ham10000"
MEL, NV, DF = (ISIC7.index(code) for code in ("MEL", "NV", "DF"))
SIZE, DIM = 32, 48
Change = Callable[[np.ndarray], np.ndarray]


def textures(count: int, seed: int) -> np.ndarray:
    """Smooth random colours, uint8 [count, SIZE, SIZE, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((SIZE, SIZE))) for image in coarse])


def stand_in(pixels: np.ndarray) -> np.ndarray:
    """An extractor: a fixed random projection of all pixels, and a bend."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255 - 0.5
    projection = np.random.default_rng(0).normal(size=(flat.shape[1], DIM)).astype(np.float32)
    return np.tanh(flat @ projection / 20)


def image_set(name: str, pixels: np.ndarray, labels: np.ndarray, lesions: list[str] | None = None) -> ImageSet:
    return tiny_sets.image_set(labels, name, lesions, pixels)


def feature_set(name: str, pixels: np.ndarray, labels: np.ndarray, lesions: list[str] | None = None) -> FeatureSet:
    return tiny_sets.feature_set(image_set(name, pixels, labels, lesions), stand_in(pixels))


def in_views(pixels: np.ndarray) -> list[np.ndarray]:
    """The stand-in's features of the images in each of the eight views."""
    return [stand_in(np.stack([apply_view(image, view) for image in pixels])) for view in range(8)]


def two_classes(count: int) -> np.ndarray:
    return np.where(np.arange(count) % 2, MEL, NV)


def measured(
    pixels: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    train: FeatureSet | None = None,
    test: FeatureSet | None = None,
    **options: int,
) -> MemorizationResult:
    """These images as generated ones, against 160 training images and 80 unseen ones."""
    return measure_memorization(
        train=TRAIN if train is None else train,
        test=TEST if test is None else test,
        generated_views=in_views(pixels),
        generated=image_set("generated", pixels, two_classes(len(pixels)) if labels is None else labels),
        seed=0,
        **options,
    )


TRAIN = feature_set("train", textures(160, seed=1), two_classes(160))
TEST = feature_set("test", textures(80, seed=2), two_classes(80))
NEW = image_set("generated", textures(80, seed=3), two_classes(80))


# --- planted copies -------------------------------------------------------------------------------------------------


def jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=75)
    return np.asarray(Image.open(stream))


def redrawn(image: np.ndarray) -> np.ndarray:
    """As a small VAE does: no fine detail, the colours a little off."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float32)
    return np.clip(0.95 * blurred + 8, 0, 255).astype(np.uint8)


COPIES: dict[str, Change] = {
    "exact": lambda image: image,
    "mirrored": lambda image: np.fliplr(image),
    "turned": lambda image: np.rot90(image),
    "recompressed": jpeg,
    "redrawn": redrawn,
    "mirrored, turned and redrawn": lambda image: redrawn(np.ascontiguousarray(np.rot90(np.fliplr(image)))),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_a_planted_copy_is_found_before_all_new_images_in_the_view_that_turns_it_back(change: Change) -> None:
    pixels = textures(20, seed=3)
    pixels[7] = change(TRAIN.pixels[42])
    result = measured(pixels)
    worst = result.worst[0]
    assert 7 in result.near_copies
    assert (worst.generated_row, worst.train_row, worst.near_copy) == (7, 42, True)
    assert np.abs(apply_view(pixels[7], worst.view).astype(int) - TRAIN.pixels[42]).mean() < 12
    assert worst.distances["thumbnails"] < 0.02


def test_few_new_images_are_listed_beside_a_planted_copy() -> None:
    """The union bound: at most 8 / 481 of them, in features, and 4 / 481 by thumbnails."""
    train = feature_set("train", textures(480, seed=1), two_classes(480))
    pixels = textures(400, seed=3)
    pixels[7] = redrawn(train.pixels[42])
    listed = measured(pixels, train=train).near_copies
    assert 7 in listed
    assert len(listed) <= 1 + 400 * 12 / 481


def test_an_exact_copy_in_another_view_is_at_distance_zero_in_both_spaces() -> None:
    worst = measured(np.stack([np.rot90(TRAIN.pixels[5])])).worst[0]
    assert worst.distances == pytest.approx({"features": 0, "thumbnails": 0}, abs=1e-9)


def test_a_shifted_copy_is_found_where_the_features_know_it() -> None:
    """Features that a shift does not move, as an extractor's may be; its thumbnail is another image's."""
    shifted = np.roll(TRAIN.pixels[42], 11, axis=1)[None]
    of_copy = [TRAIN.cls[[42]] if view == 0 else stand_in(textures(1, seed=view)) for view in range(8)]
    result = measure_memorization(
        train=TRAIN, test=TEST, generated_views=of_copy, generated=image_set("g", shifted, two_classes(1)), seed=0
    )
    assert (result.near_copies, result.worst[0].found_by) == ([0], "features")
    assert result.overall.generated["thumbnails"].value == 0


def test_training_images_given_as_generated_are_flagged_overall_and_in_each_class() -> None:
    result = measured(TRAIN.pixels[:60])
    assert result.flagged
    assert result.overall.flagged
    assert {code: found.flagged for code, found in result.classes.items()} == {"MEL": True, "NV": True}
    assert result.overall.generated["either"].value == 1
    assert result.overall.nearness == pytest.approx({"features": 0, "thumbnails": 0}, abs=1e-6)
    assert {name: space.generated_same_class for name, space in result.spaces.items()} == {
        "features": 1, "thumbnails": 1,
    }  # fmt: skip
    assert result.verdict.startswith("memorisation found: 100.0 %")


def test_unseen_lesions_given_as_generated_are_not_flagged() -> None:
    result = measured(textures(80, seed=4))
    assert not result.flagged
    assert result.overall.generated["either"].value <= 0.05
    assert result.overall.nearness == pytest.approx({"features": 1, "thumbnails": 1}, abs=0.1)
    assert result.verdict.startswith("no memorisation shown: ")


def test_a_larger_share_whose_interval_meets_that_of_unseen_images_is_not_flagged() -> None:
    """One copy among 20 images: 5 % or more, but scipy's interval for 1 of 20 begins at 0.9 %."""
    result = measured(np.concatenate([textures(19, seed=3), TRAIN.pixels[:1]]))
    assert result.overall.test is not None
    assert result.overall.generated["either"].value > result.overall.test["either"].value
    assert not result.flagged


def test_one_class_of_copies_is_enough_to_flag() -> None:
    """Six copies among 206 images, all of them melanomas."""
    pixels = np.concatenate([textures(200, seed=3), TRAIN.pixels[1:13:2]])
    labels = np.array([NV] * 200 + [MEL] * 6)
    result = measured(pixels, labels)
    assert [code for code, found in result.classes.items() if found.flagged] == ["MEL"]
    assert result.flagged
    assert not result.overall.flagged
    assert "found in MEL" in result.verdict


# --- distances ------------------------------------------------------------------------------------------------------


def test_a_feature_distance_is_one_minus_the_cosine_of_standardised_features_at_its_least() -> None:
    pixels = textures(6, seed=3)
    deviation = TRAIN.cls.std(axis=0)
    scale = np.maximum(deviation, np.median(deviation))
    bank = (TRAIN.cls - TRAIN.cls.mean(axis=0)) / scale
    least = []
    for number in range(6):
        queries = [(view[number] - TRAIN.cls.mean(axis=0)) / scale for view in in_views(pixels)]
        cosines = [bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query) for query in queries]
        least.append(1 - np.max(cosines))
    assert measured(pixels).spaces["features"].generated_median == pytest.approx(np.median(least), abs=1e-5)


def test_a_thumbnail_distance_is_one_minus_the_cosine_of_8_by_8_means_at_its_least() -> None:
    def thumbnail(image: np.ndarray) -> np.ndarray:
        cells = image.astype(float).reshape(8, SIZE // 8, 8, SIZE // 8, 3).mean(axis=(1, 3)).ravel()
        return (cells - cells.mean()) / np.linalg.norm(cells - cells.mean())

    pixels = textures(6, seed=3)
    bank = np.stack([thumbnail(image) for image in TRAIN.pixels])
    turned = [[np.rot90(one, k) for one in (image, np.fliplr(image)) for k in range(4)] for image in pixels]
    least = [1 - max((bank @ thumbnail(view)).max() for view in views) for views in turned]
    assert measured(pixels).spaces["thumbnails"].generated_median == pytest.approx(np.median(least), abs=1e-5)


def test_photographs_of_one_lesion_do_not_make_the_limit_small() -> None:
    twice = np.repeat(np.arange(160), 2)
    train = feature_set("train", TRAIN.pixels[twice], TRAIN.labels[twice], [f"lesion {number}" for number in twice])
    assert measured(textures(4, seed=3), train=train).spaces["thumbnails"].limit == pytest.approx(
        measured(textures(4, seed=3)).spaces["thumbnails"].limit, abs=1e-6
    )


def test_an_exact_copy_is_one_also_where_training_images_repeat_under_other_lesions() -> None:
    twice = np.repeat(np.arange(80), 2)
    train = feature_set("train", TRAIN.pixels[twice], TRAIN.labels[twice])
    result = measured(np.concatenate([textures(9, seed=3), TRAIN.pixels[:1]]), train=train)
    assert result.near_copies == [9]


# --- limits and shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "tries", "expected"),
    [
        (1000, 1, (10, 10, 10 / 1001)),
        (1000, 8, (10, 1, 10 / 1001)),
        (1600, 8, (16, 2, 16 / 1601)),
        (50, 8, (1, 1, 1 / 51)),
    ],
)
def test_limits_are_the_smallest_calibration_distances_at_the_quantile_and_at_an_eighth_of_it(
    count: int, tries: int, expected: tuple[float, float, float]
) -> None:
    calibration = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    limits = Limits.of(calibration, 0.01, tries)
    assert (limits.one_try, limits.any_try, limits.level) == pytest.approx(expected)


def test_eight_tries_under_the_strict_limit_succeed_as_often_as_one_under_the_limit() -> None:
    generator = np.random.default_rng(0)
    once, best = [], []
    for _ in range(400):
        limits = Limits.of(generator.random(400), 0.02, 8)
        once.append(np.mean(generator.random(500) <= limits.one_try))
        best.append(np.mean(generator.random((500, 8)).min(axis=1) <= limits.any_try))
    assert np.mean(once) == pytest.approx(8 / 401, rel=0.1)
    assert np.mean(best) == pytest.approx(8 / 401, rel=0.15)


def test_honest_images_are_seldom_flagged_though_they_have_more_views_than_unseen_ones() -> None:
    """Fifty sets of new images against fifty of unseen ones, and features that know nothing of the pixels."""
    flags = []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        unseen, new = (TEST, NEW) if seed % 2 else (NEW, TEST)
        train, test = (tiny_sets.feature_set(part, generator.normal(size=(len(part), 4))) for part in (TRAIN, unseen))
        result = measure_memorization(
            train=train,
            test=test,
            generated_views=[generator.normal(size=(80, 4)).astype(np.float32) for _ in range(8)],
            generated=new,
            seed=0,
        )
        flags.append(result.flagged)
    assert np.mean(flags) <= 0.04


def test_unseen_images_weigh_as_the_generated_mix_of_classes_has_it() -> None:
    """Half of the 20 unseen nevi are doubles, no melanoma is; of 40 generated images a quarter are nevi."""
    pixels = np.concatenate([TRAIN.pixels[:10], textures(30, seed=5)])
    test = feature_set("test", pixels, np.array([NV] * 20 + [MEL] * 20))
    result = measured(textures(40, seed=3), np.array([NV] * 10 + [MEL] * 30), test=test)
    assert result.overall.test is not None
    assert result.overall.test["thumbnails"].value == pytest.approx(0.125)
    nevi, melanomas = (result.classes[code].test for code in ("NV", "MEL"))
    assert nevi is not None
    assert melanomas is not None
    assert (nevi["thumbnails"].value, melanomas["thumbnails"].value) == (0.5, 0)
    # 10 of 40 in 20 trials, 30 of 40 in 20: Kish's (sum w)^2 / sum w^2 is 1600 / 50.
    assert (result.overall.test["thumbnails"].low, result.overall.test["thumbnails"].high) == pytest.approx(
        tuple(binomtest(4, 32).proportion_ci(method="wilson"))
    )


def test_photographs_of_one_unseen_lesion_are_one_trial() -> None:
    pixels = np.concatenate([TRAIN.pixels[:3], textures(7, seed=5)])
    twice = np.repeat(np.arange(10), 2)
    test = feature_set("test", pixels[twice], np.full(20, NV), [f"unseen {number}" for number in twice])
    share = measured(textures(4, seed=3), np.full(4, NV), test=test).overall.test
    assert share is not None
    assert (share["thumbnails"].value, share["thumbnails"].images) == (0.3, 20)
    assert (share["thumbnails"].low, share["thumbnails"].high) == pytest.approx(
        tuple(binomtest(3, 10).proportion_ci(method="wilson"))
    )


def test_nearness_holds_each_image_against_unseen_ones_of_its_class() -> None:
    """Unseen melanomas are copies, so they set a distance of nearly 0; generated nevi are no worse for that."""
    test = feature_set(
        "test", np.concatenate([TRAIN.pixels[:20], textures(40, seed=5)]), np.array([MEL] * 20 + [NV] * 40)
    )
    result = measured(textures(40, seed=3), np.full(40, NV), test=test)
    assert result.overall.nearness == pytest.approx({"features": 1, "thumbnails": 1}, abs=0.15)


# --- what cannot be measured ----------------------------------------------------------------------------------------


def test_a_class_without_unseen_images_keeps_its_share_and_is_not_compared() -> None:
    labels = np.array([NV] * 5 + [DF] * 5)
    result = measured(np.concatenate([textures(5, seed=3), TRAIN.pixels[:5]]), labels)
    assert result.omitted == {"DF": "no unseen image to compare with", "MEL": "no generated image"}
    assert (result.classes["DF"].test, result.classes["DF"].flagged) == (None, False)
    assert result.classes["DF"].generated["either"].value == 1
    assert result.overall.generated["either"].images == 5
    assert result.near_copies == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("of 1 lesions, too few", {"train": feature_set("train", textures(12, 1), two_classes(12), ["same"] * 12)}),
        ("has 5 images of 5 lesions, too few", {"train": feature_set("train", textures(5, 1), two_classes(5))}),
        ("generated has MEL NV, test has DF", {"test": feature_set("test", textures(4, 2), np.full(4, DF))}),
    ],
)
def test_sets_that_show_nothing_are_refused_in_one_line(words: str, changed: dict[str, FeatureSet]) -> None:
    with pytest.raises(DataError, match=words) as refusal:
        measured(TEST.pixels[:3], **changed)
    assert "\n" not in str(refusal.value)


def test_the_worst_pairs_are_the_nearest_in_order_and_name_their_files() -> None:
    pixels = textures(10, seed=3)
    pixels[4], pixels[8] = redrawn(TRAIN.pixels[3]), TRAIN.pixels[6]
    worst = measured(pixels, worst=3).worst
    assert [(pair.generated_path, pair.train_path) for pair in worst[:2]] == [("8.png", "6.png"), ("4.png", "3.png")]
    assert len(worst) == 3
    assert worst[0].share_of_limit < worst[1].share_of_limit <= 1 < worst[2].share_of_limit
    assert (worst[1].generated_class, worst[1].train_class) == ("NV", "MEL")


def test_the_same_seed_draws_the_same_calibration() -> None:
    first, second = (measured(textures(5, seed=3), calibration_images=90) for _ in range(2))
    assert first == second
    assert first.spaces["features"].calibration_images == 90


# --- the page of nearest pairs --------------------------------------------------------------------------------------


RED = (0xB0, 0x00, 0x20)


def picture_set(seed: int, size: int = 64) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    return image_set("any", pixels, np.full(3, MEL))


def pair(view: int = 0, share: float = 0.5) -> Pair:
    return Pair(
        generated_row=1,
        train_row=2,
        generated_path="g.png",
        train_path="t.png",
        generated_class="MEL",
        train_class="VASC",
        view=view,
        found_by="thumbnails",
        distances={"features": 0.1234, "thumbnails": 0.00042},
        share_of_limit=share,
    )


def holds(page: np.ndarray, tile: np.ndarray) -> bool:
    """Whether the tile stands anywhere on the page, pixel for pixel."""
    corners = np.argwhere((page == tile[0, 0]).all(axis=-1))
    height, width = tile.shape[:2]
    return any(np.array_equal(page[y : y + height, x : x + width], tile) for y, x in corners)


@pytest.mark.parametrize("view", range(8))
def test_a_pair_shows_the_generated_image_turned_and_the_training_image_as_it_is(view: int) -> None:
    generated, train = picture_set(1), picture_set(2)
    page = np.asarray(nearest_pairs([pair(view)], generated, train))
    twice = np.ones((2, 2, 1), dtype=np.uint8)
    assert holds(page, np.kron(apply_view(generated.pixels[1], view), twice))
    assert holds(page, np.kron(train.pixels[2], twice))


def test_the_page_is_white_about_1400_pixels_wide_and_eight_pairs_go_to_a_row() -> None:
    pages = [nearest_pairs([pair()] * count, picture_set(1), picture_set(2)) for count in (1, 8, 9, 16)]
    heights = [page.height for page in pages]
    assert heights[0] == heights[1] < heights[2] == heights[3]
    assert all(1350 <= page.width <= 1400 for page in pages)
    assert {pages[2].getpixel(at) for at in ((0, 0), (pages[2].width - 1, heights[2] - 1))} == {(255, 255, 255)}


def test_stripes_have_the_colours_of_the_two_classes() -> None:
    page = np.asarray(nearest_pairs([pair()], picture_set(1), picture_set(2)))
    colours = {one.code: tuple(bytes.fromhex(one.colour[1:])) for one in ISIC7.diagnoses}
    for code in ("MEL", "VASC"):
        assert (page == colours[code]).all(axis=-1).sum() >= 8 * 128


@pytest.mark.parametrize(("share", "marked"), [(0.9, True), (1.0, True), (1.1, False)])
def test_only_a_pair_within_the_limit_is_red(share: float, marked: bool) -> None:
    blank = picture_set(1)
    blank.pixels[:] = 200
    page = np.asarray(nearest_pairs([pair(share=share)], blank, blank))
    assert (page == RED).all(axis=-1).any() == marked


@pytest.mark.parametrize("size", [8, 96, 140, 256])
def test_images_of_any_size_fit_their_column(size: int) -> None:
    page = nearest_pairs([pair()] * 8, picture_set(1, size), picture_set(2, size))
    assert page.width == nearest_pairs([pair()], picture_set(1), picture_set(2)).width


# --- real images ----------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not HAM10000.is_dir(), reason="../shared/ham10000 is not here")
def test_on_real_images_copies_are_flagged_and_unseen_lesions_are_not() -> None:
    lines = (HAM10000 / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    once = set({line.split(",")[2]: line.split(",")[0] for line in lines}.values())  # one photograph of each lesion
    files = [
        path
        for code in ("MEL", "NV")
        for path in [path for path in sorted((HAM10000 / code).glob("*.jpg")) if path.stem in once][::12][:80]
    ]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in files])
    labels, place = np.array([ISIC7.index(path.parent.name) for path in files]), np.arange(len(files)) % 8
    extractor = load_feature_extractor("efficientnet-lite0", input_size=64, crop="whole")

    def cls(images: np.ndarray, view: int = 0) -> np.ndarray:
        return extract_view(extractor, images, view, "cpu").cls.numpy()

    train, test = (
        tiny_sets.feature_set(image_set(name, pixels[rows], labels[rows]), cls(pixels[rows]))
        for name, rows in (("train", place < 6), ("test", place == 6))
    )

    def given_as_generated(images: np.ndarray, of: np.ndarray) -> MemorizationResult:
        views = [cls(images, view) for view in range(8)]
        return measure_memorization(
            train=train, test=test, generated_views=views, generated=image_set("generated", images, of), seed=0
        )

    copies = np.stack([jpeg(np.ascontiguousarray(apply_view(image, 5))) for image in train.pixels[::4]])
    found = given_as_generated(copies, train.labels[::4])
    assert found.flagged
    assert found.overall.generated["either"].value >= 0.9
    assert set(found.classes) == {"MEL", "NV"}
    assert not given_as_generated(pixels[place == 7], labels[place == 7]).flagged
