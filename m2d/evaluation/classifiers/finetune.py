"""Classifier 2 of the comparison: a network fine-tuned on the pixels of an arm.

All arms take the same number of steps, with the same images a step, the same schedule and augmentation, so they differ
in data alone, and in how synthetic images come in: the recipe. A weight is how often an image is drawn. As a factor of
its loss a rare class would seldom be met, and then push hard (An et al., arXiv 2009.13447).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.transforms.functional import rgb_to_grayscale

from m2d import __version__
from m2d.data.views import apply_view
from m2d.errors import ConfigError, TrainingError
from m2d.evaluation.classifiers.compare import DownstreamResult, TrainingRows, Trials, compare_arms
from m2d.evaluation.classifiers.site import SiteResult, measure_site
from m2d.evaluation.classifiers.worth import FIXED_SHARE, Pool, Sides, WorthResult, measure_worth
from m2d.evaluation.images import VIEWS, ImageSet, together
from m2d.evaluation.settings import FinetuneConfig
from m2d.generation.generator import pick_device
from m2d.models.extractors import FeatureExtractor, extractor_identity, load_feature_extractor
from m2d.models.extractors.timm import TimmExtractor
from m2d.models.precision import DTYPES, pick_precision
from m2d.models.settings import TIMM_PREFIX, FeatureExtractorConfig

PREDICTED_AT_ONCE = 64
HALF = 0.5  # DA-Fusion's chance of a replacement (arXiv 2302.07944), and the first phase's part of the steps
FEWEST_NORMED = 2  # images whose statistics a batch norm can take
RECIPES = {
    "mix": "an image that is drawn is a synthetic one with the chance of their share, a quarter by default",
    "replace": "the same, by default in place of half of the real images",
    "two_phase": "synthetic images alone first, classes alike, then real ones alone",
    "auxiliary_bn": "mixed, with batch norms of their own for synthetic images; those of real ones are tested",
}


def measure_finetuned(
    *, train: ImageSet, test: ImageSet, generated: ImageSet, config: FinetuneConfig, trials: Trials
) -> DownstreamResult:
    """The comparison for classifier 2; see compare.compare_arms.

    A seed decides the new classification layer, dropout, the order and the views of the images, and what arms draw.
    Raises also ConfigError and CheckpointError for a network that cannot be built, TrainingError for one that diverges.
    """
    steps = steps_of(config, len(train))
    return compare_arms(
        FinetuneClassifier.of(train, test, generated, config),
        {**asdict(config), "steps": steps},
        trials,
        images=(train, test, generated),
        notes=[
            f"Every arm takes the same {steps:,} steps of {config.batch_size} images "
            f"({config.epochs:g} passes over the real training images): arms differ in data alone.",
            "A seed decides the new classification layer, dropout, the images' order, views and colours, and what arms "
            "draw.",
            f"Arm d by the recipe {config.recipe}: {RECIPES[config.recipe]}.",
        ],
    )


def finetuned_worth(
    sides: Sides,
    generated: ImageSet,
    config: FinetuneConfig,
    trials: Trials,
    *,
    folds: int = 1,
    original: Sides | None = None,
) -> WorthResult:
    """What generated images are worth to classifier 2; see worth.measure_worth.

    sides: with folds, those of `tested` are trained on too. original: as they are, where those given were preprocessed.
    """

    def judge(sides: Sides) -> FinetuneClassifier:
        every = list(sides.values()) if folds == 1 else [together(*sides.values())]
        return FinetuneClassifier.of(every[0], every[-1], generated, config)

    before = judge(original) if original else None
    pool, notes = Pool.of(sides, generated), [_fixed(config)]
    return measure_worth(judge(sides), pool, trials, folds=folds, notes=notes, original=before)


def finetuned_site(
    sides: Sides, generated: ImageSet, config: FinetuneConfig, trials: Trials, *, share: float, folds: int
) -> SiteResult:
    """What a site gains, for classifier 2; see site.measure_site. Known images: those that the generator learned on."""
    pooled = together(*sides.values())
    notes = [
        _fixed(config),
        "The generator's own real images come by the same recipe as the synthetic ones. There is no arm t: flips and "
        "quarter turns are in every arm.",
    ]
    judge = FinetuneClassifier.of(pooled, pooled, generated, config)
    return measure_site(judge, Pool.of(sides, generated), trials, share=share, folds=folds, notes=notes)


def _fixed(config: FinetuneConfig) -> str:
    return (
        f"A training takes too long to choose a share by; it is {share_of(config):g} by the recipe {config.recipe} "
        f"({RECIPES[config.recipe]}). A network learns a class by how often it meets it, so images are drawn by their "
        "weight, and where synthetic ones come in (d at equal priors, f) the classes come as often as in c."
    )


def share_of(config: FinetuneConfig) -> float:
    """Of a class's weight on its synthetic images; in two phases also of the steps."""
    if config.share is not None:
        return config.share
    return HALF if config.recipe in ("replace", "two_phase") else FIXED_SHARE


