"""Experiments' folders as training leaves them, part by part, and a report read as a browser would."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from m2d.classes import ISIC7
from m2d.experiment import Experiment
from m2d.experiments.page import write_report
from m2d.training.settings import TrainConfig, as_dict

VOID = {"meta", "link", "img", "source", "br"}
TRAIN = dict(zip(ISIC7.codes, (18, 30, 57, 5, 64, 378, 8), strict=True))  # 560
VAL = dict(zip(ISIC7.codes, (2, 3, 10, 2, 6, 44, 1), strict=True))  # 68
BALANCE = {"to": "40", "split": "all", "catalog": "abcdef012345"}  # of the dataset whose sha256 begins so


class Page(HTMLParser):
    """What a browser would take from a page: elements with their attributes, tables as cells, text by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._section: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["aria-labelledby"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "section":
            self._section = None

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._section is not None:
            self.sections[self._section] = self.sections.get(self._section, "") + data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data

    def row(self, table: str, first: str) -> list[str]:
        """Cells of the row that begins so, in the table that has a column of that heading."""
        found = next(rows for rows in self.tables if table in rows[0])
        return next([cell.strip() for cell in row] for row in found if row[0].strip().startswith(first))


@dataclass
class Run:
    """An experiment's folder, filled by a test."""

    path: Path

    @property
    def experiment(self) -> Experiment:
        return Experiment(self.path)

    def checkpoint(self, step: int) -> None:
        folder = self.path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(bytes(1000))
        (folder / "complete.json").write_text("{}")

    def records(self, log: str, *records: dict[str, float]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.path / "metrics" / f"{log}.jsonl").write_text(lines)

    def picture(self, kind: str, step: int, colour: int = 100) -> bytes:
        path = self.path / "visualizations" / kind / f"step_{step:08d}.png"
        return write_png(path, np.full((40, 700, 3), colour, dtype=np.uint8))

    def generation(self, name: str, made: dict[str, int], asked: dict[str, int] | None = None, **recipe: Any) -> Path:
        folder = self.path / "generated_images" / name
        folder.mkdir(parents=True)
        record = {"solver": "unipc", "steps": 25, "guidance_scale": 1.5, "seed": 0, "mode": "standard", **recipe}
        (folder / "generation.json").write_text(json.dumps(record))
        for file, counts in (("manifest", made), ("plan", asked or made)):
            classes = [code for code, count in counts.items() for _ in range(count)]
            pq.write_table(pa.table({"class": pa.array(classes, pa.string())}), folder / f"{file}.parquet")
        write_png(folder / "contact_sheet.png", np.full((8, 8, 3), 200, dtype=np.uint8))
        return folder

    def page(self, samples: Path | None = None) -> Page:
        return Page(write_report(self.experiment, samples).read_text(encoding="utf-8"))


def write_png(path: Path, pixels: np.ndarray) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def write_experiment(
    root: Path,
    name: str,
    state: str = "done",
    *,
    steps: tuple[int, ...] = (),
    train: Sequence[dict[str, Any]] = (),
    validation: Sequence[dict[str, Any]] = (),
    config: dict[str, Any] | None = None,
    best: tuple[int, float] | None = None,
    **info: Any,
) -> Path:
    """An experiment's directory as a run leaves it. steps: of its checkpoints; best: (step, score)."""
    run = Run(root / name)
    for folder in ("configs", "metrics", "checkpoints", "cache", "generated_images"):
        (run.path / folder).mkdir(parents=True)
    settings = as_dict(TrainConfig(name=name[:-16].lstrip("."))) | (config or {})
    text = yaml.dump(settings, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    (run.path / "configs" / "config.yaml").write_text(text)
    record = {"name": name, "state": state, "command": "jobs/train.py --name tiny", **info}
    (run.path / "experiment_info.json").write_text(json.dumps(record))
    for step in steps:
        run.checkpoint(step)
    if best is not None:
        kept = f"step_{best[0]:08d}"
        (run.path / "checkpoints" / "best.json").write_text(json.dumps({"checkpoint": kept, "score": best[1]}))
        (run.path / "checkpoints" / "best").symlink_to(kept)
    run.records("train", *train)
    run.records("validation", *validation)
    return run.path


def write_run(root: Path, state: str = "done", **more: Any) -> Run:
    """A finished run's record and settings, nothing else; `more` takes the place of what the record says."""
    dataset = {"root": "/data/skin", "images": 629, "rejected": 3, "duplicates": 1, "sha256": "abcdef0123456789"}
    known = {
        "created": "2026-11-22T12:00:00+00:00", "finished": "2026-11-22T13:30:00+00:00", "total_steps": 20,
        "device": "1 H100", "precision": "bfloat16", "dataset": dataset | {"counts": {"train": TRAIN, "val": VAL}},
        "versions": {"torch": "2.15.0", "wandb": None}, "git": {"commit": "524b87c390", "uncommitted_changes": False},
    }  # fmt: skip
    return Run(write_experiment(root, "tiny_20261122_120000", state, **(known | more)))


def write_full_run(root: Path) -> Run:
    """A finished run with one of everything."""
    run = write_run(root)
    run.checkpoint(20)
    run.records("train", *({"step": step, "loss/diffusion": 2.0 / step} for step in (10, 20)))
    run.records("validation", {"step": 10, "val/psnr_db": 31.25}, {"step": 20, "val/psnr_db": 30.5})
    for kind in (
        "samples", "reconstructions", "patch_features", "alignment", "feature_projection", "class_similarity"
    ):  # fmt: skip
        run.picture(kind, 20)
    run.generation("fill", {"DF": 33, "VASC": 31}, mode="balance", balance=BALANCE)
    return run
