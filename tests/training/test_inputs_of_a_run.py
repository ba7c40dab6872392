"""A run goes on with the images and the weights of others that it began with, or says why it cannot."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import tiny_config, write_images

from m2d.data.catalog import dataset_fingerprint, scan_dataset
from m2d.data.setup import prepare_images
from m2d.data.store import prepared_folder
from m2d.errors import ConfigError, DataError
from m2d.experiment import Experiment, open_experiment
from m2d.files.atomic import mark_complete
from m2d.training.run import CATALOG, run_catalog
from m2d.training.settings import TrainConfig, as_dict, differences
from m2d.training.telemetry import Console
from m2d.training.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of a run on 70 images, with a cache of its own."""
    config: TrainConfig = tiny_config(write_images(tmp_path / "data"), tmp_path / "runs")
    return config


@pytest.fixture
def run(config: TrainConfig) -> Experiment:
    """That run, ended after its first checkpoint."""
    settings = as_dict(config)
    experiment, _ = open_experiment(config.experiments_dir, "run", settings, differences, fresh=False, command=[])
    run_catalog(config, experiment, config.checked_data_root, Console())
    (experiment.checkpoints / "step_00000004").mkdir()
    mark_complete(experiment.checkpoints / "step_00000004")
    return experiment


def paths_of(run: Experiment, config: TrainConfig, split: str | None = None) -> list[str]:
    """As the run has them when its command is given again."""
    rows = run_catalog(config, run, config.checked_data_root, Console()).to_pylist()
    return [row["path"] for row in rows if split in (None, row["split"])]


def paint(path: Path, colour: tuple[int, int, int]) -> None:
    Image.new("RGB", (24, 32), colour).save(path)


def test_what_is_as_it_was_is_neither_scanned_nor_spoken_of(
    run: Experiment, config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = paths_of(run, config)
    touched = Path(str(config.data_root)) / before[0]
    touched.touch()  # other times, the same bytes: one scan finds that out
    capsys.readouterr()
    assert paths_of(run, config) == before
    assert "not as" not in capsys.readouterr().out
    monkeypatch.setattr("m2d.training.run.scan_dataset", None)
    assert paths_of(run, config) == before


def test_an_image_is_known_by_its_bytes_wherever_it_lies(run: Experiment, config: TrainConfig) -> None:
    before = paths_of(run, config)
    root = Path(str(config.data_root))
    (root / before[0]).rename(root / "AKIEC" / "renamed.png")
    assert paths_of(run, config) == ["AKIEC/renamed.png", *before[1:]]
    copied = root.rename(root.with_name("moved"))
    assert paths_of(run, dataclasses.replace(config, data_root=str(copied))) == ["AKIEC/renamed.png", *before[1:]]
    assert run.info()["dataset"]["root"] == str(copied)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.unlink(), "1 gone"),
        (lambda path: paint(path, (1, 2, 3)), "1 replaced"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "1 unreadable"),
    ],
)
def test_a_run_that_cannot_have_its_images_does_not_go_on_and_loses_nothing(
    run: Experiment, config: TrainConfig, change: Callable[[Path], None], told: str
) -> None:
    for split in ("train", "val"):
        path = paths_of(run, config, split)[0]
        file = Path(str(config.data_root)) / path
        kept = file.read_bytes()
        change(file)
        with pytest.raises(DataError, match=rf"data_root.*70 images.*{told} \({path} for one\).*--fresh"):
            paths_of(run, config)
        file.write_bytes(kept)
    assert len(paths_of(run, config)) == 70


def test_what_the_run_does_not_need_is_told_and_changes_nothing(
    run: Experiment, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before, root = paths_of(run, config), Path(str(config.data_root))
    paint(root / "MEL" / "new.png", (9, 9, 9))
    (root / paths_of(run, config, "test")[0]).unlink()
    relabelled = paths_of(run, config, "train")[-1]
    shutil.move(root / relabelled, root / "DF" / "said_to_be_a_df.png")
    labels = run_catalog(config, run, str(root), Console())["label"].to_pylist()
    told = capsys.readouterr().out.replace("\n", " ")
    assert "1 gone" in told
    assert f"1 relabelled ({relabelled} for one)" in told
    assert "1 added (MEL/new.png for one)" in told
    assert "--fresh" in told
    assert [path.partition("/")[0] for path in before] == labels
    assert "MEL/new.png" not in paths_of(run, config)


def test_another_data_root_with_other_images_is_another_dataset(run: Experiment, config: TrainConfig) -> None:
    whole = Path(str(config.data_root)).with_name("whole")
    shutil.copytree(str(config.data_root), whole)
    paint(whole / "NV" / "more.png", (4, 5, 6))
    with pytest.raises(DataError, match=r"data_root: \S+whole holds other images .*1 added \(NV/more.png"):
        paths_of(run, dataclasses.replace(config, data_root=str(whole)))


def test_a_list_that_is_gone_is_made_again_of_the_same_images_alone(run: Experiment, config: TrainConfig) -> None:
    before = paths_of(run, config)
    (run.path / CATALOG).unlink()
    assert paths_of(run, config) == before
    (run.path / CATALOG).unlink()
    (Path(str(config.data_root)) / before[0]).unlink()
    with pytest.raises(DataError, match=r"70 images then, 69 now.*--fresh"):
        paths_of(run, config)


def test_images_that_setup_data_prepared_need_no_files(
    run: Experiment, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = paths_of(run, config)
    rows = run_catalog(config, run, config.checked_data_root, Console()).to_pylist()
    folder = prepared_folder(config.cache_dir, config.checked_data_root)
    prepare_images(config.data, config.checked_data_root, folder, [(row["path"], row["sha256"]) for row in rows])
    (Path(str(config.data_root)) / before[0]).unlink()
    capsys.readouterr()
    assert paths_of(run, config) == before
    assert "the run goes on with its own images" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_takes_the_images_that_are_there_now(run: Experiment, config: TrainConfig) -> None:
    """Its first try failed for want of images, or the user mended them before anything was learnt."""
    shutil.rmtree(run.checkpoints / "step_00000004")
    latents = run.path / "cache" / "latents"
    latents.mkdir()
    assert latents.is_dir()
    paths_of(run, config)
    assert latents.is_dir()  # of the same images
    paint(Path(str(config.data_root)) / "MEL" / "new.png", (9, 9, 9))
    assert "MEL/new.png" in paths_of(run, config)
    assert not latents.is_dir()
    assert run.info()["dataset"]["images"] == len(scan_dataset(str(config.data_root), config.data).catalog) == 71


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ({"perceptual": "lpips"}, "perceptual.kind: this run began with lpips"),  # whose weights this machine lacks
        ({"feature_extractor": {"weights_sha256": "0" * 64}}, "feature_extractor.weights.*sha256 000000000000, now"),
    ],
)
def test_a_run_goes_on_with_the_networks_that_it_began_with(
    run: Experiment, config: TrainConfig, recorded: dict[str, object], told: str
) -> None:
    run.update_info(**recorded)
    with pytest.raises(ConfigError, match=told):
        train(config)
    assert (run.checkpoints / "step_00000004" / "complete.json").is_file()


def test_a_file_of_classes_that_was_edited_is_seen(config: TrainConfig, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("[one, two]", encoding="utf-8")
    data = dataclasses.replace(config.data, classes=str(own))
    before = dataset_fingerprint(config.checked_data_root, data)
    assert dataset_fingerprint(config.checked_data_root, data) == before
    own.write_text("[one, two, three]", encoding="utf-8")
    assert dataset_fingerprint(config.checked_data_root, data) != before
