import csv
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from m2d.classes import ISIC7
from m2d.data.catalog import (
    CATALOG_SCHEMA,
    Scan,
    catalog_hash,
    class_counts,
    read_catalog,
    scan_dataset,
    write_catalog,
    write_csv,
)
from m2d.data.settings import DataConfig
from m2d.errors import DataError

HAM10000 = Path(__file__).resolve().parents[2].parent / "shared" / "ham10000"


def encoded_image(seed: int, image_format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    """Noise of its own for each seed, so that no two images are duplicates by chance."""
    bands = {"RGB": 3, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    stream = io.BytesIO()
    Image.frombytes(mode, size, pixels.tobytes()).save(stream, image_format)
    return stream.getvalue()


def build_dataset(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def scan_of(root: Path, files: dict[str, bytes], **settings: Any) -> Scan:
    return scan_dataset(build_dataset(root, files), DataConfig(**settings))


def refusal(root: Path, files: dict[str, bytes]) -> str:
    """The one line that the scan ends with."""
    with pytest.raises(DataError) as caught:
        scan_of(root, files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pngs(*names: str) -> dict[str, bytes]:
    """Small PNGs, no two alike."""
    return {f"{name}.png": encoded_image(seed, "PNG", size=(8, 8)) for seed, name in enumerate(names)}


def paths_of(scan: Scan) -> list[str]:
    paths: list[str] = scan.catalog["path"].to_pylist()
    return paths


def reasons_of(scan: Scan) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in scan.rejected.to_pylist()}


def lesions_of(scan: Scan) -> dict[str, str]:
    return {row["path"]: row["lesion_id"] for row in scan.catalog.to_pylist()}


# --- what a scan finds ------------------------------------------------------------------------------------------------


def test_a_row_holds_the_facts_of_its_file(tmp_path: Path) -> None:
    encoded = encoded_image(0, size=(40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 9, 9)).save(turned, "JPEG", exif=exif)
    scan = scan_dataset(build_dataset(tmp_path, {"MEL/a.jpg": encoded, "NV/b.JPEG": turned.getvalue()}), DataConfig())
    assert scan.catalog.schema.remove_metadata().equals(CATALOG_SCHEMA)
    first, second = scan.catalog.to_pylist()
    assert first == {
        "image_id": "a",
        "path": "MEL/a.jpg",
        "label": "MEL",
        "lesion_id": "a",
        "width": 40,
        "height": 30,
        "bytes": len(encoded),
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "split": "train",
        "age": None,
        "sex": None,
        "site": None,
        "skin_tone": None,
    }
    assert (second["width"], second["height"]) == (30, 40)


def test_files_that_real_folders_hold(tmp_path: Path) -> None:
    """Broken files are listed with their reason and the scan goes on; what Pillow can read is taken."""
    whole = encoded_image(1, size=(200, 200))
    sixteen_bit, gif = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(sixteen_bit, "PNG")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    files = {
        "MEL/good.jpg": whole,
        "MEL/truncated.jpg": whole[: len(whole) // 2],
        "MEL/empty.png": b"",
        "NV/text.jpg": b"Thank you for your download request",
        "NV/cmyk.jpg": encoded_image(2, mode="CMYK"),
        "NV/sixteen.png": sixteen_bit.getvalue(),
        "NV/animated.gif": gif.getvalue(),
        "NV/renamed.png": gif.getvalue(),
        "NV/notes.txt": b"patient 7",
        "NV/no_suffix": whole,
        "NV/Thumbs.db": b"x",
        "NV/.DS_Store": b"x",
        "NV/._good.jpg": b"x",
        "NV/__MACOSX/good.jpg": b"x",
        ".git/HEAD": b"x",
        "README.md": b"x",
    }
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig())
    assert paths_of(scan) == ["MEL/good.jpg", "NV/cmyk.jpg", "NV/sixteen.png"]
    reasons = reasons_of(scan)
    assert list(reasons) == sorted(reasons)
    expected = {
        "MEL/truncated.jpg": "truncated",
        "MEL/empty.png": "empty",
        "NV/text.jpg": "not one of JPEG PNG BMP TIFF WEBP",
        "NV/animated.gif": "suffix .gif is not one of jpg jpeg png bmp tif tiff webp",
        "NV/renamed.png": "real format is GIF",
        "NV/notes.txt": "suffix .txt",
        "NV/no_suffix": "suffix (none)",
    }
    assert reasons.keys() == expected.keys()
    for path, part in expected.items():
        assert part in reasons[path]


def test_images_above_max_pixels_are_rejected(tmp_path: Path) -> None:
    files = pngs("MEL/small") | {"MEL/large.png": encoded_image(0, "PNG", size=(50, 40))}
    scan = scan_of(tmp_path, files, max_pixels=1999)
    assert paths_of(scan) == ["MEL/small.png"]
    assert "max_pixels" in reasons_of(scan)["MEL/large.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_rejected(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, pngs("MEL/a", "MEL/locked"))
    (tmp_path / "MEL/locked.png").chmod(0)
    assert "cannot be read" in reasons_of(scan_dataset(root, DataConfig()))["MEL/locked.png"]


def test_suffixes_and_folders_count_in_any_letter_case_and_at_any_depth(tmp_path: Path) -> None:
    formats = {"jpg": "JPEG", "JPEG": "JPEG", "Png": "PNG", "bmp": "BMP", "TIF": "TIFF", "tiff": "TIFF", "webp": "WEBP"}
    files = {f"mel/f{seed}.{suffix}": encoded_image(seed, formats[suffix]) for seed, suffix in enumerate(formats)}
    files |= {"Nv/2018/part 1/deep.png": encoded_image(50, "PNG"), "MEL/other.png": encoded_image(51, "PNG")}
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig())
    assert sorted(paths_of(scan)) == sorted(files)
    assert class_counts(scan.catalog) == dict.fromkeys(ISIC7.codes, 0) | {"MEL": len(formats) + 1, "NV": 1}


def test_rows_are_ordered_by_class_and_path(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, pngs("VASC/a", "NV/b/z", "NV/b", "NV/a", "AKIEC/z", "AKIEC/b", "MEL/10", "MEL/9"))
    scan = scan_dataset(root, DataConfig())
    order = ["AKIEC/b", "AKIEC/z", "MEL/10", "MEL/9", "NV/a", "NV/b", "NV/b/z", "VASC/a"]
    assert paths_of(scan) == [f"{name}.png" for name in order]
    for same in (root, root + "/", tmp_path.as_uri()):
        assert scan_dataset(same, DataConfig()).catalog.equals(scan.catalog)


def test_stems_that_collide_become_paths(tmp_path: Path) -> None:
    files = pngs("MEL/1", "NV/1", "NV/2", "NV/3") | {"NV/2.bmp": encoded_image(9, "BMP")}
    ids = scan_of(tmp_path, files).catalog["image_id"].to_pylist()
    assert ids == ["MEL/1.png", "NV/1.png", "NV/2.bmp", "NV/2.png", "3"]


def test_an_object_store_is_scanned_and_read_like_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's memory filesystem has keys and no real folders, as S3 and GCS do."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for key, content in {
        "MEL/sub/a.png": encoded_image(0, "PNG"),
        "NV/b.png": b"",
        "metadata.csv": b"image_id,lesion_id\na,L1\n",
    }.items():
        memory.pipe(f"/bucket/ISIC/{key}", content)
    store = fs.PyFileSystem(fs.FSSpecHandler(memory))
    monkeypatch.setattr("m2d.data.catalog.open_storage", lambda location: (store, location.removeprefix("mem:/")))
    scan = scan_dataset("mem://bucket/ISIC", DataConfig())
    assert lesions_of(scan) == {"MEL/sub/a.png": "L1"}
    assert reasons_of(scan) == {"NV/b.png": "the file is empty"}
    encoded = io.BytesIO()
    pq.write_table(scan.catalog, encoded)
    memory.pipe("/bucket/out/catalog.parquet", encoded.getvalue())
    assert read_catalog("mem://bucket/out/catalog.parquet").equals(scan.catalog)
    with pytest.raises(DataError, match="does not exist"):
        scan_dataset("mem://bucket/elsewhere", DataConfig())


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    build_dataset(tmp_path, pngs("elsewhere/a", "root/NV/b"))
    (tmp_path / "root/MEL").symlink_to(tmp_path / "elsewhere")
    assert paths_of(scan_dataset(str(tmp_path / "root"), DataConfig())) == ["MEL/a.png", "NV/b.png"]


def test_progress_counts_every_file_in_the_callers_thread(tmp_path: Path) -> None:
    calls: list[tuple[int, int, threading.Thread]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total, threading.current_thread()))

    files = pngs(*(f"NV/{number}" for number in range(6))) | {"NV/bad.png": b""}
    scan_dataset(build_dataset(tmp_path, files), DataConfig(), progress)
    assert calls == [(done, 7, threading.main_thread()) for done in range(1, 8)]


# --- folder names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["UNKNOWN", "unknown"])
def test_a_folder_of_another_name_is_its_class_if_it_is_mapped_and_an_error_otherwise(tmp_path: Path, key: str) -> None:
    files = pngs("MEL/a", "UNKNOWN/b")
    line = refusal(tmp_path, files)
    for part in (str(tmp_path), "UNKNOWN", "AKIEC BCC BKL DF MEL NV VASC", "--data.class_map"):
        assert part in line
    catalog = scan_of(tmp_path, files, class_map={key: "NV"}).catalog
    assert list(zip(catalog["path"].to_pylist(), catalog["label"].to_pylist())) == [
        ("MEL/a.png", "MEL"),
        ("UNKNOWN/b.png", "NV"),
    ]


def test_a_root_without_class_folders_says_what_it_found(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"images/a.png": b"x", "masks/b.png": b"x"}) == (
        f"data_root: {tmp_path} has no class folder and no table of labels; expected some of AKIEC BCC BKL DF MEL NV "
        "VASC, found: images, masks. Map yours with --data.class_map, name a table with --data.table, or move them out "
        "of data_root."
    )


