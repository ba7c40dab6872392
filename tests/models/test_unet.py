"""The denoiser: its taps, its start at zero, its heads and its clock; what it is told; the norm and the projector."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from tiny_networks import CONDITIONING, FEATURE_DIM, UNET
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.classes import ISIC7
from m2d.errors import ConfigError
from m2d.models.settings import ConditioningConfig, ProjectorConfig, UNetConfig, parse_tap
from m2d.models.unet import AlignmentProjector, ConditionEncoder, Denoiser, LatentNorm, build_denoiser, tap_channels

SHAPE = (4, 8, 8)
TAPS = ["down_0", "down_1", "middle", "up_0", "up_1"]


def denoiser(**changes: object) -> Denoiser:
    torch.manual_seed(0)
    config = UNetConfig(**{**vars(UNET), **changes})  # type: ignore[arg-type]
    return build_denoiser(config, CONDITIONING, latent_channels=4, latent_size=8, feature_dim=FEATURE_DIM)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPE, generator=generator), torch.rand(batch, generator=generator)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("attends", [[False, True], [True, True], [True, False]])
@torch.no_grad()
def test_a_short_pass_gives_what_the_whole_pass_has_at_its_block(attends: list[bool], tap: str) -> None:
    network = denoiser(attention_levels=attends)
    x_t, t = inputs()
    context = network.context(torch.tensor([1, 5]), torch.randn(2, FEATURE_DIM))
    velocity, tapped = network.velocity_and_tap(x_t, t, context, tap)
    assert_close(network.tapped(x_t, t, context, tap), tapped, rtol=0, atol=0)
    assert_close(velocity, network.velocity(x_t, t, context), rtol=0, atol=0)
    assert not any(module._forward_hooks for module in network.unet.modules()), "no hook is left behind"


@pytest.mark.parametrize(("tap", "side"), [("down_0", 4), ("down_1", 4), ("middle", 4), ("up_0", 8), ("up_1", 8)])
def test_a_tap_is_the_block_of_its_name(tap: str, side: int) -> None:
    """On 8 x 8 latents with two levels the first block down halves the side, and the first one up doubles it."""
    network = denoiser()
    named = {"down": network.unet.down_blocks, "up": network.unet.up_blocks}
    block = network.unet.mid_block if tap == "middle" else named[tap[:-2]][int(tap[-1])]
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    x_t, t = inputs()
    tapped = network.tapped(x_t, t, network.context(torch.tensor([1, 5])), tap)
    assert_close(tapped, seen[0], rtol=0, atol=0)
    assert tapped.shape == (2, tap_channels(network, tap), side, side)


@pytest.mark.parametrize("name", ["mid", "down", "up_", "down_-1", "side_0", ""])
def test_a_name_of_no_block_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"alignment\.tap is"):
        parse_tap(name)


def test_a_new_unet_predicts_zero_in_the_latents_shape() -> None:
    network = denoiser()
    x_t, t = inputs()
    velocity = network.velocity(x_t, t, network.context(torch.tensor([0, len(ISIC7)])))
    assert_close(velocity, torch.zeros(2, *SHAPE), rtol=0, atol=0)
    assert network.latent_shape(64, 8) == SHAPE


def test_every_head_has_head_dim_channels() -> None:
    network = denoiser(block_channels=[16, 32, 64], attention_levels=[True] * 3, head_dim=8, norm_groups=8)
    attentions = [module for module in network.unet.modules() if isinstance(module, Attention)]
    assert {(module.to_q.out_features, module.heads) for module in attentions} == {(16, 2), (32, 4), (64, 8)}


def test_the_unet_receives_a_thousand_times_t() -> None:
    network, seen = denoiser(), []
    network.unet.time_proj.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    x_t, t, context = inputs()[0], torch.tensor([0.25, 1.0]), network.context(torch.tensor([1, 5]))
    network.velocity(x_t, t, context)
    network.tapped(x_t, t, context)
    assert [moment.tolist() for moment in seen] == [[250.0, 1000.0]] * 2


@torch.no_grad()
def test_class_feature_and_time_each_change_the_velocity() -> None:
    network = denoiser()
    nn.init.normal_(network.unet.conv_out.weight)
    x_t, t = inputs(1)
    label, cls = torch.tensor([1]), torch.randn(1, FEATURE_DIM)
    outputs = [
        network.velocity(x_t, t, network.context(label)),
        network.velocity(x_t, t, network.context(label + 1)),
        network.velocity(x_t, t, network.context(label, cls)),
        network.velocity(x_t, t / 2, network.context(label)),
    ]
    assert len(torch.unique(torch.cat(outputs), dim=0)) == 4


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = denoiser(gradient_checkpointing=checkpointing).train()
        nn.init.ones_(network.unet.conv_out.weight)
        x_t, t = inputs()
        network.velocity(x_t, t, network.context(torch.tensor([1, 5]))).square().mean().backward()
        gradients.append(network.unet.conv_in.weight.grad)
    assert_close(gradients[0], gradients[1])


# --- the condition: a class, and a feature that can be left out or blurred by noise

DIM, TOKENS, WIDTH = 6, 3, 16
LABELS = torch.tensor([0, 4, 6])
MEAN, STD = torch.arange(DIM).float(), torch.arange(1, DIM + 1).float()


@pytest.fixture
def encoder() -> ConditionEncoder:
    torch.manual_seed(0)
    return ConditionEncoder(ConditioningConfig(context_dim=WIDTH, feature_tokens=TOKENS), DIM, num_classes=7)


def features(seed: int = 1) -> Tensor:
    return torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(seed))


def test_there_is_one_class_token_of_its_own_and_k_feature_tokens(encoder: ConditionEncoder) -> None:
    assert encoder(LABELS).shape == encoder(LABELS, features()).shape == (3, 1 + TOKENS, WIDTH)
    tokens = encoder(torch.arange(len(ISIC7) + 1))[:, 0]
    assert len(torch.unique(tokens, dim=0)) == len(ISIC7) + 1, "the null class too"
    assert_close(encoder(LABELS, features())[:, 1:], encoder(LABELS.flip(0), features())[:, 1:])


def test_a_dropped_feature_equals_no_feature(encoder: ConditionEncoder) -> None:
    dropped = encoder(LABELS, features(), drop_feature=torch.tensor([True, False, True]))
    assert_close(dropped[[0, 2]], encoder(LABELS)[[0, 2]], rtol=0, atol=0)
    assert_close(dropped[1], encoder(LABELS, features())[1], rtol=0, atol=0)


def test_a_dropped_feature_still_gives_every_parameter_a_gradient(encoder: ConditionEncoder) -> None:
    """DDP waits for all of them."""
    encoder(LABELS, features(), drop_feature=torch.ones(3, dtype=torch.bool)).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_noise_of_level_zero_changes_nothing_and_the_level_itself_is_told(encoder: ConditionEncoder) -> None:
    noisy = encoder(LABELS, features(), noise=features(2), noise_level=torch.zeros(3))
    assert_close(noisy, encoder(LABELS, features()), rtol=0, atol=0)
    told = encoder(LABELS, features(), noise=torch.zeros(3, DIM), noise_level=torch.ones(3))
    assert not torch.allclose(told, encoder(LABELS, features()))


def test_noise_is_scaled_in_standardised_units(encoder: ConditionEncoder) -> None:
    """mean + std with noise n at level 0.5 is the clean feature mean + std * (1 + 0.5 n)."""
    noise = features(2)
    encoder.set_statistics(MEAN, STD)
    nn.init.zeros_(encoder.noise_level_embedding[2].weight)  # the level's own token is tested above
    noisy = encoder(LABELS, (MEAN + STD).expand(3, -1), noise=noise, noise_level=torch.full((3,), 0.5))
    assert_close(noisy, encoder(LABELS, MEAN + STD * (1 + 0.5 * noise)))


def test_statistics_standardise_the_feature_and_travel_with_the_weights(encoder: ConditionEncoder) -> None:
    expected = encoder(LABELS, features())
    encoder.set_statistics(MEAN, STD)
    assert_close(encoder(LABELS, features() * STD + MEAN), expected)
    other = ConditionEncoder(ConditioningConfig(context_dim=WIDTH, feature_tokens=TOKENS), DIM, num_classes=7)
    other.load_state_dict(encoder.state_dict())
    assert_close(other(LABELS, features() * STD + MEAN), expected)


def test_a_constant_feature_does_not_divide_by_zero(encoder: ConditionEncoder) -> None:
    encoder.set_statistics(torch.ones(DIM), torch.zeros(DIM))
    assert torch.isfinite(encoder(LABELS, torch.ones(3, DIM))).all()


# --- the latent norm is torch's batch norm, on one worker and on two

CHANNELS = 3


def latents(seed: int, batch: int = 4) -> Tensor:
    """[batch, 3, 5, 5], each channel of another mean and spread."""
    noise = torch.randn(batch, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.1, 1.0, 7.0]).view(1, -1, 1, 1) + torch.tensor([3.0, 0.0, -20.0]).view(1, -1, 1, 1)


def test_the_latent_norm_equals_torch_batch_norm() -> None:
    ours, theirs = LatentNorm(CHANNELS), nn.BatchNorm2d(CHANNELS, affine=False, eps=1e-4, momentum=0.1)
    for seed in range(4):
        assert_close(ours(latents(seed)), theirs(latents(seed)), atol=1e-5, rtol=1e-5)
    statistics = ours.running_mean.clone(), ours.running_var.clone()
    assert_close(statistics, (theirs.running_mean, theirs.running_var))
    wanted = latents(9).requires_grad_()
    normalized = ours.normalize(wanted)
    assert_close(normalized, theirs.eval()(latents(9)))
    assert_close(ours.denormalize(normalized), latents(9))
    assert_close((ours.running_mean, ours.running_var), statistics, rtol=0, atol=0)
    normalized.sum().backward()
    std = (ours.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
    assert_close(wanted.grad, (1 / std).expand_as(wanted))


def test_a_distant_mean_costs_no_digits() -> None:
    """E[x^2] - E[x]^2 in float32 would give a variance of noise here."""
    far = latents(0) + 10_000.0
    assert_close(LatentNorm(CHANNELS)(far), nn.BatchNorm2d(CHANNELS, affine=False, eps=1e-4)(far), atol=2e-2, rtol=0)


def test_latents_that_require_a_gradient_are_refused() -> None:
    """That path would carry the diffusion loss to the VAE."""
    with pytest.raises(ValueError, match="detached"):
        LatentNorm(CHANNELS)(latents(0).requires_grad_())


def test_two_workers_with_halves_equal_one_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads in place of two processes, which tests/training has."""
    barrier, shared = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def all_reduce(sums: Tensor) -> None:
        shared[barrier.wait()] = sums
        barrier.wait()
        total = shared[0] + shared[1]
        barrier.wait()
        sums.copy_(total)

    def normalize_a_half(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        norm = LatentNorm(CHANNELS)
        halves = [norm(latents(seed).chunk(2)[rank]) for seed in range(2)]
        return torch.stack(halves), norm.running_mean, norm.running_var

    whole = LatentNorm(CHANNELS)
    outputs = torch.stack([whole(latents(seed)) for seed in range(2)])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(normalize_a_half, range(2)))
    assert_close(torch.cat([half[0] for half in halves], dim=1), outputs)
    for half in halves:
        assert_close(half[1:], (whole.running_mean, whole.running_var))


