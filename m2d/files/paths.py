"""Local paths: what a relative one means in a job of Ray, and the user's own temporary folders.

`ray job submit --working-dir` runs in a copy of the submitted directory that Ray deletes, so what is written there is
lost. Every command asks here before it opens a path that a user gave. Light: the standard library alone.
"""

import getpass
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple, TypeVar

from m2d.errors import ConfigError

STORAGE = "M2D_STORAGE"  # set on the nodes of a cluster: the directory that relative paths of a job begin in
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the variable's very name; Ray gives it to a job's own process alone
LONGEST_NAME = 255  # bytes of a file's name
_COPIES = "working_dir_files"  # Ray unpacks each submitted directory into a folder in one of this name

Location = TypeVar("Location", str, str | None)


def result_path(setting: str, location: Location) -> Location:
    """The place of results that a user gave, which must outlive the job.

    setting: its name, for the message. location: a path, a URI, or None; outside a job it comes back as it is. In a job
    a relative path begins in M2D_STORAGE where that is set. Raises ConfigError for a place in the job's copy, and for
    an empty one, which a script's unset variable leaves.
    """
    if location is not None and not location.strip():
        raise ConfigError(f"{setting} is empty; name a folder, or . for the one that you are in")
    job = _job_of(setting, location)
    if location is None or job is None:
        return location
    given = Path(location).expanduser()
    if job.storage is not None and not given.is_absolute():
        place = Path(os.path.normpath(job.storage / given))
        if not place.is_relative_to(job.storage):
            raise ConfigError(f"{setting}: {location} leaves {STORAGE} ({job.storage}); give an absolute path")
        return str(place)
    if job.copy is not None and (not given.is_absolute() or given.resolve().is_relative_to(job.copy)):
        raise ConfigError(
            f"{setting}: {location} would be in this job's copy of the submitted directory, which Ray deletes; give "
            f"an absolute path, or set {STORAGE} on the cluster's nodes to a directory that all of them see"
        )
    return location


def input_path(setting: str, location: Location, *, required: bool = True) -> Location:
    """The place of an input that a user gave: as it is, or in a job where it is found.

    A relative path is looked for in the job's working directory, then in M2D_STORAGE. One that is in neither comes back
    as it is, for the caller to refuse, or in a job's copy, if required, raises ConfigError that says why it is absent.
    """
    job = _job_of(setting, location)
    if location is None or job is None:
        return location
    given = Path(location).expanduser()
    if given.is_absolute():
        return location
    for folder in (Path.cwd(), job.storage):
        if folder is not None and (folder / given).exists():
            return os.path.normpath(folder / given)
    if job.copy is None or not required:
        return location
    elsewhere = "" if job.storage is None else f", nor in {STORAGE} ({job.storage})"
    raise ConfigError(
        f"{setting}: {location} is not there{elsewhere}: this job runs in a copy of the submitted directory, without "
        "what git ignores; give an absolute path"
    )


class _Job(NamedTuple):
    copy: Path | None  # the directory that Ray deletes; None where the job works in a lasting one
    storage: Path | None  # M2D_STORAGE


def _job_of(setting: str, location: str | None) -> _Job | None:
    """The job that this process runs for; None where none began it, and for a URI. Refuses credentials in it."""
    refuse_credentials(setting, location or "")
    _refuse_unusable(setting, location or "")
    config = os.environ.get(_JOB_CONFIG)
    if config is None or "://" in (location or ""):
        return None
    storage = os.environ.get(STORAGE) or None
    if storage is not None and not Path(storage).is_absolute():
        raise ConfigError(f"{STORAGE} is {storage}; it must be an absolute path that every node sees")
    submitted = (json.loads(config).get("runtime_env") or {}).get("working_dir")
    copy = copy_around(Path.cwd().resolve()) if submitted else None  # the command may have gone elsewhere
    return _Job(copy, None if storage is None else Path(os.path.normpath(storage)))


def _refuse_unusable(setting: str, location: str) -> None:
    """Raise ConfigError for what no file system takes, and for a home folder that is not there."""
    if location.startswith("~") and re.match(r"~|.*/m2d-home-\d+(/|$)", os.path.expanduser(location)):
        raise ConfigError(f"{setting}: {location} begins with a home folder that is not known here; give a whole path")
    if "\0" in location or max(map(len, os.fsencode(location).split(b"/"))) > LONGEST_NAME:
        shown = f"{location[:40]!r}..."
        raise ConfigError(f"{setting}: {shown} is no path: a name in it has over {LONGEST_NAME} bytes, or a NUL")


