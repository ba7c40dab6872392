"""Reads a weights file from anywhere: the tensors that a network needs, or one line that says what the file is instead.

Called by the feature extractors. It knows file formats, not networks.
"""

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from m2d.errors import CheckpointError, first_line


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror or type(error).__name__})") from None


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in hex, whatever file or order they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path, *, accept_safetensors: bool = False) -> dict[str, Tensor]:
    """Named tensors of a file by torch.save, on the CPU: a flat dict, or one under `model`, `module` or `state_dict`.

    No code in the file runs. accept_safetensors: that format is read too; otherwise it is refused by its name.
    Raises CheckpointError, one line, for everything else: missing, empty, truncated, a web page, code, other content.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror or type(error).__name__})") from None
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:  # a length, then a JSON header
        if not accept_safetensors:
            raise refusal(path, "is a safetensors file; give the published .pth, a file written by torch.save")
        try:
            return load_file(path)
        except Exception as error:
            raise refusal(path, f"cannot be read as safetensors ({first_line(error)}); copy it again") from None
    if size == 0:
        raise refusal(path, "is empty; download it again")
    if re.search(rb"<html|^\W*<(!doctype html|head|\?xml)", head, re.IGNORECASE):
        raise refusal(path, "is a web page, not weights (Google Drive saves its warning page so); download it again")
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise refusal(path, "is no file by torch.save, by its first bytes; give the published .pth")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):  # the directory of a zip is at its end
        raise refusal(path, f"ends too early, after {size:,} bytes: a truncated download; download it again")
    content = _load(path, size)
    if isinstance(content, Mapping):
        wrappers = ("model", "module", "state_dict")  # where training scripts put the weights among other things
        content = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), content)
        others = [str(name) for name, value in content.items() if not _is_plain(value)]
        if content and not others:
            return {str(name): tensor.detach() for name, tensor in content.items()}
        kind = some_of(others) or "nothing"
    else:
        kind = f"a {type(content).__name__}"
    raise refusal(path, f"has something else than named tensors ({kind}); give a state dict")


def fitting(
    path: Path, name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], advice: str
) -> dict[str, Tensor]:
    """The `wanted` tensors out of a file's, in the order wanted.

    wanted: those of the network called `name`; its shapes count, its values do not. Raises CheckpointError, one line,
    naming what is missing, unknown, of another shape or not finite.
    """
    misfits = []
    for key, need in wanted.items():
        found = tensors.get(key, need)
        kind = f" of {found.dtype}" if need.is_floating_point() and not found.is_floating_point() else ""
        if found.shape != need.shape or kind:
            misfits.append(f"{key} is {list(found.shape)}{kind}, not {list(need.shape)}")
    faults = {
        f"of {len(wanted)} tensors missing": [key for key in wanted if key not in tensors],
        "unknown": [key for key in tensors if key not in wanted],
        "of another shape": misfits,
    }
    if any(faults.values()):
        summary = "; ".join(f"{len(names)} {what} ({some_of(names)})" for what, names in faults.items() if names)
        raise refusal(path, f"is not {name}: {summary}; {advice}")
    spoilt = [key for key in wanted if not bool(torch.isfinite(tensors[key]).all())]
    if spoilt:
        raise refusal(path, f"has NaN or infinite values in {some_of(spoilt)}; download it again")
    return {key: tensors[key] for key in wanted}


def some_of(names: list[str], at_most: int = 3) -> str:
    """The first few of a list and how many are left out, in one line, whatever a file calls its tensors."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(" ".join(name.split()) for name in names[:at_most]) + more


def refusal(path: Path, what: str) -> CheckpointError:
    """The error of a weights file that is not what it must be."""
    return CheckpointError(f"feature_extractor.weights: {path} {what}")


def _load(path: Path, size: int) -> Any:
    try:
        # Training scripts keep their arguments in a Namespace beside the weights: a plain record, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's age: whether the file can be read says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|class) (\S+)", str(error))
        if code:
            raise refusal(path, f"is a pickle that would run code ({code[1]}); give a file of tensors only") from None
        raise refusal(path, f"is no file of tensors by torch.save ({first_line(error)})") from None
    except Exception as error:  # whatever a broken file makes of torch's reader
        reason = f"cannot be read to its end ({type(error).__name__}) and is {size:,} bytes long"
        raise refusal(path, f"{reason}; is the download complete?") from None


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu and not value.is_quantized
