"""One rule of precision: what a T4, an A100 and a CPU compute in, in training, generation and evaluation."""

from contextlib import ExitStack
from typing import get_args

import pytest
import torch

from m2d.generation.run import _device
from m2d.generation.settings import GenerateConfig
from m2d.models.precision import DTYPES, pick_precision
from m2d.models.settings import Precision
from m2d.training.settings import TrainConfig
from m2d.training.trainer import opening_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(params=[("Tesla T4", False, "no"), ("NVIDIA A100-SXM4-40GB", True, "bf16")], ids=["T4", "A100"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU that exists for torch's questions alone; what it should compute in. A T4 emulates bf16."""
    name, native, expected = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    return str(expected)


def test_the_cpu_computes_in_float32_unless_told_otherwise_and_a_gpu_in_bf16_where_that_is_native(gpu: str) -> None:
    assert tuple(DTYPES) == get_args(Precision)
    assert [pick_precision(asked, CPU) for asked in (None, "bf16")] == ["no", "bf16"]
    assert pick_precision(None, CUDA) == gpu


def test_training_follows_the_rule(gpu: str) -> None:
    assert opening_of(TrainConfig(num_workers=0)).precision == gpu
    assert opening_of(TrainConfig(num_workers=0, mixed_precision="fp16")).precision == "fp16"


def test_generation_follows_the_rule(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2d.generation.run.pick_device", lambda _: CUDA)  # the real one puts a tensor there
    assert _device(GenerateConfig(checkpoint="c"), ExitStack()) == ("cuda", gpu)
