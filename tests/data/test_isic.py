"""The download, against a server on the loopback that drops, delays, lies and changes its mind. No other network."""

import csv
import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from archive_server import Archive, jpeg, running
from PIL import Image

from m2d.data import isic
from m2d.data.catalog import class_counts, scan_dataset
from m2d.data.isic import class_of, download_isic, read_record
from m2d.data.settings import DataConfig, DownloadConfig
from m2d.errors import ConfigError, DataError

NEVUS = {"diagnosis_1": "Benign", "diagnosis_2": "Benign melanocytic proliferations", "diagnosis_3": "Nevus"}
MELANOMA = {
    "diagnosis_1": "Malignant",
    "diagnosis_2": "Malignant melanocytic proliferations (Melanoma)",
    "diagnosis_3": "Melanoma, NOS",
}
SCAR = {
    "diagnosis_1": "Benign",
    "diagnosis_2": "Benign soft tissue proliferations - Fibro-histiocytic",
    "diagnosis_3": "Scar",
}


@pytest.fixture
def archive() -> Iterator[Archive]:
    with running(Archive()) as served:
        yield served


def fetch(archive: Archive, root: Path | str, *, first_wait_s: float = 0.001, **settings: Any) -> None:
    chosen = {"enabled": True, "connections": 2, "retries": 2, "timeout_s": 5.0} | settings
    download_isic(DownloadConfig(api=f"{archive.address}/api/v2", **chosen), str(root), first_wait_s=first_wait_s)


