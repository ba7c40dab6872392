"""Classifier 2 of the comparison: a network fine-tuned on the pixels of an arm.

All arms take the same number of steps, with the same images a step and the same schedule, so they differ in data alone.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from m2d import __version__
from m2d.data.views import apply_view
from m2d.errors import ConfigError, TrainingError
from m2d.evaluation.classifiers.compare import DownstreamResult, TrainingRows, Trials, compare_arms
from m2d.evaluation.classifiers.worth import FIXED_SHARE, Pool, WorthResult, measure_worth
from m2d.evaluation.images import ImageSet
from m2d.evaluation.settings import FinetuneConfig
from m2d.generation.generator import pick_device
from m2d.models.extractors import FeatureExtractor, extractor_identity, load_feature_extractor
from m2d.models.extractors.timm import TimmExtractor
from m2d.models.precision import DTYPES, pick_precision
from m2d.models.settings import TIMM_PREFIX, FeatureExtractorConfig

VIEWS = 8
PREDICTED_AT_ONCE = 64


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
        f"{config.model} fine-tuned on the pixels",
        {**asdict(config), "steps": steps},
        trials,
        images=(train, test, generated),
        notes=[
            f"Every arm takes the same {steps:,} steps of {config.batch_size} images "
            f"({config.epochs:g} passes over the real training images): arms differ in data alone.",
            "A seed decides the new classification layer, dropout, the images' order and views, and what arms draw.",
        ],
    )


def finetuned_worth(
    *,
    train: ImageSet,
    test: ImageSet,
    generated: ImageSet,
    config: FinetuneConfig,
    trials: Trials,
    original: tuple[ImageSet, ImageSet] | None = None,
) -> WorthResult:
    """What generated images are worth to classifier 2; see worth.measure_worth.

    original: train and test images as they are, where those given were preprocessed.
    """
    return measure_worth(
        FinetuneClassifier.of(train, test, generated, config),
        f"{config.model} fine-tuned on the pixels",
        Pool.of(train, test, generated),
        trials,
        choose=False,
        copies=len(generated.copies),
        notes=[f"A training takes too long to choose a share by; it is {FIXED_SHARE:g}, and the test part is one."],
        original=FinetuneClassifier.of(*original, generated, config) if original else None,
    )


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
    identity: str
    seeded = True

    @classmethod
    def of(cls, train: ImageSet, test: ImageSet, generated: ImageSet, config: FinetuneConfig) -> "FinetuneClassifier":
        """Its identity: hex digest of settings, starting weights and images; the code counts by its version.

        Raises as load_feature_extractor does.
        """
        shaping = asdict(config)
        if config.pretrained:
            size = config.input_size
            named = FeatureExtractorConfig(name=config.model, weights=config.weights, input_size=size, crop="whole")
            shaping |= {"weights": extractor_identity(named)}
        digest = hashlib.sha256(f"finetune {__version__} {sorted(shaping.items(), key=str)}\n".encode())
        digest.update(f"{len(train.classes)} classes\n".encode())
        for one in (train, test, generated):
            digest.update(f"{one.image_size} {' '.join(one.sha256)}\n".encode())
            digest.update(np.ascontiguousarray(one.labels).data)
        # A memory-mapped array is a subclass, which pickle copies; a plain one it hands to Ray's store as it is.
        plain = tuple(one.pixels.view(np.ndarray) for one in (train, test, generated))
        labels = train.labels, generated.labels
        return cls(plain[0], plain[1], plain[2], *labels, config, len(train.classes), digest.hexdigest())

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
                parts = []
                with torch.inference_mode():
                    for first in range(0, len(self.test), PREDICTED_AT_ONCE):
                        logits = network(_input(self.test[first : first + PREDICTED_AT_ONCE], extractor, device))
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
        labels = torch.from_numpy(rows.labels(self.train_labels, self.generated_labels)).to(device)
        weights = torch.from_numpy(rows.weights).float().to(device)
        total = steps_of(self.config, len(self.train))
        kernels, others = ([one for one in network.parameters() if (one.ndim > 1) == wide] for wide in (True, False))
        optimizer = torch.optim.AdamW(
            [{"params": kernels, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.config.learning_rate,
        )
        kind = pick_precision(self.config.mixed_precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
        loss = torch.zeros((), device=device)
        for step, (numbers, views) in enumerate(batches_of(len(rows.weights), self.config.batch_size, total, seed)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step, total)
            images = _input(np.stack([self._seen(rows, *one) for one in zip(numbers, views)]), extractor, device)
            chosen = torch.from_numpy(numbers).to(device)
            with torch.autocast(device.type, dtype=DTYPES[kind], enabled=kind != "no"):
                logits = network(images)
            loss = (F.cross_entropy(logits.float(), labels[chosen], reduction="none") * weights[chosen]).mean()
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


def steps_of(config: FinetuneConfig, real_images: int) -> int:
    """Optimiser steps of every arm."""
    return max(1, math.ceil(config.epochs * real_images / config.batch_size))


def learning_rate(config: FinetuneConfig, step: int, total: int) -> float:
    """Of step 0 .. total - 1: up to the highest in equal parts, then half a cosine towards 0."""
    warmup = int(config.warmup * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def batches_of(images: int, batch_size: int, steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each step: image numbers int64 [B], in shuffled passes over all of them, and a view of each, in 0 .. 7."""
    generator = np.random.default_rng(seed)
    waiting = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, generator.permutation(images)])
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        yield batch, generator.integers(VIEWS, size=batch_size)


def _input(pixels: np.ndarray, extractor: FeatureExtractor, device: torch.device) -> Tensor:
    """uint8 [B, S, S, 3] to what the network reads."""
    images = torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2)
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
