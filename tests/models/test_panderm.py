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

from m2d.errors import CheckpointError
from m2d.models.extractors import FeatureExtractor, load_feature_extractor, panderm

State = dict[str, Tensor]
SHAPES = {"panderm-large": LARGE, "panderm-base": BASE}


def some_inputs(size: int = 224, count: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


class Seeded:
    """A seeded encoder of one size, and what the plain reimplementation makes of one input."""

    def __init__(self, name: str) -> None:
        self.name = name
        width = SHAPES[name]["width"]
        self.encoder = seeded_encoder(width, SHAPES[name]["depth"])
        self.tokens = plain_panderm(self.encoder, some_inputs(), SHAPES[name]["heads"])
        self.prefixed = {f"encoder.{name}": tensor for name, tensor in self.encoder.items()}
        self.extras = pretraining_extras(width)


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
    "published Large: encoder. prefix and extras": lambda seeded: seeded.prefixed | seeded.extras,
    "published Base: bare": lambda seeded: seeded.encoder,
    "bare, each tensor in memory of its own": lambda seeded: {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in seeded.encoder.items()
    },
    "older: under model, with what a training script adds": lambda seeded: {
        "model": seeded.prefixed | seeded.extras,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 499,
        "args": argparse.Namespace(batch_size=64),
    },
    "bare with a head": lambda seeded: (
        seeded.encoder | {"head.weight": torch.zeros(7, 4), "head.bias": torch.zeros(7), "mask_token": torch.zeros(1)}
    ),
    "under state_dict": lambda seeded: {"state_dict": seeded.encoder},
    "under module, prefixed": lambda seeded: {"module": seeded.prefixed},
}


@pytest.mark.parametrize(
    ("size", "layout"),
    [("large", "published Large: encoder. prefix and extras"), *(("base", layout) for layout in LAYOUTS)],
)
def test_a_file_is_the_published_network_in_every_layout(
    size: str, weights: Path, layout: str, request: pytest.FixtureRequest
) -> None:
    seeded = request.getfixturevalue(size)
    torch.save(LAYOUTS[layout](seeded), weights)
    features = load_feature_extractor(seeded.name, str(weights))(some_inputs())
    assert_close(features.cls, seeded.tokens[:, 0], atol=1e-5, rtol=0)
    assert_close(features.patches, seeded.tokens[:, 1:], atol=1e-5, rtol=0)


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


def test_what_the_wrong_files_below_are_made_of_loads_frozen_and_whole(
    hollow_file: Path, hollow_extractor: FeatureExtractor
) -> None:
    """Else their faults would prove nothing. Zeros everywhere: the final norm's bias, 0, is all that comes out.

    It is built on the meta device; what no file fills must have been filled by hand.
    """
    assert hollow_extractor(some_inputs(256)).cls.abs().max() == 0
    assert not any(parameter.requires_grad for parameter in hollow_extractor.parameters())
    assert not any(module.training for module in hollow_extractor.modules())
    tensors = (*hollow_extractor.named_parameters(), *hollow_extractor.named_buffers())
    assert not [name for name, tensor in tensors if tensor.is_meta]
    assert hollow_extractor.weights_sha256 == hashlib.sha256(hollow_file.read_bytes()).hexdigest()


def test_another_hash_than_the_reported_one_is_told_in_one_line_and_refuses_nothing(
    hollow_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "m2d.models.extractors.panderm"):
        sha256 = load_feature_extractor("panderm-base", str(hollow_file)).weights_sha256
    (line,) = [record.getMessage() for record in caplog.records]
    assert "be1e0fb108b3bc58721cb5195f136c948160799438f222acf1fd142230ac1ff1" in line
    assert "\n" not in line
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


