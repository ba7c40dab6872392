"""report.html: gathers an experiment's facts and pictures, lays them out by the template, writes the page."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import jinja2

from m2d import __version__
from m2d.classes import DIAGNOSES
from m2d.errors import ExperimentError
from m2d.experiment import Experiment
from m2d.experiments.advice import resume_command
from m2d.experiments.details import details
from m2d.experiments.find import find_records
from m2d.experiments.record import TRAIN, VALIDATION, Record, read_record
from m2d.experiments.wording import number_text
from m2d.files.atomic import write_whole
from m2d.files.storage import without_secrets
from m2d.report import facts
from m2d.report.counts import balance_runs, dataset_table
from m2d.report.pictures import Picture, fitted, newest_picture, png_picture
from m2d.report.samples import Samples, find_samples

REPORT = "report.html"
KEPT_CURVES = frozenset({"training_curves", "validation_curves"})  # as PNG too
PHONE_PIXELS = 640  # narrower pages show curves one below the other
# Kind of visualizations/ to its heading, its alternative text, and how to read it.
FEATURE_PICTURES = {
    "patch_features": (
        "What it sees in an image",
        "validation images beside the colours of their patch features",
        "Patches of one colour are alike to the extractor: a lesion that stands out from the skin around it is told "
        "apart from it.",
    ),
    "alignment": (
        "How far the U-Net agrees with it",
        "validation images beside maps of the cosine between U-Net and extractor",
        "Yellow patches are where the U-Net, shown a half noised image, knows what the extractor sees in a clean one; "
        "they should spread as training goes on.",
    ),
    "feature_projection": (
        "Where generated images fall among real ones",
        "scatter plots of the features of real and generated images, one for each class",
        "Generated images (filled) should lie among the real ones (hollow) of their class and spread as widely; a "
        "narrow heap means that they are all alike.",
    ),
    "class_similarity": (
        "How alike generated and real images of a class are",
        "chart and table of the mean cosine of generated and real images, by class",
        "A filled marker as far right as the hollow one is as like its class as real images are; the further the bar "
        "lies to its left, the better the classes are told apart.",
    ),
}  # fmt: skip


def write_report(experiment: Experiment, samples: Path | None = None, *, held: bool = False) -> Path:
    """Write report.html into the experiment, and the curves as PNG into its visualizations/; returns the page.

    samples: a generation run whose contact sheet the page shows; None: the newest samples there are. held: this process
    holds the experiment's lock, so no other trains in it. Whatever a run has not left is left out, or said to be
    missing. Raises ExperimentError where the page cannot be written, DataError for a remote one that cannot be reached.
    """
    record = read_record(experiment, held=held)
    curves = _curves(record)
    page = _page(record, find_samples(record.files, samples), curves)
    path = experiment.path / REPORT
    try:
        for name in KEPT_CURVES & curves.keys():
            _write(experiment.path / "visualizations" / f"{name}.png", curves[name].data)
        _write(path, page.encode())
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror or error}); make room, then: {facts.report_command(record)}"
        ) from error
    for name in sorted(KEPT_CURVES & curves.keys()):
        experiment.publish(f"visualizations/{name}.png")
    experiment.publish(REPORT)
    return path


def _page(record: Record, samples: Samples | None, curves: Mapping[str, Picture]) -> str:
    known = details(record, _siblings(record))
    dataset = known["dataset"] if isinstance(known["dataset"], dict) else {}
    kinds = ("reconstructions", *FEATURE_PICTURES)
    found = {kind: picture for kind in kinds if (picture := newest_picture(record.files, kind)) is not None}
    if samples is not None:
        found["samples"] = samples.picture
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m2d.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number_text
    return environment.get_template("report.html.jinja").render(
        name=record.name,
        lead=without_secrets(facts.lead(record, known)),
        state=record.state,
        state_text=facts.STATES[record.state],
        next=known["next"],
        next_command=None if known["command"] is None else without_secrets(known["command"]),
        error=known["error"],
        notes=[str(line) for line in known["degraded"]],
        pictures=fitted({**found, **curves}),
        phone_pixels=PHONE_PIXELS,
        samples=samples,
        generate_command=facts.generate_command(record),
        psnr=facts.psnr_text(known),
        measures=facts.validation_measures(known),
        features=FEATURE_PICTURES,
        diagnoses={diagnosis.code: diagnosis for diagnosis in DIAGNOSES},
        dataset={key: without_secrets(number_text(value)) for key, value in dataset.items()},
        counts=dataset_table(dataset.get("counts")),
        balances=balance_runs(record.files, dataset),
        has_settings=bool(record.config),
        settings=facts.other_settings(record.config),
        versions={name: version for name, version in known["versions"].items() if version},
        code=facts.code_text(known["git"]),
        command=resume_command(record),
        report_command=facts.report_command(record),
        made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by M2D {__version__}",
    )


def _siblings(record: Record) -> list[Record]:
    """Runs of the same name, which decide with which one a command goes on; it matters to an unfinished one alone."""
    if record.state not in ("resumable", "failed"):
        return [record]
    root = (record.experiment.remote or str(record.experiment.path)).rpartition("/")[0]
    return find_records(root, record.family)


def _curves(record: Record) -> dict[str, Picture]:
    """training_curves and validation_curves, and each as ..._narrow for a phone; none of what was not recorded."""
    from m2d.plots.curves import training_curves, validation_curves  # heavy: matplotlib

    found: dict[str, Picture] = {}
    for log, draw in ((TRAIN, training_curves), (VALIDATION, validation_curves)):
        records = record.files.records(log)
        for suffix, columns in (("", 3), ("_narrow", 1)) if records else ():
            picture = png_picture(draw(records, columns=columns))
            assert picture is not None, "just drawn"
            found[f"{draw.__name__}{suffix}"] = picture
    return found


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
