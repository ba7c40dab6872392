"""A run's own networks and step on fake tensors, which have shapes and no contents: what would a step take?

No GPU, no data and no weights are read. Called by dry_run.py; it prints nothing.
"""

import contextlib
import dataclasses
import gc
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from m2d.config import TrainConfig
from m2d.errors import CheckpointError, first_line
from m2d.experiment import Experiment
from m2d.models.extractors import LITE0, FeatureExtractor, Features
from m2d.models.extractors.lite import EfficientNetLite, EfficientNetLite0, EfficientNetLite1
from m2d.models.perceptual import LpipsDistance, build_perceptual
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, Crop, FeatureExtractorConfig, PerceptualKind
from m2d.training.batch import Draws, ImageBatch, LatentBatch, draw
from m2d.training.decoder_step import DecoderStep
from m2d.training.memory import OTHER, StepCounter, cuda_autocast_on_cpu
from m2d.training.networks import build_networks, step_config_of
from m2d.training.plan import RunPlan
from m2d.training.step import JointStep, LatentStep


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
        self.config = config = _by_shape(config)
        kind: PerceptualKind = config.perceptual.kind or "lpips"
        self.plan = RunPlan(
            config=config,
            experiment=Experiment(Path(config.name)),  # for the plan's arithmetic; it is never made
            world_size=max(config.workers[1], 1),
            train_images=train_images,
            precision=config.mixed_precision or "bf16",
            perceptual=kind,
        )
        with torch.device("meta"):  # neither memory nor random numbers
            extractor = extractor_by_shape(config.feature_extractor)
            self.networks = build_networks(config, torch.device("meta"), extractor.dim)
            self.networks.extractor = None if cached else extractor
            judge, perceptual = _perceptual_by_shape(kind, self.networks.extractor, config.perceptual.lpips_net)
        self.feature_dim, self.num_patches = extractor.dim, extractor.num_patches
        self.latent_shape = self.networks.denoiser.latent_shape(
            config.data.image_size, self.networks.autoencoder.downsampling
        )
        self.counter = StepCounter(self.device.type)
        self._mode = _OneFakeMode(allow_non_fake_inputs=True)
        self._kept = perceptual  # by this alone in the latent stage
        frozen = {judge, self.networks.extractor or judge}
        with self._faking(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy asks a fake tensor for its address
            for module in (*self.networks.trained().values(), *frozen):
                for inner in module.modules():  # each once; LPIPS names some of its own twice
                    inner.to_empty(device=self.device, recurse=False)
            self.step = self._build_step(perceptual)
            self._give_moments()
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
                micro_batches = [(self._batch(batch_size), self._draws(batch_size)) for _ in range(computed)]
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

    def _build_step(self, perceptual: nn.Module) -> JointStep | LatentStep | DecoderStep:
        config = self.config
        step_config = dataclasses.replace(
            step_config_of(self.plan),
            schedule=dataclasses.replace(config.schedule, ema_on_cpu=False),  # fakes do not move; `_label` forgets
            compile=None,
        )
        if config.stage == "latent":
            return LatentStep(self.networks, step_config, self.device)
        kind = DecoderStep if config.stage == "decoder" else JointStep
        return kind(self.networks, perceptual, step_config, self.device)

    def _give_moments(self) -> None:
        """AdamW's state as after a first step, made by its own update."""
        for optimized in self.step.optimized.values():
            for parameter in optimized.parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimized.optimizer.step()
            optimized.optimizer.zero_grad(set_to_none=True)

    def _label(self, perceptual: nn.Module, frozen: Iterable[nn.Module]) -> None:
        counter, networks, averaged = self.counter, self.networks, self.step.ema.module
        counter.label("averaged weights (EMA)", _tensors(averaged))
        for module in frozen:
            counter.label("frozen extractor, perceptual network", _tensors(module))
        for module in networks.trained().values():  # after the averaged ones, which in the decoder stage are the same
            counter.label("weights", _tensors(module))
            counter.follow_gradients(module.parameters(), "gradients of weights")
        for optimized in self.step.optimized.values():
            counter.label("AdamW's moments", tree_leaves(list(optimized.optimizer.state.values())))
        # In host memory, as the worker has them.
        apart = self.config.schedule.ema_on_cpu and averaged is not networks.denoiser
        aside: list[nn.Module] = [averaged] if apart else []
        if self.config.stage == "latent":
            aside += [networks.autoencoder, *frozen]
        for module in aside:
            counter.forget(_tensors(module))
        counter.follow(perceptual, "activations: perceptual")
        if networks.extractor is not None:
            counter.follow(networks.extractor, "features")
        counter.follow(networks.autoencoder, "activations: VAE")
        for module in (networks.denoiser, networks.projector):
            counter.follow(module, "activations: U-Net", part_if_frozen="activations: alignment of the VAE")
        if networks.discriminator is not None:
            counter.follow(networks.discriminator, "activations: discriminator")

    def _batch(self, size: int) -> ImageBatch | LatentBatch:
        labels = torch.zeros(size, dtype=torch.int64)
        features = Features(
            torch.zeros(size, self.feature_dim, dtype=torch.float16),
            torch.zeros(size, self.num_patches, self.feature_dim, dtype=torch.float16),
        )
        if self.config.stage == "latent":
            mean = torch.zeros(size, *self.latent_shape, dtype=torch.float16)
            return LatentBatch(mean, mean.clone(), features, labels)
        side = self.config.data.image_size
        images = torch.zeros(size, side, side, 3, dtype=torch.uint8)
        return ImageBatch(images, labels, features if self.networks.extractor is None else None)

    def _draws(self, size: int) -> Draws:
        rows = torch.arange(size, device=self.device)
        return draw(self.config.seed, rows, self.latent_shape, self.feature_dim, self.config.conditioning)


class _OneFakeMode(FakeTensorMode):
    """Copies of fake tensors stay in it: a deep copy, as the averages are, would come with a mode of its own."""

    def __deepcopy__(self, memo: object) -> "_OneFakeMode":
        return self


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


def extractor_by_shape(config: FeatureExtractorConfig) -> FeatureExtractor:
    """The extractor that the settings name, without its weights."""
    name, side = config.name, config.input_size
    if name.startswith(PANDERM_PREFIX):
        from m2d.models.extractors.panderm import NATIVE_SIZE, SIZES, PanDerm

        encoder = {key: torch.zeros(shape) for key, shape in SIZES[name].shapes().items()}
        return PanDerm(name, encoder, side or NATIVE_SIZE, config.crop)
    if name.startswith(TIMM_PREFIX):
        from m2d.models.extractors.timm import TimmExtractor, native_size

        native = native_size(name)
        network: Any = timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=False, num_classes=0)
        if side not in (None, native) and hasattr(network, "set_input_size"):
            network.set_input_size(img_size=(side, side))
        return TimmExtractor(name, network, side or native, config.crop, "0" * 64)
    return _lite_by_shape(name, side, config.crop)


