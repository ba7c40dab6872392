"""An export is a checkpoint of M2D and a pipeline of diffusers, with a card that tells what is known."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from m2d.cli import main
from m2d.errors import ConfigError, M2DError
from m2d.export.bundle import one_file
from m2d.export.export import export
from m2d.export.settings import ExportConfig
from m2d.models.checkpoint import load_checkpoint

NAMES = ["conditioning", "unet", "vae"]


@pytest.fixture
def linear(experiment: Path) -> str:
    return str(experiment / "checkpoints" / "linear")


def written(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by folder and name."""
    files = {name: load_file(folder / name / "diffusion_pytorch_model.safetensors") for name in NAMES}
    return {f"{place}.{name}": tensor for place, tensors in files.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ["kl", "linear", "residual"])
def test_weights_are_rounded_and_statistics_are_not(experiment: Path, exports: Path, kind: str) -> None:
    """A feature that hardly varies is divided by its deviation: rounding its mean would make it huge."""
    before, after = load_checkpoint(experiment / "checkpoints" / kind), load_checkpoint(exports / kind)
    networks = [(before.denoiser, after.denoiser), (before.autoencoder, after.autoencoder)]
    for one, other in networks:
        for name, tensor in one.state_dict().items():
            kept = other.state_dict()[name]
            assert kept.dtype == torch.float32
            torch.testing.assert_close(kept, tensor, rtol=2**-11, atol=1e-6)
    assert before.prior is not None
    assert after.prior is not None
    for name in ("counts", "mean", "scale", "isotropic"):
        assert torch.equal(getattr(after.prior, name), getattr(before.prior, name))
    exact = [name for name in after.denoiser.state_dict() if "feature_" in name or "running_" in name]
    assert any("feature_std" in name for name in exact)
    for name in ("conditioning.feature_mean", "conditioning.feature_std", "latent_norm.running_mean"):
        assert torch.equal(after.denoiser.state_dict()[name], before.denoiser.state_dict()[name])
    tensors = written(exports / kind)
    assert tensors["unet.conv_in.weight"].dtype == torch.float16
    pca = [tensor.dtype for name, tensor in tensors.items() if name.startswith("vae.linear.") or kind == "linear"]
    assert torch.float32 in pca or kind == "kl"


def test_in_single_precision_nothing_changes(linear: str, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=linear, to=str(tmp_path / "out"), dtype="fp32"))
    before, after = load_checkpoint(linear), load_checkpoint(tmp_path / "out")
    for name, tensor in before.denoiser.state_dict().items():
        assert torch.equal(after.denoiser.state_dict()[name], tensor)


def test_it_holds_no_training_state_and_no_path_or_user_of_this_machine(exports: Path, experiment: Path) -> None:
    assert not (exports / "linear" / "training").exists()
    texts = {file: file.read_text() for file in exports.rglob("*") if file.suffix in (".md", ".yaml", ".json", ".cff")}
    assert len(texts) > 10
    for file, text in texts.items():
        assert "SECRET" not in text, file
        assert str(experiment.parent) not in text, file
        assert str(exports) not in text, file
    config = yaml.safe_load((exports / "linear" / "checkpoint.yaml").read_text())["config"]
    assert config == {"data_root": None, "cache_dir": None, "seed": 3, "data": {"val_fraction": 0.1}}


def test_the_code_is_of_one_file_each_and_imports_no_m2d(exports: Path) -> None:
    sources = {file.relative_to(exports).as_posix(): file.read_text() for file in exports.rglob("*.py")}
    assert sorted(sources) == sorted(
        [
            *(f"{kind}/{file}" for kind in ("kl", "linear", "residual") for file in
              ("pipeline.py", "conditioning/m2d_conditioning.py")),
            "linear/vae/m2d_vae.py",
            "residual/vae/m2d_vae.py",
        ]
    )  # fmt: skip
    for name, source in sources.items():
        compile(source, name, "exec")
        assert "from m2d" not in source, name
        assert "import m2d" not in source, name


