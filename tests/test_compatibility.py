"""What an earlier M2D wrote loads, resumes, continues and gives the same pixels and numbers.

tests/fixtures/before was written by commit 41fd7c3 from the demo's own images, see its README. Only public commands are
used here. On the machine that wrote it everything must be equal; other CPUs and versions of torch round differently, so
there pixels may differ by one level and numbers a little.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from m2d.cli import main

BEFORE = Path(__file__).parent / "fixtures" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text()) if (BEFORE / "expected.json").is_file() else {}
NAME = "before_20261126_000000"
# The settings that the fixture was made with.
EXTRACT = ["--data.image_size", "24", "--data.views", "1", "--feature_extractor.input_size", "32"]
SETUP = ["--all", "--num_actors", "0", *EXTRACT]
TRAIN = [
    "--name", "before", "--num_workers", "0", "--max_steps", "6", "--saving.every_steps", "3", "--seed", "3", *EXTRACT,
    "--perceptual.kind", "features", "--feature_extractor.statistics_images", "14",
    "--autoencoder.block_channels", "[4,8]", "--autoencoder.latent_channels", "2", "--autoencoder.norm_groups", "4",
    "--unet.block_channels", "[8,8]", "--unet.layers_per_block", "1", "--unet.attention_levels", "[false,true]",
    "--unet.head_dim", "8", "--unet.norm_groups", "4", "--conditioning.context_dim", "8",
    "--conditioning.feature_tokens", "1", "--projector.hidden_dim", "8", "--discriminator.enabled", "true",
    "--discriminator.channels", "4", "--discriminator.layers", "1", "--discriminator.start_step", "2",
    "--optimizer.warmup_steps", "1", "--optimizer.lr_denoiser", "1e-2", "--optimizer.lr_autoencoder", "1e-2",
    "--schedule.vae_warmup_fraction", "0.1", "--schedule.ema_decay", "0.5", "--schedule.log_every_steps", "1",
    "--saving.validation_images", "4", "--batch_size", "4", "--ray.threads_per_worker", "1",
    "--telemetry.pictures", "false",
]  # fmt: skip
GENERATE = [
    "--steps", "4", "--num_actors", "0", "--device", "cpu", "--gates.max_attempts", "2", "--gates.class_consistency",
    "false",
]  # fmt: skip
# With few images the default quantiles are extremes, which many a wrong rule would find too.
INNER_GATES = ["--gates.near_copy_quantile", "0.3", "--gates.class_quantile", "0.6", "--gates.neighbours", "2"]
EVALUATE = [
    "--num_actors", "0", "--device", "cpu", "--bootstrap", "100", "--seeds", "1", "--feature_extractor.input_size",
    "32", "--independent_extractor.input_size", "32", "--data.val_fraction", "0", "--data.test_fraction", "0.4",
]  # fmt: skip
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pinned on a CPU")


def machine() -> dict[str, str]:
    """What decides how sums are rounded."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "torch": torch.__version__.partition("+")[0],
        "numpy": np.__version__,
        "cpu": model or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


SAME_MACHINE = machine() == EXPECTED.get("machine")


def weights(checkpoint: Path) -> dict[str, Any]:
    """For each file of weights a sha256 over names and values, and the middle value of each tensor."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        tensors = {name: tensor.double().flatten() for name, tensor in sorted(load_file(path).items())}
        values = [float(f"{tensor[len(tensor) // 2]:.6g}") for tensor in tensors.values() if len(tensor)]
        digest = hashlib.sha256()
        for name, tensor in tensors.items():  # the order of a file's tensors, and its metadata, may change
            digest.update(name.encode() + tensor.numpy().tobytes())
        found[str(path.relative_to(checkpoint))] = [digest.hexdigest(), values]
    return found


def losses(record: Path) -> list[dict[str, float]]:
    """The losses and gradient norms of each step."""
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("loss/", "gradient_norm/", "step"))} for row in rows]


def numbers(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The results in evaluation.json by path; of a long list its length, mean, smallest and largest."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, list):
            plain = [entry for entry in value if isinstance(entry, (int, float)) and not isinstance(entry, bool)]
            if len(value) > 12 and len(plain) == len(value):
                found[path] = [len(plain), sum(plain) / len(plain), min(plain), max(plain)]
            elif len(value) > 40:
                found[path] = len(value)
                walk(value[0], f"{path}/0")
            else:
                for number, inner in enumerate(value):
                    walk(inner, f"{path}/{number}")
        elif isinstance(value, (int, float)):
            found[path] = value

    for part in ("image_size", "images", "reconstruction_psnr_db", "fidelity", "memorization", "downstream"):
        walk(evaluation[part], part)
    for part in ("autoencoder_downstream", "consistency"):
        walk(evaluation[part], part)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's files where an M2D of before would have left them, had it run in this folder."""
    root = tmp_path_factory.mktemp("before").resolve()
    shutil.copytree(BEFORE / "data", root / "data")
    for path in (root / "data").rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))  # by which setup_data knows its files again
    of_path = hashlib.sha256(str(root / "data").encode()).hexdigest()[:8]
    shutil.copytree(BEFORE / "prepared", root / "cache" / f"data-{of_path}")
    shutil.copytree(BEFORE / "experiment", root / "experiments" / NAME, symlinks=True)
    for folder in ("generated_images", "logs", "outputs", "visualizations", "wandb"):  # empty, so git has them not
        (root / "experiments" / NAME / folder).mkdir(exist_ok=True)
    shutil.copytree(BEFORE / "generated", root / "generated")
    for path in root.rglob("*"):
        if path.suffix in (".json", ".yaml") and path.is_file():
            text = path.read_text()
            if "@HERE@" in text:
                path.write_text(text.replace("@HERE@", str(root)))
    for path in root.rglob("complete.json"):  # it lists sizes, and checkpoint.yaml has another one now
        files = {name: (path.parent / name).stat().st_size for name in json.loads(path.read_text())["files"]}
        path.write_text(json.dumps({"files": files}))
    return root


