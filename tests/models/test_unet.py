"""The denoiser: its short cut to the middle block, its start at zero, its heads and its clock."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_networks import CONDITIONING, FEATURE_DIM, UNET
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.classes import NUM_CLASSES
from m2d.errors import ConfigError
from m2d.models.settings import UNetConfig, parse_tap
from m2d.models.unet import Denoiser, build_denoiser, tap_channels

SHAPE = (4, 8, 8)
TAPS = ["down_0", "down_1", "middle", "up_0", "up_1"]


def denoiser(config: UNetConfig = UNET) -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(config, CONDITIONING, latent_channels=4, latent_size=8, feature_dim=FEATURE_DIM)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPE, generator=generator), torch.rand(batch, generator=generator)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("attends", [[False, True], [True, True], [True, False]])
@torch.no_grad()
def test_a_short_pass_gives_what_the_whole_pass_has_at_its_block(attends: list[bool], tap: str) -> None:
    network = denoiser(UNetConfig(**{**vars(UNET), "attention_levels": attends}))
    x_t, t = inputs()
    context = network.context(torch.tensor([1, 5]), torch.randn(2, FEATURE_DIM))
    velocity, tapped = network.velocity_and_tap(x_t, t, context, tap)
    assert_close(network.tapped(x_t, t, context, tap), tapped, rtol=0, atol=0)
    assert_close(velocity, network.velocity(x_t, t, context), rtol=0, atol=0)


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


@pytest.mark.parametrize("tap", TAPS)
def test_the_capture_leaves_no_hook_behind(tap: str) -> None:
    network = denoiser()
    x_t, t = inputs()
    network.velocity_and_tap(x_t, t, network.context(torch.tensor([1, 5])), tap)
    assert not any(module._forward_hooks for module in network.unet.modules())


@pytest.mark.parametrize("name", ["mid", "down", "up_", "down_-1", "side_0", ""])
def test_a_name_of_no_block_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"alignment\.tap is"):
        parse_tap(name)


def test_a_new_unet_predicts_zero() -> None:
    network = denoiser()
    x_t, t = inputs()
    velocity = network.velocity(x_t, t, network.context(torch.tensor([0, NUM_CLASSES])))
    assert_close(velocity, torch.zeros(2, *SHAPE), rtol=0, atol=0)


def test_every_head_has_head_dim_channels() -> None:
    config = UNetConfig(
        block_channels=[16, 32, 64], layers_per_block=1, attention_levels=[True] * 3, head_dim=8, norm_groups=8
    )
    attentions = [module for module in denoiser(config).unet.modules() if isinstance(module, Attention)]
    widths = {(module.to_q.out_features, module.heads) for module in attentions}
    assert widths == {(16, 2), (32, 4), (64, 8)}


def test_the_unet_receives_a_thousand_times_t() -> None:
    network, seen = denoiser(), []
    network.unet.time_proj.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    x_t, _ = inputs()
    t, context = torch.tensor([0.25, 1.0]), network.context(torch.tensor([1, 5]))
    network.velocity(x_t, t, context)
    network.tapped(x_t, t, context)
    assert [moment.tolist() for moment in seen] == [[250.0, 1000.0]] * 2


@torch.no_grad()
def test_class_feature_and_time_each_change_the_velocity() -> None:
    network = denoiser()
    nn.init.normal_(network.unet.conv_out.weight)
    x_t, t = inputs(1)
    t, label, cls = t[:1], torch.tensor([1]), torch.randn(1, FEATURE_DIM)
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
        network = denoiser(UNetConfig(**{**vars(UNET), "gradient_checkpointing": checkpointing})).train()
        nn.init.ones_(network.unet.conv_out.weight)
        x_t, t = inputs()
        network.velocity(x_t, t, network.context(torch.tensor([1, 5]))).square().mean().backward()
        gradients.append(network.unet.conv_in.weight.grad)
    assert_close(gradients[0], gradients[1])


def test_latent_shape_follows_the_image_size() -> None:
    assert denoiser().latent_shape(64, 8) == (4, 8, 8)
