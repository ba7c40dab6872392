"""PanDerm (Yan et al., Nature Medicine 2025): the published checkpoints as timm's Beit, loaded strictly or not at all.

The weights are CC BY-NC-ND and come by hand; docs/panderm.md says from where.
Facts: SiyuanYan1/PanDerm, classification/models/modeling_finetune.py and builder.py.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from m2d.models.extractors.base import FeatureExtractor
from m2d.models.extractors.weights import file_sha256, fitting, read_tensors, refusal, some_of
from m2d.models.settings import Crop

logger = logging.getLogger(__name__)

NATIVE_SIZE = 224
# Not a slip: the authors' evaluation transform has 0.228 where ImageNet's usual numbers have 0.229 (builder.py:27-48).
MEAN = (0.485, 0.456, 0.406)
STD = (0.228, 0.224, 0.225)

PREFIX = "encoder."  # of every encoder tensor in the published Large file, and of none in Base's
# What pre-training leaves beside the encoder: CAEv2's regressor, decoder and teacher, its tokens, a head.
EXTRAS = re.compile(r"(regresser|decoder|teacher|head)\.|(mask_token|rd_pos_embed)$")
# What only fine-tuning makes.
FINE_TUNED = re.compile(r"(^|\.)(fc_norm|rel_pos_bias)\.|relative_position_(bias_table|index)$")


@dataclass(frozen=True, kw_only=True)
class PanDermSize:
    """One of the two published networks."""

    title: str  # as the authors write it
    architecture: str  # timm's name of the same shape
    width: int
    depth: int
    file_name: str  # as published
    sha256: str | None = None  # of the published file, where it has been reported

    def network(self, input_size: int = NATIVE_SIZE) -> Any:
        """timm's network without memory for its tensors."""
        with torch.device("meta"):
            return timm.create_model(
                self.architecture,
                pretrained=False,
                num_classes=0,
                img_size=input_size,
                use_abs_pos_emb=True,
                use_rel_pos_bias=False,
                use_shared_rel_pos_bias=False,
                init_values=0.1,  # any number but 0 makes the gammas, which the file then fills
                global_pool="token",  # "avg" would leave out the final norm
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the encoder: 15 a block and 6 more. Query and value have a bias, the key has none."""
        return {name: tuple(tensor.shape) for name, tensor in self.network().state_dict().items()}


SIZES = {
    "panderm-large": PanDermSize(
        title="PanDerm-Large",
        architecture="beit_large_patch16_224",
        width=1024,
        depth=24,
        file_name="panderm_ll_data6_checkpoint-499.pth",
    ),
    "panderm-base": PanDermSize(
        title="PanDerm-Base",
        architecture="beit_base_patch16_224",
        width=768,
        depth=12,
        file_name="panderm_bb_data6_checkpoint-499.pth",
        sha256="be1e0fb108b3bc58721cb5195f136c948160799438f222acf1fd142230ac1ff1",  # reported twice, by third parties
    ),
}


class PanDerm(FeatureExtractor):
    """PanDerm's encoder: pre-norm ViT with layer scale, q and v bias without k bias, and a fixed position table.

    cls and patches are the tokens after the final LayerNorm (eps 1e-6): cls is the authors' linear-probe feature.
    N = (S / 16)^2. At other sizes than 224 the table's patch rows are resampled (bicubic, antialiased, timm's
    resample_abs_pos_embed) and its class row is kept.
    """

    def __init__(
        self, name: str, encoder: Mapping[str, Tensor], input_size: int = NATIVE_SIZE, crop: Crop = "whole",
        weights_sha256: str = "0" * 64
    ) -> None:  # fmt: skip
        """encoder: exactly the tensors of SIZES[name].shapes(), float32; they become the network's own, uncopied."""
        size, grid = SIZES[name], input_size // 16
        super().__init__(
            name, size.width, input_size, 255 * torch.tensor(MEAN), 255 * torch.tensor(STD), num_patches=grid * grid,
            crop=crop, crop_pct=NATIVE_SIZE / 256, weights_sha256=weights_sha256
        )  # fmt: skip
        network = size.network(input_size)
        table = encoder["pos_embed"]
        if input_size != NATIVE_SIZE:
            table = resample_abs_pos_embed(table, new_size=[grid, grid], num_prefix_tokens=1)
        network.load_state_dict({**encoder, "pos_embed": table}, strict=True, assign=True)
        for block in network.blocks:  # a buffer of zeros that no file has: the key's bias
            block.attn.k_bias = torch.zeros(size.width)
        self.network = network.eval().requires_grad_(False)


def load_panderm(name: str, path: Path, input_size: int | None, crop: Crop) -> PanDerm:
    """PanDerm of that name from any published form of its file. Raises CheckpointError, one line, for any other."""
    encoder = encoder_tensors(name, path, read_tensors(path))
    sha256, reported = file_sha256(path), SIZES[name].sha256
    if reported not in (None, sha256):
        logger.warning(
            "%s: %s fits tensor by tensor and is used, but its SHA-256 is %s, not %s as reported for the published "
            "file: re-saved, or changed?", name, path, sha256, reported
        )  # fmt: skip
    return PanDerm(name, encoder, input_size or NATIVE_SIZE, crop, sha256)


def encoder_tensors(name: str, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors under timm's names, float32: all of them, in the right shapes, and nothing unknown beside.

    tensors: as published, with or without the `encoder.` prefix and what pre-training left. path: for the message.
    """
    published_as = SIZES[name].file_name
    if tuned := [key for key in tensors if FINE_TUNED.search(key)]:
        raise refusal(
            path,
            f"is a fine-tuned PanDerm (it has {some_of(tuned, 2)}), a classifier of another form than the published "
            f"encoder; give the pre-trained file {published_as}",
        )
    encoder = {}
    prefixed = any(key.startswith(PREFIX) for key in tensors)
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        if plain.startswith("head.") or (plain == key and EXTRAS.match(plain)):
            continue
        # In a prefixed file a bare name is another network's.
        encoder[f"{key} without {PREFIX}" if prefixed and plain == key else plain] = tensor
    wanted = SIZES[name].network().state_dict()
    fitted = fitting(path, name, encoder, wanted, f"it seems to be {_seems(name, tensors)}")
    return {key: tensor.float().contiguous() for key, tensor in fitted.items()}


def _seems(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Which network the file has, by its width and its number of blocks, and what to do."""
    blocks = [re.match(rf"(?:{re.escape(PREFIX)})?blocks\.(\d+)\.", key) for key in tensors]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    widths = [tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("norm1.weight") and tensor.ndim]
    width = Counter(widths).most_common(1)[0][0] if widths else 0
    published_as = SIZES[name].file_name
    for other, size in SIZES.items():
        if (width, depth) == (size.width, size.depth):
            if other == name:
                return f"a changed {size.title}; download {published_as} again"
            return f"{size.title}: set feature_extractor.name to {other}, or give {published_as}"
    found = f"{depth} blocks of width {width}" if depth and width else "no blocks of a ViT"
    return f"no PanDerm ({found}); give {published_as}"
