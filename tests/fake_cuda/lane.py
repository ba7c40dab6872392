"""Shared by the lane_*.py tests: a preset's step on cuda, a count of host waits, and convolutions without cuDNN.

Works only under the mock GPU; mock_gpu.py starts it. Everything but the numbers is real: torch's checks of devices and
types, autocast, the caching allocator, autograd's threads.
"""

import dataclasses
import gc
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._meta_registrations import calc_conv_nd_return_shape

from m2d.cli import parse
from m2d.models.extractors import Features
from m2d.models.perceptual import build_perceptual
from m2d.models.settings import Precision
from m2d.training.batch import Draws, ImageBatch, LatentBatch, draw
from m2d.training.networks import build_networks, idle_modules
from m2d.training.settings import TrainConfig
from m2d.training.step import StepConfig, build_step

CUDA = torch.device("cuda", 0)
PROJECT = Path(__file__).resolve().parents[2]
TOTAL_STEPS = 1000

torch.cuda.init()  # memory_stats() is empty before
torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is not mocked; torch falls back to flash attention
for draws_weights in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "uniform_", "normal_", "trunc_normal_"):
    setattr(torch.nn.init, draws_weights, lambda tensor, *_, **__: tensor)  # seconds and gigabytes that nobody reads
_library = torch.library.Library("aten", "IMPL")


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int
) -> Tensor:  # fmt: skip
    """An empty output in the memory format of the backend that torch would choose, with the copies it would make."""
    for other in (weight, bias):
        if other is not None and (other.device, other.dtype) != (x.device, x.dtype):
            raise RuntimeError(f"convolution of {x.dtype} on {x.device} with {other.dtype} on {other.device}")
    if not torch.backends.cudnn.enabled:
        raise RuntimeError("a convolution while cuDNN is off: many times slower")
    backend = torch._C._select_conv_backend(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, None
    )
    memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    converted = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
    shape = calc_conv_nd_return_shape(
        *converted, stride, padding, dilation, transposed, groups, output_padding if transposed else None
    )
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    backend = torch._C._select_conv_backend(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups, bias_sizes
    )
    memory_format = torch._C._conv_determine_backend_memory_format(x, weight, backend)
    gradient, x, weight = (tensor.contiguous(memory_format=memory_format) for tensor in (gradient, x, weight))
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] else None,
        weight.new_empty(weight.shape[1] * groups if transposed else weight.shape[0]) if mask[2] else None,
    )


def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for other in (weight, bias, mean, variance):
        if other is not None and other.device != x.device:
            raise RuntimeError(f"batch norm on {x.device} with a tensor on {other.device}")
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), x.new_empty(0, dtype=torch.uint8)


def _batch_norm_backward(x: Tensor, gradient: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


_library.impl("convolution", _convolution, "CUDA")
_library.impl("convolution_backward", _convolution_backward, "CUDA")
_library.impl("cudnn_batch_norm", _batch_norm, "CUDA")
_library.impl("cudnn_batch_norm_backward", _batch_norm_backward, "CUDA")


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Counts host waits for the device by file:line in M2D, or in the caller where M2D is not on the stack."""
    found: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(PROJECT / "m2d"))]
        if ours:
            filename, lineno = str(Path(ours[-1].filename).relative_to(PROJECT)), ours[-1].lineno or 0
        found[f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def live_bytes(when: Literal["current", "peak"] = "current") -> int:
    """Of tensors on the GPU, as they asked for them; memory_allocated counts up to 1 MiB more for each large one."""
    asked: int = torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]
    return asked


@contextmanager
def card_of(gib: float) -> Iterator[None]:
    """The allocator gets so much and no more; it gives back what it keeps in reserve before it runs out."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + gib * 2**30) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def preset(name: str) -> TrainConfig:
    """A preset's settings as the command line reads them, with new networks instead of those of a file."""
    config: TrainConfig = parse("train", ["--preset", name, "--init_checkpoint", "anywhere"])
    config = dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, pretrained=None))
    stage = "latent" if config.autoencoder.kind == "linear" else "joint"
    return dataclasses.replace(config, stage=stage, init_checkpoint=None)


class PresetStep:
    """A preset's networks and step of one stage on the mock GPU, as m2d.training.loop builds them."""

    def __init__(
        self,
        config: TrainConfig,
        stage: str,
        precision: Precision,
        *,
        warmup_steps: int = 0,
        cached_dim: int | None = None,
    ) -> None:
        """cached_dim: D of features that come with the batch; then no extractor is loaded."""
        self.config, self.stage = config, stage
        gc.collect()
        self._others = live_bytes()  # what a failed test's traceback keeps alive
        if stage == "latent":
            config = dataclasses.replace(config, discriminator=dataclasses.replace(config.discriminator, enabled=False))
        self.networks = networks = build_networks(config, CUDA, cached_dim)
        judge = dataclasses.replace(config.discriminator, start_step=0)
        eager = dataclasses.replace(config, discriminator=judge, compile=False)
        settings = StepConfig(eager, precision=precision, total_steps=TOTAL_STEPS, vae_warmup_steps=warmup_steps)
        perceptual = build_perceptual("features", networks.extractor)
        perceptual.to(CUDA)
        self.step = build_step(stage, networks, perceptual, settings, CUDA)
        staged = dataclasses.replace(config, stage=stage, init_checkpoint="anywhere")
        for unused in idle_modules(staged, networks, self.step.ema.module, [networks.extractor, perceptual]):
            unused.to("cpu")
        self.latent_shape = networks.denoiser.latent_shape(config.data.image_size, networks.autoencoder.downsampling)

    def batch(self, size: int) -> tuple[Any, Draws]:
        """A batch on the CPU, as the stream yields it, and its draws."""
        dim, labels = self.networks.feature_dim, torch.zeros(size, dtype=torch.int64)
        features = None
        if self.networks.extractor is None or self.stage == "latent":
            patches = self.networks.extractor.num_patches if self.networks.extractor is not None else 49
            features = Features(torch.zeros(size, dim).half(), torch.zeros(size, patches, dim).half())
        draws = draw(0, torch.arange(size, device=CUDA), self.latent_shape, dim, self.config.conditioning)
        if self.stage == "latent":
            assert features is not None
            mean = torch.zeros(size, *self.latent_shape).half()
            return LatentBatch(mean, mean.clone(), features, labels), draws
        side = self.config.data.image_size
        return ImageBatch(torch.zeros(size, side, side, 3, dtype=torch.uint8), labels, features), draws

    def take(self, size: int, micro_batches: int = 1, step: int = 10) -> None:
        """One optimiser step."""
        self.step([self.batch(size) for _ in range(micro_batches)], step)

    def peak_bytes(self, size: int, micro_batches: int = 1) -> int:
        """Peak bytes of live tensors on the GPU in a step that is not the first: the optimiser's moments exist."""
        self.take(1)
        torch.cuda.reset_peak_memory_stats()
        self.take(size, micro_batches)
        return live_bytes("peak") - self._others
