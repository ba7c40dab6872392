"""What a training step holds and computes, counted operation by operation: live memory by part, FLOPs, launches.

It works on fake tensors (FakeTensorMode), which have shapes and no contents, and so needs no GPU; dry_run.py calls it.
It knows modules and tensors, not M2D's networks.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

BLOCK_BYTES = 512  # to which torch's CUDA allocator rounds a tensor up
BACKWARD = "gradients of activations"
OTHER = "inputs, losses and the rest"


class StepCounter(TorchDispatchMode):
    """Follows every storage of one kind of device from its making to its end, while it is active.

    device_type: "cpu" or "cuda"; storages on others are not counted. A storage belongs to the part of the outermost
    followed module that is computing when it is made, to BACKWARD in a backward pass outside of all modules (one under
    gradient checkpointing computes again), and otherwise to OTHER; `label` changes that. Views share a storage.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.now = 0  # bytes
        self.peak = 0  # bytes, since `restart`
        self.peak_parts: dict[str, int] = {}  # bytes of each part at the peak
        self.trace: list[int] = []  # bytes after each storage's making or end, since `restart`
        self.flops = 0  # of matrix products, convolutions and attentions, since `restart`
        self.launches = 0  # of forward and backward passes: operations that are no view, since `restart`
        self.host_reads = 0  # values that the host asked for, since `restart`: it waits for the device then
        self._live: dict[int, tuple[int, str, weakref.ref[Any]]] = {}  # by the storage's address
        self._parts: defaultdict[str, int] = defaultdict(int)
        self._computing: list[str] = []

    def restart(self) -> None:
        """Begin a new measurement; what is alive stays counted."""
        self.peak, self.peak_parts = self.now, dict(self._parts)
        self.trace, self.flops, self.launches, self.host_reads = [self.now], 0, 0, 0

    def label(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Tensors that are alive belong to this part from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                size, before, reference = self._live[key]
                self._parts[before] -= size
                self._parts[part] += size
                self._live[key] = (size, part, reference)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are alive count no longer: they are elsewhere in the run that this one stands for."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:  # and stays known, for its views would be taken for something new
                size, part, reference = self._live[key]
                self._parts[part] -= size
                self.now -= size
                self._live[key] = (0, part, reference)

    def follow(self, module: nn.Module, part: str, part_if_frozen: str | None = None) -> None:
        """What is made while the module or one inside it computes belongs to the part.

        part_if_frozen: the part while its parameters require no gradient.
        """
        reference = next((parameter for parameter in module.parameters() if parameter.requires_grad), None)

        def enter(*_: Any) -> None:
            frozen = reference is not None and not reference.requires_grad
            self._computing.append(part_if_frozen if frozen and part_if_frozen is not None else part)

        def leave(*_: Any) -> None:
            self._computing.pop()

        for inner in module.modules():
            inner.register_forward_pre_hook(enter)
            inner.register_forward_hook(leave, always_call=True)  # checkpointing ends a recomputation by an exception

    def follow_gradients(self, parameters: Iterable[Tensor], part: str) -> None:
        """The gradients that a backward pass leaves behind in the parameters belong to the part."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.label(part, [p.grad]))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, then look at what came out."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # torch asks every fake tensor where it is
            return out
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        if self._computing or torch.is_grad_enabled() or _in_backward():
            self.launches += not func.is_view
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device_type:
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        if self._computing:
            part = self._computing[0]
        else:
            part = BACKWARD if _in_backward() else OTHER
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._live[key] = (size, part, weakref.ref(storage, lambda _: self._end(key)))
        self._parts[part] += size
        self.now += size
        self.trace.append(self.now)
        if self.now > self.peak:
            self.peak, self.peak_parts = self.now, dict(self._parts)

    def _end(self, key: int) -> None:
        size, part, _ = self._live.pop(key)
        self._parts[part] -= size
        self.now -= size
        self.trace.append(self.now)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


# Of what CUDA's autocast computes in float32 and the CPU's does not (aten/src/ATen/autocast_mode.h), those operations
# that networks of ours do on whole activations: the float32 copies are kept for the backward pass, and so count.
_CUDA_FLOAT32 = ("group_norm", "layer_norm", "softmax.int", "upsample_nearest2d.vec", "upsample_bilinear2d.vec")


@contextlib.contextmanager
def cuda_autocast_on_cpu() -> Iterator[None]:
    """Within, autocast on the CPU casts as it does on a GPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in _CUDA_FLOAT32:
            library.impl(name, _in_float32(name), "AutocastCPU")
        yield


def _in_float32(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def compute(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operation(*tree_map(_float32, args), **tree_map(_float32, kwargs))

    return compute


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