def refusal(archive: Archive, root: Path | str, **settings: Any) -> str:
    """The one line that the download ends with."""
    with pytest.raises(DataError) as caught:
        fetch(archive, root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images_in(root: Path) -> dict[str, bytes]:
    """Path in root -> content of every file in a folder that is not hidden."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.relative_to(root).parts[0].startswith(".")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files if path.parent != root}


# --- from the archive to a catalog ------------------------------------------------------------------------------------


def test_what_is_fetched_is_a_dataset_with_its_lesions_grouped(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six images on three pages: two show one lesion, one is of no class, one is no dermoscopic image."""
    siblings = [archive.add(1, lesion_id="IL_1", **NEVUS), archive.add(2, lesion_id="IL_1", **NEVUS)]
    melanoma = archive.add(3, lesion_id="IL_2", **MELANOMA)
    archive.add(4, lesion_id="IL_3", **SCAR)
    keratosis = archive.add(5, lesion_id="IL_4", diagnosis="actinic keratosis")
    archive.add(6, **NEVUS)
    archive.records[5]["metadata"]["acquisition"]["image_type"] = "clinical: close-up"
    fetch(archive, tmp_path)

    scan = scan_dataset(str(tmp_path), DataConfig())
    assert {row["image_id"]: (row["path"], row["lesion_id"]) for row in scan.catalog.to_pylist()} == {
        siblings[0]: ("NV/ISIC_0000001.jpg", "IL_1"),
        siblings[1]: ("NV/ISIC_0000002.jpg", "IL_1"),
        melanoma: ("MEL/ISIC_0000003.jpg", "IL_2"),
        keratosis: ("AKIEC/ISIC_0000005.jpg", "IL_4"),
    }
    assert scan.rejected.num_rows == 0
    assert class_counts(scan.catalog)["NV"] == 2
    assert images_in(tmp_path)["NV/ISIC_0000002.jpg"] == archive.files["ISIC_0000002"]
    assert archive.fetched() == sorted([*siblings, melanoma, keratosis])
    printed = capsys.readouterr().out
    assert "skipped 2 records: Scar (1), no dermoscopic image: clinical: close-up (1)" in printed
    assert "NV           2" in printed


def test_licence_and_attribution_are_beside_the_images(archive: Archive, tmp_path: Path) -> None:
    isic_id = archive.add(1, lesion_id="IL_1", sex="female", **NEVUS)
    fetch(archive, tmp_path)
    (row,) = csv.DictReader((tmp_path / "metadata.csv").open())
    assert row["image_id"] == isic_id
    assert (row["license"], row["class"], row["sex"]) == ("CC-BY-NC", "NV", "female")
    assert row["diagnosis"] == "Benign: Benign melanocytic proliferations: Nevus"
    assert "Medical University of Vienna" in row["attribution"]
    note = (tmp_path / "DOWNLOAD.md").read_text()
    assert "| CC-BY-NC | 1 |" in note
    assert "ViDIR Group" in note


def test_an_existing_metadata_table_keeps_its_other_rows_and_columns(archive: Archive, tmp_path: Path) -> None:
    archive.add(1, lesion_id="IL_1", **NEVUS)
    table = tmp_path / "metadata.csv"
    table.write_text("image_id,lesion_id,camera\nmine,L9\nISIC_0000001.jpg,HAM_5,B,too much\n")
    fetch(archive, tmp_path)
    rows = {row["image_id"]: row for row in csv.DictReader(table.open())}
    assert (rows["mine"]["lesion_id"], rows["mine"]["camera"]) == ("L9", "")
    assert (rows["ISIC_0000001"]["lesion_id"], rows["ISIC_0000001"]["camera"]) == ("IL_1", "B")
    assert len(rows) == 2
    for other in (b"name,lesion_id\nmine,L9\n", "image_id\n\u00e4\n".encode("latin-1")):
        table.write_bytes(other)
        assert "metadata.csv" in refusal(archive, tmp_path)
        assert table.read_bytes() == other


def test_a_limit_is_raised_later_without_asking_for_the_first_pages_again(archive: Archive, tmp_path: Path) -> None:
    for number in range(1, 8):
        archive.add(number, **NEVUS)

    def first_pages() -> list[str]:
        return [path for path in archive.asked if "search" in path and "cursor" not in path]

    fetch(archive, tmp_path, limit=3)
    assert len(images_in(tmp_path)) == 3
    assert first_pages() != []
    archive.reset()
    fetch(archive, tmp_path)
    assert len(images_in(tmp_path)) == 7
    assert archive.fetched() == [f"ISIC_{number:07d}" for number in range(4, 8)]
    assert first_pages() == []


# --- diagnoses --------------------------------------------------------------------------------------------------------


EPIDERMAL = "Malignant:Malignant epidermal proliferations:"
MELANOCYTIC = "Malignant:Malignant melanocytic proliferations (Melanoma)"
VASCULAR = "Benign:Benign soft tissue proliferations - Vascular"


@pytest.mark.parametrize(
    ("diagnosis", "code"),
    [  # the archive's words (isic-metadata 4.12, and the flat list before it); the codes are those of ISIC 2018 task 3
        ("actinic keratosis", "AKIEC"),
        ("Indeterminate:Indeterminate epidermal proliferations:Solar or actinic keratosis", "AKIEC"),
        (f"{EPIDERMAL}Squamous cell carcinoma in situ:Squamous cell carcinoma in situ, Bowens disease", "AKIEC"),
        ("basal cell carcinoma", "BCC"),
        ("Malignant:Malignant adnexal epithelial proliferations - Follicular:Basal cell carcinoma:Nodular", "BCC"),
        ("pigmented benign keratosis", "BKL"),
        ("Benign:Benign epidermal proliferations:Lichen planus like keratosis", "BKL"),
        ("solar lentigo", "BKL"),
        ("Benign:Benign soft tissue proliferations - Fibro-histiocytic:Dermatofibroma", "DF"),
        (f"{MELANOCYTIC}:Melanoma Invasive:Melanoma Invasive, Nodular", "MEL"),
        (MELANOCYTIC, "MEL"),
        ("melanoma", "MEL"),
        ("Benign:Benign melanocytic proliferations:Nevus:Blue nevus", "NV"),
        ("nevus", "NV"),
        (VASCULAR, "VASC"),
        (f"{VASCULAR}:Hemangioma:Hemangioma, Cherry", "VASC"),
        ("vascular lesion", "VASC"),
        (f"{MELANOCYTIC}:Melanoma metastasis", None),
        (f"{VASCULAR}:Lymphangioma", None),
        (f"{EPIDERMAL}Squamous cell carcinoma, NOS", None),
        ("Benign:Benign melanocytic proliferations", None),
        ("Benign", None),
        ("scar", None),
        ("", None),
    ],
)
def test_a_diagnosis_in_either_form_has_its_class_or_none(diagnosis: str, code: str | None) -> None:
    levels = {f"diagnosis_{level}": name for level, name in enumerate(diagnosis.split(":"), 1)}
    files = {"full": {"url": "https://example.org/a.jpg"}}
    for clinical in (levels, {"diagnosis": diagnosis}):
        image = read_record({"isic_id": "ISIC_0000001", "files": files, "metadata": {"clinical": clinical}})
        assert not isinstance(image, str)
        assert class_of(image.diagnosis, 999, {}) == code


def test_task_3_counts_its_squamous_cell_carcinomas_among_akiec() -> None:
    """In collection 212 the archive's 149 actinic keratoses and 229 carcinomas are task 3's 327 + 8 + 43 AKIEC."""
    carcinoma = ("Malignant", "Malignant epidermal proliferations", "Squamous cell carcinoma, NOS")
    assert class_of(carcinoma, 212, {}) == "AKIEC"
    assert class_of(carcinoma, 249, {}) is None  # BCN20000, where it is an invasive carcinoma
    assert class_of(carcinoma, 212, {"squamous cell carcinoma, nos": "skip"}) is None


def test_a_changed_mapping_of_diagnoses_moves_the_file(archive: Archive, tmp_path: Path) -> None:
    """Fetched again or left in place it would have two labels, which the scan refuses."""
    archive.add(1, **NEVUS)
    archive.add(2, **SCAR)
    fetch(archive, tmp_path, diagnoses={"Scar": "DF"})
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg", "DF/ISIC_0000002.jpg"}
    archive.reset()
    fetch(archive, tmp_path, diagnoses={"scar": "BKL"})
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg", "BKL/ISIC_0000002.jpg"}
    fetch(archive, tmp_path)
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}
    fetch(archive, tmp_path, diagnoses={"scar": "BKL"})
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg", "BKL/ISIC_0000002.jpg"}
    assert archive.fetched() == []


