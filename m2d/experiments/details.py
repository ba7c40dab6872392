"""All that `experiments show` tells of one experiment, as plain values: for --json, and for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from m2d.experiments.advice import next_step
from m2d.experiments.curves import Curve, curves
from m2d.experiments.listing import summary
from m2d.experiments.measures import best_value, last_value, measure_names, training_seconds, wall_seconds
from m2d.experiments.record import TRAIN, VALIDATION, Record, step_of
from m2d.experiments.wording import one_line

CURVE_POINTS = 200  # of a curve in --json; metrics/train.jsonl holds them all
DRAWN = ("loss/", "learning_rate/")


def details(record: Record, all_records: Sequence[Record]) -> dict[str, Any]:
    """What is known, by topic. all_records: of the same root, oldest first. Times in seconds, sizes in bytes."""
    info = record.info
    train, validation = record.files.records(TRAIN), record.files.records(VALIDATION)
    what, command = next_step(record, all_records)
    failed = record.state != "running" and info.get("state") == "failed" and info.get("error")
    return {
        **summary(record),
        "next": what,
        "command": command,
        "error": one_line(str(failed)) if failed else None,
        "dataset": info.get("dataset"),
        "stage": record.config.get("stage"),
        "device": info.get("device"),
        "workers": info.get("world_size"),
        "precision": info.get("precision"),
        "degraded": info.get("degraded") or [],
        "versions": info.get("versions") or {},
        "git": info.get("git"),
        "finished": info.get("finished"),
        "wall_seconds": wall_seconds(record, train[-1] if train else None),
        "training_seconds": training_seconds(record, train),
        "checkpoints": _checkpoints(record, validation),
        "validation": validation,
        "best_measures": _best_measures(validation),
        "last_scalars": {name: last_value(train, name) for name in sorted(measure_names(train))},
        "curves": {curve.name: _points(curve) for curve in drawn_curves(train, validation)},
        "config": record.config,
    }


def drawn_curves(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Losses and learning rates, then the validation measures."""
    return [*curves(train, *DRAWN), *curves(validation, "val/")]


def _checkpoints(record: Record, validation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    measures = {entry["step"]: entry for entry in validation}
    best = None if record.best is None else record.best[0]
    rows = []
    for name in record.checkpoints:
        entry = measures.get(step_of(name), {})
        row = {
            "name": name,
            "step": step_of(name),
            "best": name == best,
            "bytes": record.files.size(f"checkpoints/{name}"),
        }
        rows.append(row | {"measures": {key: entry[key] for key in measure_names([entry])}})
    return rows


def _best_measures(validation: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found = {name: best_value(validation, name) for name in measure_names(validation)}
    return {name: {"step": best[0], "value": best[1]} for name, best in found.items() if best is not None}


def _points(curve: Curve) -> dict[str, Any]:
    thin = curve.thinned(CURVE_POINTS)
    return {"steps": thin.steps, "values": thin.values}
