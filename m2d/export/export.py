"""`m2d export`: of a checkpoint what others load, as a folder or a repository of the Hugging Face hub.

model_index.json  pipeline.py   a diffusers pipeline, see m2d.export.pipeline; its code is made by m2d.export.bundle
vae/  unet/  conditioning/      weights, and the code of classes that diffusers lacks
checkpoint.yaml  complete.json  it is a checkpoint of M2D too, for inference
README.md  CITATION.cff         the model card; samples.png where asked for

Of a folder of generated images it makes a data set instead, see m2d.export.dataset.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from torch import Tensor, nn

from m2d import __version__
from m2d.errors import ConfigError, first_line
from m2d.export import pipeline
from m2d.export.bundle import one_file
from m2d.export.card import CARD, SAMPLES, experiment_record, write_card
from m2d.export.conditioning import Conditioning
from m2d.export.dataset import is_generated, write_dataset
from m2d.export.settings import ExportConfig
from m2d.files.atomic import COMPLETE, PARTIAL, mark_complete, to_disk
from m2d.files.paths import absolute, result_path
from m2d.files.progress import say
from m2d.models.checkpoint import WEIGHTS, Checkpoint, hold_checkpoint, load_checkpoint, save_tensors, write_info
from m2d.models.published import HUB, checkpoint_path, own_name, repository
from m2d.training.ema import with_length

INDEX = "model_index.json"
_PIPELINE, _CONDITIONING, _VAE = "pipeline", "m2d_conditioning", "m2d_vae"  # modules of an export
_WHOLE = ("linear.", "prior.mean")  # block PCA, and what the features' tiny deviations divide: never rounded


def export(config: ExportConfig) -> Path | str:
    """Write the folder, or send it. Returns where it is. Raises an M2DError, and leaves nothing half done then."""
    if is_generated(config.checkpoint):
        generated = Path(absolute(config.checkpoint))
        title = config.title or f"Synthetic dermoscopy images {generated.name}"
        return deliver(
            config, lambda folder, name: write_dataset(folder, config, generated, title, name), kind="dataset"
        )
    with hold_checkpoint(absolute(checkpoint_path("checkpoint", config.checkpoint))) as path:
        checkpoint = load_checkpoint(path)
        if config.ema_length is not None:
            checkpoint, told = with_length(checkpoint, config.ema_length)
            say(told)
        record = experiment_record(Path(path))
        title = config.title or (record.name if record else own_name(path))
        return deliver(config, lambda folder, name: write_export(folder, config, checkpoint, record, title, name))


def deliver(config: ExportConfig, write: Callable[[Path, str], None], kind: str = "model") -> Path | str:
    """To the folder or the repository that `to` names. write: (empty folder, its name for users) -> its files."""
    if config.to.startswith(HUB):
        return _send(config, write, kind)
    place = Path(absolute(result_path("to", config.to)))
    inside = place.is_relative_to(Path.cwd())  # a card names no folder of this machine
    with _new_folder(place) as folder:
        write(folder, (place.relative_to(Path.cwd()) if inside else Path(place.name)).as_posix())
    files = [file for file in place.rglob("*") if file.is_file()]
    print(f"{len(files):,} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, in {place}")
    return place


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `place`, which becomes it at the end; an earlier export there is replaced.

    Raises ConfigError for anything else that is there, and where the disk refuses.
    """
    _refuse_others(place)
    hidden = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        hidden.mkdir(parents=True)
        yield hidden
        old = hidden.with_name(f"{hidden.name}.old")
        if place.exists():
            place.rename(old)
        hidden.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        to_disk(place.parent)
    except OSError as error:
        raise ConfigError(
            f"to: {error.filename or place} cannot be written ({error.strerror}); name another place"
        ) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _refuse_others(place: Path) -> None:
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        ours = set(json.loads((place / COMPLETE).read_text(encoding="utf-8"))["files"]) | {COMPLETE}
        there = {file.relative_to(place).as_posix() for file in place.rglob("*") if not file.is_dir()}
        if CARD in ours and there <= ours and not place.is_symlink():
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"to: {place} is there and is no unchanged export of M2D; name a new folder, or remove it")


