"""Layouts of published datasets, with their true column and file names, and the faults that real folders have.

In the first part no image is opened, so that empty files are enough.
"""

import csv
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m2d.classes import BINARY, ISIC8, MILK11
from m2d.data.catalog import said_of, scan_dataset
from m2d.data.importing import import_shards
from m2d.data.layouts import Layout, read_layout
from m2d.data.settings import DataConfig
from m2d.errors import DataError
from m2d.files.storage import open_storage
from m2d.generation.output import write_images
from m2d.generation.plan import PlanRow

HAM10000 = Path(__file__).resolve().parents[2].parent / "shared" / "ham10000"
Builder = Callable[[Path], None]


def make(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write(root: Path, path: str, text: str, encoding: str = "utf-8") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(text.encode(encoding))


def read(root: Path, **settings: object) -> Layout:
    return read_layout(*open_storage(str(root)), str(root), DataConfig(**settings))  # type: ignore[arg-type]


def labels(layout: Layout) -> dict[str, int]:
    return dict(Counter(str(entry.label) for entry in layout.entries))


HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization\n" + (
    "HAM_1,ISIC_1,bkl,histo,80.0,male,scalp\n"
    "HAM_1,ISIC_2,bkl,histo,80.0,male,scalp\n"
    "HAM_2,ISIC_3,akiec,histo,,unknown,face\n"
    "HAM_3,ISIC_4,nv,follow_up,45.0,female,trunk\n"
)


def ham10000(root: Path) -> None:
    make(root, *(f"HAM10000_images_part_{1 + n // 3}/ISIC_{n}.jpg" for n in (1, 2, 3, 4)))
    write(root, "HAM10000_metadata.csv", HAM)


def ham10000_of_dataverse(root: Path) -> None:
    """Tabs, no suffix, one more column."""
    make(root, *(f"HAM10000_images_part_{1 + n // 3}/ISIC_{n}.jpg" for n in (1, 2, 3, 4)))
    make(root, "HAM10000_segmentations_lesion_tschandl/ISIC_1_segmentation.png", "LICENSE")
    lines = HAM.replace(",", "\t").splitlines()
    rows = [lines[0] + "\tdataset", *(f"{line}\tvidir_modern" for line in lines[1:])]
    write(root, "HAM10000_metadata", "\r\n".join(rows))


def isic2018(root: Path) -> None:
    make(root, *(f"ISIC2018_Task3_Training_Input/ISIC_{n}.jpg" for n in (1, 2, 3, 4)))
    make(root, "ISIC2018_Task3_Training_Input/LICENSE.txt", "ISIC2018_Task3_Training_Input/ATTRIBUTION.txt")
    truth = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n" + "".join(
        f"ISIC_{n},{','.join('1.0' if place == hot else '0.0' for place in range(7))}\n"
        for n, hot in ((1, 4), (2, 4), (3, 3), (4, 1))
    )
    write(root, "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv", truth)
    groups = "image,lesion_id,diagnosis_confirm_type\nISIC_1,HAM_1,histopathology\nISIC_2,HAM_1,histopathology\n"
    groups += "ISIC_3,HAM_2,histopathology\nISIC_4,HAM_3,serial imaging showing no change\n"
    write(root, "ISIC2018_Task3_Training_LesionGroupings.csv", groups)


def isic_cli(root: Path) -> None:
    """isic image download, with the taxonomy of 2024 and later."""
    make(root, *(f"ISIC_{n}.jpg" for n in (1, 2, 3, 4)))
    make(root, "attribution.txt", "licenses/CC-BY.txt")
    text = "isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,diagnosis_3,"
    text += "image_type,lesion_id,sex\n"
    text += 'ISIC_1,"A, B",CC-BY,80,head/neck,Benign,Benign epidermal proliferations,Pigmented benign keratosis,'
    text += "dermoscopic,IL_1,male\n"
    text += "ISIC_2,A,CC-BY,80,,Benign,Benign epidermal proliferations,Seborrheic keratosis,dermoscopic,IL_1,male\n"
    text += (
        "ISIC_3,A,CC-BY,,,Indeterminate,Indeterminate epidermal proliferations,Solar or actinic keratosis,dermoscopic,"
    )
    text += "IL_2,\n"
    text += "ISIC_4,A,CC-BY,45,anterior torso,Benign,Benign melanocytic proliferations,Nevus,dermoscopic,IL_3,female\n"
    write(root, "metadata.csv", text)


