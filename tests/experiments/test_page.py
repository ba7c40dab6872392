"""report.html: one page that holds everything it shows, whatever a run has left."""

import base64
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_run import BALANCE, TRAIN, Page, Run

from m2d.errors import ExperimentError
from m2d.experiment import Experiment
from m2d.experiments import page as page_module
from m2d.experiments.page import Picture, fitted, png_picture, write_report

MakeRun = Callable[..., Run]
FEATURES = ("patch_features", "alignment", "feature_projection", "class_similarity")


def test_the_page_needs_no_other_file_and_no_network(full_page: Page) -> None:
    references = [
        value for _, attrs in full_page.elements for name, value in attrs.items() if name in ("src", "href", "srcset")
    ]
    assert len(references) > 8
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in full_page.elements}
    assert not re.search(r"url\(|@import", full_page.html)


def test_every_picture_says_in_words_what_it_shows(full_page: Page) -> None:
    images = [attrs for tag, attrs in full_page.elements if tag == "img"]
    assert len(images) == 2 + 2 + len(FEATURES)
    assert all(len(image["alt"]) > 20 for image in images)
    assert all(int(image["width"]) > 0 and int(image["height"]) > 0 for image in images)


def test_headings_skip_no_level(full_page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in full_page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_first_sentence_says_what_was_trained_on_what(full_page: Page) -> None:
    assert (
        "VAE and U-Net trained together on 560 training images at 64 × 64 px (AKIEC 18, BCC 30, BKL 57, DF 5, MEL 64, "
        "NV 378, VASC 8), with ImageNet EfficientNet-Lite0 as feature extractor, on 1 H100, bfloat16: 20 of 20 steps "
        "in 1 h 30 min."
    ) in full_page.text


def test_sections_come_in_the_order_a_reader_asks(full_page: Page) -> None:
    expected = ["state", "samples", "reconstructions", "training", "validation", "features", "counts", "settings"]
    assert list(full_page.sections) == [*expected, "origin"]


def test_a_run_that_has_left_nothing_yet_has_only_the_sections_it_can_fill(make_run: MakeRun) -> None:
    run = make_run(state="running", finished=None, dataset=None, total_steps=None)
    page = run.page()
    assert list(page.sections) == ["state", "samples", "settings", "origin"]
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert "no checkpoint that could draw them" in page.sections["samples"]


def test_a_feature_picture_appears_only_where_its_file_exists(make_run: MakeRun) -> None:
    run = make_run()
    assert "features" not in run.page().sections
    for count, kind in enumerate(FEATURES, start=1):
        content = run.picture(kind, 10 + count)
        page = run.page()
        assert base64.b64encode(content).decode() in page.html
        assert len([tag for tag, _ in page.elements if tag == "img"]) == count
        assert f"Step {10 + count}." in page.sections["features"]


def test_the_picture_of_the_latest_step_is_shown_and_a_broken_one_is_not(make_run: MakeRun) -> None:
    run = make_run()
    old, new = run.picture("reconstructions", 9, colour=10), run.picture("reconstructions", 10, colour=20)
    (run.path / "visualizations" / "reconstructions" / "step_00000011.png").write_bytes(new[:60])
    html = run.page().html
    assert base64.b64encode(new).decode() in html
    assert base64.b64encode(old).decode() not in html


def test_psnr_is_the_last_measured_beside_the_best(full_page: Page) -> None:
    assert "30.50 dB at step 20; the best was 31.25 dB at step 10." in full_page.sections["reconstructions"]
    assert full_page.row("measure", "reconstruction PSNR")[1:] == ["31.25", "10", "30.5"]


def test_what_comes_from_files_is_escaped(make_run: MakeRun) -> None:
    bad = "<b>&\"'"
    run = make_run(
        config={"init_checkpoint": f"/runs/{bad}"}, state="failed", error=f"boom {bad}", degraded=[f"no GPU {bad}"],
        device=f"H100 {bad}", versions={"torch": bad}, git={"commit": bad}, command=f"jobs/train.py --name '{bad[:5]}'",
        dataset={"root": f"/data/{bad}", "counts": {"train": TRAIN, bad: TRAIN}},
    )  # fmt: skip
    run.records("validation", {"step": 1, f"val/{bad}": 1.0})
    run.generation("fill", {"DF": 1}, mode="balance", balance={"to": bad, "split": bad}, solver=bad)
    page = run.page()
    assert "b" not in {tag for tag, _ in page.elements}
    assert page.text.count(bad) >= 9
    assert f"no GPU {bad}" in page.sections["state"]
    assert f"boom {bad}" in page.sections["state"]


def test_the_state_says_how_a_run_ended_and_how_to_continue_it(make_run: MakeRun) -> None:
    run = make_run(state="failed", error="CUDA out of memory", cwd="/home/me/m2d")
    state = run.page().sections["state"]
    for told in (
        "Ended before its first checkpoint",
        "It ended by: CUDA out of memory",
        "cd /home/me/m2d && python jobs/",
    ):
        assert told in state
    run.checkpoint(7)
    run.records("train", {"step": 8, "loss/diffusion": 1.0})
    page = run.page()
    assert "Unfinished, can be resumed" in page.sections["state"]
    assert "continues at step 7" in page.sections["state"]
    assert "8 of 20 steps" in page.text


def test_a_run_that_trains_now_is_told_to_be_training(make_run: MakeRun) -> None:
    run = make_run()
    run.records("train", {"step": 3, "loss/diffusion": 1.0})
    with run.experiment.running():
        page = run.page()
        assert "Training now" in page.sections["state"]
        assert ("training" in page.sections, "validation" in page.sections) == (True, False)


def test_a_record_that_cannot_be_read_still_gives_a_page(make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "experiment_info.json").write_text("{cut")
    assert "experiment_info.json is not JSON" in run.page().sections["state"]


def test_samples_of_training_come_before_a_contact_sheet(make_run: MakeRun) -> None:
    run = make_run()
    sheet = (run.generation("some", {"MEL": 1}) / "contact_sheet.png").read_bytes()
    assert base64.b64encode(sheet).decode() in run.page().html
    of_training = run.picture("samples", 20)
    html = run.page().html
    assert base64.b64encode(of_training).decode() in html
    assert base64.b64encode(sheet).decode() not in html


def test_samples_that_are_named_come_first(full_run: Run, tmp_path: Path) -> None:
    folder = Run(tmp_path / "other").generation("named", {"MEL": 1})
    page = full_run.page(folder)
    assert base64.b64encode((folder / "contact_sheet.png").read_bytes()).decode() in page.html
    assert "Contact sheet of named: unipc, 25 steps, guidance 1.5, seed 0." in page.sections["samples"]


def test_without_samples_the_page_says_which_command_makes_some(make_run: MakeRun) -> None:
    run = make_run()
    run.checkpoint(10)
    command = f"python -m m2d generate --checkpoint {run.path}/checkpoints/step_00000010"
    assert command in run.page().sections["samples"]


def test_settings_that_differ_from_the_defaults_are_listed_with_both_values(make_run: MakeRun) -> None:
    page = make_run(config={"batch_size": 7, "compile": True}).page()
    assert page.row("default", "batch_size") == ["batch_size", "7", "32"]
    assert page.row("default", "compile") == ["compile", "true", "false"]
    assert len(next(rows for rows in page.tables if "default" in rows[0])) == 3


def test_the_curves_are_kept_as_pictures_too(full_run: Run) -> None:
    full_run.page()
    for name in ("training_curves", "validation_curves"):
        with Image.open(full_run.path / "visualizations" / f"{name}.png") as curves:
            assert np.asarray(curves.convert("L")).min() < 128


def test_a_remote_run_is_read_at_its_root_and_its_page_is_published_there(full_run: Run, tmp_path: Path) -> None:
    staged = tmp_path / "staging" / full_run.path.name
    staged.mkdir(parents=True)
    written = write_report(Experiment(staged, f"file://{full_run.path}"))
    published = (full_run.path / "report.html").read_text(encoding="utf-8")
    assert written.parent == staged
    assert base64.b64encode(full_run.picture("samples", 20)).decode() in published


def test_a_folder_that_cannot_be_written_is_told_in_one_line(full_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_module, "write_whole", full)
    with pytest.raises(ExperimentError, match=r"report\.html cannot be written \(No space left on device\)"):
        write_report(full_run.experiment)


def test_each_split_counts_as_the_record_says(full_page: Page) -> None:
    assert full_page.row("val", "NV")[1:4] == ["378", "44", "422"]
    assert full_page.row("val", "all")[1:4] == ["560", "68", "628"]
    assert "629 images in /data/skin; files rejected: 3, duplicates left out: 1." in full_page.sections["counts"]


def test_before_and_after_are_the_balance_runs_counts(full_page: Page) -> None:
    """DF: 5 + 2 real images, 33 made. VASC: 8 + 1, 31 made. NV: 378 + 44, none made."""
    assert full_page.row("real (before)", "DF")[1:4] == ["7", "33", "40"]
    assert full_page.row("real (before)", "VASC")[1:4] == ["9", "31", "40"]
    assert full_page.row("real (before)", "NV")[1:4] == ["422", "0", "422"]
    assert full_page.row("real (before)", "all")[1:4] == ["628", "64", "692"]
    assert "Before and after: 40 images of each class" in full_page.sections["counts"]


def test_a_run_that_balanced_the_training_split_begins_with_its_images(make_run: MakeRun) -> None:
    run = make_run()
    run.generation("fill", {"DF": 373}, mode="balance", balance=BALANCE | {"split": "train", "to": "max"})
    page = run.page()
    assert page.row("real (before)", "DF")[1:4] == ["5", "373", "378"]
    assert "as many as the largest class has" in page.sections["counts"]


def test_flipped_real_images_are_not_called_synthetic(make_run: MakeRun) -> None:
    run = make_run()
    run.generation("flips", {"DF": 2}, mode="balance", balance=BALANCE | {"from": "flips"})
    assert "the flipped ones of generated_images/flips" in run.page().sections["counts"]


def test_images_that_were_asked_for_and_are_not_there_are_told(make_run: MakeRun) -> None:
    run = make_run()
    run.generation("fill", {"DF": 30}, asked={"DF": 33}, mode="balance", balance=BALANCE)
    page = run.page()
    assert page.row("missing", "DF")[1:5] == ["7", "30", "3", "37"]
    assert "3 images that were asked for are not there" in page.sections["counts"]


def test_real_images_of_another_dataset_are_not_guessed(make_run: MakeRun) -> None:
    run = make_run()
    run.generation("fill", {"DF": 33}, mode="balance", balance=BALANCE | {"catalog": "999999999999"})
    page = run.page()
    assert page.row("real (before)", "DF")[1:4] == ["–", "33", "–"]
    assert "another dataset" in page.sections["counts"]


def test_a_run_that_balanced_nothing_has_no_before_and_after(make_run: MakeRun) -> None:
    run = make_run()
    run.generation("plain", {"DF": 4, "NV": 4})
    page = run.page()
    assert "Before and after" not in page.text
    assert page.row("val", "all")[3] == "628"


# --- what fits into one page: nothing is lost before it must be -------------------------------------------------------


def picture(pixels: np.ndarray) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    found = png_picture(buffer.getvalue())
    assert found is not None
    return found


def smooth(width: int) -> Picture:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.3, 1, 300)[:, None, None]
    return picture((ramp * np.array([1.0, 0.8, 0.6])).astype(np.uint8))