def test_a_missing_root_a_file_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, part in {"missing": "does not exist", "file": "is a file", "empty": "no class folder"}.items():
        with pytest.raises(DataError, match=rf"^data_root: {tmp_path / name} .*{part}[^\n]*$"):
            scan_dataset(str(tmp_path / name), DataConfig())
    assert "MEL/bad.png: the file is empty" in refusal(tmp_path / "new", {"MEL/bad.png": b""})


# --- lesions ----------------------------------------------------------------------------------------------------------


def test_metadata_groups_the_images_of_a_lesion_and_others_are_lesions_of_their_own(tmp_path: Path) -> None:
    files = pngs("NV/a", "NV/b", "NV/c", "NV/d", "MEL/1", "NV/1")
    files["metadata.csv"] = (
        "\ufeffimage_id,age,lesion_id\r\na,40,L1\r\nb.png,41,L1\r\nc,42,\r\nelsewhere,43,L9\r\n".encode()
    )
    assert lesions_of(scan_of(tmp_path, files)) == {
        "MEL/1.png": "MEL/1.png",
        "NV/1.png": "NV/1.png",
        "NV/a.png": "L1",
        "NV/b.png": "L1",
        "NV/c.png": "c",
        "NV/d.png": "d",
    }


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"image_id,lesion_id\na,L1\na,L2\n", "gives a two lesions, L1 and L2"),
        (b"image_id,lesion_id\na\xff,L1\n", "cannot be read"),
        (b"image_id,lesion_id\n" + b"a" * 200_000 + b",L1\n", "cannot be read"),
    ],
)
def test_malformed_metadata_is_an_error_of_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    line = refusal(tmp_path, pngs("NV/a") | {"metadata.csv": content})
    assert line.startswith(f"metadata.csv in {tmp_path}")
    assert part in line


