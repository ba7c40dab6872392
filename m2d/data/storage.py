"""One way to reach files: a local path or a URI becomes a pyarrow filesystem and a path in it."""

import os
import re

import pyarrow as pa
from pyarrow import fs

from m2d.errors import DataError

_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def open_storage(location: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that holds `location`, and the path of `location` in it, without a trailing slash.

    location: a local path (made absolute, `~` expanded) or a URI (file://, s3://, gs://, abfs://, hdfs://).
    Nothing has to exist there yet. Raises DataError for a location that pyarrow cannot reach.
    """
    if not location:
        raise DataError("storage: the location is empty; give a local path or a URI such as s3://bucket/folder")
    if not _URI.match(location):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (pa.ArrowException, ValueError, TypeError, OSError, ImportError) as error:
        detail = without_secrets(" ".join(str(error).split()))
        raise DataError(
            f"storage: {without_secrets(location)} cannot be reached ({detail}); "
            "give a local path or a URI of file://, s3://, gs://, abfs:// or hdfs://"
        ) from error
    return filesystem, path


def without_secrets(text: str) -> str:
    """The text with the user part (access keys) and the query of each URI in it blanked, fit for a message or a log."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", re.sub(r"(://[^\s?]*)\?\S+", r"\1?***", text))