def isic_cli_before_2024(root: Path) -> None:
    make(root, *(f"ISIC_{n}.jpg" for n in (1, 2, 3, 4)))
    text = "isic_id,attribution,age_approx,benign_malignant,diagnosis,image_type,lesion_id,sex\n"
    text += "ISIC_1,A,80,benign,pigmented benign keratosis,dermoscopic,IL_1,male\n"
    text += "ISIC_2,A,80,benign,seborrheic keratosis,dermoscopic,IL_1,male\n"
    text += "ISIC_3,A,,,actinic keratosis,dermoscopic,IL_2,\nISIC_4,A,45,benign,nevus,dermoscopic,IL_3,female\n"
    write(root, "metadata.csv", text)


@pytest.mark.parametrize("build", [ham10000, ham10000_of_dataverse, isic2018, isic_cli, isic_cli_before_2024])
def test_four_images_of_three_lesions_in_every_published_layout(tmp_path: Path, build: Builder) -> None:
    build(tmp_path)
    layout = read(tmp_path)
    assert labels(layout) == {"AKIEC": 1, "BKL": 2, "NV": 1}
    lesions = {Path(entry.path).stem: entry.lesions for entry in layout.entries}
    assert lesions["ISIC_1"] == lesions["ISIC_2"]
    assert len(lesions["ISIC_1"]) == 1
    assert len(set().union(*lesions.values())) == 3
    assert any(line.startswith("labels: ") and line.endswith(", 4 of 4 images") for line in layout.said)
    assert any(line.startswith("lesions: ") and line.endswith(", 4 of 4 images, 3 lesions") for line in layout.said)


def test_isic_2019_is_read_without_flags_where_its_classes_are_known(tmp_path: Path) -> None:
    names = ("ISIC_1_downsampled", "ISIC_2", "ISIC_3")
    make(tmp_path, *(f"ISIC_2019_Training_Input/{name}.jpg" for name in names))
    columns = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    rows = [
        f"{name},{','.join('1.0' if column == hot else '0.0' for column in columns)}"
        for name, hot in zip(names, ("MEL", "AK", "SCC"), strict=True)
    ]
    write(tmp_path, "ISIC_2019_Training_GroundTruth.csv", "\n".join([f"image,{','.join(columns)}", *rows]))
    metadata = "image,age_approx,anatom_site_general,lesion_id,sex\n"
    metadata += "ISIC_1,55.0,anterior torso,,female\nISIC_2,30.0,,MSK4_1,female\nISIC_3,60.0,,NA,male\n"
    write(tmp_path, "ISIC_2019_Training_Metadata.csv", metadata)
    layout = read(tmp_path)
    assert layout.classes is ISIC8
    assert labels(layout) == {"AKIEC": 1, "MEL": 1, "SCC": 1}
    assert [entry.lesions for entry in layout.entries] == [{"MSK4_1"}, set(), set()]
    assert layout.entries[1].facts == {"age": "55.0", "sex": "female", "site": "anterior torso"}
    with pytest.raises(DataError, match=r"SCC \(1\).*class_map.*drop"):
        read(tmp_path, classes="isic7")
    dropped = read(tmp_path, classes="isic7", drop="scc,unk")
    assert labels(dropped) == {"AKIEC": 1, "MEL": 1}
    assert "left out: 1 images of SCC (data.drop)" in dropped.said
    assert labels(read(tmp_path, classes="isic7", class_map={"SCC": "AKIEC"})) == {"AKIEC": 2, "MEL": 1}


