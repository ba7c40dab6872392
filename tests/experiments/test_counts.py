"""Images by class: numbers of the record, and before and after a run that filled up classes."""

from collections.abc import Callable

from report_run import BALANCE, Page, Run

MakeRun = Callable[..., Run]


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
