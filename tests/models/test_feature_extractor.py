"""Preprocessing is torchvision's, keys follow what shapes the features, the EfficientNet-Lites are the published ones.

PanDerm is in test_panderm.py, timm's models in test_timm.py.
"""

import hashlib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchvision import transforms

from m2d.errors import CheckpointError, ConfigError
from m2d.models.extractors import (
    EfficientNetLite,
    FeatureExtractor,
    extractor_key,
    load_feature_extractor,
    packaged_weights,
)
from m2d.models.extractors.panderm import MEAN, STD
from m2d.models.extractors.weights import file_sha256
from m2d.models.settings import Crop, FeatureExtractorConfig

HAM10000 = Path(__file__).resolve().parents[2].parent / "shared" / "ham10000"
LITES = ["efficientnet-lite0", "efficientnet-lite1"]
LITE2 = "efficientnet-lite2"

# Kernel, stride, expansion and repeats of the seven stages: the EfficientNet-Lite0 of the TensorFlow TPU repository.
STAGES = ((3, 1, 1, 1), (3, 2, 6, 2), (5, 2, 6, 2), (3, 2, 6, 3), (5, 1, 6, 3), (5, 2, 6, 4), (3, 1, 6, 1))


def packaged_state(name: str = LITES[0]) -> dict[str, Tensor]:
    return dict(torch.load(packaged_weights(name), weights_only=True))


def lite_of(name: str) -> EfficientNetLite:
    network = load_feature_extractor(name, input_size=96, crop="whole")
    assert isinstance(network, EfficientNetLite)
    return network


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite:
    return lite_of(LITES[0])


@pytest.fixture(scope="module")
def lite1() -> EfficientNetLite:
    return lite_of(LITES[1])


def some_images(side: int = 96) -> Tensor:
    return (torch.arange(2 * 3 * side * side).view(2, 3, side, side) * 7 % 251).to(torch.uint8)