def test_isic_2017_counts_what_is_neither_as_a_nevus(tmp_path: Path) -> None:
    make(tmp_path, *(f"ISIC-2017_Training_Data/ISIC_{n}.jpg" for n in (1, 2, 3)))
    make(tmp_path, "ISIC-2017_Training_Data/ISIC_1_superpixels.png")
    text = "image_id,melanoma,seborrheic_keratosis\nISIC_1,0.0,0.0\nISIC_2,1.0,0.0\nISIC_3,0.0,1.0\n"
    write(tmp_path, "ISIC-2017_Training_Part3_GroundTruth.csv", text)
    layout = read(tmp_path)
    assert {entry.path[-10:-4]: entry.label for entry in layout.entries} == {
        "ISIC_1": "NV",
        "ISIC_2": "MEL",
        "ISIC_3": "BKL",
    }
    assert "left out: 1 masks and superpixels" in layout.said


@pytest.mark.parametrize(
    ("text", "benign"),
    [
        ("ISIC_1,benign\nISIC_2,malignant\n", 1),  # ISIC 2016: no header
        ("ISIC_1,0.0\nISIC_2,1.0\n", 1),
        (
            "image_name,patient_id,sex,age_approx,diagnosis,target\nISIC_1,IP_1,,,unknown,0\nISIC_2,IP_1,,,melanoma,1\n",
            1,
        ),
        ("isic_id,target,patient_id,image_type,lesion_id\nISIC_1,0,IP_1,TBP tile: close-up,\nISIC_2,1,IP_1,,IL_1\n", 1),
    ],
)
def test_two_class_challenges_are_benign_and_malignant(tmp_path: Path, text: str, benign: int) -> None:
    make(tmp_path, "images/ISIC_1.jpg", "images/ISIC_2.jpg")
    write(tmp_path, "truth.csv", text)
    layout = read(tmp_path)
    assert layout.classes is BINARY
    assert labels(layout) == {"BENIGN": benign, "MALIGNANT": 1}
    assert labels(read(tmp_path, class_map={"benign": "NV", "malignant": "MEL"})) == {"NV": benign, "MEL": 1}


def test_a_sample_submission_labels_no_image(tmp_path: Path) -> None:
    """Beside ISIC 2020 as Kaggle has it lies a table of the test images in which every target is 0."""
    make(tmp_path, *(f"{folder}/ISIC_{n}.jpg" for folder, n in (("train", 1), ("train", 2), ("test", 3), ("test", 4))))
    write(tmp_path, "train.csv", "image_name,target\nISIC_1,0\nISIC_2,1\n")
    write(tmp_path, "sample_submission.csv", "image_name,target\nISIC_3,0\nISIC_4,0\n")
    layout = read(tmp_path)
    assert [entry.path for entry in layout.entries] == ["train/ISIC_1.jpg", "train/ISIC_2.jpg"]
    assert "not used: sample_submission.csv (every target in it is 0)" in layout.said
    assert any("2 images without a label" in line for line in layout.said)


def test_two_diagnoses_at_once_are_no_class(tmp_path: Path) -> None:
    make(tmp_path, "ISIC_1.jpg", "ISIC_2.jpg")
    write(tmp_path, "truth.csv", "image,MEL,NV\nISIC_1,1,1\nISIC_2,0,1\n")
    with pytest.raises(DataError, match=r"MEL \+ NV \(1\)"):
        read(tmp_path)


