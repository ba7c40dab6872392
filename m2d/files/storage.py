"""One way to reach files: a local path or a URI becomes a pyarrow filesystem and a path in it."""

import os
import posixpath
import re
from collections.abc import Callable

import pyarrow as pa
from pyarrow import fs

from m2d.errors import DataError
from m2d.files.atomic import COMPLETE
from m2d.files.paths import refuse_credentials

Storage = tuple[fs.FileSystem, str]  # what holds a location, and the location's path in it
_URI = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def open_storage(location: str) -> Storage:
    """The filesystem that holds `location`, and the path of `location` in it, without a trailing slash.

    location: a local path (made absolute, `~` expanded) or a URI (file://, s3://, gs://, abfs://, hdfs://).
    Nothing has to exist there yet. Raises DataError for a location that pyarrow cannot reach,
    ConfigError for a URI with credentials.
    """
    if not location:
        raise DataError("storage: the location is empty; give a local path or a URI such as s3://bucket/folder")
    if not _URI.match(location):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    refuse_credentials("storage", location)
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (pa.ArrowException, ValueError, TypeError, OSError, ImportError) as error:
        raise DataError(
            f"storage: {location} cannot be reached ({one_line(error)}); "
            "give a local path or a URI of file://, s3://, gs://, abfs:// or hdfs://"
        ) from error
    return filesystem, path


def read_file(storage: Storage, path: str) -> bytes | str:
    """The bytes of the file at `path` below the storage's own, or in one line why there are none."""
    filesystem, root = storage
    try:
        with filesystem.open_input_file(posixpath.join(root, path)) as file:
            return bytes(file.read())
    except FileNotFoundError:
        return "is not there"
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read ({one_line(error)})"


def inside(location: str, name: str) -> str:
    """The location of `name` in the folder at `location`; a URI's ?options stay at its end."""
    folder, mark, options = location.partition("?") if _URI.match(location) else (location, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def copy_changed(source: str, target: str, wanted: Callable[[str], bool]) -> None:
    """Copy what is new or changed in a file or folder to another place.

    source, target: locations (see open_storage). wanted: whether to copy the file of this path relative to `source`.
    Files under 1 MiB are always copied; larger ones where they are missing or of another size there. A file called
    complete.json comes last: it says that the files beside it are complete. Raises OSError.
    """
    filesystem, root = open_storage(source)
    target_filesystem, target_root = open_storage(target)
    if filesystem.get_file_info(root).type == fs.FileType.File:
        _copy_file(filesystem, root, target_filesystem, target_root)
        return
    there = {info.path[len(target_root) + 1 :]: info.size for info in files_below(target_filesystem, target_root)}
    found = {info.path[len(root) + 1 :]: info.size for info in files_below(filesystem, root)}
    for name in sorted(found, key=lambda name: (name.endswith(COMPLETE), name)):
        if wanted(name) and (found[name] < 2**20 or there.get(name) != found[name]):
            _copy_file(filesystem, f"{root}/{name}", target_filesystem, f"{target_root}/{name}")


def files_below(filesystem: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """All files in a folder and its folders; none where it is not there."""
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    return [info for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File]


def _copy_file(source: fs.FileSystem, path: str, target: fs.FileSystem, target_path: str) -> None:
    target.create_dir(target_path.rpartition("/")[0], recursive=True)
    fs.copy_files(path, target_path, source_filesystem=source, destination_filesystem=target)


def one_line(error: Exception, longest: int = 200) -> str:
    """An error's text as a part of a message: in one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
