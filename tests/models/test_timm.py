"""timm's models, its small test networks where they will do, as extractors: held to what timm itself computes."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.errors import CheckpointError, ConfigError
from m2d.models.extractors import FeatureExtractor, extractor_key, load_feature_extractor
from m2d.models.extractors import timm as timm_extractor
from m2d.models.extractors.base import features_of
from m2d.models.settings import FeatureExtractorConfig


def timm_network(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **options).eval()
    for parameter in network.parameters():  # some layers start as zeros, and would hide what is behind them
        nn.init.normal_(parameter, std=0.1)
    return network


def weights_of(network: nn.Module, folder: Path, suffix: str = "safetensors") -> str:
    path = folder / f"weights.{suffix}"
    state = network.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    return str(path)


def some_inputs(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_vit_gives_its_class_token_and_its_patches(tmp_path: Path, suffix: str) -> None:
    network = timm_network("test_vit")
    extractor = load_feature_extractor("timm:test_vit", weights_of(network, tmp_path, suffix))
    features = extractor(some_inputs(160))
    tokens = network.forward_features(some_inputs(160))
    assert_close(features.cls, tokens[:, 0])
    assert_close(features.patches, tokens[:, 1:])
    assert (extractor.dim, extractor.num_patches, extractor.input_size) == (64, 100, 160)


def test_register_tokens_are_no_patches() -> None:
    """timm's ViT with 4 registers: class token, registers, then patches."""
    network = timm_network("vit_small_patch14_reg4_dinov2", img_size=28)
    tokens = network.forward_features(some_inputs(28))
    assert tokens.shape[1] == 1 + 4 + 4
    features = features_of(network, some_inputs(28))
    assert_close(features.cls, tokens[:, 0])
    assert_close(features.patches, tokens[:, 5:])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ("beit_base_patch16_224", {}),  # no norm on the tokens, the mean of the patches through fc_norm
    ],
    ids=["without class token", "with a norm for the pooled vector alone"],
)
def test_some_vits_give_their_own_pooling(name: str, options: dict[str, object]) -> None:
    network = timm_network(name, img_size=32, num_classes=0, **options)
    features = features_of(network, some_inputs(32))
    assert_close(features.cls, network(some_inputs(32)))
    patches = network.forward_features(some_inputs(32))[:, -4:]
    assert_close(features.patches, network.fc_norm(patches) if name.startswith("beit") else patches)


def test_a_convnet_gives_its_last_maps_cells_and_their_mean(tmp_path: Path) -> None:
    network = timm_network("test_resnet")
    extractor = load_feature_extractor("timm:test_resnet", weights_of(network, tmp_path), input_size=96)
    features = extractor(some_inputs(96))
    maps = network.forward_features(some_inputs(96))
    assert_close(features.patches[:, 1 * 3 + 2], maps[:, :, 1, 2])
    assert_close(features.cls, maps.mean(dim=(2, 3)))
    assert (extractor.dim, extractor.num_patches) == (96, 9)


def test_maps_with_channels_last_are_read_as_such() -> None:
    network = timm_network("swin_tiny_patch4_window7_224")
    maps = network.forward_features(some_inputs(224))
    assert maps.shape == (2, 7, 7, 768)
    features = features_of(network, some_inputs(224))
    assert_close(features.patches[:, 3 * 7 + 5], maps[:, 3, 5])


def test_another_size_resamples_the_position_table_as_timm_does(tmp_path: Path) -> None:
    network = timm_network("vit_tiny_patch16_224")
    weights = weights_of(network, tmp_path)
    extractor = load_feature_extractor("timm:vit_tiny_patch16_224", weights, input_size=64)
    network.set_input_size(img_size=(64, 64))
    assert_close(extractor(some_inputs(64)).patches, network.forward_features(some_inputs(64))[:, 1:])
    assert extractor.num_patches == 16


