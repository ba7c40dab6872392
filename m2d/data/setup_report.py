"""What setup_data says of its stages: a table for people, lines of JSON beside it for machines."""

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageReport:
    """What stands in the cache after a stage, and how much of it this run made."""

    name: str
    found: int  # images, or views of images, that were there before
    made: int
    failed: int
    files: int  # found and made
    bytes: int  # of those files
    seconds: float | None = None  # None: a part of a stage, whose time stands with the whole


def say(line: str) -> None:
    """One fact, one line; seen at once where the output is a file."""
    print(line, flush=True)


def print_table(reports: Iterable[StageReport]) -> None:
    """One line a stage."""
    say(f"{'':16} {'found':>9} {'made now':>9} {'left out':>9} {'files':>6} {'size':>10} {'seconds':>8}")
    for report in reports:
        seconds = "" if report.seconds is None else f"{report.seconds:.1f}"
        say(
            f"{report.name:16} {report.found:9,} {report.made:9,} {report.failed:9,} {report.files:6,} "
            f"{size_text(report.bytes):>10} {seconds:>8}"
        )


def write_record(path: Path, reports: Iterable[StageReport]) -> None:
    """Append one JSON line a stage, behind those of earlier runs."""
    with path.open("a", encoding="utf-8") as record:
        for report in reports:
            record.write(json.dumps({"time": round(time.time(), 3), **dataclasses.asdict(report)}) + "\n")


def size_text(count: int) -> str:
    """Bytes in the unit that people use: 1.48 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