def test_its_definitions_are_those_of_the_modules_word_for_word() -> None:
    solver = (Path(__file__).parents[2] / "m2d/diffusion/solver.py").read_text()
    made = one_file("m2d.export.pipeline", "M2DPipeline", "1.2.3")
    multistep = solver[solver.index("def _multistep(") : solver.index("class _Step")].strip()
    assert multistep in made
    assert "_low_rank_and_isotropic" not in one_file("m2d.export.conditioning", "Conditioning", "1.2.3")


def test_the_card_says_what_the_record_says(linear: str, tmp_path: Path) -> None:
    evaluation = {
        "images": [{"name": "generated", "images": {"MEL": 4}}],
        "worth": [{"classifier": "a probe", "verdict": {"sentence": "hurts: by -0.500 [-0.600, -0.400]."}}],
        "memorization": {"verdict": "no memorisation shown: 0.0 % (0.0 to 7.4)"},
        "privacy": {"verdict": "training lesions can be told: 61.0 % (52.0 to 69.0)"},
        "consistency": {
            "mean_agreement": {"value": 0.41, "low": 0.3, "high": 0.52},
            "mean_recall_of_real": {"value": 0.7, "low": 0.6, "high": 0.8},
        },
        "fidelity": [],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    out = tmp_path / "out"
    export(
        ExportConfig(
            checkpoint=linear,
            to=str(out),
            title="A title",
            data_license="CC-BY-NC-4.0",
            evaluation=str(tmp_path / "evaluation.json"),
        )
    )
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-nc-4.0"
    for line in (
        "# A title",
        "| MEL | melanoma | 2 | 1 |",  # two images of one lesion; the other lesion is of the test part
        "| NV | melanocytic nevus | – | 0 |",
        "| device | one abacus |",
        "| images seen | 8,000 |",  # 1000 steps of 4 images on 2 workers
        "| time of the steps | 16 min 40 s |",  # at 8 images a second
        "| FLOPs of the networks | 1.00e+15 |",  # 1000 s, two workers at 0.5 TFLOP/s
        "| error of the velocity (lower is better) | 0.75 |",
        "- A probe: hurts: by -0.500 [-0.600, -0.400].",
        "- Memorisation: no memorisation shown: 0.0 % (0.0 to 7.4).",
        "- Privacy of the training lesions: training lesions can be told: 61.0 % (52.0 to 69.0).",
    ):
        assert line in card.splitlines()
    assert "41% [30%, 52%] of the generated images" in card
    assert yaml.safe_load((out / "CITATION.cff").read_text())["title"] == "M2D model A title"


def test_a_card_may_be_edited_and_the_weights_may_not(exports: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exports / "kl", tmp_path / "out"))
    (out / "README.md").write_text("# Mine")
    (out / "CITATION.cff").unlink()
    assert load_checkpoint(out).info.step == 1000
    (out / "pipeline.py").write_text("")
    with pytest.raises(M2DError, match=r"pipeline\.py"):
        load_checkpoint(out)