def test_milk10k_names_the_class_by_lesion_and_has_two_kinds_of_photograph(tmp_path: Path) -> None:
    make(tmp_path, *(f"MILK10k_Training_Input/IL_{n // 2}/ISIC_{n}.jpg" for n in range(4)))
    write(
        tmp_path,
        "MILK10k_Training_GroundTruth.csv",
        "lesion_id,AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,VASC\n"
        "IL_0,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\nIL_1,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0\n",
    )
    kinds = ("clinical: close-up", "dermoscopic")
    rows = [f"IL_{n // 2},{kinds[n % 2]},ISIC_{n},MEDUNI,CC-BY-NC,instrument only,70,male,3,trunk" for n in range(4)]
    columns = "lesion_id,image_type,isic_id,attribution,copyright_license,image_manipulation,age_approx,sex,"
    columns += "skin_tone_class,site"
    write(tmp_path, "MILK10k_Training_Metadata.csv", "\n".join([columns, *rows]))
    layout = read(tmp_path)
    assert layout.classes is MILK11
    assert [(entry.path[-10:], entry.label, entry.lesions) for entry in layout.entries] == [
        ("ISIC_1.jpg", "BCC", {"IL_0"}),
        ("ISIC_3.jpg", "SCCKA", {"IL_1"}),
    ]
    assert layout.entries[0].facts["skin_tone"] == "3"
    assert any(line.startswith("left out: 2 clinical photographs") for line in layout.said)
    assert labels(read(tmp_path, clinical=True)) == {"BCC": 2, "SCCKA": 2}


def test_class_folders_below_train_and_test_keep_that_split(tmp_path: Path) -> None:
    make(tmp_path, "Train/melanoma/a.jpg", "Train/nevus/b.jpg", "Test/melanoma/c.jpg")
    layout = read(tmp_path)
    assert {entry.path: (entry.label, entry.split) for entry in layout.entries} == {
        "Train/melanoma/a.jpg": ("MEL", "train"),
        "Train/nevus/b.jpg": ("NV", "train"),
        "Test/melanoma/c.jpg": ("MEL", "test"),
    }


@pytest.mark.parametrize("build", [ham10000, isic2018])
def test_published_tables_beside_class_folders_name_the_lesions(tmp_path: Path, build: Builder) -> None:
    build(tmp_path)
    for n, label in enumerate(("BKL", "BKL", "AKIEC", "NV"), 1):
        (old,) = tmp_path.glob(f"*/ISIC_{n}.jpg")
        (tmp_path / label).mkdir(exist_ok=True)
        old.rename(tmp_path / label / old.name)
    layout = read(tmp_path)
    assert labels(layout) == {"AKIEC": 1, "BKL": 2, "NV": 1}
    assert [sorted(entry.lesions) for entry in layout.entries] == [["HAM_2"], ["HAM_1"], ["HAM_1"], ["HAM_3"]]
    assert not [line for line in layout.said if line.startswith("WARNING")]


def test_a_folder_goes_before_a_table_that_disagrees_and_that_is_said(tmp_path: Path) -> None:
    make(tmp_path, "MEL/ISIC_1.jpg", "BKL/ISIC_2.jpg", "AKIEC/ISIC_3.jpg", "NV/ISIC_4.jpg")
    write(tmp_path, "HAM10000_metadata.csv", HAM)
    layout = read(tmp_path)
    assert labels(layout)["MEL"] == 1
    assert any("1 images lie in another class folder" in line for line in layout.said)