def test_all_images_of_a_lesion_share_a_split_by_the_seed_of_the_config(tmp_path: Path) -> None:
    files = pngs(*(f"NV/i{image}" for image in range(60)))
    files["metadata.csv"] = "\n".join(
        ["image_id,lesion_id", *(f"i{image},L{image // 3}" for image in range(60))]
    ).encode()
    root = build_dataset(tmp_path, files)
    catalogs = [
        scan_dataset(root, DataConfig(val_fraction=0.1, test_fraction=0.2, split_seed=seed)).catalog
        for seed in (4, 4, 1)
    ]
    assert len({(row["lesion_id"], row["split"]) for row in catalogs[0].to_pylist()}) == 20
    assert [class_counts(catalogs[0], split)["NV"] for split in ("train", "val", "test")] == [42, 6, 12]
    assert catalogs[0]["split"] == catalogs[1]["split"] != catalogs[2]["split"]


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_exact_duplicates_are_kept_once(tmp_path: Path) -> None:
    same, other = encoded_image(0, "PNG"), encoded_image(1, "PNG")
    files = {"NV/c.png": same, "NV/b.png": same, "NV/a/z.png": other, "NV/d.jpg": same}
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig())
    assert paths_of(scan) == ["NV/a/z.png", "NV/b.png"]
    assert scan.duplicates.to_pylist() == [
        {"path": "NV/c.png", "kept": "NV/b.png"},
        {"path": "NV/d.jpg", "kept": "NV/b.png"},
    ]


