"""The command `verify`: what images say of themselves, and whether that still holds.

A file that was named is told of in full; of a folder the images that are not in order, and counts.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from m2d.data.decode import ImageRejected, probe_image
from m2d.data.layouts import IMAGE_SUFFIXES, REPORT, REPORT_FILES
from m2d.data.settings import DataConfig
from m2d.errors import ConfigError, Incomplete, first_line
from m2d.files.paths import input_path
from m2d.generation.output import RECORD_NAME, SHARDS, read_pngs
from m2d.generation.provenance import OF_NOBODY, Manifest, read_certificates, read_manifest, require_c2pa
from m2d.generation.settings import VerifyConfig

_SHARD_SUFFIXES = (".tar", ".parquet")
_TOLD = ("synthetic", "class", "index", "seed", "attempt", "mode", "checkpoint")  # of the text, for a person
_LONGEST = 200  # characters of what a file says, which is anybody's word


def verify(config: VerifyConfig) -> None:
    """Print what each image says of itself. Nothing is fetched.

    Raises ConfigError where there is nothing to look at, and Incomplete, at the end, where an image was changed, has
    lost its manifest, says nothing of itself or cannot be read.
    """
    require_c2pa("verify")
    trust = None
    if config.trust is not None:
        file = Path(input_path("trust", config.trust)).expanduser()
        trust = read_certificates("trust", file)[0].decode(errors="replace")
    places = [Path(input_path("files", place)).expanduser() for place in config.files]
    files = {place: list(_images_below(place)) for place in places}
    for place, found in files.items():
        if not found:
            what = "holds no image" if place.is_dir() else "is not there"
            raise ConfigError(f"files: {place} {what}; name images, or folders of them")
    counts, faulty = Counter[str](), 0
    for place, found in files.items():
        for name, image in (one for file in found for one in _contents(file)):
            told = tell(image, trust)
            counts[f"{told.verdict}{told.signer and '; '}{told.signer}"] += 1
            faulty += not told.fine
            line = f"{_plain(name)}: {told.verdict}{f' ({told.reason})' if told.reason else ''}"
            if not place.is_dir():
                print("\n  ".join(filter(None, [line, told.signer, *told.details])))
            elif not told.fine:
                print(line)
    if any(place.is_dir() for place in places) or counts.total() > 1:
        total = f"{counts.total():,} image{'' if counts.total() == 1 else 's'}"
        print("\n  ".join([total, *(f"{n:,} {what}" for what, n in counts.most_common())]))
    if faulty:
        raise Incomplete(
            f"{faulty:,} of {counts.total():,} images: changed, unreadable, or without a word of their own"
        )


@dataclass(frozen=True)
class Told:
    """Of one image."""

    fine: bool
    verdict: str
    reason: str = ""
    signer: str = ""
    details: tuple[str, ...] = ()


def tell(image: bytes | None, trust: str | None = None) -> Told:
    """What an image file says of itself. None: it cannot be read. trust: as of read_manifest."""
    if image is None:
        return Told(False, "cannot be read")
    try:
        probe_image(image, max_pixels=DataConfig.max_pixels)
    except ImageRejected as error:
        return Told(False, "cannot be read", _plain(str(error)))
    text = _text(image)
    said = (f"PNG text: {_facts(text)}",) if text.get("Software") == "M2D" else ()
    try:
        manifest = read_manifest(image, trust)
    except Exception as error:  # whatever a file may hold
        return Told(False, "its C2PA manifest cannot be read", _plain(first_line(error)), "", said)
    if manifest is None:
        return _without_manifest(text, said)
    if said and manifest.facts and manifest.facts.items() <= text.items():
        said = ("PNG text: the same",)
    details = (f"manifest: {_claim(manifest)}", *said)
    if manifest.faults:
        changed = any(code.endswith("Hash.mismatch") for code in manifest.faults)
        verdict = "changed since it was signed" if changed else "its C2PA manifest does not hold"
        return Told(False, verdict, _plain(", ".join(manifest.faults)), _signer(manifest), details)
    return Told(True, "signed, and unchanged since", "", _signer(manifest), details)


def _without_manifest(text: dict[str, str], said: tuple[str, ...]) -> Told:
    if not said:
        return Told(False, "says nothing of itself", "no C2PA manifest, no PNG text of M2D")
    recipe = None
    with suppress(ValueError, RecursionError):
        recipe = json.loads(text.get("settings", ""))
    if isinstance(recipe, dict) and recipe.get("sign") is not None:
        reason = "its text says that it was signed, so another program has saved it"
        return Told(False, "its C2PA manifest is gone", reason, "", said)
    return Told(True, "not signed: PNG text alone, which anybody can write or change", "", "", said)


def _signer(manifest: Manifest) -> str:
    by = f"by {_plain(manifest.signer)} (serial {manifest.serial})"
    if manifest.state == "Trusted":
        return f"{by}, whom --trust vouches for"
    if manifest.signer == OF_NOBODY:
        return f"{by}: it shows whether an image was changed, not who made it"
    return f"{by}, for whom nobody vouches; name whom you trust by --trust FILE"


def _claim(manifest: Manifest) -> str:
    parts = [
        ", ".join(manifest.sources) or "of no stated source",
        f"made by {manifest.generator or 'no named program'}",
    ]
    return _plain("; ".join(parts)) + (f"; {_facts(manifest.facts)}" if manifest.facts else "")


def _facts(text: dict[str, str]) -> str:
    return ", ".join(f"{name} {_plain(text[name])}" for name in _TOLD if name in text)


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor, and not for pages."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[: _LONGEST + 1])
    return shown if len(text) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _text(image: bytes) -> dict[str, str]:
    """Text chunks of a PNG; of anything else nothing."""
    with suppress(Exception), Image.open(io.BytesIO(image), formats=["PNG"]) as opened:
        return {str(name): str(value) for name, value in opened.info.items() if isinstance(value, str)}
    return {}


def _images_below(place: Path) -> Iterator[Path]:
    """The files to look into: the place itself, or what a folder holds but pictures about a run or an evaluation."""
    if not place.is_dir():
        yield from [place] if place.exists() else []
        return
    for path in sorted(place.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
        is_shard = path.suffix in _SHARD_SUFFIXES and path.parent.name == SHARDS
        if hidden or not path.is_file() or not (is_shard or path.suffix.lower() in IMAGE_SUFFIXES):
            continue
        is_about = path.name == "contact_sheet.png" or path.match("strip_*.png")
        is_of_run = is_about and (path.parent / RECORD_NAME).exists()
        is_of_report = path.name in REPORT_FILES and (path.parent / REPORT).exists()
        if not (is_of_run or is_of_report):
            yield path


def _contents(file: Path) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of each image in a file; None where it cannot be read."""
    try:
        if file.suffix in _SHARD_SUFFIXES:
            yield from ((f"{file}: {image_id}", png) for image_id, png in read_pngs(file).items())
        else:
            yield str(file), file.read_bytes()
    except (OSError, ValueError):
        yield str(file), None
