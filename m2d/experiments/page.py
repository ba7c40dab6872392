"""report.html of an experiment, one page that holds everything it shows: facts and pictures, laid out by a template.

It reads an experiment's files alone, so that a run of any machine has one, also long afterwards.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
from m2d.classes import CLASSES, DIAGNOSES
from m2d.errors import ConfigError, ExperimentError
from m2d.experiment import Experiment
from m2d.experiments.details import details, generate_command, report_command, resume_command
from m2d.experiments.record import ExperimentFiles, Record, find_records, flat, read_record, resolve, within
from m2d.experiments.settings import ReportConfig
from m2d.experiments.wording import duration_text, number_text, plain
from m2d.files.atomic import write_whole
from m2d.generation.settings import parse_target
from m2d.training.settings import TrainConfig, as_dict

REPORT = "report.html"
KEPT_CURVES = frozenset({"training_curves", "validation_curves"})  # as PNG too
PICTURES = ("reconstructions", "patch_features", "alignment", "feature_projection", "class_similarity")
STAGES = {
    "joint": "VAE and U-Net trained together",
    "latent": "U-Net trained alone (on the latents of a frozen VAE)",
    "decoder": "Decoder of the VAE trained alone (encoder and U-Net kept)",
}
MEASURES = {
    "val/psnr_db": "reconstruction PSNR (dB, more is better)",
    "val/perceptual": "perceptual distance of reconstructions (less is better)",
    "val/velocity_mse": "velocity error of the averaged U-Net (less is better)",
}
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


def write_report(experiment: Experiment, samples: Path | None = None, *, held: bool = False) -> Path:
    """Write report.html into the experiment, and the curves as PNG into its visualizations/; returns the page.

    samples: a generation run whose contact sheet the page shows; None: the newest samples there are. held: this process
    holds the experiment's lock, so no other trains in it. Whatever a run has not left is left out, or said to be
    missing. Raises ExperimentError where the page cannot be written, DataError for a remote one that cannot be reached.
    """
    record = read_record(experiment, held=held)
    curves = _curves(record)
    written = {f"visualizations/{name}.png": curves[name].data for name in sorted(KEPT_CURVES & curves.keys())}
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
    dataset = known["dataset"] if isinstance(known["dataset"], dict) else {}
    pictures = {kind: newest_picture(record.files, kind) for kind in PICTURES} | {"samples": samples}
    found = {kind: picture for kind, picture in pictures.items() if picture is not None}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2d.experiments", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number_text
    return environment.get_template("report.html.jinja").render(
        known=known,
        lead=_lead(record, known),
        pictures=fitted({**found, **curves}),
        samples=samples,
        generate_command=generate_command(record),
        psnr=_psnr_text(known),
        measures=_validation_measures(known),
        diagnoses={diagnosis.code: diagnosis for diagnosis in DIAGNOSES},
        dataset={key: number_text(value) for key, value in dataset.items()},
        counts=_dataset_table(dataset.get("counts")),
        balances=_balance_runs(record.files, dataset),
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


def _lead(record: Record, known: Mapping[str, Any]) -> str:
    """What was trained on what, in one sentence."""
    config = record.config
    lead = STAGES.get(str(config.get("stage")), "Training")
    train, size = within(record.info.get("dataset"), "counts", "train"), within(config, "data", "image_size")
    if isinstance(train, dict) and all(isinstance(number, int) for number in train.values()):
        each = ", ".join(f"{code} {train[code]:,}" for code in CLASSES if code in train)
        pixels = f" at {size} × {size} px" if isinstance(size, int) else ""
        lead += f" on {sum(train.values()):,} training images{pixels} ({each})"
    if extractor := within(config, "feature_extractor", "name"):
        kind, _, size = str(extractor).partition("-")
        if kind == "panderm":
            extractor = f"PanDerm-{size.capitalize()}"
        elif kind == "efficientnet":
            extractor = f"ImageNet {extractor.replace('efficientnet-lite', 'EfficientNet-Lite')}"
        lead += f", with {extractor} as feature extractor"
    if config.get("init_checkpoint"):
        lead += f", starting from {config['init_checkpoint']}"
    if device := ", ".join(str(known[key]) for key in ("device", "precision") if known.get(key)):
        lead += f", on {device}"
    of_total = "" if record.total_steps is None else f" of {record.total_steps:,}"
    if not record.steps_done:
        return f"{lead}: no step recorded{of_total}."
    time = "" if record.wall_seconds is None else f" in {duration_text(record.wall_seconds)}"
    return f"{lead}: {record.steps_done:,}{of_total} steps{time}."


def _validation_measures(known: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, best, its step, last) of every validation measure, known ones first."""
    records: Sequence[Mapping[str, Any]] = known["validation"]
    there = dict.fromkeys(name for entry in records for name in entry if name.startswith("val/"))
    rows = []
    for name in dict.fromkeys([*(name for name in MEASURES if name in there), *there]):
        best = known["best_measures"].get(name, {})
        last = next((entry[name] for entry in reversed(records) if name in entry), None)
        numbers = [number_text(value) for value in (best.get("value"), best.get("step"), last)]
        rows.append((MEASURES.get(name, name), numbers[0], numbers[1], numbers[2]))
    return rows


