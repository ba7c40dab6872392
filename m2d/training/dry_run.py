"""`train --dry_run`: memory, time and disk that a run will need, before any GPU is booked.

The run's own networks and step on fake tensors, which have shapes and no contents: no GPU, no data and no weights are
read. Counted is a training step in its steady state; validation, samples and the latent stage's encoding are not.
"""

import contextlib
import gc
import math
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from m2d.classes import ISIC7, named_class_set
from m2d.data.features import FeatureStore, feature_bytes
from m2d.data.layouts import IMAGE_SUFFIXES, list_files
from m2d.data.store import prepared_folder, reusable_catalog
from m2d.errors import DataError
from m2d.experiment import Experiment
from m2d.files.storage import open_storage
from m2d.models.extractors import EfficientNetLite, FeatureExtractor, Features, extractor_identity
from m2d.models.perceptual import ProjectedDiscriminator, build_perceptual
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, FeatureExtractorConfig, PerceptualKind
from m2d.training.batch import Draws, ImageBatch, LatentBatch, draw
from m2d.training.measure import flop_formulas, known_peak
from m2d.training.networks import build_networks, idle_modules
from m2d.training.run import RunPlan
from m2d.training.settings import TrainConfig, with_absolute_paths
from m2d.training.step import StepConfig, build_step

GIB, GB = 2**30, 1e9
ASSUMED_IMAGES = 10_000  # about HAM10000's, where no data_root is named
UTILISATION = 0.15  # of the data sheet; kernels on an H200 reach 9 to 16 % (docs/results/gpu-nvidia-h200.md)
LAUNCH_S = 30e-6  # of the host for each kernel, autograd and Python included; measured beside that H200
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 3090")
# A card's GB, and the GiB of tensors that fit beside what ALLOWANCE names.
CARDS = {8: 6.7, 12: 10.5, 16: 14.0, 24: 21.5, 40: 36.0, 80: 72.0}
ALLOWANCE = "CUDA context 0.4 to 0.6, cuDNN workspaces 0.1 to 0.3, fragmentation 5 to 10 %"
BLOCK_BYTES = 512  # to which torch's CUDA allocator rounds a tensor up
BACKWARD = "gradients of activations"
OTHER = "inputs, losses and the rest"


def dry_run(config: TrainConfig) -> None:
    """Print what the run will need. Writes nothing. Raises an M2DError for settings that a run would refuse."""
    config = with_absolute_paths(config)
    images, train, known_from, cached = count_images(config)
    run = FakeRun(config, train_images=train, cached=cached)
    own = run.cost(config.batch_size)
    low, high = two_alike(run, own)
    costs = {
        number: own if number == run.first_whole_step else run.cost(config.batch_size, number, computed=1)
        for number in kinds_of_steps(run)
    }
    plan, config = run.plan, run.config
    features = "from setup_data's cache" if cached else f"{config.feature_extractor.name} in every step"
    net = f" ({config.perceptual.lpips_net})" if plan.perceptual == "lpips" else ""
    assumed = ", assumed" if config.perceptual.kind is None else ""
    lines = [
        f"{config.name}: stage {config.stage}, {config.data.image_size} px, {plan.precision}",
        f"step: {plan.global_batch} images = batch_size {config.batch_size} x {config.gradient_accumulation_steps} "
        f"micro-batches x {plan.world_size} worker(s)",
        f"features: {features}; perceptual: {plan.perceptual}{net}{assumed}",
        f"images: {images:,}, {train:,} of them for training ({known_from})",
        "",
        f"memory of a worker at the peak of a step{'GiB':>13}",
    ]
    parts = sorted(own.parts.items(), key=lambda part: -part[1])
    lines += [f"  {name:43}{size / GIB:8.2f}" for name, size in parts if size >= 0.005 * GIB]
    fitting = [largest_batch(low, high, usable * GIB) for usable in CARDS.values()]
    lines += [
        f"  {'all live tensors':43}{own.peak / GIB:8.2f}   ({own.between / GIB:.2f} between steps)",
        f"beside them: {ALLOWANCE}",
        "",
        f"{'card, GB':26}" + "".join(f"{card:9}" for card in CARDS),
        f"{'tensors that fit, GiB':26}" + "".join(f"{usable:9g}" for usable in CARDS.values()),
        f"{'largest batch_size':26}" + "".join(f"{batch or 'none':>9}" for batch in fitting),
    ]
    print("\n".join([*lines, "", *_time_lines(run, costs), "", *_disk_lines(run, images, cached)]))


