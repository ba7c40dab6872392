"""The driver: what is missing is made, what is there is kept, and a person is told where it is."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.generation import run
from m2d.generation.generator import Generator
from m2d.generation.request import class_requests
from m2d.generation.settings import GenerateConfig
from m2d.models.checkpoint import Checkpoint, mark_complete, write_inference_files


@pytest.fixture
def drawn(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Ids of the images that were drawn, in order; checkpoints are the tiny one, in an experiment under tmp_path."""
    tiny = replace(checkpoint, path=str(tmp_path / "ham" / "checkpoints" / "step_1000"))
    monkeypatch.setattr(run, "load_checkpoint", lambda path, device: tiny)
    ids: list[str] = []
    real = Generator.generate

    def counting(self: Generator, requests: list[Any]) -> Any:
        ids.extend(request.image_id for request in requests)
        return real(self, requests)

    monkeypatch.setattr(Generator, "generate", counting)
    return ids


def config(**settings: Any) -> GenerateConfig:
    return GenerateConfig(
        **{"checkpoint": "tiny", "classes": "MEL,DF", "num_samples": 3, "steps": 2, "device": "cpu", **settings}
    )


def pngs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for label in ("MEL", "DF") for path in (root / label).glob("*")}


def test_a_run_leaves_images_a_manifest_and_a_contact_sheet(
    drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run.generate(config())
    assert root.parent == tmp_path / "ham" / "generated_images"
    assert sorted(path.name for path in root.iterdir()) == [
        "DF", "MEL", "contact_sheet.png", "generation.json", "manifest.parquet"
    ]  # fmt: skip
    assert sorted(pngs(root)) == sorted(f"{label}_00000{index}.png" for label in ("DF", "MEL") for index in range(3))
    assert pq.read_table(root / "manifest.parquet").num_rows == 6
    with Image.open(root / "contact_sheet.png") as sheet:
        assert sheet.mode == "RGB"
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert out[0].startswith("6 images (6 new")
    assert out[0].endswith(str(root))


def test_running_again_draws_nothing(drawn: list[str]) -> None:
    root = run.generate(config())
    before, manifest = pngs(root), pq.read_table(root / "manifest.parquet")
    drawn.clear()
    assert run.generate(config()) == root
    assert drawn == []
    assert pngs(root) == before
    assert pq.read_table(root / "manifest.parquet") == manifest


def test_running_again_draws_what_was_lost_and_it_is_the_same(drawn: list[str]) -> None:
    root = run.generate(config())
    before = pngs(root)
    (root / "MEL" / "MEL_000001.png").unlink()
    (root / "DF" / "DF_000002.png").write_bytes(b"cut")
    drawn.clear()
    run.generate(config(batch_size=1))
    assert sorted(drawn) == ["DF_000002", "MEL_000001"]
    assert pngs(root).keys() == before.keys()
    lost = pngs(root)["MEL_000001.png"]
    assert lost == before["MEL_000001.png"] or _within_one_level(lost, before["MEL_000001.png"])


def test_asking_for_more_adds_to_what_is_there(drawn: list[str]) -> None:
    root = run.generate(config())
    drawn.clear()
    assert run.generate(config(num_samples=4, classes="MEL")) == root
    assert drawn == ["MEL_000003"]
    assert pq.read_table(root / "manifest.parquet").num_rows == 7


def test_other_settings_go_elsewhere_or_are_refused(drawn: list[str], tmp_path: Path) -> None:
    assert run.generate(config()) != run.generate(config(seed=1))
    output = str(tmp_path / "mine")
    run.generate(config(output=output))
    with pytest.raises(ConfigError, match=r"guidance_scale 1.5 there, 3.0 here"):
        run.generate(config(output=output, guidance_scale=3.0))


@pytest.fixture
def with_prior(drawn: list[str], prior_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`drawn`, but the checkpoint has a prior in which DF is weak and VASC is not at all. Returns the experiment."""
    tiny = replace(prior_checkpoint, path=str(tmp_path / "ham" / "checkpoints" / "step_1000"))
    monkeypatch.setattr(run, "load_checkpoint", lambda path, device: tiny)
    return tmp_path / "ham"


def test_images_with_and_without_drawn_features_never_mix(with_prior: Path) -> None:
    drawn_features, again = run.generate(config()), run.generate(config(feature="prior"))
    assert again == drawn_features, "prior is what None decides where there is one"
    alone, nearer = run.generate(config(feature="none")), run.generate(config(feature_temperature=0.5))
    assert len({drawn_features, alone, nearer}) == 3
    one, other, third = (pngs(root)["MEL_000000.png"] for root in (drawn_features, alone, nearer))
    assert not _within_one_level(one, other)
    assert not _within_one_level(one, third)
    with pytest.raises(ConfigError, match="feature none there, prior here"):
        run.generate(config(output=str(alone)))


def test_a_weak_class_is_said_in_one_line_and_recorded(with_prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run.generate(config())
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "fewer than 30 training images stand behind the features of DF;" in warnings[0]
    rows = pq.read_table(root / "manifest.parquet").to_pylist()
    assert {(row["class"], row["feature_weak"]) for row in rows} == {("DF", True), ("MEL", False)}
    run.generate(config(feature="none"))
    run.generate(config(classes="MEL"))
    assert "warning" not in capsys.readouterr().err


def test_a_class_that_the_prior_does_not_know_stops_the_run_before_anything_is_made(
    with_prior: Path, drawn: list[str]
) -> None:
    with pytest.raises(DataError, match=r"of VASC, .*--classes BKL,DF,MEL,NV\), .*--feature none\)") as caught:
        run.generate(config(classes="MEL,VASC"))
    assert "\n" not in str(caught.value)
    assert drawn == []
    assert not with_prior.exists()
    run.generate(config(classes="MEL,VASC", feature="none", num_samples=1))


def test_the_contact_sheet_says_what_guided(with_prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    real = run.contact_sheet

    def recording(*args: Any, caption: str, **kwargs: Any) -> Image.Image:
        captions.append(caption)
        return real(*args, caption=caption, **kwargs)

    monkeypatch.setattr(run, "contact_sheet", recording)
    run.generate(config(feature_temperature=0.5))
    run.generate(config(feature="none"))
    assert "features drawn from the class prior at temperature 0.5 (few images of DF)" in captions[0]
    assert "the class alone, no feature" in captions[1]


def test_an_interrupted_run_keeps_and_lists_what_it_made(
    drawn: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting, root = Generator.generate, tmp_path / "mine"

    def interrupted(self: Generator, requests: list[Any]) -> Any:
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return counting(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.generate(config(batch_size=2, output=str(root)))
    assert pq.read_table(root / "manifest.parquet").num_rows == 4
    drawn.clear()
    run.generate(config(batch_size=2, output=str(root)))
    assert len(drawn) == 2


@pytest.mark.parametrize("which", ["checkpoint", "prior_checkpoint"])
def test_a_checkpoint_on_disk_gives_the_images_of_the_one_in_memory(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    directory = tmp_path / "ham" / "checkpoints" / "best"
    for folder in ("vae", "unet"):
        (directory / folder).mkdir(parents=True)
    tensors = {"vae": checkpoint.autoencoder.vae.state_dict(), "denoiser": checkpoint.denoiser.state_dict()}
    write_inference_files(
        directory, checkpoint.info, checkpoint.autoencoder, checkpoint.denoiser.unet, tensors, checkpoint.prior
    )
    mark_complete(directory)
    settings = config(checkpoint=str(directory), classes="MEL", num_samples=1)
    root = run.generate(settings)
    expected = Generator(checkpoint, settings, device="cpu").generate(
        class_requests(["MEL"], num_samples=1, run_seed=0)
    )
    with Image.open(root / "MEL" / "MEL_000000.png") as image:
        assert np.array_equal(np.asarray(image), expected[0])


def test_a_missing_checkpoint_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        run.generate(config(checkpoint=str(tmp_path / "nothing")))
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_fit_is_a_one_line_error(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Generator, requests: list[Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(Generator, "generate", too_large)
    with pytest.raises(ConfigError, match=r"batch_size 32 does not fit.*--batch_size 16"):
        run.generate(config())


def _within_one_level(one: bytes, other: bytes) -> bool:
    pixels = [np.asarray(Image.open(BytesIO(encoded))).astype(int) for encoded in (one, other)]
    return bool(np.abs(pixels[0] - pixels[1]).max() <= 1)
