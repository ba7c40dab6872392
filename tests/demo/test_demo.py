"""The demo set must teach something: classes that differ, lesions that vary, and the same files on every machine."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score

from m2d.classes import ISIC7
from m2d.demo.dataset import HAM10000_COUNTS, MIN_PER_CLASS, demo_counts, write_demo_dataset
from m2d.demo.lesions import render_lesion
from m2d.errors import ConfigError, DataError

SMALLEST = MIN_PER_CLASS * len(ISIC7.codes)


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete smallest set, shared by the tests that only read or repair it."""
    root = tmp_path_factory.mktemp("demo") / "set"
    write_demo_dataset(root, total=SMALLEST, seed=3)
    return root


def lesion_statistics(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[21] simple numbers of one image: Lab against the surround, spread, percentiles, fine contrast."""
    lab = np.asarray(Image.fromarray(image).convert("LAB"), np.int16).astype(float)
    lab[..., 1:] = (lab[..., 1:] + 128) % 256 - 128  # Pillow stores a and b as wrapped bytes
    height, width = lab.shape[:2]
    centre = lab[height // 4 : -height // 4, width // 4 : -width // 4].reshape(-1, 3)
    surround = lab[height // 10 : height // 6, width // 4 : -width // 4].reshape(-1, 3)
    heart = lab[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5].reshape(-1, 3)
    fine = np.abs(np.diff(lab, axis=1))[height // 4 : -height // 4, width // 4 : -width // 4].mean((0, 1))
    return np.concatenate(
        [
            heart.mean(0) - surround.mean(0),
            centre.mean(0) - surround.mean(0),
            centre.std(0),
            *(np.percentile(centre, share, axis=0) for share in (2, 50, 98)),
            fine,
        ]
    )


def file_times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("label", ISIC7.codes)
def test_a_picture_is_a_function_of_its_arguments(label: str) -> None:
    first = render_lesion(label, 7)
    render_lesion("NV", 99)  # what was drawn in between must not matter
    assert first.shape == (150, 200, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render_lesion(label, 7))
    assert np.abs(first.astype(int) - render_lesion(label, 8)).mean() > 3


@pytest.mark.parametrize("label", ISIC7.codes)
def test_another_size_shows_the_same_lesion(label: str) -> None:
    """Averaged down 2 x 2, the large picture is the small one, but for sensor noise and blur."""
    small = render_lesion(label, 5)
    large = render_lesion(label, 5, width=400, height=300)
    halved = large.reshape(150, 2, 200, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 4
    np.testing.assert_allclose(halved.mean((0, 1)), small.mean((0, 1)), atol=1.5)


def test_another_view_is_the_same_lesion_under_another_pose_and_light() -> None:
    with pytest.raises(KeyError, match="unknown class MOLE"):
        render_lesion("MOLE", 0)
    for label in ("NV", "MEL", "VASC"):
        views = [render_lesion(label, 4, view=view) for view in range(3)]
        assert min(np.abs(views[0].astype(int) - view).mean() for view in views[1:]) > 3
        hearts = [view[60:90, 80:120].mean((0, 1)) for view in views]
        others = [render_lesion(label, seed)[60:90, 80:120].mean((0, 1)) for seed in range(10, 30)]
        assert np.ptp(hearts, axis=0).mean() < np.ptp(others, axis=0).mean()


@pytest.mark.parametrize("total", [SMALLEST, 100, 600, 10_015])
def test_counts_follow_ham10000_with_a_minimum(total: int) -> None:
    counts = demo_counts(total)
    assert sum(counts.values()) == total
    assert min(counts.values()) >= MIN_PER_CLASS
    above = [label for label in ISIC7.codes if counts[label] > MIN_PER_CLASS]
    for label in above:  # the classes above the minimum keep their mutual proportions, to within one image
        share = HAM10000_COUNTS[label] / sum(HAM10000_COUNTS[other] for other in above)
        assert abs(counts[label] - share * sum(counts[other] for other in above)) < 1 + 0.01 * counts[label]
    if total == 10_015:
        assert counts == HAM10000_COUNTS


def test_a_set_is_class_folders_and_metadata(demo_root: Path) -> None:
    files = sorted(demo_root.glob("*/*.jpg"))
    assert {path.parent.name for path in files} == set(ISIC7.codes)
    assert [path.stem for path in sorted(files, key=lambda path: path.stem)] == [
        f"DEMO_{number:07d}" for number in range(1, SMALLEST + 1)
    ]
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == ("JPEG", (200, 150))
    with (demo_root / "metadata.csv").open() as table:
        assert {row["image_id"] for row in csv.DictReader(table)} == {path.stem for path in files}


def test_siblings_share_a_lesion_id_within_a_class(demo_root: Path) -> None:
    labels = {path.stem: path.parent.name for path in demo_root.glob("*/*.jpg")}
    members: dict[str, list[str]] = defaultdict(list)
    with (demo_root / "metadata.csv").open() as table:
        for row in csv.DictReader(table):
            members[row["lesion_id"]].append(row["image_id"])
    assert all(len({labels[image_id] for image_id in images}) == 1 for images in members.values())
    assert {len(images) for images in members.values()} == {1, 2, 3}
    assert SMALLEST / len(members) < 1.7


def test_running_again_writes_what_is_missing_and_nothing_else(demo_root: Path) -> None:
    before = file_times(demo_root)
    removed = sorted(demo_root.glob("MEL/*.jpg"))[2]
    content = removed.read_bytes()
    assert write_demo_dataset(demo_root, total=SMALLEST, seed=3) == demo_counts(SMALLEST)
    assert file_times(demo_root) == before
    removed.unlink()
    write_demo_dataset(demo_root, total=SMALLEST, seed=3)
    after = file_times(demo_root)
    assert removed.read_bytes() == content
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {str(removed.relative_to(demo_root))}


def test_a_folder_with_something_else_is_left_alone(demo_root: Path, tmp_path: Path) -> None:
    before = file_times(demo_root)
    with pytest.raises(DataError, match="another folder"):
        write_demo_dataset(demo_root, total=SMALLEST, seed=4)
    assert file_times(demo_root) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_demo_dataset(tmp_path, total=SMALLEST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_arguments_that_cannot_work_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="total is 20"):
        write_demo_dataset(tmp_path / "set", total=20)
    with pytest.raises(ConfigError, match="seed is -1"):
        write_demo_dataset(tmp_path / "set", seed=-1)
    assert not (tmp_path / "set").exists()


def test_the_classes_can_be_told_apart_and_still_vary() -> None:
    """A linear classifier on 21 colour and contrast numbers beats chance (0.14) by far on lesions that it has not seen.

    Drawn at half size, near the demo preset's 64 pixels.
    """
    per_class, held_out = 20, 8
    seeds = range(per_class)
    images = [[render_lesion(label, seed, width=100, height=75) for seed in seeds] for label in ISIC7.codes]
    statistics = np.array([[lesion_statistics(image) for image in of_class] for of_class in images])
    labels = np.repeat(np.arange(len(ISIC7.codes))[:, None], per_class, axis=1)
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    classifier.fit(statistics[:, held_out:].reshape(-1, 21), labels[:, held_out:].ravel())
    predicted = classifier.predict(statistics[:, :held_out].reshape(-1, 21))
    assert balanced_accuracy_score(labels[:, :held_out].ravel(), predicted) > 0.5
    median_lightness = statistics[:, :, 9 + 3]  # L, 50th percentile, 0..255
    assert (median_lightness.std(1) > 5).all()
