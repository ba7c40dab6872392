"""What is done: one small Parquet file for each finished group of images, written after the images themselves.

    <output>/parts/<name>.parquet      a row for each image tried, kept or rejected, with everything known of it
    <output>/journal.parquet           the parts of runs that have ended, in one
A row in here is the only thing that counts as done, so a killed run loses the groups in the making and repeats nothing.
A part's name comes from its rows: whoever makes a group again replaces its part. Called by actors and driver alike.
"""

import errno
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from m2d.errors import ConfigError
from m2d.files.atomic import whole_file
from m2d.generation.plan import PLAN_SCHEMA, PlanRow

PARTS, JOURNAL_NAME = "parts", "journal.parquet"
VERDICT_FIELDS = [
    ("reason", pa.string()),  # the gate that found fault with the image; null: none did
    ("nearest_id", pa.string()),  # the training image nearest to it, or that it copies
    ("nearest_distance", pa.float64()),  # to that one, in the extractor's feature space
    ("class_distance", pa.float64()),  # mean, to the class's nearest training images
    ("pixel_distance", pa.float64()),  # to the training image nearest by thumbnails
    ("saturated_share", pa.float64()),  # of the pixels
    ("contrast", pa.float64()),
]
JOURNAL_SCHEMA = pa.schema(
    [
        *PLAN_SCHEMA,
        ("accepted", pa.bool_()),
        ("gates", pa.string()),  # on, recorded (looked at and kept anyway), or off
        *VERDICT_FIELDS,
        ("path", pa.string()),  # of the file that holds the image, relative to the output; null where rejected
        ("sha256", pa.string()),  # of the PNG
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("feature_weak", pa.bool_()),  # the prior knows few images of the class
        ("precision", pa.string()),
        ("checkpoint", pa.string()),  # sha256
        ("created", pa.timestamp("ms", tz="UTC")),  # Parquet has no coarser one
    ]
)
_READ_THREADS = 8


def group_name(rows: Iterable[PlanRow]) -> str:
    """The name of the part, and of the shard, of these rows."""
    lines = "\n".join(f"{row.id}/{row.attempt}" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def write_part(root: Path, name: str, rows: pa.Table) -> None:
    """From now on these rows, JOURNAL_SCHEMA, are done. Raises ConfigError where the part cannot be written."""
    write_rows(root / PARTS / f"{name}.parquet", rows)


def write_rows(path: Path, rows: pa.Table) -> None:
    """A part of the journal, whole or not at all. Raises ConfigError where it cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path, durable=path.name == JOURNAL_NAME) as partial:  # its parts are removed afterwards
            pq.write_table(rows, partial)
    except OSError as error:
        raise cannot_write(path, error) from None


def read_parts(root: Path) -> tuple[dict[Path, pa.Table], list[Path]]:
    """The rows of each part, and the parts that are damaged (after a power cut, say): theirs count as not done.

    Raises ConfigError for a part of another version of M2D, or that the disk does not give, which is no reason to throw
    its images away.
    """

    def read(path: Path) -> pa.Table | None:
        try:
            with path.open("rb") as stream:
                table = pq.read_table(stream)
        except (pa.ArrowException, OSError) as error:
            require_damage(path, error)
            return None
        if not table.schema.equals(JOURNAL_SCHEMA):
            raise ConfigError(
                f"output: {path} was written by another version of M2D; name another --output, or use that version"
            )
        return table

    paths = [*root.glob(JOURNAL_NAME), *sorted((root / PARTS).glob("*.parquet"))]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        found = dict(zip(paths, pool.map(read, paths), strict=True))
    return (
        {path: table for path, table in found.items() if table is not None},
        [path for path, table in found.items() if table is None],
    )


def gather_parts(root: Path) -> pa.Table:
    """Put all parts into journal.parquet and return its rows; the folder then holds class folders alone.

    A part goes once the journal has its rows, so that nothing is lost in between; rows that stand twice count once.
    Raises ConfigError where the journal cannot be written.
    """
    parts, _ = read_parts(root)
    rows = joined(parts.values())
    loose = [path for path in parts if path != root / JOURNAL_NAME]
    if loose:
        write_rows(root / JOURNAL_NAME, rows)
    for path in loose:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or one came in from a writer that ended late
        (root / PARTS).rmdir()
    return rows


def joined(parts: Iterable[pa.Table]) -> pa.Table:
    """The journal: every kept image once, and every rejected attempt once, whoever wrote it how often."""
    rows = pa.concat_tables([JOURNAL_SCHEMA.empty_table(), *parts])
    keys = np.array(
        [
            image_id if accepted else f"{image_id}/{attempt}"
            for image_id, attempt, accepted in zip(*(rows[name].to_pylist() for name in ("id", "attempt", "accepted")))
        ],
        dtype=object,
    )
    first = np.unique(keys.astype(str), return_index=True)[1]
    return rows if len(first) == len(rows) else rows.take(pa.array(np.sort(first)))


def attempts_left(plan: pa.Table, journal: pa.Table, max_attempts: int) -> list[pa.Table]:
    """The plan's rows that are not done, by round: entry k holds those with k rejected attempts, in the plan's order.

    Rows with max_attempts rejected ones stand in no entry.
    """
    accepted = journal.filter(journal["accepted"])["id"]
    open_rows = plan.filter(pc.invert(pc.is_in(plan["id"], accepted.combine_chunks())))
    tried = rejected_attempts(journal)
    counts = pa.array([tried.get(image_id, 0) for image_id in open_rows["id"].to_pylist()], pa.int64())
    return [open_rows.filter(pc.equal(counts, attempts)) for attempts in range(max_attempts)]


def rejected_attempts(journal: pa.Table) -> dict[str, int]:
    """Id -> how many of its attempts were rejected, each counted once."""
    rejected = journal.filter(pc.invert(journal["accepted"])).select(["id", "attempt"])
    if not len(rejected):
        return {}
    counted = rejected.group_by("id").aggregate([("attempt", "count_distinct")])
    return dict(zip(counted["id"].to_pylist(), counted["attempt_count_distinct"].to_pylist(), strict=True))


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
