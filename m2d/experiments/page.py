"""report.html of an experiment, one page that holds everything it shows: facts and pictures, laid out by a template.

It reads an experiment's files alone, so that a run of any machine has one, also long afterwards.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from m2d import __version__
from m2d.classes import ISIC7, ClassSet
from m2d.errors import ConfigError, ExperimentError
from m2d.experiment import Experiment
from m2d.experiments.details import (
    details,
    duration_text,
    generate_command,
    measure_names,
    number_text,
    plain,
    report_command,
    resume_command,
)
from m2d.experiments.record import ExperimentFiles, Record, find_records, flat, read_record, resolve
from m2d.experiments.settings import ReportConfig
from m2d.files.atomic import write_whole
from m2d.generation.settings import parse_target
from m2d.training.settings import TrainConfig, as_dict

REPORT = "report.html"
PICTURES = ("reconstructions", "patch_features", "alignment", "feature_projection", "class_similarity")
UNCOUNTED = frozenset({"name", "fresh", "verbose"})  # settings that say nothing of the result
PAGE_BYTES = 3_000_000  # of all pictures of a page; as base64 they take a third more, 4 MB
RUNS, SHEET = "generated_images", "contact_sheet.png"
_STEP = re.compile(r"step_(\d{8,})\.png")
# (widest, lossy quality) of what is tried where a page would be too heavy, the gentlest first; None: every pixel kept.
_LIGHTER: tuple[tuple[int | None, int | None], ...] = ((None, None), (1600, 92), (1000, 85), (700, 75))

Counts = Counter[str]  # class code to images


@dataclass(frozen=True)
class Picture:
    """An encoded image. width, height: pixels; step: of training, where it shows one; caption: of samples."""

    data: bytes
    width: int
    height: int
    format: str = "png"
    step: int | None = None
    caption: str = ""

    @property
    def uri(self) -> str:
        """A data URI, which needs no other file and no network."""
        return f"data:image/{self.format};base64,{base64.b64encode(self.data).decode()}"


def report_experiment(config: ReportConfig) -> None:
    """Write an experiment's page again and say where it is."""
    found = resolve(find_records(config.experiments_dir), config.experiment, config.experiments_dir)
    print(f"report: {write_report(found.experiment)}")


def write_report(experiment: Experiment, samples: Path | None = None) -> Path:
    """Write report.html into the experiment, and the curves as PNG into its visualizations/; returns the page.

    samples: a generation run whose contact sheet the page shows; None: the newest samples there are. Whatever a run has
    not left is left out, or said to be missing. Raises ExperimentError where the page cannot be written, DataError for
    a remote one that cannot be reached.
    """
    record = read_record(experiment)
    curves = _curves(record)
    written = {f"visualizations/{name}.png": curves[name].data for name in curves if not name.endswith("_narrow")}
    written[REPORT] = _page(record, find_samples(record.files, samples), curves).encode()
    path = experiment.path / REPORT
    try:
        for name, content in written.items():
            (experiment.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(experiment.path / name, content)
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror or error}); make room, then: {report_command(record)}"
        ) from error
    for name in written:
        experiment.publish(name)
    return path


def _page(record: Record, samples: Picture | None, curves: Mapping[str, Picture]) -> str:
    siblings = [record]
    if record.state in ("resumable", "failed"):  # which run of the name its command continues matters to these alone
        siblings = find_records(record.location.rpartition("/")[0], record.family)
    known = details(record, siblings)
    dataset = known["dataset"] or {}
    counts = {split: Counter(of_class) for split, of_class in (dataset.get("counts") or {}).items()}
    classes = ClassSet.from_dict(dataset["classes"]) if dataset.get("classes") else ISIC7
    pictures: dict[str, Picture | None] = {kind: newest_picture(record.files, kind) for kind in PICTURES}
    pictures |= {"samples": samples, **curves}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2d.experiments", "."),
        undefined=jinja2.ChainableUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number_text, "duration": duration_text}
    return environment.get_template("report.html.jinja").render(
        known=known,
        pictures=fitted({kind: picture for kind, picture in pictures.items() if picture is not None}),
        samples=samples,
        generate_command=generate_command(record),
        measured_names=measure_names(known["validation"], "val/"),
        diagnoses={diagnosis.code: diagnosis for diagnosis in classes.diagnoses},
        counts={**counts, "all": sum(counts.values(), Counter())} if counts else None,
        balances=_balance_runs(record.files, dataset.get("sha256"), counts),
        settings=_other_settings(record.config),
        command=resume_command(record),
        report_command=report_command(record),
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by M2D {__version__}",
    )


def _curves(record: Record) -> dict[str, Picture]:
    """training_curves and validation_curves, and each as ..._narrow for a phone; none of what was not recorded."""
    from m2d.plots.curves import training_curves, validation_curves  # heavy: matplotlib

    found: dict[str, Picture] = {}
    for records, draw in ((record.train, training_curves), (record.validation, validation_curves)):
        for suffix, columns in (("", 3), ("_narrow", 1)) if records else ():
            if picture := png_picture(draw(records, columns=columns)):
                found[f"{draw.__name__}{suffix}"] = picture
    return found


def _other_settings(config: dict[str, Any]) -> list[tuple[str, str, str]] | None:
    """(dotted name, value, default) of every setting that is not the default; None where none can be read."""
    defaults = flat(as_dict(TrainConfig()))

    def text(value: Any) -> str:
        shown = plain(value)
        return shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)

    rows = [
        (name, text(value), text(defaults[name]) if name in defaults else "not known")
        for name, value in flat(config).items()
        if name not in UNCOUNTED and (name not in defaults or value != defaults[name])
    ]
    return rows if config else None


