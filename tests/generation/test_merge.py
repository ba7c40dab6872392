"""The index over real and synthetic images: who stands in it, in which split, and that its paths lead somewhere."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from m2d.data.catalog import CATALOG_SCHEMA
from m2d.errors import ConfigError, DataError
from m2d.generation.merge import INDEX_SCHEMA, write_merged_index

REAL = [("a", "DF", "L1", "train"), ("b", "DF", "L2", "val"), ("c", "NV", "L3", "test"), ("d", "NV", "L4", "train")]


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[str, pa.Table]:
    root = tmp_path / "real"
    rows = []
    for image_id, label, lesion, split in REAL:
        path = root / label / f"{image_id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"pixels of {image_id}".encode())
        rows.append(
            {
                "image_id": image_id,
                "path": f"{label}/{image_id}.jpg",
                "label": label,
                "lesion_id": lesion,
                "width": 8,
                "height": 8,
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "split": split,
            }
        )
    return str(root), pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)


def write_manifest(folder: Path, *references: str | None) -> Path:
    """DF_000000 and so on, made from these."""
    rows: list[dict[str, Any]] = []
    for index, reference in enumerate(references):
        path = folder / "DF" / f"DF_{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"synthetic {index}".encode())
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append({"id": path.stem, "path": f"DF/{path.name}", "sha256": sha256, "reference": reference})
        rows[-1] |= {"class": "DF", "reference_b": None}
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    manifest = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), manifest)
    return manifest


def test_real_images_keep_their_split_synthetic_ones_train_and_every_path_leads_to_its_file(
    dataset: tuple[str, pa.Table], tmp_path: Path
) -> None:
    index = tmp_path / "merged.parquet"
    assert write_merged_index(*dataset, write_manifest(tmp_path / "out", None, None), index) == []
    rows = {row["image_id"]: row for row in pq.read_table(index).to_pylist()}
    assert {image_id: (row["class"], row["split"], row["source"]) for image_id, row in rows.items()} == {
        "a": ("DF", "train", "real"),
        "b": ("DF", "val", "real"),
        "c": ("NV", "test", "real"),
        "d": ("NV", "train", "real"),
        "DF_000000": ("DF", "train", "synthetic"),
        "DF_000001": ("DF", "train", "synthetic"),
    }
    assert len({rows[image_id]["lesion_id"] for image_id in rows}) == 6
    for row in rows.values():
        content = (Path(row["root"]) / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    as_text = pa_csv.ConvertOptions(column_types=INDEX_SCHEMA)
    assert pa_csv.read_csv(index.with_suffix(".csv"), convert_options=as_text).equals(pq.read_table(index))


def test_what_was_made_from_a_val_or_test_image_is_left_out(dataset: tuple[str, pa.Table], tmp_path: Path) -> None:
    root, catalog = dataset
    copied = tmp_path / "references" / "renamed.jpg"
    copied.parent.mkdir()
    shutil.copy(f"{root}/NV/c.jpg", copied)
    manifest = write_manifest(tmp_path / "out", f"{root}/DF/a.jpg", f"{root}/DF/b.jpg", str(copied), None)
    index = tmp_path / "merged.parquet"
    assert write_merged_index(root, catalog, manifest, index) == ["DF_000001", "DF_000002"]
    lesions = {row["image_id"]: row["lesion_id"] for row in pq.read_table(index).to_pylist()}
    assert lesions["DF_000000"] == "L1"  # stays in one group with the image that it was made from
    assert "DF_000003" in lesions


def test_a_variation_of_an_image_that_is_not_found_keeps_its_manifests_lesion(
    dataset: tuple[str, pa.Table], tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "out", "s3://bucket/DF/a.jpg", None)
    table = pq.read_table(manifest)
    pq.write_table(table.append_column("lesion_id", pa.array(["L1", None])), manifest)
    write_merged_index(*dataset, manifest, tmp_path / "merged.parquet")
    lesions = {row["image_id"]: row["lesion_id"] for row in pq.read_table(tmp_path / "merged.parquet").to_pylist()}
    assert (lesions["DF_000000"], lesions["DF_000001"]) == ("L1", "synthetic/DF_000001")


def test_flipped_real_images_are_not_called_synthetic(
    dataset: tuple[str, pa.Table], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "out", f"{dataset[0]}/DF/a.jpg", None)
    pq.write_table(pq.read_table(manifest).append_column("view", pa.array([3, None])), manifest)
    write_merged_index(*dataset, manifest, tmp_path / "merged.parquet")
    kinds = {row["image_id"]: row["source"] for row in pq.read_table(tmp_path / "merged.parquet").to_pylist()}
    assert (kinds["DF_000000"], kinds["DF_000001"]) == ("flipped", "synthetic")
    assert "4 real and 1 flipped and 1 synthetic images" in capsys.readouterr().out


def test_a_manifest_that_is_none_is_refused_in_one_line(dataset: tuple[str, pa.Table], tmp_path: Path) -> None:
    foreign, broken = tmp_path / "foreign.parquet", tmp_path / "broken.parquet"
    pq.write_table(pa.table({"id": ["x"]}), foreign)
    broken.write_bytes(b"not Parquet")
    for manifest in (foreign, broken, tmp_path / "absent.parquet"):
        with pytest.raises(DataError, match=r"^manifest: [^\n]+$"):
            write_merged_index(*dataset, manifest, tmp_path / "merged.parquet")
    twice = pq.read_table(write_manifest(tmp_path / "out", None))
    pq.write_table(pa.concat_tables([twice, twice]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="DF_000000 twice"):
        write_merged_index(*dataset, tmp_path / "twice.parquet", tmp_path / "merged.parquet")


def test_a_place_that_cannot_be_written_is_one_line(dataset: tuple[str, pa.Table], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^output: [^\n]+$"):
        write_merged_index(*dataset, write_manifest(tmp_path / "out", None), tmp_path / "file" / "merged.parquet")