def _psnr_text(known: Mapping[str, Any]) -> str | None:
    """The PSNR that validation last measured, and the best one; None where it measured none."""
    measured = [entry for entry in known["validation"] if isinstance(entry.get("val/psnr_db"), (int, float))]
    if not measured:
        return None
    last, best = measured[-1], known["best_measures"].get("val/psnr_db")
    text = f"PSNR over the validation images: {last['val/psnr_db']:.2f} dB at step {last['step']:,}"
    if best is None or best["step"] == last["step"]:
        return f"{text}."
    return f"{text}; the best was {best['value']:.2f} dB at step {best['step']:,}."


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


def _count_table(columns: Mapping[str, Counts | None], bars: Sequence[str]) -> dict[str, Any]:
    """A table by class. columns: name to images by class code, None where not known. bars: the columns drawn."""
    lengths = {code: [(columns[name] or Counter())[code] for name in bars] for code in CLASSES}
    percent = 100 / (max(map(sum, lengths.values())) or 1)  # of the longest row
    numbers = {code: [None if one is None else one[code] for one in columns.values()] for code in CLASSES}
    return {
        "columns": list(columns),
        "rows": [(code, numbers[code], [percent * length for length in lengths[code]]) for code in CLASSES],
        "sums": [None if one is None else one.total() for one in columns.values()],
    }


def _dataset_table(counts: Any) -> dict[str, Any] | None:
    """Of `dataset.counts` in an experiment's record: split to class code to images. None where it has none."""
    splits = {str(split): _known(one) for split, one in counts.items()} if isinstance(counts, dict) else {}
    return _count_table({**splits, "all": sum(splits.values(), Counter())}, ["all"]) if splits else None


