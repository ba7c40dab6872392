"""Finding experiments under a root, whole and broken ones, and telling which one a name means."""

from collections.abc import Sequence
from pathlib import Path

from m2d.errors import ExperimentError
from m2d.experiment import Experiment, list_experiments
from m2d.experiments.record import DIRECTORY, Record, read_record
from m2d.files.paths import result_path
from m2d.files.storage import without_secrets

LATEST = "latest"
NAMED = 8  # so many experiments are named in one message


def find_records(root: str, name: str | None = None) -> list[Record]:
    """Experiments under a root, oldest first; those of one name only where it is given.

    In a folder of this machine also those whose record cannot be read. Raises ExperimentError for a root that is not
    there or cannot be read, ConfigError for one in a job's copy, which holds none.
    """
    root = result_path("experiments_dir", root)
    records = [read_record(found) for found in (_remote(root) if "://" in root else _local(root))]
    wanted = [record for record in records if name in (None, record.family)]
    return sorted(wanted, key=lambda record: (record.stamp, record.name))


def resolve(records: Sequence[Record], wanted: str, root: str) -> Record:
    """The experiment that `wanted` means: a whole name, the beginning of just one, a path ending so, or `latest`.

    records: oldest first. Raises ExperimentError, which names what it could be, where it is none or several.
    """
    where = without_secrets(result_path("experiments_dir", root))
    if not records:
        raise ExperimentError(f"no experiment in {where}; name another folder by --experiments_dir")
    if wanted == LATEST:
        return records[-1]
    word = wanted.rstrip("/").rpartition("/")[2]  # a shell completes names to paths
    whole = [record for record in records if record.name == word]
    found = whole or [record for record in records if word and record.name.startswith(word)]
    if not found:
        raise ExperimentError(f"experiment {wanted} is not in {where}; there: {_names(records)}, or say {LATEST}")
    if len(found) > 1:
        raise ExperimentError(f"experiment {wanted} may be {_names(found)}; give more of its name")
    return found[0]


def records_for(wanted: Sequence[str], root: str) -> tuple[list[Record], list[Record]]:
    """(the ones meant, all of the root). Raises as find_records and resolve do."""
    records = find_records(root)
    return [resolve(records, word, root) for word in wanted], records


def _local(root: str) -> list[Experiment]:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        found = "not a folder" if folder.exists() else "not there"
        raise ExperimentError(f"experiments_dir: {root} is {found}; name the folder that holds the experiments")
    try:
        paths = [path for path in folder.iterdir() if DIRECTORY.fullmatch(path.name) and path.is_dir()]
    except OSError as error:
        raise ExperimentError(f"experiments_dir: {root} cannot be read ({error.strerror}); name another") from None
    return [Experiment(path.absolute()) for path in paths if not path.name.startswith(".")]


def _remote(root: str) -> list[Experiment]:
    try:
        return list_experiments(root)
    except ValueError as error:  # of json
        raise ExperimentError(
            f"experiments_dir: a record in {without_secrets(root)} is not JSON ({error}); fix or remove it there"
        ) from None


def _names(records: Sequence[Record]) -> str:
    shown = [record.name for record in records[-NAMED:]]
    more = len(records) - len(shown)
    return ", ".join(shown[:-1]) + (" and " if shown[:-1] else "") + shown[-1] + (f" ({more} more)" if more else "")