def _send(config: ExportConfig, write: Callable[[Path, str], None], kind: str) -> str:
    """To the hub, by its client's own token. Returns its address, or with dry_run the location asked for.

    Files that the repository has already are not sent again. Raises ConfigError where the hub refuses, CheckpointError
    for a location that names no repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    name, revision = repository("to", config.to)
    with tempfile.TemporaryDirectory(prefix="m2d-export-") as made:
        folder = Path(made)
        write(folder, name)
        if config.dry_run:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            for file in files:
                print(f"{file.stat().st_size:>12,}  {file.relative_to(folder)}")
            size = sum(file.stat().st_size for file in files)
            print(f"would send {len(files)} files, {size / 1e6:.1f} MB, to {name}")
            return config.to
        api, of = HfApi(), dict[str, Any](repo_type=kind)
        try:
            address = api.create_repo(name, private=config.private or None, exist_ok=True, **of)
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True, **of)
            api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message="Export by M2D", **of)
        except LocalTokenNotFoundError:
            raise ConfigError(f"to: {name}: there is no token; log in by hf auth login, or set HF_TOKEN") from None
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ConfigError(
                f"to: {name} cannot be sent ({first_line(error)}); check network and token (hf auth login), then run "
                "again"
            ) from None
    print(f"sent to {address}")
    return str(address)


def write_export(
    folder: Path, config: ExportConfig, checkpoint: Checkpoint, record: Any, title: str, repository: str
) -> None:
    """All files of an export into an empty folder. repository: how its users name it."""
    write_networks(folder, checkpoint, half=config.dtype == "fp16")
    write_info(folder, replace(checkpoint.info, config=_without_places(checkpoint.info.config)))
    write_card(folder, config, checkpoint, record, title=title, repository=repository)
    mark_complete(folder)
    exported = load_checkpoint(folder)  # what others will load
    if config.samples:
        _draw_samples(folder / SAMPLES, exported, config, title)
        mark_complete(folder)


def write_networks(folder: Path, checkpoint: Checkpoint, *, half: bool) -> None:
    """The pipeline's index, code, settings and weights. half: see `_in_file`."""
    vae, unet, conditioning = checkpoint.autoencoder.vae, checkpoint.denoiser.unet, conditioning_of(checkpoint)
    own_vae = type(vae).__module__.split(".")[0] == "m2d"
    index = {
        "_class_name": [_PIPELINE, "M2DPipeline"],
        "_diffusers_version": diffusers.__version__,
        "conditioning": [_CONDITIONING, "Conditioning"],
        "unet": ["diffusers", type(unet).__name__],
        "vae": [_VAE if own_vae else "diffusers", type(vae).__name__],
    }
    for name, network in (("vae", vae), ("unet", unet), ("conditioning", conditioning)):
        network.save_config(folder / name)
        settings = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # of this machine
        (folder / name / "config.json").write_text(f"{json.dumps(settings, indent=2)}\n", encoding="utf-8")
        save_tensors(_in_file(network, half=half, whole=name == "unet"), folder / name / WEIGHTS)
    (folder / INDEX).write_text(f"{json.dumps(index, indent=2)}\n", encoding="utf-8")
    write_code(folder, type(vae) if own_vae else None)


def write_code(folder: Path, vae: type | None) -> None:
    """The pipeline's modules, each of one file that needs no m2d. vae: its class where diffusers has none such."""
    sources = [(Path(_PIPELINE), "m2d.export.pipeline", "M2DPipeline")]
    sources.append((Path("conditioning", _CONDITIONING), "m2d.export.conditioning", "Conditioning"))
    if vae is not None:
        sources.append((Path("vae", _VAE), vae.__module__, vae.__name__))
    for place, module, name in sources:
        (folder / place.with_suffix(".py")).write_text(one_file(module, name, __version__), encoding="utf-8")


