"""Seeds and noise never change: an image made years apart is the same one."""

import hashlib

import torch
from torch.testing import assert_close

from m2d.generation.seeds import (
    feature_seed,
    next_attempt_seed,
    noise_for,
    reference_seed,
    sample_seed,
    slerp,
)


def test_seeds_are_pinned() -> None:
    assert sample_seed(0, "MEL", 0) == 8_532_279_590_024_149_053
    assert 0 <= sample_seed(0, "MEL", 0) < 2**63


def test_the_seed_of_a_feature_is_pinned_and_not_that_of_the_noise() -> None:
    """The digits are those of: printf %s 0/feature | sha256sum, its first 16 hex digits halved."""
    assert feature_seed(0) == 5_787_994_909_331_505_814
    seeds = range(1000)
    assert not {feature_seed(seed) for seed in seeds} & set(seeds)


def test_the_noise_of_a_feature_is_independent_of_the_noise_of_its_latents() -> None:
    pairs = [(noise_for(seed, (100,)), noise_for(feature_seed(seed), (100,))) for seed in range(100)]
    latents, features = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert abs(torch.corrcoef(torch.stack([latents, features]))[0, 1].item()) < 5 / 100


def test_noise_is_pinned() -> None:
    assert_close(
        noise_for(0, (1, 2, 2)),
        torch.tensor([-1.8313078, -0.1773544, 0.0382792, -0.4029516]).view(1, 2, 2),
        atol=1e-6,
        rtol=0,
    )


def test_seeds_of_runs_classes_and_indices_are_distinct() -> None:
    seeds = {sample_seed(run, label, index) for run in (0, 1) for label in ("MEL", "NV") for index in range(5000)}
    assert len(seeds) == 20_000


def test_every_bit_of_a_seed_counts() -> None:
    """torch's CPU generator drops all but 32 of them."""
    assert not torch.equal(noise_for(5, (8,)), noise_for(5 + 2**32, (8,)))
    assert not torch.equal(noise_for(5, (8,)), noise_for(5 + 2**62, (8,)))


def test_noise_is_standard_normal_and_touches_no_global_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = noise_for(3, (4, 100, 100))
    assert noise.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(noise.mean().item(), 0.0, atol=5 / 200, rtol=0)
    assert_close(noise.var().item(), 1.0, atol=5 * (2 / 40_000) ** 0.5, rtol=0)


def test_the_seed_of_the_next_attempt_is_pinned() -> None:
    """The digits are those of: printf %s 0/attempt/1 | sha256sum, its first 16 hex digits halved."""
    assert next_attempt_seed(0, 1) == int(hashlib.sha256(b"0/attempt/1").hexdigest()[:16], 16) // 2
    attempts = {next_attempt_seed(seed, attempt) for seed in range(500) for attempt in range(1, 5)}
    assert len(attempts) == 2000


def test_the_seed_of_a_reference_is_that_of_its_run_its_class_and_its_content() -> None:
    assert reference_seed(3, "MEL", "ab") == int(hashlib.sha256(b"3/MEL/reference/ab").hexdigest()[:16], 16) // 2


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
