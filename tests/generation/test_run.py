"""The driver: what is missing is made, what is there is kept, and a person is told where it is."""

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from tiny_checkpoint import write_checkpoint
from tiny_networks import TinyExtractor

from m2d.classes import ISIC7
from m2d.cli import main
from m2d.data.catalog import class_counts, scan_dataset
from m2d.data.settings import DataConfig
from m2d.data.views import apply_view
from m2d.errors import CheckpointError, ConfigError, DataError, Incomplete, M2DError
from m2d.generation import contact_sheet, gates, run
from m2d.generation.generator import Generator
from m2d.generation.output import read_pngs
from m2d.generation.plan import rows_of, standard_plan
from m2d.generation.provenance import read_manifest
from m2d.generation.references import read_reference
from m2d.generation.settings import GateConfig, GenerateConfig, OutputFormat
from m2d.models.checkpoint import Checkpoint


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the images that were drawn, in order."""
    ids: list[str] = []
    real = Generator.generate

    def counting(self: Generator, rows: list[Any]) -> Any:
        ids.extend(row.id for row in rows)
        return real(self, rows)

    monkeypatch.setattr(Generator, "generate", counting)
    return ids


@pytest.fixture
def drawn(counted: list[str], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The same; checkpoints are the tiny one, in an experiment under tmp_path."""
    tiny = replace(checkpoint, path=str(tmp_path / "ham" / "checkpoints" / "step_1000"))
    monkeypatch.setattr(run, "load_checkpoint", lambda path, device: tiny)
    return counted


def interrupted(settings: GenerateConfig, drawn: list[str], after: int) -> None:
    """A run that Ctrl-C ends once so many images were drawn."""
    real = Generator.generate

    def interrupting(self: Generator, rows: list[Any]) -> Any:
        if len(drawn) >= after:
            raise KeyboardInterrupt
        return real(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "generate", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run.generate(settings)


def config(**settings: Any) -> GenerateConfig:
    small = {"checkpoint": "tiny", "classes": "MEL,DF", "num_samples": 3, "steps": 2, "device": "cpu", "num_actors": 0}
    return GenerateConfig(**{**small, "gates": GateConfig(enabled=False), **settings})


def manifest(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "manifest.parquet").to_pylist()


def table_in(text: str) -> list[list[str]]:
    """The words of each line of a table on the terminal."""
    return [line.replace("│", " ").split() for line in text.splitlines()]


def pngs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for label in ("MEL", "DF") for path in (root / label).glob("*")}