def refuse_credentials(setting: str, location: str) -> None:
    """Raise ConfigError for a URI with credentials in it, which records, logs and the list of processes would show.

    A container's or a user's mere name may be there, and options that say where and how a store is reached.
    """
    scheme, mark, rest = location.partition("://")
    server, _, query = rest.partition("?")
    user, at, _ = server.partition("/")[0].rpartition("@")
    is_name = user == "anonymous" or (scheme.lower() in ("abfs", "abfss", "hdfs", "viewfs") and ":" not in user)
    sound = (not at or is_name) and not _PASSWORD.match(server) and all(map(_OPTION.fullmatch, query.split("&")))
    if mark and re.fullmatch(r"[\w+.-]+", scheme) and not sound:
        raise ConfigError(
            f"{setting} is a URI with credentials, or an option that may be one; give them by the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or an instance role"
        )


_PASSWORD = re.compile(r"[^/@]*:(?!\d+(?:/|$))")  # a secret key may hold a slash that should have been quoted
_OPTION = re.compile(  # of pyarrow's URIs; anything else in a query may be a token or a signature
    r"|(?:allow_bucket_creation|allow_bucket_deletion|allow_delayed_open|anonymous|background_writes|(?:blob|dfs)_storage_"
    r"(?:authority|scheme)|enable_tls|endpoint_override|region|replication|retry_limit_seconds|scheme|"
    r"tls_verify_certificates)=[\w.:/%-]*"
)


def copy_around(path: Path) -> Path | None:
    """The copy of a submitted directory that contains an absolute path or is it, by where Ray puts them."""
    return next((folder for folder in (path, *path.parents) if folder.parent.name == _COPIES), None)


def absolute(location: Location) -> Location:
    """A path made absolute, `~` and links resolved; a URI or None as it is."""
    return location if location is None or "://" in location else str(Path(location).expanduser().resolve())


def best_name(checkpoints: Path) -> str | None:
    """Which of a run's checkpoints is the best, by best.json; None where that is not there or cannot be read."""
    try:
        return str(json.loads((checkpoints / "best.json").read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def checkpoint_folder(location: Location) -> Location:
    """The folder that a path to a checkpoint means now: `best` moves as a run goes on. Anything else as it is.

    best.json says which one `best` is; the link of that name is for people, and some file systems know no links.
    """
    place = Path(location or "").expanduser()
    name = best_name(place.parent) if place.name == "best" else None
    if name is not None and (place.parent / name).is_dir():
        return str(place.parent / name)
    return str(place.parent / os.readlink(place)) if place.is_symlink() else location


def require_outside(data_root: str | None, **places: str | None) -> None:
    """Raise ConfigError for a place of results in the folder of the images, as the defaults are for who works there."""
    for setting, place in places.items():
        if data_root and place and Path(absolute(place)).is_relative_to(absolute(data_root)):
            raise ConfigError(
                f"{setting}: {absolute(place)} is in data_root, among the images; name another place by --{setting}"
            )


def private_folder(purpose: str, longest: int = 4096) -> Path:
    """$TMPDIR/m2d-PURPOSE-UID, made with mode 700 where it is not there yet.

    longest: bytes of its path, for one that holds sockets; with a longer TMPDIR it is in /tmp.
    Who guesses the name may have been there first and read along: raises ConfigError for a link, for another user's,
    and where the folder cannot be made.
    """
    places = (Path(place) / f"m2d-{purpose}-{os.getuid()}" for place in (tempfile.gettempdir(), "/tmp"))
    folder = next(place for place in places if len(os.fsencode(place)) <= longest)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            folder.chmod(0o700)
            return folder
        reason = "it is a link or another user's; remove it"
    except OSError as error:
        reason = str(error.strerror)
    raise ConfigError(f"TMPDIR: {folder} cannot be used ({reason}); set TMPDIR to a short path that is yours")


def ensure_home() -> None:
    """HOME and USER for a process that has neither, nor an entry in the system's list of users: `docker run --user`.

    Libraries keep caches there and name files by the user; they would raise, or make a folder called `~`.
    """
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = str(private_folder("home"))
    try:
        getpass.getuser()
    except (KeyError, OSError):  # as Python 3.11 and 3.13 say it
        os.environ["USER"] = f"uid{os.getuid()}"
