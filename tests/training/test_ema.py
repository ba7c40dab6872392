"""Averages over a run's steps hold of every step what the formulas say, and other lengths are made of kept ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import make_checkpoint, write_checkpoint
from torch import Tensor, nn

from m2d.errors import CheckpointError, ConfigError
from m2d.export.export import export
from m2d.export.settings import ExportConfig
from m2d.models.checkpoint import load_checkpoint
from m2d.training.ema import Ema, mixture, power_of, profile, with_length

STEPS, WARMUP = 200, 10.0


class Weights(nn.Module):
    """A vector."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


@pytest.mark.parametrize("decay", [0.9999, 0.9])
def test_the_profile_is_what_the_average_holds_of_each_step(decay: float) -> None:
    one_hot = torch.eye(STEPS + 1)
    source = Weights(one_hot[0].clone())
    ema = Ema(source, decay, WARMUP, None)
    for step in range(1, STEPS + 1):
        source.values.data = one_hot[step].clone()
        ema.update(source, torch.tensor(True))
    np.testing.assert_allclose(ema.module.values, profile(STEPS, decay, WARMUP), atol=1e-6)


def test_lengths_are_those_of_the_paper() -> None:
    """Gamma of 0.05 and 0.10 as Karras et al. give them, arXiv 2312.02696, section 3.1."""
    assert power_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_of(0.10) == pytest.approx(6.94, abs=0.01)


def test_a_mixture_has_the_spread_that_was_asked_for() -> None:
    """The relative standard deviation of when the weights are of, which is how the length is defined."""
    updates = list(range(500, 10001, 500))
    for length in (0.05, 0.1, 0.2):
        shares, error = mixture(updates, 0.9999, WARMUP, length)
        held = sum(share * np.pad(profile(n, 0.9999, WARMUP), (0, 10000 - n)) for share, n in zip(shares, updates))
        when = np.arange(10001) / 10000
        assert np.sum(held) == pytest.approx(1)
        assert np.sqrt(held @ when**2 - (held @ when) ** 2) == pytest.approx(length, rel=0.1)
        assert error < 0.15
    assert mixture(updates[-2:], 0.9999, WARMUP, 0.2)[1] > 0.3


def run(folder: Path, every: int, warmups: tuple[float | None, ...] = (WARMUP,)) -> Path:
    """A run whose weights grew with the square root of the step; returns its last checkpoint."""
    checkpoint = make_checkpoint()
    of_step = np.sqrt(np.arange(STEPS + 1) / STEPS)
    for number, step in enumerate(range(every, STEPS + 1, every)):
        size = float(profile(step, 0.999, WARMUP) @ of_step[: step + 1])
        for tensor in checkpoint.denoiser.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(size)
        config = {"schedule": {"ema_decay": 0.999, "ema_warmup": warmups[number % len(warmups)]}}
        path = folder / "checkpoints" / f"step_{step:08d}"
        write_checkpoint(replace(checkpoint, info=replace(checkpoint.info, step=step, config=config)), path)
        (path / "training").mkdir()
        save_file({"ema_updates": torch.tensor(float(step))}, path / "training" / "counters.safetensors")
    return path


def test_an_export_has_the_average_of_that_length(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path / "run", every=5)
    to = tmp_path / "exported"
    export(ExportConfig(checkpoint=str(path), to=str(to), dtype="fp32", ema_length=0.2))
    assert "weights averaged over a length of 0.2, of 40 checkpoints" in capfd.readouterr().err
    power = power_of(0.2) + 1
    expected = np.diff((np.arange(STEPS + 1) / STEPS) ** power) @ np.sqrt(np.arange(1, STEPS + 1) / STEPS)
    weights = load_checkpoint(to).denoiser.state_dict()
    assert weights["unet.conv_in.weight"] == pytest.approx(expected, abs=2e-3)
    assert weights["latent_norm.running_mean"] == pytest.approx(expected, abs=2e-3)
    as_trained = float(load_checkpoint(path).denoiser.unet.conv_in.weight.mean())
    assert abs(as_trained - expected) > 0.02  # or nothing was asked for
    assert "(length 0.2)" in (to / "README.md").read_text(encoding="utf-8")


def test_a_length_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    path = run(tmp_path / "few", every=100)
    with pytest.raises(ConfigError, match="2 checkpoints beside"):
        with_length(load_checkpoint(path), 0.05)
    with pytest.raises(ConfigError, match="ema_warmup"):
        with_length(load_checkpoint(run(tmp_path / "changed", every=50, warmups=(10.0, 5.0))), 0.1)
    with pytest.raises(ConfigError, match="ema_warmup"):
        with_length(load_checkpoint(run(tmp_path / "untold", every=50, warmups=(None,))), 0.1)
    given_away = write_checkpoint(make_checkpoint(), tmp_path / "given_away")
    with pytest.raises(CheckpointError, match="ema_length"):
        with_length(load_checkpoint(given_away), 0.1)
    with pytest.raises(ConfigError, match="ema_length"):
        ExportConfig(checkpoint="a", to="b", ema_length=0.5)
