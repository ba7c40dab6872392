"""The checkpoint: a directory of safetensors and YAML that generation loads. No pickle anywhere.

checkpoint.yaml            what it is: step, stage, image size, classes, extractor, settings of the networks
vae/  unet/                load in plain diffusers, but a VAE with block PCA (the U-Net's weights are averaged ones)
conditioning.safetensors   averaged condition encoder, feature statistics and latent batch norm
feature_prior.safetensors  what generation draws its guiding features from; older checkpoints have none
training/                  what resuming also needs (m2d.training.saving)
conditioning/              in an export the two files above in one, which diffusers reads (m2d.export)
complete.json              written last: a directory without it is not a checkpoint
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2d.classes import ISIC7, ClassSet
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.errors import CheckpointError, first_line
from m2d.files.atomic import COMPLETE, damage, share_lock, whole_file
from m2d.files.paths import checkpoint_folder
from m2d.models.autoencoder import Autoencoder, load_strictly, load_vae
from m2d.models.settings import ConditioningConfig
from m2d.models.unet import ConditionEncoder, Denoiser

FORMAT = 1
TRAINING = "training"  # the folder of what resuming also needs
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONDITIONING = "conditioning.safetensors"
PRIOR = "feature_prior.safetensors"
CARD_FILES = ("README.md", "CITATION.cff")  # of an export: whoever shares it completes them
EXPORTED = f"conditioning/{WEIGHTS}"  # both, those of the prior with a prefix
_OF_PRIOR = "prior."


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
    classes: ClassSet = ISIC7

    @property
    def time_shift(self) -> float:
        """Of the times that it was trained at, and so of a sampler's; 1 where the run had no such setting."""
        return float((self.config.get("schedule") or {}).get("time_shift", 1.0))


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
    weights: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors["denoiser"].items():
        (weights if name.startswith("unet.") else rest)[name.removeprefix("unet.")] = tensor
    save_tensors(tensors["vae"], directory / "vae" / WEIGHTS)
    save_tensors(weights, directory / "unet" / WEIGHTS)
    save_tensors(rest, directory / CONDITIONING)
    if prior is not None:
        save_tensors(prior.tensors(), directory / PRIOR)
    write_info(directory, info)


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """checkpoint.yaml."""
    document = {"format": FORMAT, **vars(info), "classes": list(info.classes.codes)}
    if info.classes != ISIC7:  # a checkpoint of isic7 stays one that an earlier M2D reads
        document["class_set"] = json.loads(json.dumps(info.classes.as_dict()))
    (directory / "checkpoint.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors with the metadata that diffusers asks for. Raises OSError, for example where the disk is full."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with whole_file(path, durable=False) as partial:  # mark_complete waits for the disk
            save_file(contiguous, partial, metadata={"format": "pt"})
    except SafetensorError as error:  # the library has no other type for what the system refuses
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@contextmanager
def hold_checkpoint(path: str) -> Iterator[str]:
    """The directory that a path means now, which neither training nor `clean` removes inside the `with` block.

    `best` may come to mean another one meanwhile. A path that is no checkpoint comes back for `read_info` to refuse.
    """
    lock, found = None, Path(path)
    with suppress(OSError):  # nothing there, or a disk without locks
        while lock is None:
            found = Path(checkpoint_folder(path)).resolve()
            lock = share_lock(found / COMPLETE)
    with lock or nullcontext():
        yield str(found)


def read_info(path: str | Path) -> CheckpointInfo:
    """checkpoint.yaml of a complete checkpoint. Raises CheckpointError."""
    directory = Path(checkpoint_folder(str(path)))
    description = directory / "checkpoint.yaml"
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint: {path} is not a directory; name one such as EXPERIMENT/checkpoints/best")
    if not (directory / COMPLETE).is_file():
        inside = [file.parent for way in ("*", "checkpoints/*") for file in directory.glob(f"{way}/{COMPLETE}")]
        meant = max(inside, key=lambda one: (one.name == "best", one), default=None)
        hint = f"did you mean {meant}?" if meant else f"name one that has {COMPLETE}"
        raise CheckpointError(f"checkpoint: {path} is not a complete checkpoint; {hint}")
    if not description.is_file():  # an exported set of images, say
        raise CheckpointError(f"checkpoint: {path} is no checkpoint: it has no {description.name}")
    if reason := damage(directory, optional=TRAINING, editable=CARD_FILES):  # a checkpoint is given away without it
        raise CheckpointError(f"checkpoint: {reason}; take another checkpoint")
    try:
        document = yaml.safe_load(description.read_text(encoding="utf-8"))
        if (found := document.pop("format", None)) != FORMAT:
            raise CheckpointError(
                f"checkpoint: {path} is of format {found}, this M2D reads {FORMAT}; use the version that wrote it"
            )
        codes, recorded = document.pop("classes", ISIC7.codes), document.pop("class_set", None)
        info = CheckpointInfo(**document, classes=ISIC7 if recorded is None else ClassSet.from_dict(recorded))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {description} is damaged ({first_line(error)})") from None
    if tuple(codes) != info.classes.codes:
        raise CheckpointError(
            f"checkpoint: {path} was trained on classes {' '.join(codes)}, and its class_set is of "
            f"{' '.join(info.classes.codes)}"
        )
    return info


def read_prior(path: str | Path, info: CheckpointInfo | None = None) -> FeaturePrior | None:
    """The feature prior of a complete checkpoint, on the CPU; None where it was written without one.

    info: the checkpoint's, where it has been read. Raises CheckpointError where the prior is damaged or its features
    are not those that the checkpoint was trained with.
    """
    directory = Path(checkpoint_folder(str(path)))
    info, file = info or read_info(directory), directory / PRIOR
    if not file.is_file() and not (directory / EXPORTED).is_file():
        return None
    try:
        tensors = load_file(file) if file.is_file() else _exported(directory, of_prior=True)
        if not tensors:
            return None
        prior = FeaturePrior.from_tensors(tensors, info.classes)
        if prior.dim != info.feature_dim:
            raise ValueError(f"its features have {prior.dim} dimensions, the checkpoint's {info.feature_dim}")
    except Exception as error:
        raise CheckpointError(f"checkpoint: {file} cannot be used ({first_line(error)}); take another one") from None
    return prior


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Load for generation. Raises CheckpointError where it is missing, incomplete or broken."""
    directory = Path(checkpoint_folder(str(path)))
    info = read_info(directory)
    try:
        vae = load_vae(directory / "vae", "checkpoint", local_files_only=True)
        unet = load_strictly(UNet2DConditionModel, directory / "unet", "checkpoint", local_files_only=True)
        conditioning = ConditionEncoder(ConditioningConfig(**info.conditioning), info.feature_dim, len(info.classes))
        denoiser = Denoiser(unet, conditioning, int(unet.config.in_channels))
        file = directory / CONDITIONING
        tensors = load_file(file) if file.is_file() else _exported(directory, of_prior=False)
        missing, unknown = denoiser.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.startswith("unet.")]
        if missing or unknown:
            raise CheckpointError(f"checkpoint: {path} lacks {missing} and has unknown {unknown}")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint: {path} cannot be loaded ({first_line(error)}); take another one") from None
    autoencoder = Autoencoder(vae)
    for network in (autoencoder, denoiser):
        network.eval().requires_grad_(False).to(device)
    return Checkpoint(
        str(directory), checkpoint_sha256(directory), info, autoencoder, denoiser, prior=read_prior(directory, info)
    )


def _exported(directory: Path, *, of_prior: bool) -> dict[str, Tensor]:
    """Of an export's one file the prior's tensors, or all others, in float32: some may be in half precision."""
    return {
        name.removeprefix(_OF_PRIOR): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(directory / EXPORTED).items()
        if name.startswith(_OF_PRIOR) == of_prior
    }


def checkpoint_sha256(directory: Path) -> str:
    """Over all files that shape an image: what generated images carry as their checkpoint."""
    digest = hashlib.sha256()
    names = ["vae/config.json", f"vae/{WEIGHTS}", "unet/config.json", f"unet/{WEIGHTS}"]
    # Without a prior the hash is what it was before there were priors.
    names += [name for name in (CONDITIONING, PRIOR, EXPORTED) if (directory / name).is_file()]
    for name in names:
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
