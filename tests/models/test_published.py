"""A checkpoint may be named by its place, by its name in weights/, or by its repository."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2d.classes import ISIC7
from m2d.diffusion.settings import SamplingSettings
from m2d.errors import CheckpointError
from m2d.evaluation.settings import EvaluateConfig
from m2d.export.export import write_code
from m2d.generation.generator import Generator
from m2d.generation.plan import rows_of, standard_plan
from m2d.generation.run import _absolute
from m2d.generation.settings import GenerateConfig
from m2d.models import published
from m2d.models.checkpoint import load_checkpoint
from m2d.models.published import checkpoint_path, own_name
from m2d.serving.deployment import resolved
from m2d.serving.settings import ServeConfig
from m2d.training.settings import TrainConfig, with_absolute_paths


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """weights/ with one checkpoint, called `tiny`; the current directory is another."""
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    (tmp_path / "weights" / "tiny" / "checkpoint.yaml").touch()
    monkeypatch.setattr(published, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "weights"


def test_a_name_means_the_folder_in_weights_unless_it_is_a_path(weights: Path) -> None:
    assert checkpoint_path("checkpoint", "tiny") == str(weights / "tiny")
    assert checkpoint_path("checkpoint", "other") == "other"
    assert checkpoint_path("checkpoint", "some/tiny") == "some/tiny"
    assert checkpoint_path("checkpoint", None) is None
    Path("tiny").mkdir()
    assert checkpoint_path("checkpoint", "tiny") == "tiny"


def test_where_there_is_no_weights_a_name_is_refused_with_what_to_do(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an installed package, whose wheel has none."""
    monkeypatch.setattr(published, "WEIGHTS", weights / "none")
    with pytest.raises(CheckpointError, match=r"checkpoint: .* tiny .*hub:USER/NAME"):
        checkpoint_path("checkpoint", "tiny")
    assert checkpoint_path("checkpoint", "some/tiny") == "some/tiny"
    Path("tiny").mkdir()
    assert checkpoint_path("checkpoint", "tiny") == "tiny"


def test_every_command_takes_a_name(weights: Path) -> None:
    expected = str(weights / "tiny")
    assert _absolute(GenerateConfig(checkpoint="tiny")).checkpoint == expected
    assert EvaluateConfig(checkpoint="tiny").in_this_place().checkpoint == expected
    assert resolved(ServeConfig(checkpoint=["tiny"])).checkpoint == [expected]
    assert with_absolute_paths(TrainConfig(data_root="data", init_checkpoint="tiny")).init_checkpoint == expected


def test_a_repository_is_fetched_whole_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, revision: str | None) -> str:
        return f"/cache/{name}/{revision}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_path("checkpoint", "hub:someone/lesions") == "/cache/someone/lesions/None"
    assert checkpoint_path("checkpoint", "hub:someone/lesions@v1.0") == "/cache/someone/lesions/v1.0"


@pytest.mark.parametrize("location", ["hub:", "hub:word", "hub:a/b/c", "hub:../x", "hub:some one/x"])
def test_what_names_no_repository_is_refused(location: str) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint: hub:.*names no repository"):
        checkpoint_path("checkpoint", location)


def test_without_network_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as refusal:
        checkpoint_path("init_checkpoint", "hub:someone/lesions")
    assert str(refusal.value).startswith("init_checkpoint: hub:someone/lesions cannot be had")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/x/weights/ham-64", "ham-64"),
        ("/c/hub/models--someone--lesions/snapshots/0a1b", "lesions"),
        ("/c/snapshots/0a1b", "0a1b"),
    ],
)
def test_it_is_called_by_its_folder_or_its_repository(folder: str, name: str) -> None:
    assert own_name(folder) == name


DRAWN = Path(__file__).parents[1] / "fixtures" / "ham-64.png"  # an image of each class, side by side


def test_ham_64_comes_with_m2d_and_draws_what_it_drew() -> None:
    """Within a grey level of the images that were drawn when the weights were made."""
    checkpoint = load_checkpoint(checkpoint_path("checkpoint", "ham-64"))
    sampling = SamplingSettings(solver="euler", steps=4)
    plan = standard_plan(dict.fromkeys(ISIC7.codes, 1), run_seed=0, sampling=sampling, feature="prior")
    images = Generator(checkpoint, batch_size=7, device="cpu").generate(rows_of(plan))
    with Image.open(DRAWN) as drawn:
        expected = np.asarray(drawn, dtype=np.int16)
    assert np.abs(np.concatenate(list(images), axis=1).astype(np.int16) - expected).max() <= 1


def test_the_code_beside_the_weights_is_what_export_writes_today(tmp_path: Path) -> None:
    """After a change of the networks: `write_code` into weights/ham-64, then `mark_complete`, or export it again."""
    shipped = Path(checkpoint_path("checkpoint", "ham-64"))
    for folder in ("conditioning", "vae"):
        (tmp_path / folder).mkdir()
    write_code(tmp_path, type(load_checkpoint(shipped).autoencoder.vae))
    written = {path.relative_to(tmp_path): path.read_text("utf-8") for path in tmp_path.rglob("*.py")}
    assert len(written) == 3
    assert {path.relative_to(shipped): path.read_text("utf-8") for path in shipped.rglob("*.py")} == written
