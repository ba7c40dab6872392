"""Reads what an offline wandb run wrote: a LevelDB log of protobuf records, as `wandb sync` reads it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, LAST = 1, 4


def history(path: Path) -> list[dict[str, Any]]:
    """Every logged row as name -> value; a picture or histogram is a mapping with its `_type`."""
    rows = []
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                names = list(item.nested_key) or [item.key]
                place = row
                for name in names[:-1]:
                    place = place.setdefault(name, {})
                place[names[-1]] = json.loads(item.value_json)
            rows.append(row)
    return rows


def run_ids(path: Path) -> set[str]:
    """Ids of the runs that the file speaks of."""
    return {record.run.run_id for record in _records(path) if record.WhichOneof("record_type") == "run"}


def config_of(path: Path) -> dict[str, Any]:
    """The configuration that the run was started with."""
    found: dict[str, Any] = {}
    for record in _records(path):
        if record.WhichOneof("record_type") == "run":
            for item in record.run.config.update:
                found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found


def artifacts(path: Path) -> dict[str, list[str]]:
    """Name of each artifact that was sent -> the files in it."""
    found = [record.artifact for record in _records(path) if record.WhichOneof("record_type") == "artifact"]
    return {artifact.name: [entry.path for entry in artifact.manifest.contents] for artifact in found}


def _records(path: Path) -> Iterator[Any]:
    """Source of the format: LevelDB's log_format.md, after seven bytes of wandb's own. A torn end is left out."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content.startswith(b":W&B"), f"{path} is no wandb file"
    place, whole = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part = content[place + 7 : place + 7 + length]
        if kind == 0 or len(part) < length:
            return
        whole += part
        place += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
