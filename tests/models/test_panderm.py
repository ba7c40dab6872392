"""Every published form of PanDerm's files gives the published network; every other file gives one line."""

import argparse
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_panderm import BASE, LARGE, hollow, plain_panderm, pretraining_extras, published_shapes, seeded_encoder
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from m2d.errors import CheckpointError, ConfigError
from m2d.models.extractors import FeatureExtractor, load_feature_extractor, panderm

State = dict[str, Tensor]
SHAPES = {"panderm-large": LARGE, "panderm-base": BASE}


def some_inputs(size: int = 224, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


class Seeded:
    """A seeded encoder of one size, and what the plain reimplementation makes of one input."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.encoder = seeded_encoder(SHAPES[name]["width"], SHAPES[name]["depth"])
        self.tokens = plain_panderm(self.encoder, some_inputs(), SHAPES[name]["heads"])

    def prefixed(self) -> State:
        return {f"encoder.{name}": tensor for name, tensor in self.encoder.items()}

    def extras(self) -> State:
        return pretraining_extras(SHAPES[self.name]["width"])


@pytest.fixture(scope="module")
def base() -> Seeded:
    return Seeded("panderm-base")


@pytest.fixture(scope="module")
def large() -> Seeded:
    return Seeded("panderm-large")


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Path]:
    """A path for a file of up to 343 MB that does not outlive its test; pytest keeps the last runs' folders."""
    path = tmp_path / "panderm.pth"
    yield path
    path.unlink(missing_ok=True)


LAYOUTS: dict[str, Callable[[Seeded], Any]] = {
    "published Large: encoder. prefix and extras": lambda seeded: seeded.prefixed() | seeded.extras(),
    "published Base: bare": lambda seeded: seeded.encoder,
    "bare, each tensor in memory of its own": lambda seeded: {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in seeded.encoder.items()
    },
    "older: under model, with what a training script adds": lambda seeded: {
        "model": seeded.prefixed() | seeded.extras(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 499,
        "args": argparse.Namespace(batch_size=64),
    },
    "bare with a head": lambda seeded: (
        seeded.encoder | {"head.weight": torch.zeros(7, 4), "head.bias": torch.zeros(7), "mask_token": torch.zeros(1)}
    ),
    "under state_dict": lambda seeded: {"state_dict": seeded.encoder},
    "under module, prefixed": lambda seeded: {"module": seeded.prefixed()},
}


def assert_is_the_published_network(seeded: Seeded, extractor: FeatureExtractor) -> None:
    features = extractor(some_inputs())
    assert_close(features.cls, seeded.tokens[:, 0], atol=1e-5, rtol=0)
    assert_close(features.patches, seeded.tokens[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith(("published", "older"))])
def test_a_large_file_is_the_published_network_in_every_layout(large: Seeded, weights: Path, layout: str) -> None:
    torch.save(LAYOUTS[layout](large), weights)
    assert_is_the_published_network(large, load_feature_extractor(large.name, str(weights)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_file_is_the_published_network_in_every_layout(base: Seeded, weights: Path, layout: str) -> None:
    torch.save(LAYOUTS[layout](base), weights)
    assert_is_the_published_network(base, load_feature_extractor(base.name, str(weights)))


def test_at_224_px_the_position_table_is_the_files(base: Seeded) -> None:
    extractor = panderm.PanDerm(base.name, base.encoder)
    assert torch.equal(extractor.network.pos_embed, base.encoder["pos_embed"])


def test_at_256_px_the_table_is_resampled_to_16_by_16_and_keeps_its_class_row(base: Seeded) -> None:
    """The plain network with a table resampled by hand gives the same tokens."""
    extractor = panderm.PanDerm(base.name, base.encoder, input_size=256)
    grid = base.encoder["pos_embed"][:, 1:].view(1, 14, 14, 768).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True, align_corners=False)
    table = torch.cat([base.encoder["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    assert extractor.num_patches == 256
    assert_close(extractor.network.pos_embed, table, atol=1e-6, rtol=0)
    tokens = plain_panderm(base.encoder | {"pos_embed": table}, some_inputs(256), BASE["heads"])
    features = extractor(some_inputs(256))
    assert_close(torch.cat([features.cls.unsqueeze(1), features.patches], dim=1), tokens, atol=1e-5, rtol=0)


def test_a_ramp_over_the_image_is_resampled_to_the_same_ramp(base: Seeded) -> None:
    """Row i of n cells lies at (i + 1/2) / n of the image, for 14 rows as for 16."""
    table = base.encoder["pos_embed"].clone()
    table[0, 1:] = ((torch.arange(14) + 0.5) / 14).repeat_interleave(14).unsqueeze(1)
    extractor = panderm.PanDerm(base.name, base.encoder | {"pos_embed": table}, input_size=256)
    rows = extractor.network.pos_embed[0, 1:, 0].view(16, 16)
    expected = ((torch.arange(16) + 0.5) / 16).unsqueeze(1).expand(16, 16)
    assert_close(rows[3:13], expected[3:13], atol=1e-5, rtol=0)  # a cubic bends at the edges, where neighbours lack


def test_patches_stand_where_the_image_has_them(base: Seeded) -> None:
    """A spot in cell (3, 11) changes token 3 * 14 + 11 of the patches most."""
    extractor = panderm.PanDerm(base.name, base.encoder, crop="whole")
    plain = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    spotted = plain.clone()
    spotted[..., 48:64, 176:192] = 255
    change = extractor(extractor.preprocess(spotted)).patches - extractor(extractor.preprocess(plain)).patches
    assert int(change.norm(dim=-1).argmax()) == 3 * 14 + 11


def test_half_precision_files_are_widened(base: Seeded) -> None:
    halves = {name: tensor.half() for name, tensor in base.encoder.items()}
    encoder = panderm.encoder_tensors(base.name, Path("half.pth"), halves)
    assert {tensor.dtype for tensor in encoder.values()} == {torch.float32}
    assert torch.equal(encoder["cls_token"], base.encoder["cls_token"].half().float())


@pytest.mark.parametrize("name", SHAPES)
def test_the_demanded_shapes_are_the_published_ones(name: str) -> None:
    shapes = panderm.SIZES[name].shapes()
    assert shapes == published_shapes(SHAPES[name]["width"], SHAPES[name]["depth"])
    assert len(shapes) == {"panderm-large": 366, "panderm-base": 186}[name]
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert parameters == {"panderm-large": 303_326_208, "panderm-base": 85_807_872}[name]  # from the authors' logs


# --- a right file of hollow values: 186 true names and shapes, zeros that take no room --------------------------------


def hollow_base() -> State:
    return hollow(published_shapes(BASE["width"], BASE["depth"]))


def hollow_large() -> State:
    shapes = published_shapes(LARGE["width"], LARGE["depth"])
    return {f"encoder.{name}": tensor for name, tensor in hollow(shapes).items()} | pretraining_extras(1024)


@pytest.fixture(scope="module")
def hollow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("panderm") / "hollow.pth"
    torch.save(hollow_base(), path)
    return path


@pytest.fixture(scope="module")
def hollow_extractor(hollow_file: Path) -> FeatureExtractor:
    return load_feature_extractor("panderm-base", str(hollow_file), input_size=256).train()


def test_what_the_wrong_files_below_are_made_of_loads(hollow_extractor: FeatureExtractor) -> None:
    """Else their faults would prove nothing. Zeros everywhere: the final norm's bias, 0, is all that comes out."""
    assert hollow_extractor(some_inputs(256)).cls.abs().max() == 0


def test_nothing_of_it_trains(hollow_extractor: FeatureExtractor) -> None:
    assert not any(parameter.requires_grad for parameter in hollow_extractor.parameters())
    assert not any(module.training for module in hollow_extractor.modules())


def test_no_tensor_is_left_without_values(hollow_extractor: FeatureExtractor) -> None:
    """It is built on the meta device; what no file fills must have been filled by hand."""
    tensors = (*hollow_extractor.named_parameters(), *hollow_extractor.named_buffers())
    assert not [name for name, tensor in tensors if tensor.is_meta]


def test_the_hash_is_the_files_and_is_recorded(hollow_file: Path, hollow_extractor: FeatureExtractor) -> None:
    assert hollow_extractor.weights_sha256 == hashlib.sha256(hollow_file.read_bytes()).hexdigest()


def test_another_hash_than_the_reported_one_is_told_in_one_line_and_refuses_nothing(
    hollow_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "m2d.models.extractors.panderm"):
        load_feature_extractor("panderm-base", str(hollow_file))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "be1e0fb108b3bc58721cb5195f136c948160799438f222acf1fd142230ac1ff1" in line
    assert "\n" not in line


def test_the_reported_hash_passes_without_a_word(
    hollow_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = load_feature_extractor("panderm-base", str(hollow_file)).weights_sha256
    caplog.clear()
    known = panderm.PanDermSize(**{**vars(panderm.SIZES["panderm-base"]), "sha256": sha256})
    monkeypatch.setitem(panderm.SIZES, "panderm-base", known)
    load_feature_extractor("panderm-base", str(hollow_file))
    assert not caplog.records


# --- wrong files: as above, with one fault each ----------------------------------------------------------------------


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def base_file_for_large(path: Path) -> None:
    torch.save(hollow_base(), path)


def large_file_for_base(path: Path) -> None:
    torch.save(hollow_large(), path)


def cut_in_the_middle(path: Path) -> None:
    torch.save(hollow_base(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_in_the_middle_old_format(path: Path) -> None:
    torch.save(hollow_base(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_web_page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>")


def one_tensor_missing(path: Path) -> None:
    state = hollow_base()
    del state["blocks.7.attn.v_bias"]
    torch.save(state, path)


def one_tensor_too_many(path: Path) -> None:
    torch.save(hollow_base() | {"blocks.7.attn.k_bias": torch.zeros(768)}, path)


def one_wrong_shape(path: Path) -> None:
    torch.save(hollow_base() | {"pos_embed": torch.zeros(1, 257, 768)}, path)


def fine_tuned(path: Path) -> None:
    state = hollow_base()
    state |= {"fc_norm.weight": state.pop("norm.weight"), "fc_norm.bias": state.pop("norm.bias")}
    state |= {f"blocks.{i}.attn.relative_position_bias_table": torch.zeros(732, 12) for i in range(12)}
    torch.save(state | {"head.weight": torch.zeros(7, 768), "head.bias": torch.zeros(7)}, path)


def fine_tuned_with_shared_position_bias(path: Path) -> None:
    torch.save(hollow_base() | {"rel_pos_bias.relative_position_index": torch.zeros(197, 197)}, path)


def a_pickle_with_code(path: Path) -> None:
    torch.save(hollow_base() | {"more": Trap(path.with_name("ran"))}, path)


def safetensors(path: Path) -> None:
    save_file({"cls_token": torch.zeros(1, 1, 768), "pos_embed": torch.zeros(1, 197, 768)}, path)


def empty(path: Path) -> None:
    path.touch()


def a_name_of_two_lines(path: Path) -> None:
    torch.save(hollow_base() | {"first\nsecond": torch.zeros(1)}, path)


def a_list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def numbers_among_tensors(path: Path) -> None:
    torch.save(hollow_base() | {"epoch": 499}, path)


def a_nan(path: Path) -> None:
    torch.save(hollow_base() | {"blocks.3.gamma_1": torch.full((768,), float("nan"))}, path)


def integers(path: Path) -> None:
    torch.save(hollow_base() | {"blocks.3.gamma_1": torch.ones(768, dtype=torch.int64)}, path)


def timms_own_names(path: Path) -> None:
    """A conversion to timm's VisionTransformer, as public code makes it: ls1.gamma, one bias for q, k and v."""
    state = hollow_base()
    for i in range(12):
        state[f"blocks.{i}.ls1.gamma"] = state.pop(f"blocks.{i}.gamma_1")
    torch.save(state, path)


def another_vit(path: Path) -> None:
    torch.save(hollow(published_shapes(384, 12)), path)


def only_a_head(path: Path) -> None:
    torch.save({"head.weight": torch.zeros(7, 768)}, path)


def an_encoder_beside_another(path: Path) -> None:
    """Prefixed and bare tensors in one file: no telling which is meant."""
    state = hollow_base()
    torch.save({f"encoder.{name}": tensor for name, tensor in state.items()} | {"cls_token": state["cls_token"]}, path)


# The ten of the project's list, then more. name, file, and words that the line must have.
WRONG_FILES: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("panderm-large", base_file_for_large, ["180 of 366 tensors missing", "186 of another shape", "PanDerm-Base"]),
    ("panderm-base", cut_in_the_middle, ["truncated", "download it again"]),
    ("panderm-base", a_web_page, ["web page", "Google Drive", "download it again"]),
    ("panderm-base", one_tensor_missing, ["1 of 186 tensors missing (blocks.7.attn.v_bias)", "PanDerm-Base"]),
    ("panderm-base", one_tensor_too_many, ["1 unknown (blocks.7.attn.k_bias)", "PanDerm-Base"]),
    ("panderm-base", one_wrong_shape, ["pos_embed is [1, 257, 768], not [1, 197, 768]"]),
    ("panderm-base", fine_tuned, ["fine-tuned", "fc_norm.weight", "panderm_bb_data6_checkpoint-499.pth"]),
    ("panderm-base", a_pickle_with_code, ["would run code", "mkdir"]),
    ("panderm-base", safetensors, ["safetensors", ".pth"]),
    ("panderm-base", empty, ["is empty", "download it again"]),
    ("panderm-base", large_file_for_base, ["180 unknown", "186 of another shape", "PanDerm-Large"]),
    ("panderm-base", cut_in_the_middle_old_format, ["download complete"]),
    ("panderm-base", fine_tuned_with_shared_position_bias, ["fine-tuned", "relative_position_index"]),
    ("panderm-base", a_name_of_two_lines, ["1 unknown (first second)"]),
    ("panderm-base", a_list, ["named tensors", "a list"]),
    ("panderm-base", numbers_among_tensors, ["named tensors", "epoch"]),
    ("panderm-base", a_nan, ["NaN", "blocks.3.gamma_1"]),
    ("panderm-base", integers, ["blocks.3.gamma_1 is [768] of torch.int64"]),
    ("panderm-base", timms_own_names, ["12 of 186 tensors missing", "12 unknown (blocks.0.ls1.gamma"]),
    ("panderm-base", another_vit, ["no PanDerm", "12 blocks of width 384"]),
    ("panderm-base", only_a_head, ["186 of 186 tensors missing", "no PanDerm"]),
    ("panderm-base", an_encoder_beside_another, ["1 unknown (cls_token without encoder.)"]),
]


@pytest.mark.parametrize(("name", "spoil", "words"), WRONG_FILES, ids=[spoil.__name__ for _, spoil, _ in WRONG_FILES])
def test_a_wrong_file_is_one_line_and_takes_no_memory(
    name: str, spoil: Callable[[Path], None], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> Any:
        network = create_model(*arguments, **options)
        assert all(parameter.is_meta for parameter in network.parameters())
        return network

    create_model = panderm.timm.create_model
    monkeypatch.setattr(panderm.timm, "create_model", build)
    spoil(tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as refusal:
        load_feature_extractor(name, str(tmp_path / "wrong.pth"))
    line = str(refusal.value)
    print(line)
    assert line.startswith(f"feature_extractor.weights: {tmp_path / 'wrong.pth'} ")
    assert "\n" not in line
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "ran").exists()


def test_without_a_file_the_line_points_to_the_guide() -> None:
    with pytest.raises(ConfigError, match=r"docs/panderm\.md") as refusal:
        load_feature_extractor("panderm-large")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [250, 16])
def test_a_size_that_is_no_number_of_patches_is_refused(hollow_file: Path, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        load_feature_extractor("panderm-base", str(hollow_file), input_size=size)