def test_the_card_does_not_make_up_what_is_not_known(exports: Path, linear: str, tmp_path: Path) -> None:
    card = (exports / "linear" / "README.md").read_text()
    assert "Not evaluated" in card
    assert "not stated by who exported this model" in card
    alone = shutil.copytree(linear, tmp_path / "alone")
    export(ExportConfig(checkpoint=str(alone), to=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| MEL | melanoma |\n" in card
    assert "is not recorded" in card
    assert "| device |" not in card


def test_an_evaluation_in_the_experiment_counts_if_it_is_of_this_checkpoint(linear: str, tmp_path: Path) -> None:
    copy = shutil.copytree(Path(linear).parents[1], tmp_path / "tiny_20260101_000000")
    for name, sha256 in (("other", "0" * 64), ("own", load_checkpoint(linear).sha256)):
        folder = copy / "generated_images" / name
        (folder / "evaluation").mkdir(parents=True)
        (folder / "generation.json").write_text(json.dumps({"checkpoint": sha256}))
        verdict = {"classifier": "probe", "verdict": {"sentence": f"of {name}"}}
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps({"worth": [verdict]}))
    export(ExportConfig(checkpoint=str(copy / "checkpoints" / "linear"), to=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Probe: of own" in card
    assert "of other" not in card


def test_samples_are_a_grid_of_each_class_that_can_be_drawn(linear: str, tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=linear, to=str(tmp_path / "out"), samples=1))
    assert "samples.png" in json.loads((tmp_path / "out" / "complete.json").read_text())["files"]
    assert "](samples.png)" in (tmp_path / "out" / "README.md").read_text()
    assert load_checkpoint(tmp_path / "out").prior is not None


def test_an_earlier_export_is_replaced_and_nothing_else(linear: str, exports: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exports / "kl", tmp_path / "out"))
    export(ExportConfig(checkpoint=linear, to=str(out)))
    assert json.loads((out / "vae" / "config.json").read_text())["_class_name"] == "LinearAutoencoder"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"to: .*is there and is no unchanged export"):
        export(ExportConfig(checkpoint=linear, to=str(out)))
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_of_a_failed_export_nothing_stays(linear: str, tmp_path: Path) -> None:
    with pytest.raises(M2DError, match="dry_run"):  # of the hub alone
        ExportConfig(checkpoint=linear, to=str(tmp_path / "out"), dry_run=True)
    with pytest.raises(M2DError, match="evaluation"):
        export(ExportConfig(checkpoint=linear, to=str(tmp_path / "out"), evaluation=str(tmp_path / "none.json")))
    assert list(tmp_path.iterdir()) == []


def test_images_of_an_export_are_made_in_the_current_directory(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--plan_only", "true", "--num_samples", "1", "--classes", "MEL", "--gates.enabled", "false"]
    main("generate", ["--checkpoint", str(exports / "linear"), *settings])
    assert [path.parent.parent.name for path in tmp_path.rglob("plan.parquet")] == ["generated_images"]
    assert "the checkpoint is in no experiment" in capsys.readouterr().err


class Hub:
    """Stands in for huggingface_hub.HfApi, and keeps what it is asked."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012
    cards: list[str] = []  # noqa: RUF012
    refuses = False

    def create_repo(self, name: str, **settings: Any) -> str:
        if Hub.refuses:
            raise OSError("no route\nand advice")
        self.calls.append(("create_repo", (name, settings)))
        return f"https://hub.example/{name}"

    def create_branch(self, name: str, **settings: Any) -> None:
        self.calls.append(("create_branch", (name, settings)))

    def upload_folder(self, *, folder_path: Path, **settings: Any) -> None:
        self.cards.append((folder_path / "README.md").read_text())
        self.calls.append(("upload_folder", (load_checkpoint(folder_path).step, settings)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "cards", [])
    return Hub


def test_it_is_sent_to_a_repository(linear: str, hub: type[Hub]) -> None:
    export(ExportConfig(checkpoint=linear, to="hub:someone/lesions@draft", private=True))
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1] == ("someone/lesions", {"repo_type": "model", "private": True, "exist_ok": True})
    step, settings = hub.calls[2][1]
    assert step == 1000
    assert settings["repo_id"] == "someone/lesions"
    assert settings["revision"] == "draft"


def test_the_card_says_hub_of_a_repository_alone(
    linear: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub]
) -> None:
    monkeypatch.chdir(tmp_path)
    export(ExportConfig(checkpoint=linear, to="some/folder"))
    assert "--checkpoint some/folder`" in Path("some/folder/README.md").read_text()
    export(ExportConfig(checkpoint=linear, to="hub:someone/lesions"))
    assert "--checkpoint hub:someone/lesions`" in hub.cards[0]


def test_a_dry_run_lists_and_sends_nothing(linear: str, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    export(ExportConfig(checkpoint=linear, to="hub:someone/lesions", dry_run=True))
    said = capsys.readouterr().out
    for name in ("README.md", "pipeline.py", "unet/diffusion_pytorch_model.safetensors", "to someone/lesions"):
        assert name in said
    assert hub.calls == []


def test_a_hub_that_refuses_is_told_in_one_line(
    linear: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "refuses", True)
    with pytest.raises(SystemExit) as end:
        main("export", [linear, "--to", "hub:someone/lesions"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: to: someone/lesions cannot be sent (no route)")
    assert said.count("\n") == 1
