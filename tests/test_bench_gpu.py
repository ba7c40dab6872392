"""bench/gpu.py, what `make gpu` runs: on the CPU with the demo preset, and what its report says of rows that fail."""

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import Report, Row, attempt, main, preset_cases
from m2d.arguments import preset_names
from m2d.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    main(device="cpu", steps=2, output=str(path))
    return path


def test_a_row_of_each_part_is_measured_on_a_cpu_and_has_a_line_in_the_table(folder: Path) -> None:
    rows = json.loads((folder / "gpu-cpu.json").read_text())["rows"]
    assert [(row["part"], row["failed"]) for row in rows] == [
        ("presets", None), ("sampling", None), ("switches", None), ("switches", None)
    ]  # fmt: skip
    table = (folder / "gpu-cpu.md").read_text()
    assert all(row["images_per_s"] > 0 and f"| {row['name']} |" in table for row in rows)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "does not fit"),
        (RuntimeError("no kernel image\nmore of it"), "RuntimeError: no kernel image"),
    ],
)
def test_a_step_that_fails_is_a_row_with_the_reason(error: Exception, told: str) -> None:
    def fails() -> Row:
        raise error

    assert attempt("demo", fails).failed == told


def test_what_falls_short_is_named(tmp_path: Path) -> None:
    report = Report("NVIDIA H100 80GB HBM3", tmp_path)
    report.rows = [
        Row(name="fits", allocated_gib=10.5, predicted_gib=10.0, host_waits=0),
        Row(name="small", allocated_gib=0.23, predicted_gib=0.20),
        Row(name="larger", allocated_gib=12.0, predicted_gib=10.0),
        Row(name="waits", host_waits=2, waits_at=["step.py:7"]),
        Row(name="huge", part="presets", failed="does not fit"),
    ]
    assert report.path.name == "gpu-nvidia-h100-80gb-hbm3.md"
    assert report.short() == [
        "- larger: memory is 1.20 of the prediction",
        "- waits: the host waits 2 times a step, at step.py:7",
        "- huge (presets): does not fit",
    ]


def test_every_preset_can_be_measured() -> None:
    cases = preset_cases(preset_names(), torch.device("cpu"))
    assert {case.name.partition(",")[0] for case in cases} == set(preset_names())
    assert all(case.config.gradient_accumulation_steps <= 2 for case in cases)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU") as caught:
        main(output=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