def refusal_of(name: str, path: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        load_feature_extractor(name, str(path))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def published_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written out by the file's own names: TensorFlow's `SAME` padding, ReLU6, batch norm of eps 1e-3."""

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel, side = weight.shape[-1], x.shape[-1]
        pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def normalize(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.relu6(normalize(convolve(x, "_conv_stem", 2), "_bn0"))
    block = 0
    for _, stride, expansion, repeats in STAGES:
        for repeat in range(repeats):
            name, entered, step = f"_blocks.{block}", x, stride if repeat == 0 else 1
            if expansion != 1:
                x = F.relu6(normalize(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
            x = F.relu6(normalize(convolve(x, f"{name}._depthwise_conv", step), f"{name}._bn1"))
            x = normalize(convolve(x, f"{name}._project_conv"), f"{name}._bn2")
            x = x + entered if x.shape == entered.shape and step == 1 else x
            block += 1
    x = F.relu6(normalize(convolve(x, "_conv_head"), "_bn1"))
    return F.linear(x.mean(dim=(2, 3)), state["_fc.weight"], state["_fc.bias"])


def test_lite0s_logits_are_the_published_networks(extractor: EfficientNetLite) -> None:
    x = extractor.preprocess(some_images())
    with torch.no_grad():
        logits = extractor.network.classifier(extractor(x).cls)
        assert_close(logits, published_logits(packaged_state(), x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [LITES[1], LITE2])
def test_a_lite_is_timms_network_with_the_wheels_tensors(name: str) -> None:
    network = timm.create_model(f"tf_{name.replace('-', '_')}", pretrained=False).eval()
    network.load_state_dict(dict(zip(network.state_dict(), packaged_state(name).values(), strict=True)))
    x, lite = (some_images().float() - 127) / 128, lite_of(name)
    with torch.no_grad():
        features = lite(lite.preprocess(some_images()))
        assert_close(features.patches, network.forward_features(x).flatten(2).transpose(1, 2), rtol=0, atol=0)
        assert_close(lite.network.classifier(features.cls), network(x), atol=1e-5, rtol=1e-5)


def test_each_lite_says_another_thing(lite1: EfficientNetLite, extractor: EfficientNetLite) -> None:
    said = [network(network.preprocess(some_images())).cls for network in (extractor, lite1, lite_of(LITE2))]
    for first, second in combinations(said, 2):
        assert F.cosine_similarity(first, second).abs().max() < 0.5


@pytest.mark.parametrize("name", [LITES[1], LITE2])
def test_a_lites_official_crop_is_its_authors_share_of_the_shorter_side(name: str) -> None:
    """timm's configuration of the network, in three digits."""
    published = timm.create_model(f"tf_{name.replace('-', '_')}").default_cfg["crop_pct"]
    assert lite_of(name).crop_pct == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("name", LITES)
@pytest.mark.parametrize("side", [32, 128])
def test_there_is_a_patch_for_every_32_by_32_pixels_and_cls_is_their_mean(name: str, side: int) -> None:
    network = load_feature_extractor(name, input_size=side)
    features = network(torch.zeros(1, 3, side, side))
    assert features.patches.shape == (1, (side // 32) ** 2, 1280)
    assert (network.num_patches, network.dim) == ((side // 32) ** 2, 1280)
    assert_close(features.cls, features.patches.mean(dim=1))


def test_patches_go_row_by_row(extractor: EfficientNetLite) -> None:
    """A spot in the last cell of the first row changes that token more than the first of the last row."""
    plain = torch.zeros(1, 3, 96, 96)
    spotted = plain.clone()
    spotted[..., :32, 64:] = 1.0
    change = (extractor(spotted).patches - extractor(plain).patches).norm(dim=-1).squeeze(0)
    assert change[2] > change[6]


@pytest.mark.parametrize(("pixel", "expected"), [(0, -127 / 128), (127, 0.0), (255, 1.0)])
def test_preprocessing_is_pixel_minus_127_over_128(extractor: EfficientNetLite, pixel: int, expected: float) -> None:
    images = torch.full((1, 3, 40, 40), pixel, dtype=torch.uint8)
    assert_close(extractor.preprocess(images), torch.full((1, 3, 96, 96), expected))
    images = some_images()  # of its own size: unresized
    assert_close(extractor.preprocess(images), (images.float() - 127) / 128, rtol=0, atol=0)


def test_float_pixels_carry_a_gradient_through_the_resize(extractor: EfficientNetLite) -> None:
    pixels = some_images(64).float().requires_grad_()
    extractor(extractor.preprocess(pixels)).cls.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LITES[:2])
def test_the_pyramid_halves_from_stride_two_to_sixteen(name: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue("extractor" if name == LITES[0] else "lite1")
    maps = network.pyramid(torch.zeros(1, 3, 96, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 48, 48), (24, 24, 24), (40, 12, 12), (112, 6, 6)]


def test_train_does_not_wake_its_batch_norms_and_no_parameter_asks_for_a_gradient(extractor: EfficientNetLite) -> None:
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


State = dict[str, Tensor]
SPOILT: dict[str, Callable[[State], State]] = {
    "one tensor less": lambda state: dict(list(state.items())[:-1]),
    "another shape": lambda state: state | {"_conv_stem.weight": torch.zeros(16, 3, 3, 3)},
    # weight and bias of a batch norm have one shape; only the names tell them apart
    "a renamed leaf": lambda state: {name.replace("_bn0.bias", "_bn0.scale"): tensor for name, tensor in state.items()},
    "two exchanged": lambda state: {
        name: state[name] for name in sorted(state, key=lambda name: name == "_bn0.weight")
    },
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_does_not_fit_exactly_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    torch.save(SPOILT[how](packaged_state()), tmp_path / "spoilt.pth")
    assert f"is not {LITES[0]}" in refusal_of(LITES[0], tmp_path / "spoilt.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"not a checkpoint", "is no file by torch.save"),
        (b"\x80\x04K\x01.", "file.pth"),
        (torch.zeros(3), "named tensors"),
        ({"epoch": 3}, "named tensors"),
    ],
    ids=["empty", "text", "pickle", "a tensor", "a number"],
)
def test_what_is_no_state_dict_is_refused_in_one_line(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert words in refusal_of(LITES[0], path)


def test_a_nan_in_the_file_is_refused(tmp_path: Path) -> None:
    state = packaged_state()
    torch.save(state | {"_bn0.bias": torch.full_like(state["_bn0.bias"], float("nan"))}, tmp_path / "nan.pth")
    assert "NaN or infinite values in bn1.bias" in refusal_of(LITES[0], tmp_path / "nan.pth")


@pytest.mark.parametrize(("name", "other"), [LITES, LITES[::-1]], ids=["Lite1's into Lite0", "Lite0's into Lite1"])
def test_one_lites_file_is_refused_for_the_other(name: str, other: str) -> None:
    assert f"is not {name}" in refusal_of(name, packaged_weights(other))


# --- preprocessing, the same for all extractors


def preprocessing(size: int, crop: Crop) -> FeatureExtractor:
    """PanDerm's, without a network."""
    mean, std = 255 * torch.tensor(MEAN), 255 * torch.tensor(STD)
    return FeatureExtractor("panderm-large", 1024, size, mean, std, num_patches=196, crop=crop)


def grey_level_error(image: Image.Image, size: int, crop: Crop) -> Tensor:
    """How far preprocessing lies from torchvision's PIL transforms, in grey levels of 0..255, pixel by pixel.

    Official: the transforms of PanDerm's builder.py at 224 px, with their ratio at other sizes.
    """
    resize = (
        [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
        if crop == "official"
        else [transforms.Resize((size, size))]
    )
    published = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))]
    expected = transforms.Compose([*resize, *published])(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    found = preprocessing(size, crop).preprocess(pixels).squeeze(0)
    return ((found - expected) * torch.tensor([0.228, 0.224, 0.225]).view(3, 1, 1) * 255).abs()


@pytest.mark.parametrize("crop", ["official", "whole"])
@pytest.mark.parametrize("size", [224, 256])
@pytest.mark.parametrize("shape", [(450, 600), (600, 450), (64, 64), (300, 1001), (257, 255)])
def test_noise_is_preprocessed_to_within_a_grey_level_of_torchvision(
    shape: tuple[int, int], size: int, crop: Crop
) -> None:
    """Noise is the worst case: PIL rounds after each of its two passes, half a level each time; we do not round."""
    noise = np.random.default_rng(0).integers(0, 256, size=(*shape, 3), dtype=np.uint8)
    error = grey_level_error(Image.fromarray(noise), size, crop)
    assert error.shape == (3, size, size)
    assert error.max() <= 1.01
    assert error.mean() <= 0.35


@pytest.mark.real_data
@pytest.mark.skipif(not HAM10000.is_dir(), reason="../shared/ham10000 is not here")
@pytest.mark.parametrize("crop", ["official", "whole"])
def test_dermoscopy_images_are_preprocessed_to_within_a_grey_level_of_torchvision(crop: Crop) -> None:
    paths = sorted(HAM10000.glob("*/*.jpg"))[::1000]
    errors = [grey_level_error(Image.open(path).convert("RGB"), 224, crop) for path in paths]
    assert torch.stack([error.max() for error in errors]).max() <= 1.01
    assert torch.stack([error.mean() for error in errors]).mean() <= 0.35


def test_whole_keeps_each_part_of_the_image_in_its_place() -> None:
    """The right quarter of a wide image is the right quarter of the square."""
    images = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)
    images[..., 96:] = 255
    found = preprocessing(64, "whole").preprocess(images)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert_close(found[0, :, :, 50:], white.view(3, 1, 1).expand(3, 64, 14))


# --- keys


@pytest.mark.parametrize(("name", "size", "patches"), [(LITES[0], 224, 49), (LITES[1], 256, 64)])
def test_a_key_is_name_hash_size_and_crop_and_the_settings_key_builds_no_network(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int, patches: int
) -> None:
    loaded = load_feature_extractor(name, crop="whole")
    assert loaded.weights_sha256 == hashlib.sha256(packaged_weights(name).read_bytes()).hexdigest()
    assert (loaded.input_size, loaded.num_patches) == (size, patches)
    assert loaded.key == f"{name}-{loaded.weights_sha256[:12]}-{size}-whole"
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a network was built"))
    assert extractor_key(FeatureExtractorConfig(name=name)) == loaded.key


def test_a_key_follows_the_files_content_not_its_name_and_the_settings(tmp_path: Path) -> None:
    def key(file: str, content: bytes, **changes: object) -> str:
        (tmp_path / file).write_bytes(content)
        settings: dict[str, object] = {"name": "panderm-base", "weights": str(tmp_path / file)} | changes
        return extractor_key(FeatureExtractorConfig(**settings))  # type: ignore[arg-type]

    first = key("a.pth", b"one")
    assert first == key("b.pth", b"one") == f"panderm-base-{hashlib.sha256(b'one').hexdigest()[:12]}-224-whole"
    assert key("a.pth", b"two") != first
    for change in ({"input_size": 256}, {"crop": "official"}, {"name": "panderm-large"}):
        assert key("b.pth", b"one", **change) != first


def test_a_key_is_safe_as_a_folders_name() -> None:
    extractor = FeatureExtractor("timm:a/b c.d-1_2", 1, 224, torch.zeros(3), torch.ones(3), num_patches=1)
    assert extractor.key == "timm-a-b-c.d-1_2-000000000000-224-whole"


def test_hashing_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth cannot be read \(No such file or directory\)"):
        file_sha256(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "panderm-large"}, "docs/panderm.md"),
        ({"name": "panderm-huge"}, "known: efficientnet-lite0 efficientnet-lite1 efficientnet-lite2 panderm-large"),
        ({"name": "timm:"}, "known:"),
        ({"name": "efficientnet-lite0", "input_size": 48}, "multiple of 32"),
        ({"name": "efficientnet-lite1", "input_size": 240}, "multiple of 32"),
        ({"name": "panderm-base", "weights": __file__, "input_size": 250}, "multiple of 16"),
        ({"name": "panderm-base", "weights": __file__, "input_size": 16}, "at least 32"),
        ({"name": "timm:resnet18", "input_size": 0}, "at least 1"),
        ({"crop": "middle"}, "crop is middle; known: whole official"),
        ({"weights": "nowhere.pth"}, "nowhere.pth is not a file"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=r"feature_extractor\.") as refusal:
        FeatureExtractorConfig(**settings)  # type: ignore[arg-type]
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
