import csv
import hashlib
import io
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from m2d.classes import CLASSES
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
    assert scan.catalog.schema.equals(CATALOG_SCHEMA)
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
    files = {"MEL/large.png": encoded_image(0, "PNG", size=(50, 40)), "MEL/small.png": encoded_image(1, "PNG")}
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig(max_pixels=1999))
    assert paths_of(scan) == ["MEL/small.png"]
    assert "max_pixels" in reasons_of(scan)["MEL/large.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_rejected(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, {"MEL/a.png": encoded_image(0, "PNG"), "MEL/locked.png": encoded_image(1, "PNG")})
    (tmp_path / "MEL/locked.png").chmod(0)
    assert "cannot be read" in reasons_of(scan_dataset(root, DataConfig()))["MEL/locked.png"]


def test_suffixes_and_folders_count_in_any_letter_case_and_at_any_depth(tmp_path: Path) -> None:
    formats = {"jpg": "JPEG", "JPEG": "JPEG", "Png": "PNG", "bmp": "BMP", "TIF": "TIFF", "tiff": "TIFF", "webp": "WEBP"}
    files = {f"mel/f{seed}.{suffix}": encoded_image(seed, formats[suffix]) for seed, suffix in enumerate(formats)}
    files |= {"Nv/2018/part 1/deep.png": encoded_image(50, "PNG"), "MEL/other.png": encoded_image(51, "PNG")}
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig())
    assert sorted(paths_of(scan)) == sorted(files)
    assert class_counts(scan.catalog) == dict.fromkeys(CLASSES, 0) | {"MEL": len(formats) + 1, "NV": 1}


def test_rows_are_ordered_by_class_and_path(tmp_path: Path) -> None:
    names = ["VASC/a", "NV/b/z", "NV/b", "NV/a", "AKIEC/z", "AKIEC/b", "MEL/10", "MEL/9"]
    files = {f"{name}.png": encoded_image(seed, "PNG") for seed, name in enumerate(names)}
    root = build_dataset(tmp_path, files)
    scan = scan_dataset(root, DataConfig())
    order = [f"{name}.png" for name in ["AKIEC/b", "AKIEC/z", "MEL/10", "MEL/9", "NV/a", "NV/b", "NV/b/z", "VASC/a"]]
    assert paths_of(scan) == order
    assert scan_dataset(root, DataConfig()).catalog.equals(scan.catalog)


def test_stems_that_collide_become_paths(tmp_path: Path) -> None:
    names = ["MEL/1.png", "NV/1.png", "NV/2.bmp", "NV/2.png", "NV/3.png"]
    files = {name: encoded_image(seed, "PNG") for seed, name in enumerate(names)}
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig())
    assert scan.catalog["image_id"].to_pylist() == ["MEL/1.png", "NV/1.png", "NV/2.bmp", "NV/2.png", "3"]


def test_a_uri_and_a_path_give_one_catalog(tmp_path: Path) -> None:
    files = {"MEL/sub/a.png": encoded_image(0, "PNG"), "metadata.csv": b"image_id,lesion_id\na,L1\n"}
    root = build_dataset(tmp_path, files)
    assert scan_dataset(tmp_path.as_uri(), DataConfig()).catalog.equals(scan_dataset(root + "/", DataConfig()).catalog)


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
    build_dataset(tmp_path, {"elsewhere/a.png": encoded_image(0, "PNG"), "root/NV/b.png": encoded_image(1, "PNG")})
    (tmp_path / "root/MEL").symlink_to(tmp_path / "elsewhere")
    assert paths_of(scan_dataset(str(tmp_path / "root"), DataConfig())) == ["MEL/a.png", "NV/b.png"]


def test_progress_counts_every_file_in_the_callers_thread(tmp_path: Path) -> None:
    files = {f"NV/{seed}.png": encoded_image(seed, "PNG") for seed in range(6)} | {"NV/bad.png": b""}
    calls: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.current_thread())

    scan_dataset(build_dataset(tmp_path, files), DataConfig(), progress)
    assert calls == [(done, 7) for done in range(1, 8)]
    assert threads == {threading.main_thread()}