@dataclass(frozen=True)
class FinetuneClassifier:
    """Pixels and labels of the three sets. It goes through Ray's store, so it holds no network."""

    train: np.ndarray  # uint8 [N, S, S, 3], as are the next two; perhaps mapped from files
    test: np.ndarray
    generated: np.ndarray
    train_labels: np.ndarray  # int64 [N]
    generated_labels: np.ndarray
    config: FinetuneConfig
    num_classes: int
    identities: tuple[str, str, str]  # of any answer; also of the generated images; also of how they join real ones
    seeded = True

    @classmethod
    def of(cls, train: ImageSet, test: ImageSet, generated: ImageSet, config: FinetuneConfig) -> "FinetuneClassifier":
        """Its identities: hex digests of settings, starting weights and images; the code counts by its version.

        Raises as load_feature_extractor does, and ConfigError for auxiliary batch norms of a network without any.
        """
        if config.recipe == "auxiliary_bn" and not auxiliary_norms(_network(config, len(train.classes)).network):
            raise ConfigError(
                f"finetune.recipe is {config.recipe} and finetune.model {config.model}, which has no batch norms; "
                f"choose another recipe of {' '.join(RECIPES)}"
            )
        shaping = asdict(config)
        joined = {name: shaping.pop(name) for name in ("recipe", "share")}
        if config.pretrained:
            size = config.input_size
            named = FeatureExtractorConfig(name=config.model, weights=config.weights, input_size=size, crop="whole")
            shaping |= {"weights": extractor_identity(named)}
        digest = hashlib.sha256(f"finetune {__version__}, weights drawn {sorted(shaping.items(), key=str)}\n".encode())
        digest.update(f"{len(train.classes)} classes\n".encode())
        identities = []
        for one in (train, test, generated):
            digest.update(f"{one.image_size} {' '.join(one.sha256)}\n".encode())
            digest.update(np.ascontiguousarray(one.labels).data)
            identities.append(digest.hexdigest())
        digest.update(f"{sorted(joined.items())}\n".encode())
        # A memory-mapped array is a subclass, which pickle copies; a plain one it hands to Ray's store as it is.
        plain = [one.pixels.view(np.ndarray) for one in (train, test, generated)]
        if test is train:  # one array, which goes to the store once
            plain[1] = plain[0]
        labels = train.labels, generated.labels
        identity = identities[1], identities[2], digest.hexdigest()
        return cls(plain[0], plain[1], plain[2], *labels, config, len(train.classes), identity)

    def identity_of(self, rows: TrainingRows) -> str:
        """Rows of real images alone are the same training whatever is generated, and by every recipe."""
        return self.identities[2 if _both(rows) else bool(len(rows.generated))]

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"{self.config.model} fine-tuned on the pixels"

    @property
    def fixed_share(self) -> float:
        """By its recipe."""
        return share_of(self.config)

    @property
    def wants_gpu(self) -> bool:
        """Unless the settings say CPU."""
        return self.config.device != "cpu"

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        """Class probabilities of the test images. The same on one device and software; on GPUs but for rounding."""
        device = pick_device(self.config.device)
        # torch's random state and cuDNN's choices are put back. Without `enabled` flags() would turn cuDNN off.
        cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), cudnn:
            torch.manual_seed(seed)
            extractor = _network(self.config, self.num_classes)
            network: Any = extractor.to(device).to(memory_format=torch.channels_last).network
            try:
                self._train(extractor, rows, seed, device)
                network.eval()
                parts, asked = [], np.arange(len(self.test)) if rows.asked is None else rows.asked
                with torch.inference_mode():
                    for first in range(0, len(asked), PREDICTED_AT_ONCE):
                        images = _images(self.test[asked[first : first + PREDICTED_AT_ONCE]], device)
                        logits = network(_input(images, extractor))
                        parts.append(logits.double().softmax(dim=1).cpu().numpy())
                return np.concatenate(parts)
            except torch.OutOfMemoryError:
                raise ConfigError(
                    f"finetune.batch_size {self.config.batch_size} at {self.config.input_size} px does not fit the "
                    f"memory of {device}; lower one of them, or give each task a larger share of the GPU"
                ) from None

    def _train(self, extractor: FeatureExtractor, rows: TrainingRows, seed: int, device: torch.device) -> None:
        network: Any = extractor.network
        network.train()
        of_class = rows.labels(self.train_labels, self.generated_labels)
        labels = torch.from_numpy(of_class).to(device)
        total = steps_of(self.config, len(self.train) if rows.reference is None else len(rows.reference))
        apart = auxiliary_norms(network) if self.config.recipe == "auxiliary_bn" and _both(rows) else {}
        own = rows.own
        trained = [*network.parameters(), *(one for one in apart.values() if one.requires_grad)]
        kernels, others = ([one for one in trained if (one.ndim > 1) == wide] for wide in (True, False))
        optimizer = torch.optim.AdamW(
            [{"params": kernels, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.config.learning_rate,
        )
        kind = pick_precision(self.config.mixed_precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
        colours = torch.Generator().manual_seed(seed)
        loss = torch.zeros((), device=device)
        for step, (numbers, views) in enumerate(recipe_batches(rows, of_class, self.config, total, seed)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step, total)
            images = _images(np.stack([self._seen(rows, *one) for one in zip(numbers, views)]), device)
            images = _input(jittered(images, self.config.color_jitter, colours), extractor)
            chosen = labels[torch.from_numpy(numbers).to(device)]
            real = int(np.count_nonzero(numbers < own)) if apart else len(images)
            with torch.autocast(device.type, dtype=DTYPES[kind], enabled=kind != "no"):
                logits = network(images[:real])
                if apart:
                    logits = torch.cat([logits, functional_call(network, apart, images[real:])])
            loss = loss_of(logits.float(), chosen, real, rows.share)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"finetune: the loss of {self.config.model} is {float(loss.detach())} after {total:,} steps; lower "
                "learning_rate, or set mixed_precision to no"
            )

    def _seen(self, rows: TrainingRows, number: int, view: int) -> np.ndarray:
        """Image `number` of an arm in one of its eight views, uint8 [S, S, 3]."""
        own = number - len(rows.real)
        image = self.train[rows.real[number]] if own < 0 else self.generated[rows.generated[own]]
        return apply_view(image, view)


def loss_of(logits: Tensor, labels: Tensor, real: int, share: float) -> Tensor:
    """Cross-entropy. Where synthetic images come behind the `real` ones, together they weigh their share exactly."""
    if real == len(logits):
        return F.cross_entropy(logits, labels)
    of_real, of_synthetic = F.cross_entropy(logits[:real], labels[:real]), F.cross_entropy(logits[real:], labels[real:])
    return torch.lerp(of_real, of_synthetic, share)


def steps_of(config: FinetuneConfig, real_images: int) -> int:
    """Optimiser steps of every arm."""
    return max(1, math.ceil(config.epochs * real_images / config.batch_size))


def learning_rate(config: FinetuneConfig, step: int, total: int) -> float:
    """Of step 0 .. total - 1: up to the highest in equal parts, then half a cosine towards 0."""
    warmup = int(config.warmup * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def recipe_batches(
    rows: TrainingRows, labels: np.ndarray, config: FinetuneConfig, steps: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each step: image numbers int64 [B], and a view of each, in 0 .. 7.

    labels: int64 [n + m], of the arm's images. An image comes as often as its weight says by every recipe, but for
    two_phase, where real images alone have the weight of their class, after a first phase in which all classes that are
    generated come alike. Real or synthetic images alone are trained on plainly. Real images that are offered as if
    generated come like these: see TrainingRows.own. In a batch of auxiliary_bn real images come first, and every batch
    has as many of each kind: their share of the weight, to whole images, and at least two for the norms; see loss_of.
    """
    size, real = config.batch_size, rows.own
    if not _both(rows) or config.recipe in ("mix", "replace"):
        yield from batches_of(rows.weights, size, steps, seed)
    elif config.recipe == "two_phase":
        first, classes = round(share_of(config) * steps), labels.max() + 1
        whole = np.bincount(labels, rows.weights)
        there, offered = (np.bincount(one, minlength=classes).clip(1) for one in (labels[:real], labels[real:]))
        for numbers, views in batches_of((1 / offered)[labels[real:]], size, first, [seed, 6]):
            yield real + numbers, views
        yield from batches_of((whole / there)[labels[:real]], size, steps - first, seed)
    else:
        made = int(np.clip(round(size * rows.share), FEWEST_NORMED, size - FEWEST_NORMED))
        beside = batches_of(rows.weights[real:], made, steps, [seed, 5])
        for own, new in zip(batches_of(rows.weights[:real], size - made, steps, seed), beside, strict=True):
            yield np.concatenate([own[0], real + new[0]]), np.concatenate([own[1], new[1]])


def batches_of(
    weights: np.ndarray, batch_size: int, steps: int, seed: int | Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each step: image numbers int64 [B], in shuffled passes, and a view of each.

    weights: [N], of the images. A pass has N draws, in which an image comes as often as its weight says, rounded up or
    down by chance: with equal weights once. Systematic resampling, images of the same weight side by side, so that all
    of them together come as often as they should, too.
    """
    generator, images = np.random.default_rng(seed), len(weights)
    waiting = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(waiting) < batch_size:
            order = generator.permutation(images)
            order = order[np.argsort(weights[order], kind="stable")]
            ends = np.cumsum(weights[order])
            times = np.diff(np.floor(ends * (images / ends[-1]) + generator.random()), prepend=0).astype(np.int64)
            waiting = np.concatenate([waiting, generator.permutation(np.repeat(order, times))])
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        yield batch, generator.integers(VIEWS, size=batch_size)


def auxiliary_norms(network: nn.Module) -> dict[str, Tensor]:
    """A second set of every batch norm's scales and statistics, under their names in the network. Empty without any.

    For functional_call, which updates it in place of the network's own. Source: AdvProp, arXiv 1911.09665, section 4.2.
    """
    return {
        f"{place}.{name}": tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for place, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    }


def jittered(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of each image times a factor of its own in 1 - strength .. 1 + strength.

    images: [B, 3, H, W] in [0, 255]. As torchvision's ColorJitter, which draws one factor for a batch, in this order;
    hue stays, for it tells diagnoses apart. Strength 0 draws nothing.
    """
    if not strength:
        return images
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    brightness, contrast, saturation = factors.to(images.device)
    images = (images * brightness).clamp(0, 255)
    mean = rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 255)
    return torch.lerp(rgb_to_grayscale(images), images, saturation).clamp(0, 255)


def _both(rows: TrainingRows) -> bool:
    """Whether there are images of both kinds; the recipe then counts."""
    return 0 < rows.own < len(rows.weights)


def _images(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [0, 255]."""
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float()


def _input(images: Tensor, extractor: FeatureExtractor) -> Tensor:
    """Images in [0, 255] to what the network reads."""
    return extractor.preprocess(images).contiguous(memory_format=torch.channels_last)


def _network(config: FinetuneConfig, num_classes: int) -> FeatureExtractor:
    """The network with a new classification layer, in its wrapper, which knows how images become its input."""
    if config.pretrained:
        extractor = load_feature_extractor(config.model, config.weights, config.input_size, "whole")
    else:
        blank = timm.create_model(config.model.removeprefix(TIMM_PREFIX), pretrained=False, num_classes=0)
        extractor = TimmExtractor(config.model, blank, config.input_size, "whole", "0" * 64)
    network: Any = extractor.network
    network.reset_classifier(num_classes)
    network.requires_grad_(True)
    return extractor
