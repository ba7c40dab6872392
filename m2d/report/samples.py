"""Which samples a report shows: those of a generation run that was named, of training, or of the latest run."""

from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from m2d.experiments.files import ExperimentFiles
from m2d.report.counts import RUNS, modified, recipe
from m2d.report.facts import sampling_text
from m2d.report.pictures import Picture, names_in, newest_picture, read_picture

SHEET = "contact_sheet.png"


@dataclass(frozen=True)
class Samples:
    """A grid of generated images, a row for each class, and a sentence about it."""

    picture: Picture
    caption: str


def find_samples(files: ExperimentFiles, given: Path | None) -> Samples | None:
    """given: the folder of a generation run. Otherwise the latest picture of training, or a contact sheet."""
    if given is not None:
        folder = given.absolute()
        found = _of_run(ExperimentFiles(fs.LocalFileSystem(), str(folder.parent)), folder.name)
        if found is not None:
            return found
    picture = newest_picture(files, "samples")
    if picture is not None:
        text = f"Drawn by the averaged U-Net after {picture.step:,} steps, from the same seeds each time."
        return Samples(picture, text)
    # A run that asked for every class shows more than one that filled up some.
    runs = [
        (recipe(files, f"{RUNS}/{name}").get("mode") == "standard", modified(files, f"{RUNS}/{name}/{SHEET}"), name)
        for name in names_in(files, RUNS)
    ]
    sheets = (_of_run(files, f"{RUNS}/{name}") for _, _, name in sorted(runs, reverse=True))
    return next((sheet for sheet in sheets if sheet is not None), None)


def _of_run(files: ExperimentFiles, folder: str) -> Samples | None:
    picture = read_picture(files, f"{folder}/{SHEET}")
    if picture is None:
        return None
    how = sampling_text(recipe(files, folder))
    return Samples(picture, f"Contact sheet of {folder}{f': {how}' if how else ''}.")