# --- folder names -----------------------------------------------------------------------------------------------------


def test_an_unknown_folder_beside_good_ones_is_an_error_that_names_it(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, {"MEL/a.png": encoded_image(0, "PNG"), "UNKNOWN/b.png": encoded_image(1, "PNG")})
    with pytest.raises(DataError) as caught:
        scan_dataset(root, DataConfig())
    message = str(caught.value)
    assert "\n" not in message
    for part in (root, "UNKNOWN", "AKIEC BCC BKL DF MEL NV VASC", "--data.class_map"):
        assert part in message


@pytest.mark.parametrize("key", ["UNKNOWN", "unknown"])
def test_a_mapped_folder_is_its_class(tmp_path: Path, key: str) -> None:
    root = build_dataset(tmp_path, {"MEL/a.png": encoded_image(0, "PNG"), "UNKNOWN/b.png": encoded_image(1, "PNG")})
    scan = scan_dataset(root, DataConfig(class_map={key: "NV"}))
    assert scan.catalog.select(["path", "label"]).to_pylist() == [
        {"path": "MEL/a.png", "label": "MEL"},
        {"path": "UNKNOWN/b.png", "label": "NV"},
    ]


def test_a_root_without_class_folders_says_what_it_found(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, {"images/a.png": b"x", "masks/b.png": b"x"})
    with pytest.raises(DataError) as caught:
        scan_dataset(root, DataConfig())
    assert str(caught.value) == (
        f"data_root: {root} has no class folder; expected some of AKIEC BCC BKL DF MEL NV VASC, "
        "found: images, masks. Map yours with --data.class_map, or move them out of data_root."
    )


def test_a_missing_root_a_file_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, part in {"missing": "does not exist", "file": "is a file", "empty": "no class folder"}.items():
        with pytest.raises(DataError, match=rf"^data_root: {tmp_path / name} .*{part}[^\n]*$"):
            scan_dataset(str(tmp_path / name), DataConfig())


def test_class_folders_without_a_usable_image_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable image .*; .*MEL/bad\.png: the file is empty"):
        scan_dataset(build_dataset(tmp_path, {"MEL/bad.png": b""}), DataConfig())


# --- lesions ----------------------------------------------------------------------------------------------------------


def test_metadata_groups_the_images_of_a_lesion(tmp_path: Path) -> None:
    files = {f"NV/{name}.png": encoded_image(seed, "PNG") for seed, name in enumerate("abcd")}
    files["metadata.csv"] = (
        "\ufeffimage_id,age,lesion_id\r\na,40,L1\r\nb.png,41,L1\r\nc,42,\r\nelsewhere,43,L9\r\n".encode()
    )
    scan = scan_dataset(build_dataset(tmp_path, files), DataConfig())
    assert lesions_of(scan) == {"NV/a.png": "L1", "NV/b.png": "L1", "NV/c.png": "c", "NV/d.png": "d"}


