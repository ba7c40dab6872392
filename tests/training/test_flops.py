"""FLOPs are counted right, and peaks are those of the device."""

import pytest
import torch
from tiny_networks import tiny_batch, tiny_networks, tiny_step
from torch import nn

from m2d.training.measure import count_flops, known_peak, measured_peak, peak_flops


def test_a_linear_layers_forward_and_backward_are_counted() -> None:
    """[B, I] x [I, O]: 2 B I O forward, and the same again for the weights' gradient and for the input's."""
    layer, x = nn.Linear(8, 16, bias=False), torch.ones(4, 8, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16


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
    counted, plain = tiny_networks(discriminator=True), tiny_networks(discriminator=True)
    with_count, without = tiny_step(counted), tiny_step(plain)
    with_count.flops(*tiny_batch(), 0)
    with_count([tiny_batch()], 0)
    without([tiny_batch()], 0)
    for name, module in counted.trained().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, plain.trained()[name].state_dict()[key]), f"{name}.{key}"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA RTX A4000", 77e12),
        ("NVIDIA RTX A6000", 155e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("NVIDIA T400", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some GPU", None),
    ],
)
def test_a_gpus_peak_is_that_of_its_data_sheet(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_a_cpus_peak_is_measured() -> None:
    """Between a megaflop and an exaflop: a number of the right unit."""
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e6 < peak < 1e18
    assert source == "matrix product measured at the start"
    assert measured_peak(torch.device("cpu"), torch.float32, size=64, seconds=0.0) > 1e6