def test_a_collection_without_one_of_the_seven_classes_says_what_it_holds(archive: Archive, tmp_path: Path) -> None:
    archive.add(1, **SCAR)
    assert "has no image of the seven classes (Scar (1))" in refusal(archive, tmp_path)


# --- broken connections -----------------------------------------------------------------------------------------------


def test_a_file_that_breaks_off_is_fetched_again_whole(archive: Archive, tmp_path: Path) -> None:
    isic_id = archive.add(1, **NEVUS)
    archive.mishaps["ISIC_0000001.jpg"] = [700, 500]
    fetch(archive, tmp_path)
    assert images_in(tmp_path) == {"NV/ISIC_0000001.jpg": archive.files[isic_id]}
    assert archive.fetched() == [isic_id] * 3


def test_too_many_requests_and_a_server_error_are_waited_out(archive: Archive, tmp_path: Path) -> None:
    archive.add(1, **NEVUS)
    archive.mishaps["ISIC_0000001.jpg"] = [{"status": 429, "Retry-After": "0"}, {"status": 500}]
    archive.mishaps["search"] = [{"status": 503}]
    fetch(archive, tmp_path)
    assert len(archive.fetched()) == 3
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}


def test_retry_after_is_kept(archive: Archive, tmp_path: Path) -> None:
    """An own wait would be of the longest kind here; the server asks for a second."""
    archive.add(1, **NEVUS)
    archive.mishaps["ISIC_0000001.jpg"] = [{"status": 429, "Retry-After": "1"}]
    began = time.monotonic()
    fetch(archive, tmp_path, first_wait_s=1000.0)
    assert 1.0 <= time.monotonic() - began < 30
    archive.mishaps["search"] = [{"status": 429, "Retry-After": "3600"}]
    assert "the server asks to wait 60 minutes" in refusal(archive, tmp_path, fresh_listing=True)


def test_a_network_that_goes_away_ends_the_run_without_trying_every_image(archive: Archive, tmp_path: Path) -> None:
    for number in range(1, 61):
        archive.add(number, **NEVUS)
        archive.mishaps[f"ISIC_{number:07d}.jpg"] = [{"status": 503}] * (1 if number > 5 else 0)
    archive.page_size = 100
    line = refusal(archive, tmp_path, retries=0, connections=1)
    assert "55 of 60 images could not be fetched: ISIC_0000006 (HTTP 503)" in line
    assert len(archive.fetched()) < 60
    fetch(archive, tmp_path)
    assert len(images_in(tmp_path)) == 60


def test_no_network_is_one_line_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    line = refusal(Archive(f"http://127.0.0.1:{port}"), tmp_path, first_wait_s=1000.0)
    assert time.monotonic() - began < 30
    assert line.startswith(f"download: http://127.0.0.1:{port}/api/v2")
    assert "Connection refused" in line


# --- what is not what it should be ------------------------------------------------------------------------------------


