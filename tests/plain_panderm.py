"""PanDerm's encoder written out in plain torch by the published tensor names, and seeded checkpoints of true shapes.

From the authors' modeling_finetune.py (the line numbers are its own); no timm, nothing of m2d.
"""

import math

import torch
from torch import Tensor

LARGE = {"width": 1024, "depth": 24, "heads": 16}
BASE = {"width": 768, "depth": 12, "heads": 12}


def published_shapes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published encoder, without prefix: 15 a block and 6."""
    d = width
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, 197, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    for i in range(depth):
        for name in ("gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias"):
            shapes[f"blocks.{i}.{name}"] = (d,)
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * d, d)
        shapes[f"blocks.{i}.attn.proj.weight"] = (d, d)
        for name in ("attn.proj.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (d,)
        shapes[f"blocks.{i}.mlp.fc1.weight"] = (4 * d, d)
        shapes[f"blocks.{i}.mlp.fc1.bias"] = (4 * d,)
        shapes[f"blocks.{i}.mlp.fc2.weight"] = (d, 4 * d)
        shapes[f"blocks.{i}.mlp.fc2.bias"] = (d,)
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def seeded_encoder(width: int, depth: int, seed: int = 0) -> dict[str, Tensor]:
    """Random values large enough for every bias, gamma and position to matter to the output.

    Rows overlap in memory (row i is the 3 i-th to the (3 i + n)-th of one random line), so that a checkpoint of 303 M
    true-shaped numbers takes a few MB, in memory as in a file by torch.save.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        line = torch.empty(3 * rows + columns).uniform_(low, high, generator=generator)
        strides = [3 * math.prod(shape[axis + 1 : -1]) for axis in range(len(shape) - 1)]
        return line.as_strided(shape, (*strides, 1))

    encoder = {}
    for name, shape in published_shapes(width, depth).items():
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma_1", "gamma_2")):
            encoder[name] = uniform(shape, 0.2, 1.0)
        elif name.endswith(("_token", "pos_embed", "bias")):
            encoder[name] = uniform(shape, -0.5, 0.5)
        else:
            bound = 1.5 / math.sqrt(math.prod(shape[1:]))
            encoder[name] = uniform(shape, -bound, bound)
    return encoder


def hollow(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Zeros of these shapes that take no room, in memory or in a file: every tensor is one number, expanded."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def pretraining_extras(width: int) -> dict[str, Tensor]:
    """Of each kind of the 88 tensors that stand beside the Large encoder in its published file, and of a decoder."""
    block = "regresser.regressor_blocks.0"
    names = ("mask_token", "rd_pos_embed", f"{block}.gamma_1_cross", f"{block}.norm1_q.weight")
    names += (f"{block}.cross_attn.q_bias", f"{block}.cross_attn.proj.weight", f"{block}.mlp_cross.fc1.weight")
    names += ("regresser.norm.weight", "decoder.norm.weight", "teacher.cls_token")
    return hollow(dict.fromkeys(names, (1, 1, width)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight + bias  # eps: :538


@torch.no_grad()
def plain_panderm(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """Tokens [B, 1 + N, D] after the final norm, class token first, of preprocessed x [B, 3, S, S]."""
    batch, depth = x.shape[0], sum(name.endswith(".gamma_1") for name in state)
    cells = x.unfold(2, 16, 16).unfold(3, 16, 16)  # [B, 3, h, w, 16, 16], row by row
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(batch, -1, 3 * 16 * 16)
    tokens = cells @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"].expand(batch, -1, -1), tokens], dim=1) + state["pos_embed"]  # :500-503

    def split(y: Tensor) -> Tensor:
        return y.view(batch, y.shape[1], heads, -1).transpose(1, 2)

    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        y = layer_norm(tokens, block["norm1.weight"], block["norm1.bias"])
        q_weight, k_weight, v_weight = block["attn.qkv.weight"].chunk(3)
        q = split(y @ q_weight.T + block["attn.q_bias"])
        k = split(y @ k_weight.T)  # no bias: :172-175
        v = split(y @ v_weight.T + block["attn.v_bias"])
        attention = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1)
        y = (attention @ v).transpose(1, 2).reshape(tokens.shape)
        tokens = tokens + block["gamma_1"] * (y @ block["attn.proj.weight"].T + block["attn.proj.bias"])
        y = layer_norm(tokens, block["norm2.weight"], block["norm2.bias"])
        y = y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))  # exact GELU: :97-113
        tokens = tokens + block["gamma_2"] * (y @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    return layer_norm(tokens, state["norm.weight"], state["norm.bias"])