def conditioning_of(checkpoint: Checkpoint) -> Conditioning:
    """The component that holds what guides the U-Net, with the checkpoint's weights and prior."""
    info, denoiser, prior = checkpoint.info, checkpoint.denoiser, checkpoint.prior
    encoder = denoiser.conditioning
    made = Conditioning(
        classes=list(info.classes.codes),
        image_size=info.image_size,
        feature_dim=info.feature_dim,
        context_dim=encoder.class_embedding.embedding_dim,
        feature_tokens=encoder.feature_tokens,
        latent_channels=int(denoiser.unet.config.in_channels),
        prior_rank=None if prior is None else int(prior.factors.shape[1]),
        time_shift=info.time_shift,
    )
    tensors = {name: tensor for name, tensor in denoiser.state_dict().items() if not name.startswith("unet.")}
    tensors |= {f"prior.{name}": tensor for name, tensor in (prior.tensors() if prior else {}).items()}
    made.load_state_dict(tensors)
    return made.eval()


def _in_file(network: nn.Module, *, half: bool, whole: bool) -> dict[str, Tensor]:
    """Tensors on the CPU. half: floating ones in fp16, all if `whole`, else those of two dimensions and more."""

    def rounded(name: str, tensor: Tensor) -> Tensor:
        kept = (
            name.startswith(_WHOLE) or type(network).__name__ == "LinearAutoencoder" or not tensor.is_floating_point()
        )
        return tensor if not half or kept or not (whole or tensor.dim() > 1) else tensor.half()

    return {name: rounded(name, tensor.detach().cpu()) for name, tensor in network.state_dict().items()}


def _without_places(settings: Any) -> Any:
    """Settings of a run without paths of the machine that it ran on."""
    if isinstance(settings, dict):
        return {name: _without_places(value) for name, value in settings.items()}
    is_place = isinstance(settings, str) and (settings.startswith(("/", "~")) or "://" in settings)
    return None if is_place else settings


def _draw_samples(path: Path, checkpoint: Checkpoint, config: ExportConfig, title: str) -> None:
    """A grid of the first images of each class, as `m2d generate --seed` makes them."""
    from m2d.diffusion.settings import SamplingSettings
    from m2d.generation.contact_sheet import contact_sheet
    from m2d.generation.generator import Generator, pick_feature
    from m2d.generation.plan import rows_of, standard_plan

    feature, classes = pick_feature(None, checkpoint), checkpoint.info.classes
    codes = checkpoint.prior.present if checkpoint.prior else list(classes.codes)
    say(f"drawing {config.samples} images of each of {len(codes)} classes")
    plan = standard_plan(
        dict.fromkeys(codes, config.samples), run_seed=config.seed, sampling=SamplingSettings(), feature=feature
    )
    rows = rows_of(plan)
    images = Generator(checkpoint, mixed_precision=None).generate(rows)
    of_class = {code: images[[n for n, row in enumerate(rows) if row.label == code]] for code in codes}
    caption = (
        f"Synthetic images, not patients. Seed {config.seed}, {checkpoint.image_size} x {checkpoint.image_size} px."
    )
    contact_sheet(of_class, title=title, caption=caption, classes=classes).save(path, format="PNG")


class M2DPipeline(pipeline.M2DPipeline):
    """`from m2d import M2DPipeline`: the pipeline of any checkpoint of M2D, by M2D's own classes."""

    @classmethod
    def from_pretrained(
        cls, location: str, *, dtype: torch.dtype | None = None, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> Self:
        """Of a checkpoint directory, exported or not, a name in weights/, or hub:USER/NAME; no remote code is run.

        dtype, or torch_dtype: of the U-Net; the rest is computed in float32. Raises an M2DError.
        """
        checkpoint = load_checkpoint(checkpoint_path("checkpoint", str(location)))
        unet = checkpoint.denoiser.unet.to(dtype or torch_dtype or torch.float32)
        return cls(unet=unet, vae=checkpoint.autoencoder.vae, conditioning=conditioning_of(checkpoint))
