"""Datasets as they are published, from the scan to the report: each is trained for two steps, filled up and evaluated.

m2d.data.layouts itself is tested in tests/data/test_layouts.py; here everything behind it has to follow, with two
classes as with eleven.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_run import TINY

from m2d.classes import BINARY, ISIC7, ISIC8, MILK11, ClassSet
from m2d.cli import main
from m2d.models.checkpoint import read_info

Built = dict[str, int]  # images by class code


def photograph(path: Path, seed: int) -> None:
    """32 x 32, smooth, and none like another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 255, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(cells).resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=95)


def spread(classes: ClassSet, most: int) -> Built:
    """most images of the last class, and fewer of the others; each lesion has two."""
    return {code: most if code == classes.codes[-1] else 6 for code in classes.codes}


def ham10000(root: Path) -> Built:
    counts, rows = spread(ISIC7, 10), ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for number, code in enumerate(code for code, count in counts.items() for _ in range(count)):
        photograph(root / f"HAM10000_images_part_{1 + number % 2}" / f"ISIC_{number:07d}.jpg", number)
        rows.append(f"HAM_{number // 2},ISIC_{number:07d},{code.lower()},histo,50.0,male,trunk")
    (root / "HAM10000_metadata").write_text("\n".join(rows))
    return counts


def isic2019(root: Path) -> Built:
    counts = spread(ISIC8, 10)
    columns = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    truth, metadata = [",".join(["image", *columns])], ["image,age_approx,anatom_site_general,lesion_id,sex"]
    for number, code in enumerate(code for code, count in counts.items() for _ in range(count)):
        name = f"ISIC_{number:07d}_downsampled"
        photograph(root / "ISIC_2019_Training_Input" / f"{name}.jpg", number)
        hot = "AK" if code == "AKIEC" else code
        truth.append(",".join([name, *("1.0" if column == hot else "0.0" for column in columns)]))
        metadata.append(f"{name},55.0,anterior torso,BCN_{number // 2},female")
    (root / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(truth))
    (root / "ISIC_2019_Training_Metadata.csv").write_text("\n".join(metadata))
    return counts


def isic2020(root: Path) -> Built:
    """No lesion is named, so each image is one."""
    counts = {"BENIGN": 24, "MALIGNANT": 8}
    rows = ["image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"]
    for number in range(32):
        photograph(root / "train" / f"ISIC_{number:07d}.jpg", number)
        malignant = number % 4 == 0
        word = "malignant" if malignant else "benign"
        rows.append(f"ISIC_{number:07d},IP_{number},male,45.0,torso,unknown,{word},{int(malignant)}")
    (root / "train.csv").write_text("\n".join(rows))
    return counts


def milk10k(root: Path) -> Built:
    counts = dict.fromkeys(MILK11.codes, 4)
    truth = [",".join(["lesion_id", *MILK11.codes])]
    metadata = ["lesion_id,image_type,isic_id,age_approx,sex,skin_tone_class,site"]
    for number, code in enumerate(code for code, count in counts.items() for _ in range(count)):
        truth.append(",".join([f"IL_{number}", *("1.0" if one == code else "0.0" for one in MILK11.codes)]))
        for kind in ("clinical: close-up", "dermoscopic"):
            name = f"ISIC_{number:07d}{kind[0]}"
            photograph(root / "MILK10k_Training_Input" / f"IL_{number}" / f"{name}.jpg", 2 * number + (kind[0] == "d"))
            metadata.append(f"IL_{number},{kind},{name},70,male,3,trunk")
    (root / "MILK10k_Training_GroundTruth.csv").write_text("\n".join(truth))
    (root / "MILK10k_Training_Metadata.csv").write_text("\n".join(metadata))
    return counts


@pytest.mark.parametrize(
    ("build", "classes", "lesions"),
    [
        (isic2019, ISIC8, "26 lesions"),
        (isic2020, BINARY, "no table names them"),
        (ham10000, ISIC7, "23 lesions"),
        (milk10k, MILK11, "44 lesions"),
    ],
)
def test_a_published_dataset_is_trained_on_filled_up_and_evaluated_without_a_flag(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    build: Callable[[Path], Built],
    classes: ClassSet,
    lesions: str,
) -> None:
    root = tmp_path / "data"
    counts = build(root)
    places = ["--data_root", str(root), "--cache_dir", str(tmp_path / "cache")]
    main("setup_data", ["--scan", *places, "--data.image_size", "16"])
    told = capsys.readouterr().out
    assert f"{sum(counts.values())} of {sum(counts.values())} images" in told or "left out" in told
    assert lesions in told

    runs = tmp_path / "experiments"
    main("train", [*places, "--experiments_dir", str(runs), "--num_workers", "0", "--max_steps", "2", *TINY])
    (checkpoint,) = runs.glob("*/checkpoints/best")
    assert read_info(checkpoint).classes == classes
    assert lesions in capsys.readouterr().out

    fill = ["--mode", "balance", "--to", "max", "--steps", "2", "--num_actors", "0", "--device", "cpu"]
    gates = ["--gates.class_consistency", "false", "--gates.max_attempts", "1", "--feature", "none"]
    made = tmp_path / "made"
    main(
        "generate",
        [
            "--checkpoint",
            str(checkpoint),
            "--data_root",
            str(root),
            *fill,
            *gates,
            "--output",
            str(made),
            "--plan_only",
        ],
    )
    plan = pq.read_table(next(made.glob("*.parquet")))["class"].to_pylist()
    most = max(counts.values())
    assert {code: plan.count(code) for code in classes.codes} == {code: most - count for code, count in counts.items()}

    samples = ["--num_samples", "4", "--steps", "2", "--num_actors", "0", "--device", "cpu", "--feature", "none"]
    off = ["--gates.blank", "false", "--gates.near_copy", "false", "--gates.class_consistency", "false"]
    drawn = tmp_path / "drawn"
    main("generate", ["--checkpoint", str(checkpoint), *samples, *off, "--output", str(drawn)])
    assert {path.name for path in drawn.iterdir() if path.is_dir() and not path.name.startswith(".")} >= set(counts)
    assert (drawn / "contact_sheet.png").is_file()

    judged = tmp_path / "evaluation"
    small = ["--c", "0.1", "--bootstrap", "100", "--seeds", "1", "--feature_extractor.input_size", "32"]
    main(
        "evaluate",
        ["--real", str(root), "--generated", str(drawn), "--cache_dir", str(tmp_path / "cache"), *small,
         "--independent_extractor.input_size", "32", "--num_actors", "0", "--device", "cpu", "--data.test_fraction",
         "0.4", "--data.val_fraction", "0", "--output", str(judged)],
    )  # fmt: skip
    evaluation = json.loads(next(judged.rglob("evaluation.json")).read_text())
    assert evaluation["images"][2]["images"] == dict.fromkeys(classes.codes, 4)
    assert any(lesions in note for note in evaluation["notes"]) == lesions.startswith("no table")
    assert next(judged.rglob("*.html")).is_file()