def noise(width: int) -> Picture:
    return picture(np.random.default_rng(0).integers(0, 256, (600, width, 3), dtype=np.uint8))


def pixels_of(shown: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(shown.data)) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_that_fit_stay_and_else_the_largest_is_made_lighter_first_without_a_loss() -> None:
    large, small = smooth(900), smooth(200)
    whole = len(large.data) + len(small.data)
    assert fitted({"small": small, "large": large}, most=whole) == {"small": small, "large": large}
    found = fitted({"small": small, "large": large}, most=whole - 1)
    assert found["small"] == small
    assert found["large"].format == "webp"
    assert (pixels_of(found["large"]) == pixels_of(large)).all()


def test_a_page_that_would_be_too_heavy_still_fits() -> None:
    given = {"a": noise(2000), "b": noise(900)}  # 5.2 MB that no lossless format makes smaller
    found = fitted(given, most=1_000_000)
    assert sum(len(shown.data) for shown in found.values()) <= 1_000_000
    assert found["a"].height / found["a"].width == 600 / 2000


def test_a_cut_file_and_another_format_are_no_picture() -> None:
    whole, buffer = smooth(300), io.BytesIO()
    assert png_picture(whole.data[: len(whole.data) // 2]) is None
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    assert png_picture(buffer.getvalue()) is None
