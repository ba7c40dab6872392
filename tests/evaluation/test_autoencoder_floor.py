"""Reconstructions by a checkpoint's VAE: whatever the batch, and an error that a user can fix where it does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint

from m2d.errors import ConfigError
from m2d.evaluation.autoencoder_floor import reconstructions
from m2d.evaluation.images import ImageSet
from m2d.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return make_checkpoint()


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    ids = tuple(f"{number:064x}" for number in range(7))
    return ImageSet("test", "memory", ids, ids, np.zeros(7, np.int64), np.array(ids, dtype=object), pixels)


@pytest.mark.parametrize(("batch_size", "at_once"), [(None, [7]), (3, [3, 3, 1])])
def test_reconstructions_are_the_decoded_posterior_means(
    checkpoint: Checkpoint, images: ImageSet, tmp_path: Path, batch_size: int | None, at_once: list[int]
) -> None:
    with torch.no_grad():
        pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = checkpoint.autoencoder.vae.decode(checkpoint.autoencoder.vae.encode(pixels).latent_dist.mean).sample
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    seen: list[int] = []
    handle = checkpoint.autoencoder.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    redrawn = reconstructions(images, checkpoint, device="cpu", cache_dir=str(tmp_path), batch_size=batch_size)
    handle.remove()
    np.testing.assert_allclose(redrawn.pixels, expected, atol=0.501)
    assert seen == at_once


def test_a_batch_that_does_not_fit_is_a_one_line_error(
    checkpoint: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(checkpoint.autoencoder, "decode", full)
    with pytest.raises(ConfigError, match="try --batch_size 3 ") as caught:
        reconstructions(images, checkpoint, device="cpu", cache_dir=str(tmp_path), batch_size=6)
    assert "\n" not in str(caught.value)
