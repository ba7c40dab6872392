"""setup_data from images to features: right values, nothing made twice, a kill that costs nothing."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import descendants
from safetensors.torch import load_file
from torch import Tensor

from m2d.cli import parse
from m2d.data import setup
from m2d.data.catalog import read_catalog, scan_dataset
from m2d.data.decode import decode_resized
from m2d.data.features import ExtractionJobs, FeatureStore, feature_bytes, read_prepared, write_features
from m2d.data.settings import DataConfig
from m2d.data.setup import StageReport, prepare_images, setup_data
from m2d.data.store import PreparedImages, prepared_folder, write_images
from m2d.data.views import apply_view
from m2d.errors import ConfigError, DataError, Incomplete
from m2d.models.extractors import LITE0, Features, extractor_key, load_feature_extractor, packaged_weights
from m2d.models.settings import FeatureExtractorConfig

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"DF": 4, "MEL": 4, "NV": 4}
IMAGES, SIZE, INPUT, VIEWS = 12, 16, 64, 4
SMALL = [
    "--data.image_size", "16", "--data.views", "4", "--feature_extractor.input_size", "64", "--shard_images", "5",
    "--num_actors", "1",
]  # fmt: skip

HERE = ["--num_actors", "0"]  # in this process


def flags(root: Path, cache: Path, *more: str) -> list[str]:
    return ["--data_root", str(root), "--cache_dir", str(cache), *SMALL, *more]


def run(root: Path, cache: Path, *more: str) -> dict[str, StageReport]:
    return {report.name: report for report in setup_data(parse("setup_data", flags(root, cache, *more)))}


def counts(report: StageReport) -> tuple[int, int, int]:
    return report.found, report.made, report.failed


def marks(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which file each shard is, and when it was written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("shard_*")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, paint_images: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("painted") / "set"
    paint_images(folder, COUNTS)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which everything is done, in this process. Copy it before changing it."""
    cache: Path = tmp_path_factory.mktemp("whole") / "cache"
    reports = run(root, cache, "--all", *HERE)
    assert counts(reports["catalog"]) == (0, IMAGES, 0)
    assert counts(reports["images 16px"]) == (0, IMAGES, 0)
    assert counts(reports["features"]) == (0, IMAGES * VIEWS, 0)
    assert (reports["images 16px"].files, reports["features"].files) == (3, 3 * VIEWS)
    return cache


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` whose files keep their times."""
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Ray was asked for although nothing is missing")

    monkeypatch.setattr(setup, "ray_cluster", refuse)


def sums_of(folder: Path) -> list[str]:
    sums: list[str] = read_catalog(str(folder / "catalog.parquet"))["sha256"].to_pylist()
    return sums


def key() -> str:
    return extractor_key(FeatureExtractorConfig(input_size=INPUT))


def test_prepared_pixels_are_the_decoded_files_bit_for_bit(root: Path, whole: Path) -> None:
    folder = prepared_folder(str(whole), str(root))
    catalog = read_catalog(str(folder / "catalog.parquet"))
    images = PreparedImages(folder, SIZE).rows(catalog["sha256"].to_pylist()).read(np.arange(IMAGES))
    for path, found in zip(catalog["path"].to_pylist(), images, strict=True):
        np.testing.assert_array_equal(found, decode_resized((root / path).read_bytes(), SIZE, max_pixels=10**6))


@torch.no_grad()
def test_cached_features_are_the_extractors_own_of_each_view(root: Path, whole: Path) -> None:
    folder = prepared_folder(str(whole), str(root))
    catalog = read_catalog(str(folder / "catalog.parquet"))
    table = FeatureStore(folder, key(), SIZE).table(catalog["sha256"].to_pylist(), VIEWS)
    extractor = load_feature_extractor("efficientnet-lite0", input_size=INPUT, crop="whole")
    assert (table.dim, table.num_patches) == (1280, 4)
    decoded = [
        decode_resized((root / path).read_bytes(), SIZE, max_pixels=10**6) for path in catalog["path"].to_pylist()
    ]
    for view in range(VIEWS):
        pixels = np.ascontiguousarray(np.stack([apply_view(image, view) for image in decoded]))
        expected = extractor(extractor.preprocess(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
        found = table.batch(np.arange(IMAGES), np.full(IMAGES, view, dtype=np.int8))
        # Half a unit in fp16's last place, 2^-11 of the value, and what the memory layout costs.
        torch.testing.assert_close(found.cls.float(), expected.cls, rtol=2**-11 + 1e-4, atol=1e-4)
        torch.testing.assert_close(found.patches.float(), expected.patches, rtol=2**-11 + 1e-4, atol=1e-4)


def test_a_second_run_makes_nothing_starts_no_ray_and_clears_leftovers(
    root: Path, cache: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = marks(cache)
    leftover = next(cache.rglob("shard_*.parquet")).with_name(".shard_1.parquet.host.17.partial")
    leftover.write_bytes(b"half")  # of a run that was killed
    reports = run(root, cache, "--all")
    assert not leftover.exists()
    assert counts(reports["catalog"]) == (IMAGES, 0, 0)
    assert counts(reports["images 16px"]) == (IMAGES, 0, 0)
    assert counts(reports["features"]) == (IMAGES * VIEWS, 0, 0)
    assert marks(cache) == before
    lines = (prepared_folder(str(cache), str(root)) / "setup.jsonl").read_text().splitlines()
    totals = [record for record in map(json.loads, lines) if record["name"] == "features"]
    assert [(record["found"], record["made"]) for record in totals] == [(0, 48), (48, 0)]
    said = capsys.readouterr().out
    assert f"extractor {key()}" in said
    assert "48 of 48 image views found, 0 to extract" in said


@pytest.mark.ray
def test_tasks_and_actors_make_what_this_process_makes(
    root: Path, whole: Path, tmp_path: Path, ray_cluster: None
) -> None:
    reports = run(root, tmp_path, "--all")
    assert (counts(reports["images 16px"]), counts(reports["features"])) == ((0, IMAGES, 0), (0, IMAGES * VIEWS, 0))
    ours, theirs = (prepared_folder(str(cache), str(root)) for cache in (tmp_path, whole))
    sums = sums_of(ours)
    pixels = [PreparedImages(folder, SIZE).rows(sums).read(np.arange(IMAGES)) for folder in (ours, theirs)]
    np.testing.assert_array_equal(*pixels)
    rows, view = np.arange(IMAGES), np.full(IMAGES, VIEWS - 1, dtype=np.int8)
    found, expected = (
        FeatureStore(folder, key(), SIZE).table(sums, VIEWS).batch(rows, view) for folder in (ours, theirs)
    )
    torch.testing.assert_close(found.patches.float(), expected.patches.float(), rtol=2**-10, atol=1e-4)


def test_an_added_image_alone_is_prepared(root: Path, cache: Path, tmp_path: Path, no_ray: None) -> None:
    grown = tmp_path / "elsewhere" / "set"
    shutil.copytree(root, grown)
    prepared_folder(str(cache), str(root)).rename(prepared_folder(str(cache), str(grown)))
    before = marks(cache)
    content = (grown / "NV" / "NV_0.png").read_bytes()
    (grown / "NV" / "new.png").write_bytes(content + b"\0")  # bytes after a PNG's end are legal, and another sum
    reports = run(grown, cache, "--all", *HERE)
    assert counts(reports["catalog"]) == (0, IMAGES + 1, 0)
    assert counts(reports["images 16px"]) == (IMAGES, 1, 0)
    assert counts(reports["features"]) == (IMAGES * VIEWS, VIEWS, 0)
    assert before.items() <= marks(cache).items()


def test_another_split_or_fewer_views_make_nothing_invalid(root: Path, cache: Path, no_ray: None) -> None:
    reports = run(root, cache, "--all", "--data.split_seed", "7", "--data.views", "1")
    assert counts(reports["catalog"]) == (0, IMAGES, 0)
    assert counts(reports["images 16px"]) == (IMAGES, 0, 0)
    assert counts(reports["features"]) == (IMAGES, 0, 0)


def test_other_weights_make_their_own_features_and_leave_the_old_ones(
    root: Path, cache: Path, tmp_path: Path, no_ray: None
) -> None:
    state: dict[str, Tensor] = torch.load(packaged_weights(LITE0), weights_only=True)
    first = next(iter(state))
    torch.save({**state, first: state[first] * 1.5}, tmp_path / "other.pth")
    before = marks(cache)
    more = ["--data.views", "1", "--feature_extractor.weights", str(tmp_path / "other.pth")]
    reports = run(root, cache, "--features", *more, *HERE)
    assert counts(reports["features"]) == (0, IMAGES, 0)
    assert before.items() <= marks(cache).items()
    folder = prepared_folder(str(cache), str(root))
    other = extractor_key(FeatureExtractorConfig(input_size=INPUT, weights=str(tmp_path / "other.pth")))
    assert other != key()
    sums = sums_of(folder)
    view, rows = np.zeros(IMAGES, dtype=np.int8), np.arange(IMAGES)
    ours, theirs = (FeatureStore(folder, name, SIZE).table(sums, 1).cls(rows, view) for name in (key(), other))
    assert (ours - theirs).abs().max() > 0.01


def test_torn_shards_are_told_and_made_again(
    root: Path, cache: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    image, feature = next(cache.rglob("shard_*.parquet")), next(cache.rglob("view_2/shard_*.safetensors"))
    kept = {path: mark for path, mark in marks(cache).items() if path not in (image, feature)}
    lost_images, lost_views = pq.read_metadata(image).num_rows, len(load_file(feature)["cls"])
    for path in (image, feature):
        path.write_bytes(path.read_bytes()[:-50])
    reports = run(root, cache, "--all", *HERE)
    assert counts(reports["images 16px"]) == (IMAGES - lost_images, lost_images, 0)
    assert counts(reports["features"]) == (IMAGES * VIEWS - lost_views, lost_views, 0)
    assert kept.items() <= marks(cache).items()
    said = [line for line in capsys.readouterr().out.splitlines() if "it is made again" in line]
    assert [str(path) in line for path, line in zip((image, feature), said, strict=True)] == [True, True]


def test_two_runs_do_not_share_a_folder(root: Path, cache: Path) -> None:
    folder = prepared_folder(str(cache), str(root))
    with (folder / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="cache_dir: another setup_data"):
            run(root, cache, "--all")
    run(root, cache, "--scan")


def test_an_earlier_stage_that_was_left_out_is_asked_for(root: Path, tmp_path: Path, no_ray: None) -> None:
    with pytest.raises(ConfigError, match="add --scan"):
        run(root, tmp_path, "--images")
    with pytest.raises(ConfigError, match="add --images"):
        run(root, tmp_path, "--scan", "--features")


def test_features_that_do_not_fit_the_disk_are_refused_before_ray_starts(
    root: Path, tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(root, tmp_path, "--scan")
    folder = prepared_folder(str(tmp_path), str(root))
    catalog = read_catalog(str(folder / "catalog.parquet"))
    write_images(folder, SIZE, catalog["sha256"].to_pylist(), np.zeros((IMAGES, SIZE, SIZE, 3), dtype=np.uint8))
    needed = IMAGES * VIEWS * feature_bytes(1280, 4)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed - 1))
    with pytest.raises(DataError, match=r"features: 616\.7 kB are to be written to .*--cache_dir") as refusal:
        run(root, tmp_path, "--features")
    assert "\n" not in str(refusal.value)
    assert "0 of 48 image views found, 48 to extract" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed))
    with pytest.raises(AssertionError, match="Ray was asked for"):
        run(root, tmp_path, "--features")


def test_images_gone_bad_since_the_scan_are_left_out_with_the_reason(tmp_path: Path, paint_images: Any) -> None:
    root, folder = tmp_path / "set", tmp_path / "folder"
    paint_images(root, COUNTS)
    catalog: pa.Table = scan_dataset(str(root), DataConfig()).catalog
    paths, sums = catalog["path"].to_pylist(), catalog["sha256"].to_pylist()
    (root / "DF" / "DF_1.png").unlink()
    shutil.copy(root / "NV" / "NV_0.png", root / "NV" / "NV_2.png")  # sound, but another image
    result = prepare_images(DataConfig(image_size=SIZE), str(root), folder, list(zip(paths, sums)))
    assert result.images == IMAGES - 2
    assert result.failures == ["DF/DF_1.png: is not there", "NV/NV_2.png: has changed since the scan"]
    missing = PreparedImages(folder, SIZE).missing(sums)
    assert [path for path, absent in zip(paths, missing) if absent] == ["DF/DF_1.png", "NV/NV_2.png"]


def test_images_that_could_not_be_prepared_are_no_success(
    root: Path, tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "decode_unchanged", lambda storage, path, sha256, decode: "is not there")
    with pytest.raises(Incomplete, match=f"{IMAGES} images or views"):
        run(root, tmp_path / "cache", "--scan", "--images", *HERE)


class Overflowing(torch.nn.Module):
    """An extractor whose features of bright images are beyond fp16."""

    def preprocess(self, images: Tensor) -> Tensor:
        return images.float()

    def forward(self, x: Tensor) -> Features:
        patches = x.flatten(2).mean(dim=2).unsqueeze(1) * 1000
        return Features(patches[:, 0], patches)


def feature_jobs(folder: Path, levels: list[int]) -> ExtractionJobs:
    """One job over flat images of these grey levels."""
    sums = [f"{number:064x}" for number in range(len(levels))]
    write_images(folder, SIZE, sums, np.stack([np.full((SIZE, SIZE, 3), level, dtype=np.uint8) for level in levels]))
    paths = [f"NV/{number}.png" for number in range(len(levels))]

    def keep(view: int, rows: np.ndarray, features: Features) -> None:
        write_features(
            folder, "key", SIZE, view, [sums[row] for row in rows], features, names=[paths[row] for row in rows]
        )

    return ExtractionJobs(
        FeatureExtractorConfig(),
        "key",
        read=partial(read_prepared, PreparedImages(folder, SIZE).rows(sums)),
        keep=keep,
        jobs=[(3, np.arange(len(levels)))],
        batch_size=2,
        batch_setting="extract_batch_size",
    )


def test_a_feature_beyond_half_precision_names_its_image(tmp_path: Path) -> None:
    jobs = feature_jobs(tmp_path, [10, 60, 70, 20])  # 70 * 1000 > 65504
    with pytest.raises(DataError, match=r"features of NV/2\.png, view 3"):
        jobs.run(0, Overflowing(), "cpu")  # type: ignore[arg-type]


def test_a_prepared_image_that_is_damaged_ends_the_job_with_its_file(tmp_path: Path) -> None:
    jobs = feature_jobs(tmp_path, [10, 20])
    (path,) = tmp_path.rglob("shard_*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name} is damaged") as error:
        jobs.run(0, Overflowing(), "cpu")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_fit_the_device_names_the_setting(tmp_path: Path) -> None:
    class OutOfMemory(Overflowing):
        def forward(self, x: Tensor) -> Features:
            raise torch.OutOfMemoryError

    with pytest.raises(ConfigError, match=r"extract_batch_size 2 .* --extract_batch_size 1"):
        feature_jobs(tmp_path, [10, 20]).run(0, OutOfMemory(), "cpu")  # type: ignore[arg-type]


def test_a_node_with_other_weights_is_refused(tmp_path: Path) -> None:
    jobs = feature_jobs(tmp_path, [10])
    with pytest.raises(ConfigError, match="every node needs the same file"):
        jobs.load("cpu")


@pytest.mark.ray
def test_an_error_in_an_actor_and_more_actors_than_cpus_are_one_line(
    root: Path, cache: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"num_actors is 99 and the cluster has 5 CPUs[^\n]*$"):
        run(root, cache, "--features", "--data.views", "8", "--num_actors", "99")
    monkeypatch.setattr("m2d.models.extractors.extractor_key", lambda _: "not-what-the-actors-find")
    with pytest.raises(ConfigError, match=r"^[^\n]*not-what-the-actors-find[^\n]*$"):
        run(root, cache, "--features")


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_is_finished_without_repeating_what_was_done(
    tmp_path: Path, paint_images: Any, ray_cluster: None
) -> None:
    """30 images in 8 views and files of 4: 64 files of features, of which SIGKILL lets some be made."""
    root, cache = tmp_path / "set", tmp_path / "cache"
    paint_images(root, {"DF": 10, "MEL": 10, "NV": 10})
    more = ["--all", "--data.views", "8", "--shard_images", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "jobs/setup_data.py", *flags(root, cache, *more)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        done = lambda: len(list(cache.rglob("view_*/shard_*")))  # noqa: E731
        wait_for(lambda: done() >= 5 or process.poll() is not None, 200)
        assert process.poll() is None, (tmp_path / "log").read_text()
        # Not all: Ray's agents outlive a killed driver by a minute, waiting for it to come back.
        workers = descendants("ray::MapWorker", of=process.pid)
        assert workers
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.close()
    wait_for(lambda: not any(worker.is_running() for worker in workers), 60)

    before = marks(cache)
    views_done = sum(len(load_file(path)["cls"]) for path in before if path.suffix == ".safetensors")
    assert 5 * 4 <= views_done < 240
    reports = run(root, cache, *more, *HERE)
    assert counts(reports["catalog"]) == (30, 0, 0)
    assert counts(reports["images 16px"]) == (30, 0, 0)
    assert counts(reports["features"]) == (views_done, 240 - views_done, 0)
    assert before.items() <= marks(cache).items()
    assert reports["features"].files == 64
    assert list(cache.rglob("*.partial")) == []
