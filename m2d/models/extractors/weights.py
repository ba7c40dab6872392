"""Reads a weights file from anywhere: plain tensors or one line that says what the file is instead.

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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from m2d.errors import CheckpointError, first_line

WRAPPERS = ("model", "module", "state_dict")  # where training scripts put the weights among other things


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror or type(error).__name__})") from None


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
    if _is_safetensors(path):
        if not accept_safetensors:
            raise _refusal(path, "is a safetensors file; give the published .pth, a file written by torch.save")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _refusal(path, f"cannot be read as safetensors ({first_line(error)}); copy it again") from None
    content = _load(path)
    if isinstance(content, Mapping):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(map(_is_plain, content.values())):
        kind = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            kind = some_of([str(name) for name, value in content.items() if not _is_plain(value)]) or "nothing"
        raise _refusal(path, f"holds something else than named tensors ({kind}); give a state dict")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError naming the first tensors with a NaN or an infinity."""
    spoilt = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if spoilt:
        raise _refusal(path, f"has NaN or infinite values in {some_of(spoilt)}; download it again")


def some_of(names: list[str], at_most: int = 3) -> str:
    """The first few of a list and how many are left out, in one line, whatever a file calls its tensors."""
    rest = len(names) - at_most
    return ", ".join(" ".join(name.split()) for name in names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def faults_text(missing: list[str], needed: int, unknown: list[str], misfits: list[str]) -> str:
    """What is wrong with a file's tensors, in one line; empty where nothing is. needed: how many there must be."""
    found = (missing, f"of {needed} tensors missing"), (unknown, "unknown"), (misfits, "of another shape")
    return "; ".join(f"{len(names)} {what} ({some_of(names)})" for names, what in found if names)


def _load(path: Path) -> Any:
    size = _require_torch_file(path)
    try:
        # Training scripts keep their arguments in a Namespace beside the weights: a plain record, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's age: whether the file can be read says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"class (\S+)", str(error))
        if code is not None:
            raise _refusal(
                path, f"is a pickle that would run code ({code[1]}), which is never done; give a file of tensors only"
            ) from None
        raise _refusal(path, f"is no file of tensors by torch.save ({first_line(error)})") from None
    except Exception as error:  # whatever a broken file makes of torch's reader
        raise _refusal(
            path,
            f"cannot be read to its end ({type(error).__name__}) and is {size:,} bytes long; is the download complete?",
        ) from None


def _require_torch_file(path: Path) -> int:
    """The size in bytes of a file that begins as torch.save's do; a line that says what it is instead."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror or type(error).__name__})") from None
    if size == 0:
        raise _refusal(path, "is empty; download it again")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")) or b"<html" in text:
        raise _refusal(
            path, "is a web page, not weights (Google Drive's warning page is often saved so); download it again"
        )
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):  # the directory of a zip is at its end
            raise _refusal(path, f"ends too early, after {size:,} bytes: a truncated download; download it again")
    elif not head.startswith(b"\x80"):
        raise _refusal(path, "is no file by torch.save, by its first bytes; give the published .pth")
    return size


def _is_safetensors(path: Path) -> bool:
    """Eight bytes of length, at most 100 MB by the format's rule, then a JSON header."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return False  # the reader that follows says why
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"feature_extractor.weights: {path} {what}")