# --- U-REPA's projector: every cell by itself first, then up to the extractor's grid, tokens row by row


def passing_projector() -> AlignmentProjector:
    """Each layer hands its input on, so the output is silu(silu(x)) of each cell."""
    projector = AlignmentProjector(1, ProjectorConfig(hidden_dim=1), 1)
    for layer in projector.layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
    return projector


def test_cells_are_projected_row_by_row_before_they_are_upsampled() -> None:
    """Bilinear from two cells to four goes 1/4 and 3/4 of the way between silu(silu(.)) of them."""
    middle = torch.arange(4.0).view(1, 1, 2, 2)
    assert_close(passing_projector()(middle, 4), F.silu(F.silu(torch.arange(4.0))).view(1, 4, 1))
    left, right = -4.0, 8.0
    a, b = F.silu(F.silu(torch.tensor([left, right]))).tolist()
    row = torch.tensor([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b])
    middle = torch.tensor([[left, right], [left, right]]).view(1, 1, 2, 2)
    assert_close(passing_projector()(middle, 16).view(4, 4), row.expand(4, 4))


@pytest.mark.parametrize(("side", "patches"), [(4, 49), (8, 16)], ids=["up", "down"])
def test_it_gives_the_extractors_grid_and_dimension(side: int, patches: int) -> None:
    projector = AlignmentProjector(8, ProjectorConfig(hidden_dim=16), 5)
    assert projector(torch.zeros(2, 8, side, side), patches).shape == (2, patches, 5)


def test_conv3x3_weighs_a_cell_and_its_neighbours_by_one_kernel() -> None:
    """A kernel that takes the left neighbour off each cell: [a b; c d] becomes [a b-a; c d-c]; beyond the edge is 0."""
    projector = AlignmentProjector(1, ProjectorConfig(kind="conv3x3"), 1)
    (convolution,) = projector.layers
    nn.init.constant_(convolution.bias, 10.0)
    convolution.weight.data.copy_(torch.tensor([[0.0, 0, 0], [-1, 1, 0], [0, 0, 0]]).view(1, 1, 3, 3))
    a, b, c, d = 1.0, 3.0, 7.0, 5.0
    tokens = projector(torch.tensor([[a, b], [c, d]]).view(1, 1, 2, 2), 4)
    assert_close(tokens, torch.tensor([a, b - a, c, d - c]).view(1, 4, 1) + 10.0)