def _lite_by_shape(name: str, side: int | None = None, crop: Crop = "whole") -> EfficientNetLite:
    kind = EfficientNetLite0 if name == LITE0 else EfficientNetLite1
    state = timm.create_model(f"tf_{name.replace('-', '_')}", pretrained=False).state_dict()
    return kind(state, side, crop)


def _perceptual_by_shape(kind: PerceptualKind, extractor: nn.Module | None, net: str) -> tuple[nn.Module, nn.Module]:
    """(its frozen network, the distance), as build_perceptual chooses them, without weights."""
    if kind == "features":
        judge = extractor if extractor is not None and hasattr(extractor, "pyramid") else _lite_by_shape(LITE0)
        return judge, build_perceptual(kind, judge)
    import lpips

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by arguments that were renamed since
        network: nn.Module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    network.eval().requires_grad_(False)
    return network, _ShapedLpips(network)


class _ShapedLpips(LpipsDistance):
    """LPIPS on a network that is given: its own constructor would fetch weights."""

    def __init__(self, network: nn.Module) -> None:
        nn.Module.__init__(self)
        self._network = [network]


def _by_shape(config: TrainConfig) -> TrainConfig:
    """The config without weights to load. A checkpoint's shapes are the settings', or the run refuses it."""
    autoencoder = config.autoencoder
    if autoencoder.pretrained is not None:
        shape = _pretrained_shape(autoencoder.pretrained)
        autoencoder = dataclasses.replace(
            autoencoder,
            pretrained=None,
            block_channels=list(shape["block_out_channels"]),
            layers_per_block=shape["layers_per_block"],
            latent_channels=shape["latent_channels"],
            norm_groups=shape["norm_num_groups"],
            mid_attention=shape.get("mid_block_add_attention", True),
        )
    return dataclasses.replace(config, dry_run=True, init_checkpoint=None, autoencoder=autoencoder)


def _pretrained_shape(location: str) -> dict[str, Any]:
    """The config.json of a VAE, from its folder, from a pipeline's, or from the hub."""
    from diffusers import AutoencoderKL

    inner = Path(location) / "vae"
    try:
        where = str(inner) if (inner / "config.json").is_file() else location
        shape: dict[str, Any] = AutoencoderKL.load_config(where)
    except Exception as error:  # diffusers and huggingface_hub each have their own
        raise CheckpointError(
            f"autoencoder.pretrained: {location} has no config.json to be read ({first_line(error)})"
        ) from None
    return shape


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
