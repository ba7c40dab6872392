"""Generated images become an image folder that Hugging Face `datasets` reads, with a data sheet."""

import csv
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m2d.cli import main

GENERATED = Path(__file__).parents[1] / "fixtures" / "before" / "generated"  # three images of each class


def test_images_labels_and_a_data_sheet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    main("export", [str(GENERATED), "--to", str(out), "--title", "A set", "--data_license", "CC-BY-NC-4.0"])
    manifest = pq.read_table(GENERATED / "manifest.parquet").to_pylist()
    with (out / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["file_name"], row["label"], row["seed"]) for row in rows} == {
        (row["path"], row["class"], str(row["seed"])) for row in manifest if row["path"]
    }
    for row in rows:
        assert (out / row["file_name"]).read_bytes() == (GENERATED / row["file_name"]).read_bytes()
    sheet = (out / "README.md").read_text()
    made = [row["class"] for row in manifest if row["path"]]
    for line in (
        "# A set",
        "| begun | 21 from noise |",
        f"| MEL | {made.count('MEL')} |",
        "| solver | unipc, 4 steps, guidance 1.5 |",
        "| gates | blank, near_copy:features, near_copy:pixels |",
    ):
        assert line in sheet.splitlines()
    assert "they show no patient" in sheet
    assert "lesion_id" not in sheet
    assert "Not evaluated" in sheet
    assert "CC-BY-NC-4.0" in sheet
    assert str(tmp_path) not in sheet
    files = json.loads((out / "complete.json").read_text())["files"]
    assert set(files) == {"metadata.csv", "README.md", *(row["file_name"] for row in rows)}


def test_the_sheet_tells_which_images_began_from_real_ones(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GENERATED, tmp_path / "generated"))
    rows = pq.read_table(copy / "manifest.parquet").to_pylist()
    for number, row in enumerate(row for row in rows if row["class"] == "DF"):
        row.update(mode="image2image", strength=0.3 + number / 10, feature="reference")
        row["lesion_id"], row["skin_lesion_id"] = f"HAM_{number}", "HAM_7"
    columns = {name: [row.get(name) for row in rows] for name in [*rows[0], "lesion_id", "skin_lesion_id"]}
    pq.write_table(pa.table(columns), copy / "manifest.parquet")
    main("export", [str(copy), "--to", str(tmp_path / "out")])
    with (tmp_path / "out" / "metadata.csv").open(newline="") as file:
        told = {(row["label"], row["lesion_id"], row["skin_lesion_id"]) for row in csv.DictReader(file)}
    assert {one for one in told if one[0] == "DF"} == {("DF", f"HAM_{number}", "HAM_7") for number in range(3)}
    assert {one[1:] for one in told if one[0] != "DF"} == {("", "")}
    sheet = (tmp_path / "out" / "README.md").read_text()
    assert "| begun | 3 from a real image, noised to strength 0.3..0.5; 18 from noise |" in sheet
    assert "| guided by | the class and a feature (prior, reference) |" in sheet
    assert "Those that began from a real image look like it" in sheet
    assert "3 of them are variations of patients' images" in sheet
    assert "they show no patient" not in sheet
    assert "keep an image on the side of every split that these are on" in sheet
    assert "| inpainted | 3 show a lesion" in sheet


@pytest.mark.parametrize(
    ("rule", "said"), [("classifier", "is as sure of as of half of these"), ("random", "at random")]
)
def test_the_sheet_tells_how_images_were_picked(tmp_path: Path, rule: str, said: str) -> None:
    """As `evaluate pick` leaves them, of a pick that is picked from."""
    copy = Path(shutil.copytree(GENERATED, tmp_path / "generated"))
    picks = [
        {"rule": rule, "extractor": extractor, "classes": {"DF": {"kept": 2}, "MEL": {"kept": 1}}}
        for extractor in ("efficientnet-lite2-0", "efficientnet-lite2-1")
    ]
    record = json.loads((copy / "generation.json").read_text())
    (copy / "generation.json").write_text(json.dumps({"recipe": record, "pick": picks}))
    manifest = pq.read_table(copy / "manifest.parquet")
    manifest = manifest.append_column("pick_rule", [[rule] * len(manifest)])
    pq.write_table(manifest, copy / "manifest.parquet")
    main("export", [str(copy), "--to", str(tmp_path / "out")])
    lines = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "picked" in line]
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert said in line
        assert line.endswith(f": 3, with efficientnet-lite2-{number} |")
    with (tmp_path / "out" / "metadata.csv").open(newline="") as file:
        assert {row["pick_rule"] for row in csv.DictReader(file)} == {rule}


def test_signed_images_bring_their_certificates(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GENERATED, tmp_path / "generated"))
    (copy / "certificates.pem").write_text("certificates")
    (copy / ".signing_key.pem").write_text("key")
    record = json.loads((copy / "generation.json").read_text())
    (copy / "generation.json").write_text(json.dumps(record | {"sign": "self-made"}))
    main("export", [str(copy), "--to", str(tmp_path / "out")])
    assert (tmp_path / "out" / "certificates.pem").read_text() == "certificates"
    assert not (tmp_path / "out" / ".signing_key.pem").exists()
    assert "| signed by | a self-made certificate" in (tmp_path / "out" / "README.md").read_text()


def test_a_lost_image_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(GENERATED, tmp_path / "generated"))
    next((copy / "MEL").glob("*.png")).unlink()
    with pytest.raises(SystemExit):
        main("export", [str(copy), "--to", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "cannot be read" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"view": 3}, "flipped and turned"), ({"mode": "image2image", "strength": 0.0}, "through the autoencoder")],
)
def test_real_images_are_not_exported_as_synthetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, object], said: str
) -> None:
    copy = Path(shutil.copytree(GENERATED, tmp_path / "generated"))
    rows = pq.read_table(copy / "manifest.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([row | facts for row in rows]), copy / "manifest.parquet")
    with pytest.raises(SystemExit):
        main("export", [str(copy), "--to", str(tmp_path / "out")])
    assert re.search(rf"holds real images, [^\n]*{said}", capsys.readouterr().err)