def test_one_image_under_two_labels_is_an_error_that_names_both(tmp_path: Path) -> None:
    same = encoded_image(0, "PNG")
    line = refusal(tmp_path, pngs("NV/c") | {"MEL/a.png": same, "NV/b.png": same})
    assert "one image under two labels" in line
    assert "MEL/a.png and NV/b.png;" in line


def test_lesions_that_share_a_duplicate_are_one(tmp_path: Path) -> None:
    """b is a copy of a recorded under L2; so a (L1) and c (L2) show one lesion and must not be split apart."""
    files = pngs("NV/a", "NV/c", "NV/d")
    files |= {"NV/b.png": files["NV/a.png"], "metadata.csv": b"image_id,lesion_id\na,L1\nb,L2\nc,L2\nd,L3\n"}
    assert lesions_of(scan_of(tmp_path, files)) == {"NV/a.png": "L1", "NV/c.png": "L1", "NV/d.png": "L3"}


# --- files and fingerprints -------------------------------------------------------------------------------------------


@pytest.fixture
def catalog() -> pa.Table:
    rows = [
        ("a", "MEL/a.png", "MEL", "L1", 40, 30, 900, "00ff", "train", 45.0, "female", "trunk", "3"),
        ("b", "NV/b.png", "NV", "L2", 41, 31, 901, "01ff", "test", None, None, None, None),
        ("c", "NV/c.png", "NV", "L3", 42, 32, 902, "02ff", "train", None, None, None, None),
    ]
    return pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=CATALOG_SCHEMA.names).cast(
        CATALOG_SCHEMA
    )


def test_a_written_catalog_comes_back(tmp_path: Path, catalog: pa.Table) -> None:
    path = tmp_path / "new folder" / "catalog.parquet"
    write_catalog(catalog, path)
    for location in (str(path), path.as_uri()):
        assert read_catalog(location).equals(catalog)
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_catalog(tmp_path: Path, catalog: pa.Table) -> None:
    path = tmp_path / "catalog.parquet"
    write_catalog(catalog, path)
    with pytest.raises(KeyError):
        write_catalog(catalog.drop_columns(["split"]), path)
    assert read_catalog(str(path)).equals(catalog)
    with pytest.raises(DataError, match=r"cannot be written[^\n]*$"):
        write_catalog(catalog, path / "catalog.parquet")