def saved(make: Callable[[], Any], **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(make(), path, **options)


def halved(**options: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        torch.save(hollow_base(), path, **options)
        os.truncate(path, path.stat().st_size // 2)

    return spoil


def without_one() -> State:
    return {name: tensor for name, tensor in hollow_base().items() if name != "blocks.7.attn.v_bias"}


def fine_tuned() -> State:
    state = hollow_base()
    state |= {"fc_norm.weight": state.pop("norm.weight"), "fc_norm.bias": state.pop("norm.bias")}
    state |= {f"blocks.{i}.attn.relative_position_bias_table": torch.zeros(732, 12) for i in range(12)}
    return state | {"head.weight": torch.zeros(7, 768), "head.bias": torch.zeros(7)}


def timms_own_names() -> State:
    """A conversion to timm's VisionTransformer, as public code makes it: ls1.gamma, one bias for q, k and v."""
    state = hollow_base()
    for i in range(12):
        state[f"blocks.{i}.ls1.gamma"] = state.pop(f"blocks.{i}.gamma_1")
    return state


def an_encoder_beside_another() -> State:
    """Prefixed and bare tensors in one file: no telling which is meant."""
    state = hollow_base()
    return {f"encoder.{name}": tensor for name, tensor in state.items()} | {"cls_token": state["cls_token"]}


def with_one(name: str, value: Any) -> Callable[[Path], None]:
    return saved(lambda: hollow_base() | {name: value})


WEB_PAGE = "\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>"
# What the file is, the network it is given for (-large or -base), how it is written, and words that the line must have.
WRONG_FILES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "Base's": ("large", saved(hollow_base), ["180 of 366 tensors missing", "186 of another shape", "PanDerm-Base"]),
    "Large's": ("base", saved(hollow_large), ["180 unknown", "186 of another shape", "PanDerm-Large"]),
    "cut": ("base", halved(), ["truncated", "download it again"]),
    "cut, of the old format": ("base", halved(_use_new_zipfile_serialization=False), ["download complete"]),
    "a web page": ("base", lambda path: path.write_text(WEB_PAGE), ["web page", "Google Drive", "download it again"]),
    "less": ("base", saved(without_one), ["1 of 186 tensors missing (blocks.7.attn.v_bias)", "PanDerm-Base"]),
    "more": ("base", with_one("blocks.7.attn.k_bias", torch.zeros(768)), ["1 unknown (blocks.7.attn.k_bias)"]),
    "another shape": (
        "base", with_one("pos_embed", torch.zeros(1, 257, 768)), ["pos_embed is [1, 257, 768], not [1, 197, 768]"]
    ),
    "fine-tuned": ("base", saved(fine_tuned), ["fine-tuned", "fc_norm.weight", "panderm_bb_data6_checkpoint-499.pth"]),
    "fine-tuned, with shared position bias": (
        "base", with_one("rel_pos_bias.relative_position_index", torch.zeros(197, 197)),
        ["fine-tuned", "relative_position_index"]
    ),
    "with code": (
        "base", lambda path: torch.save(hollow_base() | {"more": Trap(path.with_name("ran"))}, path),
        ["would run code", "mkdir"]
    ),
    "safetensors": ("base", lambda path: save_file({"cls_token": torch.zeros(3)}, path), ["safetensors", ".pth"]),
    "empty": ("base", Path.touch, ["is empty", "download it again"]),
    "a name of two lines": ("base", with_one("first\nsecond", torch.zeros(1)), ["1 unknown (first second)"]),
    "a list": ("base", saved(lambda: [torch.zeros(3)]), ["named tensors", "a list"]),
    "numbers among tensors": ("base", with_one("epoch", 499), ["named tensors", "epoch"]),
    "a NaN": ("base", with_one("blocks.3.gamma_1", torch.full((768,), float("nan"))), ["NaN", "blocks.3.gamma_1"]),
    "integers": (
        "base", with_one("blocks.3.gamma_1", torch.ones(768, dtype=torch.int64)),
        ["blocks.3.gamma_1 is [768] of torch.int64"]
    ),
    "timm's own names": (
        "base", saved(timms_own_names), ["12 of 186 tensors missing", "12 unknown (blocks.0.ls1.gamma"]
    ),
    "another ViT": ("base", saved(lambda: hollow(published_shapes(384, 12))), ["no PanDerm", "12 blocks of width 384"]),
    "only a head": (
        "base", saved(lambda: {"head.weight": torch.zeros(7, 768)}), ["186 of 186 tensors missing", "no PanDerm"]
    ),
    "two encoders": ("base", saved(an_encoder_beside_another), ["1 unknown (cls_token without encoder.)"])
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_one_line_and_takes_no_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> Any:
        network = create_model(*arguments, **options)
        assert all(parameter.is_meta for parameter in network.parameters())
        return network

    create_model = panderm.timm.create_model
    monkeypatch.setattr(panderm.timm, "create_model", build)
    size, spoil, words = WRONG_FILES[kind]
    spoil(tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as refusal:
        load_feature_extractor(f"panderm-{size}", str(tmp_path / "wrong.pth"))
    line = str(refusal.value)
    assert line.startswith(f"feature_extractor.weights: {tmp_path / 'wrong.pth'} ")
    assert "\n" not in line
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "ran").exists()
