"""Datasets as they are published, from the scan to the report: each is trained for two steps, filled up and evaluated.

m2d.data.layouts itself is tested in tests/data/test_layouts.py; here everything behind it has to follow, with two
classes as with eleven. Each dataset has six images of a class and ten of the last one, a lesion for every two.
"""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_run import TINY

from m2d.classes import BINARY, ISIC7, ISIC8, MILK11, ClassSet
from m2d.cli import main
from m2d.models.checkpoint import read_info

THREE = ("MEL", "BKL", "NV")  # of isic7, which ISIC 2017 has
Rows = list[list[str]]


def photograph(seed: int) -> bytes:
    """JPEG, 32 x 32, smooth, and none like another."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 5, 3)).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(cells).resize((32, 32), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def images(codes: tuple[str, ...]) -> Iterator[tuple[int, str, str]]:
    """(number, name, class) of every image of a dataset."""
    all_codes = [code for code in codes for _ in range(10 if code == codes[-1] else 6)]
    for number, code in enumerate(all_codes):
        yield number, f"ISIC_{number:07d}", code


def table(path: Path, header: str, rows: Rows, delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header.split(","), *rows] if header else rows)


def hot(code: str, columns: str) -> list[str]:
    return ["1.0" if column == code else "0.0" for column in columns.split(",")]


def ham10000(root: Path) -> None:
    rows = []
    for number, name, code in images(ISIC7.codes):
        put(root / f"HAM10000_images_part_{1 + number % 2}" / f"{name}.jpg", photograph(number))
        rows.append([f"HAM_{number // 2}", name, code.lower(), "histo", "50.0", "male", "trunk"])
    table(root / "HAM10000_metadata", "lesion_id,image_id,dx,dx_type,age,sex,localization", rows, "\t")


def isic2018(root: Path) -> None:
    columns, truth, groups = "MEL,NV,BCC,AKIEC,BKL,DF,VASC", [], []
    for number, name, code in images(ISIC7.codes):
        put(root / "ISIC2018_Task3_Training_Input" / f"{name}.jpg", photograph(number))
        truth.append([name, *hot(code, columns)])
        groups.append([name, f"HAM_{number // 2}", "histopathology"])
    folder = root / "ISIC2018_Task3_Training_GroundTruth"
    table(folder / "ISIC2018_Task3_Training_GroundTruth.csv", f"image,{columns}", truth)
    table(root / "ISIC2018_Task3_Training_LesionGroupings.csv", "image,lesion_id,diagnosis_confirm_type", groups)


def isic2019(root: Path) -> None:
    columns, truth, metadata = "MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", [], []
    for number, name, code in images(ISIC8.codes):
        put(root / "ISIC_2019_Training_Input" / f"{name}_downsampled.jpg", photograph(number))
        truth.append([f"{name}_downsampled", *hot("AK" if code == "AKIEC" else code, columns)])
        metadata.append([name, "55.0", "anterior torso", f"BCN_{number // 2}", "female"])
    table(root / "ISIC_2019_Training_GroundTruth.csv", f"image,{columns}", truth)
    table(root / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", metadata)


def isic2016(root: Path) -> None:
    """No header, and no lesion is named."""
    rows = []
    for number, name, code in images(BINARY.codes):
        put(root / "ISBI2016_ISIC_Part3_Training_Data" / f"{name}.jpg", photograph(number))
        put(root / "ISBI2016_ISIC_Part3_Training_Data" / f"{name}_Segmentation.png", b"")
        rows.append([name, code.lower()])
    table(root / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv", "", rows)


def isic2017(root: Path) -> None:
    rows = []
    for number, name, code in images(THREE):
        put(root / "ISIC-2017_Training_Data" / f"{name}.jpg", photograph(number))
        rows.append([name, str(float(code == "MEL")), str(float(code == "BKL"))])
    table(root / "ISIC-2017_Training_Part3_GroundTruth.csv", "image_id,melanoma,seborrheic_keratosis", rows)


def isic2020(root: Path) -> None:
    rows = []
    for number, name, code in images(BINARY.codes):
        put(root / "train" / f"{name}.jpg", photograph(number))
        target = str(int(code == "MALIGNANT"))
        rows.append([name, f"IP_{number}", "male", "45.0", "torso", "unknown", code.lower(), target])
    header = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
    table(root / "train.csv", header, rows)


def isic2024(root: Path) -> None:
    rows = []
    for number, name, code in images(BINARY.codes):
        put(root / "image" / f"{name}.jpg", photograph(number))
        rows.append([name, str(int(code == "MALIGNANT")), f"IP_{number}", "TBP tile: close-up", f"IL_{number // 2}"])
    table(root / "train-metadata.csv", "isic_id,target,patient_id,image_type,lesion_id", rows)


def milk10k(root: Path) -> None:
    truth, metadata = [], []
    for number, name, code in images(MILK11.codes):
        truth.append([f"IL_{number}", *hot(code, ",".join(MILK11.codes))])
        for place, kind in enumerate(("clinical: close-up", "dermoscopic")):
            put(root / "MILK10k_Training_Input" / f"IL_{number}" / f"{name}{place}.jpg", photograph(2 * number + place))
            metadata.append([f"IL_{number}", kind, f"{name}{place}", "70", "male", "3", "trunk"])
    table(root / "MILK10k_Training_GroundTruth.csv", f"lesion_id,{','.join(MILK11.codes)}", truth)
    header = "lesion_id,image_type,isic_id,age_approx,sex,skin_tone_class,site"
    table(root / "MILK10k_Training_Metadata.csv", header, metadata)


TAXONOMY = {
    "AKIEC": "Solar or actinic keratosis", "BCC": "Basal cell carcinoma", "BKL": "Pigmented benign keratosis",
    "DF": "Dermatofibroma", "MEL": "Melanoma Invasive", "NV": "Nevus", "VASC": "Angiokeratoma",
}  # fmt: skip


def isic_cli(root: Path) -> None:
    rows = []
    for number, name, code in images(ISIC7.codes):
        put(root / f"{name}.jpg", photograph(number))
        rows.append([name, "A, B", "CC-BY", "Benign", "", TAXONOMY[code], "dermoscopic", f"IL_{number // 2}"])
    header = "isic_id,attribution,copyright_license,diagnosis_1,diagnosis_2,diagnosis_3,image_type,lesion_id"
    table(root / "metadata.csv", header, rows)


def isic_cli_before_2024(root: Path) -> None:
    rows = []
    for number, name, code in images(ISIC7.codes):
        put(root / f"{name}.jpg", photograph(number))
        word = "melanoma" if code == "MEL" else TAXONOMY[code].lower().removeprefix("solar or ")
        rows.append([name, "benign", word, f"IL_{number // 2}"])
    table(root / "metadata.csv", "isic_id,benign_malignant,diagnosis,lesion_id", rows)


def class_folders_with_a_split(root: Path) -> None:
    for number, name, code in images(ISIC7.codes):
        put(root / ("test" if number % 3 == 0 else "train") / code / f"{name}.jpg", photograph(number))


def hugging_face_folder(root: Path) -> None:
    lines = []
    for number, name, code in images(ISIC7.codes):
        put(root / "train" / f"{name}.jpg", photograph(number))
        lines.append(json.dumps({"file_name": f"{name}.jpg", "label": code, "lesion_id": f"L{number // 2}"}))
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))


def own_table(root: Path) -> None:
    rows = []
    for number, name, code in images(ISIC7.codes):
        put(root / "serial" / f"{name}.jpg", photograph(number))
        rows.append([name, ISIC7.names[code], str(number // 2)])
    table(root.parent / "list.csv", "Nr,Befund,Herd", rows, ";")


def parquet(root: Path) -> None:
    rows = list(images(ISIC7.codes))
    columns = {
        "image": [{"bytes": photograph(number), "path": f"{name}.jpg"} for number, name, _ in rows],
        "label": [code for _, _, code in rows],
        "lesion_id": [f"L{number // 2}" for number, _, _ in rows],
    }
    (root.parent / "shards").mkdir()
    pq.write_table(pa.table(columns), root.parent / "shards" / "train-00000-of-00001.parquet")


def webdataset(root: Path) -> None:
    (root.parent / "shards").mkdir()
    with tarfile.open(root.parent / "shards" / "000000.tar", "w") as tar:
        for number, name, code in images(ISIC7.codes):
            facts = json.dumps({"class": code, "lesion_id": f"L{number // 2}"}).encode()
            for suffix, content in (("jpg", photograph(number)), ("json", facts)):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


NO_TABLE = "no table names them"
TABLE = ["--data.table", "list.csv", "--data.columns.image", "Nr", "--data.columns.label", "Befund"]
SHARDS = ["--import_from", "shards"]


@pytest.mark.parametrize(
    ("build", "classes", "lesions", "flags"),
    [
        (ham10000, ISIC7, "23 lesions", []),
        (isic2019, ISIC8, "26 lesions", []),
        (isic2020, BINARY, NO_TABLE, []),
        (milk10k, MILK11, "70 lesions", []),
        *(
            pytest.param(*one, marks=pytest.mark.exhaustive)
            for one in (
                (isic2016, BINARY, NO_TABLE, []),
                (isic2017, ISIC7, NO_TABLE, []),
                (isic2018, ISIC7, "23 lesions", []),
                (isic2024, BINARY, "8 lesions", []),
                (isic_cli, ISIC7, "23 lesions", []),
                (isic_cli_before_2024, ISIC7, "23 lesions", []),
                (class_folders_with_a_split, ISIC7, NO_TABLE, []),
                (hugging_face_folder, ISIC7, "23 lesions", []),
                (own_table, ISIC7, "23 lesions", [*TABLE, "--data.columns.lesion", "Herd"]),
                (parquet, ISIC7, "23 lesions", SHARDS),
                (webdataset, ISIC7, "23 lesions", SHARDS),
            )
        ),
    ],
)
def test_a_dataset_is_trained_on_filled_up_and_evaluated_as_it_is_published(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    build: Callable[[Path], None],
    classes: ClassSet,
    lesions: str,
    flags: list[str],
) -> None:
    root = tmp_path / "data"
    build(root)
    monkeypatch.chdir(tmp_path)
    counts = dict.fromkeys(classes.codes, 0)
    for _, _, code in images(THREE if build is isic2017 else classes.codes):
        counts[code] += 1
    total, present = sum(counts.values()), [code for code, count in counts.items() if count]
    of_data = [] if flags == SHARDS else flags
    cache = ["--cache_dir", "cache"]
    main("setup_data", ["--scan", "--data_root", "data", *cache, "--data.image_size", "16", *flags])
    told = capsys.readouterr().out
    assert f"{total} of {total} images" in told or build is class_folders_with_a_split
    assert f"scan: {total} images (" + " ".join(f"{code} {count}" for code, count in counts.items()) in told
    assert lesions in told

    places = ["--data_root", "data", *cache, "--experiments_dir", "runs", *of_data]
    main("train", [*places, "--num_workers", "0", "--max_steps", "2", *TINY])
    assert lesions in capsys.readouterr().out
    (checkpoint,) = Path("runs").glob("*/checkpoints/best")
    assert read_info(checkpoint).classes == classes

    draw = [
        "--checkpoint",
        str(checkpoint),
        "--steps",
        "2",
        "--num_actors",
        "0",
        "--device",
        "cpu",
        "--feature",
        "none",
    ]
    main("generate", [*draw, "--mode", "balance", "--data_root", "data", "--output", "plan", "--plan_only"])
    plan = pq.read_table("plan/plan.parquet")["class"].to_pylist()
    assert {code: plan.count(code) for code in present} == {code: 10 - counts[code] for code in present}

    off = ["--gates.blank", "false", "--gates.near_copy", "false", "--gates.class_consistency", "false"]
    main("generate", [*draw, *off, "--num_samples", "4", "--classes", ",".join(present), "--output", "drawn"])
    assert {path.parent.name for path in Path("drawn").glob("*/*.png")} == set(present)
    assert Path("drawn/contact_sheet.png").is_file()

    small = ["--c", "0.1", "--bootstrap", "100", "--seeds", "1", "--feature_extractor.input_size", "32"]
    split = ["--independent_extractor.input_size", "32", "--data.test_fraction", "0.4", "--data.val_fraction", "0"]
    here = ["--num_actors", "0", "--device", "cpu", "--output", "judged"]
    if classes != BINARY:  # it is judged in all parts
        here += ["--parts", "fidelity,consistency"]
    main("evaluate", ["--real", "data", "--generated", "drawn", *cache, *small, *split, *here, *of_data])
    evaluation = json.loads(Path("judged/evaluation.json").read_text())
    assert evaluation["images"][2]["images"] == dict.fromkeys(present, 4)
    assert any(lesions in note for note in evaluation["notes"]) == (lesions == NO_TABLE)
    assert Path("judged/evaluation.html").is_file()
