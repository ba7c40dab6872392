"""Folders in the machine's temporary directory that are this user's alone, under names that can be guessed."""

import errno
import os
import stat
import tempfile
from pathlib import Path


def private_folder(purpose: str) -> Path:
    """/tmp/m2d-PURPOSE-UID, made with mode 700 where it is not there yet.

    Who guesses the name may have been there first and read along: raises OSError for a link and for another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"m2d-{purpose}-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is a link or another user's", str(folder))
    folder.chmod(0o700)
    return folder
