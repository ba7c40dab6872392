"""A checkpoint that training wrote: plain diffusers reads it, M2D reads it, and a damaged one is refused."""

import hashlib
import json
import re
import shutil
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
from m2d.models.checkpoint import (
    COMPLETE,
    PRIOR,
    CheckpointInfo,
    load_checkpoint,
    mark_complete,
    read_info,
    read_prior,
    write_inference_files,
)
from m2d.training.saving import take_snapshot, write_snapshot
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


def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_the_vae_folder_loads_in_plain_diffusers(written: tuple[Path, JointStep]) -> None:
    directory, step = written
    vae = AutoencoderKL.from_pretrained(directory / "vae").eval()
    expected = step.networks.autoencoder.eval().decode(latents())
    assert_close(vae.decode(latents()).sample, expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_unet_folder_loads_in_plain_diffusers_with_averaged_weights(written: tuple[Path, JointStep]) -> None:
    directory, step = written
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


def test_loading_gives_back_what_was_said_of_it(written: tuple[Path, JointStep]) -> None:
    checkpoint = load_checkpoint(written[0])
    assert checkpoint.info == INFO
    assert checkpoint.latent_shape == (4, 8, 8)


def test_a_loaded_checkpoint_is_in_eval_mode_without_gradients(written: tuple[Path, JointStep]) -> None:
    checkpoint = load_checkpoint(written[0])
    for network in (checkpoint.autoencoder, checkpoint.denoiser):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_no_file_of_it_is_a_pickle(written: tuple[Path, JointStep]) -> None:
    files = [path for path in written[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml"}
    starts = {path.read_bytes()[:2] for path in files}
    assert not starts & {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}


def test_nothing_half_written_stays_beside_it(written: tuple[Path, JointStep]) -> None:
    assert [path.name for path in written[0].parent.iterdir()] == [written[0].name]


def change_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, name: tensor + 1.0}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["vae", "unet", "conditioning"])
def test_the_hash_changes_with_a_weight(written: tuple[Path, JointStep], copy: Path, part: str) -> None:
    change_a_tensor(next(path for path in copy.rglob("*.safetensors") if part in str(path.relative_to(copy))))
    assert load_checkpoint(copy).sha256 != load_checkpoint(written[0]).sha256


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


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "is not a directory" in refusal_of(tmp_path / "nothing")


def test_without_complete_json_it_is_no_checkpoint(copy: Path) -> None:
    (copy / COMPLETE).unlink()
    assert "not a complete checkpoint" in refusal_of(copy)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "conditioning.safetensors"])
def test_a_file_that_was_cut_short_is_named(copy: Path, name: str) -> None:
    with (copy / name).open("r+b") as file:
        file.truncate(100)
    assert f"{name} is missing or cut short" in refusal_of(copy)


def test_a_file_that_is_gone_is_named(copy: Path) -> None:
    (copy / "training" / "projector.safetensors").unlink()
    assert "projector.safetensors is missing" in refusal_of(copy)


def test_a_damaged_file_of_the_right_size_is_refused(copy: Path) -> None:
    path = copy / "conditioning.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert "cannot be loaded" in refusal_of(copy)


def test_a_tensor_that_is_missing_is_not_left_random(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    mark_complete(copy)
    assert "conv_in.bias" in refusal_of(copy)


def rewrite_document(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "checkpoint.yaml"
    document = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump(document))
    mark_complete(checkpoint)


def test_another_format_is_refused_with_its_number(copy: Path) -> None:
    rewrite_document(copy, format=999, something_new=1)
    assert "format 999" in refusal_of(copy)


def test_other_classes_are_refused(copy: Path) -> None:
    rewrite_document(copy, classes=["CAT", "DOG"])
    assert "CAT DOG" in refusal_of(copy)


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "format: 1\nstep: 3"])
def test_a_damaged_description_is_refused(copy: Path, text: str) -> None:
    (copy / "checkpoint.yaml").write_text(text)
    mark_complete(copy)
    assert "checkpoint.yaml is damaged" in refusal_of(copy)


@pytest.mark.parametrize("text", ["", "{", json.dumps({"other": 1}), "[]"])
def test_a_damaged_list_of_files_is_refused(copy: Path, text: str) -> None:
    (copy / COMPLETE).write_text(text)
    assert COMPLETE in refusal_of(copy)


@pytest.mark.parametrize("given", [".", ".."], ids=["the checkpoints folder", "the experiment"])
def test_a_folder_above_it_is_answered_with_the_newest_checkpoint(copy: Path, given: str) -> None:
    newest = copy.with_name("step_00000010")
    shutil.copytree(copy, newest)
    (copy.parent / "best").symlink_to(copy.name)
    (copy.parent / "step_00000020").mkdir()  # not complete
    message = refusal_of(copy.parent if given == "." else copy.parent.parent)
    assert re.search(r"did you mean (\S+)\?$", message)[1] == str(newest)  # type: ignore[index]


def test_reading_the_description_needs_no_weights(copy: Path) -> None:
    assert read_info(copy).step == 7


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


def assert_draws_as(prior: FeaturePrior | None, expected: FeaturePrior) -> None:
    assert prior is not None
    labels, noise = torch.arange(3), torch.randn(3, expected.noise_dim)
    assert torch.equal(prior.sample(labels, noise), expected.sample(labels, noise))
    assert torch.equal(prior.counts, expected.counts)


def test_a_feature_prior_comes_back_as_it_was(with_prior: Path) -> None:
    assert_draws_as(load_checkpoint(with_prior).prior, tiny_prior())
    assert_draws_as(read_prior(with_prior), tiny_prior())
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


def test_the_hash_changes_with_the_prior(with_prior: Path) -> None:
    before = load_checkpoint(with_prior).sha256
    tensors = load_file(with_prior / PRIOR)
    save_file({**tensors, "mean": tensors["mean"] + 1.0}, with_prior / PRIOR, metadata={"format": "pt"})
    assert load_checkpoint(with_prior).sha256 != before


def test_a_prior_that_is_gone_is_named(with_prior: Path) -> None:
    (with_prior / PRIOR).unlink()
    assert f"{PRIOR} is missing" in refusal_of(with_prior)


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
