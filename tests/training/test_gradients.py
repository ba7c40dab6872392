"""Gradient statistics against numbers worked out by hand."""

import math

import pytest
import torch
from tiny_networks import tiny_batch, tiny_networks, tiny_step
from torch import nn

from m2d.training.measure import BINS, gradient_statistics, part_of


def network_with(gradient: list[float]) -> nn.Module:
    network = nn.ModuleDict({"only": nn.Linear(len(gradient), 1, bias=False)})
    network["only"].weight.grad = torch.tensor([gradient])
    return network


def test_a_parts_norm_is_the_root_of_its_squares() -> None:
    assert gradient_statistics({"net": network_with([3.0, 4.0])}).norms == {"net.only": pytest.approx(5.0)}


def test_the_histogram_counts_orders_of_magnitude() -> None:
    found = gradient_statistics({"net": network_with([1e-3, -1e-3, 10.0])})
    edges, counts = found.edges, found.histograms["net"]
    where = {k: count for k, count in enumerate(counts) if count}
    assert sum(counts) == 3
    # A value on an edge lies in one of the two bins beside it, in float32.
    assert all(edges[k] - 1e-6 <= -3 <= edges[k + 1] + 1e-6 for k, count in where.items() if count == 2)
    assert all(edges[k] - 1e-6 <= 1 <= edges[k + 1] + 1e-6 for k, count in where.items() if count == 1)
    assert len(counts) == BINS == len(edges) - 1


def test_zeros_are_a_share_and_in_no_bin() -> None:
    found = gradient_statistics({"net": network_with([0.0, 0.0, 0.0, 1.0])})
    assert found.zeros == {"net": 0.75}
    assert sum(found.histograms["net"]) == 1


def test_gradients_beyond_the_bins_are_counted_in_the_outermost() -> None:
    found = gradient_statistics({"net": network_with([1e-30, 1e30])}).histograms["net"]
    assert (found[0], found[-1], sum(found)) == (1, 1, 2)


def test_a_network_without_gradients_is_left_out() -> None:
    found = gradient_statistics({"net": nn.Linear(2, 2)})
    assert found.norms == found.histograms == found.zeros == {}


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("unet.down_blocks.1.resnets.0.conv1.weight", "unet.down_blocks.1"),
        ("unet.mid_block.attentions.0.proj_in.bias", "unet.mid_block"),
        ("vae.decoder.up_blocks.0.resnets.0.conv1.weight", "vae.decoder"),
        ("conditioning.feature.0.weight", "conditioning"),
        ("layers.0.weight", "layers"),
        ("weight", ""),
    ],
)
def test_the_part_of_a_parameter(parameter: str, part: str) -> None:
    assert part_of(parameter) == part


def test_the_parts_of_a_step_add_up_to_the_networks_norm() -> None:
    """What the step reports for each network is the norm of all its parts together, before clipping."""
    networks = tiny_networks(discriminator=True)
    step = tiny_step(networks)
    step.watch_gradients = True
    step([tiny_batch()], 0)
    assert step.gradients is not None
    whole = step.read_scalars()
    norms = step.gradients.norms

    def together(*networks: str) -> float:
        return math.sqrt(sum(norm**2 for name, norm in norms.items() if name.split(".")[0] in networks))

    assert together("autoencoder") == pytest.approx(whole["gradient_norm/autoencoder"], rel=1e-5)
    assert together("denoiser", "projector") == pytest.approx(whole["gradient_norm/denoiser"], rel=1e-5)
    assert together("discriminator") == pytest.approx(whole["gradient_norm/discriminator"], rel=1e-5)


def test_a_step_looks_only_when_it_was_asked_to() -> None:
    step = tiny_step(tiny_networks())
    step([tiny_batch()], 0)
    assert step.gradients is None
