"""The latent norm is torch's batch norm, on one process and on two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.models.unet import LatentNorm

CHANNELS = 3


def latents(seed: int, batch: int = 4) -> Tensor:
    """[batch, 3, 5, 5], each channel of another mean and spread."""
    noise = torch.randn(batch, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.1, 1.0, 7.0]).view(1, -1, 1, 1) + torch.tensor([3.0, 0.0, -20.0]).view(1, -1, 1, 1)


def trained_norm() -> LatentNorm:
    norm = LatentNorm(CHANNELS)
    for seed in range(3):
        norm(latents(seed))
    return norm


def test_it_equals_torch_batch_norm_over_several_batches() -> None:
    ours, theirs = LatentNorm(CHANNELS), nn.BatchNorm2d(CHANNELS, affine=False, eps=1e-4, momentum=0.1)
    for seed in range(4):
        assert_close(ours(latents(seed)), theirs(latents(seed)), atol=1e-5, rtol=1e-5)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)


def test_normalize_equals_torch_batch_norm_in_eval_mode() -> None:
    ours, theirs = trained_norm(), nn.BatchNorm2d(CHANNELS, affine=False, eps=1e-4).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert_close(ours.normalize(latents(9)), theirs(latents(9)))


def test_denormalize_undoes_normalize() -> None:
    norm = trained_norm()
    assert_close(norm.denormalize(norm.normalize(latents(9))), latents(9))


def test_normalize_leaves_the_running_statistics() -> None:
    norm = trained_norm()
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm.normalize(latents(9))
    assert_close((norm.running_mean, norm.running_var), before, rtol=0, atol=0)


def test_normalize_passes_the_gradient_on() -> None:
    norm, wanted = trained_norm(), latents(9).requires_grad_()
    norm.normalize(wanted).sum().backward()
    std = (norm.running_var + norm.eps).sqrt().view(1, -1, 1, 1)
    assert_close(wanted.grad, (1 / std).expand_as(wanted))


def test_a_distant_mean_costs_no_digits() -> None:
    """E[x^2] - E[x]^2 in float32 would give a variance of noise here."""
    far = latents(0) + 10_000.0
    assert_close(LatentNorm(CHANNELS)(far), nn.BatchNorm2d(CHANNELS, affine=False, eps=1e-4)(far), atol=2e-2, rtol=0)


def test_latents_that_require_a_gradient_are_refused() -> None:
    """That path would carry the diffusion loss to the VAE."""
    with pytest.raises(ValueError, match="detached"):
        LatentNorm(CHANNELS)(latents(0).requires_grad_())


def normalize_a_half(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    norm = LatentNorm(CHANNELS)
    halves = [norm(latents(seed).chunk(2)[rank]) for seed in range(2)]
    torch.save((torch.stack(halves), norm.running_mean, norm.running_var), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_halves_equal_one_with_the_whole(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(normalize_a_half, args=(rendezvous, str(tmp_path)), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = LatentNorm(CHANNELS)
    outputs = torch.stack([whole(latents(seed)) for seed in range(2)])
    assert_close(torch.cat([half[0] for half in halves], dim=1), outputs)
    for half in halves:
        assert_close(half[1:], (whole.running_mean, whole.running_var))
