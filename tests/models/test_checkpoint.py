"""A checkpoint that training wrote: plain diffusers reads it, M2D reads it, and a damaged one is refused."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_networks import CONDITIONING, FEATURE_DIM, IMAGE_SIZE, tiny_batch, tiny_networks, tiny_step
from torch.testing import assert_close

from m2d.diffusion.feature_prior import FeaturePrior
from m2d.errors import CheckpointError
from m2d.files.atomic import COMPLETE, mark_complete
from m2d.models.checkpoint import (
    PRIOR,
    CheckpointInfo,
    load_checkpoint,
    read_prior,
    write_inference_files,
)
from m2d.training.saving import load_training_state, take_snapshot, write_snapshot
from m2d.training.step import JointStep

INFO = CheckpointInfo(
    step=7,
    stage="joint",
    image_size=IMAGE_SIZE,
    feature_extractor="tiny",
    feature_dim=FEATURE_DIM,
    num_patches=4,
    conditioning=vars(CONDITIONING),
    config={"name": "tiny", "seed": 3},
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JointStep]:
    """A checkpoint after two steps, so that averaged and trained weights differ, and the step that it is of."""
    step = tiny_step(tiny_networks(discriminator=True))
    for number in range(2):
        step([tiny_batch(seed=number)], number)
    directory = tmp_path_factory.mktemp("experiment") / "checkpoints" / "step_00000007"
    directory.parent.mkdir()
    write_snapshot(take_snapshot(INFO, step.networks, step.state_dict(), {"psnr": 12.0}), directory)
    return directory, step


@pytest.fixture
def copy(written: tuple[Path, JointStep], tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written[0], tmp_path / "checkpoints" / written[0].name))


def tiny_prior(dim: int = FEATURE_DIM) -> FeaturePrior:
    features = torch.randn(60, dim, generator=torch.Generator().manual_seed(2))
    return FeaturePrior.fit(features, torch.arange(60) % 3)


@pytest.fixture
def with_prior(written: tuple[Path, JointStep], tmp_path: Path) -> Path:
    """Only the inference files, with a prior."""
    networks = written[1].networks
    directory = tmp_path / "with_prior"
    for folder in ("vae", "unet"):
        (directory / folder).mkdir(parents=True)
    tensors = {"vae": networks.autoencoder.vae.state_dict(), "denoiser": networks.denoiser.state_dict()}
    write_inference_files(directory, INFO, networks.autoencoder, networks.denoiser.unet, tensors, tiny_prior())
    mark_complete(directory)
    return directory


def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_its_folders_load_in_plain_diffusers_the_unet_with_averaged_weights(written: tuple[Path, JointStep]) -> None:
    directory, step = written
    vae = AutoencoderKL.from_pretrained(directory / "vae").eval()
    assert_close(vae.decode(latents()).sample, step.networks.autoencoder.eval().decode(latents()), rtol=0, atol=0)
    unet = UNet2DConditionModel.from_pretrained(directory / "unet").eval()
    context = torch.randn(2, 3, CONDITIONING.context_dim)
    averaged, trained = step.ema.module.unet, step.networks.denoiser.unet
    assert_close(unet(latents(), 500, context).sample, averaged(latents(), 500, context).sample, rtol=0, atol=0)
    assert not torch.equal(averaged.conv_in.weight, trained.conv_in.weight)


@torch.no_grad()
def test_loading_gives_back_the_averaged_denoiser(written: tuple[Path, JointStep]) -> None:
    directory, step = written
    labels, cls, t = torch.tensor([1, 7]), torch.randn(2, FEATURE_DIM), torch.tensor([0.2, 0.9])
    loaded, averaged = (
        network.velocity(network.normalize(latents()), t, network.context(labels, cls))
        for network in (load_checkpoint(directory).denoiser, step.ema.module)
    )
    assert_close(loaded, averaged, rtol=0, atol=0)


def test_a_loaded_checkpoint_says_what_it_is_in_eval_mode_without_gradients(written: tuple[Path, JointStep]) -> None:
    checkpoint = load_checkpoint(written[0])
    assert checkpoint.info == INFO
    assert checkpoint.latent_shape == (4, 8, 8)
    for network in (checkpoint.autoencoder, checkpoint.denoiser):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_no_file_of_it_is_a_pickle_and_nothing_half_written_stays(written: tuple[Path, JointStep]) -> None:
    files = [path for path in written[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml"}
    assert not {path.read_bytes()[:2] for path in files} & {b"PK", *(b"\x80" + bytes([n]) for n in range(2, 6))}
    assert [path.name for path in written[0].parent.iterdir()] == [written[0].name]


def change_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, name: tensor + 1.0}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["vae", "unet", "conditioning", "feature_prior"])
def test_the_hash_changes_with_a_weight(with_prior: Path, part: str) -> None:
    before = load_checkpoint(with_prior).sha256
    change_a_tensor(next(path for path in with_prior.rglob("*.safetensors") if part in str(path)))
    assert load_checkpoint(with_prior).sha256 != before


def test_the_hash_is_that_of_what_makes_an_image(written: tuple[Path, JointStep], copy: Path) -> None:
    """Neither the place nor the state that only training needs is part of it."""
    change_a_tensor(copy / "training" / "projector.safetensors")
    (copy / "training" / "state.json").write_text("{}")
    mark_complete(copy)
    assert load_checkpoint(copy).sha256 == load_checkpoint(written[0]).sha256


def refusal_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def cut_short(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def leave_nothing_but_images(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    mark_complete(path)


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (Path.unlink, COMPLETE, "not a complete checkpoint"),
        (cut_short, "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors is missing"),
        (cut_short, "conditioning.safetensors", "conditioning.safetensors is missing or cut short"),
        (Path.unlink, "training/projector.safetensors", "projector.safetensors is missing"),
        (overwrite, "conditioning.safetensors", "cannot be loaded"),
        (shutil.rmtree, "", "is not a directory"),
        (leave_nothing_but_images, "", "is no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused(copy: Path, damage: Callable[[Path], None], name: str, words: str) -> None:
    damage(copy / name)
    assert words in refusal_of(copy)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "conditioning.safetensors"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_tensor_that_is_missing_is_not_left_random_nor_a_stranger_ignored(
    copy: Path, name: str, missing: bool
) -> None:
    tensors = load_file(copy / name)
    key = next(iter(tensors)) if missing else "stranger"
    if missing:
        del tensors[key]
    else:
        tensors[key] = torch.zeros(1)
    save_file(tensors, copy / name, metadata={"format": "pt"})
    mark_complete(copy)
    assert key in refusal_of(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"format": 999, "something_new": 1}, "format 999"), ({"classes": ["CAT", "DOG"]}, "CAT DOG")],
)
def test_another_format_and_other_classes_are_refused(copy: Path, changes: dict[str, object], words: str) -> None:
    path = copy / "checkpoint.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    mark_complete(copy)
    assert words in refusal_of(copy)


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "format: 1\nstep: 3"])
def test_a_damaged_description_is_refused(copy: Path, text: str) -> None:
    (copy / "checkpoint.yaml").write_text(text)
    mark_complete(copy)
    assert "checkpoint.yaml is damaged" in refusal_of(copy)


@pytest.mark.parametrize("text", ["", "{", json.dumps({"other": 1}), "[]"])
def test_a_damaged_list_of_files_is_refused(copy: Path, text: str) -> None:
    (copy / COMPLETE).write_text(text)
    assert f"{COMPLETE} is damaged" in refusal_of(copy)


@pytest.mark.parametrize("given", [".", ".."], ids=["the checkpoints folder", "the experiment"])
def test_a_folder_above_it_is_answered_with_the_best_checkpoint_or_the_newest(copy: Path, given: str) -> None:
    newest = copy.with_name("step_00000010")
    shutil.copytree(copy, newest)
    (copy.parent / "step_00000020").mkdir()  # not complete
    above = copy.parent if given == "." else copy.parent.parent
    assert f"did you mean {newest}?" in refusal_of(above)
    (copy.parent / "best").symlink_to(copy.name)
    assert f"did you mean {copy.parent / 'best'}?" in refusal_of(above)


def test_a_feature_prior_comes_back_as_it_was(with_prior: Path) -> None:
    for prior in (load_checkpoint(with_prior).prior, read_prior(with_prior)):
        assert prior is not None
        assert_close(prior.tensors(), tiny_prior().tensors(), rtol=0, atol=0)
    assert PRIOR in json.loads((with_prior / COMPLETE).read_text())["files"]


def test_a_checkpoint_without_a_prior_loads_and_has_the_hash_that_it_always_had(with_prior: Path) -> None:
    with_one = load_checkpoint(with_prior).sha256
    (with_prior / PRIOR).unlink()
    mark_complete(with_prior)
    checkpoint = load_checkpoint(with_prior)
    assert checkpoint.prior is None
    assert read_prior(with_prior) is None
    weights = "diffusion_pytorch_model.safetensors"
    names = ["vae/config.json", f"vae/{weights}", "unet/config.json", f"unet/{weights}", "conditioning.safetensors"]
    digests = [hashlib.sha256((with_prior / name).read_bytes()).digest() for name in names]
    assert checkpoint.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()
    assert checkpoint.sha256 != with_one


@pytest.mark.parametrize("damage", ["bytes", "a tensor missing", "not a number", "other features"])
def test_a_prior_that_cannot_be_used_is_refused(with_prior: Path, damage: str) -> None:
    path = with_prior / PRIOR
    tensors = load_file(path)
    match damage:
        case "bytes":
            path.write_bytes(b"\xff" * path.stat().st_size)
        case "a tensor missing":
            save_file({name: tensor for name, tensor in tensors.items() if name != "scale"}, path)
        case "not a number":
            save_file({**tensors, "isotropic": tensors["isotropic"] * float("nan")}, path)
        case _:
            save_file(tiny_prior(FEATURE_DIM + 1).tensors(), path)
    mark_complete(with_prior)
    assert str(path) in refusal_of(with_prior)
    with pytest.raises(CheckpointError):
        read_prior(with_prior)


def test_a_prior_of_other_features_is_not_written(written: tuple[Path, JointStep], tmp_path: Path) -> None:
    networks = written[1].networks
    with pytest.raises(ValueError, match=f"{FEATURE_DIM + 1} dimensions, the checkpoint's {FEATURE_DIM}"):
        write_inference_files(
            tmp_path, INFO, networks.autoencoder, networks.denoiser.unet, {}, tiny_prior(FEATURE_DIM + 1)
        )


def test_without_training_it_loads_as_before_and_resuming_says_what_is_missing(
    written: tuple[Path, JointStep], copy: Path
) -> None:
    """To give it away, most of the bytes are dropped."""
    shutil.rmtree(copy / "training")
    assert load_checkpoint(copy).sha256 == load_checkpoint(written[0]).sha256
    with pytest.raises(CheckpointError, match="no training state; start from it by --init_checkpoint"):
        load_training_state(copy, written[1].state_dict())


def test_a_file_of_training_that_is_missing_by_itself_is_damage(copy: Path) -> None:
    (copy / "training" / "counters.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"counters\.safetensors is missing"):
        load_checkpoint(copy)
