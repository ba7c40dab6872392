"""The checkpoint: a directory of safetensors and YAML that generation loads. No pickle anywhere.

checkpoint.yaml            what it is: step, stage, image size, classes, extractor, settings of the networks
vae/  unet/                load in plain diffusers (the U-Net's weights are the averaged ones)
conditioning.safetensors   averaged condition encoder, feature statistics and latent batch norm
feature_prior.safetensors  what generation draws its guiding features from; older checkpoints have none
training/                  what resuming also needs (m2d.training.saving)
complete.json              written last: a directory without it is not a checkpoint
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m2d.classes import CLASSES
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.errors import CheckpointError, first_line
from m2d.models.autoencoder import Autoencoder
from m2d.models.settings import COMPLETE, ConditioningConfig
from m2d.models.unet import ConditionEncoder, Denoiser

FORMAT = 1
NetworkT = TypeVar("NetworkT", bound=nn.Module)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PRIOR = "feature_prior.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What checkpoint.yaml says."""

    step: int
    stage: str
    image_size: int
    feature_extractor: str
    feature_dim: int
    num_patches: int
    conditioning: dict[str, Any]
    config: dict[str, Any]  # the run's resolved configuration
    extractor_key: str = ""  # which weights, input size and crop; "": written before it was recorded
    classes: tuple[str, ...] = CLASSES


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, ready to generate: averaged weights, eval mode, no gradients."""

    path: str
    sha256: str  # over everything that shapes an image
    info: CheckpointInfo
    autoencoder: Autoencoder
    denoiser: Denoiser
    prior: FeaturePrior | None = None  # None: written without one, so a class alone guides

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.info.image_size

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.info.step

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.denoiser.latent_shape(self.image_size, self.autoencoder.downsampling)


def write_inference_files(
    directory: Path,
    info: CheckpointInfo,
    autoencoder: Autoencoder,
    unet: UNet2DConditionModel,
    tensors: dict[str, Any],
    prior: FeaturePrior | None = None,
) -> None:
    """Write all but training/ and complete.json. tensors: `vae` and `denoiser` (averaged) state dicts on the CPU."""
    if prior is not None and prior.dim != info.feature_dim:
        raise ValueError(f"the prior's features have {prior.dim} dimensions, the checkpoint's {info.feature_dim}")
    autoencoder.vae.save_config(directory / "vae")
    unet.save_config(directory / "unet")
    denoiser: dict[str, Tensor] = tensors["denoiser"]
    weights = {name.removeprefix("unet."): tensor for name, tensor in denoiser.items() if name.startswith("unet.")}
    rest = {name: tensor for name, tensor in denoiser.items() if not name.startswith("unet.")}
    save_tensors(tensors["vae"], directory / "vae" / WEIGHTS)
    save_tensors(weights, directory / "unet" / WEIGHTS)
    save_tensors(rest, directory / "conditioning.safetensors")
    if prior is not None:
        save_tensors(prior.tensors(), directory / PRIOR)
    document = {"format": FORMAT, **vars(info), "classes": list(info.classes)}
    (directory / "checkpoint.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors with the metadata that diffusers asks for. Raises OSError, of a full disk for one."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library has no other type for what the system refuses
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def mark_complete(directory: Path) -> None:
    """List every file with its size; from now on the directory is a checkpoint."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / COMPLETE]
    files = {str(path.relative_to(directory)): path.stat().st_size for path in paths}
    (directory / COMPLETE).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def read_info(path: str | Path) -> CheckpointInfo:
    """checkpoint.yaml of a complete checkpoint. Raises CheckpointError."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint: {path} is not a directory; name one such as EXPERIMENT/checkpoints/best")
    if not (directory / COMPLETE).is_file():
        inside = sorted(
            marker.parent for marker in [*directory.glob("*/" + COMPLETE), *directory.glob("checkpoints/*/" + COMPLETE)]
        )
        hint = f"did you mean {inside[-1]}?" if inside else "name one that holds complete.json"
        raise CheckpointError(f"checkpoint: {path} is not a complete checkpoint; {hint}")
    _check_files(directory)
    try:
        document = yaml.safe_load((directory / "checkpoint.yaml").read_text(encoding="utf-8"))
        written_as = document.pop("format", None)
        info = CheckpointInfo(**document) if written_as == FORMAT else None
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {directory / 'checkpoint.yaml'} is damaged ({first_line(error)})") from None
    if info is None:
        raise CheckpointError(
            f"checkpoint: {path} is of format {written_as}, this M2D reads {FORMAT}; use the version that wrote it"
        )
    if tuple(info.classes) != CLASSES:
        raise CheckpointError(
            f"checkpoint: {path} was trained on classes {' '.join(info.classes)}, this M2D has {' '.join(CLASSES)}"
        )
    return replace(info, classes=CLASSES)


def read_prior(path: str | Path) -> FeaturePrior | None:
    """The feature prior of a complete checkpoint, on the CPU; None where it was written without one.

    Raises CheckpointError where it is damaged or its features are not those that the checkpoint was trained with.
    """
    return _read_prior(Path(path), read_info(path))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Load for generation. Raises CheckpointError where it is missing, incomplete or broken."""
    info = read_info(path)
    directory = Path(path)
    try:
        vae = _strictly(AutoencoderKL, directory / "vae")
        unet = _strictly(UNet2DConditionModel, directory / "unet")
        conditioning = ConditionEncoder(ConditioningConfig(**info.conditioning), info.feature_dim)
        denoiser = Denoiser(unet, conditioning, int(unet.config.in_channels))
        rest = load_file(directory / "conditioning.safetensors")
        missing, unexpected = denoiser.load_state_dict(rest, strict=False)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint: {path} cannot be loaded ({first_line(error)}); take another one") from None
    missing = [name for name in missing if not name.startswith("unet.")]
    if missing or unexpected:
        raise CheckpointError(f"checkpoint: {path} lacks {missing} and has unknown {unexpected}")
    return Checkpoint(
        path=str(path),
        sha256=checkpoint_sha256(directory),
        info=info,
        autoencoder=_frozen(Autoencoder(vae), device),
        denoiser=_frozen(denoiser, device),
        prior=_read_prior(directory, info),
    )