def test_a_missing_broken_or_foreign_catalog_is_an_error(tmp_path: Path, catalog: pa.Table) -> None:
    location = tmp_path / "catalog.parquet"
    with pytest.raises(DataError, match="does not exist"):
        read_catalog(str(location))
    write_catalog(catalog, str(location))
    location.write_bytes(location.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_catalog(str(location))
    pq.write_table(catalog.drop_columns(["sha256", "split"]), location)
    with pytest.raises(DataError, match="lacks the columns sha256 split"):
        read_catalog(str(location))


def test_rejected_files_become_a_csv(tmp_path: Path) -> None:
    rejected = pa.table({"path": ["NV/a, b.png", 'NV/"c".png'], "reason": ["the file is empty", "truncated"]})
    location = tmp_path / "rejected.csv"
    write_csv(rejected, str(location))
    with location.open(newline="", encoding="utf-8") as lines:
        assert list(csv.DictReader(lines)) == rejected.to_pylist()
    write_csv(rejected.slice(0, 0), str(location))
    assert location.read_text().strip().replace('"', "") == "path,reason"


def test_class_counts_name_all_seven(catalog: pa.Table) -> None:
    nothing = dict.fromkeys(ISIC7.codes, 0)
    assert list(class_counts(catalog)) == list(ISIC7.codes)
    assert class_counts(catalog) == nothing | {"MEL": 1, "NV": 2}
    assert class_counts(catalog, "test") == nothing | {"NV": 1}


def test_the_hash_follows_content_and_split_and_nothing_else(catalog: pa.Table) -> None:
    reference = catalog_hash(catalog)
    assert len(reference) == 64
    assert catalog_hash(catalog.take([2, 0, 1])) == reference
    for column, same in {
        "image_id": False,
        "label": False,
        "sha256": False,
        "split": False,
        "path": True,
        "lesion_id": True,
    }.items():
        values = ["changed", *catalog[column].to_pylist()[1:]]
        changed = catalog.set_column(catalog.column_names.index(column), column, pa.array(values))
        assert (catalog_hash(changed) == reference) is same


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not HAM10000.is_dir(), reason="../shared/ham10000 is not here")
def test_ham10000_is_found_whole_and_split_by_lesion() -> None:
    scan = scan_dataset(str(HAM10000), DataConfig())
    assert scan.catalog.num_rows == 8502
    assert (scan.rejected.num_rows, scan.duplicates.num_rows) == (0, 0)
    expected = {"AKIEC": 275, "BCC": 436, "BKL": 934, "DF": 96, "MEL": 945, "NV": 5696, "VASC": 120}
    assert class_counts(scan.catalog) == expected
    with (HAM10000 / "metadata.csv").open(newline="", encoding="utf-8") as lines:
        metadata = {row["image_id"]: row for row in csv.DictReader(lines)}
    rows = scan.catalog.to_pylist()
    for row in rows:
        recorded = metadata[row["image_id"]]
        assert (row["label"], row["lesion_id"], row["sha256"]) == (
            recorded["class"],
            recorded["lesion_id"],
            recorded["sha256"],
        )
    assert {(row["width"], row["height"]) for row in rows} == {(200, 150)}
    split_of = {row["lesion_id"]: row["split"] for row in rows}
    assert all(split_of[row["lesion_id"]] == row["split"] for row in rows)
    for label in ISIC7.codes:
        lesions = {row["lesion_id"] for row in rows if row["label"] == label}
        for split in ("val", "test"):
            assert abs(sum(split_of[lesion] == split for lesion in lesions) - 0.1 * len(lesions)) <= 1
