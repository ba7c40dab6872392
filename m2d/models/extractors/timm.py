"""Any timm model with spatial features as a feature extractor: `timm:<model>`, from the hub or from a local file.

Called by load_feature_extractor.
"""

import difflib
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from m2d.errors import ConfigError, first_line
from m2d.models.extractors.base import FeatureExtractor, NoGridError, features_of
from m2d.models.extractors.weights import file_sha256, fitting, read_tensors, some_of, tensors_sha256
from m2d.models.settings import TIMM_PREFIX, Crop


class TimmExtractor(FeatureExtractor):
    """A timm model without its classifier; mean, std, native size and crop_pct are timm's data config of it.

    The resize is this package's antialiased bilinear one, also where timm's config says bicubic.
    """

    def __init__(self, name: str, network: Any, input_size: int, crop: Crop, weights_sha256: str) -> None:
        """Fits the network's position tables to the size; convolutions need nothing.

        Raises ConfigError where its features are no square grid, or it does not take that size.
        """
        config, network = resolve_data_config(model=network), network.eval().requires_grad_(False)
        resized = input_size != config["input_size"][-1]
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        patch = patch[0] if isinstance(patch, tuple) else patch
        if resized and isinstance(patch, int) and input_size % patch:  # some would silently not see all of the image
            raise ConfigError(f"feature_extractor.input_size is {input_size}; {name} needs a multiple of {patch}")
        try:
            if resized and hasattr(network, "set_input_size"):
                network.set_input_size(img_size=(input_size, input_size))
            with torch.no_grad():
                features = features_of(network, torch.zeros(1, 3, input_size, input_size))
        except NoGridError as error:
            raise _unusable(name, f"its features are no square grid ({error}); take another model") from None
        except Exception as error:  # whatever a network makes of a size that it does not take
            why = f"{name} does not take {input_size} px ({first_line(error)[:120]}); give another"
            raise ConfigError(f"feature_extractor.input_size: {why}") from None
        pooled, (_, count, dim) = features.cls.shape[-1], features.patches.shape
        if pooled != dim:
            raise _unusable(name, f"its pooled vector has {pooled} numbers, its cells have {dim}; take another model")
        mean, std = (255 * torch.tensor(config[key]) for key in ("mean", "std"))
        super().__init__(
            name, int(dim), input_size, mean, std, num_patches=int(count), crop=crop, crop_pct=config["crop_pct"],
            squash=config["crop_mode"] == "squash", weights_sha256=weights_sha256
        )  # fmt: skip
        self.network = network


def load_timm_extractor(name: str, path: Path | None, input_size: int | None, crop: Crop) -> TimmExtractor:
    """The model of that name, from the hub where path is None, else from a file in timm's own tensor names.

    Raises ConfigError where there is no such model, no network or no square grid; CheckpointError for a wrong file.
    """
    native, model = native_size(name), name.removeprefix(TIMM_PREFIX)
    if path is None:
        network = _from_hub(model)
        sha256 = tensors_sha256(network.state_dict())
    else:
        network = timm.create_model(model, pretrained=False, num_classes=0)
        wanted, heads = network.state_dict(), network.pretrained_cfg["classifier"] or ()
        classifiers = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        tensors = read_tensors(path, accept_safetensors=True).items()
        state = {key: tensor for key, tensor in tensors if key in wanted or not key.startswith(classifiers)}
        network.load_state_dict(fitting(path, name, state, wanted, "give a file in timm's tensor names"))
        sha256 = file_sha256(path)
    return TimmExtractor(name, network, input_size or native, crop, sha256)


def native_size(name: str) -> int:
    """Pixels a side that timm's config of `timm:<model>` names. Raises ConfigError for an unknown model."""
    model = name.removeprefix(TIMM_PREFIX)
    architecture = model.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise _unusable(name, f"timm has no such model; near it: {' '.join(near) or 'none, see timm.list_models()'}")
    try:
        height, width = get_pretrained_cfg(model, allow_unregistered=False).input_size[-2:]
    except RuntimeError:
        tags = timm.list_pretrained(f"{architecture}.*")
        hint = f"known: {some_of(tags, 5)}" if tags else f"give {TIMM_PREFIX}{architecture} and a weights file"
        raise _unusable(name, f"timm has no such weights of {architecture}; {hint}") from None
    if height != width:
        raise _unusable(name, f"it is made for {height} x {width} images; give one for squares")
    return int(height)


def _from_hub(model: str) -> nn.Module:
    retries = logging.getLogger("huggingface_hub")  # it logs each of its attempts; the last one's error is enough
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        return timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client raises its own, requests' and the socket's
        reason = f"{type(error).__name__}: {first_line(error)[:150]}"
        why = f"its weights cannot be fetched from the hub ({reason}); give a local --feature_extractor.weights"
        raise _unusable(TIMM_PREFIX + model, why) from None
    finally:
        retries.setLevel(level)


def _unusable(name: str, why: str) -> ConfigError:
    return ConfigError(f"feature_extractor.name is {name}; {why}")
