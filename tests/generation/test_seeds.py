"""Seeds and noise never change: an image made years apart is the same one."""

import hashlib

import pytest
import torch
from torch.testing import assert_close

from m2d.generation.generator import noise_for, slerp
from m2d.generation.plan import seed_of


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("0/MEL/0", 8_532_279_590_024_149_053),
        ("0/feature", 5_787_994_909_331_505_814),  # printf %s 0/feature | sha256sum, its first 16 hex digits halved
        ("3/MEL/reference/ab", int(hashlib.sha256(b"3/MEL/reference/ab").hexdigest()[:16], 16) // 2),
    ],
)
def test_seeds_are_pinned(text: str, seed: int) -> None:
    assert seed_of(text) == seed


def test_seeds_of_runs_classes_indices_and_attempts_are_distinct() -> None:
    seeds = {seed_of(f"{run}/{label}/{index}") for run in (0, 1) for label in ("MEL", "NV") for index in range(2500)}
    seeds |= {seed_of(f"{seed}/attempt/{attempt}") for seed in range(500) for attempt in range(1, 5)}
    assert len(seeds | {seed_of(f"{seed}/feature") for seed in range(1000)} | set(range(1000))) == 14_000


def test_the_noise_of_a_feature_is_independent_of_the_noise_of_its_latents() -> None:
    pairs = [(noise_for(seed, (100,)), noise_for(seed_of(f"{seed}/feature"), (100,))) for seed in range(100)]
    latents, features = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert abs(torch.corrcoef(torch.stack([latents, features]))[0, 1].item()) < 5 / 100


def test_noise_is_pinned() -> None:
    expected = torch.tensor([-1.8313078, -0.1773544, 0.0382792, -0.4029516]).view(1, 2, 2)
    assert_close(noise_for(0, (1, 2, 2)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bit", [32, 62])
def test_every_bit_of_a_seed_counts(bit: int) -> None:
    """torch's CPU generator drops all but 32 of them."""
    assert not torch.equal(noise_for(5, (8,)), noise_for(5 + 2**bit, (8,)))


def test_noise_is_standard_normal_and_touches_no_global_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = noise_for(3, (4, 100, 100))
    assert noise.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(noise.mean().item(), 0.0, atol=5 / 200, rtol=0)
    assert_close(noise.var().item(), 1.0, atol=5 * (2 / 40_000) ** 0.5, rtol=0)


def test_between_right_angles_the_sphere_is_walked_at_even_speed() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for position in (0.25, 1 / 3, 0.5, 0.9):
        angle = torch.tensor(position * torch.pi / 2)
        assert_close(slerp(a, b, position), 2 * torch.stack([angle.cos(), angle.sin()])[None])


def test_both_ends_of_the_sphere_s_walk_are_the_very_tensors() -> None:
    a, b = noise_for(1, (3, 4)), noise_for(2, (3, 4))
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)


def test_where_there_is_no_angle_the_walk_is_straight() -> None:
    a = noise_for(1, (50,))
    assert_close(slerp(a, a, 0.3), a)
    assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    assert_close(slerp(0 * a, a, 0.5), 0.5 * a)


def test_halfway_between_two_noises_is_noise() -> None:
    middle = slerp(noise_for(1, (100_000,)), noise_for(2, (100_000,)), 0.5)
    assert middle.dtype == torch.float32
    assert_close(middle.var().item(), 1.0, atol=5 * (2 / 100_000) ** 0.5, rtol=0)
