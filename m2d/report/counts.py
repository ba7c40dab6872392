"""Images by class: of the dataset's splits, and before and after a run that filled up what a class lacks."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m2d.classes import CLASSES
from m2d.errors import ConfigError
from m2d.experiments.files import ExperimentFiles
from m2d.generation.balance import parse_target
from m2d.report.pictures import names_in, read_bytes

RUNS = "generated_images"
Counts = Mapping[str, int]


@dataclass(frozen=True)
class CountTable:
    """columns: name to images by class code, None where nobody knows. bars: the columns whose sum is drawn."""

    columns: dict[str, Counts | None]
    bars: tuple[str, ...]

    @property
    def rows(self) -> list[tuple[str, list[int | None], list[float]]]:
        """(class code, a number a column, the width of each bar in percent of the longest row)."""
        percent = 100 / (max(sum(self._bars(code)) for code in CLASSES) or 1)
        return [
            (code, [_of(counts, code) for counts in self.columns.values()], [percent * n for n in self._bars(code)])
            for code in CLASSES
        ]

    @property
    def sums(self) -> list[int | None]:
        """A number a column."""
        return [None if counts is None else sum(counts.values()) for counts in self.columns.values()]

    def _bars(self, code: str) -> list[int]:
        return [_of(self.columns[name], code) or 0 for name in self.bars]


@dataclass(frozen=True)
class Balance:
    """A generation run that filled up classes. before: real images by class, None where its dataset is another."""

    folder: str
    target: str
    split: str
    before: Counts | None
    made: Counts
    asked: Counts

    @property
    def table(self) -> CountTable:
        """Real images, synthetic ones, both; and what was asked for and is missing, where something is."""
        columns: dict[str, Counts | None] = {"real (before)": self.before, "synthetic": self.made}
        if self.missing:
            columns["missing"] = {code: self.asked.get(code, 0) - self.made.get(code, 0) for code in CLASSES}
        columns["together (after)"] = (
            None
            if self.before is None
            else {code: self.before.get(code, 0) + self.made.get(code, 0) for code in CLASSES}
        )
        return CountTable(columns, ("real (before)", "synthetic"))

    @property
    def missing(self) -> int:
        """Images that were asked for and are not there."""
        return sum(self.asked.values()) - sum(self.made.values())


def dataset_table(counts: Any) -> CountTable | None:
    """Of `dataset.counts` in an experiment's record: split to class code to images. None where it has none."""
    columns = {str(split): _counts(of_class) for split, of_class in counts.items()} if isinstance(counts, dict) else {}
    if not columns:
        return None
    everything = {code: sum(column.get(code, 0) for column in columns.values()) for code in CLASSES}
    return CountTable({**columns, "all": everything}, ("all",))


def balance_runs(files: ExperimentFiles, dataset: Mapping[str, Any]) -> list[Balance]:
    """The experiment's generation runs in mode balance, the latest first. dataset: of the experiment's record."""
    found = []
    for folder in names_in(files, RUNS):
        balance, made = recipe(files, f"{RUNS}/{folder}").get("balance"), _by_class(files, folder, "manifest.parquet")
        if not isinstance(balance, dict) or made is None:
            continue
        split = str(balance.get("split", "all"))
        run = Balance(
            folder=f"{RUNS}/{folder}",
            target=_target_text(str(balance.get("to", ""))),
            split=split,
            before=_before(dataset, str(balance.get("catalog")), split),
            made=made,
            asked=_by_class(files, folder, "plan.parquet") or made,
        )
        found.append((modified(files, f"{RUNS}/{folder}/manifest.parquet"), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)]


def recipe(files: ExperimentFiles, folder: str) -> dict[str, Any]:
    """generation.json of a generation run; {} where it cannot be read."""
    try:
        found = json.loads(files.text(f"{folder}/generation.json") or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def modified(files: ExperimentFiles, name: str) -> int:
    """When a file was written, ns; 0 where nobody knows."""
    return files.filesystem.get_file_info(f"{files.root}/{name}").mtime_ns or 0


def _before(dataset: Mapping[str, Any], catalog: str, split: str) -> dict[str, int] | None:
    """Real images of the splits that were counted, if the run counted the dataset that the experiment knows."""
    splits = dataset.get("counts")
    if not catalog or not str(dataset.get("sha256", "")).startswith(catalog) or not isinstance(splits, dict):
        return None
    counted: Sequence[Any] = list(splits.values()) if split == "all" else [splits.get(split)]
    counts = [_counts(of_class) for of_class in counted]
    return {code: sum(of_class.get(code, 0) for of_class in counts) for code in CLASSES}


def _by_class(files: ExperimentFiles, folder: str, name: str) -> dict[str, int] | None:
    content = read_bytes(files, f"{RUNS}/{folder}/{name}")
    if content is None:
        return None
    try:
        labels = pq.read_table(io.BytesIO(content), columns=["class"])["class"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return None
    counts = Counter(labels)
    return {code: counts[code] for code in CLASSES}


def _target_text(to: str) -> str:
    try:
        target = parse_target(to)
    except ConfigError:
        return to
    if target.images is not None:
        return f"{target.images:,} images of each class"
    return "as many as the largest class has" if target.share == 1 else f"{target.share:g} of the largest class"


def _counts(of_class: Any) -> dict[str, int]:
    known = of_class.items() if isinstance(of_class, dict) else ()
    return {str(code): number for code, number in known if isinstance(number, int)}


def _of(counts: Counts | None, code: str) -> int | None:
    return None if counts is None else counts.get(code, 0)