def count_images(config: TrainConfig) -> tuple[int, int, str, bool]:
    """(images of data_root, those for training, how that is known, whether setup_data's features are there for all).

    Of setup_data's catalog where that still holds, else by the files' names. Raises DataError where data_root cannot
    be listed or holds no image, ConfigError where it is no folder.
    """
    data, train_share = config.data, 1 - config.data.val_fraction - config.data.test_fraction
    if config.data_root is None:
        train = round(ASSUMED_IMAGES * train_share)
        return ASSUMED_IMAGES, train, "assumed, about HAM10000; --data_root counts yours", False
    root = config.checked_data_root
    folder = prepared_folder(config.cache_dir, root)
    catalog = reusable_catalog(folder, root, data)
    if catalog is not None:
        store = FeatureStore(folder, extractor_identity(config.feature_extractor)[0], data.image_size)
        of_train, of_val = (catalog.filter(pc.equal(catalog["split"], name))["sha256"] for name in ("train", "val"))
        absent = store.missing(of_train.to_pylist(), data.views).any() or store.missing(of_val.to_pylist(), 1).any()
        return len(catalog), len(of_train), "setup_data's catalog", not absent
    files, _ = list_files(*open_storage(root), root)
    images = sum(file.path.lower().endswith(IMAGE_SUFFIXES) for file in files)
    if images == 0:
        raise DataError(f"data_root: {root} holds no image; expected {' '.join(IMAGE_SUFFIXES)}")
    return images, max(1, round(images * train_share)), "image files, counted by name", False


def kinds_of_steps(run: "FakeRun") -> Mapping[int, int]:
    """How many steps of the run do the same work, by the number of the first of them."""
    first: dict[Hashable, int] = {}
    kinds = (run.step.kind(number) for number in range(run.plan.total_steps))
    return Counter(first.setdefault(kind, number) for number, kind in enumerate(kinds))


def _time_lines(run: "FakeRun", costs: Mapping[int, "StepCost"]) -> list[str]:
    plan, kinds = run.plan, kinds_of_steps(run)
    micro_batches = plan.accumulation(plan.world_size)
    flops = sum(micro_batches * costs[number].flops * count for number, count in kinds.items()) / plan.total_steps
    launches = max(cost.launches for cost in costs.values())
    warmup = f", the VAE alone in the first {kinds[0]:,}" if run.first_whole_step > 0 else ""
    lines = [
        f"{plan.total_steps:,} steps, {plan.steps_per_epoch:,} an epoch{warmup}",
        f"{flops / 1e12:.4g} TFLOP a step and worker on average, {launches:,} kernel launches a micro-batch",
        f"{f'{UTILISATION:.0%} of the data sheet':26}{'TFLOP/s':>9}{'images/s':>9}{'hours':>9}",
    ]
    for gpu in GPUS:
        reached = (known_peak(gpu) or math.nan) * UTILISATION / (2 if plan.precision == "no" else 1)  # TF32: half
        seconds, waiting = 0.0, 0.0
        for number, count in kinds.items():
            computing, launching = costs[number].flops / reached, costs[number].launches * LAUNCH_S
            seconds += count * micro_batches * max(computing, launching)
            waiting += count * micro_batches * max(launching - computing, 0.0)
        bound = f"  launches of {LAUNCH_S * 1e6:g} us set the pace" if waiting > seconds / 10 else ""
        lines.append(
            f"{gpu:26}{reached / 1e12:9.0f}{plan.total_steps * plan.global_batch / seconds:9,.0f}"
            f"{seconds / 3600:9.{'0f' if seconds > 36_000 else '2g'}}{bound}"
        )
    return lines