def _balance_runs(files: ExperimentFiles, sha256: str | None, counts: Mapping[str, Counts]) -> list[dict[str, Any]]:
    """The experiment's generation runs that filled up classes, the latest first.

    sha256, counts: of the dataset that the experiment knows; a run that counted another one has no `before`.
    """
    found = []
    for name in files.names(RUNS):
        folder = f"{RUNS}/{name}"
        balance = files.mapping(f"{folder}/generation.json")[0].get("balance")
        made = _by_class(files.content(f"{folder}/manifest.parquet"))
        if not balance or made is None:
            continue
        lacking = (_by_class(files.content(f"{folder}/plan.parquet")) or made) - made
        split, before = balance.get("split", "all"), None
        if balance.get("catalog") and (sha256 or "").startswith(balance["catalog"]):
            wanted = counts.values() if split == "all" else [counts.get(split, Counter())]
            before = sum(wanted, Counter())
        kind = "flipped" if balance.get("from") == "flips" else "synthetic"
        columns: dict[str, Counts | None] = {"real (before)": before, kind: made}
        columns |= {"missing": lacking} if lacking else {}
        columns["together (after)"] = None if before is None else before + made
        run = {
            "folder": folder,
            "kind": kind,
            "target": _target_text(str(balance.get("to", ""))),
            "split": split,
            "columns": columns,
            "missing": lacking.total(),
        }
        found.append((files.modified(f"{folder}/manifest.parquet"), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _by_class(content: bytes | None) -> Counts | None:
    """Images by class of a manifest or a plan; None where it cannot be read."""
    try:
        return Counter(pq.read_table(io.BytesIO(content or b""), columns=["class"])["class"].to_pylist())
    except (OSError, KeyError, pa.ArrowException):
        return None


def _target_text(to: str) -> str:
    try:
        target = parse_target(to)
    except ConfigError:
        return to
    if isinstance(target, int):
        return f"{target:,} images of each class"
    return "as many as the largest class has" if target == 1 else f"{target:g} of the largest class"


def find_samples(files: ExperimentFiles, given: Path | None) -> Picture | None:
    """A grid of generated images with its caption.

    given: the folder of a generation run. Otherwise the latest picture of training, or a contact sheet.
    """
    if given is not None:
        outside = ExperimentFiles(fs.LocalFileSystem(), str(given.absolute().parent))
        if (found := _contact_sheet(outside, given.absolute().name)) is not None:
            return found
    picture = newest_picture(files, "samples")
    if picture is not None:
        text = f"Drawn by the averaged U-Net after {picture.step:,} steps, from the same seeds each time."
        return replace(picture, caption=text)
    # A run that asked for every class shows more than one that filled up some.
    folders = [f"{RUNS}/{name}" for name in files.names(RUNS)]
    whole = {folder: files.mapping(f"{folder}/generation.json")[0].get("mode") == "standard" for folder in folders}
    folders.sort(key=lambda folder: (whole[folder], files.modified(f"{folder}/{SHEET}"), folder), reverse=True)
    sheets = (_contact_sheet(files, folder) for folder in folders)
    return next((sheet for sheet in sheets if sheet is not None), None)


def _contact_sheet(files: ExperimentFiles, folder: str) -> Picture | None:
    picture = png_picture(files.content(f"{folder}/{SHEET}"))
    if picture is None:
        return None
    known = files.mapping(f"{folder}/generation.json")[0]
    forms = {"solver": "{}", "steps": "{:,} steps", "guidance_scale": "guidance {:.4g}", "seed": "seed {}"}
    parts = [form.format(known[key]) for key, form in forms.items() if known.get(key) is not None]
    return replace(picture, caption=f"Contact sheet of {folder}{': ' if parts else ''}{', '.join(parts)}.")


def newest_picture(files: ExperimentFiles, kind: str) -> Picture | None:
    """The picture of the latest step in visualizations/KIND; one that cannot be read gives way to the one before."""
    folder = f"visualizations/{kind}"
    steps = [int(matched[1]) for matched in map(_STEP.fullmatch, files.names(folder)) if matched]
    for step in sorted(steps, reverse=True):
        picture = png_picture(files.content(f"{folder}/step_{step:08d}.png"))
        if picture is not None:
            return replace(picture, step=step)
    return None


def png_picture(data: bytes | None) -> Picture | None:
    """The PNG, looked at before it goes onto a page: None where it is none, or is cut."""
    try:
        with Image.open(io.BytesIO(data or b""), formats=["PNG"]) as image:
            image.load()
            return Picture(data or b"", image.width, image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def fitted(pictures: Mapping[str, Picture], most: int = PAGE_BYTES) -> dict[str, Picture]:
    """The pictures in at most about `most` bytes: as they are where they fit, otherwise the largest made lighter first.

    First without a loss, then no wider than a page shows them, and only then with one that is hard to see.
    """
    fitting = dict(pictures)
    for widest, quality in _LIGHTER:
        for name in sorted(fitting, key=lambda name: -len(fitting[name].data)):
            if sum(len(picture.data) for picture in fitting.values()) <= most:
                return fitting
            with Image.open(io.BytesIO(pictures[name].data), formats=["PNG"]) as opened:
                image = opened.convert("RGB")
            image.thumbnail((widest or image.width, image.height), Image.Resampling.LANCZOS, reducing_gap=None)
            buffer = io.BytesIO()
            image.save(buffer, format="WEBP", lossless=quality is None, quality=quality or 50, method=3)
            if buffer.tell() < len(fitting[name].data):
                lighter = replace(pictures[name], data=buffer.getvalue(), width=image.width, height=image.height)
                fitting[name] = replace(lighter, format="webp")
    return fitting
