"""Where a checkpoint that a user names is: a folder, a name in weights/, or a repository of the Hugging Face hub.

Every command that takes a checkpoint asks here before anything opens it. Light: no torch, and the hub's client only
where it is named.
"""

import re
from pathlib import Path
from typing import TypeVar

from m2d.errors import CheckpointError, first_line
from m2d.files.paths import input_path

HUB = "hub:"  # before USER/NAME or USER/NAME@REVISION
WEIGHTS = Path(__file__).resolve().parents[2] / "weights"  # of the repository: a wheel has none

Location = TypeVar("Location", str, str | None)


def checkpoint_path(setting: str, location: Location) -> Location:
    """The folder that a user's checkpoint is: in the hub's cache, in weights/ by its name, else as input_path has it.

    setting: its name, for the message. Raises ConfigError as input_path does, CheckpointError where the hub does not
    give it, and for a mere name where there is no weights/.
    """
    if location is None:
        return location
    if location.startswith(HUB):
        return fetched(setting, location)
    place = Path(location)
    if len(place.parts) == 1 and not place.exists() and (WEIGHTS / place / "checkpoint.yaml").is_file():
        return str(WEIGHTS / place)
    found = input_path(setting, location)
    if len(place.parts) == 1 and not Path(found).exists() and not WEIGHTS.is_dir():
        raise CheckpointError(
            f"{setting}: there is no folder {location} here, and names of published weights are known in a clone of "
            "M2D's repository alone; name their folder, weights/NAME of a clone, or hub:USER/NAME"
        )
    return found


def own_name(folder: str) -> str:
    """What to call a checkpoint outside of experiments: its folder's name, in the hub's cache its repository's."""
    parts = Path(folder).parts
    cached = parts[-3].split("--") if len(parts) > 2 and parts[-2] == "snapshots" else []
    return cached[-1] if cached[:1] == ["models"] else parts[-1]


def repository(setting: str, location: str) -> tuple[str, str | None]:
    """(USER/NAME, revision or None) of hub:USER/NAME[@REVISION]. Raises CheckpointError for another form."""
    name, _, revision = location.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise CheckpointError(
            f"{setting}: {location} names no repository; write {HUB}USER/NAME or {HUB}USER/NAME@REVISION"
        )
    return name, revision or None


def fetched(setting: str, location: str) -> str:
    """The folder in the hub's cache with all files of a repository's revision; what is there already is not sent again.

    The user's token is the hub client's own (HF_TOKEN, or `hf auth login`). Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, revision = repository(setting, location)
    try:
        return snapshot_download(name, revision=revision)
    except GatedRepoError:
        reason, remedy = "its owners grant access", "ask for it on its page"
    except RepositoryNotFoundError:
        reason, remedy = "there is none of this name that you may see", "check the name, or log in by hf auth login"
    except LocalEntryNotFoundError:
        reason, remedy = "the hub cannot be reached and it is not in the cache", "check the network"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason, remedy = first_line(error), "run again to resume"
    raise CheckpointError(f"{setting}: {location} cannot be had ({reason}); {remedy}, or name a local folder")