def _disk_lines(run: "FakeRun", images: int, cached: bool) -> list[str]:
    data, kept, checkpoint = run.config.data, run.config.saving.keep_last + 1, run.checkpoint_bytes / GB
    features = images * data.views * feature_bytes(run.feature_dim, run.num_patches)
    caches = {"features": features, "decoded images": images * 3 * data.image_size**2}
    if run.config.stage == "latent":
        entry = 2 * 2 * math.prod(run.latent_shape)  # mean and deviation in fp16
        entry += 0 if cached else 2 * run.feature_dim * (1 + run.num_patches)
        caches["latents"] = run.plan.train_images * data.views * entry
    return [
        f"disk, GB: a checkpoint {checkpoint:.2g}, the last {kept - 1} and the best {kept * checkpoint:.2g}",
        f"caches, GB: {', '.join(f'{name} {size / GB:.2g}' for name, size in caches.items())}",
    ]


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one optimiser step of a worker takes. Bytes are of live tensors on the device."""

    batch_size: int  # images a micro-batch
    parts: dict[str, int]  # bytes at the peak
    between: int  # bytes before the step
    trace: np.ndarray  # bytes after each storage's making or end
    flops: int  # a micro-batch
    launches: int  # of kernels, a micro-batch

    @property
    def peak(self) -> int:
        """Bytes."""
        return int(self.trace.max())


class FakeRun:
    """What the worker makes of a configuration, on a device that need not exist.

    train_images: of the training split. cached: setup_data's features are there, so that no extractor is loaded.
    device: the CPU, where bfloat16 and float16 are then cast as on CUDA; or a CUDA device, where torch sees one.
    perceptual.kind None stands for LPIPS, the larger one: whether its weights can be had shows on the day.
    """

    def __init__(
        self, config: TrainConfig, *, train_images: int, cached: bool = False, device: torch.device | None = None
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        # Nothing is loaded: a checkpoint's shapes are the settings', or the run refuses it.
        self.config = config = replace(config, dry_run=True, init_checkpoint=None)
        kind: PerceptualKind = config.perceptual.kind or "lpips"
        self.plan = plan = RunPlan(
            config=config,
            experiment=Experiment(Path(config.name)),  # for the plan's arithmetic; it is never made
            world_size=max(config.workers[1], 1),
            train_images=train_images,
            precision=config.mixed_precision or "bf16",
            perceptual=kind,
            classes=ISIC7 if config.data.classes in (None, "folders") else named_class_set(config.data.classes),
        )
        with torch.device("meta"):  # neither memory nor random numbers
            extractor = extractor_by_shape(config.feature_extractor)
            self.feature_dim, self.num_patches = extractor.dim, extractor.num_patches
            self.networks = build_networks(config, torch.device("meta"), extractor.dim, plan.classes)
            self.networks.extractor = None if cached else extractor
            projected, net = (
                isinstance(self.networks.discriminator, ProjectedDiscriminator),
                config.perceptual.lpips_net,
            )
            perceptual = build_perceptual(kind, self.networks.extractor, net, projected=projected, weights=False)
        self.latent_shape = self.networks.denoiser.latent_shape(
            config.data.image_size, self.networks.autoencoder.downsampling
        )
        self.counter = StepCounter(self.device.type)
        self._mode = _OneFakeMode(allow_non_fake_inputs=True)
        frozen = {*perceptual.hidden, *([] if cached else [extractor])}
        # Fakes do not move to the CPU; `_label` forgets those that would.
        here = replace(config, compile=False, schedule=replace(config.schedule, ema_on_cpu=False))
        step_config = StepConfig(here, plan.precision, plan.total_steps, plan.vae_warmup_steps)
        with self._faking(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy asks a fake tensor for its address
            for module in (*self.networks.trained().values(), *frozen):
                for inner in module.modules():  # each once; LPIPS names some of its own twice
                    inner.to_empty(device=self.device, recurse=False)
            self.step = build_step(config.stage, self.networks, perceptual, step_config, self.device)
            for optimizer in self.step.optimizers.values():  # AdamW's moments, as its own first update makes them
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self._label(perceptual, frozen)
            leaves = tree_leaves(self.step.state_dict())
            self.checkpoint_bytes = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def cost(self, batch_size: int, number: int | None = None, computed: int = 2) -> StepCost:
        """Step `number` of micro-batches of `batch_size` images; None: the first in which every network learns.

        computed: micro-batches at most. The second one finds the first one's gradients; of each further one only what
        is kept until the U-Net's half is added.
        """
        number = self.first_whole_step if number is None else number
        accumulation = self.plan.accumulation(self.plan.world_size)
        computed = min(accumulation, computed)
        counter = self.counter
        gc.collect()
        gc.disable()  # so that the same step of another size frees its tensors in the same order
        try:
            with self._faking():
                counter.restart()
                between = counter.now
                micro_batches = [self._micro_batch(batch_size) for _ in range(computed)]
                kept = (counter.now - between) // computed
                self.step(micro_batches, number)  # type: ignore[arg-type]
                del micro_batches
        finally:
            gc.enable()
        if self.config.stage == "joint":
            kept += 4 * batch_size * (math.prod(self.latent_shape) + self.feature_dim * (1 + self.num_patches))
        further = (accumulation - computed) * kept
        parts = counter.peak_parts
        return StepCost(
            batch_size=batch_size,
            parts=parts | {OTHER: parts.get(OTHER, 0) + further},
            between=between,
            trace=np.array(counter.trace) + further,
            flops=counter.flops // computed,
            launches=counter.launches // computed,
        )

    @property
    def first_whole_step(self) -> int:
        """The number of the first step in which every network learns; of the last one, if none is."""
        warmup = self.plan.vae_warmup_steps if self.config.stage == "joint" else 0
        return min(warmup, self.plan.total_steps - 1)

    @contextlib.contextmanager
    def _faking(self) -> Iterator[None]:
        autocast = cuda_autocast_on_cpu() if self.device.type == "cpu" else contextlib.nullcontext()
        with self._mode, autocast, self.counter:
            yield

    def _label(self, perceptual: nn.Module, frozen: Iterable[nn.Module]) -> None:
        counter, networks, averaged = self.counter, self.networks, self.step.ema.module
        trained = list(networks.trained().values())
        labels: dict[str | None, Iterable[nn.Module]] = {
            "averaged weights (EMA)": [averaged],
            "frozen extractor, perceptual network": frozen,
            "weights": trained,  # after the averaged ones, which in the decoder stage are the same
            None: idle_modules(self.config, networks, averaged, frozen),
        }
        for part, modules in labels.items():
            for module in modules:
                counter.label(part, [*module.parameters(), *module.buffers()])
        for parameter in (parameter for module in trained for parameter in module.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda learned: counter.label("gradients of weights", [learned.grad])
                )
        for optimizer in self.step.optimizers.values():
            counter.label("AdamW's moments", tree_leaves(list(optimizer.state.values())))
        counter.follow(perceptual, "activations: perceptual")
        if networks.extractor is not None:
            counter.follow(networks.extractor, "features")
        counter.follow(networks.autoencoder, "activations: VAE")
        for module in (networks.denoiser, networks.projector):
            counter.follow(module, "activations: U-Net", part_if_frozen="activations: alignment of the VAE")
        if networks.discriminator is not None:
            counter.follow(networks.discriminator, "activations: discriminator")

    def _micro_batch(self, size: int) -> tuple[ImageBatch | LatentBatch, Draws]:
        labels = torch.zeros(size, dtype=torch.int64)
        cls = torch.zeros(size, self.feature_dim, dtype=torch.float16)
        features = Features(cls, torch.zeros(size, self.num_patches, self.feature_dim, dtype=torch.float16))
        batch: ImageBatch | LatentBatch
        if self.config.stage == "latent":
            mean = torch.zeros(size, *self.latent_shape, dtype=torch.float16)
            batch = LatentBatch(mean, mean.clone(), features, labels)
        else:
            side = self.config.data.image_size
            images = torch.zeros(size, side, side, 3, dtype=torch.uint8)
            batch = ImageBatch(images, labels, features if self.networks.extractor is None else None)
        rows = torch.arange(size, device=self.device)
        return batch, draw(self.config.seed, rows, self.latent_shape, self.feature_dim, self.config.conditioning)


class _OneFakeMode(FakeTensorMode):
    """Copies of fake tensors stay in it: a deep copy, as the averages are, would come with a mode of its own."""

    def __deepcopy__(self, memo: object) -> "_OneFakeMode":
        return self


def two_alike(run: FakeRun, own: StepCost) -> tuple[StepCost, StepCost]:
    """Steps of two batch sizes, of at least `own`'s, that differ in nothing but sizes, for `largest_batch`.

    With one image or two torch takes other paths here and there (layouts are ambiguous), so small sizes are doubled.
    """
    low, high = own, run.cost(2 * own.batch_size)
    for _ in range(3):
        if len(low.trace) == len(high.trace):
            break
        low, high = high, run.cost(2 * high.batch_size)
    return low, high


def largest_batch(low: StepCost, high: StepCost, usable_bytes: float) -> int:
    """The largest batch_size whose peak fits; 0 where none does.

    The bytes alive at any moment of a step grow linearly with its images, so two steps tell those of every other size;
    the peak is at the moment that needs most. Where the two steps differ in more than sizes, the peaks alone count.
    """
    a, b = low.trace.astype(float), high.trace.astype(float)
    if len(a) != len(b):
        a, b = np.array([a.max()]), np.array([b.max()])
    slope = (b - a) / (high.batch_size - low.batch_size)
    base = a - slope * low.batch_size
    if base.max() > usable_bytes:
        return 0
    grows = slope > 0
    return max(0, math.floor(float(((usable_bytes - base[grows]) / slope[grows]).min())))


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
        self._live: dict[int, tuple[int, str, weakref.ref[Any]]] = {}  # by the storage's address
        self._parts: defaultdict[str, int] = defaultdict(int)
        self._computing: list[str] = []
        self._formulas = flop_formulas()
        self.restart()

    def restart(self) -> None:
        """Begin a new measurement; what is alive stays counted."""
        self.peak, self.peak_parts = self.now, dict(self._parts)  # bytes
        self.trace = [self.now]  # bytes after each storage's making or end
        self.flops = 0  # of matrix products, convolutions and attentions
        self.launches = 0  # of forward and backward passes: operations that are no view
        self.host_reads = 0  # values that the host asked for: it waits for the device then

    def label(self, part: str | None, tensors: Iterable[Tensor]) -> None:
        """Tensors that are alive belong to this part from now on.

        None: they count no longer, as they are elsewhere in the run that this one stands for.
        """
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:  # and stays known, for its views would be taken for something new
                size, before, reference = self._live[key]
                self._parts[before] -= size
                if part is None:
                    self.now -= size
                    self._live[key] = (0, before, reference)
                else:
                    self._parts[part] += size
                    self._live[key] = (size, part, reference)

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
        if (formula := self._formulas.get(func._overloadpacket)) is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device_type:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live:
            return
        part = self._computing[0] if self._computing else BACKWARD if _in_backward() else OTHER
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
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def float32(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def in_float32(name: str) -> Callable[..., Any]:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def compute(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return operation(*tree_map(float32, args), **tree_map(float32, kwargs))

        return compute

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in _CUDA_FLOAT32:
            library.impl(name, in_float32(name), "AutocastCPU")
        yield


def extractor_by_shape(config: FeatureExtractorConfig) -> FeatureExtractor:
    """The extractor that the settings name, without its weights."""
    name, side = config.name, config.input_size
    if name.startswith(PANDERM_PREFIX):
        from m2d.models.extractors.panderm import NATIVE_SIZE, SIZES, PanDerm

        encoder = {key: torch.zeros(shape) for key, shape in SIZES[name].shapes().items()}
        return PanDerm(name, encoder, side or NATIVE_SIZE, config.crop)
    if name.startswith(TIMM_PREFIX):
        import timm

        from m2d.models.extractors.timm import TimmExtractor, native_size

        native = native_size(name)
        network: Any = timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=False, num_classes=0)
        if side not in (None, native) and hasattr(network, "set_input_size"):
            network.set_input_size(img_size=(side, side))
        return TimmExtractor(name, network, side or native, config.crop, "0" * 64)
    return EfficientNetLite(name, side, config.crop)