def test_a_wrong_checksum_is_named_and_the_rest_is_kept(archive: Archive, tmp_path: Path) -> None:
    """S3's ETag is the MD5 of a file that was uploaded in one piece."""
    archive.add(1, **NEVUS)
    archive.server_header, archive.extra_headers = "AmazonS3", {"ETag": f'"{hashlib.md5(jpeg(1)).hexdigest()}"'}
    archive.add(2, **NEVUS)
    line = refusal(archive, tmp_path)
    assert "1 of 2 images could not be fetched: ISIC_0000002 (its md5 is not the one that the server announced" in line
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}
    assert archive.fetched().count("ISIC_0000002") == 3
    archive.extra_headers = {}
    archive.reset()
    fetch(archive, tmp_path)
    assert archive.fetched() == ["ISIC_0000002"]


@pytest.mark.parametrize(
    ("server", "headers"),
    [
        ("nginx", {"ETag": f'"{"0" * 32}"'}),  # not S3: may be anything
        ("AmazonS3", {"ETag": f'"{"0" * 32}-2"'}),  # uploaded in two pieces
        ("AmazonS3", {"ETag": f'"{"0" * 32}"', "x-amz-server-side-encryption": "aws:kms"}),
    ],
)
def test_only_what_is_a_checksum_is_verified(
    archive: Archive, tmp_path: Path, server: str, headers: dict[str, str]
) -> None:
    archive.add(1, **NEVUS)
    archive.server_header, archive.extra_headers = server, headers
    fetch(archive, tmp_path)
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (jpeg(1)[:-400], "what came is no whole image"),  # of the announced length, as a proxy hands on a broken file
        (jpeg(1, (24, 18)), "what came has 24 x 18 pixels, the record (48, 36)"),
        (b"<!DOCTYPE html><html>Please log in</html>", "what came is a web page"),
    ],
)
def test_what_is_not_the_image_is_named(archive: Archive, tmp_path: Path, content: bytes, reason: str) -> None:
    isic_id = archive.add(1, **NEVUS)
    archive.add(2, **NEVUS)
    archive.files[isic_id] = content
    assert f"ISIC_0000001 ({reason}" in refusal(archive, tmp_path)
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000002.jpg"}


def test_a_whole_file_of_another_length_than_its_record_is_kept(archive: Archive, tmp_path: Path) -> None:
    """The archive writes licence fields into a file after its record has counted the bytes."""
    archive.add(1, **NEVUS)
    archive.records[0]["files"]["full"]["size"] += 1500
    fetch(archive, tmp_path)
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "it answered with HTML where JSON was expected"),
        (b"[]", "its JSON is not an object"),
        (b'{"detail": "no"}', "no page of images"),
        (b'{"results": [], "next": 5, "count": 0}', "no page of images"),
    ],
)
def test_an_answer_that_is_no_page_is_one_line(archive: Archive, tmp_path: Path, body: bytes, reason: str) -> None:
    archive.overrides["images/search/"] = body
    for _ in range(2):  # it is not kept for the next run
        archive.reset()
        line = refusal(archive, tmp_path)
        assert line.startswith("download: http://127.0.0.1")
        assert reason in line
        assert sum("search" in path for path in archive.asked) == 1  # asking again would not help


def test_pages_that_go_round_end(archive: Archive, tmp_path: Path) -> None:
    archive.add(1, **NEVUS)
    archive.next_url = f"{archive.address}/api/v2/images/search/?collections=212&limit=100"
    assert "repeats its pages" in refusal(archive, tmp_path)


def test_a_collection_that_is_another_or_none_is_named(archive: Archive, tmp_path: Path) -> None:
    line = refusal(archive, tmp_path, collection=9999)
    assert "collection 9999, number 9999 there: HTTP 404" in line
    archive.collections[212] = "Longitudinal overview images"
    assert "is called 'Longitudinal overview images'" in refusal(archive, tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add(1, **NEVUS)
    archive.add(2, **NEVUS)
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "ISIC_0000002.jpg":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(isic.os, "replace", full)
    assert f"{tmp_path} cannot be written (No space left on device)" in refusal(archive, tmp_path, connections=1)
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}