def test_a_table_of_the_users_own(tmp_path: Path) -> None:
    make(tmp_path / "photos", "serial/0001.PNG", "serial/0002.png", "serial/0003.png")
    text = "Nr;Befund;Herd;Teil\n0001;Melanoma;7;train\n0002;nevus;7;Test\n"
    write(tmp_path, "list.csv", text, "utf-16")
    columns = {"image": "nr", "label": "Befund", "lesion": "Herd", "split": "Teil"}
    layout = read(tmp_path / "photos", table=str(tmp_path / "list.csv"), columns=columns)
    assert [(entry.path, entry.label, entry.lesions, entry.split) for entry in layout.entries] == [
        ("serial/0001.PNG", "MEL", {"7"}, "train"),
        ("serial/0002.png", "NV", {"7"}, "test"),
    ]
    assert any("1 images without a label" in line for line in layout.said)
    with pytest.raises(DataError, match=r"data\.columns\.label: .*found: Nr, Befund"):
        read(tmp_path / "photos", table=str(tmp_path / "list.csv"), columns={"image": "Nr", "label": "dx"})


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (lambda text: text, "utf-8-sig"),
        (lambda text: text.replace("\n", "\r\n"), "utf-16"),
        (lambda text: text.replace(",", ";"), "utf-8"),
        (lambda text: text.replace(",", "\t"), "utf-16"),
        (lambda text: text.replace("ISIC_", "isic_"), "utf-8"),
        (lambda text: text.replace("ISIC_1", "ISIC_1.jpg").replace("ISIC_2", "ISIC_2_downsampled"), "utf-8"),
        (lambda text: text.replace("ISIC_1", "HAM10000_images_part_1/ISIC_1.JPG"), "utf-8"),
    ],
)
def test_tables_are_read_however_they_were_saved(tmp_path: Path, change: Callable[[str], str], encoding: str) -> None:
    ham10000(tmp_path)
    write(tmp_path, "HAM10000_metadata.csv", change(HAM), encoding)
    layout = read(tmp_path)
    assert labels(layout) == {"AKIEC": 1, "BKL": 2, "NV": 1}
    assert sum(len(entry.lesions) for entry in layout.entries) == 4


def test_rows_that_are_cut_short_and_tables_of_pixels_do_no_harm(tmp_path: Path) -> None:
    """Kaggle's copy of HAM10000 has hmnist_28_28_RGB.csv beside it: a column for each pixel, and one called label."""
    ham10000(tmp_path)
    write(
        tmp_path, "HAM10000_metadata.csv", HAM.replace("HAM_3,ISIC_4,nv,follow_up,45.0,female,trunk", "HAM_3,ISIC_4,nv")
    )
    write(tmp_path, "hmnist_28_28_RGB.csv", "pixel0000,pixel0001,pixel0002,label\n192,153,193,2\n25,14,30,2\n")
    layout = read(tmp_path)
    assert labels(layout) == {"AKIEC": 1, "BKL": 2, "NV": 1}
    assert "not used: hmnist_28_28_RGB.csv (no column names its images)" in layout.said


def test_missing_lesion_ids_are_no_lesion(tmp_path: Path) -> None:
    make(tmp_path, *(f"{label}/{name}.jpg" for label, name in (("MEL", "a"), ("NV", "b"), ("NV", "c"), ("NV", "d"))))
    write(tmp_path, "metadata.csv", "image_id,lesion_id\na,NA\nb,nan\nc,Unknown\nd,L1\n")
    layout = read(tmp_path)
    assert [entry.lesions for entry in layout.entries] == [set(), set(), set(), {"L1"}]
    assert any(line.startswith("WARNING: 3 images") for line in layout.said)


def test_no_table_of_lesions_is_said(tmp_path: Path) -> None:
    make(tmp_path, "MEL/a.jpg")
    assert any(line.startswith("lesions: no table") for line in read(tmp_path).said)


def test_a_table_of_other_images_is_an_error_with_ids_of_both_sides(tmp_path: Path) -> None:
    make(tmp_path, "MEL/a.jpg", "NV/b.jpg")
    write(tmp_path, "HAM10000_metadata.csv", HAM)
    with pytest.raises(DataError, match=r"HAM10000_metadata\.csv .*ISIC_1, ISIC_2.*a\.jpg, b\.jpg"):
        read(tmp_path)


def test_one_image_of_two_lesions_or_two_classes_is_an_error(tmp_path: Path) -> None:
    ham10000(tmp_path)
    write(tmp_path, "HAM10000_metadata.csv", HAM + "HAM_9,ISIC_4,nv,,,,\n")
    with pytest.raises(DataError, match="ISIC_4 two lesions, HAM_3 and HAM_9"):
        read(tmp_path)
    write(tmp_path, "HAM10000_metadata.csv", HAM)
    write(tmp_path, "other.csv", "image,label\nISIC_4,MEL\n")
    with pytest.raises(DataError, match=r"ISIC_4\.jpg is NV in .*MEL in other\.csv"):
        read(tmp_path)