def _read_prior(directory: Path, info: CheckpointInfo) -> FeaturePrior | None:
    path = directory / PRIOR
    if not path.is_file():
        return None
    try:
        prior = FeaturePrior.from_tensors(load_file(path))
    except Exception as error:
        raise CheckpointError(f"checkpoint: {path} cannot be used ({first_line(error)}); take another one") from None
    if prior.dim != info.feature_dim:
        raise CheckpointError(
            f"checkpoint: {path} is of features with {prior.dim} dimensions, the checkpoint's have {info.feature_dim}; "
            "take another one"
        )
    return prior


def _strictly(network: type[NetworkT], folder: Path) -> NetworkT:
    """diffusers would only warn about a missing tensor and leave it at random values."""
    loaded, report = network.from_pretrained(folder, local_files_only=True, output_loading_info=True)  # type: ignore[attr-defined]
    strangers = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if strangers:
        raise CheckpointError(f"checkpoint: the weights in {folder} do not fit its config.json: {strangers[0]}")
    return loaded


def _frozen(network: NetworkT, device: str | torch.device) -> NetworkT:
    return network.eval().requires_grad_(False).to(device)


def _check_files(directory: Path) -> None:
    try:
        listed = dict(json.loads((directory / COMPLETE).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {directory / COMPLETE} is damaged ({first_line(error)})") from None
    for name, size in listed.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"checkpoint: {path} is missing or cut short; take another checkpoint")


def checkpoint_sha256(directory: Path) -> str:
    """Over all files that shape an image: what generated images carry as their checkpoint."""
    digest = hashlib.sha256()
    names = ["vae/config.json", f"vae/{WEIGHTS}", "unet/config.json", f"unet/{WEIGHTS}", "conditioning.safetensors"]
    if (directory / PRIOR).is_file():  # without one the hash is what it was before there were priors
        names.append(PRIOR)
    for name in names:
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