def test_too_little_space_is_said_before_the_first_image(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add(1, **NEVUS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "1 images need 0.0 GB" in refusal(archive, tmp_path)
    assert archive.fetched() == []


# --- an answer that means harm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isic_id", ["../../evil", "ISIC_1/../../evil", "ISIC_", "ISIC_1\n", "ISIC_\u0661", None, 7])
def test_an_id_that_is_none_never_becomes_a_path(archive: Archive, tmp_path: Path, isic_id: object) -> None:
    archive.add(1, **NEVUS)
    archive.add(2, **NEVUS)
    archive.records[1]["isic_id"] = isic_id
    root = tmp_path / "a" / "b" / "data"
    fetch(archive, root)
    assert set(images_in(root)) == {"NV/ISIC_0000001.jpg"}
    assert list(tmp_path.rglob("*evil*")) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/a.jpg", "http://user:pass@127.0.0.1/a", "", 3]
)
def test_only_web_addresses_are_fetched(url: object) -> None:
    record = {"isic_id": "ISIC_1", "files": {"full": {"url": url}}}
    assert read_record(record) == "record without an http(s) address of its file"


@pytest.mark.parametrize("record", [None, [], "x", {}, {"isic_id": "ISIC_1", "files": [], "metadata": 5}])
def test_a_record_of_any_shape_is_skipped(record: object) -> None:
    assert isinstance(read_record(record), str)


@pytest.mark.parametrize("how", ["next", "redirect"])
def test_pages_stay_on_the_apis_host(archive: Archive, tmp_path: Path, how: str) -> None:
    archive.add(1, **NEVUS)
    with running(Archive()) as elsewhere:
        elsewhere.add(9, **NEVUS)
        target = f"{elsewhere.address}/api/v2/images/search/?collections=212"
        if how == "next":
            archive.next_url = target
        else:
            archive.mishaps["search"] = [{"status": 302, "Location": target}]
        assert "another host" in refusal(archive, tmp_path)
        assert elsewhere.asked == []


def test_an_image_may_be_on_another_host(archive: Archive, tmp_path: Path) -> None:
    isic_id = archive.add(1, **NEVUS)
    with running(Archive()) as elsewhere:
        elsewhere.add(1)
        archive.mishaps["ISIC_0000001.jpg"] = [{"status": 302, "Location": f"{elsewhere.address}/images/{isic_id}.jpg"}]
        fetch(archive, tmp_path)
        assert elsewhere.fetched() == [isic_id]


def test_a_file_is_not_fetched_in_clear_when_https_was_asked_for() -> None:
    answer = requests.Response()
    answer.status_code, answer.url, answer.headers["Location"] = 302, "https://example.org/a", "http://example.org/a"
    with pytest.raises(isic._Failure, match="from https to http"):
        isic._check_redirect(False, answer)


def test_the_suffix_comes_from_the_bytes(archive: Archive, tmp_path: Path) -> None:
    isic_id, png = archive.add(1, **NEVUS), io.BytesIO()
    Image.new("RGB", (48, 36)).save(png, "PNG")
    archive.files[isic_id] = png.getvalue()
    archive.extra_headers = {"Content-Type": "text/x-python", "Content-Disposition": 'attachment; filename="../a.py"'}
    fetch(archive, tmp_path)
    assert images_in(tmp_path) == {"NV/ISIC_0000001.png": png.getvalue()}


# --- run again --------------------------------------------------------------------------------------------------------


def test_run_again_it_fetches_only_what_has_changed(archive: Archive, tmp_path: Path) -> None:
    for number in range(1, 6):
        archive.add(number, **NEVUS)
    fetch(archive, tmp_path)
    whole = images_in(tmp_path)
    archive.reset()
    written = (tmp_path / "metadata.csv").stat().st_mtime_ns
    fetch(archive, tmp_path)
    assert archive.asked == []
    assert (tmp_path / "metadata.csv").stat().st_mtime_ns == written  # or the next scan would not know it again
    (tmp_path / "NV/ISIC_0000001.jpg").write_bytes(jpeg(50))
    (tmp_path / "NV/ISIC_0000002.jpg").write_bytes(jpeg(2)[:-10])
    (tmp_path / "NV/ISIC_0000003.jpg").unlink()
    fetch(archive, tmp_path)
    assert archive.fetched() == ["ISIC_0000001", "ISIC_0000002", "ISIC_0000003"]
    assert images_in(tmp_path) == whole


def test_a_file_from_elsewhere_is_never_touched(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.add(1, **NEVUS)
    archive.add(2, **NEVUS)
    by_hand = tmp_path / "nv" / "batch" / "ISIC_0000001.jpeg"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(jpeg(77))
    fetch(archive, tmp_path)
    assert images_in(tmp_path) == {"nv/batch/ISIC_0000001.jpeg": jpeg(77), "NV/ISIC_0000002.jpg": jpeg(2)}
    assert "1 images were there before" in capsys.readouterr().out


def test_a_fresh_listing_sees_what_is_new_and_keeps_the_images(archive: Archive, tmp_path: Path) -> None:
    archive.add(1, **NEVUS)
    fetch(archive, tmp_path)
    archive.add(2, **NEVUS)
    archive.reset()
    fetch(archive, tmp_path)
    assert archive.fetched() == []
    fetch(archive, tmp_path, fresh_listing=True)
    assert archive.fetched() == ["ISIC_0000002"]


def test_an_expired_address_is_asked_for_again(archive: Archive, tmp_path: Path) -> None:
    isic_id = archive.add(1, **NEVUS)
    archive.add(2, **NEVUS)
    fetch(archive, tmp_path, limit=1)
    shutil.rmtree(tmp_path / "NV")
    archive.records[0]["files"]["full"]["url"] += "?Signature=new"
    archive.mishaps["ISIC_0000001.jpg"] = [{"status": 403}]
    archive.reset()
    fetch(archive, tmp_path, limit=1)
    assert archive.asked == [
        "/images/ISIC_0000001.jpg",
        "/api/v2/images/ISIC_0000001/",
        "/images/ISIC_0000001.jpg?Signature=new",
    ]
    assert images_in(tmp_path) == {"NV/ISIC_0000001.jpg": archive.files[isic_id]}


def test_a_killed_run_is_resumed_with_the_rest(archive: Archive, tmp_path: Path) -> None:
    """SIGKILL while files arrive; the next run lists nothing again and fetches what is not in place, that alone."""
    for number in range(1, 31):
        archive.add(number, lesion_id=f"IL_{number}", **NEVUS)
    archive.page_size, archive.delay_s = 10, 0.03
    program = (
        "import sys; from m2d.data.isic import download_isic; from m2d.data.settings import DownloadConfig; "
        "download_isic(DownloadConfig(enabled=True, connections=2, api=sys.argv[1]), sys.argv[2])"
    )
    child = subprocess.Popen([sys.executable, "-c", program, f"{archive.address}/api/v2", str(tmp_path)])
    while len(images_in(tmp_path)) < 8:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = images_in(tmp_path)
    assert 8 <= len(before) < 30
    archive.delay_s = 0.0
    archive.reset()
    fetch(archive, tmp_path)
    assert archive.fetched() == sorted(archive.files.keys() - {Path(path).stem for path in before})
    assert [path for path in archive.asked if path.startswith("/api/")] == []
    assert scan_dataset(str(tmp_path), DataConfig()).catalog.num_rows == 30


def test_a_torn_page_and_a_torn_ledger_are_repaired(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a kill or a power cut in the middle of a write leaves behind."""
    for number in range(1, 6):
        archive.add(number, **NEVUS)
    fetch(archive, tmp_path)
    state = tmp_path / ".m2d-download"
    page = next(path for path in state.glob("listing/*.json") if "ISIC_0000005" in path.read_text())
    page.write_bytes(page.read_bytes()[:-40])
    ledger = state / "downloaded.csv"
    lost = ledger.read_text().splitlines()[-1].split(",")[0]
    ledger.write_bytes(ledger.read_bytes()[:-30])
    (tmp_path / "NV" / f"{lost}.jpg").unlink()
    archive.reset()
    fetch(archive, tmp_path)
    assert archive.fetched() == [lost]
    assert len([path for path in archive.asked if "search" in path]) == 1
    archive.reset()
    capsys.readouterr()
    fetch(archive, tmp_path)
    assert archive.asked == []
    printed = capsys.readouterr().out
    assert "checking 5 files of earlier runs" in printed
    assert "were there before" not in printed  # the line written after the torn one is a line of its own


def test_two_runs_do_not_share_a_folder(archive: Archive, tmp_path: Path) -> None:
    archive.add(1, **NEVUS)
    archive.delay_s = 0.5
    first = threading.Thread(target=fetch, args=(archive, tmp_path))
    first.start()
    while not archive.fetched():
        time.sleep(0.01)
    assert "another run is fetching into" in refusal(archive, tmp_path)
    first.join()
    assert set(images_in(tmp_path)) == {"NV/ISIC_0000001.jpg"}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("collection", "BCN20000"),
        ("limit", 0),
        ("connections", 0),
        ("retries", -1),
        ("timeout_s", 0.0),
        ("api", "file:///data"),
        ("api", "https://example.org/api?key=1"),
        ("diagnoses", {"scar": "SCAR"}),
    ],
)
def test_a_setting_that_cannot_work_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"download.{name} "):
        DownloadConfig(**{name: value})


def test_a_bucket_is_no_place_to_download_into(archive: Archive) -> None:
    assert "data_root" in refusal(archive, "gs://anonymous@bucket/data")