def test_without_metadata_each_image_is_a_lesion(tmp_path: Path) -> None:
    files = {name: encoded_image(seed, "PNG") for seed, name in enumerate(["MEL/1.png", "NV/1.png", "NV/2.png"])}
    assert len(set(lesions_of(scan_dataset(build_dataset(tmp_path, files), DataConfig())).values())) == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"isic_id,diagnosis\na,b\n", "lacks the column image_id and lesion_id (found: isic_id, diagnosis)"),
        (b"image_id,diagnosis\na,b\n", "lacks the column lesion_id"),
        (b"", "an empty file"),
        (b"image_id,lesion_id\na,L1\na,L2\n", "gives a two lesions, L1 and L2"),
        (b"\xff\xfei\x00m\x00", "cannot be read"),
        (b"image_id,lesion_id\n" + b"a" * 200_000 + b",L1\n", "cannot be read as CSV"),
    ],
)
def test_malformed_metadata_is_an_error_of_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    root = build_dataset(tmp_path, {"NV/a.png": encoded_image(0, "PNG"), "metadata.csv": content})
    with pytest.raises(DataError) as caught:
        scan_dataset(root, DataConfig())
    assert str(caught.value).startswith(f"metadata.csv in {root}")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_images_of_a_lesion_share_a_split(tmp_path: Path) -> None:
    lines = ["image_id,lesion_id"] + [f"i{image},L{image // 3}" for image in range(60)]
    files = {f"NV/i{image}.png": encoded_image(image, "PNG", size=(8, 8)) for image in range(60)}
    files["metadata.csv"] = "\n".join(lines).encode()
    root = build_dataset(tmp_path, files)
    catalog = scan_dataset(root, DataConfig(val_fraction=0.1, test_fraction=0.2, split_seed=4)).catalog
    assert len({(row["lesion_id"], row["split"]) for row in catalog.to_pylist()}) == 20
    assert [class_counts(catalog, split)["NV"] for split in ("train", "val", "test")] == [42, 6, 12]


def test_the_seed_of_the_config_splits(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, {f"NV/{seed}.png": encoded_image(seed, "PNG", size=(8, 8)) for seed in range(60)})
    splits = [scan_dataset(root, DataConfig(split_seed=seed)).catalog["split"] for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


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
    root = build_dataset(tmp_path, {"MEL/a.png": same, "NV/b.png": same, "NV/c.png": encoded_image(1, "PNG")})
    with pytest.raises(DataError, match=r"one image under two labels, .*MEL/a\.png and NV/b\.png;[^\n]*$"):
        scan_dataset(root, DataConfig())


def test_lesions_that_share_a_duplicate_are_one(tmp_path: Path) -> None:
    """b is a copy of a recorded under L2; so a (L1) and c (L2) show one lesion and must not be split apart."""
    same = encoded_image(0, "PNG")
    files = {
        "NV/a.png": same,
        "NV/b.png": same,
        "NV/c.png": encoded_image(1, "PNG"),
        "NV/d.png": encoded_image(2, "PNG"),
    }
    files["metadata.csv"] = b"image_id,lesion_id\na,L1\nb,L2\nc,L2\nd,L3\n"
    assert lesions_of(scan_dataset(build_dataset(tmp_path, files), DataConfig())) == {
        "NV/a.png": "L1",
        "NV/c.png": "L1",
        "NV/d.png": "L3",
    }


# --- files and fingerprints -------------------------------------------------------------------------------------------


@pytest.fixture
def catalog() -> pa.Table:
    rows = [
        ("a", "MEL/a.png", "MEL", "L1", 40, 30, 900, "00ff", "train"),
        ("b", "NV/b.png", "NV", "L2", 41, 31, 901, "01ff", "test"),
        ("c", "NV/c.png", "NV", "L3", 42, 32, 902, "02ff", "train"),
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


def test_a_failed_write_leaves_the_old_catalog(tmp_path: Path, catalog: pa.Table) -> None:
    location = str(tmp_path / "catalog.parquet")
    write_catalog(catalog, location)
    with pytest.raises(KeyError):
        write_catalog(catalog.drop_columns(["split"]), location)
    assert read_catalog(location).equals(catalog)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, catalog: pa.Table) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot be written[^\n]*$"):
        write_catalog(catalog, str(tmp_path / "file" / "catalog.parquet"))


def test_a_missing_broken_or_foreign_catalog_is_an_error(tmp_path: Path, catalog: pa.Table) -> None:
    location = tmp_path / "catalog.parquet"
    with pytest.raises(DataError, match="cannot be read"):
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
    nothing = dict.fromkeys(CLASSES, 0)
    assert list(class_counts(catalog)) == list(CLASSES)
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
    for label in CLASSES:
        lesions = {row["lesion_id"] for row in rows if row["label"] == label}
        for split in ("val", "test"):
            assert abs(sum(split_of[lesion] == split for lesion in lesions) - 0.1 * len(lesions)) <= 1