@pytest.fixture
def experiment(place: Path, tmp_path: Path) -> Iterator[Path]:
    """The old experiment, put back as it was after the test."""
    folder = place / "experiments" / NAME
    shutil.copytree(folder, tmp_path / "kept", symlinks=True)
    yield folder
    shutil.rmtree(folder)
    shutil.move(tmp_path / "kept", folder)


def generate(experiment: Path, each: int, output: Path, *more: str) -> None:
    checkpoint = ["--checkpoint", str(checkpoint_of(experiment)), "--num_samples", str(each)]
    main("generate", [*checkpoint, *GENERATE, *more, "--output", str(output)])


def thresholds(reference: Path) -> dict[str, Any]:
    """The numbers of a gate reference."""
    with safe_open(reference, "pt") as opened:
        (document,) = opened.metadata().values()
    found: dict[str, Any] = json.loads(document)
    return found


def checkpoint_of(experiment: Path) -> Path:
    return experiment / "checkpoints" / "step_00000003"


def stamps(folder: Path) -> dict[str, tuple[int, str]]:
    """When each file was written, and what is in it."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".png", ".safetensors", ".parquet")]
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in paths
    }


def assert_close(found: Any, expected: Any, where: str, tolerance: float) -> None:
    """Equal where the machine is the same; elsewhere within a relative and absolute tolerance."""
    if SAME_MACHINE:
        tolerance = 1e-9
    assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance) or found != found != expected, where


def test_an_old_checkpoint_gives_the_same_pixels_and_gate_thresholds(experiment: Path, tmp_path: Path) -> None:
    shutil.rmtree(experiment / "gate_reference")  # so that it is made again
    generate(experiment, 3, tmp_path)
    old = sorted(path.relative_to(BEFORE / "generated") for path in (BEFORE / "generated").rglob("*.png"))
    assert len(old) == 21
    for name in old:
        before, now = (np.asarray(Image.open(root / name)).astype(int) for root in (BEFORE / "generated", tmp_path))
        assert before.shape == now.shape
        assert np.abs(before - now).max() <= (0 if SAME_MACHINE else 1), name
    before, now = (pq.read_table(root / "manifest.parquet").to_pydict() for root in (BEFORE / "generated", tmp_path))
    assert before.keys() == now.keys()
    for column in before.keys() - {"created"} if SAME_MACHINE else {"id", "class", "seed", "attempt"}:
        assert before[column] == now[column], column
    tolerance = 0 if SAME_MACHINE else 1e-3
    (reference,) = (BEFORE / "experiment" / "gate_reference").iterdir()
    made = experiment / "gate_reference" / reference.name  # its name is a hash over images and settings
    with safe_open(reference, "pt") as old_one, safe_open(made, "pt") as new_one:
        assert set(old_one.keys()) == set(new_one.keys())
        for key in old_one.keys():  # noqa: SIM118 - no mapping
            torch.testing.assert_close(new_one.get_tensor(key), old_one.get_tensor(key), rtol=tolerance, atol=tolerance)
        assert old_one.metadata().keys() == new_one.metadata().keys()
        if SAME_MACHINE:  # among them the thresholds
            assert new_one.metadata() == old_one.metadata()


def test_gates_of_other_quantiles_have_the_same_thresholds(experiment: Path, tmp_path: Path) -> None:
    shutil.rmtree(experiment / "gate_reference")
    generate(experiment, 1, tmp_path, "--classes", "NV", *INNER_GATES)
    (reference,) = (experiment / "gate_reference").iterdir()
    found = thresholds(reference)
    assert found.keys() == EXPECTED["inner_gates"].keys()
    for name, value in EXPECTED["inner_gates"].items():
        if isinstance(value, float):
            assert_close(found[name], value, name, 1e-3)
        elif name == "class_thresholds":
            for now, before in zip(found[name], value, strict=True):
                assert_close(now, before, name, 1e-3)
        else:
            assert found[name] == value, name


def test_an_old_generated_folder_continues(place: Path, experiment: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "generated", tmp_path / "generated")
    journal = pq.read_table(folder / "journal.parquet")
    images = {name: stamp for name, stamp in stamps(folder).items() if name.endswith(".png")}
    reference = stamps(experiment / "gate_reference")
    generate(experiment, 4, folder)
    after = stamps(folder)
    assert images == {name: after[name] for name in images}
    rows = pq.read_table(folder / "journal.parquet")
    assert rows.schema.equals(journal.schema)
    assert [row for row in rows.to_pylist() if row["id"] in journal["id"].to_pylist()] == journal.to_pylist()
    assert pq.read_table(folder / "manifest.parquet").num_rows == 28
    assert stamps(experiment / "gate_reference") == reference  # used, not made again


def test_an_old_killed_run_resumes_on_its_cache_to_the_same_weights(
    place: Path, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = stamps(place / "cache")
    places = ["--data_root", str(place / "data"), "--cache_dir", str(place / "cache")]
    main("setup_data", [*places, *SETUP])
    main("train", [*places, "--experiments_dir", str(place / "experiments"), *TRAIN])
    said = capsys.readouterr().out
    assert stamps(place / "cache") == cache
    assert "resumed" in said
    assert "prepared images and features (efficientnet-lite0-579344248a93-32-whole)" in said
    assert [path.name for path in (place / "experiments").iterdir()] == [NAME]
    found = weights(experiment / "checkpoints" / "step_00000006")
    assert found.keys() == EXPECTED["weights"].keys()
    for name, (digest, values) in found.items():
        old_digest, old_values = EXPECTED["weights"][name]
        if SAME_MACHINE:
            assert digest == old_digest, name
        np.testing.assert_allclose(values, old_values, rtol=0.02, atol=2e-3, err_msg=name)
    for now, before in zip(losses(experiment / "metrics" / "train.jsonl"), EXPECTED["losses"], strict=True):
        assert now.keys() == before.keys()
        for key, value in before.items():
            assert_close(now[key], value, f"step {before['step']} {key}", 1e-2)


def test_an_old_experiment_is_listed_and_shown(
    place: Path, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--experiments_dir", str(place / "experiments"), "--json"]
    main("experiments", ["list", *where])
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["name"] == NAME
    assert listed["state"] == "resumable"
    assert (listed["steps_done"], listed["total_steps"]) == (3, 6)
    assert listed["path"] == str(experiment)
    main("experiments", ["show", *where])
    shown = json.loads(capsys.readouterr().out)
    assert shown["checkpoints"][0]["name"] == "step_00000003"
    assert shown["config"]["unet"]["block_channels"] == [8, 8]
    assert shown["curves"]["loss/reconstruction"]["values"][:3] == [
        row["loss/reconstruction"] for row in EXPECTED["losses"][:3]
    ]


def test_an_evaluation_gives_the_same_numbers(place: Path, experiment: Path, tmp_path: Path) -> None:
    sets = ["--real", str(place / "data"), "--generated", str(place / "generated")]
    places = ["--checkpoint", str(checkpoint_of(experiment)), "--cache_dir", str(tmp_path / "cache")]
    main("evaluate", [*sets, *places, *EVALUATE, "--output", str(tmp_path / "evaluation")])
    found = numbers(json.loads((tmp_path / "evaluation" / "evaluation.json").read_text()))
    assert found.keys() == EXPECTED["evaluation"].keys()
    for path, value in EXPECTED["evaluation"].items():
        if isinstance(value, list):
            for now, before in zip(found[path], value, strict=True):
                assert_close(now, before, path, 0.05)
        elif SAME_MACHINE or path.startswith(("images", "fidelity")):  # a classifier of 20 images turns on a rounding
            assert_close(found[path], value, path, 0.05)