def test_mean_and_deviation_are_timms(tmp_path: Path) -> None:
    extractor = load_feature_extractor("timm:test_byobnet", weights_of(timm_network("test_byobnet"), tmp_path))
    assert_close(extractor.mean.flatten(), 255 * torch.tensor([0.485, 0.456, 0.406]))
    assert_close(extractor.std.flatten(), 255 * torch.tensor([0.229, 0.224, 0.225]))
    extractor = load_feature_extractor("timm:test_vit", weights_of(timm_network("test_vit"), tmp_path))
    assert_close(extractor.std.flatten(), torch.full((3,), 127.5))


def test_the_official_crop_is_timms_share_of_the_image(tmp_path: Path) -> None:
    """crop_pct 0.95 at 160 px: the shorter side to 168 px, the central 160; a frame of 4 px is not seen."""
    extractor = load_feature_extractor("timm:test_resnet", weights_of(timm_network("test_resnet"), tmp_path))
    images = torch.zeros(1, 3, 168, 168, dtype=torch.uint8)
    images[..., 4:164, 4:164] = 255
    white = (255 - extractor.mean) / extractor.std
    assert_close(extractor.preprocess(images), white.expand(1, 3, 160, 160))


def refusal_of(kind: type[Exception], name: str, *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as refusal:
        load_feature_extractor(f"timm:{name}", *arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_tinny_patch16", "near it: vit_tiny_patch16"),
        ("vit_tiny_patch16_224.nonsense", "known: vit_tiny_patch16_224.augreg"),
        ("qqq", "timm.list_models"),
    ],
)
def test_an_unknown_name_is_one_line_with_near_ones(name: str, words: str) -> None:
    assert words in refusal_of(ConfigError, name)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("coat_lite_tiny", None, "no square grid"),
        ("crossvit_9_240", None, "no square grid"),
        ("test_vit", 100, "multiple of 16"),
        ("mixer_s32_224", 192, "does not take 192 px"),
    ],
)
def test_features_without_a_square_grid_and_a_size_that_it_does_not_take_are_one_line(
    tmp_path: Path, name: str, size: int | None, words: str
) -> None:
    assert words in refusal_of(ConfigError, name, weights_of(timm_network(name), tmp_path, "pth"), input_size=size)


def test_a_file_that_does_not_fit_is_refused_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    path = Path(weights_of(timm_network("test_vit"), tmp_path))
    assert "weights.safetensors is not timm:test_vit3" in refusal_of(CheckpointError, "test_vit3", str(path))
    state = timm_network("test_vit").state_dict()
    state["more"] = state.pop("norm.bias")
    save_file(state, path)
    assert "missing (norm.bias); 1 unknown (more)" in refusal_of(CheckpointError, "test_vit", str(path))
    path.write_bytes(path.read_bytes()[:10_000])
    assert "cannot be read as safetensors" in refusal_of(CheckpointError, "test_vit", str(path))


def test_without_network_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("nobody answers\nmore lines")

    monkeypatch.setattr(timm_extractor.timm, "create_model", refuse)
    assert "hub (OSError: nobody answers); give a local" in refusal_of(ConfigError, "test_vit")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A hub that holds one network."""
    network = timm_network("test_vit", num_classes=0)
    create = timm.create_model

    def fetch(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        created = create(name, pretrained=False, **options)
        if pretrained:
            created.load_state_dict(network.state_dict())
        return created

    monkeypatch.setattr(timm_extractor.timm, "create_model", fetch)
    return network


def test_a_hub_models_key_follows_its_tensors(hub: nn.Module) -> None:
    config = FeatureExtractorConfig(name="timm:test_vit")
    first = extractor_key(config)
    assert first == load_feature_extractor("timm:test_vit", crop="whole").key
    with torch.no_grad():
        hub.get_parameter("norm.bias")[0] += 1
    assert extractor_key(config) != first


def test_a_local_files_key_needs_no_network_and_is_the_loaded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(timm_network("test_vit"), tmp_path)
    loaded: FeatureExtractor = load_feature_extractor("timm:test_vit", weights, crop="whole")

    monkeypatch.setattr(timm_extractor.timm, "create_model", lambda *_, **__: pytest.fail("a network was built"))
    assert extractor_key(FeatureExtractorConfig(name="timm:test_vit", weights=weights)) == loaded.key
