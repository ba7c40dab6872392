"""The lane itself: every kind of host wait, a wrong device, type or shape, and memory are seen."""

import gc
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from fake_cuda.lane import CUDA, host_waits, live_bytes
from torch import Tensor, nn

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0]),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "a list to the GPU": lambda x: x.new_tensor([1.0]),
    "a pageable tensor to the GPU": lambda x: torch.ones(3).to(CUDA),
    "in the backward pass": lambda x: _Reads.apply(x.requires_grad_()).sum().backward(),  # type: ignore[no-untyped-call]
}
NO_WAITS: dict[str, Callable[[Tensor], object]] = {
    "a copy that need not wait": lambda x: torch.ones(3).to(CUDA, non_blocking=True),
    "a fill": lambda x: x.new_full((3,), 2.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=CUDA)],
}


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        gradient.sum().item()
        return gradient


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_for_the_gpu_is_seen(name: str) -> None:
    x = torch.zeros(4, device=CUDA)
    with host_waits() as waits:
        WAITS[name](x)
    assert waits.total() >= 1


@pytest.mark.parametrize("name", NO_WAITS)
def test_an_operation_that_does_not_wait_is_not_counted(name: str) -> None:
    x = torch.zeros(4, device=CUDA)
    with host_waits() as waits:
        NO_WAITS[name](x)
    assert waits == Counter()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()])
def test_a_layer_that_was_left_on_the_cpu_raises(layer: nn.Module) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="cuda"):
        layer(torch.zeros(2, 4, 4, 4, device=CUDA))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Linear(4, 4)])
def test_a_layer_of_another_type_raises(layer: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)half|bfloat16"):
        layer.to(CUDA)(torch.zeros(2, 4, 4, 4, device=CUDA, dtype=torch.bfloat16))


def test_a_convolution_without_cudnn_raises() -> None:
    layer = nn.Conv2d(4, 4, 3).to(CUDA)
    with torch.backends.cudnn.flags(enabled=False), pytest.raises(RuntimeError, match="cuDNN is off"):
        layer(torch.zeros(2, 4, 4, 4, device=CUDA))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 9, 8)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
        (nn.BatchNorm2d(4), (2, 4, 5, 5)),
        (nn.BatchNorm2d(4).eval(), (2, 4, 5, 5)),
    ],
)
def test_shapes_are_those_of_the_cpu(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Of outputs and of every gradient."""

    def shapes() -> list[torch.Size]:
        x = torch.zeros(shape, device=next(layer.parameters()).device, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        return [y.shape, *(tensor.grad.shape for tensor in (x, *layer.parameters()) if tensor.grad is not None)]

    on_cpu = shapes()
    layer.to(CUDA)
    assert shapes() == on_cpu


def test_peak_memory_is_the_bytes_of_live_tensors() -> None:
    gc.collect()
    before = live_bytes()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.empty(3 * 2**20, device=CUDA, dtype=torch.uint8)
    freed = torch.empty(2**20, device=CUDA, dtype=torch.float32)
    del freed
    assert live_bytes() - before == kept.numel()
    assert live_bytes("peak") - before == 3 * 2**20 + 4 * 2**20


def test_a_card_has_80_gib_and_they_cost_no_memory_here() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(81 * 2**30, device=CUDA, dtype=torch.uint8)
    torch.empty(60 * 2**30, device=CUDA, dtype=torch.uint8)  # would not fit the test machine
    torch.cuda.empty_cache()