def _balance_runs(files: ExperimentFiles, dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The experiment's generation runs that filled up classes, the latest first. dataset: of its record."""
    found = []
    for name in files.names(RUNS):
        folder = f"{RUNS}/{name}"
        balance = files.json(f"{folder}/generation.json").get("balance")
        made = _by_class(files.content(f"{folder}/manifest.parquet"))
        if not isinstance(balance, dict) or made is None:
            continue
        split = str(balance.get("split", "all"))
        asked = _by_class(files.content(f"{folder}/plan.parquet")) or made
        before = _real_images(dataset, str(balance.get("catalog")), split)
        lacking = asked - made
        missing = lacking.total()
        columns: dict[str, Counts | None] = {"real (before)": before, "synthetic": made}
        columns |= {"missing": lacking} if missing else {}
        columns["together (after)"] = None if before is None else before + made
        run = {
            "folder": folder,
            "target": _target_text(str(balance.get("to", ""))),
            "split": split,
            "before": before,
            "missing": missing,
            "table": _count_table(columns, ["real (before)", "synthetic"]),
        }
        found.append((files.modified(f"{folder}/manifest.parquet"), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _real_images(dataset: Mapping[str, Any], catalog: str, split: str) -> Counts | None:
    """Of the splits that were counted, if the generation run counted the dataset that the experiment knows."""
    splits = dataset.get("counts")
    if not catalog or not str(dataset.get("sha256", "")).startswith(catalog) or not isinstance(splits, dict):
        return None
    wanted = splits.values() if split == "all" else [splits.get(split)]
    return sum(map(_known, wanted), Counter())


def _by_class(content: bytes | None) -> Counts | None:
    """Images by class of a manifest or a plan; None where it cannot be read."""
    try:
        labels = pq.read_table(io.BytesIO(content or b""), columns=["class"])["class"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return None
    return Counter(labels)


def _target_text(to: str) -> str:
    try:
        target = parse_target(to)
    except ConfigError:
        return to
    if isinstance(target, int):
        return f"{target:,} images of each class"
    return "as many as the largest class has" if target == 1 else f"{target:g} of the largest class"


def _known(of_class: Any) -> Counts:
    known = of_class.items() if isinstance(of_class, dict) else ()
    return Counter({code: number for code, number in known if code in CLASSES and isinstance(number, int)})


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


def find_samples(files: ExperimentFiles, given: Path | None) -> Picture | None:
    """A grid of generated images with its caption.

    given: the folder of a generation run. Otherwise the latest picture of training, or a contact sheet.
    """
    if given is not None:
        folder = given.absolute()
        found = _contact_sheet(ExperimentFiles(fs.LocalFileSystem(), str(folder.parent)), folder.name)
        if found is not None:
            return found
    picture = newest_picture(files, "samples")
    if picture is not None:
        text = f"Drawn by the averaged U-Net after {picture.step:,} steps, from the same seeds each time."
        return replace(picture, caption=text)
    # A run that asked for every class shows more than one that filled up some.
    folders = [f"{RUNS}/{name}" for name in files.names(RUNS)]
    whole = {folder: files.json(f"{folder}/generation.json").get("mode") == "standard" for folder in folders}
    folders.sort(key=lambda folder: (whole[folder], files.modified(f"{folder}/{SHEET}"), folder), reverse=True)
    sheets = (_contact_sheet(files, folder) for folder in folders)
    return next((sheet for sheet in sheets if sheet is not None), None)


def fitted(pictures: Mapping[str, Picture], most: int = PAGE_BYTES) -> dict[str, Picture]:
    """The pictures in at most about `most` bytes: as they are where they fit, otherwise the largest made lighter first.

    First without a loss, then no wider than a page shows them, and only then with one that is hard to see.
    """
    fitting = dict(pictures)
    for widest, quality in _LIGHTER:
        for name in sorted(fitting, key=lambda name: -len(fitting[name].data)):
            if sum(len(picture.data) for picture in fitting.values()) <= most:
                return fitting
            fitting[name] = _lighter(fitting[name], pictures[name], widest, quality)
    return fitting


def _contact_sheet(files: ExperimentFiles, folder: str) -> Picture | None:
    picture = png_picture(files.content(f"{folder}/{SHEET}"))
    if picture is None:
        return None
    known = files.json(f"{folder}/generation.json")
    parts = [str(known["solver"])] if known.get("solver") else []
    parts += [f"{number_text(known['steps'])} steps"] if known.get("steps") else []
    parts += [f"guidance {number_text(known['guidance_scale'])}"] if known.get("guidance_scale") else []
    parts += [f"seed {known['seed']}"] if known.get("seed") is not None else []
    return replace(picture, caption=f"Contact sheet of {folder}{': ' if parts else ''}{', '.join(parts)}.")


def _lighter(now: Picture, original: Picture, widest: int | None, quality: int | None) -> Picture:
    """The original as WebP, where that is lighter than what there is now."""
    with Image.open(io.BytesIO(original.data), formats=["PNG"]) as opened:
        image = opened.convert("RGB")
    if widest is not None and image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=quality is None, quality=quality or 50, method=3)
    made = replace(original, data=buffer.getvalue(), width=image.width, height=image.height, format="webp")
    return made if len(made.data) < len(now.data) else now
