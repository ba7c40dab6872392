"""Files that appear whole or not at all, and what a user is told where a disk refuses."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from m2d.errors import ConfigError

LEFTOVER = ".tmp"


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """A binary stream whose content becomes `path` in one step at the end, or is thrown away on an error.

    durable: on the disk before it replaces anything, so that a power cut cannot leave the name without the content.
    """
    # Two nodes, or two threads, may write one file at the same time: each its own, and the last one counts.
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}{LEFTOVER}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> ConfigError:
    """What to raise for an OSError: a full disk, a folder without permission, a file where a folder should be."""
    return ConfigError(
        f"output: {path} cannot be written ({error.strerror or error}); make room or name another --output, "
        "then run the same command again"
    )


def require_damage(path: Path, error: Exception) -> None:
    """Return where the error says that the file is gone or its content damaged, so that it may be made again.

    Raises ConfigError where the system refused to read it: it may be whole, and is not to be removed.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        raise ConfigError(
            f"output: {path} cannot be read ({error.strerror}), so nothing was removed; see to its disk and rights, "
            "then run the same command again"
        ) from error