def test_a_datasets_own_folders_or_a_file_may_be_the_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/{folder}/{n}.jpg" for folder in ("acne", "Basal cell", "rosacea") for n in range(2)))
    with pytest.raises(DataError, match=r"expected some of AKIEC .*data\.class_map"):
        read(tmp_path)
    assert labels(read(tmp_path, classes="folders")) == {"Basal_cell": 2, "acne": 2, "rosacea": 2}
    own = tmp_path / "own.yaml"
    own.write_text("- {code: ACNE, name: acne vulgaris, aliases: [rosacea]}\n- {code: BCC, aliases: [basal cell]}\n")
    layout = read(tmp_path / "train", classes=str(own))
    assert labels(layout) == {"ACNE": 4, "BCC": 2}
    assert layout.classes.diagnoses[0].name == "acne vulgaris"


def test_masks_are_no_images(tmp_path: Path) -> None:
    make(tmp_path, "MEL/a.jpg", "MEL/a_segmentation.png", "MEL/a_Mask.png", "MEL/a_attribute_globules.png")
    layout = read(tmp_path)
    assert [entry.path for entry in layout.entries] == ["MEL/a.jpg"]
    assert "left out: 3 masks and superpixels" in layout.said


def test_links_are_followed_once_and_broken_names_are_rejects(tmp_path: Path) -> None:
    root = tmp_path / "data"
    make(root, "MEL/a.jpg")
    make(tmp_path, "elsewhere/b.jpg", "beside.jpg")
    (root / "NV").symlink_to(tmp_path / "elsewhere")
    (root / "MEL" / "up").symlink_to(root)
    (root / "MEL" / "itself").symlink_to(root / "MEL")
    (root / "MEL" / "above").symlink_to(tmp_path)
    (root / "MEL" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Path(os.fsdecode(os.fsencode(root / "MEL") + b"/caf\xe9.jpg")).touch()
    layout = read(root)
    assert [entry.path for entry in layout.entries] == ["MEL/a.jpg", "NV/b.jpg"]
    assert {path: reason.partition(":")[0] for path, reason in layout.rejected} == {
        "MEL/caf\\xe9.jpg": "its name is not UTF-8; rename it",
        "MEL/gone.jpg": "cannot be read",
    }


# --- with images, through the scan ------------------------------------------------------------------------------------


def picture(seed: int) -> Image.Image:
    """96 x 96, smooth as a photograph of skin, and none like another."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 5, 1)).repeat(3, 2) // (1, 2, 3)
    return Image.fromarray(cells.astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)


def scan_of(root: Path, **settings: object) -> pa.Table:
    return scan_dataset(str(root), DataConfig(**settings)).catalog  # type: ignore[arg-type]


def test_a_published_split_is_kept_and_what_it_lacks_is_drawn_from_its_training_part(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / ("test" if number < 10 else "train") / ("MEL" if number % 2 else "NV")
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    splits = {row["path"]: row["split"] for row in scan_of(tmp_path).to_pylist()}
    assert {path for path, split in splits.items() if split == "test"} == {
        path for path in splits if path.startswith("test/")
    }
    assert Counter(splits.values()) == {"test": 10, "train": 18, "val": 2}
    seeded = {row["path"]: row["split"] for row in scan_of(tmp_path, split="seeded").to_pylist()}
    assert Counter(seeded.values()) == {"test": 4, "train": 22, "val": 4}


def test_a_lesion_in_two_published_splits_is_said(tmp_path: Path) -> None:
    for number, folder in enumerate(("train/MEL", "train/MEL", "test/MEL", "test/MEL")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / folder / f"{number}.png")
    write(tmp_path, "lesions.csv", "image,lesion_id\n0,A\n1,B\n2,A\n3,C\n")
    said = said_of(scan_of(tmp_path))
    assert any(line.startswith("WARNING: 1 lesions are in more than one") for line in said)


def test_near_duplicates_are_counted_across_the_split_and_kept_together_on_demand(tmp_path: Path) -> None:
    """Turned, smaller and compressed, a photograph is still the same one."""
    for label in ("MEL", "NV"):
        (tmp_path / label).mkdir()
    for number in range(40):
        label = "MEL" if number % 2 else "NV"
        picture(number).save(tmp_path / label / f"{number}.png")
        copy = picture(number).transpose(Image.Transpose.ROTATE_90).resize((72, 72), Image.Resampling.BICUBIC)
        copy.save(tmp_path / label / f"copy_{number}.jpg", quality=90)
    apart = scan_of(tmp_path)
    splits = {row["image_id"]: row["split"] for row in apart.to_pylist()}
    torn = sum(splits[str(number)] != splits[f"copy_{number}"] for number in range(40))
    assert torn > 0
    assert any(line.startswith(f"WARNING: {torn} pairs of near-duplicates") for line in said_of(apart))
    together = scan_of(tmp_path, group_near_duplicates=True)
    lesions = {row["image_id"]: (row["lesion_id"], row["split"]) for row in together.to_pylist()}
    assert all(lesions[str(number)] == lesions[f"copy_{number}"] for number in range(40))
    assert len(set(lesions.values())) == 40
    assert not any("near-duplicates" in line for line in said_of(together))


def test_near_duplicates_of_two_classes_are_said(tmp_path: Path) -> None:
    for label, image_format in (("MEL", "png"), ("NV", "jpg")):
        (tmp_path / label).mkdir()
        picture(0).save(tmp_path / label / f"a.{image_format}")
    assert any("have different labels, MEL/a.png and NV/a.jpg" in line for line in said_of(scan_of(tmp_path)))


@pytest.mark.skipif(not HAM10000.is_dir(), reason="../shared/ham10000 is not here")
@pytest.mark.parametrize("layout", ["ham10000", "isic2018"])
def test_ham10000_in_its_published_layouts_gives_the_catalog_of_its_class_folders(tmp_path: Path, layout: str) -> None:
    with (HAM10000 / "metadata.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if int(row["lesion_id"].rpartition("_")[2]) % 40 == 0]
    folders = tmp_path / "folders"
    for number, row in enumerate(rows):
        image = HAM10000 / row["class"] / f"{row['image_id']}.jpg"
        place = "ISIC2018_Task3_Training_Input" if layout == "isic2018" else f"HAM10000_images_part_{1 + number % 2}"
        for folder in (folders / row["class"], tmp_path / "published" / place):
            folder.mkdir(parents=True, exist_ok=True)
            os.link(image, folder / image.name) if same_disk(image, tmp_path) else shutil.copy(image, folder)
    lesions = "".join(f"{row['image_id']},{row['lesion_id']}\n" for row in rows)
    write(folders, "metadata.csv", f"image_id,lesion_id\n{lesions}")
    if layout == "ham10000":
        table = [f"{row['lesion_id']},{row['image_id']},{row['class'].lower()},{row['dx_type']},,," for row in rows]
        write(tmp_path / "published", "HAM10000_metadata.csv", "\n".join([HAM.partition("\n")[0], *table]))
    else:
        codes = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
        table = [
            ",".join([row["image_id"], *("1.0" if code == row["class"] else "0.0" for code in codes)]) for row in rows
        ]
        write(tmp_path / "published", "ISIC2018_GroundTruth.csv", "\n".join([",".join(["image", *codes]), *table]))
        write(tmp_path / "published", "ISIC2018_Task3_Training_LesionGroupings.csv", f"image,lesion_id\n{lesions}")
    expected, found = scan_of(folders), scan_of(tmp_path / "published")
    assert len(found) == len(rows) > 150
    columns = ["image_id", "label", "lesion_id", "split", "sha256"]
    assert sorted(found.select(columns).to_pylist(), key=str) == sorted(expected.select(columns).to_pylist(), key=str)


def same_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


# --- shards -----------------------------------------------------------------------------------------------------------


def test_parquet_of_hugging_face_is_unpacked_with_its_bytes_and_label_names(tmp_path: Path) -> None:
    encoded = [encode(picture(number), kind) for number, kind in enumerate(("JPEG", "PNG", "JPEG"))]
    features = {"image": {"_type": "Image"}, "label": {"names": ["melanoma", "nevus"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": [
                {"bytes": one, "path": path} for one, path in zip(encoded, ("a.jpg", None, "a.jpg"), strict=True)
            ],
            "label": [0, 1, 1],
            "lesion_id": ["L1", "L2", "L1"],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    root = tmp_path / "files"
    with pytest.raises(DataError, match="--import_from"):
        read(tmp_path / "hub")
    assert import_shards(str(tmp_path / "hub"), str(root)) == 3
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.???")}
    assert import_shards(str(tmp_path / "hub"), str(root)) == 3
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.???") if path.name != "metadata.csv"}.items() <= (
        before.items()
    )
    layout = read(root)
    assert sorted((root / entry.path).read_bytes() for entry in layout.entries) == sorted(encoded)
    assert sorted((str(entry.label), sorted(entry.lesions)) for entry in layout.entries) == [
        ("MEL", ["L1"]),
        ("NV", ["L1"]),
        ("NV", ["L2"]),
    ]


@pytest.mark.parametrize("format_name", ["webdataset", "parquet"])
def test_generated_shards_are_unpacked_with_their_bytes(tmp_path: Path, format_name: str) -> None:
    settings = {"solver": "heun", "steps": 2, "guidance_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0}
    images = [
        (PlanRow(id=f"{code}_{n}", label=code, index=n, seed=n, **settings), encode(picture(n), "PNG"))  # type: ignore[arg-type]
        for n, code in enumerate(("MEL", "NV", "DF"))
    ]
    (tmp_path / "made").mkdir()
    write_images(tmp_path / "made", format_name, "group", images)
    assert import_shards(str(tmp_path / "made"), str(tmp_path / "files")) == 3
    layout = read(tmp_path / "files")
    found = {entry.path.rpartition("/")[2]: entry.label for entry in layout.entries}
    assert found == {f"{row.id}.png": row.label for row, _ in images}
    assert all((tmp_path / "files" / "images" / f"{row.id}.png").read_bytes() == png for row, png in images)


def test_an_image_folder_of_hugging_face_names_its_files_in_json_lines(tmp_path: Path) -> None:
    make(tmp_path, "train/1.jpg", "train/2.jpg")
    lines = [{"file_name": "1.jpg", "label": "melanoma"}, {"file_name": "2.jpg", "label": "nevus", "lesion_id": "L"}]
    write(tmp_path, "train/metadata.jsonl", "\n".join(map(json.dumps, lines)))
    layout = read(tmp_path)
    assert [(entry.path, entry.label, entry.lesions) for entry in layout.entries] == [
        ("train/1.jpg", "MEL", set()),
        ("train/2.jpg", "NV", {"L"}),
    ]


def test_shards_that_cannot_be_unpacked_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.parquet and no \.tar"):
        import_shards(str(tmp_path), str(tmp_path / "files"))
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be unpacked"):
        import_shards(str(tmp_path), str(tmp_path / "files"))
    (tmp_path / "broken.tar").unlink()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet has no column of images; found: a"):
        import_shards(str(tmp_path), str(tmp_path / "files"))


def encode(image: Image.Image, image_format: str) -> bytes:
    written = io.BytesIO()
    image.save(written, image_format)
    return written.getvalue()
