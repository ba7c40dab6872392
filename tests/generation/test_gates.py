"""The gates: thresholds by hand on a circle, planted copies, strangers and blanks; the reference and its file."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_networks import IMAGE_SIZE, TinyExtractor

from m2d.classes import ISIC7
from m2d.data.catalog import catalog_hash, scan_dataset
from m2d.data.features import FeatureStore, extract_view, write_features
from m2d.data.reader import ImageReader
from m2d.data.settings import DataConfig
from m2d.data.views import apply_view
from m2d.errors import ConfigError, DataError
from m2d.generation.gates import GateReference, ImageFacts, Verdict, active_gates, build_gate_reference, check
from m2d.generation.settings import GateConfig
from m2d.models.extractors import load_feature_extractor

EXTRACTOR = TinyExtractor()
HAM10000 = Path(__file__).parents[3] / "shared" / "ham10000"
ANGLES = np.array([0, 10, 90, 100, 180, 190, 270, 280])  # degrees; mean 0 and deviation 1 along both axes
MEL, NV, DF = (ISIC7.index(code) for code in ("MEL", "NV", "DF"))
TWO_CLASSES = np.array([MEL] * 4 + [NV] * 4)
ALONE = [f"lesion {angle}" for angle in ANGLES]


def on_circle(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return (math.sqrt(2) * np.stack([np.cos(radians), np.sin(radians)], axis=1)).astype(np.float32)


def apart(degrees: float) -> float:
    """The distance of two directions."""
    return 1 - math.cos(math.radians(degrees))


def textures(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Smooth random colours, uint8 [count, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in coarse])


def verdicts_on(features: np.ndarray, labels: list[str], reference: GateReference, config: GateConfig) -> list[Verdict]:
    return check(textures(len(labels), seed=5), features, labels, reference, config)


# --- thresholds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantile", "expected"), [(0.0, apart(10)), (1.0, apart(80)), (0.7, apart(10))])
def test_the_copy_threshold_is_a_quantile_of_the_distances_between_lesions(quantile: float, expected: float) -> None:
    """0 and 10 degrees are one lesion, so their nearest are 80 degrees off; the six others have one 10 degrees off."""
    lesions = ["pair", "pair", *ALONE[2:]]
    config = GateConfig(near_copy_quantile=quantile)
    reference = GateReference.build(on_circle(*ANGLES), TWO_CLASSES, lesions, config)
    assert reference.copy_threshold == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("quantile", "lesions", "expected"),
    [
        (1.0, ALONE, (apart(10) + apart(90)) / 2),
        (0.0, ALONE, (apart(10) + apart(80)) / 2),
        (1.0, ["pair", "pair", *ALONE[2:]], (apart(90) + apart(100)) / 2),  # the own lesion is left out
    ],
)
def test_a_class_threshold_is_a_quantile_of_mean_distances_to_the_nearest_of_the_class(
    quantile: float, lesions: list[str], expected: float
) -> None:
    config = GateConfig(class_quantile=quantile, neighbours=2)
    reference = GateReference.build(on_circle(*ANGLES), TWO_CLASSES, lesions, config, weak_below=4)
    assert reference.class_thresholds[MEL] == pytest.approx(expected, abs=1e-6)
    assert reference.class_thresholds[DF] is None
    assert reference.weak == []


def test_a_class_of_few_images_gets_the_widest_threshold_and_is_called_weak() -> None:
    def built(*degrees: float) -> tuple[GateReference, float, float]:
        features, labels = on_circle(*ANGLES, *degrees), np.array([*TWO_CLASSES, DF, DF, DF])
        config = GateConfig(class_quantile=1.0, neighbours=2)
        reference = GateReference.build(features, labels, [str(row) for row in range(11)], config, weak_below=4)
        of_mel, of_nv, of_df = (reference.class_thresholds[label] or 0 for label in (MEL, NV, DF))
        return reference, max(of_mel, of_nv), of_df

    close, widest, of_df = built(45, 46, 47)
    assert (close.weak, of_df) == (["DF"], widest)
    _, widest, of_df = built(45, 165, 285)  # further apart than any class
    assert of_df > widest


def test_images_in_any_order_make_the_same_reference() -> None:
    order = np.array([6, 2, 0, 5, 7, 3, 1, 4])
    lesions, ids = np.array(["pair", "pair", *ALONE[2:]]), np.array([f"ISIC_{angle}" for angle in ANGLES])
    config = GateConfig(near_copy_quantile=1, class_quantile=1, neighbours=2)
    sorted_, mixed = (
        GateReference.build(on_circle(*ANGLES)[rows], TWO_CLASSES[rows], lesions[rows], config, ids=ids[rows].tolist())
        for rows in (np.arange(8), order)
    )
    assert mixed.copy_threshold == pytest.approx(sorted_.copy_threshold, abs=1e-6)
    assert mixed.class_thresholds[NV] == pytest.approx(sorted_.class_thresholds[NV], abs=1e-6)
    assert [verdicts_on(on_circle(angle), ["NV"], mixed, config)[0].nearest_id for angle in ANGLES] == ids.tolist()


def test_one_lesion_alone_still_makes_a_reference() -> None:
    """Nothing to calibrate on: an exact copy is refused, nothing is outside its class."""
    reference = GateReference.build(on_circle(0, 10, 100), np.array([DF] * 3), ["one"] * 3, GateConfig())
    copy, other = verdicts_on(on_circle(10, 190), ["DF", "DF"], reference, GateConfig())
    assert (copy.reason, other.reason) == ("near_copy", None)


def test_many_images_are_calibrated_on_a_draw_that_is_always_the_same() -> None:
    features = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    labels, lesions, config = np.arange(400) % 3, [str(row) for row in range(400)], GateConfig(near_copy_quantile=0.5)
    whole, drawn, again = (
        GateReference.build(features, labels, lesions, config, calibration_images=most).copy_threshold
        for most in (400, 100, 100)
    )
    assert drawn == again == pytest.approx(whole, rel=0.2)


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def circle() -> GateReference:
    """Copies: up to 10 degrees. MEL: mean distance to two up to that of 10 and 90 degrees."""
    config = GateConfig(near_copy_quantile=0, class_quantile=1, neighbours=2)
    ids = [f"ISIC_{angle}" for angle in ANGLES]
    return GateReference.build(on_circle(*ANGLES), TWO_CLASSES, ALONE, config, ids=ids, weak_below=4)


@pytest.mark.parametrize(
    ("degrees", "label", "reason", "nearest_id"),
    [
        (90, "MEL", "near_copy", "ISIC_90"),  # an exact copy
        (280, "MEL", "near_copy", "ISIC_280"),  # of another class's image, too
        (109, "MEL", "near_copy", "ISIC_100"),
        (111, "MEL", None, "ISIC_100"),
        (235, "MEL", "outside_class", "ISIC_190"),
        (235, "NV", None, "ISIC_190"),
        (235, "DF", None, "ISIC_190"),  # no image of it to be compared with
    ],
)
def test_copies_and_strangers_are_refused(
    circle: GateReference, degrees: float, label: str, reason: str | None, nearest_id: str
) -> None:
    verdict = verdicts_on(on_circle(degrees), [label], circle, GateConfig())[0]
    assert (verdict.reason, verdict.accepted) == (reason, reason is None)
    if degrees != 235:  # as far from 270 and 280 as from 190 and 180
        assert verdict.nearest_id == nearest_id


@pytest.mark.parametrize(
    ("own", "degrees", "reason", "nearest"),
    [
        ((), 90, "near_copy", 0),
        (("ISIC_90",), 90, None, 10),  # its own image, and then 100 degrees is the nearest, 10 degrees off
        (("ISIC_90",), 96, "near_copy", 4),  # of another lesion's image
        (("ISIC_90", "ISIC_100"), 96, None, 84),  # two images of its lesion
        (("ISIC_270",), 90, "near_copy", 0),
        (("elsewhere",), 90, "near_copy", 0),
    ],
)
def test_a_variation_may_be_near_its_own_lesion_alone(
    circle: GateReference, own: tuple[str, ...], degrees: float, reason: str | None, nearest: float
) -> None:
    strict = replace(circle, copy_threshold=apart(9))
    both = check(textures(2, seed=5), on_circle(90, degrees), ["MEL", "MEL"], strict, GateConfig(), [(), own])
    assert [verdict.reason for verdict in both] == ["near_copy", reason], "each by its own"
    assert both[1].nearest_distance == pytest.approx(apart(nearest), abs=1e-6)


def test_by_pixels_too_a_variation_may_be_near_its_own_lesion_alone() -> None:
    train = textures(8, seed=10)
    ids = [f"image {row}" for row in range(8)]
    reference = GateReference.build(None, np.arange(8) % 7, ids, GateConfig(), ids=ids, facts=ImageFacts.of(train))
    copies = np.stack([train[2]] * 3)
    own = [("image 2",), ("image 3",), ("image 2", "image 3")]
    verdicts = check(copies, None, ["AKIEC"] * 3, reference, GateConfig(), own)
    assert [verdict.reason for verdict in verdicts] == [None, "near_copy", None]


def test_images_that_share_one_of_two_lesions_may_be_near_their_own_alone() -> None:
    """Two lesions each, as of inpainted images."""
    train = textures(8, seed=10)
    ids = [f"image {row}" for row in range(8)]
    reference = GateReference.build(None, np.arange(8) % 7, ids, GateConfig(), ids=ids, facts=ImageFacts.of(train))
    own = [("image 2", "image 3"), ("image 3", "image 4"), ("image 4",)]
    for copied, reasons in (
        (2, [None, "near_copy", "near_copy"]),
        (3, [None, None, "near_copy"]),
        (4, ["near_copy", None, None]),
    ):
        verdicts = check(np.stack([train[copied]] * 3), None, ["AKIEC"] * 3, reference, GateConfig(), own)
        assert [verdict.reason for verdict in verdicts] == reasons


def test_a_verdict_tells_its_distances(circle: GateReference) -> None:
    verdict = verdicts_on(on_circle(130), ["MEL"], circle, GateConfig())[0]
    assert verdict.nearest_distance == pytest.approx(apart(30), abs=1e-6)
    assert verdict.class_distance == pytest.approx((apart(30) + apart(40)) / 2, abs=1e-6)
    assert math.isnan(verdict.pixel_distance)


def test_a_feature_that_is_not_finite_is_outside_its_class(circle: GateReference) -> None:
    verdict = verdicts_on(np.full((1, 2), np.nan, np.float32), ["MEL"], circle, GateConfig())[0]
    assert verdict.reason == "outside_class"


@pytest.mark.parametrize("off", [{"near_copy": False, "class_consistency": False}, {"enabled": False}])
def test_a_gate_that_is_off_refuses_nothing_and_still_measures(circle: GateReference, off: dict[str, bool]) -> None:
    verdicts = verdicts_on(on_circle(90, 235), ["MEL", "MEL"], circle, GateConfig(**off))
    assert all(verdict.accepted for verdict in verdicts)
    assert verdicts[0].nearest_distance == pytest.approx(0, abs=1e-9)
    if not off.get("enabled", True):
        assert check(np.stack([flat(0)]), on_circle(0), ["MEL"], circle, GateConfig(**off))[0].accepted


def test_a_verdict_does_not_depend_on_the_batch(circle: GateReference) -> None:
    features, images = on_circle(*range(0, 360, 7)), textures(52, seed=3)
    labels = [("MEL", "NV", "DF")[row % 3] for row in range(52)]
    together = check(images, features, labels, circle, GateConfig())
    for row in range(0, 52, 5):
        alone = check(images[row : row + 1], features[row : row + 1], labels[row : row + 1], circle, GateConfig())[0]
        assert alone.reason == together[row].reason
        assert alone.nearest_distance == pytest.approx(together[row].nearest_distance, abs=1e-7)
        assert alone.class_distance == pytest.approx(together[row].class_distance, abs=1e-7, nan_ok=True)


def _jpeg(image: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=75)
    return np.asarray(Image.open(stream).convert("RGB"))


def _blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))


def _noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(9).normal(0, 5, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": lambda image: image,
    **{f"view {view}": lambda image, view=view: apply_view(image, view) for view in range(1, 8)},  # type: ignore[misc]
    "JPEG": _jpeg,
    "blur": _blurred,
    "noise": _noisy,
    "brighter": lambda image: (image * 0.9 + 25).astype(np.uint8),
}


@pytest.mark.parametrize("copy", COPIES)
def test_pixels_give_a_copy_away_without_features(copy: str) -> None:
    train = textures(60, seed=10)
    ids = [f"image {row}" for row in range(60)]
    reference = GateReference.build(None, np.arange(60) % 7, ids, GateConfig(), ids=ids, facts=ImageFacts.of(train))
    copies = np.stack([COPIES[copy](image) for image in train[:20]])
    verdicts = check(copies, None, ["AKIEC"] * 20, reference, GateConfig())
    assert [(verdict.reason, verdict.nearest_id) for verdict in verdicts] == [
        ("near_copy", f"image {row}") for row in range(20)
    ]
    others = check(textures(20, seed=2), None, ["AKIEC"] * 20, reference, GateConfig())
    assert sum(verdict.accepted for verdict in others) >= 18  # the nearest one or two of 60 set the threshold


def flat(value: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), value, dtype=np.uint8)


def test_blank_saturated_and_noisy_images_are_refused() -> None:
    faint = flat(120)
    faint[::2] += 4  # deviation 2 grey levels
    burnt = textures(1, seed=0)[0].copy()
    burnt[:20] = 255
    half = textures(1, seed=0)[0].copy()
    half[:15] = 0
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = np.stack([flat(0), flat(255), flat(128), faint, burnt, noise, half, textures(1, seed=0)[0]])
    verdicts = check(images, None, ["NV"] * 8, None, GateConfig())
    assert [verdict.reason for verdict in verdicts] == ["blank"] * 4 + ["saturated", "noise", None, None]
    assert verdicts[3].contrast == pytest.approx(2)
    assert verdicts[4].saturated_share == pytest.approx(20 / 32, abs=0.01)


def test_limits_of_blank_images_come_from_the_settings_then_the_training_images() -> None:
    faint = np.stack([flat(120) for _ in range(40)])
    faint[:, ::2] += 4
    reference = GateReference.build(
        None, np.zeros(40, np.int64), [str(row) for row in range(40)], GateConfig(), facts=ImageFacts.of(faint)
    )
    fainter = flat(120)[None].copy()
    fainter[:, :, ::2] += 3  # deviation 1.5: above half of the training images' 2
    assert check(fainter, None, ["NV"], None, GateConfig())[0].reason == "blank"
    assert check(fainter, None, ["NV"], reference, GateConfig(near_copy=False))[0].reason is None
    assert check(fainter, None, ["NV"], reference, GateConfig(min_contrast=1.6))[0].reason == "blank"


@pytest.mark.parametrize(
    ("config", "features", "pixels", "names"),
    [
        ({}, True, True, "blank near_copy:features near_copy:pixels class_consistency"),
        ({}, False, True, "blank near_copy:pixels"),
        ({}, True, False, "blank near_copy:features class_consistency"),
        ({}, False, False, "blank"),
        ({"blank": False, "near_copy": False}, True, True, "class_consistency"),
        ({"enabled": False}, True, True, ""),
    ],
)
def test_what_gates_run_is_told(config: dict[str, bool], features: bool, pixels: bool, names: str) -> None:
    assert " ".join(active_gates(GateConfig(**config), features=features, pixels=pixels)) == names


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_reference() -> GateReference:
    facts = ImageFacts.of(textures(8, seed=0))
    return GateReference.build(
        on_circle(*ANGLES), TWO_CLASSES, ALONE, GateConfig(), facts=facts, extractor="tiny-1", catalog="c" * 64
    )


def test_a_loaded_reference_is_the_saved_one(full_reference: GateReference, tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.safetensors"
    full_reference.save(path)
    loaded = GateReference.load(path)
    assert vars(loaded).keys() == vars(full_reference).keys()
    for name, value in vars(full_reference).items():
        there = getattr(loaded, name)
        assert torch.equal(there, value) if isinstance(value, torch.Tensor) else there == value, name
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "damage", ["cut", "other file", "absent", "lacks a tensor", "wrong shape", "not finite", "old"]
)
def test_a_damaged_reference_is_refused_in_one_line(full_reference: GateReference, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "reference.safetensors"
    full_reference.save(path)
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "other file":
            save_file({"weights": torch.zeros(3)}, path)
        case "absent":
            path.unlink()
        case "lacks a tensor":
            save_file({name: tensor for name, tensor in tensors.items() if name != "mean"}, path, metadata)
        case "wrong shape":
            save_file(tensors | {"features": torch.zeros(7, 2)}, path, metadata)
        case "not finite":
            save_file(tensors | {"scale": torch.tensor([1, math.nan])}, path, metadata)
        case "old":
            notes = json.loads(metadata["m2d_gate_reference"]) | {"format": 0}
            save_file(tensors, path, {"m2d_gate_reference": json.dumps(notes)})
    with pytest.raises(DataError, match=r"^gate reference: [^\n]+$"):
        GateReference.load(path)


def test_features_that_are_not_finite_are_refused() -> None:
    broken = on_circle(*ANGLES)
    broken[3, 1] = np.inf
    with pytest.raises(DataError, match="finite"):
        GateReference.build(broken, TWO_CLASSES, ALONE, GateConfig())


# --- from a dataset -------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[pa.Table, str]:
    for row, image in enumerate(textures(12, seed=4, size=IMAGE_SIZE)):
        path = tmp_path / "data" / ("MEL" if row % 2 else "NV") / f"image_{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    root = str(tmp_path / "data")
    return scan_dataset(root, DataConfig(image_size=IMAGE_SIZE, val_fraction=0, test_fraction=0)).catalog, root


def built(catalog: pa.Table, root: str, **more: Any) -> GateReference:
    reader = ImageReader(catalog, root, image_size=IMAGE_SIZE, max_pixels=10**6)
    return build_gate_reference(catalog, reader, EXTRACTOR, GateConfig(), batch_size=5, **more)


def test_a_reference_is_built_from_a_dataset(dataset: tuple[pa.Table, str]) -> None:
    reference = built(*dataset)
    assert (reference.extractor, reference.catalog) == (EXTRACTOR.key, catalog_hash(dataset[0]))
    image = np.asarray(Image.open(f"{dataset[1]}/MEL/image_3.png"))[None]
    cls = extract_view(EXTRACTOR, image, 0, "cpu").cls.numpy()
    verdict = check(image, cls, ["MEL"], reference, GateConfig())[0]
    assert (verdict.reason, verdict.nearest_id) == ("near_copy", "image_3")
    assert verdict.nearest_distance == pytest.approx(0, abs=1e-9)
    assert verdict.pixel_distance == pytest.approx(0, abs=1e-9)


def test_cached_features_give_the_same_reference_but_for_their_rounding(
    dataset: tuple[pa.Table, str], tmp_path: Path
) -> None:
    catalog, root = dataset
    images = np.stack([np.asarray(Image.open(f"{root}/{path}")) for path in catalog["path"].to_pylist()])
    sha256 = catalog["sha256"].to_pylist()
    features = extract_view(EXTRACTOR, images, 0, "cpu")
    write_features(tmp_path / "cache", EXTRACTOR.key, IMAGE_SIZE, 0, sha256, features)
    table = FeatureStore(tmp_path / "cache", EXTRACTOR.key, IMAGE_SIZE).table(sha256, 1)
    cached, fresh = built(*dataset, cached=table), built(*dataset)
    assert cached.extractor == fresh.extractor
    torch.testing.assert_close(cached.features, fresh.features, rtol=0, atol=5e-3)


def test_a_file_that_went_bad_is_left_out(dataset: tuple[pa.Table, str]) -> None:
    Path(f"{dataset[1]}/MEL/image_3.png").write_bytes(b"no longer an image")
    reference = built(*dataset)
    assert len(reference.ids) == 11
    assert "image_3" not in reference.ids


# --- real images ----------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not HAM10000.is_dir(), reason="needs ../shared/ham10000")
def test_on_real_images_copies_are_refused_and_other_lesions_pass() -> None:
    paths = {code: sorted((HAM10000 / code).glob("*.jpg"))[:120] for code in ("MEL", "NV")}
    labels = [code for code, of_class in paths.items() for _ in of_class]
    files = [path for of_class in paths.values() for path in of_class]
    lines = (HAM10000 / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    lesion_of = {line.split(",")[0]: line.split(",")[2] for line in lines}
    lesions = [lesion_of[path.stem] for path in files]
    images = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in files])
    extractor = load_feature_extractor("efficientnet-lite0", input_size=64, crop="whole")
    parts = [extract_view(extractor, images[first : first + 32], 0, "cpu").cls for first in range(0, len(images), 32)]
    cls = torch.cat(parts).numpy()
    held_out = np.array([int(lesion[-1]) % 2 == 0 for lesion in lesions])  # by lesion
    train = np.flatnonzero(~held_out)
    codes, facts = np.array([ISIC7.index(label) for label in labels]), ImageFacts.of(images[train])
    of_train = [lesions[row] for row in train]
    reference = GateReference.build(cls[train], codes[train], of_train, GateConfig(), facts=facts)
    others = np.flatnonzero(held_out)
    assert len(others) > 60
    verdicts = check(images[others], cls[others], [labels[row] for row in others], reference, GateConfig())
    assert np.mean([not verdict.accepted for verdict in verdicts]) <= 0.15  # few training images: rough quantiles
    no_features = replace(reference, features=reference.features[:, :0])
    for change in (COPIES["view 2"], COPIES["view 5"], _jpeg, _blurred):
        changed = np.stack([change(image) for image in images[train]])
        verdicts = check(changed, None, [labels[row] for row in train], no_features, GateConfig())
        assert np.mean([verdict.reason == "near_copy" for verdict in verdicts]) >= 0.9


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"near_copy_quantile": -0.1},
        {"class_quantile": 1.5},
        {"class_quantile": math.nan},
        {"neighbours": 0},
        {"max_attempts": 0},
        {"min_contrast": 300.0},
        {"max_saturated_share": -1.0},
        {"max_roughness": -1.0},
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^gates\.{next(iter(wrong))} is [^\n]+$"):
        GateConfig(**wrong)
