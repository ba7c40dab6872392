"""New folders that are whole or absent, as exports are written. Light: no torch."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2d.errors import ConfigError
from m2d.files.atomic import COMPLETE, PARTIAL, to_disk

CARD = "README.md"


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
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
