"""What a run is measured by: FLOPs counted and possible, and the gradients of a step."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_networks import tiny_batch, tiny_networks, tiny_step
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import flop_registry

from m2d.training.measure import (
    BINS,
    EDGES,
    count_flops,
    gradient_statistics,
    known_peak,
    measured_peak,
    part_of,
    peak_flops,
)


def test_a_linear_layers_forward_and_backward_are_counted() -> None:
    """[B, I] x [I, O]: 2 B I O forward, and the same again for the weights' gradient and for the input's."""
    layer, x = nn.Linear(8, 16, bias=False), torch.ones(4, 8, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16


def test_attention_on_a_cpu_counts_where_torch_has_no_formula_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 has none. Two products forward and five backward, each of 2 H L L D operations an image."""
    for name in ("flash_attention_for_cpu", "flash_attention_for_cpu_backward"):
        monkeypatch.delitem(flop_registry, getattr(torch.ops.aten, f"_scaled_dot_product_{name}"), raising=False)
    q = torch.ones(2, 3, 16, 8, requires_grad=True)
    counted = count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert counted == (2 + 5) * 2 * (2 * 3 * 16 * 16 * 8)


def test_a_convolution_is_counted() -> None:
    """2 * out pixels * out channels * in channels * kernel area, one image."""
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    with torch.no_grad():
        assert count_flops(lambda: layer(torch.ones(1, 3, 10, 10)).sum()) == 2 * 100 * 5 * 3 * 9


def test_twice_the_batch_is_twice_the_step() -> None:
    step = tiny_step(tiny_networks())
    assert step.flops(*tiny_batch(8), 0) == 2 * step.flops(*tiny_batch(4), 0)


def test_the_vaes_warm_up_takes_less() -> None:
    step = tiny_step(tiny_networks(), vae_warmup_steps=5)
    assert step.flops(*tiny_batch(), 0) < step.flops(*tiny_batch(), 5)


def test_counting_changes_nothing_of_the_step_that_follows() -> None:
    counted, plain = (tiny_step(tiny_networks(discriminator=True)) for _ in range(2))
    counted.flops(*tiny_batch(), 0)
    for step in (counted, plain):
        step([tiny_batch()], 0)
    assert_close(counted.state_dict(), plain.state_dict(), rtol=0, atol=0)


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA L40": 181,
    "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A40": 150,
    "NVIDIA RTX A4000": 77, "NVIDIA RTX A6000": 155, "NVIDIA RTX 6000 Ada Generation": 364, "Tesla T4": 65,
    "NVIDIA GeForce RTX 4090": 165,
}  # fmt: skip
UNKNOWN = [
    "NVIDIA T400", "NVIDIA T400 4GB", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 3080 Ti", "Some GPU",
    "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
]  # fmt: skip


def test_a_gpus_peak_is_that_of_its_data_sheet() -> None:
    assert {name: known_peak(name) for name in PEAKS} == {name: peak * 1e12 for name, peak in PEAKS.items()}
    assert [name for name in UNKNOWN if known_peak(name) is not None] == []


def test_a_cpus_peak_is_measured() -> None:
    """Between a megaflop and an exaflop: a number of the right unit."""
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e6 < peak < 1e18
    assert source == "matrix product measured at the start"
    assert measured_peak(torch.device("cpu"), torch.float32, size=64, seconds=0.0) > 1e6


def network_with(gradient: list[float]) -> nn.Module:
    network = nn.ModuleDict({"only": nn.Linear(len(gradient), 1, bias=False)})
    network["only"].weight.grad = torch.tensor([gradient])
    return network


def test_a_parts_norm_is_the_root_of_its_squares() -> None:
    assert gradient_statistics({"net": network_with([3.0, 4.0])}).norms == {"net.only": pytest.approx(5.0)}


def test_the_histogram_counts_orders_of_magnitude() -> None:
    edges, counts = EDGES, gradient_statistics({"net": network_with([1e-3, -1e-3, 10.0])}).histograms["net"]
    where = {k: count for k, count in enumerate(counts) if count}
    assert sum(counts) == 3
    # A value on an edge lies in one of the two bins beside it, in float32.
    assert all(edges[k] - 1e-6 <= -3 <= edges[k + 1] + 1e-6 for k, count in where.items() if count == 2)
    assert all(edges[k] - 1e-6 <= 1 <= edges[k + 1] + 1e-6 for k, count in where.items() if count == 1)
    assert len(counts) == BINS == len(edges) - 1


def test_zeros_are_a_share_and_in_no_bin_and_what_lies_beyond_the_bins_is_in_the_outermost() -> None:
    found = gradient_statistics({"net": network_with([0.0, 0.0, 1e-30, 1e30])})
    assert found.zeros == {"net": 0.5}
    counts = found.histograms["net"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 2)


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
    step([tiny_batch()], 0)
    assert step.gradients is None, "a step looks only when it is asked to"
    step.read_scalars()
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