def test_a_run_leaves_images_a_manifest_and_a_contact_sheet(
    drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run.generate(config())
    assert root.parent == tmp_path / "ham" / "generated_images"
    assert sorted(path.name for path in root.iterdir()) == [
        ".running.lock", "DF", "MEL", "contact_sheet.png", "generation.json", "journal.parquet",
        "manifest.parquet", "plan.parquet",
    ]  # fmt: skip
    assert sorted(pngs(root)) == sorted(f"{label}_00000{index}.png" for label in ("DF", "MEL") for index in range(3))
    assert len(manifest(root)) == 6
    with Image.open(root / "contact_sheet.png") as sheet:
        assert sheet.mode == "RGB"
    told = capsys.readouterr().out
    assert told.splitlines()[-1].startswith("6 images (6 new")
    assert told.splitlines()[-1].endswith(str(root))
    assert [line for line in table_in(told) if line[:1] in (["DF"], ["MEL"], ["all"])] == [
        ["DF", "3"], ["MEL", "3"], ["all", "6"]
    ]  # fmt: skip
    dataset = torchvision.datasets.ImageFolder(str(root))
    assert (dataset.classes, [label for _, label in dataset.samples]) == (["DF", "MEL"], [0, 0, 0, 1, 1, 1])
    assert dataset[0][0].size == (16, 16)
    scan = scan_dataset(str(root), DataConfig())
    assert {code: count for code, count in class_counts(scan.catalog).items() if count} == {"DF": 3, "MEL": 3}
    assert len(scan.rejected) == 0


def test_running_again_draws_what_was_lost_and_nothing_else(drawn: list[str]) -> None:
    root = run.generate(config())
    before, listed = pngs(root), manifest(root)
    drawn.clear()
    assert run.generate(config()) == root
    assert (drawn, pngs(root), manifest(root)) == ([], before, listed)
    (root / "MEL" / "MEL_000001.png").unlink()
    (root / "DF" / "DF_000002.png").write_bytes(b"cut")
    run.generate(config(batch_size=1))
    assert sorted(drawn) == ["DF_000002", "MEL_000001"]
    assert pngs(root).keys() == before.keys()
    assert all(_within_one_level(png, before[name]) for name, png in pngs(root).items())


def test_a_signed_run_that_goes_on_signs_by_the_same_certificate(
    drawn: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signed = config(sign="self-made", output=str(tmp_path / "out"), batch_size=1)
    interrupted(signed, drawn, after=2)
    key, before = tmp_path / "out" / ".signing_key.pem", pngs(tmp_path / "out")
    assert key.stat().st_mode & 0o077 == 0
    assert run.generate(signed) == tmp_path / "out"
    assert before.items() <= pngs(tmp_path / "out").items()
    manifests = {name: read_manifest(png) for name, png in pngs(tmp_path / "out").items()}
    assert [name for name, found in manifests.items() if found is None or found.faults] == []
    assert len(manifests) == 6
    assert len({found.serial for found in manifests.values() if found}) == 1
    assert {row["sha256"] for row in manifest(tmp_path / "out")} == {
        hashlib.sha256(png).hexdigest() for png in pngs(tmp_path / "out").values()
    }
    assert not key.exists()
    drawn.clear()
    run.generate(signed)
    assert drawn == []
    assert capfd.readouterr().err.count("warning") == 0


def test_signed_and_unsigned_images_do_not_share_a_folder(drawn: list[str], tmp_path: Path) -> None:
    root = run.generate(config(num_samples=1, sign="self-made"))
    assert run.generate(config(num_samples=1)) != root
    with pytest.raises(ConfigError, match="sign self-made there, None here"):
        run.generate(config(num_samples=1, output=str(root)))


def test_asking_for_more_adds_to_what_is_there(drawn: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    root = run.generate(config())
    drawn.clear()
    assert run.generate(config(num_samples=4, classes="MEL")) == root
    assert drawn == ["MEL_000003"]
    assert len(manifest(root)) == 7
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 images (1 new, ")
    run.generate(config(num_samples=2))
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 images (0 new; 3 others ")


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
    rows = manifest(root)
    assert {(row["class"], row["feature_weak"]) for row in rows} == {("DF", True), ("MEL", False)}
    run.generate(config(feature="none"))
    run.generate(config(classes="MEL"))
    assert "warning" not in capsys.readouterr().err


def test_a_class_that_the_prior_does_not_know_stops_the_run_before_anything_is_made(
    with_prior: Path, drawn: list[str]
) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*of VASC, .*--classes BKL,DF,MEL,NV\), .*--feature none\)[^\n]*$"):
        run.generate(config(classes="MEL,VASC"))
    assert drawn == []
    assert not with_prior.exists()
    run.generate(config(classes="MEL,VASC", feature="none", num_samples=1))


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the contact sheets that are made."""
    seen: list[str] = []
    real = contact_sheet.contact_sheet

    def recording(*args: Any, caption: str, **kwargs: Any) -> Image.Image:
        seen.append(caption)
        return real(*args, caption=caption, **kwargs)

    monkeypatch.setattr(contact_sheet, "contact_sheet", recording)
    return seen


def test_the_contact_sheet_says_what_guided(with_prior: Path, captions: list[str]) -> None:
    run.generate(config(feature_temperature=0.5))
    run.generate(config(feature="none"))
    assert captions[0].startswith("Synthetic images, not patients. ")
    assert "features drawn from the class prior at temperature 0.5 (few images of DF)" in captions[0]
    assert "the class alone, no feature" in captions[1]


def test_a_guide_and_a_shift_are_recorded_where_they_are_used(
    drawn: list[str], checkpoint: Checkpoint, captions: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weaker = copy.deepcopy(checkpoint.denoiser)
    weaker.unet.conv_out.weight.data *= 0.5
    tiny = replace(checkpoint, path=str(tmp_path / "ham" / "checkpoints" / "step_1000"))
    earlier = replace(tiny, sha256="ea" * 32, denoiser=weaker, info=replace(tiny.info, step=500))
    monkeypatch.setattr(run, "load_checkpoint", lambda path, device: earlier if "early" in path else tiny)
    (tmp_path / "early").mkdir()
    plain = run.generate(config())
    guided = run.generate(config(guide_checkpoint=str(tmp_path / "early"), guidance_scale=2.0, time_shift=3.0))
    records = [json.loads((root / "generation.json").read_text()) for root in (plain, guided)]
    assert [record.get("guide") for record in records] == [None, "ea" * 32]
    assert [record.get("time_shift") for record in records] == [None, 3.0]
    assert json.loads(pq.read_schema(guided / "manifest.parquet").metadata[b"m2d"]) == records[1]
    with Image.open(guided / "MEL" / "MEL_000000.png") as image:
        assert json.loads(image.info["settings"]) == records[1]
    assert "2 steps shifted by 3; guidance 2 at t in [0, 0.8], away from step 500; " in captions[1]


def test_an_interrupted_run_keeps_and_lists_what_it_made(drawn: list[str], tmp_path: Path) -> None:
    settings = config(batch_size=2, output=str(tmp_path / "mine"))
    interrupted(settings, drawn, after=4)
    assert len(manifest(tmp_path / "mine")) == 4
    drawn.clear()
    run.generate(settings)
    assert len(drawn) == 2


@pytest.mark.parametrize("which", ["checkpoint", "prior_checkpoint"])
def test_a_checkpoint_on_disk_gives_the_images_of_the_one_in_memory(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    directory = write_checkpoint(checkpoint, tmp_path / "ham" / "checkpoints" / "best")
    settings = config(checkpoint=str(directory), classes="MEL", num_samples=1)
    root = run.generate(settings)
    feature = "none" if checkpoint.prior is None else "prior"
    plan = standard_plan({"MEL": 1}, run_seed=0, sampling=settings, feature=feature)
    expected = Generator(checkpoint, device="cpu").generate(rows_of(plan))
    with Image.open(root / "MEL" / "MEL_000000.png") as image:
        assert np.array_equal(np.asarray(image), expected[0])


def test_a_missing_checkpoint_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        run.generate(config(checkpoint=str(tmp_path / "nothing")))
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_fit_is_a_one_line_error(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Generator, rows: list[Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(Generator, "generate", too_large)
    with pytest.raises(ConfigError, match=r"batch_size 32 does not fit.*--batch_size 16"):
        run.generate(config())


def test_a_plan_can_be_written_read_edited_and_run(drawn: list[str], tmp_path: Path) -> None:
    root = run.generate(config(plan_only=True))
    assert [path.name for path in root.iterdir()] == ["plan.parquet"]
    assert drawn == []
    plan = pq.read_table(root / "plan.parquet").to_pandas()
    assert len(plan) == 6
    edited = plan[plan["class"] == "MEL"].assign(steps=3)
    edited.to_parquet(tmp_path / "edited.parquet")
    mine = run.generate(config(plan=str(tmp_path / "edited.parquet")))
    assert mine != run.generate(config()), "other rows, another folder"
    assert {row["steps"] for row in manifest(mine)} == {3}
    expected = pngs(run.generate(config(steps=3, classes="MEL")))
    assert pngs(mine).keys() == expected.keys()
    assert all(_within_one_level(png, expected[name]) for name, png in pngs(mine).items())


def test_an_edited_plan_is_not_overwritten(drawn: list[str]) -> None:
    root = run.generate(config(plan_only=True))
    plan = pq.read_table(root / "plan.parquet")
    pq.write_table(plan.slice(0, 2), root / "plan.parquet")
    with pytest.raises(ConfigError, match=r"was it edited.*run it with --plan"):
        run.generate(config())
    assert pq.read_table(root / "plan.parquet").num_rows == 2


def test_a_plan_alone_does_not_replace_that_of_a_run(drawn: list[str], tmp_path: Path) -> None:
    root = run.generate(config(output=str(tmp_path / "mine")))
    for other in ({"num_samples": 2}, {"seed": 1}):
        with pytest.raises(ConfigError, match=r"^output: [^\n]+ is not the plan of these settings [^\n]+ --output$"):
            run.generate(config(output=str(root), plan_only=True, **other))
    assert pq.read_table(root / "plan.parquet").num_rows == 6
    assert run.generate(config(output=str(root), plan_only=True)) == root


@pytest.fixture
def parity_gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], bool]:
    """Rejects an image whose first pixels' sum is even: about half of them, whatever the networks draw."""

    def fails(image: np.ndarray) -> bool:
        return int(image[0].sum()) % 2 == 0

    def check(images: np.ndarray, *_: Any) -> list[gates.Verdict]:
        reasons = ["blank" if fails(image) else None for image in images]
        return [gates.Verdict(reason=reason, class_distance=2.0, contrast=3.0) for reason in reasons]

    monkeypatch.setattr(gates, "check", check)
    return fails


GATED = GateConfig(near_copy=False, class_consistency=False, max_attempts=20)


def test_a_rejected_image_is_replaced_and_counted(
    drawn: list[str], parity_gate: Callable[[np.ndarray], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    root = run.generate(config(num_samples=10, gates=GATED))
    assert len(pngs(root)) == 20
    for png in pngs(root).values():
        assert not parity_gate(np.asarray(Image.open(BytesIO(png))))
    rows = manifest(root)
    assert len(rows) == 20
    assert {row["gates"] for row in rows} == {"on"}
    attempts = sum(row["attempt"] for row in rows)
    assert attempts == len(drawn) - 20 > 0
    assert ["all", "20", str(attempts)] in table_in(capsys.readouterr().out)
    before = pngs(root)
    drawn.clear()
    run.generate(config(num_samples=10, gates=GATED))
    assert (drawn, pngs(root)) == ([], before)


def test_a_lost_image_comes_back_at_its_own_attempt(
    drawn: list[str], parity_gate: Callable[[np.ndarray], bool]
) -> None:
    root = run.generate(config(num_samples=10, gates=GATED))
    rows = manifest(root)
    lost = max(rows, key=lambda row: row["attempt"])
    assert lost["attempt"] > 0
    (root / lost["path"]).unlink()
    drawn.clear()
    run.generate(config(num_samples=10, gates=GATED))
    assert drawn == [lost["id"]]
    again = {row["id"]: row for row in manifest(root)}
    assert len(again) == 20
    assert (again[lost["id"]]["attempt"], again[lost["id"]]["seed"]) == (lost["attempt"], lost["seed"])


def test_a_run_interrupted_among_its_retries_ends_like_one_that_was_not(
    drawn: list[str], parity_gate: Callable[[np.ndarray], bool], tmp_path: Path
) -> None:
    """20 images in pairs, half of them rejected: 20 draws are of the first round, the rest of later ones."""
    settings = config(num_samples=10, batch_size=2, gates=GATED)
    unbroken = run.generate(replace(settings, output=str(tmp_path / "unbroken")))
    attempts = len(drawn)
    assert attempts > 28
    for after in (2, 12, 22, 28):
        drawn.clear()
        broken = replace(settings, output=str(tmp_path / f"broken {after}"))
        interrupted(broken, drawn, after)
        root = run.generate(broken)
        assert pngs(root) == pngs(unbroken)
        assert len(drawn) == attempts, "no attempt is made twice"
        _assert_manifest_is_right(root, 20)


def test_what_is_never_accepted_is_said_to_be_missing(
    drawn: list[str], parity_gate: Callable[[np.ndarray], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Incomplete, match=r"^incomplete: (\d+) of 20 images are missing") as ended:
        run.generate(config(num_samples=10, gates=replace(GATED, max_attempts=1)))
    told = capsys.readouterr().out
    root = Path(told.split()[-1])
    missing = 20 - len(pngs(root))
    assert len(drawn) == 20
    assert missing > 0
    assert f"incomplete: {missing} of 20" in str(ended.value)
    assert f"{20 - missing} images ({20 - missing} new" in told
    record = pq.read_schema(root / "manifest.parquet").metadata
    assert (record[b"asked"], sum(json.loads(record[b"missing"]).values())) == (b"20", missing)
    drawn.clear()
    run.generate(config(num_samples=10, gates=GATED))
    assert len(pngs(root)) == 20, "more attempts go on where fewer gave up"
    assert len(drawn) >= missing
    assert pq.read_schema(root / "manifest.parquet").metadata[b"missing"] == b"{}"


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Two folders, a and b, each with two images of MEL."""
    generator = np.random.default_rng(3)
    for folder in ("a", "b"):
        (tmp_path / folder / "MEL").mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / "MEL" / f"{number}.png")
    (tmp_path / "a" / "MEL" / "broken.png").write_bytes(b"no image")
    return tmp_path


def test_input_images_that_training_has_seen_are_better_varied_by_balance(
    drawn: list[str], references: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "check", lambda images, *_: [gates.Verdict(reason="near_copy")] * len(images))
    start = {"mode": "image2image", "init_images": str(references / "a"), "feature": "none", "classes": None}
    settings = config(**start, num_samples=1, gates=replace(GATED, max_attempts=1))
    with pytest.raises(Incomplete, match=r"--gates\.max_attempts, [^\n]*--balance_from real[^\n]*$"):
        run.generate(settings)


def test_image2image_starts_from_a_folder(
    drawn: list[str], references: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        mode="image2image", init_images=str(references / "a"), feature="none", strength=0.5, classes=None, num_samples=2
    )
    root = run.generate(settings)
    rows = manifest(root)
    assert [(row["mode"], row["strength"], Path(row["reference"]).name) for row in rows] == [
        ("image2image", 0.5, "0.png"), ("image2image", 0.5, "1.png")
    ]  # fmt: skip
    assert "init_images: left out MEL/broken.png: " in capsys.readouterr().err
    copy = references / "elsewhere"
    shutil.copytree(references / "a", copy)
    assert run.generate(replace(settings, init_images=str(copy))) == root, "the same images, wherever they lie"
    shutil.copy(references / "b" / "MEL" / "0.png", copy / "MEL" / "0.png")
    assert run.generate(replace(settings, init_images=str(copy))) != root


def test_interpolate_leaves_a_strip_a_pair_and_keeps_its_ends(
    drawn: list[str],
    checkpoint: Checkpoint,
    references: Path,
    parity_gate: Callable[[np.ndarray], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Means(TinyExtractor):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)  # with other weights no image may meet the gate
            self.dim = checkpoint.info.feature_dim
            self.network = torch.nn.Conv2d(3, self.dim, 8, stride=8)

    monkeypatch.setattr("m2d.generation.references.load_reference_extractor", lambda *_: Means())
    root = run.generate(
        config(
            mode="interpolate", reference_images=str(references / "a"), reference_images_b=str(references / "b"),
            steps_between=1, classes=None, gates=GATED,
        )
    )  # fmt: skip
    rows = manifest(root)
    assert [(row["group"], row["position"]) for row in rows] == [
        (f"MEL_pair00{pair}", position) for pair in (0, 1) for position in (0.0, 0.5, 1.0)
    ]
    assert {row["gates"] for row in rows} == {"recorded"}, "an end of a walk cannot be another image"
    assert {row["attempt"] for row in rows} == {0}
    assert {row["reason"] for row in rows} == {None, "blank"}
    strips = sorted(path.name for path in root.glob("strip_*"))
    assert strips == ["strip_MEL_pair000.png", "strip_MEL_pair001.png"]
    with Image.open(root / strips[0]) as strip:
        assert strip.width > 3 * strip.height


def test_balance_fills_every_class_up_and_merges(
    drawn: list[str], tmp_path: Path, paint_images: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paint_images(tmp_path / "data", {"MEL": 2, "DF": 5, "NV": 7})
    settings = config(mode="balance", data_root=str(tmp_path / "data"), to="6", classes=None, merge=True)
    root = run.generate(settings)
    assert sorted(drawn) == ["DF_000000", *(f"MEL_00000{index}" for index in range(4))]
    table = table_in(capsys.readouterr().out)
    for expected in (["DF", "5", "1", "6"], ["MEL", "2", "4", "6"], ["NV", "7", "0", "7"], ["all", "14", "5", "19"]):
        assert expected in table
    merged = pq.read_table(root / "merged_index.parquet").to_pandas()
    assert merged.groupby(["class", "source"]).size().to_dict() == {
        ("DF", "real"): 5, ("DF", "synthetic"): 1, ("MEL", "real"): 2, ("MEL", "synthetic"): 4, ("NV", "real"): 7
    }  # fmt: skip
    for row in merged.to_dict("records"):
        assert (Path(row["root"]) / row["path"]).is_file()
    drawn.clear()
    assert run.generate(settings) == root
    filled = config(mode="balance", data_root=str(tmp_path / "data"), classes="NV", to="7")
    planned = run.generate(replace(filled, plan_only=True))
    assert not planned.exists()
    assert not run.generate(replace(filled, plan_only=True, balance_from="flips")).exists()
    assert "no class lacks images for --to 7" in capsys.readouterr().out.splitlines()[-1]
    full = run.generate(filled)
    assert (drawn, manifest(full)) == ([], []), "the largest class lacks none"
    told = capsys.readouterr().out.splitlines()[-1]
    assert "no class lacks images for --to 7" in told
    assert "contact_sheet" not in told


def test_balance_from_real_varies_training_lesions_and_says_which(
    drawn: list[str], captions: list[str], tmp_path: Path, paint_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint_images(tmp_path / "data", {"MEL": 8, "DF": 12})
    names = [(code, path.stem) for code in ("DF", "MEL") for path in sorted((tmp_path / "data" / code).iterdir())]
    lesion_of = {name: f"{code}/{place // 2}" for place, (code, name) in enumerate(names)}  # two images each
    split = {"MEL/6": "val", "MEL/7": "test"}
    table = [f"{name},{lesion},{split.get(lesion, 'train')}" for name, lesion in lesion_of.items()]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(["image_id,lesion_id,split", *table]))
    allowed: list[Any] = []

    def check(images: np.ndarray, *rest: Any) -> list[gates.Verdict]:
        allowed.extend(rest[-1])
        return [gates.Verdict(reason=None)] * len(images)

    monkeypatch.setattr(gates, "check", check)
    settings = config(
        mode="balance", data_root=str(tmp_path / "data"), to="22", classes="MEL", balance_from="real", feature="none",
        strength="0.3..0.6", merge=True, gates=GateConfig(class_consistency=False),
    )  # fmt: skip
    root = run.generate(settings)
    assert captions[0].startswith("Variations of real images. ")
    rows = manifest(root)
    assert len(rows) == 14
    assert {lesion_of[Path(row["reference"]).stem] for row in rows} == {"MEL/8", "MEL/9"}, "of the training split"
    assert all(row["lesion_id"] == lesion_of[Path(row["reference"]).stem] for row in rows)
    assert {row["strength"] for row in rows} <= {0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6}
    assert len({row["strength"] for row in rows}) > 3
    found = scan_dataset(str(root), DataConfig()).catalog
    read = dict(zip(found["image_id"].to_pylist(), found["lesion_id"].to_pylist(), strict=True))
    assert read == {row["id"]: row["lesion_id"] for row in rows}, "m2d.data reads lesions.csv"
    merged = pq.read_table(root / "merged_index.parquet").to_pylist()
    assert {row["image_id"]: row["lesion_id"] for row in merged if row["source"] == "synthetic"} == read
    images_of = {lesion: {name for name, of in lesion_of.items() if of == lesion} for lesion in read.values()}
    assert sorted(map(sorted, allowed)) == sorted(sorted(images_of[lesion]) for lesion in read.values())
    before = pngs(root)
    drawn.clear()
    assert (run.generate(settings), drawn) == (root, [])
    planned = run.generate(replace(settings, plan_only=True, output=str(tmp_path / "planned")))
    again = run.generate(replace(settings, mode="standard", balance_from="noise", plan=str(planned / "plan.parquet")))
    assert again != root
    assert {row["id"]: row["lesion_id"] for row in manifest(again)} == read, "a plan says it too"
    assert pngs(again).keys() == before.keys()


def test_a_lesion_goes_into_another_skin_both_are_named_and_flips_of_the_same_are_its_control(
    drawn: list[str],
    tmp_path: Path,
    paint_images: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, masks = tmp_path / "data", tmp_path / "masks"
    paint_images(data, {"MEL": 6, "DF": 12})
    masks.mkdir()
    names = [path.stem for code in ("DF", "MEL") for path in sorted((data / code).iterdir())]
    splits = {"MEL_5": "test", "DF_11": "val"}
    lines = [f"{name},lesion {name},{splits.get(name, 'train')}" for name in names]
    (data / "metadata.csv").write_text("\n".join(["image_id,lesion_id,split", *lines]))
    for name in names:
        ellipse = Image.new("L", (96, 80))
        ImageDraw.Draw(ellipse).ellipse((35, 30, 60, 50), fill=255)
        ellipse.save(masks / f"{name}_segmentation.png")
    allowed: list[Any] = []

    def check(images: np.ndarray, *rest: Any) -> list[gates.Verdict]:
        allowed.extend(rest[-1])
        return [gates.Verdict(reason=None)] * len(images)

    monkeypatch.setattr(gates, "check", check)
    settings = config(
        mode="balance", data_root=str(data), to="13", classes="MEL", balance_from="real", feature="none", merge=True,
        masks=str(masks), gates=GateConfig(class_consistency=False),
    )  # fmt: skip
    root = run.generate(settings)
    rows = manifest(root)
    assert len(rows) == 7
    for row in rows:
        lesion, skin = (row[name].removeprefix("lesion ") for name in ("lesion_id", "skin_lesion_id"))
        assert (Path(row["reference"]).stem, Path(row["reference_b"]).stem) == (lesion, skin)
        assert lesion.startswith("MEL")
        assert skin.startswith("DF")
        assert not {lesion, skin} & {"MEL_5", "DF_11"}, "of the training split"
        assert (lesion, skin) in allowed, "the gate leaves out both"
    merged = {
        row["image_id"]: row["skin_lesion_id"] for row in pq.read_table(root / "merged_index.parquet").to_pylist()
    }
    assert merged == dict.fromkeys(names) | {row["id"]: row["skin_lesion_id"] for row in rows}
    drawn.clear()
    assert (run.generate(settings), drawn) == (root, [])
    planned = run.generate(replace(settings, plan_only=True, output=str(tmp_path / "planned")))
    again = run.generate(config(plan=str(planned / "plan.parquet"), gates=settings.gates))
    drop = {"sha256", "created"}
    told, before = ([{k: v for k, v in row.items() if k not in drop} for row in of] for of in (manifest(again), rows))
    assert told == before, "a plan says it all"
    Image.new("L", (96, 80), 9).save(masks / f"{rows[0]['lesion_id'].removeprefix('lesion ')}_segmentation.png")
    with pytest.raises(ConfigError, match="holds images of other settings"):
        run.generate(replace(settings, output=str(root)))

    of_flips = replace(settings, balance_from="flips", feature=None, masks=None)
    with pytest.raises(ConfigError, match="sign: "):
        run.generate(replace(of_flips, sign="self-made"))
    capsys.readouterr()
    flips = run.generate(of_flips)
    flipped = manifest(flips)
    assert "synthetic" not in capsys.readouterr().out
    assert [row["id"] for row in flipped] == [row["id"] for row in rows]
    assert {row["reference"] for row in flipped} == {row["reference"] for row in rows}
    assert len({(row["reference"], row["view"]) for row in flipped}) == 7, "each use is another one"
    for row in flipped:
        with Image.open(flips / row["path"]) as image:
            assert image.info["synthetic"] == "false"
            views = [apply_view(read_reference(row["reference"], 16), view) for view in range(1, 8)]
            assert sum(np.array_equal(image, view) for view in views) == 1


@pytest.mark.parametrize("format_name", ["webdataset", "parquet"])
def test_shards_hold_the_pngs_of_the_folder_and_are_made_once(drawn: list[str], format_name: OutputFormat) -> None:
    settings = config(format=format_name, num_samples=5, batch_size=2, shard_images=5)
    root = run.generate(settings)
    shards = {path: path.read_bytes() for path in sorted((root / "shards").iterdir())}
    sizes = [len(read_pngs(path)) for path in shards]
    assert sorted(sizes) == [2, 4, 4], "whole batches, as many as fit"
    assert len(manifest(root)) == 10
    assert (root / "contact_sheet.png").exists()
    drawn.clear()
    run.generate(settings)
    assert drawn == []
    next(iter(shards)).unlink()
    run.generate(settings)
    assert {path: path.read_bytes() for path in sorted((root / "shards").iterdir())} == shards


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a few files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here; test_a_failing_write covers the rest")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False, capture_output=True)


def test_a_full_disk_ends_the_run_in_one_line_and_loses_nothing(drawn: list[str], tiny_disk: Path) -> None:
    settings = config(output=str(tiny_disk / "out"), num_samples=40, batch_size=4)
    with pytest.raises(ConfigError, match=r"^[^\n]*No space left on device.*make room[^\n]*$"):
        run.generate(settings)
    made = len(drawn)
    assert 0 < made < 80
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    first = set(drawn)
    drawn.clear()
    root = run.generate(settings)
    assert len(pngs(root)) == 80
    assert first | set(drawn) == set(pq.read_table(root / "manifest.parquet")["id"].to_pylist())
    assert len(drawn) < 80, "what was finished is not made again"
    unbroken = run.generate(config(num_samples=40, batch_size=4))
    assert pngs(root) == pngs(unbroken)
    _assert_manifest_is_right(root, 80)


def test_a_failing_write_ends_the_run_in_one_line(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("MEL_000002.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ConfigError, match=r"No space left on device.*make room") as caught:
            run.generate(config(num_samples=4, batch_size=2))
    assert "\n" not in str(caught.value)
    drawn.clear()
    root = run.generate(config(num_samples=4, batch_size=2))
    # Its batch, and the one after it unless that was made while this one was being written.
    assert sorted(drawn) in (["DF_000002", "MEL_000002"], ["DF_000002", "DF_000003", "MEL_000002", "MEL_000003"])
    _assert_manifest_is_right(root, 8)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(
    counted: list[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """SIGKILL in the middle, twice: nothing missing, nothing twice, every file that of a run nobody disturbed."""
    directory = write_checkpoint(checkpoint, tmp_path / "ham" / "checkpoints" / "best")
    arguments = {
        "checkpoint": str(directory), "output": str(tmp_path / "killed"), "classes": "MEL,DF", "num_samples": "50",
        "batch_size": "3", "steps": "2", "device": "cpu", "num_actors": "0", "gates.enabled": "false",
    }  # fmt: skip
    flags = [text for name, value in arguments.items() for text in (f"--{name}", value)]
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["m2d.generation.run"])  # or each process would spend seconds on importing torch
    root = tmp_path / "killed"
    for enough in (9, 36):
        process = forks.Process(target=main, args=("generate", flags))
        process.start()
        while process.is_alive() and len(list(root.glob("*/*.png"))) < enough:
            time.sleep(0.01)
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
    tables = [pq.read_table(path) for path in (*root.glob("parts/*.parquet"), *root.glob("journal.*"))]
    listed = {image_id for table in tables for image_id in table["id"].to_pylist()}
    assert 30 <= len(listed) < 100
    settings = config(checkpoint=str(directory), num_samples=50, batch_size=3)
    killed = run.generate(replace(settings, output=str(tmp_path / "killed")))
    assert len(counted) == len(set(counted)) == 100 - len(listed)
    unbroken = run.generate(replace(settings, output=str(tmp_path / "unbroken")))
    assert pngs(killed) == pngs(unbroken)
    _assert_manifest_is_right(killed, 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "image2image", "init_images": "EMPTY"}, "init_images: .* holds no image"),
        ({"mode": "image2image", "init_images": "NOWHERE"}, "init_images: .* does not exist"),
        ({"plan": "NOWHERE"}, "plan: .* does not exist"),
        ({"mode": "balance", "data_root": "EMPTY"}, "data_root: .* has no class folder"),
        ({"mode": "balance", "catalog": "NOWHERE"}, "catalog: .* does not exist"),
        ({"output": "FILE"}, "output: .* cannot be written"),
        ({"feature": "prior"}, "feature is prior, but the checkpoint .* holds no feature prior"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    drawn: list[str], tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {name.upper(): str(tmp_path / name) for name in ("empty", "file", "nowhere")}
    with pytest.raises(M2DError, match=message) as caught:
        run.generate(config(**{name: places.get(value, value) for name, value in settings.items()}))
    assert "\n" not in str(caught.value)
    assert drawn == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def _assert_manifest_is_right(root: Path, count: int) -> None:
    """One row a file and one file a row, every hash that of its file."""
    rows = manifest(root)
    assert len({row["id"] for row in rows}) == len(rows) == count
    files = {path.relative_to(root).as_posix() for code in ISIC7.codes for path in (root / code).glob("*")}
    assert files == {row["path"] for row in rows}
    for row in rows:
        assert hashlib.sha256((root / row["path"]).read_bytes()).hexdigest() == row["sha256"]


def _within_one_level(one: bytes, other: bytes) -> bool:
    pixels = [np.asarray(Image.open(BytesIO(encoded))).astype(int) for encoded in (one, other)]
    return bool(np.abs(pixels[0] - pixels[1]).max() <= 1)
