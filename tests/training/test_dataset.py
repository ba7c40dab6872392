"""Training from what setup_data prepared: the same run, without decoding an image or running the extractor."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import records, tiny_config

from m2d.cli import parse
from m2d.data.setup import setup_data
from m2d.experiment import Experiment, complete_checkpoints
from m2d.models.checkpoint import load_checkpoint, read_prior
from m2d.training.trainer import train

VIEWS = ["--data.views", "4"]


@pytest.fixture(scope="module")
def cache_dir(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that setup_data makes for the tiny run."""
    cache = tmp_path_factory.mktemp("cache")
    prepare(data_root, cache, "--all", *VIEWS)
    return cache


def prepare(data_root: Path, cache: Path, *what: str) -> None:
    places = ["--num_actors", "0", "--data_root", str(data_root), "--cache_dir", str(cache)]
    settings = ["--data.image_size", "16", "--feature_extractor.input_size", "32"]
    setup_data(parse("setup_data", [*places, *settings, *what]))


def run(data_root: Path, root: Path, cache_dir: Path, *more: str) -> Experiment:
    return train(tiny_config(data_root, root, "--cache_dir", str(cache_dir), "--max_steps", "6", *VIEWS, *more))


def no_extractor(*arguments: object) -> None:
    raise AssertionError("the extractor was built although every feature is cached")


@pytest.mark.slow
def test_a_run_from_the_cache_takes_the_steps_of_a_run_without_it(
    data_root: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without = run(data_root, tmp_path / "without", tmp_path / "none")
    assert "prepared images" not in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr("m2d.training.networks.build_extractor", no_extractor)
        patched.setattr("m2d.data.reader.read_file", no_extractor)
        from_cache = run(data_root, tmp_path / "with", cache_dir)
    assert "prepared images and features (efficientnet-lite0-" in capsys.readouterr().out
    for name in ("train", "validation"):
        expected, found = records(without.path, name), records(from_cache.path, name)
        assert len(found) == len(expected) > 0
        for before, after in zip(expected, found, strict=True):
            losses = {key: value for key, value in before.items() if key.startswith(("loss/", "val/"))}
            assert len(losses) >= 3
            assert {key: after[key] for key in losses} == pytest.approx(losses, rel=5e-3, abs=5e-3)
    first, second = (read_prior(complete_checkpoints(one.checkpoints)[-1]) for one in (without, from_cache))
    assert first is not None
    assert second is not None
    # Without the cache a sample of 16 stands for the split, with it all 56 images do.
    assert (first.counts.sum().item(), second.counts.sum().item()) == (16, 56)
    record = from_cache.info()["feature_extractor"]
    checkpoint = load_checkpoint(complete_checkpoints(from_cache.checkpoints)[-1])
    assert checkpoint.info.extractor_key == record["key"]
    assert record["weights_sha256"].startswith(record["key"].split("-")[2])
    assert checkpoint.info.num_patches == 1  # 32 px at stride 32


def test_files_that_setup_data_rejected_are_told_again(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(data_root, images)
    (images / "NV" / "empty.png").touch()
    shutil.copy(images / "MEL" / "MEL_0.png", images / "MEL" / "again.png")
    prepare(images, cache, "--scan")
    capsys.readouterr()
    experiment = run(images, tmp_path / "runs", cache, "--max_steps", "1")
    shown = capsys.readouterr().out
    assert "catalog: from" in shown
    assert "rejected: NV/empty.png: the file is empty" in shown
    assert "left out 1 exact duplicates" in shown
    assert {experiment.info()["dataset"][name] for name in ("rejected", "duplicates")} == {1}


@pytest.mark.slow
def test_the_latent_stage_reads_cached_features(
    data_root: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = run(data_root, tmp_path / "joint", cache_dir)
    start = complete_checkpoints(joint.checkpoints)[-1]
    monkeypatch.setattr("m2d.training.networks.build_extractor", no_extractor)
    latent = run(data_root, tmp_path / "latent", cache_dir, "--stage", "latent", "--init_checkpoint", str(start))
    assert {"loss/diffusion", "loss/alignment"} <= set(records(latent.path)[-1])


@pytest.mark.slow
def test_a_cache_that_lacks_a_new_image_is_said_and_not_used(
    data_root: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One more image: the catalog is scanned anew, and the extractor runs."""
    grown = tmp_path / "images"
    shutil.copytree(data_root, grown)
    cache = tmp_path / "cache"
    prepare(grown, cache, "--all", "--data.views", "1")
    Image.new("RGB", (24, 24), "red").save(grown / "NV" / "new.png")
    capsys.readouterr()
    run(grown, tmp_path / "runs", cache, "--data.views", "1", "--max_steps", "1", "--data.val_fraction", "0")
    shown = capsys.readouterr()
    said = " ".join((shown.out + shown.err).split())
    assert "catalog: from" not in said
    assert "jobs/setup_data.py --features" in said
    assert "prepared" not in said
